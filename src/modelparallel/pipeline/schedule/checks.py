"""Checks a schedule before anything runs: it is complete, in an order that can run, and within its memory."""

from __future__ import annotations

from collections import Counter

from modelparallel.errors import ScheduleError
from modelparallel.pipeline.schedule.timeline import (
    BACKWARD,
    FORWARD,
    WEIGHT,
    Needs,
    Phase,
    live_microbatches,
    phase_of,
)
from modelparallel.plan.schedule import Action, ActionKind, Chain, Schedule

_BACKWARD_KINDS = (ActionKind.B, ActionKind.I, ActionKind.W)


def check_schedule(schedule: Schedule, chain: Chain, active_microbatches: int | None = None) -> None:
    """ScheduleError when ``schedule`` cannot run ``chain`` or breaks its own rules; names action, stage and rule.

    Checked are, in this order: every action exists and is there once, with either B or both I and W for every visit
    that has a backward (none of them in ``forward_only``); each stage's own order; no backward before the last forward
    of a stage in ``simple``; no stage holds more than ``active_microbatches`` live microbatches (``simple`` holds all
    by definition and is not asked); the stages do not wait for each other in a circle.
    """
    if schedule.num_stages != chain.num_stages:
        raise ScheduleError(
            f"the schedule has {schedule.num_stages} stages, its chain {chain.num_stages}: make it for this chain"
        )
    needs = Needs(chain)
    for stage in range(schedule.num_stages):
        _check_complete(schedule, chain, stage)
        _check_own_order(schedule, chain, stage, needs)
        if schedule.kind == "simple":
            _check_forwards_first(schedule, stage)
        elif active_microbatches is not None:
            _check_memory(schedule, stage, active_microbatches)
    _check_progress(schedule, chain, needs)


def _check_complete(schedule: Schedule, chain: Chain, stage: int) -> None:
    visits = chain.visits_of(stage)
    counts = Counter(schedule.actions[stage])
    for action, count in counts.items():
        name = f"{_spelled(action, chain, stage)} on stage {stage}"
        if action.visit >= len(visits):
            raise ScheduleError(f"{name} is no part of the chain: a microbatch comes to this stage {len(visits)} times")
        if action.microbatch >= schedule.num_microbatches:
            raise ScheduleError(f"{name} is no part of the step: it has {schedule.num_microbatches} microbatches")
        if action.kind in _BACKWARD_KINDS:
            if schedule.kind == "forward_only":
                raise ScheduleError(f"{name} is a backward: a forward_only schedule has none")
            if not chain.visits[visits[action.visit]].has_backward:
                raise ScheduleError(f"{name} is a backward of a visit that has none")
        if count > 1:
            raise ScheduleError(f"{name} is there {count} times: every action runs once")
    for microbatch in range(schedule.num_microbatches):
        for place, index in enumerate(visits):
            forward, whole, inputs, weights = (Action(kind, microbatch, place) for kind in ActionKind)
            names = [_spelled(action, chain, stage) for action in (forward, whole, inputs, weights)]
            if forward not in counts:
                raise ScheduleError(f"{names[0]} is missing on stage {stage}: every visit has its forward")
            if schedule.kind == "forward_only" or not chain.visits[index].has_backward:
                continue
            has_parts = (inputs in counts, weights in counts)
            if whole in counts and any(has_parts):
                part = names[2] if has_parts[0] else names[3]
                raise ScheduleError(f"{names[1]} and {part} are both there on stage {stage}: B is I and W in one")
            if whole not in counts and not all(has_parts):
                missing = names[3] if has_parts[0] else names[2] if has_parts[1] else names[1]
                raise ScheduleError(
                    f"{missing} is missing on stage {stage}: every visit has its backward, B or both I and W"
                )


def _check_own_order(schedule: Schedule, chain: Chain, stage: int, needs: Needs) -> None:
    """What an action needs of its own stage has come before it."""
    seen: set[tuple[int, Phase]] = set()
    for action in schedule.actions[stage]:
        phase, index = phase_of(action, stage, chain)
        for need in needs.of(phase, index):
            if chain.visits[need[1]].stage == stage and (action.microbatch, need) not in seen:
                first = _phase_name(schedule, chain, action.microbatch, need)
                raise ScheduleError(
                    f"{_spelled(action, chain, stage)} comes before {first} on stage {stage}: {_rule(phase, need[0])}"
                )
        seen.add((action.microbatch, (phase, index)))


