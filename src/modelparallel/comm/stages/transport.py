"""Messages between the stages of one pipeline: named, never waited for by the sender, and with a name for every wait.

[Note: mailbox] Every message says what it is (step, kind, microbatch, event), and is put into the receiver's mailbox
when it arrives, by one listening thread for each peer. So receives are posted ahead of need, a send never stops the
sender's compute (gloo matches a send only when the receive is posted), the order in which a stage needs its messages
need not be the order in which they were sent, and a wait can end by a timeout without harm (a gloo receive that is
given up breaks the connection). A thread that listens also learns of a peer's end at once, whoever is waited for.

[Note: telling] A stage that has waited for a second tells those that it waits for what its programs have done, and they
answer, each by its listening thread, whatever its main thread is busy with; the others learn that it waits. So stages
that will never meet are found out within seconds (diagnosis.py says how), and the report of a timeout says where the
peers stand. Nothing of this happens in a step that goes on.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import torch

from modelparallel.comm.event_log import EventLog, line_of_work, user_code_line
from modelparallel.comm.stages.channels import PairChannels
from modelparallel.comm.stages.diagnosis import GroupCall, Situation, TellingWait, circle, divergence, place_of
from modelparallel.errors import CommunicationError, DivergenceError, WaitTimeoutError

logger = logging.getLogger("modelparallel")

_MAX_FAILURE_TEXT = 4000
#: A stage that has waited so long tells the others; then after twice the time, and so on.
_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 10.0
_LAST_WORDS = 0.3  # before the time is up, the peers are asked once more
#: How long a stage that knows that something is wrong waits for an answer that says what.
_ANSWER_SECONDS = 2.0
_MAX_TOLD_EVENTS = 512


class MessageKind(IntEnum):
    """What a message carries; sender and receiver must agree."""

    ACTIVATIONS = 1
    GRADIENTS = 2
    ANNOUNCEMENT = 3
    VALUE = 4
    INPUTS = 5
    OUTPUTS = 6
    PUSH = 7
    PLAN = 8
    FAILURE = 9  # the sender's step has ended by an exception; the message holds its text
    GOODBYE = 10  # the sender's process ends
    LEAVE = 11  # the sender does not follow the plan of the step any more
    STATUS = 12  # what the sender waits for, and what its programs have done


# Sent in the order of the program of their microbatch, with one count of events.
_IN_PROGRAM_ORDER = frozenset({MessageKind.ACTIVATIONS, MessageKind.ANNOUNCEMENT, MessageKind.VALUE})


@dataclass(frozen=True)
class MessageName:
    """The identity of a message within a step; equal at both ends or the programs have diverged.

    ``check``: of what the event is, so that one event is not taken for another of the same number; see `check_of`.
    """

    kind: MessageKind
    microbatch: int
    event: int
    check: int = 0

    def __str__(self) -> str:
        return f"{self.kind.name.lower()} of microbatch {self.microbatch}, event {self.event}"

    def cannot_follow(self, other: MessageName) -> bool:
        """Whether a sender that has sent ``other`` has left out this message: both are of one microbatch, and the
        backward sends in the reverse order of the forward.
        """
        if self.microbatch != other.microbatch:
            return False
        if self.kind in _IN_PROGRAM_ORDER:
            return other.kind in _IN_PROGRAM_ORDER and (
                other.event > self.event or (other.event == self.event and other != self)
            )
        if self.kind is MessageKind.GRADIENTS:
            return other.kind is MessageKind.GRADIENTS and other.event < self.event
        return False


@dataclass(frozen=True)
class Message:
    """What arrived: ``payload`` are its bytes; ``presence`` has a bit for each tensor that is in them."""

    presence: int
    payload: torch.Tensor
    #: Called before the payload is used; None: it is there.
    make_ready: Callable[[], object] | None = None

    def to_bytes(self) -> bytes:
        """The payload of a message of :meth:`StageTransport.send_object`."""
        return self.payload.numpy().tobytes()


@dataclass(frozen=True)
class Awaited:
    """A message that a stage needs to go on: from whom, which, and in words (with the line of the user's code)."""

    source: int
    name: MessageName
    description: str
    line: str = ""


@dataclass
class _TransportWait:
    """A wait of the main thread that is under way."""

    number: int
    awaited: tuple[Awaited, ...]
    or_leave: bool
    since: float
    deadline: float
    tell_at: float  # when the peers are told of it next
    pause: float = _FIRST_PAUSE
    suspected_at: float | None = None  # since when there is a sign that the message will not come

    def note_told(self, now: float) -> None:
        """The peers were told; asks them once more before the time is up."""
        self.tell_at, self.pause = now + self.pause, min(2 * self.pause, _LONGEST_PAUSE)
        last = self.deadline - _LAST_WORDS
        if now < last < self.tell_at:
            self.tell_at = last


class StageTransport(ABC):
    """Point-to-point messages among the stages of one pipeline.

    ``timeout_seconds`` bounds every wait. ``logs`` are the events of the microbatches of the step that is under way, or
    was last, for messages about waits that fail.
    """

    def __init__(self, stage: int, num_stages: int, timeout_seconds: float) -> None:
        self.stage = stage
        self.num_stages = num_stages
        self.timeout_seconds = timeout_seconds
        self.logs: Sequence[EventLog] = ()
        #: By which tensors on a device go to the other stages, if there are any.
        self.channels: PairChannels | None = None
        #: What the step waited for when it failed, and for how many seconds it had.
        self.failed_wait: tuple[tuple[TellingWait, ...], float] | None = None
        self._step = -1
        self._is_in_step = False
        self._arrived = threading.Condition()
        # By step, so that what a step that ended by an exception has left behind is never taken for a later one's.
        self._mailbox: dict[tuple[int, int, MessageName], Message] = {}
        self._failures: dict[tuple[int, int], str] = {}  # (peer, step) -> text
        self._gone: dict[int, str] = {}  # peers that have ended or cannot be reached
        self._has_seen_failure = False
        #: How long this stage has waited for messages, all in all.
        self.seconds_waited = 0.0
        self._last_left = -2  # none; the last step whose plan some stage has left
        self._main_thread = threading.get_ident()
        self._waiting: _TransportWait | None = None
        self._num_waits = 0
        self._num_sent = dict.fromkeys(self.peers(), 0)
        self._num_received = dict.fromkeys(self.peers(), 0)
        self._asked: set[int] = set()  # who has not answered yet
        self._heard: dict[int, tuple[Situation, float]] = {}  # the last word of each peer, and when it came
        self._group_call: tuple[int, GroupCall] | None = None  # the collective call between steps that is under way
        self._group_calls: dict[str, int] = {}
        self._divergence: tuple[int, str] | None = None  # (step, text), once it is proved

    # Sending

    @abstractmethod
    def _post(
        self,
        peer: int,
        step: int,
        name: MessageName,
        presence: int,
        payload: torch.Tensor,
        what: str,
        *,
        may_wait: bool = True,
        by_channel: bool = False,
    ) -> None:
        """Send without waiting; ``payload`` is kept alive and must not change before :meth:`drain`.

        ``may_wait``: for the network, if much is under way; not in a thread that listens. ``by_channel``: see
        :meth:`send`.
        """

    def send(
        self,
        peer: int,
        name: MessageName,
        payload: torch.Tensor,
        description: str = "",
        *,
        presence: int = 0,
        by_channel: bool = False,
    ) -> None:
        """Post the bytes ``payload`` (one-dimensional, uint8) to stage ``peer``. Returns at once.

        Nobody may write to ``payload`` before the end of the step. It is on the CPU, or, ``by_channel``, on the device
        of the channel to that peer, and then it arrives on the peer's device.
        """
        self._num_sent[peer] += 1
        self._post(peer, self._step, name, presence, payload, description, by_channel=by_channel)

    def open_channels(self, pairs: Iterable[tuple[int, int]]) -> None:
        """A plan moves values between these (source, destination): prepare for that. Collective over the pipeline."""
        if self.channels is not None:
            self.channels.open(pairs)

    def channel_device(self, peer: int) -> torch.device | None:
        """From where tensors go to stage ``peer`` without the host; None: all go through the host."""
        channels = self.channels
        return channels.device if channels is not None and channels.is_open_to(peer) else None

    def send_object(self, peer: int, name: MessageName, payload: bytes, description: str = "") -> None:
        """Post pickled bytes to stage ``peer``. Returns at once."""
        self.send(peer, name, torch.frombuffer(bytearray(payload), dtype=torch.uint8), description)

    @abstractmethod
    def drain(self) -> None:
        """Wait until every posted message has arrived; call it at the end of a step."""

    def abandon(self, error: BaseException) -> None:
        """After an error: tell the peers. One learns of it when it next waits for a message of this stage; if it has
        come to the same error by itself it never asks.
        """
        self._has_seen_failure = True
        text = f"{type(error).__name__}: {error}"[:_MAX_FAILURE_TEXT].encode()
        name = MessageName(MessageKind.FAILURE, 0, 0)
        for peer in self.peers():
            with suppress(CommunicationError):  # that peer is gone already
                self.send_object(peer, name, text, "the failure of this stage")

    @property
    def has_left(self) -> bool:
        """Whether this stage or a peer has left the plan of this step."""
        return self._last_left == self._step

    def leave_plan(self) -> None:
        """Leave the plan of this step and tell the peers; the first time only."""
        if self.has_left:
            return
        self._last_left = self._step
        for peer in self.peers():
            self.send(peer, MessageName(MessageKind.LEAVE, 0, 0), torch.empty(0, dtype=torch.uint8))

    @abstractmethod
    def close(self) -> None:
        """Say goodbye; no message after that. Local."""

    # Receiving

    def begin_step(self, step: int) -> None:
        """Messages from now on belong to step call ``step``; what older ones have left in the mailbox is dropped."""
        with self._arrived:
            self._step, self._is_in_step, self.logs, self.failed_wait = step, True, (), None
            self._main_thread = threading.get_ident()
            for key in [key for key in self._mailbox if key[1] < step]:
                del self._mailbox[key]
            for failed in [failed for failed in self._failures if failed[1] < step]:
                del self._failures[failed]

    def end_step(self) -> None:
        """The call of the step function is over: nothing of it will be sent any more."""
        self._is_in_step = False

    def take_failure_seen(self) -> bool:
        """Whether a step has failed, here or at a peer, since this was last asked."""
        with self._arrived:
            seen, self._has_seen_failure = self._has_seen_failure, False
        return seen

    def has(self, source: int, name: MessageName) -> bool:
        """Whether the message is here."""
        return (source, self._step, name) in self._mailbox

    def receive(self, source: int, name: MessageName, description: str = "", line: str = "") -> Message:
        """Wait for a message and take it."""
        key = (source, self._step, name)
        if key not in self._mailbox:
            self.wait_any([Awaited(source, name, description, line)])
        with self._arrived:
            return self._mailbox.pop(key)

    def receive_object(self, source: int, name: MessageName, description: str = "") -> bytes:
        """Wait for a message of :meth:`send_object` and take its bytes."""
        return self.receive(source, name, description).to_bytes()

    def wait_any(self, awaited: Sequence[Awaited], *, or_leave: bool = False) -> None:
        """Wait until one of the messages is here, or (``or_leave``) until a stage has left the plan.

        Raises CommunicationError if a sender of one of them has failed or is gone, DivergenceError if one will never
        come, WaitTimeoutError after ``timeout_seconds``.
        """
        now = time.monotonic()
        with self._arrived:
            if self._is_one_here(awaited):
                return
            self._num_waits += 1
            named = tuple(one if one.line else replace(one, line=user_code_line()) for one in awaited)
            first_tell = now + min(_FIRST_PAUSE, 0.5 * self.timeout_seconds)
            waiting = _TransportWait(self._num_waits, named, or_leave, now, now + self.timeout_seconds, first_tell)
            self._waiting = waiting
        try:
            while not self._is_over(waiting):
                self._tell_of(waiting)
                waiting.note_told(time.monotonic())
        except BaseException:
            self.failed_wait = tuple(self._told(one) for one in waiting.awaited), time.monotonic() - now
            raise
        finally:
            with self._arrived:
                self._waiting = None
            self.seconds_waited += time.monotonic() - now

    def _is_one_here(self, awaited: Sequence[Awaited]) -> bool:
        return any((one.source, self._step, one.name) in self._mailbox for one in awaited)

    def _is_over(self, waiting: _TransportWait) -> bool:
        """Wait; False if the peers must be told before going on."""
        with self._arrived:
            while not self._is_one_here(waiting.awaited):
                self._check_can_come(waiting)
                if waiting.or_leave and self.has_left:
                    return True
                now = time.monotonic()
                if now >= waiting.deadline:
                    raise self._timeout(waiting)
                if now >= waiting.tell_at:
                    return False
                self._arrived.wait(min(waiting.tell_at, waiting.deadline) - now)
            return True

    def _check_can_come(self, waiting: _TransportWait) -> None:
        if self._divergence is not None and self._divergence[0] == self._step:
            raise DivergenceError(f"{self._divergence[1]}\n{self._history(waiting.awaited[0].name.microbatch)}")
        for awaited in waiting.awaited:
            failure = self._failures.get((awaited.source, self._step))
            if failure is not None:
                kind = DivergenceError if failure.startswith("DivergenceError") else CommunicationError
                raise kind(
                    f"{self._situation(awaited)}: the connection is gone, since the step of pp_rank "
                    f"{awaited.source} has failed: {failure}\n{self._history(awaited.name.microbatch)}"
                )
            self._check_not_left_out(waiting, awaited)
            reason = self._gone.get(awaited.source)
            if reason is not None:
                raise CommunicationError(
                    f"{self._situation(awaited)}: the connection is gone ({reason}); the peer has probably failed, see "
                    f"its message.\n{self._history(awaited.name.microbatch)}"
                )

    def _check_not_left_out(self, waiting: _TransportWait, awaited: Awaited) -> None:
        for source, step, name in self._mailbox:
            if source != awaited.source or step != self._step or not awaited.name.cannot_follow(name):
                continue
            now = time.monotonic()
            if waiting.suspected_at is None:  # the peer's answer will say where the two went apart
                waiting.suspected_at = waiting.tell_at = now
            if now < waiting.suspected_at + _ANSWER_SECONDS and source not in self._gone:
                waiting.tell_at = min(waiting.tell_at, waiting.suspected_at + _ANSWER_SECONDS)
                return
            raise DivergenceError(
                f"pp_rank {self.stage} at {self._line(awaited)} expected {awaited.name} ({awaited.description}) from "
                f"pp_rank {source}, which sent {name}: the stages did not run the same program. Does the step function "
                f"branch on the rank, on time or on unseeded randomness?\n{self._history(awaited.name.microbatch)}"
            )

    def _timeout(self, waiting: _TransportWait) -> WaitTimeoutError:
        awaited = waiting.awaited[0]
        lines = [self._last_words(peer) for peer in sorted({one.source for one in waiting.awaited})]
        others = "".join(
            f"\nor for {one.description or one.name} from pp_rank {one.source}" for one in waiting.awaited[1:]
        )
        return WaitTimeoutError(
            f"{self._situation(awaited)}: no answer within timeout_seconds={self.timeout_seconds:g}{others}\n"
            + "\n".join(lines)
            + f"\n{self._history(awaited.name.microbatch)}"
        )

    def words_of_peers(self) -> dict[int, str]:
        """What the others said last about where they stand, by stage."""
        return {peer: self._last_words(peer) for peer in self._heard}

    def _last_words(self, peer: int) -> str:
        heard = self._heard.get(peer)
        if heard is None:
            return (
                f"pp_rank {peer} has not said anything: its process is stopped, or its interpreter is held by one long "
                "operation; its log says how far it came"
            )
        situation, moment = heard
        return f"{situation.describe()} ({time.monotonic() - moment:.1f} s ago)"

    def _situation(self, awaited: Awaited) -> str:
        return (
            f"pp_rank {self.stage}, {place_of(awaited.name.microbatch)}: waiting to receive "
            f"{awaited.description or awaited.name} from pp_rank {awaited.source} ({self._line(awaited)})"
        )

    def _line(self, awaited: Awaited) -> str:
        log = self._log_of(awaited.name.microbatch)
        if awaited.name.kind is MessageKind.GRADIENTS and log is not None:
            event = log.report().event(awaited.name.event)
            if event is not None:
                return f"in the backward of {event.line}"
        return awaited.line or user_code_line()

    def _log_of(self, microbatch: int) -> EventLog | None:
        return self.logs[microbatch] if 0 <= microbatch < len(self.logs) else None

    def _history(self, microbatch: int) -> str:
        log = self._log_of(microbatch)
        return "no events yet in this step" if log is None else log.last(self.stage)

    # Telling: see the note at the top

    @contextmanager
    def in_group_call(self, what: str, group: str, stages: Sequence[int]) -> Iterator[None]:
        """While the caller waits in a collective call outside the steps (``what``) for the other members of ``group``,
        of which ``stages`` are stages of this pipeline.
        """
        with self._arrived:
            self._num_waits += 1
            number = self._group_calls[group] = self._group_calls.get(group, 0) + 1
            self._group_call = self._num_waits, GroupCall(what, user_code_line(), group, number, tuple(stages))
        try:
            yield
        finally:
            self._group_call = None

    def situation(self) -> Situation:
        """Where this stage stands; may be called from any thread."""
        with self._arrived:
            waiting = self._waiting
            if waiting is not None and self._is_one_here(waiting.awaited):
                waiting = None
            number, group_call = self._group_call or (0, None)
            logs = self.logs
            told = max(_MAX_TOLD_EVENTS // max(len(logs), 1), 32)
            return Situation(
                stage=self.stage,
                step=self._step,
                is_in_step=self._is_in_step,
                wait_number=number if waiting is None else waiting.number,
                waits=() if waiting is None else tuple(self._told(one) for one in waiting.awaited),
                is_any_peer_enough=waiting is not None and waiting.or_leave,
                seconds=0.0 if waiting is None else time.monotonic() - waiting.since,
                where="" if waiting is not None else line_of_work(self._main_thread),
                num_sent=dict(self._num_sent),
                num_received=dict(self._num_received),
                heard_waits={peer: heard.wait_number for peer, (heard, _) in self._heard.items()},
                group_call=group_call,
                group_calls=dict(self._group_calls),
                logs=tuple(log.report(told) for log in logs),
            )

    def _told(self, awaited: Awaited) -> TellingWait:
        what = awaited.description or str(awaited.name)
        return TellingWait(awaited.source, awaited.name.microbatch, what, self._line(awaited))

    def _tell_of(self, waiting: _TransportWait) -> None:
        """Ask those that the messages are to come from, and let the others know that this stage waits."""
        situation = self.situation()
        sources = {one.source for one in waiting.awaited}
        # One question at a time: a peer that has not answered yet has enough to do.
        asked = sources - self._asked
        self._asked |= asked
        self._tell(asked, replace(situation, wants_answer=True))
        self._tell(set(self.peers()) - sources, replace(situation, logs=()))

    def _tell(self, peers: Iterable[int], situation: Situation) -> None:
        payload = torch.frombuffer(bytearray(situation.to_bytes()), dtype=torch.uint8)
        name = MessageName(MessageKind.STATUS, 0, 0)
        for peer in peers:
            if peer not in self._gone:
                with suppress(CommunicationError):  # it goes just now; that is found out elsewhere
                    self._post(peer, self._step, name, 0, payload, "what it waits for", may_wait=False)

    def _hear(self, peer: int, message: Message) -> None:
        """A peer says where it stands: what follows from it?"""
        try:
            heard = Situation.from_bytes(message.to_bytes())
            with self._arrived:
                self._heard[peer] = (heard, time.monotonic())
                known = {stage: told for stage, (told, _) in self._heard.items()}
                if heard.is_answer:
                    self._asked.discard(peer)
            own = self.situation()
            reason = divergence(own, heard)
            if reason is None and own.wait_number:
                reason = circle({**known, self.stage: own})
            if reason is not None:
                with self._arrived:
                    self._divergence = (own.step, reason)
                    self._arrived.notify_all()
            if heard.wants_answer:
                self._tell([peer], replace(own, is_answer=True))
        except Exception:  # what is only there to explain failures must not be one
            logger.warning("pp_rank %d could not tell what pp_rank %d waits for", self.stage, peer, exc_info=True)

    def deliver(self, peer: int, step: int, name: MessageName, message: Message) -> None:
        """A message has come; called by whoever listens."""
        if name.kind is MessageKind.STATUS:
            self._hear(peer, message)
            return
        with self._arrived:
            self._num_received[peer] += 1
            if name.kind is MessageKind.FAILURE:
                self._failures[peer, step] = message.to_bytes().decode(errors="replace")
                self._has_seen_failure = True
            elif name.kind is MessageKind.LEAVE:
                self._last_left = max(self._last_left, step)
            elif step >= self._step:
                self._mailbox[peer, step, name] = message
            self._arrived.notify_all()

    def lose(self, peer: int, reason: str) -> None:
        """No message will come from ``peer`` any more; called by whoever listens."""
        with self._arrived:
            self._gone[peer] = reason
            self._arrived.notify_all()

    def peers(self) -> list[int]:
        """All other stages."""
        return [stage for stage in range(self.num_stages) if stage != self.stage]


class LocalTransport(StageTransport):
    """Between stages that are threads of one process, for tests of what is above the transport."""

    @classmethod
    def make_all(cls, num_stages: int, timeout_seconds: float = 30.0) -> list[LocalTransport]:
        """The connected transports of all stages."""
        made = [cls(stage, num_stages, timeout_seconds) for stage in range(num_stages)]
        for transport in made:
            transport._all = made
        return made

    _all: Sequence[LocalTransport] = ()

    def _post(
        self, peer: int, step: int, name: MessageName, presence: int, payload: torch.Tensor, *how: Any, **more: Any
    ) -> None:
        self._all[peer].deliver(self.stage, step, name, Message(presence, payload.clone()))

    def drain(self) -> None:
        """Nothing is ever under way."""

    def close(self) -> None:
        for peer in self.peers():
            self._all[peer].lose(self.stage, "its stage has ended")
