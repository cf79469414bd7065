"""From what a microbatch's program did to the plan of the next steps, and whether a later program does the same.

[Note: entries] A program is described by the points where stages depend on each other, in program order: a value moves
(``"M"``, source, destination), all stages wait for a value of one (``"V"``, source, -1), one stage alone reads a
pushed value (``"L"``, that stage, source), the backward starts (``"R"``, home, -1). Every stage goes through the whole
program, so all know all entries but the last kind, of which the stages tell each other. Work between the points is
recorded in the discovery step only (``"C"``, home, name of the module).

[Note: visits] What a stage does between two waits is a visit. Waits that follow each other with no work and no send
between them belong to the same visit. A stage that is visited at most once never has to leave a body half done.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from modelparallel.pipeline.schedule.timeline import simulate
from modelparallel.plan.schedule import Chain, Schedule, Visit

#: (kind, stage, other stage or -1)
Entry = tuple[str, int, int]
#: An entry, or work: ("C", home, name of the module or "").
Recorded = tuple[str, int, Hashable]

#: Work of a module's forward, of the gradients of its inputs, and of those of its weights, in any unit.
Work = tuple[float, float, float]
#: What an operation between the modules costs, in shares of the model's compute: little, and not nothing.
_GLUE_WORK: Work = (1e-4, 1e-4, 0.0)
_UNKNOWN_WORK: Work = (1.0, 1.0, 1.0)


class ChainTracker:
    """What a program tells of its points; this one only answers that nothing is planned."""

    visit = 0
    #: Whether the wait that was noted last begins a new visit on this stage.
    begins_visit = False
    #: Whether the program has gone another way than planned.
    has_left = False

    def note_move(self, source: int, destination: int) -> bool:
        """A value moves; whether that is planned."""
        return False

    def note_value(self, source: int) -> bool:
        """All stages wait for a value of ``source``; whether that is planned."""
        return False

    def note_announcement(self, source: int, *, is_always: bool) -> bool:
        """All stages wait to hear the structure of an output of ``source``, now only or at every call."""
        return False

    def note_local_wait(self, stage: int, source: int) -> bool:
        """``stage``, the caller's, reads a value that ``source`` has pushed."""
        return False

    def note_root(self, home: int) -> None:
        """The backward starts."""

    def finish(self) -> None:
        """The body is done."""

    def note_work(self, home: int, module: str) -> None:
        """A module, or with ``""`` an operation between the modules, runs on ``home``."""

    def note_costs(self, costs: Work) -> None:
        """What was noted last runs on this stage, and costs so much."""


class WayRecorder(ChainTracker):
    """Writes down which way a program of the discovery step goes.

    ``visit`` is the number of common points so far, since nobody knows the visits yet.
    """

    def __init__(self) -> None:
        self.recorded: list[Recorded] = []
        #: The costs that were counted on this stage, by position among the common entries.
        self.costs: dict[int, Work] = {}
        self._num_common = 0

    def _note(self, kind: str, stage: int, other: int) -> bool:
        self.recorded.append((kind, stage, other))
        self._num_common += 1
        self.visit += 1
        return False

    def note_move(self, source: int, destination: int) -> bool:
        return self._note("M", source, destination)

    def note_value(self, source: int) -> bool:
        return self._note("V", source, -1)

    def note_announcement(self, source: int, *, is_always: bool) -> bool:
        return self._note("V", source, -1) if is_always else False

    def note_local_wait(self, stage: int, source: int) -> bool:
        self.recorded.append(("L", stage, source))
        return False

    def note_root(self, home: int) -> None:
        self._note("R", home, -1)

    def note_work(self, home: int, module: str) -> None:
        self.recorded.append(("C", home, module))
        self._num_common += 1

    def note_costs(self, costs: Work) -> None:
        self.costs[self._num_common - 1] = costs

    def repeated_modules(self, home: int) -> set[str]:
        """Modules on ``home`` that were called more than once."""
        calls = Counter(str(other) for kind, stage, other in self.recorded if kind == "C" and other and stage == home)
        return {name for name, number in calls.items() if number > 1}

    def common(self) -> tuple[Recorded, ...]:
        """Without what this stage alone has done."""
        return tuple(entry for entry in self.recorded if entry[0] != "L")

    def local_waits(self) -> tuple[tuple[int, int], ...]:
        """(position among the common entries, source) of the pushed values that this stage has read."""
        waits = []
        position = 0
        for kind, _, other in self.recorded:
            if kind == "L" and isinstance(other, int):
                waits.append((position, other))
            else:
                position += 1
        return tuple(waits)


