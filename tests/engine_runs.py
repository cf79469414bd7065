"""Run many small models in one set of processes, placed so that values cross the stages all the time."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from engine_models import WIDTH
from parity import assert_parity
from pool import run_ranks

# What the configuration's `pipeline` may be (with a backward).
SCHEDULES = ("simple", "interleaved", "zero_bubble")
# Of pipelines that scatter() places.
MANUAL = {"microbatches": 2, "timeout_seconds": 8, "auto_partition": False, "default_partition": 0}


@dataclass(frozen=True)
class Case:
    """A program to run on different numbers of stages.

    ``body(model, *batch)`` returns the loss, or (loss, other results); the harness calls ``model.backward(loss)``
    unless ``runs_backward`` says that the body does. ``compile``: the argument of ``smp.DistributedModel``.
    """

    make_model: Callable[[], nn.Module]
    make_batch: Callable[[int], tuple[Any, ...]]
    body: Callable[..., Any]
    num_steps: int = 2
    runs_backward: bool = False
    dtype: torch.dtype | None = torch.float64
    compile: Any = False


@dataclass
class Outcome:
    """What a case gave on one rank; ``error`` is empty or the exception's class and text."""

    results: list[Any] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    random_after: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)  # most microbatches under way on this stage, per step
    ways: Any = None  # how the steps ran: the engine's StepCounts
    printed: str = ""
    error: str = ""
    seconds: float = 0.0


def scatter(model: Any) -> None:
    """Neighbours on different stages: each unit goes to the next one; what shares a parameter stays together."""
    import modelparallel as smp
    from modelparallel.partitioning import find_units

    homes: dict[int, int] = {}
    modules = dict(model.module.named_modules())
    for index, name in enumerate(find_units(model.module)):
        parameters = list(modules[name].parameters())
        home = next((homes[id(p)] for p in parameters if id(p) in homes), index % smp.pp_size())
        homes.update((id(p), home) for p in parameters)
        smp.set_partition(modules[name], home)


def enlarged(batch: tuple[Any, ...], times: int) -> tuple[Any, ...]:
    """The batch ``times`` as long, each part with other numbers than the one before."""
    from modelparallel import trees

    def enlarge(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.ndim or times == 1:
            return leaf
        return torch.cat([leaf.roll(index, -1) if leaf.ndim > 1 else leaf for index in range(times)])

    return trees.map_leaves(enlarge, batch)


def run_case(case: Case, *, is_scattered: bool, min_steps: int = 1, times: int = 1) -> Outcome:
    """One case in this process, as a user's script would do it; at least ``min_steps`` steps with a batch ``times`` as
    long.
    """
    import modelparallel as smp
    from modelparallel.training import runtime

    outcome = Outcome()
    start = time.perf_counter()
    printed = io.StringIO()
    torch.manual_seed(11)
    random.seed(11)
    try:
        made = case.make_model()
        if case.dtype is not None:
            made = made.to(case.dtype)
        model = smp.DistributedModel(made.train(), compile=case.compile)
        if is_scattered and smp.pp_size() > 1:
            scatter(model)
        optimizer = smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))

        @smp.step
        def train_step(model: Any, *batch: Any) -> Any:
            result = case.body(model, *batch)
            if not case.runs_backward:
                model.backward(result[0] if isinstance(result, tuple) else result)
            return result

        torch.manual_seed(11)
        random.seed(11)
        with contextlib.redirect_stdout(printed):
            plans = runtime.current().engine.plans
            plans.counts = type(plans.counts)()
            for step in range(max(case.num_steps, min_steps)):
                optimizer.zero_grad()
                result = train_step(model, *enlarged(case.make_batch(step), times))
                outcome.peaks.append(runtime.current().engine.last_peak_active)
                outcome.results.append(readable(result))
                if step == 0:
                    outcome.gradients = {
                        name: value.grad.clone()
                        for name, value in model.local_named_parameters()
                        if value.grad is not None
                    }
                optimizer.step()
            outcome.random_after = [float(torch.rand(())), random.random()]
        outcome.weights = model.state_dict()
        outcome.ways = plans.counts
    except Exception as error:
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.printed = printed.getvalue()
    outcome.seconds = time.perf_counter() - start
    return outcome


def readable(result: Any) -> Any:
    """StepOutputs as lists of their microbatches, all without graph."""
    import modelparallel as smp
    from modelparallel import trees

    def read(leaf: Any) -> Any:
        if isinstance(leaf, smp.StepOutput):
            return [read(part) for part in leaf.outputs]
        return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf

    return trees.map_leaves(read, result)


