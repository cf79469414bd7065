"""``model.join()``: data-parallel ranks with different numbers of batches, against a simulation in one process."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modelparallel as smp
from distributed_run import assert_equal_over
from modelparallel.errors import DivergenceError, SMPConfigError, StepUsageError
from parity import assert_parity
from rank_tests import RankTests, on
from training import classification_loss, classification_step, sgd

DP3 = RankTests(3, {"microbatches": 2})
PP2 = RankTests(4, {"pipeline_parallel_degree": 2, "microbatches": 2})
TP2 = RankTests(4, {"tensor_parallel_degree": 2, "microbatches": 2})
SHARDED = RankTests(3, {"shard_optimizer_state": True, "microbatches": 2})
NO_DDP = RankTests(1, {"ddp": False})

CAP = 2e-4  # MiB: several buckets


class Net(nn.Module):
    """One layer is used by some batches only, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.second = nn.Linear(6, 6)
        self.sometimes = nn.Linear(6, 6)
        self.never = nn.Linear(2, 2)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.second(self.norm(self.first(x))))
        if x.shape[0] > 2:
            x = x + self.sometimes(x)
        return self.last(x)


def make_net() -> nn.Module:
    torch.manual_seed(5)
    return Net().double()


def batch(member: int, step: int) -> tuple[Tensor, Tensor]:
    """Of 4 or 6 samples, so that microbatches have 2 or 3: those of odd steps use every layer."""
    generator = torch.Generator().manual_seed(100 * member + step)
    size = 6 if step % 2 else 4
    x = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (size,), generator=generator)


def simulate(counts: Sequence[int], *, by_initial: bool, num_microbatches: int, broadcasts: bool = True) -> Any:
    """What DDP documents: the gradients of those with batches, summed and divided by all or by them; buffers are those
    of the first with batches. ``counts``: batches of each copy.
    """
    model = make_net()
    copies = [copy.deepcopy(model) for _ in counts]
    optimizer = sgd(model.parameters())
    for step in range(max(counts)):
        working = [member for member, count in enumerate(counts) if step < count]
        source = copy.deepcopy(dict(copies[working[0]].named_buffers()))
        optimizer.zero_grad()
        for index, member in enumerate(copies):
            for name, buffer in member.named_buffers():
                if broadcasts:
                    buffer.copy_(source[name])
            if index not in working:
                continue
            with torch.no_grad():
                for own, parameter in zip(member.parameters(), model.parameters(), strict=True):
                    own.copy_(parameter)
            member.zero_grad()
            x, y = batch(index, step)
            parts = zip(x.tensor_split(num_microbatches), y.tensor_split(num_microbatches), strict=True)
            for part in parts:
                (classification_loss(member, *part) / num_microbatches).backward()
            for own, parameter in zip(member.parameters(), model.parameters(), strict=True):
                if own.grad is not None:
                    share = own.grad / (len(counts) if by_initial else len(working))
                    parameter.grad = share if parameter.grad is None else parameter.grad + share
        optimizer.step()
    final = copies[counts.index(max(counts))]
    return {**dict(model.state_dict()), **dict(final.named_buffers())}


def wrapped(**arguments: Any) -> Any:
    net = make_net()
    smp.set_tensor_parallelism(net.second)
    return smp.DistributedModel(net, **{"bucket_cap_mb": CAP, **arguments})


def copy_index() -> int:
    return smp.rdp_rank() if smp.tp_size() > 1 else smp.dp_rank()


def run_joined(model: Any, counts: Sequence[int], *, as_step: bool, **arguments: Any) -> None:
    optimizer = smp.DistributedOptimizer(sgd(model.parameters()))
    with model.join(**arguments):
        for step in range(counts[copy_index()]):
            optimizer.zero_grad()
            x, y = batch(copy_index(), step)
            if as_step:
                classification_step(model, x, y)
            else:
                classification_loss(model, x, y).backward()
            optimizer.step()


def verify(model: Any, expected: dict[str, Tensor]) -> None:
    found = model.state_dict()
    assert_parity(
        {name: value.double() for name, value in found.items()},
        {name: value.double() for name, value in expected.items()},
        dtype=torch.float64,
    )
    assert_equal_over(smp.CommGroup.RDP_GROUP, dict(model.local_named_parameters()))
    assert_equal_over(smp.CommGroup.RDP_GROUP, dict(model.local_named_buffers()))


def counts_of(num_copies: int) -> list[list[int]]:
    return [[2, 4], [4, 1], [3, 3]] if num_copies == 2 else [[2, 5, 3], [1, 2, 4], [3, 1, 3]]


