"""What our partition is worth on paper: its predicted makespan against equal layers, and against all splits.

`python -m bench.splits` prints the table. Nothing is timed: costs are those of the trace, and the pipeline is simulated
with messages that take no time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench.models import GPT, ConvPyramid, EncoderDecoder, GPTSize, image_batch, language_loss, token_batch
from modelparallel.partitioning import Trace, find_units, make_plan, trace_step
from modelparallel.pipeline.schedule.making import step_predictor

Homes = Mapping[str, int]


@dataclass
class Visit:
    """A stretch of one microbatch's work on one stage. ``waits_for``: the visits whose results it needs."""

    stage: int
    forward: float
    backward: float
    waits_for: set[int]


def visits_of(trace: Trace, homes: Homes) -> list[Visit]:
    """The visits of a microbatch in program order, if the units have these homes."""
    costs = {unit.name: unit for unit in trace.units}
    visits: list[Visit] = []
    visit_of: dict[str, int] = {}
    for name in trace.order:
        if not visits or visits[-1].stage != homes[name]:
            visits.append(Visit(homes[name], 0.0, 0.0, set()))
        visit_of[name] = len(visits) - 1
        visits[-1].forward += costs[name].forward
        visits[-1].backward += costs[name].input_gradient + costs[name].weight_gradient
    for flow in trace.flows:
        source = visit_of[flow.maker]
        for user in flow.users:
            if visit_of[user] > source:
                visits[visit_of[user]].waits_for.add(source)
    return visits


def makespan(visits: Sequence[Visit], num_stages: int, num_microbatches: int, active_microbatches: int) -> float:
    """The time of a step when every stage runs the oldest backward that is ready, else the oldest forward.

    At most ``active_microbatches`` have begun and not ended. Messages take no time.
    """
    last = len(visits) - 1
    waits_for = [set(visit.waits_for) for visit in visits]
    for index, visit in enumerate(visits):  # visits of one stage keep the order of the program
        waits_for[index].update(other for other in range(index) if visits[other].stage == visit.stage)
    wanted_by = [[later for later in range(len(visits)) if index in waits_for[later]] for index in range(len(visits))]
    ends: dict[tuple[int, int, bool], float] = {}
    free = [0.0] * num_stages
    # Forwards by (microbatch, visit), then backwards; a task is ready when all that it waits for have ended.
    todo = {(m, v, is_backward) for m in range(num_microbatches) for v in range(last + 1) for is_backward in (0, 1)}

    def ready_at(microbatch: int, visit: int, is_backward: int) -> float | None:
        if is_backward:
            needed = [(microbatch, later, True) for later in wanted_by[visit]] + [(microbatch, visit, False)]
        else:
            needed = [(microbatch, earlier, False) for earlier in waits_for[visit]]
            if microbatch >= active_microbatches:
                needed += [(microbatch - active_microbatches, other, True) for other in range(last + 1)]
        if any(task not in ends for task in needed):
            return None
        return max((ends[task] for task in needed), default=0.0)

    while todo:
        best: tuple[float, int, int, int] | None = None
        for microbatch, visit, is_backward in todo:
            ready = ready_at(microbatch, visit, is_backward)
            if ready is not None:
                start = max(ready, free[visits[visit].stage])
                candidate = (start, -is_backward, microbatch, visit)
                best = candidate if best is None or candidate < best else best
        assert best is not None, "the visits wait for each other in a circle"
        start, backward, microbatch, visit = best
        is_backward = -backward
        cost = visits[visit].backward if is_backward else visits[visit].forward
        free[visits[visit].stage] = ends[microbatch, visit, bool(is_backward)] = start + cost
        todo.remove((microbatch, visit, is_backward))
    return max(free)


def contiguous(order: Sequence[str], num_stages: int) -> Iterator[dict[str, int]]:
    """All splits of the order into runs."""
    for cuts in itertools.combinations(range(1, len(order)), num_stages - 1):
        edges = (0, *cuts, len(order))
        yield {name: stage for stage, (start, end) in enumerate(itertools.pairwise(edges)) for name in order[start:end]}


def equal_layers(order: Sequence[str], num_stages: int) -> dict[str, int]:
    """As many modules on every stage, as one splits by hand."""
    return {name: index * num_stages // len(order) for index, name in enumerate(order)}


@dataclass(frozen=True)
class Comparison:
    """Predicted makespans, as multiples of a perfect pipeline: all work, evenly over the stages, without waiting."""

    name: str
    num_stages: int
    equal: float
    ours: float
    best: float


def compare(name: str, trace: Trace, model: nn.Module, num_stages: int, num_microbatches: int) -> Comparison:
    """Our split (for speed alone, ``memory_weight`` 0), equal layers, and the best of all contiguous splits."""
    plan = make_plan(
        model,
        num_stages,
        trace=trace,
        memory_weight=0.0,
        num_microbatches=num_microbatches,
        step_time=step_predictor("interleaved", num_microbatches, num_stages + 2),
    )
    ideal = sum(unit.compute for unit in trace.units) * num_microbatches / num_stages

    def rate(homes: Homes) -> float:
        return makespan(visits_of(trace, homes), num_stages, num_microbatches, num_stages + 2) / ideal

    best = min(rate(homes) for homes in contiguous(trace.order, num_stages))
    return Comparison(name, num_stages, rate(equal_layers(trace.order, num_stages)), rate(dict(plan.modules)), best)


def big_head(size: GPTSize) -> tuple[nn.Module, Callable[[Any], torch.Tensor]]:
    """A GPT whose head costs as much as several layers."""
    ids, targets = token_batch(size, 2)
    return GPT(size), lambda model: language_loss(model(ids), targets)


def pyramid(channels: int) -> tuple[nn.Module, Callable[[Any], torch.Tensor]]:
    """A convolutional pyramid."""
    images, classes = image_batch(2)
    return ConvPyramid(channels), lambda model: nn.functional.cross_entropy(model(images), classes)


def encoder_decoder(size: GPTSize) -> tuple[nn.Module, Callable[[Any], torch.Tensor]]:
    """An encoder and a decoder; the source is four times as long as the target."""
    source, targets = token_batch(size, 2)
    target = targets[:, : max(1, size.sequence // 4)]
    return EncoderDecoder(size), lambda model: language_loss(model(source, target), target)


def models(is_small: bool = False) -> dict[str, tuple[nn.Module, Callable[[Any], torch.Tensor]]]:
    """The three unbalanced models, each with its loss."""
    size = GPTSize(hidden=32, num_heads=2, vocabulary=1024, sequence=16) if is_small else GPTSize(vocabulary=16384)
    plain = GPTSize(hidden=32, num_heads=2, vocabulary=64, sequence=64) if is_small else GPTSize()
    return {
        "big_head": big_head(size),
        "pyramid": pyramid(8 if is_small else 32),
        "encoder_decoder": encoder_decoder(plain),
    }


def comparisons(stages: Sequence[int] = (2, 3, 4), num_microbatches: int = 8) -> list[Comparison]:
    """All three models on these numbers of stages."""
    found = []
    for name, (model, loss) in models().items():
        trace = trace_step(model, find_units(model), lambda: loss(model))  # noqa: B023
        found += [compare(name, trace, model, num_stages, num_microbatches) for num_stages in stages]
    return found


def main() -> None:
    """Print the comparisons."""
    print("model            stages  equal layers    ours    best of all   (1.0: no stage ever waits)")
    for row in comparisons():
        print(f"{row.name:16} {row.num_stages:6} {row.equal:13.3f} {row.ours:7.3f} {row.best:14.3f}")


if __name__ == "__main__":
    main()
