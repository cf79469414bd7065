"""Activation checkpointing over the stages of a pipeline: parity, and one recomputation for each microbatch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import modelparallel as smp
from engine_runs import compare, outcomes
from logs import logged_lines
from modelparallel.errors import PartitionError, SMPConfigError, StepUsageError
from modelparallel.training import runtime
from parity import assert_parity
from rank_tests import RankTests, on
from recomputation_models import Block, CountProducts, num_runs, same_random_numbers, saved_bytes
from recomputation_programs import CASES
from training import forward_step, square_step

MODULE = "recomputation_programs"
NAMES = sorted({name.split("/")[0] for name in CASES})


@functools.cache
def expected(num_microbatches: int) -> dict:
    names = [f"{name}/plain" for name in NAMES]
    return outcomes(MODULE, names, 1, num_microbatches=num_microbatches, min_steps=3)[0]


@pytest.mark.parametrize(
    ("num_stages", "how", "more"),
    [
        pytest.param(2, "torch", {"pipeline": "interleaved"}, marks=pytest.mark.slow),
        (2, "torch", {"pipeline": "zero_bubble"}),
        (2, "reentrant", {"pipeline": "simple"}),
        (3, "torch", {"pipeline": "zero_bubble"}),
        pytest.param(3, "reentrant", {"pipeline": "interleaved"}, marks=pytest.mark.slow),
        pytest.param(4, "torch", {"pipeline": "interleaved"}, marks=pytest.mark.slow),
        pytest.param(4, "reentrant", {"pipeline": "zero_bubble"}, marks=pytest.mark.slow),
    ],
)
def test_c083_regions_over_stages_give_the_same_gradients(num_stages: int, how: str, more: dict) -> None:
    names = [f"{name}/{how}" for name in NAMES if f"{name}/{how}" in CASES]
    found = outcomes(MODULE, names, num_stages, num_microbatches=4, min_steps=3, **more)
    wanted = expected(4)
    for name in names:
        compare(name, [rank[name] for rank in found], wanted[name.split("/")[0] + "/plain"])


# Marked modules, counts, and what is kept

TWO = RankTests(
    2, {"pipeline_parallel_degree": 2, "microbatches": 4, "auto_partition": False, "default_partition": 0}, is_slow=True
)
SPLIT = RankTests(
    2,
    {
        "pipeline_parallel_degree": 2, "microbatches": 4, "auto_partition": False, "default_partition": 0,
        "pipeline": "zero_bubble",
    },
)  # fmt: skip
AUTO = RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 4})


class Deep(nn.Module):
    """A stack between two layers."""

    def __init__(self, num_blocks: int = 4, **options: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.blocks = nn.Sequential(*(Block(**options) for _ in range(num_blocks)))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blocks(self.first(x)))


def deep(homes: tuple[int, ...], **options: Any) -> Any:
    torch.manual_seed(1)
    model = smp.DistributedModel(Deep(len(homes), **options).double().train())
    for block, home in zip(model.get_module().blocks, homes, strict=True):
        smp.set_partition(block, home)
    smp.set_partition(model.get_module().last, homes[-1])
    return model


def trained(model: Any, num_steps: int = 3) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """(losses, gradients of the last step, buffers) after several steps; the gradients of all stages."""
    losses = []
    with same_random_numbers():
        for number in range(num_steps):
            x = torch.randn(8, 8, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
            model.zero_grad()
            losses.append(float(square_step(model, x).reduce_mean()))
    own = {name: p.grad.clone() for name, p in model.local_named_parameters() if p.grad is not None}
    gradients: dict[str, Tensor] = {}
    for part in smp.allgather(own, smp.PP_GROUP):
        gradients.update(part)
    buffers = {name: value for name, value in model.state_dict().items() if "norm" in name}
    return losses, gradients, buffers


def all_runs(model: Any) -> list[int]:
    """How often each block has run, on all stages together."""
    return [sum(column) for column in zip(*smp.allgather(num_runs(model.module), smp.PP_GROUP), strict=True)]


MARKS: dict[str, Callable[[Any], Any]] = {
    "each": lambda m: smp.set_activation_checkpointing(m.blocks),
    "contiguous": lambda m: smp.set_activation_checkpointing(m.blocks, strategy="contiguous"),
    "group_2": lambda m: smp.set_activation_checkpointing(m.blocks, strategy="group_2"),
    "below": lambda m: [smp.set_activation_checkpointing(block.up) for block in m.blocks],
    "at": lambda m: [smp.set_activation_checkpointing(block) for block in m.blocks],
    "all": lambda m: [smp.set_activation_checkpointing(part) for part in (m.first, m.blocks, m.blocks[1], m.last)],
}


def check_marks(homes: tuple[int, ...], **options: Any) -> None:
    expected = trained(deep(homes, **options))
    for name, mark in MARKS.items():
        model = deep(homes, **options)
        mark(model.get_module())
        found = trained(model)
        assert found[0] == expected[0], name
        assert_parity(found[1], expected[1], dtype=torch.float64)
        assert_parity(found[2], expected[2], dtype=torch.float64)
        # Three steps of four microbatches, each run twice.
        assert all_runs(model) == [12 if name == "below" else 24] * len(homes), name


@on(TWO, SPLIT)
def test_c083_marked_modules_run_twice_for_each_microbatch() -> None:
    check_marks((0, 0, 1, 1))
    check_marks((0, 1, 0, 1), has_norm=True)


@on(TWO)
def test_c083_a_stage_keeps_less() -> None:
    def peak(mark: Callable[[Any], Any] | None) -> int:
        model = deep((0, 0, 1, 1))
        if mark is not None:
            mark(model.get_module())
        with saved_bytes(model.module) as saved:
            trained(model, 1)
        return saved.total

    everything = peak(None)
    for name in ("each", "contiguous", "at"):
        assert peak(MARKS[name]) < everything / 2, name


@on(TWO)
def test_c084_a_module_on_several_partitions_is_an_error_in_manual_mode() -> None:
    for title, mark in (
        ("a module", lambda m: smp.set_activation_checkpointing(m.blocks[1])),
        ("a child", lambda m: smp.set_activation_checkpointing(m.blocks)),
        ("a child of a list", lambda m: smp.set_activation_checkpointing(m)),
    ):
        model = deep((0, 0, 1, 1))
        smp.set_partition(model.get_module().blocks[1].up, 1)
        mark(model.get_module())
        with pytest.raises(PartitionError, match=r"on several partitions \(0, 1\): put it into one"):
            trained(model)
        assert title
    with pytest.raises(SMPConfigError, match=r"strategy and pack_args_as_tuple are for nn\.Sequential alone"):
        smp.set_activation_checkpointing(deep((0, 1)).get_module(), strategy="contiguous")


@on(AUTO)
def test_c084_in_auto_mode_it_warns_and_recomputes_on_each_stage() -> None:
    def make() -> Any:
        torch.manual_seed(1)
        return smp.DistributedModel(Deep(4).double().train())

    reference = make()
    expected = trained(reference)
    homes = {placed.home for placed in runtime.current().engine.placed.values() if placed.name.startswith("blocks")}
    assert homes == {0, 1}
    with logged_lines() as seen:
        model = make()
        smp.set_activation_checkpointing(model)
        found = trained(model)
    assert sum("is on several partitions (0, 1): each of these stages recomputes" in text for text in seen) == 1
    assert found[0] == expected[0]
    assert_parity(found[1], expected[1], dtype=torch.float64)
    assert all_runs(model) == [25] * 4 and all_runs(reference) == [13] * 4  # one of them is the trace


@on(TWO)
def test_evaluation_between_steps_runs_once() -> None:
    model = deep((0, 0, 1, 1))
    smp.set_activation_checkpointing(model.get_module().blocks)
    trained(model, 1)
    assert all_runs(model) == [8] * 4
    model.eval()
    trained(model, 1)
    assert all_runs(model) == [12] * 4
    model.train()
    with torch.no_grad():
        forward_step(model, torch.ones(8, 8, dtype=torch.float64))
    assert all_runs(model) == [16] * 4


class Calls(nn.Module):
    """Uses the functions in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))
        self.is_recomputed = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_recomputed:
            return self.blocks(x) + self.blocks[0](x)
        return smp.checkpoint_sequential(self.blocks, x, strategy="group_2") + smp.checkpoint(self.blocks[0], x)


