"""Offloading of the inputs of recomputed regions to host memory (statement 85), on the CPU."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modelparallel as smp
from logs import logged_lines
from modelparallel.recomputation.offload import HostStore
from modelparallel.training import runtime
from parity import assert_parity
from rank_tests import RankTests, on
from recomputation_models import Block, same_random_numbers
from training import square_step

ONE = RankTests(1, {"microbatches": 2, "offload_activations": True, "activation_loading_horizon": 2})
PIPELINE = {
    "pipeline_parallel_degree": 2, "microbatches": 6, "active_microbatches": 3, "auto_partition": False,
    "default_partition": 0, "offload_activations": True, "activation_loading_horizon": 2,
}  # fmt: skip
TWO = RankTests(2, PIPELINE)
SPLIT = RankTests(2, {**PIPELINE, "pipeline": "zero_bubble", "active_microbatches": 6})
NEAR = RankTests(2, {**PIPELINE, "activation_loading_horizon": 1, "pipeline": "simple", "active_microbatches": 6})
FAR = RankTests(2, {**PIPELINE, "activation_loading_horizon": 6, "pipeline": "simple", "active_microbatches": 6})


def store() -> HostStore:
    found = runtime.current().engine.activation_store
    assert isinstance(found, HostStore)
    return found


@contextmanager
def watched() -> Iterator[HostStore]:
    """A store that writes down what happens."""
    of = runtime.current()
    before = store()
    fresh = of.engine.activation_store = HostStore(before.device, before.horizon)
    fresh.events = []
    yield fresh
    of.engine.activation_store = before


def make(num_blocks: int = 4, *, is_marked: bool, **options: Any) -> Any:
    torch.manual_seed(1)
    made = nn.Sequential(*(Block(**options) for _ in range(num_blocks))).double().train()
    model = smp.DistributedModel(made)
    for block in list(made)[num_blocks // 2 :]:
        smp.set_partition(block, smp.pp_size() - 1)
    if is_marked:
        smp.set_activation_checkpointing(model.get_module())
    return model


def num_offloaded() -> int:
    """Inputs of regions of one microbatch that go to host memory: what was received from another stage does not."""
    return 4 // smp.pp_size() - (smp.pp_rank() > 0)


def batch(number: int) -> Tensor:
    return torch.randn(12, 8, generator=torch.Generator().manual_seed(number), dtype=torch.float64)


def trained(model: Any, num_steps: int = 3) -> tuple[list[float], dict[str, Tensor]]:
    losses = []
    with same_random_numbers():
        for number in range(num_steps):
            model.zero_grad()
            losses.append(float(square_step(model, batch(number)).reduce_mean()))
    return losses, {name: p.grad.clone() for name, p in model.local_named_parameters()}


# One process


@on(ONE, TWO, SPLIT)
def test_c085_same_gradients() -> None:
    expected = trained(make(is_marked=False))
    with watched() as host:
        found = trained(make(is_marked=True))
        assert found[0] == expected[0]
        assert_parity(found[1], expected[1], dtype=torch.float64)
        num_microbatches = smp.num_microbatches()
        assert host.counts.stored == host.counts.loaded == 3 * num_microbatches * num_offloaded()
        assert host.counts.stored_bytes == host.counts.stored * (12 // num_microbatches) * 8 * 8
        assert not host.in_host_memory()


@on(ONE)
def test_c085_saved_inputs_live_in_host_memory_after_the_forward() -> None:
    model = make(is_marked=True)
    made: list[weakref.ref[Tensor]] = []
    values: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        if len(made) < 4:
            made.append(weakref.ref(output.untyped_storage()))
            values.append(args[0].detach().clone())

    for block in model.module:
        block.register_forward_hook(note)
    with watched() as host:
        x = batch(0)
        loss = model(x).square().mean()
        there = host.in_host_memory()
        assert len(there) == 4
        for one, other in zip(there, values, strict=True):
            assert torch.equal(one, other)
            assert one.untyped_storage().data_ptr() not in (x.untyped_storage().data_ptr(),)
        gc.collect()
        assert [storage() is None for storage in made[:3]] == [True] * 3  # nothing else holds them
        loss.backward()
        assert not host.in_host_memory()
        # The last layer's input is fetched when its backward starts, and with it those of the two layers before.
        stores, rest = host.events[:4], host.events[4:]
        assert stores == [("store", number) for number in range(4)]
        assert rest == [
            ("need", 3), ("load", 3), ("load", 2), ("load", 1), ("need", 2), ("load", 0), ("need", 1), ("need", 0)
        ]  # fmt: skip
        assert host.counts.ahead == 3


@on(ONE)
def test_c085_without_checkpointing_nothing_is_transferred_and_a_warning_says_so() -> None:
    with logged_lines() as seen:
        with watched() as host:
            runtime.current()._unused_store = host
            trained(make(is_marked=False), 2)
            assert host.counts.stored == 0 and host.events == []
        assert sum("nothing was moved to host memory" in text for text in seen) == 1
        with watched() as host:
            runtime.current()._unused_store = host
            trained(make(is_marked=True), 1)
            assert host.counts.stored == 8
        assert sum("nothing was moved to host memory" in text for text in seen) == 1


@on(ONE)
def test_masks_and_ids_stay_and_tensors_that_were_written_to_are_not_hidden() -> None:
    from modelparallel.errors import RecomputationError

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
            return torch.tanh(self.linear(x[ids])).masked_fill(mask, 0.0)

    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.linear(x))
            x.zero_()
            return y

    with watched() as host:
        ids, mask = torch.tensor([1, 0]), torch.tensor([True] * 4 + [False] * 4)
        smp.checkpoint(Masked().double(), batch(0)[:2], ids, mask).sum().backward()
        assert host.counts.stored == host.counts.loaded == 1
        with pytest.raises(RecomputationError, match="written to in place"):
            smp.checkpoint(Writing().double(), batch(0)).sum().backward()


@on(ONE)
def test_evaluation_transfers_nothing() -> None:
    model = make(is_marked=True)
    with watched() as host:
        model.eval()
        model(batch(0)).sum().backward()
        model.train()
        with torch.no_grad():
            model(batch(0))
        assert host.counts.stored == 0


# Pipelines


@on(TWO, SPLIT, NEAR, FAR)
def test_c085_activations_come_back_before_their_backward() -> None:
    model = make(is_marked=True)
    trained(model, 1)  # the first step has no plan to look ahead in
    with watched() as host:
        trained(model, 1)
        num_regions = num_offloaded() * 6
        assert host.counts.stored == host.counts.loaded == num_regions
        assert host.counts.ahead == num_regions
        needs = [number for what, number in host.events if what == "need"]
        loads = [number for what, number in host.events if what == "load"]
        assert sorted(needs) == sorted(loads) == list(range(num_regions))
        # The backward of a microbatch needs its last region first.
        assert smp.pp_rank() or [first - second for first, second in itertools.pairwise(needs)][::2] == [1] * 6


def how_early(events: list[tuple[str, int]]) -> int:
    """How many tensors have come back before the first of them is needed."""
    return [what for what, _ in events if what != "store"].index("need")


@on(NEAR, FAR)
def test_c085_a_larger_horizon_fetches_earlier() -> None:
    model = make(is_marked=True)
    trained(model, 1)
    horizon = store().horizon
    with watched() as host:
        trained(model, 1)
        # In the simple schedule all six forwards come first; the window holds the backward itself and the next tasks.
        assert how_early(host.events) == num_offloaded() * min(6, horizon + 1)
        first_load = [what for what, _ in host.events].index("load")
        # Of the first backward: before the task ahead of it, or as soon as it is there.
        assert first_load == num_offloaded() * (5 if horizon == 1 else 1)
