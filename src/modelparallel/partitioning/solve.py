"""The best split of the traced order into stages: a pure function from costs to a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from modelparallel.errors import PartitionError
from modelparallel.partitioning.costs import Trace, microbatches_in_flight
from modelparallel.partitioning.items import Item, arrangements
from modelparallel.partitioning.limit import LimitedSearch, over_the_limit
from modelparallel.partitioning.split import Bounds, Costs, Rating, StepTime, best_split, shortened
from modelparallel.plan.partition import PartitionPlan, StageFigures


def solve(
    trace: Trace,
    num_stages: int,
    memory_weight: float,
    num_microbatches: int = 1,
    active_microbatches: int | None = None,
    *,
    schedule: str = "interleaved",
    virtual_degree: int = 1,
    memory_limit: int | None = None,
    step_time: StepTime | None = None,
) -> PartitionPlan:
    """The plan for ``num_stages`` stages.

    Args:
        trace: from ``trace_step`` or ``sizes_only``; sharing of parameters is part of it.
        num_stages: the pipeline degree.
        memory_weight: 0.0 balances compute only, 1.0 memory only.
        num_microbatches: microbatches of a step call.
        active_microbatches: how many of them may be in flight; None: ``num_stages + 2``.
        schedule: see :func:`~modelparallel.partitioning.costs.microbatches_in_flight`.
        virtual_degree: pieces of the model on each stage.
        memory_limit: the bytes that a stage may hold; None: any number.
        step_time: predicts the time of a step from the work of the stages (forward, input gradients, weight gradients
            of one microbatch); with it, and one piece a stage, the waiting counts, too.

    Raises:
        PartitionError: fewer items than pieces; no split within the memory limit.
    """
    active = num_stages + 2 if active_microbatches is None else active_microbatches
    in_flight = microbatches_in_flight(num_stages, num_microbatches, active, schedule, virtual_degree)
    best: tuple[Rating, Bounds, list[Item], Costs] | None = None
    for items in arrangements(trace):
        if len(items) < len(in_flight):
            raise _too_few_items(trace, items, num_stages, virtual_degree)
        costs = Costs(items, num_stages, memory_weight, in_flight, memory_limit)
        bounds = best_split(costs)
        if bounds is not None and (best is None or costs.rate(bounds) < best[0]):
            best = costs.rate(bounds), bounds, items, costs
    if best is None:
        search = LimitedSearch(
            trace, num_stages, num_microbatches, active, schedule, virtual_degree, int(memory_limit or 0)
        )
        raise over_the_limit(search)
    _, bounds, items, costs = best
    if step_time is not None and virtual_degree == 1 and any(item.compute for item in items):
        bounds = shortened(costs, bounds, step_time, num_microbatches)
    pieces = {
        name: piece for piece, (start, end) in enumerate(bounds) for item in items[start:end] for name in item.members
    }
    stages = {name: piece % num_stages for name, piece in pieces.items()}
    called = list(trace.order)
    order = called + [unit.name for unit in trace.units if unit.name not in set(called)]
    return described(
        PartitionPlan(
            num_stages=num_stages,
            modules=tuple((name, stages[name]) for name in order),
            tensors=tuple((tensor.name, stages[tensor.name]) for tensor in trace.tensors),
            origin="traced" if trace.source == "run" else "sizes",
            virtual_degree=virtual_degree,
        ),
        trace,
        pieces,
        in_flight,
    )


def described(plan: PartitionPlan, trace: Trace, pieces: Mapping[str, int], in_flight: Sequence[int]) -> PartitionPlan:
    """The plan with its figures, costs and traffic.

    Args:
        trace: of exactly the units and tensors that the plan places.
        pieces: for every unit and tensor the piece that it is part of; piece c is on stage ``c % num_stages``.
        in_flight: for every piece, how many microbatches' activations it holds.
    """
    homes = {name: piece % plan.num_stages for name, piece in pieces.items()}
    forward = sum(unit.forward for unit in trace.units)
    shares = [
        (unit.name, unit.forward / forward, unit.input_gradient / forward, unit.weight_gradient / forward)
        for unit in trace.units
        if forward
    ]
    return replace(
        plan,
        figures=_figures(trace, pieces, in_flight, plan.num_stages),
        costs=tuple((name, share) for name, share, _, _ in shares),
        backward_costs=tuple((name, inputs, weights) for name, _, inputs, weights in shares),
        traffic=trace.traffic(homes),
    )


@dataclass
class _Sums:
    num_parameters: int = 0
    parameter_bytes: int = 0
    state_bytes: int = 0
    activation_bytes: int = 0
    held_bytes: int = 0
    flops: int = 0
    compute: float = 0.0


def _figures(
    trace: Trace, pieces: Mapping[str, int], in_flight: Sequence[int], num_stages: int
) -> tuple[StageFigures, ...]:
    sums = [_Sums() for _ in range(num_stages)]
    for unit in trace.units:
        piece = pieces[unit.name]
        stage = sums[piece % num_stages]
        stage.num_parameters += unit.num_parameters
        stage.parameter_bytes += unit.parameter_bytes
        stage.state_bytes += unit.state_bytes
        stage.activation_bytes += trace.activation_bytes(unit)
        stage.held_bytes += trace.activation_bytes(unit) * in_flight[piece]
        stage.flops += unit.flops
        stage.compute += unit.compute
    for tensor in trace.tensors:
        stage = sums[pieces[tensor.name] % num_stages]
        stage.num_parameters += tensor.num_parameters
        stage.parameter_bytes += tensor.parameter_bytes
        stage.state_bytes += tensor.state_bytes
    memory = sum(stage.state_bytes + stage.held_bytes for stage in sums)
    compute = sum(stage.compute for stage in sums)
    return tuple(
        StageFigures(
            num_parameters=stage.num_parameters,
            parameter_bytes=stage.parameter_bytes,
            memory_share=(stage.state_bytes + stage.held_bytes) / memory if memory else 0.0,
            compute_share=stage.compute / compute if compute else None,
            flops=stage.flops,
            state_bytes=stage.state_bytes,
            activation_bytes=stage.activation_bytes,
            in_flight=tuple(in_flight[index::num_stages]),
            memory_bytes=stage.state_bytes + stage.held_bytes,
        )
        for index, stage in enumerate(sums)
    )


def _too_few_items(trace: Trace, items: Sequence[Item], num_stages: int, virtual_degree: int) -> PartitionError:
    held = "; ".join("+".join(repr(name) for name in group) for group in trace.ties)
    count = len(items)
    if virtual_degree > 1 and count >= num_stages:
        asked = (
            f"pipeline_parallel_degree={num_stages} with virtual_pipeline_degree={virtual_degree} needs "
            f"{num_stages * virtual_degree}"
        )
        remedy = f"virtual_pipeline_degree <= {count // num_stages}"
    else:
        asked = f"pipeline_parallel_degree is {num_stages}"
        remedy = f"pipeline_parallel_degree <= {max(1, count)}"
    return PartitionError(
        f"the model has {count} piece{'s' if count != 1 else ''} that can be placed separately, but {asked}"
        + (f" (modules that share parameters count as one piece: {held})" if held else "")
        + f": use {remedy}, or write the model with more submodules"
    )
