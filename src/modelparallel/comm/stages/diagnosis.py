"""Why a message does not come: what the stages tell each other while one waits, and what follows from it.

[Note: certain reports] A peer that is slow (it compiles, loads data, stands in a debugger) must never be taken for one
that has gone astray. So nothing here looks at the clock. Two things are proof:

- The programs differ: both have an event of the same number with different texts, or one is done and the other has more
  events, or one has left the step that the other waits in. A stage's answer travels behind everything that it has sent
  before, so a message that was sent is there when the answer is.
- A circle: each stage of a set waits for messages of stages of that set, and none is under way. What the stages tell
  was not written down at one moment; but a stage that says which wait of the others it has heard of before, and is
  itself still in the wait that they have heard of, was waiting at the moment when the last of them spoke first.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from modelparallel.comm.event_log import LoggedEvent, LogReport, first_difference

_ADVICE = (
    "the stages did not run the same program. Does the step function branch on the rank, on time or on unseeded "
    "randomness?"
)


def place_of(microbatch: int) -> str:
    """In words, what a message belongs to; negative numbers stand for no microbatch."""
    return f"microbatch {microbatch}" if microbatch >= 0 else "outside the microbatches"


@dataclass(frozen=True)
class TellingWait:
    """One of the messages that a stage waits for: from whom, what in words, at which line of the user's code."""

    source: int
    microbatch: int
    what: str
    line: str

    def __str__(self) -> str:
        where = place_of(self.microbatch)
        return f"{where}: waiting to receive {self.what} from pp_rank {self.source} ({self.line})"


@dataclass(frozen=True)
class GroupCall:
    """A collective call between steps (a barrier) that a stage waits in: the ``number``-th of its ``group``.

    ``stages``: the other stages of this pipeline that belong to the group.
    """

    what: str
    line: str
    group: str
    number: int
    stages: tuple[int, ...]

    def __str__(self) -> str:
        return f"waiting in {self.what} ({self.line})"


@dataclass(frozen=True)
class Situation:
    """What a stage tells of itself.

    Attributes:
        stage, step: who, and which call of a step function it is in, or was in last.
        is_in_step: whether that call is under way.
        wait_number: counts the waits of its main thread; 0 if it does not wait.
        waits: for any of these messages.
        is_any_peer_enough: a word of any stage may end the wait, too.
        seconds: for how long it has waited.
        where: the line of the user's code that it is at, if it does not wait.
        num_sent, num_received: messages so far, by peer.
        heard_waits: the wait numbers of the peers when it last heard of them.
        group_call: what it waits in, if it is no message of a step.
        group_calls: how many of these calls it has begun so far, by group.
        logs: the events of its microbatches.
        wants_answer: whether it asks for the receiver's situation.
        is_answer: whether it was asked.
    """

    stage: int
    step: int
    is_in_step: bool
    wait_number: int
    waits: tuple[TellingWait, ...]
    is_any_peer_enough: bool
    seconds: float
    where: str
    num_sent: Mapping[int, int] = field(default_factory=dict)
    num_received: Mapping[int, int] = field(default_factory=dict)
    heard_waits: Mapping[int, int] = field(default_factory=dict)
    group_call: GroupCall | None = None
    group_calls: Mapping[str, int] = field(default_factory=dict)
    logs: tuple[LogReport, ...] = ()
    wants_answer: bool = False
    is_answer: bool = False

    def to_bytes(self) -> bytes:
        """For a message."""
        return zlib.compress(json.dumps(asdict(self)).encode(), 1)

    @staticmethod
    def from_bytes(data: bytes) -> Situation:
        """What :meth:`to_bytes` gave."""
        fields: dict[str, Any] = json.loads(zlib.decompress(data))
        for name in ("num_sent", "num_received", "heard_waits"):  # by peer
            fields[name] = {int(peer): number for peer, number in fields[name].items()}
        fields["waits"] = tuple(TellingWait(**wait) for wait in fields["waits"])
        call = fields["group_call"]
        fields["group_call"] = call and GroupCall(**{**call, "stages": tuple(call["stages"])})
        fields["logs"] = tuple(
            LogReport(**{**log, "events": tuple(LoggedEvent(**event) for event in log["events"])})
            for log in fields["logs"]
        )
        return Situation(**fields)

    @property
    def waiting(self) -> str:
        """What it waits for first, in words."""
        return str(self.waits[0] if self.waits else self.group_call)

    def describe(self) -> str:
        """Where it stands, in words."""
        who = f"pp_rank {self.stage}"
        if self.wait_number:
            return f"{who} waits, too: {self.waiting}"
        if not self.is_in_step:
            return f"{who} is not in a step function (calls so far: {self.step + 1}), at {self.where}"
        last = [log.events[-1] for log in self.logs if log.events]
        latest = max(last, key=lambda event: event.time, default=None)
        after = "" if latest is None else f", after {latest}"
        return f"{who} is alive and in the step, at {self.where}{after}"


