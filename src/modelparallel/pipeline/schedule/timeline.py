"""What a schedule costs: when every action starts and ends if each stage runs its actions in the schedule's order.

This file owns the rules of what waits for what (`Needs`), which the generator and the checker use, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from modelparallel.errors import ScheduleError
from modelparallel.plan.schedule import Action, ActionKind, Chain, Schedule

#: An action as the rules see it: its phase (0 forward, 1 backward or its I part, 2 the W part) and its visit's index in
#: the chain. The rules never reach from one microbatch to another.
Phase = tuple[int, int]
FORWARD, BACKWARD, WEIGHT = 0, 1, 2
_PHASE = {ActionKind.F: FORWARD, ActionKind.B: BACKWARD, ActionKind.I: BACKWARD, ActionKind.W: WEIGHT}


def phase_of(action: Action, stage: int, chain: Chain) -> Phase:
    """The phase and the index in the chain of an action of ``stage``."""
    return _PHASE[action.kind], chain.visits_of(stage)[action.visit]


def cost_of(kind: ActionKind, index: int, chain: Chain) -> float:
    """What an action on visit ``index`` of the chain costs."""
    visit = chain.visits[index]
    if kind is ActionKind.F:
        return visit.forward
    if kind is ActionKind.W:
        return visit.weight
    return visit.backward if kind is ActionKind.I else visit.backward + visit.weight


class Needs:
    """What each action waits for, within its microbatch.

    - A forward waits for the earlier visit on its stage and for the forwards of the visits whose values it receives.
    - A backward (or its I part) waits for the last forward of the microbatch on its stage, for the backward of the next
      later visit there, and for the backwards of the visits that received values from it.
    - A W part waits for its I part.

    Visits without a backward are left out of the second rule.

    Attributes:
        forward: for every visit of the chain the visits whose forwards its forward waits for.
        last_forward: for every visit the last visit on its stage.
        backward: for every visit the visits whose backwards its backward waits for.
    """

    def __init__(self, chain: Chain) -> None:
        self.forward: list[tuple[int, ...]] = []
        self.last_forward: list[int] = []
        self.backward: list[tuple[int, ...]] = []
        for index, visit in enumerate(chain.visits):
            own = chain.visits_of(visit.stage)
            place = own.index(index)
            self.forward.append((*own[place - 1 : place], *visit.waits_for) if place else visit.waits_for)
            self.last_forward.append(own[-1])
            later = next((other for other in own[place + 1 :] if chain.visits[other].has_backward), None)
            receivers = [other for other in chain.receivers[index] if chain.visits[other].has_backward]
            self.backward.append((*([] if later is None else [later]), *receivers))

    def of(self, phase: int, index: int) -> Iterator[Phase]:
        """The phases that the phase of this visit waits for."""
        if phase == FORWARD:
            yield from ((FORWARD, other) for other in self.forward[index])
        elif phase == WEIGHT:
            yield (BACKWARD, index)
        else:
            yield (FORWARD, self.last_forward[index])
            yield from ((BACKWARD, other) for other in self.backward[index])


@dataclass(frozen=True)
class Timeline:
    """When the actions of a schedule run, and what that means; times are in the unit of the chain's costs.

    Attributes:
        start: when each action starts, laid out as ``Schedule.actions``.
        end: when each action ends.
        makespan: the end of the last action; the first starts at 0.
        busy: for every stage the time in which it computes.
        bubble_share: the share of all stages' time in which nothing is computed, ``1 - sum(busy) / (p * makespan)``.
        peak_microbatches: for every stage the most microbatches that were live on it at one time: from the start of
            their first action there to the end of their last, the W parts included, because these need what the
            forward saved.
        peak_visits: the same in visits: from the forward of a visit to the end of its backward and of its W part.
    """

    start: tuple[tuple[float, ...], ...]
    end: tuple[tuple[float, ...], ...]
    makespan: float
    busy: tuple[float, ...]
    bubble_share: float
    peak_microbatches: tuple[int, ...]
    peak_visits: tuple[int, ...]

    @property
    def waiting(self) -> tuple[float, ...]:
        """For every stage the time in which it is idle between its own first and last action."""
        return tuple(
            ends[-1] - starts[0] - busy if starts else 0.0
            for starts, ends, busy in zip(self.start, self.end, self.busy, strict=True)
        )


def simulate(schedule: Schedule, chain: Chain, message_delay: float = 0.0) -> Timeline:
    """Run ``schedule`` on paper: every stage starts its next action as soon as the stage is free and its needs are met.

    Args:
        schedule: whose actions run, each stage in its own order.
        chain: gives the costs and the arrows.
        message_delay: time from the end of an action to the moment at which another stage has its value.

    Raises ScheduleError when the schedule does not fit the chain or its stages wait for each other for ever;
    :func:`~modelparallel.pipeline.schedule_checks.check_schedule` says more about why.
    """
    if schedule.num_stages != chain.num_stages:
        raise ScheduleError(f"the schedule has {schedule.num_stages} stages, its chain {chain.num_stages}")
    needs = Needs(chain)
    end_of: dict[tuple[int, int, int], float] = {}
    starts: list[list[float]] = [[] for _ in schedule.actions]
    ends: list[list[float]] = [[] for _ in schedule.actions]
    waiting_for: dict[tuple[int, int, int], list[int]] = {}
    pending = list(range(schedule.num_stages - 1, -1, -1))
    while pending:
        stage = pending.pop()
        free = ends[stage][-1] if ends[stage] else 0.0
        for action in schedule.actions[stage][len(ends[stage]) :]:
            phase, index = _known_phase(action, stage, chain)
            begin = free
            for other_phase, other in needs.of(phase, index):
                key = (action.microbatch, other_phase, other)
                if key not in end_of:
                    waiting_for.setdefault(key, []).append(stage)
                    break
                delay = message_delay if chain.visits[other].stage != stage else 0.0
                begin = max(begin, end_of[key] + delay)
            else:
                free = begin + cost_of(action.kind, index, chain)
                starts[stage].append(begin)
                ends[stage].append(free)
                end_of[action.microbatch, phase, index] = free
                pending.extend(reversed(waiting_for.pop((action.microbatch, phase, index), [])))
                continue
            break
    for stage, actions in enumerate(schedule.actions):
        if len(ends[stage]) < len(actions):
            stuck = schedule.spelled(stage)[len(ends[stage])]
            raise ScheduleError(f"stage {stage} never gets what {stuck} waits for: check_schedule says why")
    return _timeline(schedule, chain, starts, ends)


def _known_phase(action: Action, stage: int, chain: Chain) -> Phase:
    if action.visit >= len(chain.visits_of(stage)):
        raise ScheduleError(
            f"stage {stage} runs {action}, but a microbatch comes to it {len(chain.visits_of(stage))} times"
        )
    return phase_of(action, stage, chain)


def _timeline(
    schedule: Schedule, chain: Chain, starts: Sequence[Sequence[float]], ends: Sequence[Sequence[float]]
) -> Timeline:
    busy = tuple(
        float(sum(cost_of(action.kind, chain.visits_of(stage)[action.visit], chain) for action in actions))
        for stage, actions in enumerate(schedule.actions)
    )
    makespan = max((stage_ends[-1] for stage_ends in ends if stage_ends), default=0.0)
    peaks = [peak_live(actions) for actions in schedule.actions]
    return Timeline(
        start=tuple(map(tuple, starts)),
        end=tuple(map(tuple, ends)),
        makespan=makespan,
        busy=busy,
        bubble_share=1 - sum(busy) / (schedule.num_stages * makespan) if makespan else 0.0,
        peak_microbatches=tuple(microbatches for microbatches, _ in peaks),
        peak_visits=tuple(visits for _, visits in peaks),
    )


def live_microbatches(actions: Sequence[Action]) -> list[int]:
    """For one stage's actions: how many microbatches are live while each of them runs."""
    return _live([action.microbatch for action in actions])


def peak_live(actions: Sequence[Action]) -> tuple[int, int]:
    """For one stage's actions: the most live microbatches and the most live visits at one time."""
    visits = _live([(action.microbatch, action.visit) for action in actions])
    return max(live_microbatches(actions), default=0), max(visits, default=0)


def _live(owners: Sequence[Hashable]) -> list[int]:
    """For every entry: how many owners have begun by then and have this or a later entry."""
    left = Counter(owners)
    begun: set[Hashable] = set()
    counts = []
    for owner in owners:
        begun.add(owner)
        counts.append(len(begun))
        left[owner] -= 1
        if not left[owner]:
            begun.discard(owner)
    return counts