@on(DP3, PP2)
def test_ranks_with_different_numbers_of_batches():
    for counts in counts_of(smp.dp_size()):
        for by_initial in (True, False):
            for as_step in (True, False):
                if smp.pp_size() > 1 and not as_step:
                    continue
                expected = simulate(counts, by_initial=by_initial, num_microbatches=2 if as_step else 1)
                for arguments in ({}, {"overlapping_allreduce": False}, {"gradient_as_bucket_view": True}):
                    model = wrapped(**arguments)
                    run_joined(model, counts, as_step=as_step, divide_by_initial_world_size=by_initial)
                    verify(model, expected)


@on(TP2)
def test_c049_two_tp_groups_run_different_numbers_of_steps():
    # Two copies of two ranks; the ranks of one feed the same batches, so that it counts as one copy.
    for counts in counts_of(2):
        for by_initial in (True, False):
            expected = simulate(counts, by_initial=by_initial, num_microbatches=2)
            model = wrapped()
            run_joined(model, counts, as_step=True, divide_by_initial_world_size=by_initial)
            assert len(list(model.distributed_modules())) == 1
            verify(model, expected)


@on(DP3, PP2)
def test_training_goes_on_after_join():
    """All ranks together again: also the counter of backward passes, and overlap."""
    counts = counts_of(smp.dp_size())[0]
    model = wrapped(backward_passes_per_step=2)
    optimizer = smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    with model.join():
        for step in range(2 * counts[copy_index()] - 1):
            classification_step(model, *batch(copy_index(), step))
            if step % 2:
                optimizer.step()
                optimizer.zero_grad()
    for parameter in model.local_parameters():
        parameter.grad = None
    plain = make_net()
    plain.load_state_dict(model.state_dict())
    for half in range(2):
        classification_step(model, *batch(copy_index(), half))
        for member in range(smp.dp_size()):
            x, y = batch(member, half)
            for part in zip(x.tensor_split(2), y.tensor_split(2), strict=True):
                (classification_loss(plain, *part) / 2 / smp.dp_size()).backward()
    wanted = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in model.local_named_parameters():
        assert (parameter.grad is None) == (wanted[name] is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-9, atol=1e-12)


@on(SHARDED)
def test_ranks_without_batches_go_on_updating_their_shards():
    for counts in counts_of(3):
        for by_initial in (True, False):
            model = wrapped(broadcast_buffers=False)
            with pytest.raises(StepUsageError, match=r"wrap the optimizer in smp\.DistributedOptimizer"), model.join():
                pass
            optimizer = smp.DistributedOptimizer(sgd(model.parameters()))
            with model.join(divide_by_initial_world_size=by_initial):
                for step in range(counts[copy_index()]):
                    optimizer.zero_grad()
                    classification_step(model, *batch(copy_index(), step))
                    optimizer.step()
            expected = simulate(counts, by_initial=by_initial, num_microbatches=2, broadcasts=False)
            verify(model, expected)


@on(DP3)
def test_a_communication_hook_inside_join():
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    for by_initial in (True, False):
        model = wrapped()
        model.register_comm_hook(None, allreduce_hook)
        run_joined(model, [2, 5, 3], as_step=True, divide_by_initial_world_size=by_initial)
        verify(model, simulate([2, 5, 3], by_initial=by_initial, num_microbatches=2))


@on(DP3)
def test_switched_off_or_ended_by_the_first():
    model = wrapped()
    with model.join(enable=False):
        assert not model.gradients.joining.is_joining
        classification_step(model, *batch(copy_index(), 0))
    with pytest.raises(RuntimeError, match="exhausted"):
        run_joined(model, [2, 5, 3], as_step=True, throw_on_early_termination=True)
    assert not model.gradients.joining.is_joining
    with model.join(), pytest.raises(StepUsageError, match="one is enough"), model.join():
        pass


@on(DP3)
def test_different_orders_are_noticed():
    model = wrapped()
    x, y = batch(copy_index(), 0)
    with pytest.raises(DivergenceError, match="different things"), model.join():
        loss = classification_loss(model, x, y)
        if smp.dp_rank() == 0:
            classification_loss(model, x, y)  # broadcasts buffers
        else:
            loss.backward()


@on(NO_DDP)
def test_join_needs_ddp():
    with pytest.raises(SMPConfigError, match="needs ddp: True"), smp.DistributedModel(nn.Linear(2, 2)).join():
        pass


@on(PP2)
def test_ranks_that_run_out_before_the_partition_are_told():
    with pytest.raises(StepUsageError, match="before the model was partitioned"), wrapped().join():
        pass