def run_module(
    module: str, names: list[str], is_scattered: bool, min_steps: int = 1, times: int = 1
) -> dict[str, Outcome]:
    """The body of a rank: the cases called ``names`` of the dictionary CASES of a test module, one after another."""
    import importlib

    cases = importlib.import_module(module).CASES
    return {name: run_case(cases[name], is_scattered=is_scattered, min_steps=min_steps, times=times) for name in names}


def outcomes(
    module: str,
    names: list[str],
    num_stages: int,
    *,
    num_microbatches: int = 2,
    is_scattered: bool = True,
    min_steps: int = 1,
    times: int = 1,
    **more: Any,
) -> list[dict[str, Outcome]]:
    """Per rank, the outcome of each case on ``num_stages`` stages; see :func:`run_case`."""
    parameters = {
        "pipeline_parallel_degree": num_stages, "microbatches": num_microbatches, "timeout_seconds": 8, **more,
    }  # fmt: skip
    if is_scattered and num_stages > 1:
        parameters |= {"auto_partition": False, "default_partition": 0}
    return run_ranks(
        run_module, num_stages, module, names, is_scattered, min_steps, times, parameters=parameters, timeout=170
    )


def compare(name: str, ranks: list[Outcome], expected: Outcome) -> None:
    """Every rank gave what one process gave: results, gradients (together), weights, the random stream afterwards."""
    for rank, outcome in enumerate(ranks):
        assert not outcome.error, f"{name}, pp_rank {rank}: {outcome.error}"
        assert_equal_results(outcome.results, expected.results, f"{name}, pp_rank {rank}")
        assert outcome.random_after == expected.random_after, f"{name}: the random stream after the step differs"
        assert_parity(outcome.weights, expected.weights, dtype=torch.float64)
    gradients = {key: value for outcome in ranks for key, value in outcome.gradients.items()}
    assert_parity(gradients, expected.gradients, dtype=torch.float64)


def assert_equal_results(actual: Any, expected: Any, where: str) -> None:
    """Equal structure, types and values; tensors within 1e-9."""
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor), f"{where}: {actual!r} is not a tensor"
        assert actual.dtype == expected.dtype and actual.shape == expected.shape, f"{where}: {actual} vs. {expected}"
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12, msg=lambda text: f"{where}: {text}")
        return
    assert type(actual) is type(expected), f"{where}: {type(actual)} vs. {type(expected)}"
    if isinstance(expected, dict):
        assert list(actual) == list(expected), where
        for key in expected:
            assert_equal_results(actual[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), where
        for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
            assert_equal_results(one, other, f"{where}[{index}]")
    elif dataclasses.is_dataclass(expected):
        assert_equal_results(vars(actual), vars(expected), where)
    elif isinstance(expected, float):
        assert abs(actual - expected) <= 1e-9 * max(1.0, abs(expected)), f"{where}: {actual} vs. {expected}"
    else:
        assert actual == expected, f"{where}: {actual!r} vs. {expected!r}"


def layout(num_stages: int, **more: Any) -> dict[str, Any]:
    return {**MANUAL, "pipeline_parallel_degree": num_stages, **more}


def wrapped(make: Callable[[], nn.Module]) -> Any:
    import modelparallel as smp

    torch.manual_seed(1)
    model = smp.DistributedModel(make().double().train())
    if smp.pp_size() > 1:
        scatter(model)
    return model


def data(step: int, size: int = 4) -> Tensor:
    return torch.randn(size, WIDTH, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def gradients_of(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.local_named_parameters() if p.grad is not None}


def check(body: Callable[..., Any], num_stages: int, *args: Any, **more: Any) -> None:
    """``body`` returns (results equal on all ranks, gradients of the local parameters)."""
    expected = run_ranks(body, 1, *args, parameters=layout(1, **more))[0]
    ranks = run_ranks(body, num_stages, *args, parameters=layout(num_stages, **more))
    merged: dict[str, Tensor] = {}
    for rank, (results, gradients) in enumerate(ranks):
        assert_equal_results(results, expected[0], f"pp_rank {rank}")
        merged.update(gradients)
    assert sorted(merged) == sorted(expected[1])
    assert_equal_results(dict(sorted(merged.items())), dict(sorted(expected[1].items())), "gradients")