@on(TWO, SPLIT)
def test_checkpoint_functions_inside_the_model() -> None:
    results = []
    for is_recomputed in (False, True):
        torch.manual_seed(1)
        made = Calls().double().train()
        made.is_recomputed = is_recomputed
        model = smp.DistributedModel(made)
        smp.set_partition(made.blocks[2], 1)
        smp.set_partition(made.blocks[3], 1)
        results.append(trained(model))
        assert all_runs(model) == ([48, 24, 24, 24] if is_recomputed else [24, 12, 12, 12])
    assert results[0][0] == results[1][0]
    assert_parity(results[1][1], results[0][1], dtype=torch.float64)


@on(TWO, SPLIT)
def test_selective_recomputation_over_stages() -> None:
    def products(policy: list[Any] | None, mode: str) -> tuple[Any, int]:
        model = deep((0, 1, 0, 1))
        smp.set_activation_checkpointing(model.get_module().blocks, strategy="contiguous", mode=mode, policy=policy)
        counter = CountProducts()
        with counter:
            return trained(model, 1), counter.number

    expected = trained(deep((0, 1, 0, 1)), 1)
    numbers = []
    for policy, mode in ((None, "full"), ([torch.ops.aten.addmm.default], "selective")):
        found, number = products(policy, mode)
        numbers.append(number)
        assert found[0] == expected[0]
        assert_parity(found[1], expected[1], dtype=torch.float64)
    assert numbers[1] < numbers[0]


@on(TWO)
def test_writing_to_a_tensor_outside_of_a_region_is_refused() -> None:
    model = deep((0, 1))
    kept = torch.zeros(2, 8, dtype=torch.float64)

    @smp.step
    def step(model: Any, x: Tensor) -> Tensor:
        def add(v: Tensor) -> Tensor:
            y = model(v)
            kept.add_(y.detach())
            return y

        loss = torch.utils.checkpoint.checkpoint(add, x, use_reentrant=False).sum()
        model.backward(loss)
        return loss

    with pytest.raises(StepUsageError, match="writes values to a tensor from outside of it"):
        step(model, torch.ones(8, 8, dtype=torch.float64))