class Follower(ChainTracker):
    """Compares a program with the plan of its step, and knows which visit it is in."""

    def __init__(self, plan: StepPlan, stage: int) -> None:
        self._entries = plan.entries_of(stage)
        self._starts = plan.starts[stage]
        self._cursor = 0

    def _take(self, entry: Entry) -> bool:
        self.begins_visit = False
        if self.has_left or self._cursor >= len(self._entries) or self._entries[self._cursor] != entry:
            self.has_left = True
            return False
        visit = self._starts.get(self._cursor)
        if visit is not None:
            self.visit, self.begins_visit = visit, True
        self._cursor += 1
        return True

    def note_move(self, source: int, destination: int) -> bool:
        self._skip_local_waits()
        return self._take(("M", source, destination))

    def note_value(self, source: int) -> bool:
        self._skip_local_waits()
        return self._take(("V", source, -1))

    def note_announcement(self, source: int, *, is_always: bool) -> bool:
        if is_always:
            return self.note_value(source)
        self.begins_visit = False
        return False  # a new shape: more to wait for, and the same way through the stages

    def note_local_wait(self, stage: int, source: int) -> bool:
        # A value that was not read in the discovery step has to be waited for, but it is no other way.
        if self._cursor < len(self._entries) and self._entries[self._cursor] == ("L", stage, source):
            return self._take(("L", stage, source))
        self.begins_visit = False
        return False

    def note_root(self, home: int) -> None:
        self._skip_local_waits()
        self._take(("R", home, -1))

    def finish(self) -> None:
        """The body is done: nothing may be missing."""
        self._skip_local_waits()
        if self._cursor < len(self._entries):
            self.has_left = True

    def _skip_local_waits(self) -> None:
        while self._cursor < len(self._entries) and self._entries[self._cursor][0] == "L":
            visit = self._starts.get(self._cursor)
            if visit is not None:
                self.visit = visit  # what follows belongs to it, although nothing was waited for
            self._cursor += 1


@dataclass(frozen=True)
class StepPlan:
    """What every microbatch of a kind of step does, and who does what in which order.

    Attributes:
        entries: the common entries and the local waits, in program order; see the note on entries.
        starts: for every stage the positions in ``entries_of(stage)`` of the waits that begin its visits, and the
            visits' numbers; the first visit needs none.
        chain: the visits.
        schedule: the actions of every stage.
    """

    entries: tuple[Entry, ...]
    starts: tuple[Mapping[int, int], ...]
    chain: Chain
    schedule: Schedule

    def entries_of(self, stage: int) -> tuple[Entry, ...]:
        """What a program on ``stage`` comes through: the local waits of others are left out."""
        return tuple(entry for entry in self.entries if entry[0] != "L" or entry[1] == stage)

    @property
    def moves(self) -> frozenset[tuple[int, int]]:
        """The (source, destination) between which values move, and their gradients the other way."""
        forward = {(source, destination) for kind, source, destination in self.entries if kind == "M"}
        is_forward_only = self.schedule.kind == "forward_only"
        return frozenset(forward if is_forward_only else forward | {(source, target) for target, source in forward})

    def visits_of_points(self, stage: int) -> tuple[int, ...]:
        """The visit of ``stage`` in which each common point of the program lies."""
        visits, visit = [], 0
        for index, entry in enumerate(self.entries_of(stage)):
            visit = self.starts[stage].get(index, visit)
            if entry[0] != "L":
                visits.append(visit)
        return tuple(visits)

    def idle_shares(self) -> tuple[float, ...]:
        """For every stage the part of the step in which it is expected to wait, if messages take no time."""
        timeline = simulate(self.schedule, self.chain)
        return tuple(1 - busy / timeline.makespan if timeline.makespan else 0.0 for busy in timeline.busy)

    def description(self) -> str:
        """The schedule in one line, with its predicted bubble and peaks."""
        schedule, timeline = self.schedule, simulate(self.schedule, self.chain)
        visits = max(len(self.chain.visits_of(stage)) for stage in range(self.chain.num_stages))
        return (
            f"{schedule.kind}, {schedule.num_microbatches} microbatches, "
            f"{'one visit a stage' if visits == 1 else f'up to {visits} visits a stage'}; predicted: "
            f"{timeline.bubble_share:.1%} of the time in bubbles, at most "
            f"{', '.join(map(str, timeline.peak_microbatches))} microbatches under way on the stages"
        )

    @property
    def is_sequential(self) -> bool:
        """Whether every stage runs a microbatch's body from begin to end before it begins the next."""
        return self.chain.is_straight


def with_local_waits(
    common: Sequence[Recorded], waits: Mapping[int, Sequence[tuple[int, int]]]
) -> tuple[Recorded, ...]:
    """The entries of a program with the reads of pushed values that each stage has told of (stage -> its
    ``local_waits``).
    """
    inserted: list[tuple[int, int, Recorded]] = [
        (position, stage, ("L", stage, source)) for stage, of_stage in waits.items() for position, source in of_stage
    ]
    result: list[Recorded] = []
    pending = sorted(inserted, key=lambda item: item[:2])
    for position, entry in enumerate(common):
        while pending and pending[0][0] <= position:
            result.append(pending.pop(0)[2])
        result.append(entry)
    result.extend(entry for _, _, entry in pending)
    return tuple(result)


