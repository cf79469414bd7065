"""Makes pipeline schedules: one pure function from a chain of visits to every stage's list of actions.

[Note: One simulation, several policies]
A schedule is the record of a simulation (`_Simulation`). At every moment in which something ended, each free stage
chooses its next action among those that are ready; a `_Policy` says how. What can be run in a simulation can be run by
the engine in the same order without a deadlock, so no other proof is needed. On a straight chain the policies of
`simple` and `interleaved` are the known ones (GPipe, 1F1B). For other chains, and for `zero_bubble`, no rule is best
for all, so a few policies are tried and the shortest schedule wins, then the one that waits least between its actions,
then the one that holds the fewest visits. `zero_bubble` schedules are compared with messages that take a little time,
since one without slack is as short on paper and longer in practice; those that are nearly as long as the shortest are
taken as equal, and the one that holds the fewest visits wins.

[Note: Why the choice never gets stuck]
A policy that chooses freely among ready actions always goes on: microbatches are admitted on every stage in the order
of their numbers, so nothing stands in the way of the oldest unfinished one. A policy with fixed sequences (`warm_up`)
goes on where every stage is further ahead than those that wait for it, as on a straight chain. On others it may get
stuck; it is then left out, and policies that choose freely are there, too.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from modelparallel.errors import ScheduleError
from modelparallel.pipeline.schedule.timeline import BACKWARD, FORWARD, WEIGHT, Needs, simulate
from modelparallel.plan.schedule import Action, ActionKind, Chain, Schedule, Visit, check_kind

# Ends that differ by less than this share of a microbatch's whole cost are one moment: sums of floats in different
# orders must not decide who comes first.
_SAME_MOMENT = 1e-9
_NEVER = float("inf")
# What a message takes when zero-bubble schedules are compared, as a share of the mean cost of a visit's forward, and
# how much longer than the shortest one is as good.
_MESSAGE_SHARE = 0.05
_AS_GOOD = 0.01


@dataclass(frozen=True)
class _Policy:
    """How a free stage chooses its next action.

    Attributes:
        limits: for every stage the most live microbatches.
        ahead: for every stage the most microbatches begun there whose backward, or its I part, is not done. None: only
            `limits` counts, which is the same where nothing is split.
        group: microbatches are taken in groups of so many: a visit for the whole group before the next visit.
        warm_up: for every stage the number of forwards that run ahead of the backwards, in fixed sequences of both: the
            stage waits for its next forward until it is so far ahead, and for its next backward then. None: whatever is
            ready runs, a backward rather than a forward.
        tops_up: a ready forward runs before a ready backward, up to the limits.
        forwards_first: a stage runs no backward before its last forward.
        is_split: backwards are I and W parts, except where the W part costs nothing.
        weights_behind: for every stage how many W parts may be left for later; one more than that runs at once. None:
            they are left for waiting time.
        is_patient: a W part fills waiting time only if it ends before the next value or gradient that is on its way.
    """

    limits: tuple[int, ...]
    ahead: tuple[int, ...] | None = None
    group: int = 1
    warm_up: tuple[int, ...] | None = None
    forwards_first: bool = False
    tops_up: bool = False
    is_split: bool = False
    weights_behind: tuple[int, ...] | None = None
    is_patient: bool = False


def make_schedule(chain: Chain, num_microbatches: int, kind: str, active_microbatches: int | None = None) -> Schedule:
    """The schedule of ``kind`` for ``num_microbatches`` microbatches that all run ``chain``.

    Pure and deterministic: equal arguments give equal schedules on every stage and in every process.

    Args:
        chain: the visits of a microbatch with their costs.
        num_microbatches: of the step, 1 or more.
        kind: ``"simple"``: all forwards of a stage, then all its backwards. ``"interleaved"``: a backward is preferred
            to a forward; on a straight chain with at least p active microbatches this is 1F1B. ``"zero_bubble"``:
            backwards are split, and W parts fill the waiting time. ``"forward_only"``: no backwards.
        active_microbatches: the most microbatches that are live on a stage (begun there and not finished; W parts
            count). None: for ``interleaved`` what fills the pipeline, for ``zero_bubble`` as many as
            ``interleaved`` then holds. ``simple`` holds all microbatches by definition and takes no limit.

    Raises ScheduleError for values that are not possible.
    """
    check_kind(kind)
    if num_microbatches < 1:
        raise ScheduleError(f"num_microbatches is {num_microbatches}: a step has 1 or more")
    if active_microbatches is not None and active_microbatches < 1:
        raise ScheduleError(f"active_microbatches is {active_microbatches}: allow 1 or more")
    cap = min(active_microbatches or num_microbatches, num_microbatches)
    shape = _Shape(chain, num_microbatches)
    if kind == "simple":
        limits = (num_microbatches,) * chain.num_stages
        groups = _groups(chain, shape, num_microbatches)
        policies = [_Policy(limits, group=group, forwards_first=True) for group in groups]
        return _best(shape, policies, kind).schedule
    if kind == "forward_only":
        policies = [_Policy((cap,) * chain.num_stages, group=group) for group in _groups(chain, shape, cap)]
        return _best(shape, policies, kind).schedule
    interleaved = _best(shape, list(_interleaved(chain, num_microbatches, cap)), "interleaved")
    if kind == "interleaved":
        return interleaved.schedule
    if active_microbatches is None:
        cap = max(1, *interleaved.peaks)
    # First the interleaved order with every W part right behind its I part: so the result is never slower than that.
    known = _split(interleaved.schedule, chain)
    return _joined(_best_split(shape, list(_zero_bubble(chain, cap, interleaved)), known), chain)


def step_predictor(
    kind: str, num_microbatches: int, active_microbatches: int | None
) -> Callable[[Sequence[tuple[float, float, float]]], float] | None:
    """A function that predicts the time of a step on a straight chain, with messages that take no time, from the work
    of its stages for one microbatch: of the forward, of the input gradients, of the weight gradients.

    None for the kinds where a stage that waits has something else to do, or no backward.
    """
    if kind not in ("simple", "interleaved"):
        return None

    def predict(work: Sequence[tuple[float, float, float]]) -> float:
        waits = [(stage - 1,) if stage else () for stage in range(len(work))]
        chain = Chain(len(work), tuple(Visit(stage, *costs, waits[stage]) for stage, costs in enumerate(work)))
        return simulate(make_schedule(chain, num_microbatches, kind, active_microbatches), chain).makespan

    return predict


def _groups(chain: Chain, shape: _Shape, cap: int) -> list[int]:
    """The sizes of groups worth trying; where no stage is visited twice they make no difference."""
    return [1] if chain.is_straight else sorted({1, min(chain.num_stages, cap), cap, shape.num_microbatches})


def _interleaved(chain: Chain, num_microbatches: int, cap: int) -> Iterator[_Policy]:
    depths = _depths(chain)
    if chain.is_straight:
        limits = tuple(min(depth, cap) for depth in depths)
        yield _Policy(limits, warm_up=limits)
        if cap < min(max(depths), num_microbatches):
            # With less memory than 1F1B takes, its fixed turns would make backwards wait for forwards that come late.
            yield _Policy(limits)
        return
    p = chain.num_stages
    rounds = max(len(chain.visits_of(stage)) for stage in range(p))
    # Groups of p, and where they do not come out even, somewhat larger ones.
    groups = dict.fromkeys(min(size, cap) for size in (p, -(-num_microbatches // max(1, num_microbatches // p))))
    for group in groups:
        # The order known for virtual stages (Narayanan et al. 2021, section 2.2).
        warm_up = tuple(2 * (p - stage - 1) + (rounds - 1) * group + 1 for stage in range(p))
        yield _Policy((cap,) * p, group=group, warm_up=warm_up)
    reach = _stages_ahead(chain)
    limits_to_try = [reach, tuple(2 * stages - 1 for stages in reach), (cap,) * p]
    for limits in dict.fromkeys(tuple(min(limit, cap) for limit in limits) for limits in limits_to_try):
        for group in dict.fromkeys((1, *groups)):
            yield _Policy(limits, group=group)


def _zero_bubble(chain: Chain, cap: int, interleaved: _Result) -> Iterator[_Policy]:
    # The interleaved order with as many W parts left for later as the limit allows; with a limit of p this is ZB-H1 on
    # a straight chain (Qi et al. 2023).
    p = chain.num_stages
    behind = tuple(max(0, cap - peak) for peak in interleaved.peaks)
    first = replace(
        interleaved.policy, limits=(cap,) * p, ahead=interleaved.policy.limits, is_split=True, weights_behind=behind
    )
    for is_patient in (False, True):
        yield replace(first, is_patient=is_patient)
        if first.warm_up is None:
            yield replace(first, is_patient=is_patient, tops_up=True)
    limits_to_try = dict.fromkeys(min(limit, cap) for limit in (p, 2 * p - 1, cap))
    for limit in limits_to_try:
        for group in dict.fromkeys((1, interleaved.policy.group)):
            for is_patient in (False, True):
                yield _Policy((limit,) * p, group=group, is_split=True, is_patient=is_patient)


def _split(schedule: Schedule, chain: Chain) -> Schedule:
    """The same order as a zero-bubble schedule: every B is an I and its W."""
    stages = []
    for stage, actions in enumerate(schedule.actions):
        parts: list[Action] = []
        for action in actions:
            if action.kind is ActionKind.B and chain.visits[chain.visits_of(stage)[action.visit]].weight > 0:
                parts += [replace(action, kind=ActionKind.I), replace(action, kind=ActionKind.W)]
            else:
                parts.append(action)
        stages.append(tuple(parts))
    return Schedule("zero_bubble", schedule.num_microbatches, tuple(stages))


def _joined(schedule: Schedule, chain: Chain) -> Schedule:
    """I and W as one B where W follows at once and no other stage waits for what I makes: splitting gains nothing."""
    stages = []
    for stage, actions in enumerate(schedule.actions):
        joined: list[Action] = []
        for action in actions:
            last = joined[-1] if joined else None
            visit = chain.visits[chain.visits_of(stage)[action.visit]]
            is_awaited = any(chain.visits[sender].has_backward for sender in visit.waits_for)
            if action.kind is ActionKind.W and last == replace(action, kind=ActionKind.I) and not is_awaited:
                joined[-1] = replace(action, kind=ActionKind.B)
            else:
                joined.append(action)
        stages.append(tuple(joined))
    return replace(schedule, actions=tuple(stages))


def _depths(chain: Chain) -> list[int]:
    """For every stage of a straight chain: how many visits a gradient comes back through, the stage's own included."""
    below = [1] * len(chain.visits)
    for index in range(len(chain.visits) - 1, -1, -1):
        receivers = [other for other in chain.receivers[index] if chain.visits[other].has_backward]
        below[index] += max((below[other] for other in receivers), default=0)
    return [max((below[index] for index in chain.visits_of(stage)), default=1) for stage in range(chain.num_stages)]