def _rule(phase: int, needed: int) -> str:
    if phase == FORWARD:
        return "the forwards of one microbatch run in the order of their visits"
    if phase == WEIGHT:
        return "a W part comes after its I part"
    if needed == FORWARD:
        return "a backward comes after all forwards of its microbatch on its stage"
    return "the backwards of one microbatch run in the opposite order of their visits"


def _check_forwards_first(schedule: Schedule, stage: int) -> None:
    spelled = schedule.spelled(stage)
    backward = None
    for name, action in zip(spelled, schedule.actions[stage], strict=True):
        if action.kind in _BACKWARD_KINDS:
            backward = backward or name
        elif backward:
            raise ScheduleError(
                f"{backward} comes before {name} on stage {stage}: a simple schedule runs no backward before the last "
                "forward of its stage"
            )


def _check_memory(schedule: Schedule, stage: int, active_microbatches: int) -> None:
    live = live_microbatches(schedule.actions[stage])
    for name, count in zip(schedule.spelled(stage), live, strict=True):
        if count > active_microbatches:
            raise ScheduleError(
                f"at {name} on stage {stage} there are {count} live microbatches: active_microbatches allows "
                f"{active_microbatches}. Raise it, or make the schedule with this limit"
            )


def _check_progress(schedule: Schedule, chain: Chain, needs: Needs) -> None:
    """Every stage comes to its end when each runs its actions in order and waits for the others."""
    position = [0] * schedule.num_stages
    done: set[tuple[int, Phase]] = set()

    def unmet(stage: int) -> tuple[int, Phase] | None:
        action = schedule.actions[stage][position[stage]]
        for need in needs.of(*phase_of(action, stage, chain)):
            if (action.microbatch, need) not in done:
                return action.microbatch, need
        return None

    moved = True
    while moved:
        moved = False
        for stage, actions in enumerate(schedule.actions):
            while position[stage] < len(actions) and unmet(stage) is None:
                action = actions[position[stage]]
                done.add((action.microbatch, phase_of(action, stage, chain)))
                position[stage] += 1
                moved = True
    stuck = [stage for stage, actions in enumerate(schedule.actions) if position[stage] < len(actions)]
    if not stuck:
        return
    # Every stuck stage waits for another stuck one; walking along comes round to a stage that was met before.
    path = [stuck[0]]
    sentences = []
    while True:
        stage = path[-1]
        waits = unmet(stage)
        assert waits is not None
        other = chain.visits[waits[1][1]].stage
        sentences.append(
            f"stage {stage} is at {_spelled(schedule.actions[stage][position[stage]], chain, stage)} and waits for "
            f"{_phase_name(schedule, chain, *waits)} of stage {other}"
        )
        if other in path:
            circle = sentences[path.index(other) :]
            raise ScheduleError(
                f"the stages wait for each other: {'; '.join(circle)}. Each of these comes later on its stage than the "
                "action that this stage is at"
            )
        path.append(other)


def _spelled(action: Action, chain: Chain, stage: int) -> str:
    return action.spelled(has_one_visit=len(chain.visits_of(stage)) == 1 and action.visit == 0)


def _phase_name(schedule: Schedule, chain: Chain, microbatch: int, phase: Phase) -> str:
    """The spelled action that does this phase in the schedule: its backward may be a B or an I."""
    stage = chain.visits[phase[1]].stage
    place = chain.visits_of(stage).index(phase[1])
    kinds = {FORWARD: (ActionKind.F,), BACKWARD: (ActionKind.B, ActionKind.I), WEIGHT: (ActionKind.W,)}[phase[0]]
    actions = set(schedule.actions[stage])
    kind_there = next((kind for kind in kinds if Action(kind, microbatch, place) in actions), kinds[0])
    return _spelled(Action(kind_there, microbatch, place), chain, stage)
