"""Pipeline schedules as frozen data: what a microbatch does (a chain of visits), and who does what in which order.

A chain is the same for every microbatch of a step. It lists the visits in the order of the program, so every arrow
between visits points from an earlier one to a later one. A schedule gives every stage its list of actions. The
letters are those of the papers: F is the forward of a visit, B its whole backward, I the part of the backward that
makes the gradients of the inputs, W the part that makes the gradients of the weights; B is I and W in one.

`F3` is the forward of microbatch 3. On a stage that a microbatch visits more than once the visit follows: `F3.1` is
the second visit's. docs/schedules.md shows schedules with their grids.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from modelparallel.errors import ScheduleError

SCHEDULE_KINDS = ("simple", "interleaved", "zero_bubble", "forward_only")
#: The kinds that begin a backward as soon as it is possible, so that fewer microbatches are under way at once.
BACKWARD_FIRST = ("interleaved", "zero_bubble")


@dataclass(frozen=True)
class Visit:
    """One stretch of one microbatch's work on one stage, between two waits.

    Costs are in any unit of time, the same for all visits; zero is allowed (a stage that only reads a value).

    Attributes:
        stage: where the work is done.
        forward: cost of the forward (F).
        backward: cost of the part of the backward that makes the gradients of the inputs (I).
        weight: cost of the part that makes the gradients of the weights (W). A whole backward (B) costs
            ``backward + weight``.
        waits_for: indices in the chain of earlier visits on other stages whose values this one receives. The backward
            sends gradients along the same arrows, the other way.
        has_backward: False when nothing here needs a gradient (a value that is only read, frozen weights at the
            beginning). The visit then has a forward only, and its senders do not wait for gradients from it.
    """

    stage: int
    forward: float = 1.0
    backward: float = 1.0
    weight: float = 1.0
    waits_for: tuple[int, ...] = ()
    has_backward: bool = True


@dataclass(frozen=True)
class Chain:
    """What every microbatch does: its visits in program order.

    Raises ScheduleError when a stage, a cost or an arrow is impossible.
    """

    num_stages: int
    visits: tuple[Visit, ...]

    def __post_init__(self) -> None:
        if self.num_stages < 1:
            raise ScheduleError(f"a chain has {self.num_stages} stages: it needs 1 or more")
        for index, visit in enumerate(self.visits):
            where = f"visit {index} of the chain, on stage {visit.stage},"
            if not 0 <= visit.stage < self.num_stages:
                raise ScheduleError(f"{where} is outside the stages 0 to {self.num_stages - 1}")
            for name in ("forward", "backward", "weight"):
                cost = getattr(visit, name)
                if not (math.isfinite(cost) and cost >= 0):
                    raise ScheduleError(f"{where} has the {name} cost {cost}: give a finite number, 0 or more")
            if len(set(visit.waits_for)) != len(visit.waits_for):
                raise ScheduleError(f"{where} waits twice for the same visit: {list(visit.waits_for)}")
            for sender in visit.waits_for:
                if not 0 <= sender < index:
                    raise ScheduleError(f"{where} waits for visit {sender}: a visit can wait for earlier ones only")
                if self.visits[sender].stage == visit.stage:
                    raise ScheduleError(
                        f"{where} waits for visit {sender} on its own stage: leave that out, the visits of one stage "
                        "follow each other anyway"
                    )

    @classmethod
    def straight(cls, num_stages: int, forward: float = 1.0, backward: float = 1.0, weight: float = 1.0) -> Chain:
        """Every stage once, one after the other, all with the same costs."""
        return cls.looped(num_stages, 1, forward, backward, weight)

    @classmethod
    def looped(
        cls, num_stages: int, num_rounds: int, forward: float = 1.0, backward: float = 1.0, weight: float = 1.0
    ) -> Chain:
        """Virtual stages: visit ``r * num_stages + s`` is the r-th on stage s. The costs are those of one visit."""
        return cls(
            num_stages,
            tuple(
                Visit(index % num_stages, forward, backward, weight, (index - 1,) if index and num_stages > 1 else ())
                for index in range(num_stages * num_rounds)
            ),
        )

    @cached_property
    def _visits_by_stage(self) -> tuple[tuple[int, ...], ...]:
        indices: list[list[int]] = [[] for _ in range(self.num_stages)]
        for index, visit in enumerate(self.visits):
            indices[visit.stage].append(index)
        return tuple(map(tuple, indices))

    @cached_property
    def receivers(self) -> tuple[tuple[int, ...], ...]:
        """For every visit the indices of the later visits that wait for it."""
        waiting: list[list[int]] = [[] for _ in self.visits]
        for index, visit in enumerate(self.visits):
            for sender in visit.waits_for:
                waiting[sender].append(index)
        return tuple(map(tuple, waiting))

    def visits_of(self, stage: int) -> tuple[int, ...]:
        """The indices in the chain of the visits on ``stage``, in order."""
        return self._visits_by_stage[stage]

    @property
    def is_straight(self) -> bool:
        """Whether a microbatch comes to every stage at most once (the arrows may still branch)."""
        return all(len(visits) <= 1 for visits in self._visits_by_stage)


class ActionKind(Enum):
    """What an action does; the value is its letter."""

    F = "F"
    B = "B"
    I = "I"  # noqa: E741 - the letter of the papers
    W = "W"


_SPELLING = re.compile(r"([FBIW])(\d+)(?:\.(\d+))?")


@dataclass(frozen=True)
class Action:
    """One piece of work of one microbatch on one stage.

    Attributes:
        kind: forward, whole backward, or one of the two parts of the backward.
        microbatch: its number in the step, from 0.
        visit: the index among the visits of the stage that runs the action, from 0.
    """

    kind: ActionKind
    microbatch: int
    visit: int = 0

    def spelled(self, has_one_visit: bool = False) -> str:
        """`F3.1`, or `F3` on a stage with one visit."""
        text = f"{self.kind.value}{self.microbatch}"
        return text if has_one_visit else f"{text}.{self.visit}"

    def __str__(self) -> str:
        return self.spelled(has_one_visit=self.visit == 0)

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action that is spelled ``text``; ScheduleError for anything else."""
        match = _SPELLING.fullmatch(text)
        if match is None:
            raise ScheduleError(
                f"{text!r} is not an action: write a letter of F, B, I, W, the microbatch, and for a later visit a "
                "point and its number, as in F3 or B0.1"
            )
        letter, microbatch, visit = match.groups()
        return cls(ActionKind(letter), int(microbatch), int(visit or 0))