def _stages_ahead(chain: Chain) -> tuple[int, ...]:
    """For every stage: on how many stages a backward runs before its own last one may, itself included."""
    needs = Needs(chain)
    before: list[set[int]] = [set() for _ in chain.visits]
    for index in range(len(chain.visits) - 1, -1, -1):
        before[index] = {chain.visits[index].stage}.union(*(before[other] for other in needs.backward[index]))
    ahead = []
    for stage in range(chain.num_stages):
        visits = [index for index in chain.visits_of(stage) if chain.visits[index].has_backward]
        ahead.append(len(before[visits[0]]) if visits else 1)
    return tuple(ahead)


@dataclass(frozen=True)
class _Result:
    policy: _Policy
    schedule: Schedule
    peaks: tuple[int, ...]
    makespan: float
    key: tuple[float, ...]


def _best(shape: _Shape, policies: list[_Policy], kind: str) -> _Result:
    """The first of the best results: shortest, then least waiting, then fewest live visits."""
    best: _Result | None = None
    bound = _lower_bound(shape, has_backwards=kind != "forward_only") + shape.moment
    for policy in policies:
        if best is not None and best.makespan <= bound and best.key[1] == 0:
            break
        simulation = _Simulation(shape, policy, has_backwards=kind != "forward_only")
        if simulation.run(until=_NEVER if best is None else best.makespan + shape.moment):
            result = _result(shape, policy, Schedule(kind, shape.num_microbatches, simulation.actions()))
            if best is None or result.key < best.key:
                best = result
    if best is None:
        raise AssertionError("no policy finished, although one that chooses freely cannot get stuck")
    return best


