"""``SyncBatchNorm`` in a distributed model: parity with BatchNorm on the union of the batches of all copies."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import modelparallel as smp
from distributed_run import distributed_run
from logs import logged_lines
from modelparallel.errors import SMPConfigError
from modelparallel.model.batch_norm import GroupBatchNorm
from parity import ReferenceResult, assert_parity
from rank_tests import RankTests, on
from training import classification_loss, sgd, step_of

DP3 = RankTests(3, {"microbatches": 2})
PP2 = RankTests(4, {"pipeline_parallel_degree": 2, "microbatches": 2})
ZERO_BUBBLE = RankTests(4, {"pipeline_parallel_degree": 2, "microbatches": 2, "pipeline": "zero_bubble"})
TP2 = RankTests(4, {"tensor_parallel_degree": 2, "microbatches": 2})
TP2_PRESCALED = RankTests(4, {"tensor_parallel_degree": 2, "microbatches": 2, "prescaled_batch": True})

NUM_STEPS = 3
NUM_MICROBATCHES = 2


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Linear(16, 6)
        self.flat_norm = nn.BatchNorm1d(6, momentum=None)
        self.plain_norm = nn.BatchNorm1d(6, affine=False, track_running_stats=False)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.first(x))).flatten(1)
        return self.last(self.plain_norm(torch.tanh(self.flat_norm(self.second(x)))))


def make_plain() -> nn.Module:
    torch.manual_seed(2)
    return Images().double()


def make_synchronised() -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(make_plain())


def batch(step: int, num_copies: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    size = 6 * num_copies
    x = torch.randn(size, 2, 4, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (size,), generator=generator)


def reference(num_copies: int) -> ReferenceResult:
    """BatchNorm over the union, for each microbatch, of what all copies have of it."""
    model = make_plain()
    optimizer = sgd(model.parameters())
    losses, gradients = [], {}
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        parts = [
            [own.tensor_split(NUM_MICROBATCHES) for own in value.tensor_split(num_copies)]
            for value in batch(step, num_copies)
        ]
        mean = 0.0
        for microbatch in range(NUM_MICROBATCHES):
            x, y = (torch.cat([own[microbatch] for own in part]) for part in parts)
            loss = classification_loss(model, x, y) / NUM_MICROBATCHES
            loss.backward()
            mean += float(loss.detach())
        losses.append(mean)
        if step == 0:
            gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        optimizer.step()
    return ReferenceResult(losses, gradients, {name: value.clone() for name, value in model.state_dict().items()})


def verify(found: ReferenceResult, num_copies: int) -> None:
    expected = reference(num_copies)
    assert_parity(found.gradients, expected.gradients, dtype=torch.float64)
    assert_parity(found.weights, expected.weights, dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(found.losses), torch.tensor(expected.losses), rtol=1e-6, atol=0)


@on(DP3, PP2, ZERO_BUBBLE, TP2)
def test_statistics_are_those_of_the_batches_of_all_copies():
    batches = [batch(step, smp.dp_size()) for step in range(NUM_STEPS)]
    for overlap in (True, False):
        found = distributed_run(
            make_synchronised,
            batches,
            classification_loss,
            make_optimizer=sgd,
            overlapping_allreduce=overlap,
            bucket_cap_mb=2e-4,
        )
        verify(found, smp.dp_size())


@on(TP2_PRESCALED)
def test_equal_batches_of_a_tp_group_count_once():
    model = smp.DistributedModel(make_synchronised())
    assert model.module.norm.group.ranks == tuple(smp.get_rdp_group())
    optimizer = sgd(model.parameters())
    train_step = step_of(classification_loss)
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        train_step(model, *(part.tensor_split(2)[smp.rdp_rank()] for part in batch(step, 2)))
        optimizer.step()
    assert_parity(model.state_dict(), reference(2).weights, dtype=torch.float64)


@on(DP3)
def test_uneven_batches_evaluation_and_half_precision():
    model, plain = smp.DistributedModel(make_synchronised()), make_plain()
    sizes = [4, 2, 5]
    whole = torch.cat([batch(step, 1)[0][:size] for step, size in enumerate(sizes)])
    own = whole.split(sizes)[smp.dp_rank()]
    wanted = plain(whole).split(sizes)[smp.dp_rank()]
    torch.testing.assert_close(model(own), wanted, rtol=1e-10, atol=1e-12)
    model.eval()
    plain.plain_norm = nn.BatchNorm1d(6, affine=False, track_running_stats=False)
    plain.eval()
    torch.testing.assert_close(model(own), plain(own), rtol=1e-10, atol=1e-12)
    half = smp.DistributedModel(make_synchronised().bfloat16())
    assert half(own.bfloat16()).dtype == torch.bfloat16


@on(PP2)
def test_the_group_is_changed_and_told():
    with logged_lines() as records:
        for group in (None, dist.group.WORLD, smp.get_dp_process_group()):
            net = nn.SyncBatchNorm.convert_sync_batchnorm(make_plain(), group)
            layer, names = net.norm, list(net.state_dict())
            smp.DistributedModel(net)
            assert net.norm is layer and isinstance(layer, GroupBatchNorm) and list(net.state_dict()) == names
            assert layer.group.ranks == tuple(smp.get_dp_group())
    assert len([text for text in records if "norm, flat_norm, plain_norm" in text]) == (3 if smp.rank() == 0 else 0)


@on(PP2)
def test_ranks_that_do_not_run_the_layer_are_refused():
    stages = dist.new_group([0, 1, 2]), dist.new_group([1, 2, 3])
    group = stages[0] if smp.rank() < 3 else stages[1]
    net = nn.SyncBatchNorm.convert_sync_batchnorm(make_plain(), group)
    with pytest.raises(SMPConfigError, match=r"'norm' is a SyncBatchNorm over the global ranks \[.*DP_GROUP"):
        smp.DistributedModel(net)


@on(DP3)
def test_join_is_refused():
    model = smp.DistributedModel(make_synchronised())
    with pytest.raises(SMPConfigError, match="SyncBatchNorm layers, whose forward waits"):
        model.join()
    with model.join(throw_on_early_termination=True, enable=False):
        pass