_HEAD = re.compile(r"schedule (\w+), (\d+) microbatches, (\d+) stages")
_LINE = re.compile(r"stage (\d+):(.*)")


@dataclass(frozen=True)
class Schedule:
    """The actions of every stage, in the order in which it runs them.

    Attributes:
        kind: ``"simple"``, ``"interleaved"``, ``"zero_bubble"`` or ``"forward_only"``.
        num_microbatches: how many microbatches the step has.
        actions: one tuple per stage.
    """

    kind: str
    num_microbatches: int
    actions: tuple[tuple[Action, ...], ...]

    def __post_init__(self) -> None:
        check_kind(self.kind)

    @property
    def num_stages(self) -> int:
        """The number of stages."""
        return len(self.actions)

    def spelled(self, stage: int) -> tuple[str, ...]:
        """The actions of ``stage`` as text; the visit is left out where the stage has one visit only."""
        has_one_visit = all(action.visit == 0 for action in self.actions[stage])
        return tuple(action.spelled(has_one_visit) for action in self.actions[stage])

    def to_text(self) -> str:
        """A head line and one line per stage; `from_text` reads it back."""
        lines = [f"schedule {self.kind}, {self.num_microbatches} microbatches, {self.num_stages} stages"]
        for stage in range(self.num_stages):
            lines.append(f"stage {stage}: {' '.join(self.spelled(stage))}".rstrip())
        return "\n".join(lines) + "\n"

    @classmethod
    def from_text(cls, text: str) -> Schedule:
        """The schedule that `to_text` wrote; ScheduleError for any other text."""
        lines = text.strip().splitlines() or [""]
        head = _HEAD.fullmatch(lines[0].strip())
        if head is None:
            raise ScheduleError(
                f"{lines[0]!r} is not the first line of a schedule: it reads "
                "'schedule interleaved, 8 microbatches, 4 stages'"
            )
        kind, num_microbatches, num_stages = head[1], int(head[2]), int(head[3])
        stages = []
        for expected, line in enumerate(lines[1:]):
            match = _LINE.fullmatch(line.strip())
            if match is None or int(match[1]) != expected:
                raise ScheduleError(
                    f"line {expected + 2} of the schedule must begin with 'stage {expected}:', not {line!r}"
                )
            stages.append(tuple(map(Action.parse, match[2].split())))
        if len(stages) != num_stages:
            raise ScheduleError(f"the schedule says {num_stages} stages and has {len(stages)} lines of actions")
        return cls(kind, num_microbatches, tuple(stages))


def check_kind(kind: str) -> None:
    """ScheduleError when ``kind`` is not the name of a schedule."""
    if kind not in SCHEDULE_KINDS:
        raise ScheduleError(f"no schedule is called {kind!r}: use one of {', '.join(SCHEDULE_KINDS)}")