def _best_split(shape: _Shape, policies: list[_Policy], known: Schedule) -> Schedule:
    """The best zero-bubble schedule, not longer than `known`; see the note at the top."""
    chain = shape.chain
    delay = _MESSAGE_SHARE * sum(visit.forward for visit in chain.visits) / max(1, len(chain.visits))
    longest = simulate(known, chain).makespan
    candidates = [known]
    for policy in policies:
        simulation = _Simulation(shape, policy, has_backwards=True)
        if simulation.run(until=longest):
            candidates.append(Schedule(known.kind, known.num_microbatches, simulation.actions()))
    timelines = [simulate(candidate, chain, delay) for candidate in candidates]
    limit = min(timeline.makespan for timeline in timelines) * (1 + _AS_GOOD)

    def rating(index: int) -> tuple[bool, int, float]:
        timeline = timelines[index]
        return timeline.makespan > limit, sum(timeline.peak_visits), timeline.makespan

    return candidates[min(range(len(candidates)), key=rating)]


def _lower_bound(shape: _Shape, *, has_backwards: bool) -> float:
    """No schedule is shorter: a stage cannot begin before its first values can be there, and has all its work to do."""
    chain = shape.chain
    ends: list[float] = []
    for needs, visit in zip(Needs(chain).forward, chain.visits, strict=True):
        ends.append(visit.forward + max((ends[other] for other in needs), default=0.0))
    bound = 0.0
    for stage in range(chain.num_stages):
        visits = [(index, chain.visits[index]) for index in chain.visits_of(stage)]
        work = sum(
            visit.forward + (visit.backward + visit.weight) * (visit.has_backward and has_backwards)
            for _, visit in visits
        )
        begin = min((ends[index] - visit.forward for index, visit in visits), default=0.0)
        bound = max(bound, begin + shape.num_microbatches * work)
    return bound