class _ChainBuilder:
    """Cuts a recorded program into visits."""

    def __init__(self, num_stages: int, costs: Mapping[str, Work]) -> None:
        self._costs = costs
        self._stages: list[int] = []
        self._work: list[list[float]] = []  # of the forward, of input gradients, of weight gradients
        self._waits: list[list[int]] = []
        self._has_gradient: list[bool] = []
        self._open: list[int | None] = [None] * num_stages  # the visit that the stage is in
        # Waits since the stage last worked, with the position of the first of them among the stage's entries.
        self._pending: list[list[tuple[int, bool]]] = [[] for _ in range(num_stages)]
        self._pending_start: list[int | None] = [None] * num_stages
        self._positions = [0] * num_stages
        self.starts: list[dict[int, int]] = [{} for _ in range(num_stages)]
        self._num_visits = [0] * num_stages

    def visit_of(self, stage: int) -> int:
        """The visit that ``stage`` works in now; begins it if something was waited for."""
        current = self._open[stage]
        if current is not None and self._pending_start[stage] is None:
            return current
        index = len(self._stages)
        self._stages.append(stage)
        self._work.append([0.0, 0.0, 0.0])
        pending = self._pending[stage]
        self._waits.append(sorted({source for source, _ in pending}))
        self._has_gradient.append(any(has_gradient for _, has_gradient in pending))
        start = self._pending_start[stage]
        if current is not None and start is not None:
            self.starts[stage][start] = self._num_visits[stage]
        self._num_visits[stage] += 1
        self._pending[stage], self._pending_start[stage] = [], None
        self._open[stage] = index
        return index

    def _wait(self, stage: int, source: int, position: int, *, has_gradient: bool) -> None:
        if self._pending_start[stage] is None:
            self._pending_start[stage] = position
        self._pending[stage].append((self.visit_of(source), has_gradient))

    def add(self, entry: Recorded, counted: Work | None) -> None:
        """The next entry of the program. ``counted``: what that call or operation costs."""
        kind, stage, other = entry
        stages = range(len(self._open))
        if kind == "C":
            index = self.visit_of(stage)
            costs = counted or (self._costs.get(str(other), (0.0,) * 3) if other else _GLUE_WORK)
            for part, work in enumerate(costs):
                self._work[index][part] += work
            self._has_gradient[index] |= bool(other)
            return
        if kind == "M" and isinstance(other, int):
            self._has_gradient[self.visit_of(stage)] = True
            self._wait(other, stage, self._positions[other], has_gradient=True)
        elif kind == "V":
            self.visit_of(stage)
            for receiver in stages:
                if receiver != stage:
                    self._wait(receiver, stage, self._positions[receiver], has_gradient=False)
        elif kind == "L" and isinstance(other, int):
            self._wait(stage, other, self._positions[stage], has_gradient=False)
        elif kind == "R":
            self._has_gradient[self.visit_of(stage)] = True
        for receiver in stages:
            if kind != "L" or receiver == stage:
                self._positions[receiver] += 1

    def chain(self) -> Chain:
        """The chain; call it after the last entry."""
        for stage in range(len(self._open)):
            if self._open[stage] is None or self._pending_start[stage] is not None:
                self.visit_of(stage)
        total = sum(forward for forward, _, _ in self._work) or 1.0
        visits = []
        for index, stage in enumerate(self._stages):
            forward, inputs, weights = self._work[index]
            visits.append(
                Visit(
                    stage,
                    forward=forward / total,
                    backward=inputs / total,
                    weight=weights / total,
                    waits_for=tuple(source for source in self._waits[index] if self._stages[source] != stage),
                    has_backward=self._has_gradient[index],
                )
            )
        return Chain(len(self._open), tuple(visits))


def build_chain(
    recorded: Sequence[Recorded],
    num_stages: int,
    costs: Mapping[str, Work],
    counted: Mapping[int, Work] | None = None,
) -> tuple[Chain, tuple[Mapping[int, int], ...], tuple[Entry, ...]]:
    """(chain, starts, entries) of a recorded program, as :class:`StepPlan` has them.

    ``costs``: the work of each placed module; if none is known, all are taken as equal. ``counted``: instead of them,
    the work of every call and operation, by its position among the common entries.
    """
    modules = {str(other) for kind, _, other in recorded if kind == "C" and other}
    known = {name: work for name, work in costs.items() if work[0] > 0 and name in modules}
    builder = _ChainBuilder(num_stages, known or dict.fromkeys(modules, _UNKNOWN_WORK))
    entries: list[Entry] = []
    position = 0
    for entry in recorded:
        builder.add(entry, None if counted is None else counted.get(position))
        position += entry[0] != "L"
        if entry[0] != "C" and isinstance(entry[2], int):
            entries.append((entry[0], entry[1], entry[2]))
    chain = builder.chain()
    return chain, tuple(builder.starts), tuple(entries)
