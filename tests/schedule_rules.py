"""The rules of a schedule once more, as plain as can be: what the library's checker and simulation are held to."""

from __future__ import annotations

from collections.abc import Iterator

from modelparallel.plan.schedule import Action, ActionKind, Chain, Schedule

F, B, I, W = ActionKind  # noqa: E741 - the letters of the papers
StageAction = tuple[int, Action]


def all_actions(schedule: Schedule) -> list[StageAction]:
    """Every action as (stage, action), in the order of stages."""
    return [(stage, action) for stage, actions in enumerate(schedule.actions) for action in actions]


def is_backward(action: Action) -> bool:
    return action.kind in (B, I)


def has_to_wait(chain: Chain, later: StageAction, earlier: StageAction) -> bool:
    """Whether ``later`` may only run when ``earlier`` is done; both are (stage, action)."""
    (stage, action), (other_stage, other) = later, earlier
    if action.microbatch != other.microbatch:
        return False
    index, other_index = chain.visits_of(stage)[action.visit], chain.visits_of(other_stage)[other.visit]
    if action.kind is F:
        if other.kind is not F:
            return False
        return other_index in chain.visits[index].waits_for or (stage == other_stage and other_index < index)
    if action.kind is W:
        return other.kind is I and other_index == index
    if other.kind is F:
        return stage == other_stage
    if is_backward(other):
        return index in chain.visits[other_index].waits_for or (stage == other_stage and other_index > index)
    return False


def expected_sets(
    chain: Chain, num_microbatches: int, with_backward: bool
) -> Iterator[tuple[int, int, int, list[set[ActionKind]]]]:
    """For every stage and (microbatch, visit) the sets of kinds that are right."""
    for stage in range(chain.num_stages):
        for visit, index in enumerate(chain.visits_of(stage)):
            needs_backward = with_backward and chain.visits[index].has_backward
            for microbatch in range(num_microbatches):
                yield stage, microbatch, visit, ([{F, B}, {F, I, W}] if needs_backward else [{F}])


def is_valid(schedule: Schedule, chain: Chain, active_microbatches: int | None = None) -> bool:
    """Whether the schedule may run: complete, no circle in what waits for what, within its memory."""
    found: dict[tuple[int, int, int], list[ActionKind]] = {}
    for stage, action in all_actions(schedule):
        found.setdefault((stage, action.microbatch, action.visit), []).append(action.kind)
    expected = {
        (stage, microbatch, visit): kinds
        for stage, microbatch, visit, kinds in expected_sets(
            chain, schedule.num_microbatches, schedule.kind != "forward_only"
        )
    }
    if set(found) != set(expected):
        return False
    if any(len(kinds) != len(set(kinds)) or set(kinds) not in expected[key] for key, kinds in found.items()):
        return False
    for actions in schedule.actions:
        is_forward = [action.kind is F for action in actions]
        if schedule.kind == "simple" and is_forward != sorted(is_forward, reverse=True):
            return False
        if schedule.kind != "simple" and active_microbatches is not None:
            for position in range(len(actions)):
                begun = {action.microbatch for action in actions[: position + 1]}
                going_on = {action.microbatch for action in actions[position:]}
                if len(begun & going_on) > active_microbatches:
                    return False
    return runs_to_the_end(schedule, chain)


def runs_to_the_end(schedule: Schedule, chain: Chain) -> bool:
    """Take away, again and again, the first action of any stage that waits for nothing that is left."""
    left = [list(actions) for actions in schedule.actions]
    while any(left):
        for stage, actions in enumerate(left):
            if actions and not any(
                has_to_wait(chain, (stage, actions[0]), (other_stage, other))
                for other_stage, others in enumerate(left)
                for other in others
            ):
                actions.pop(0)
                break
        else:
            return False
    return True


def known_interleaved_order(num_stages: int, num_microbatches: int, num_rounds: int) -> tuple[tuple[Action, ...], ...]:
    """1F1B with virtual stages as published (Narayanan et al. 2021): microbatches in groups of num_stages.

    Returns the actions of every stage; num_microbatches is a multiple of num_stages.
    """
    p, v, total = num_stages, num_rounds, num_microbatches * num_rounds
    assert num_microbatches % p == 0

    def step(number: int, kind: ActionKind) -> Action:
        group, within = divmod(number, p * v)
        visit, place = divmod(within, p)
        return Action(kind, group * p + place, visit if kind is F else v - 1 - visit)

    stages = []
    for stage in range(p):
        warm_up = min(total, 2 * (p - stage - 1) + (v - 1) * p if v > 1 else p - stage - 1)
        actions = [step(number, F) for number in range(warm_up)]
        for number in range(total - warm_up):
            actions += [step(warm_up + number, F), step(number, B)]
        actions += [step(number, B) for number in range(total - warm_up, total)]
        stages.append(tuple(actions))
    return tuple(stages)
