"""The arguments of smp.DistributedModel about gradients, all together, on parameters that are not used regularly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import modelparallel as smp
from distributed_run import assert_equal_over, merged_gradients
from parity import assert_parity
from rank_tests import RankTests, on
from training import token_loss, token_step

DP2 = RankTests(2, {"microbatches": 2})
PP2 = RankTests(4, {"pipeline_parallel_degree": 2, "microbatches": 2})
ZERO_BUBBLE = RankTests(4, {"pipeline_parallel_degree": 2, "microbatches": 2, "pipeline": "zero_bubble"}, is_slow=True)
TP2 = RankTests(4, {"tensor_parallel_degree": 2, "microbatches": 2})

SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"find_unused_parameters": True, "bucket_cap_mb": 2e-4},
    {"find_unused_parameters": True, "overlapping_allreduce": False, "bucket_cap_mb": 2e-4},
    {"gradient_as_bucket_view": True, "bucket_cap_mb": 2e-4},
    {"gradient_as_bucket_view": True, "overlapping_allreduce": False},
    {"backward_passes_per_step": 2, "bucket_cap_mb": 2e-4},
    {"backward_passes_per_step": 2, "gradient_as_bucket_view": True},
    {"average_grads_across_microbatches": False, "broadcast_buffers": False},
)


class Irregular(nn.Module):
    """Used by all, by some microbatches, by some ranks, by none; a table with sparse gradients; buffers of a module
    without parameters; what is frozen changes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6, sparse=True)
        self.wide = nn.Linear(6, 10)
        self.back = nn.Linear(10, 6)
        self.branches = nn.ModuleList([nn.Linear(6, 6) for _ in range(4)])
        self.never = nn.Linear(3, 3)
        self.counter = nn.Module()
        self.counter.register_buffer("seen", torch.zeros(()))
        self.head = nn.Linear(6, 9)

    def forward(self, tokens: Tensor, branch: Tensor) -> Tensor:
        x = torch.tanh(self.back(torch.tanh(self.wide(self.table(tokens)))))
        which = int(branch.max())
        if which < 4:
            x = x + self.branches[which](x)
        return self.head(x)


def make_net() -> nn.Module:
    torch.manual_seed(4)
    return Irregular().double()


def freeze(model: nn.Module, step: int) -> None:
    model.branches[0].requires_grad_(step != 1)
    model.back.bias.requires_grad_(step != 2)
    model.branches[3].requires_grad_(step > 0)


def batch(copy: int, step: int) -> tuple[Tensor, Tensor]:
    """The microbatches use another branch on each copy, or none (4); step 2: none anywhere."""
    generator = torch.Generator().manual_seed(10 * copy + step)
    tokens = torch.randint(0, 9, (4, 3), generator=generator)
    branches = [4, 4] if step == 2 else [(copy + step) % 5, (2 * copy + step + 1) % 5]
    return tokens, torch.tensor(branches).repeat_interleave(2)


def expected_gradients(steps: list[int], freezes: int) -> dict[str, Tensor | None]:
    """Of the mean over copies, summed over the steps."""
    plain = make_net()
    freeze(plain, freezes)
    for step in steps:
        for copy in range(smp.dp_size()):
            tokens, branch = batch(copy, step)
            for part in zip(tokens.tensor_split(2), branch.tensor_split(2), strict=True):
                (token_loss(plain, *part) / 2 / smp.dp_size()).backward()
    return {
        name: p.grad.to_dense() if p.grad is not None and p.grad.is_sparse else p.grad
        for name, p in plain.named_parameters()
    }


def assert_gradients(model: Any, wanted: dict[str, Tensor | None], scale: float) -> None:
    for name, parameter in model.local_named_parameters():
        assert (parameter.grad is None) == (wanted[name] is None), name
    whole = {name: value * scale for name, value in wanted.items() if value is not None}
    found = merged_gradients(model)
    assert_parity({name: found[name] for name in whole}, whole, dtype=torch.float64)
    assert_equal_over(smp.CommGroup.RDP_GROUP, {n: p.grad for n, p in model.local_named_parameters()})


@on(DP2, PP2, ZERO_BUBBLE, TP2)
def test_every_setting_gives_the_gradients_of_one_process():
    for arguments in SETTINGS:
        net = make_net()
        freeze(net, 0)
        smp.set_tensor_parallelism(net.wide)
        smp.set_tensor_parallelism(net.back)
        model = smp.DistributedModel(net, **arguments)
        passes = arguments.get("backward_passes_per_step", 1)
        scale = 1.0 if arguments.get("average_grads_across_microbatches", True) else 2.0
        for step in range(4):
            freeze(net, step)
            model.zero_grad(set_to_none=True)
            steps = [step] if passes == 1 else [step, step + 1]
            for number in steps:
                token_step(model, *batch(smp.dp_rank(), number))
            assert_gradients(model, expected_gradients(steps, step), scale)
        # Gradients that were held back, then some on top of final ones.
        freeze(net, 3)
        model.zero_grad()
        with model.no_sync():
            for _ in range(passes):
                token_step(model, *batch(smp.dp_rank(), 0))
        for _ in range(passes):
            token_step(model, *batch(smp.dp_rank(), 3))
        assert_gradients(model, expected_gradients([0, 3] * passes, 3), scale)
        for _ in range(passes):
            token_step(model, *batch(smp.dp_rank(), 1))
        assert_gradients(model, expected_gradients([0, 3, 1] * passes, 3), scale)


@on(DP2, PP2)
def test_broadcast_buffers_reach_modules_without_parameters():
    for broadcasts in (True, False):
        net = make_net()
        model = smp.DistributedModel(net, broadcast_buffers=broadcasts)
        token_step(model, *batch(0, 0))  # partitions
        local = dict(model.local_named_buffers())
        for name, buffer in local.items():
            assert name == "counter.seen"
            buffer.fill_(smp.dp_rank() + 1.0)
        token_step(model, *batch(0, 1))
        for buffer in local.values():
            assert float(buffer) == (1.0 if broadcasts else smp.dp_rank() + 1.0)
        held = smp.allgather(len(local), smp.CommGroup.PP_GROUP)
        assert sum(held) >= 1
