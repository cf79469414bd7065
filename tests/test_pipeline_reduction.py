"""Gradient reduction under a pipeline: equal gradients on all data-parallel ranks, and equal to one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parity import assert_parity, reference_run
from pool import run_ranks
from training import step_of, token_loss

NUM_STEPS = 3
NUM_MICROBATCHES = 2


class Awkward(nn.Module):
    """Weights used in two pieces, tied, frozen, unused on some microbatches and unused always."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.shared = nn.Linear(8, 8)
        self.between = nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8)
        self.sometimes = nn.Linear(8, 8)
        self.never = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)

    def forward(self, tokens: Tensor, use: Tensor) -> Tensor:
        x = self.shared(self.embed(tokens))
        x = self.shared(torch.tanh(self.between(x))) + x
        x = self.frozen(x)
        if use.sum().item() > 0:
            x = x + self.sometimes(x)
        return self.head(x)


def make_model() -> nn.Module:
    torch.manual_seed(3)
    return Awkward().double()


def batch(step: int, num_copies: int) -> tuple[Tensor, Tensor]:
    """Rows of all copies; `use` is off in the last microbatch of copy 0 and, in step 1, everywhere."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 12, (4 * num_copies, 5), generator=generator)
    use = torch.ones(4 * num_copies, dtype=torch.long)
    use[2:4] = 0
    if step == 1:
        use[:] = 0
    return tokens, use


def make_optimizer(parameters: Any, backward_passes: int = 1) -> torch.optim.Optimizer:
    # Gradients of several passes are summed: half the rate makes two of them one.
    return torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.1 / backward_passes, momentum=0.9)


def train(overlap: bool, backward_passes: int) -> Any:
    import modelparallel as smp

    net = make_model()
    smp.set_tensor_parallelism(net.between)
    smp.set_tensor_parallelism(net.frozen)
    model = smp.DistributedModel(
        net, overlapping_allreduce=overlap, backward_passes_per_step=backward_passes, bucket_cap_mb=0.001
    )
    optimizer = smp.DistributedOptimizer(make_optimizer(model.parameters(), backward_passes))
    train_step = step_of(token_loss)
    losses, gradients = [], []
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        rows = [part.chunk(smp.dp_size())[smp.dp_rank()] for part in batch(step, smp.dp_size())]
        if backward_passes == 1:
            losses.append(float(train_step(model, *rows).reduce_mean()))
        else:
            for half in range(2):
                losses.append(float(train_step(model, *(part.chunk(2)[half] for part in rows)).reduce_mean()))
        gradients.append({name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()})
        optimizer.step()
    return losses, gradients, model.state_dict(), smp.dp_rank(), smp.tp_rank(), smp.pp_rank()


@pytest.mark.parametrize(
    ("num_ranks", "tp", "overlap", "backward_passes"),
    [
        (4, 1, True, 1),
        (4, 1, False, 1),
        (4, 2, True, 1),
        (4, 1, True, 2),
        pytest.param(8, 2, True, 1, marks=pytest.mark.slow),
    ],
)
def test_gradients_equal_on_all_ranks_and_to_one_process(
    num_ranks: int, tp: int, overlap: bool, backward_passes: int
) -> None:
    num_copies = num_ranks // 2
    parameters = {
        "pipeline_parallel_degree": 2, "tensor_parallel_degree": tp, "ddp": True, "timeout_seconds": 60,
        "microbatches": NUM_MICROBATCHES // backward_passes,
    }  # fmt: skip
    ranks = run_ranks(train, num_ranks, overlap, backward_passes, parameters=parameters)
    expected = reference_run(
        make_model,
        [batch(step, num_copies) for step in range(NUM_STEPS)],
        token_loss,
        num_microbatches=NUM_MICROBATCHES,
        make_optimizer=make_optimizer,
        num_copies=num_copies,
    )
    per_rank = torch.tensor([rank[0] for rank in ranks], dtype=torch.float64).reshape(num_ranks, NUM_STEPS, -1).mean(2)
    first_stage = [index for index, rank in enumerate(ranks) if rank[5] == 0]
    assert_parity(
        {"losses": per_rank[first_stage].mean(0)},
        {"losses": torch.tensor(expected.losses, dtype=torch.float64)},
        dtype=torch.float64,
    )
    for rank in ranks:
        assert_parity(rank[2], expected.weights, dtype=torch.float64)
    for one in ranks:
        for other in ranks:
            if one[4:] == other[4:]:
                _assert_equal_gradients(one[1], other[1])
    merged: dict[str, Any] = {}
    for rank in sorted(ranks, key=lambda rank: rank[4]):
        for name, gradient in rank[1][0].items():
            split = name in ("between.weight", "frozen.weight") and tp > 1
            if gradient is None:
                merged[name] = torch.zeros_like(expected.gradients[name])
            elif split and name in merged and merged[name].shape != expected.gradients[name].shape:
                if rank[3] == rank[4]:  # the first copy of the slice
                    merged[name] = torch.cat([merged[name], gradient], dim=1)
            elif name not in merged:
                merged[name] = gradient
    scale = float(backward_passes)
    assert_parity(merged, {name: value * scale for name, value in expected.gradients.items()}, dtype=torch.float64)


def _assert_equal_gradients(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    for first, second in zip(one, other, strict=True):
        assert first.keys() == second.keys()
        for name in first:
            assert (first[name] is None) == (second[name] is None), name
            if first[name] is not None:
                assert torch.equal(first[name], second[name]), name


def test_parameters_without_gradient_keep_none_under_a_pipeline() -> None:
    parameters = {"pipeline_parallel_degree": 2, "ddp": True, "microbatches": 2, "timeout_seconds": 60}
    for rank in run_ranks(train, 4, True, 1, parameters=parameters):
        for step, gradients in enumerate(rank[1]):
            for name, gradient in gradients.items():
                is_absent = name.startswith(("never", "frozen")) or (step == 1 and name.startswith("sometimes"))
                assert (gradient is None) == is_absent, (step, name)