def _result(shape: _Shape, policy: _Policy, schedule: Schedule) -> _Result:
    timeline = simulate(schedule, shape.chain)
    unit = shape.moment / _SAME_MOMENT or 1.0
    key = (round(timeline.makespan / unit, 6), round(max(timeline.waiting) / unit, 6), float(sum(timeline.peak_visits)))
    return _Result(policy, schedule, timeline.peak_microbatches, timeline.makespan, key)


class _Shape:
    """What all simulations of one chain share; the needs are turned round: what an end sets free."""

    def __init__(self, chain: Chain, num_microbatches: int) -> None:
        self.chain = chain
        self.num_microbatches = num_microbatches
        self.moment = _SAME_MOMENT * sum(visit.forward + visit.backward + visit.weight for visit in chain.visits)
        self.place = [chain.visits_of(visit.stage).index(index) for index, visit in enumerate(chain.visits)]
        needs = Needs(chain)
        size = len(chain.visits)
        # Phases are numbered phase * size + index.
        self.num_needs = [0] * (2 * size)
        self.frees: list[list[int]] = [[] for _ in range(2 * size)]
        for index, visit in enumerate(chain.visits):
            for phase in (FORWARD, BACKWARD) if visit.has_backward else (FORWARD,):
                for other_phase, other in needs.of(phase, index):
                    self.num_needs[phase * size + index] += 1
                    self.frees[other_phase * size + other].append(phase * size + index)


