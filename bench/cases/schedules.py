"""How close the engine comes to its schedules: modules that sleep, so that many stages fit a few cores."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import modelparallel as smp
from bench.cases.case import Case
from bench.harness import Result, plain_result
from bench.ranks import run_on_ranks
from bench.sessions import last_step_plan, session_with
from modelparallel.pipeline.schedule.timeline import simulate
from modelparallel.plan.schedule import Chain
from modelparallel.training import runtime

STAGES = (2, 4, 8)
#: Microbatches, in multiples of the stages.
MULTIPLES = (1, 2, 4)
#: Of one layer: its forward, the gradient of its input, the gradient of its weight.
SECONDS = 0.04
LAYERS_PER_STAGE = 2
NUM_STEPS = 3
EFFICIENCY_TARGET = "ratio <= 1.05"


@dataclass(frozen=True)
class Kind:
    """A schedule: the configuration's ``pipeline``, and how many pieces of the model a stage has."""

    pipeline: str
    num_visits: int = 1


KINDS = {
    "simple": Kind("simple"),
    "interleaved": Kind("interleaved"),
    "virtual": Kind("interleaved", LAYERS_PER_STAGE),
    "zero_bubble": Kind("zero_bubble"),
}


class _SleepOnInput(torch.autograd.Function):
    """The forward, and the gradient of the input."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        time.sleep(SECONDS)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        time.sleep(SECONDS)
        return gradient


class _SleepOnWeight(torch.autograd.Function):
    """The gradient of the weight."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        time.sleep(ctx.seconds)
        return gradient, None


class SleepingLayer(nn.Module):
    """A layer that costs what is asked for. The first one has no gradient of its input to make: its weight's costs
    twice as much.
    """

    def __init__(self, is_first: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.weight_seconds = 2 * SECONDS if is_first else SECONDS

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _SleepOnInput.apply(x) * _SleepOnWeight.apply(self.weight, self.weight_seconds)


@smp.step
def sleeping_step(model: Any, x: torch.Tensor) -> torch.Tensor:
    """One microbatch."""
    loss = model(x).mean()
    model.backward(loss)
    return loss


def true_costs(chain: Chain, num_visits: int) -> Chain:
    """The chain with what its visits really take, in seconds."""
    seconds = SECONDS * LAYERS_PER_STAGE / num_visits
    costs = {"forward": seconds, "backward": seconds, "weight": seconds}
    visits = [replace(visit, **costs) for visit in chain.visits]
    visits[0] = replace(visits[0], backward=seconds - SECONDS, weight=seconds + SECONDS)
    return Chain(chain.num_stages, tuple(visits))


def step_times(kind: Kind, num_stages: int, num_microbatches: int) -> tuple[float, float]:
    """(measured, on paper) seconds of a step; on every rank of the pipeline."""
    parameters = {
        "pipeline_parallel_degree": num_stages,
        "microbatches": num_microbatches,
        "pipeline": kind.pipeline,
        # The order known for virtual stages needs 2p; the default is p + 2.
        "active_microbatches": num_stages * min(kind.num_visits, 2),
        "auto_partition": False,
        "default_partition": 0,
    }
    with session_with(parameters):
        num_layers = num_stages * LAYERS_PER_STAGE
        model = smp.DistributedModel(nn.Sequential(*(SleepingLayer(index == 0) for index in range(num_layers))))
        # No operation shows that a layer sleeps: all are taken as equal.
        model.register_post_partition_hook(lambda *_: setattr(runtime.current().engine, "count_work", None))
        layers: Any = model.module
        for index, layer in enumerate(layers):
            piece = index * num_stages * kind.num_visits // num_layers
            smp.set_partition(layer, piece % num_stages)
        batch = torch.ones(num_microbatches, 4)
        sleeping_step(model, batch)  # discovery order
        plan = last_step_plan()
        if len(plan.chain.visits) != num_stages * kind.num_visits:
            raise RuntimeError(f"the chain is not the expected one: {plan.chain}")
        ideal = simulate(plan.schedule, true_costs(plan.chain, kind.num_visits)).makespan
        times = []
        for _ in range(NUM_STEPS):
            dist.barrier()
            start = time.perf_counter()
            sleeping_step(model, batch)
            dist.barrier()
            times.append(time.perf_counter() - start)
    return float(np.median(times)), ideal


def all_step_times(num_stages: int) -> dict[tuple[str, int], tuple[float, float]]:
    """(kind, microbatches) -> (measured, on paper)."""
    return {
        (name, multiple * num_stages): step_times(kind, num_stages, multiple * num_stages)
        for name, kind in KINDS.items()
        for multiple in MULTIPLES
    }


def formula(name: str, num_stages: int, num_microbatches: int) -> float:
    """What the papers say that a step takes, in seconds, with F = I = W on every stage."""
    part = SECONDS * LAYERS_PER_STAGE
    waiting = {"zero_bubble": part, "virtual": 3 * part / LAYERS_PER_STAGE}.get(name, 3 * part)
    return num_microbatches * 3 * part + (num_stages - 1) * waiting


def measure(num_pairs: int) -> list[Result]:
    """The worst efficiency of each kind and number of stages; the gain over 1F1B at twice as many microbatches as
    stages.
    """
    results = []
    for num_stages in STAGES:
        times = run_on_ranks(all_step_times, num_stages, num_stages)[0]
        for name in KINDS:
            rows = {m: times[name, m] for kind, m in times if kind == name}
            worst = max(rows, key=lambda m: rows[m][0] / rows[m][1])
            measured, ideal = rows[worst]
            title = f"schedule_efficiency_{name}_p{num_stages}"
            unit = f"s/step, {worst} microbatches"
            results.append(plain_result(title, unit, measured, NUM_STEPS, EFFICIENCY_TARGET, peer=ideal))
        for name in ("virtual", "zero_bubble"):
            m = 2 * num_stages
            measured = times[name, m][0] / times["interleaved", m][0]
            predicted = formula(name, num_stages, m) / formula("interleaved", num_stages, m)
            title = f"schedule_gain_{name}_p{num_stages}"
            unit = f"of the time of 1F1B, {m} microbatches"
            results.append(plain_result(title, unit, measured, NUM_STEPS, "ratio <= 1.02", peer=predicted))
    return results


CASES = [
    Case(
        "schedule",
        "pp=2, 4 and 8 with p, 2p and 4p microbatches; two layers a stage that sleep 40 ms in the forward, 40 ms for "
        "the gradient of the input and 40 ms for that of the weight. `schedule_efficiency`: the time of a step against "
        "the makespan of its schedule on paper (`pipeline.timeline.simulate`), with p active microbatches (2p with two "
        "pieces a stage), for the number of microbatches with the "
        "largest ratio. `schedule_gain`: the time of a step with two pieces a stage (virtual) or zero bubble as a "
        "share of that of 1F1B, against the share that the papers' formulas give.",
        measure,
    )
]