def divergence(own: Situation, other: Situation) -> str | None:
    """Why two stages do not run the same program, or None as long as they may. ``own`` was made after ``other`` came:
    what the other says of *its* wait may be over by now.
    """
    waits_for_other = own.wait_number != 0 and any(wait.source == other.stage for wait in own.waits)
    if own.step != other.step:
        if other.step > own.step and waits_for_other:
            return _left_behind(own, other, f"is in call {other.step + 1} already ({_place(other)})")
        return None
    theirs = {log.microbatch: log for log in other.logs}
    for mine in own.logs:
        log = theirs.get(mine.microbatch)
        if log is None:
            continue
        number = first_difference(mine, log)
        if number is not None:
            return (
                f"microbatch {mine.microbatch}: pp_rank {own.stage} took {_taken(own, mine, number)}, pp_rank "
                f"{other.stage} took {_taken(other, log, number)}: {_ADVICE}"
            )
    if own.is_in_step and waits_for_other and not other.is_in_step:
        return _left_behind(own, other, f"has finished that call ({_place(other)})")
    return None


def _left_behind(behind: Situation, ahead: Situation, what: str) -> str:
    return (
        f"pp_rank {behind.stage}, call {behind.step + 1} of a step function, {behind.waits[0]}: it will not come, "
        f"since pp_rank {ahead.stage} {what}: {_ADVICE}"
    )


def _place(situation: Situation) -> str:
    if situation.group_call is not None:
        return situation.group_call.line
    return situation.waits[0].line if situation.waits else situation.where


def _taken(situation: Situation, log: LogReport, number: int) -> str:
    """What a stage did as event ``number``, with the line."""
    event: LoggedEvent | None = log.event(number)
    if event is not None and number <= log.num_in_forward:
        return f"{event.line} (event {number}: {event.text})"
    if log.num_forward is not None and number > log.num_forward:
        last = log.event(log.num_forward)
        after = "no event" if last is None else f"{last.line} (event {last.number}: {last.text})"
        return f"{after} as its last event and was done"
    return f"{situation.where} (event {number} is too long ago to name)"


def circle(known: Mapping[int, Situation]) -> str | None:
    """Whether stages wait for each other and nothing is under way; then who waits for what. ``known``: the last word of
    each stage, by stage, one's own made just now.
    """
    stages = {stage for stage, situation in known.items() if situation.wait_number}
    num_before = -1
    while len(stages) != num_before:
        num_before = len(stages)
        stages = {stage for stage in stages if _needs_only(known[stage], stages, known)}
    if len(stages) < 2:
        return None
    for stage in stages:
        situation = known[stage]
        for other in stages - {stage}:
            if situation.heard_waits.get(other) != known[other].wait_number:
                return None
            if situation.num_received.get(other, 0) != known[other].num_sent.get(stage, 0):
                return None
    listed = "\n  ".join(f"pp_rank {stage}, {known[stage].waiting}" for stage in sorted(stages))
    return f"these stages wait for each other, and no message is under way:\n  {listed}\n{_ADVICE}"


def _needs_only(situation: Situation, stages: set[int], known: Mapping[int, Situation]) -> bool:
    call = situation.group_call
    if call is not None:  # it needs all, so one that will not come is enough
        return any(
            stage in stages and known[stage].waits and known[stage].group_calls.get(call.group, 0) < call.number
            for stage in call.stages
        )
    if situation.is_any_peer_enough and set(situation.num_sent) - stages:
        return False
    return all(wait.source in stages for wait in situation.waits)