class _Simulation:
    """One run of the pipeline on paper under one policy; `actions` has its record.

    Ready actions lie in one heap per stage and phase, ordered by their key: group of microbatches, then visit, then
    microbatch. A stage's first visit of a microbatch is not in the heap: those are admitted in order of their numbers.
    """

    def __init__(self, shape: _Shape, policy: _Policy, *, has_backwards: bool) -> None:
        self.shape = shape
        self.policy = policy
        self.has_backwards = has_backwards
        chain = shape.chain
        stages = range(chain.num_stages)
        self.size = len(chain.visits)
        self.needs_left = [list(shape.num_needs) for _ in range(shape.num_microbatches)]
        self.ready: list[list[list[tuple[int, int, int, int]]]] = [[[], [], []] for _ in stages]
        self.is_admissible: list[set[int]] = [set() for _ in stages]
        self.num_admitted = [0] * chain.num_stages
        self.num_live = [0] * chain.num_stages
        self.parts_left: list[dict[int, int]] = [{} for _ in stages]
        self.weights_left: list[dict[int, int]] = [{} for _ in stages]
        self.num_ahead = [0] * chain.num_stages
        self.done = [[0, 0, 0] for _ in stages]
        self.is_busy = [False] * chain.num_stages
        self.arrivals: list[list[float]] = [[] for _ in stages]
        self.record: list[list[tuple[int, int, int]]] = [[] for _ in stages]
        self.ends: list[tuple[float, int, int, int, int]] = []
        self.now = 0.0
        self.num_started = 0
        self.is_split = [policy.is_split and visit.weight > 0 for visit in chain.visits]
        self.num_parts = []
        self.num_weights = []
        for stage in stages:
            visits = chain.visits_of(stage)
            backwards = [index for index in visits if has_backwards and chain.visits[index].has_backward]
            self.num_weights.append(sum(self.is_split[index] for index in backwards))
            self.num_parts.append(len(visits) + len(backwards) + self.num_weights[stage])
        self.sequences = self._sequences() if policy.warm_up is not None else None

    def _sequences(self) -> list[tuple[list[tuple[int, int]], list[tuple[int, int]]]]:
        """For every stage its forwards and its backwards as (microbatch, visit of the chain), in the order of keys."""
        chain = self.shape.chain
        sequences = []
        for stage in range(chain.num_stages):
            pairs = [
                (microbatch, index)
                for microbatch in range(self.shape.num_microbatches)
                for index in chain.visits_of(stage)
            ]
            backwards = [pair for pair in pairs if chain.visits[pair[1]].has_backward and self.has_backwards]
            sequences.append(
                (
                    sorted(pairs, key=lambda pair: self._key(FORWARD, *pair)),
                    sorted(backwards, key=lambda pair: self._key(BACKWARD, *pair)),
                )
            )
        return sequences

    def _key(self, phase: int, microbatch: int, index: int) -> tuple[int, int, int, int]:
        group = self.policy.group
        if phase == FORWARD:
            return microbatch // group, index, microbatch % group, microbatch
        return microbatch // group, -index, microbatch % group, microbatch

    def run(self, until: float) -> bool:
        """Simulate to the end; False when the policy gets stuck, or is not done by ``until``."""
        chain = self.shape.chain
        for index, visit in enumerate(chain.visits):
            if not self.needs_left[0][index]:
                for microbatch in range(self.shape.num_microbatches):
                    self._becomes_ready(visit.stage, FORWARD, microbatch, index)
        may_start = set(range(chain.num_stages))
        while True:
            for stage in sorted(may_start):
                self._start_next(stage)
            may_start = set()
            if not self.ends:
                break
            moment = self.ends[0][0] + self.shape.moment
            if moment > until + self.shape.moment:
                return False
            while self.ends and self.ends[0][0] <= moment:
                end, _, phase, microbatch, index = heapq.heappop(self.ends)
                self.now = max(self.now, end)
                self._finish(phase, microbatch, index, may_start)
        return all(
            len(record) == parts * self.shape.num_microbatches
            for record, parts in zip(self.record, self.num_parts, strict=True)
        )

    def _becomes_ready(self, stage: int, phase: int, microbatch: int, index: int) -> None:
        if phase == FORWARD and self.shape.place[index] == 0:
            self.is_admissible[stage].add(microbatch)
        else:
            heapq.heappush(self.ready[stage][phase], self._key(phase, microbatch, index))

    def _finish(self, phase: int, microbatch: int, index: int, may_start: set[int]) -> None:
        chain = self.shape.chain
        stage = chain.visits[index].stage
        self.is_busy[stage] = False
        self.done[stage][phase] += 1
        may_start.add(stage)
        self.parts_left[stage][microbatch] -= 1
        if not self.parts_left[stage][microbatch]:
            self.num_live[stage] -= 1
        if phase == WEIGHT:
            self.weights_left[stage][microbatch] -= 1
        elif self.parts_left[stage][microbatch] == self.weights_left[stage][microbatch]:
            self.num_ahead[stage] -= 1
        if phase == WEIGHT:
            return
        if phase == BACKWARD and self.is_split[index]:
            # In the order of the I parts, which is the order in which they came.
            heapq.heappush(self.ready[stage][WEIGHT], (self.done[stage][BACKWARD], -index, 0, microbatch))
        left = self.needs_left[microbatch]
        for freed in self.shape.frees[phase * self.size + index]:
            left[freed] -= 1
            freed_phase, freed_index = divmod(freed, self.size)
            if not left[freed] and (freed_phase == FORWARD or self.has_backwards):
                freed_stage = chain.visits[freed_index].stage
                self._becomes_ready(freed_stage, freed_phase, microbatch, freed_index)
                may_start.add(freed_stage)

    def _start_next(self, stage: int) -> None:
        if self.is_busy[stage]:
            return
        chosen = self._choose(stage)
        if chosen is None:
            return
        phase, microbatch, index = chosen
        visit = self.shape.chain.visits[index]
        if phase == FORWARD:
            cost = visit.forward
            if self.shape.place[index] == 0:
                self.num_admitted[stage] += 1
                self.num_live[stage] += 1
                self.num_ahead[stage] += 1
                self.parts_left[stage][microbatch] = self.num_parts[stage]
                self.weights_left[stage][microbatch] = self.num_weights[stage]
        elif phase == WEIGHT:
            cost = visit.weight
        else:
            cost = visit.backward if self.is_split[index] else visit.backward + visit.weight
        self.is_busy[stage] = True
        self.record[stage].append(chosen)
        self.num_started += 1
        end = self.now + cost
        heapq.heappush(self.ends, (end, self.num_started, phase, microbatch, index))
        if phase != WEIGHT and self.policy.is_patient:
            left = self.needs_left[microbatch]
            for freed in self.shape.frees[phase * self.size + index]:
                other = self.shape.chain.visits[freed % self.size].stage
                if left[freed] == 1 and other != stage:
                    heapq.heappush(self.arrivals[other], end)

    def _choose(self, stage: int) -> tuple[int, int, int] | None:
        """The (phase, microbatch, visit) to run now; None when the stage has to wait."""
        weights = self.ready[stage][WEIGHT]
        behind = self.policy.weights_behind
        if behind is not None and len(weights) > behind[stage]:
            return self._take(stage, WEIGHT)
        if self.sequences is not None:
            chosen = self._next_in_sequence(stage)
        elif self.policy.tops_up and (chosen := self._best_forward(stage)) is not None:
            return chosen
        elif self.ready[stage][BACKWARD] and not (self.policy.forwards_first and self._has_forwards_left(stage)):
            chosen = self._take(stage, BACKWARD)
        else:
            chosen = self._best_forward(stage)
        if chosen is None and weights and self._fits(stage, self.shape.chain.visits[-weights[0][1]].weight):
            return self._take(stage, WEIGHT)
        return chosen

    def _has_forwards_left(self, stage: int) -> bool:
        num_visits = len(self.shape.chain.visits_of(stage))
        return self.done[stage][FORWARD] < num_visits * self.shape.num_microbatches

    def _take(self, stage: int, phase: int) -> tuple[int, int, int]:
        _, index, _, microbatch = heapq.heappop(self.ready[stage][phase])
        return phase, microbatch, abs(index)

    def _fits(self, stage: int, cost: float) -> bool:
        """Whether a W part of this cost ends before the next known arrival; an impatient policy does not ask."""
        arrivals = self.arrivals[stage]
        while arrivals and arrivals[0] <= self.now + self.shape.moment:
            heapq.heappop(arrivals)
        return not arrivals or self.now + cost <= arrivals[0] + self.shape.moment

    def _admits(self, stage: int) -> bool:
        """Whether one more microbatch may begin here."""
        ahead = self.policy.ahead
        return self.num_live[stage] < self.policy.limits[stage] and (
            ahead is None or self.num_ahead[stage] < ahead[stage]
        )

    def _best_forward(self, stage: int) -> tuple[int, int, int] | None:
        ready = self.ready[stage][FORWARD]
        new = self.num_admitted[stage]
        if new in self.is_admissible[stage] and self._admits(stage):
            first = self.shape.chain.visits_of(stage)[0]
            if not ready or self._key(FORWARD, new, first) < ready[0]:
                return FORWARD, new, first
        return self._take(stage, FORWARD) if ready else None

    def _next_in_sequence(self, stage: int) -> tuple[int, int, int] | None:
        assert self.sequences is not None and self.policy.warm_up is not None
        forwards, backwards = self.sequences[stage]
        num_forwards, num_backwards, _ = self.done[stage]
        may_go_ahead = num_forwards - num_backwards < self.policy.warm_up[stage] or num_backwards == len(backwards)
        if num_forwards < len(forwards) and may_go_ahead:
            microbatch, index = forwards[num_forwards]
            is_first = self.shape.place[index] == 0
            if not is_first or self._admits(stage):
                if is_first:
                    return (FORWARD, microbatch, index) if microbatch in self.is_admissible[stage] else None
                return self._take_exactly(stage, FORWARD, microbatch, index)
        if num_backwards < len(backwards):
            return self._take_exactly(stage, BACKWARD, *backwards[num_backwards])
        return None

    def _take_exactly(self, stage: int, phase: int, microbatch: int, index: int) -> tuple[int, int, int] | None:
        if self.needs_left[microbatch][phase * self.size + index]:
            return None
        return phase, microbatch, index

    def actions(self) -> tuple[tuple[Action, ...], ...]:
        """The record as the actions of every stage."""

        def kind(phase: int, index: int) -> ActionKind:
            if phase == BACKWARD:
                return ActionKind.I if self.is_split[index] else ActionKind.B
            return ActionKind.F if phase == FORWARD else ActionKind.W

        return tuple(
            tuple(Action(kind(phase, index), number, self.shape.place[index]) for phase, number, index in record)
            for record in self.record
        )
