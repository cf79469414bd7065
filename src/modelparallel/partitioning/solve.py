"""The best contiguous split of the traced order: a pure function from costs to a plan.

[Note: What is minimised] The largest over the stages of ``w * memory / average + (1 - w) * compute / average``, with
w the ``memory_weight``; memory is parameters, gradients, optimizer state and the activations of the microbatches in
flight. Of the splits that reach this optimum, the one that moves the fewest bytes over its cuts is taken, then the
one with the most even stages.

Modules that share a parameter form one item, at the place of the first one called, with the costs of all of them. A
unit that was not called goes with its neighbour in module order, a tensor above the units with the unit that ran
before its first use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from modelparallel.errors import PartitionError
from modelparallel.partitioning.costs import Trace, microbatches_in_flight
from modelparallel.plan.partition import PartitionPlan, StageFigures

# Splits this close in cost count as equal: the sums of floats differ in their last digits.
_TOLERANCE = 1e-9


def solve(
    trace: Trace,
    num_stages: int,
    memory_weight: float,
    num_microbatches: int = 1,
    active_microbatches: int | None = None,
    *,
    is_backward_first: bool = False,
) -> PartitionPlan:
    """The plan for ``num_stages`` stages.

    Args:
        trace: from ``trace_step`` or ``sizes_only``; sharing of parameters is part of it.
        num_stages: the pipeline degree.
        memory_weight: 0.0 balances compute only, 1.0 memory only.
        num_microbatches: microbatches of a step call.
        active_microbatches: how many of them may be in flight; None: ``num_stages + 2``.
        is_backward_first: see :func:`~modelparallel.partitioning.costs.microbatches_in_flight`.

    Raises:
        PartitionError: fewer separate pieces than stages.
    """
    active = num_stages + 2 if active_microbatches is None else active_microbatches
    in_flight = microbatches_in_flight(num_stages, num_microbatches, active, is_backward_first)
    items = _items(trace)
    if len(items) < num_stages:
        held = "; ".join("+".join(repr(name) for name in group) for group in trace.ties)
        raise PartitionError(
            f"the model has {len(items)} piece{'s' if len(items) != 1 else ''} that can be placed separately, but "
            f"pipeline_parallel_degree is {num_stages}"
            + (f" (modules that share parameters count as one piece: {held})" if held else "")
            + f": use pipeline_parallel_degree <= {max(1, len(items))}, or write the model with more submodules"
        )
    costs = _Costs(items, memory_weight, in_flight)
    bounds = _best_bounds(len(items), num_stages, costs.stage_cost, [item.crossing_bytes for item in items])
    stages = {}
    for stage, (start, end) in enumerate(bounds):
        for item in items[start:end]:
            stages.update(dict.fromkeys(item.members, stage))
    called = list(trace.order)
    order = called + [unit.name for unit in trace.units if unit.name not in set(called)]
    return PartitionPlan(
        num_stages=num_stages,
        modules=tuple((name, stages[name]) for name in order),
        tensors=tuple((tensor.name, stages[tensor.name]) for tensor in trace.tensors),
        origin="traced" if trace.source == "run" else "sizes",
        figures=stage_figures(trace, stages, in_flight),
    )


def stage_figures(trace: Trace, stages: dict[str, int], in_flight: Sequence[int]) -> tuple[StageFigures, ...]:
    """What every stage holds, for the table. ``stages`` gives the home of every unit and tensor of ``trace``."""
    num_stages = len(in_flight)
    parameters, sizes, memory, compute = ([0.0] * num_stages for _ in range(4))
    for unit in trace.units:
        stage = stages[unit.name]
        parameters[stage] += unit.num_parameters
        sizes[stage] += unit.parameter_bytes
        activations = unit.activation_bytes if trace.has_gradients else unit.output_bytes
        memory[stage] += unit.state_bytes + activations * in_flight[stage]
        compute[stage] += unit.compute
    for tensor in trace.tensors:
        stage = stages[tensor.name]
        parameters[stage] += tensor.num_parameters
        sizes[stage] += tensor.parameter_bytes
        memory[stage] += tensor.state_bytes
    all_memory, all_compute = sum(memory), sum(compute)
    return tuple(
        StageFigures(
            num_parameters=int(parameters[stage]),
            parameter_bytes=int(sizes[stage]),
            memory_share=memory[stage] / all_memory if all_memory else 0.0,
            compute_share=compute[stage] / all_compute if all_compute else None,
        )
        for stage in range(num_stages)
    )


@dataclass
class _Item:
    """What is placed together: a unit with what shares its parameters and what follows it."""

    members: list[str]
    state_bytes: float = 0.0
    activation_bytes: float = 0.0
    compute: float = 0.0
    crossing_bytes: int = 0


def _items(trace: Trace) -> list[_Item]:
    """The pieces that can be placed separately, in the order of execution."""
    order = trace.order
    leader = _leaders(trace, order)
    items = {name: _Item([]) for name in order if leader[name] == name}
    for unit in trace.units:
        item = items[leader[unit.name]]
        item.members.append(unit.name)
        item.state_bytes += unit.state_bytes
        item.activation_bytes += unit.activation_bytes if trace.has_gradients else unit.output_bytes
        item.compute += unit.compute
        if leader[unit.name] == unit.name:
            item.crossing_bytes = unit.crossing_bytes
    for tensor in trace.tensors:
        items[leader[tensor.name]].members.append(tensor.name)
        items[leader[tensor.name]].state_bytes += tensor.state_bytes
    return list(items.values())


def _leaders(trace: Trace, order: Sequence[str]) -> dict[str, str]:
    """For every unit and tensor, the called unit whose place it takes."""
    position = {name: index for index, name in enumerate(order)}
    leader: dict[str, str] = {name: name for name in order}
    followers = _neighbours(trace, position)
    for group in trace.ties:
        # The place of a tie group is that of its first called unit; without one, that of the unit its first member
        # would follow.
        places = [name if name in position else followers[name] for name in group]
        called = [name for name in group if name in position] or places
        first = min((leader[name] for name in called), key=position.__getitem__)
        for name in group:
            leader[name] = first
    for name, neighbour in followers.items():
        leader.setdefault(name, leader[neighbour])
    return leader


def _neighbours(trace: Trace, position: dict[str, int]) -> dict[str, str]:
    """For every unit that was not called and every tensor above the units, the called unit next to it."""
    neighbours = {}
    previous: str | None = None
    first = next((unit.name for unit in trace.units if unit.name in position), None)
    for unit in trace.units:
        if unit.name in position:
            previous = unit.name
        else:
            neighbours[unit.name] = previous or first or unit.name
    for tensor in trace.tensors:
        if tensor.near_unit in position:
            neighbours[tensor.name] = str(tensor.near_unit)
            continue
        owner = tensor.name.rpartition(".")[0]
        inside = [name for name in position if not owner or name.startswith(f"{owner}.")]
        candidates = inside or list(position)
        if not candidates:
            raise PartitionError(
                f"{tensor.name!r} cannot be placed: the model has no module with weights of its own next to it. "
                "Put the parameter into a module with a forward, or use pipeline_parallel_degree 1"
            )
        neighbours[tensor.name] = min(candidates, key=position.__getitem__)
    return neighbours


class _Costs:
    """The cost of every run of items on every stage, from prefix sums."""

    def __init__(self, items: Sequence[_Item], memory_weight: float, in_flight: Sequence[int]) -> None:
        num_stages = len(in_flight)
        self._in_flight = in_flight
        self._state = _prefix_sums([item.state_bytes for item in items])
        self._activations = _prefix_sums([item.activation_bytes for item in items])
        self._compute = _prefix_sums([item.compute for item in items])
        average_in_flight = sum(in_flight) / num_stages
        memory = (self._state[-1] + self._activations[-1] * average_in_flight) / num_stages
        compute = self._compute[-1] / num_stages
        self._memory_factor = memory_weight / memory if memory else 0.0
        self._compute_factor = (1 - memory_weight) / compute if compute else 0.0
        if not self._memory_factor and not self._compute_factor and memory:
            self._memory_factor = 1 / memory  # compute alone is asked for and none was seen (sizes only)

    def stage_cost(self, stage: int, start: int, end: int) -> float:
        state = self._state[end] - self._state[start]
        activations = self._activations[end] - self._activations[start]
        memory = state + activations * self._in_flight[stage]
        return self._memory_factor * memory + self._compute_factor * (self._compute[end] - self._compute[start])


def _best_bounds(
    num_items: int, num_stages: int, stage_cost: Callable[[int, int, int], float], cut_bytes: Sequence[int]
) -> list[tuple[int, int]]:
    """(start, end) of every stage; every stage gets an item. ``cut_bytes[i]`` crosses a cut after item i."""
    limit = _smallest_maximum(num_items, num_stages, stage_cost) * (1 + _TOLERANCE)
    # Among the splits within the limit: fewest bytes over the cuts, then the smallest sum of squared costs.
    best: list[dict[int, tuple[int, float, int]]] = [{0: (0, 0.0, 0)}]
    for stage in range(num_stages):
        row: dict[int, tuple[int, float, int]] = {}
        for end in range(stage + 1, num_items - (num_stages - stage - 1) + 1):
            for start in range(end - 1, stage - 1, -1):
                cost = stage_cost(stage, start, end)
                if cost > limit:
                    break
                before = best[stage].get(start)
                if before is None:
                    continue
                crossing = before[0] + (cut_bytes[start - 1] if start else 0)
                # Rounding keeps the last digits of the sums from deciding between equal splits.
                candidate = (crossing, round(before[1] + cost * cost, 12), start)
                if end not in row or candidate < row[end]:
                    row[end] = candidate
        best.append(row)
    bounds = []
    end = num_items
    for stage in range(num_stages, 0, -1):
        start = best[stage][end][2]
        bounds.append((start, end))
        end = start
    return bounds[::-1]


def _smallest_maximum(num_items: int, num_stages: int, stage_cost: Callable[[int, int, int], float]) -> float:
    """The smallest possible cost of the dearest stage.

    A run's cost grows with the run, which ends the inner loops early.
    """
    row = [0.0] + [math.inf] * num_items
    for stage in range(num_stages):
        following = [math.inf] * (num_items + 1)
        for end in range(stage + 1, num_items - (num_stages - stage - 1) + 1):
            best = math.inf
            for start in range(end - 1, stage - 1, -1):
                cost = stage_cost(stage, start, end)
                if cost >= best:
                    break
                best = min(best, max(cost, row[start]))
            following[end] = best
        row = following
    return row[num_items]


def _prefix_sums(values: Sequence[float]) -> list[float]:
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return sums
