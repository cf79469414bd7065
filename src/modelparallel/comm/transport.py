"""Messages between the stages of one pipeline: named, never waited for by the sender, and with a name for every wait.

[Note: mailbox] Every message says what it is (step, kind, microbatch, event), and is put into the receiver's mailbox
when it arrives, by one listening thread for each peer. So receives are posted ahead of need, a send never stops the
sender's compute (gloo matches a send only when the receive is posted), the order in which a stage needs its messages
need not be the order in which they were sent, and a wait can end by a timeout without harm (a gloo receive that is
given up breaks the connection). A thread that listens also learns of a peer's end at once, whoever is waited for.

[Note: frames] gloo takes a message into a buffer that is longer than it, and aborts the process for one that is
shorter. So each message is a frame of a fixed maximal size that tells the length; what is small lies in the frame
itself, the rest follows in a message of its own, whose buffer is made when the frame has come.
"""

from __future__ import annotations

import struct
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from modelparallel.errors import CommunicationError, DivergenceError, WaitTimeoutError

_PACKAGE_DIRECTORIES = (str(Path(__file__).resolve().parents[1]), str(Path(torch.__file__).resolve().parent))
_MAX_FAILURE_TEXT = 4000
_HEADER = struct.Struct("<6q")
_FRAME_BYTES = 4096
_INLINE_BYTES = _FRAME_BYTES - _HEADER.size
_MAX_PENDING_SENDS = 8  # for each peer: what was sent before has surely arrived, and is let go
_TAG = 0
_FOREVER = timedelta(days=3650)  # an idle listener
_GOODBYE_SECONDS = 5.0


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


# Sent in the order of the program of their microbatch, with one count of events.
_IN_PROGRAM_ORDER = frozenset({MessageKind.ACTIVATIONS, MessageKind.ANNOUNCEMENT, MessageKind.VALUE})


@dataclass(frozen=True)
class MessageName:
    """The identity of a message within a step; equal at both ends or the programs have diverged."""

    kind: MessageKind
    microbatch: int
    event: int

    def __str__(self) -> str:
        return f"{self.kind.name.lower()} of microbatch {self.microbatch}, event {self.event}"

    def cannot_follow(self, other: MessageName) -> bool:
        """Whether a sender that has sent ``other`` has left out this message: both are of one microbatch, and the
        backward sends in the reverse order of the forward.
        """
        if self.microbatch != other.microbatch:
            return False
        if self.kind in _IN_PROGRAM_ORDER:
            return other.kind in _IN_PROGRAM_ORDER and other.event > self.event
        if self.kind is MessageKind.GRADIENTS:
            return other.kind is MessageKind.GRADIENTS and other.event < self.event
        return False


@dataclass(frozen=True)
class Message:
    """What arrived: ``payload`` are its bytes; ``presence`` has a bit for each tensor that is in them."""

    presence: int
    payload: torch.Tensor

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


def user_code_line() -> str:
    """Where in the user's script the calling thread stands, as ``file:line``."""
    frame = sys._getframe(1)
    while frame is not None:
        filename = frame.f_code.co_filename
        is_own = filename.startswith(_PACKAGE_DIRECTORIES) or filename.startswith("<")
        if not is_own and not filename.endswith("threading.py"):
            return f"{Path(filename).name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "unknown line"


class StageTransport(ABC):
    """Point-to-point messages among the stages of one pipeline.

    ``timeout_seconds`` bounds every wait. ``history`` is asked for the last events of a microbatch's program when a
    wait for a message of it fails.
    """

    def __init__(self, stage: int, num_stages: int, timeout_seconds: float) -> None:
        self.stage = stage
        self.num_stages = num_stages
        self.timeout_seconds = timeout_seconds
        self.history: Callable[[int], str] = lambda microbatch: ""
        self._step = 0
        self._arrived = threading.Condition()
        # By step, so that what a step that ended by an exception has left behind is never taken for a later one's.
        self._mailbox: dict[tuple[int, int, MessageName], Message] = {}
        self._failures: dict[tuple[int, int], str] = {}  # (peer, step) -> text
        self._gone: dict[int, str] = {}  # peers that have ended or cannot be reached
        self._has_seen_failure = False
        self._last_left = -1  # the last step whose plan some stage has left

    # Sending

    @abstractmethod
    def _post(self, peer: int, step: int, name: MessageName, presence: int, payload: torch.Tensor, what: str) -> None:
        """Send without waiting; ``payload`` is kept alive and must not change before :meth:`drain`."""

    def send(
        self, peer: int, name: MessageName, payload: torch.Tensor, description: str = "", *, presence: int = 0
    ) -> None:
        """Post the bytes ``payload`` (one-dimensional, uint8, on the CPU) to stage ``peer``. Returns at once.

        Nobody may write to ``payload`` before the end of the step.
        """
        self._post(peer, self._step, name, presence, payload, description)

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
            self._step = step
            for key in [key for key in self._mailbox if key[1] < step]:
                del self._mailbox[key]
            for failed in [failed for failed in self._failures if failed[1] < step]:
                del self._failures[failed]

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
        deadline = time.monotonic() + self.timeout_seconds
        with self._arrived:
            while not any((one.source, self._step, one.name) in self._mailbox for one in awaited):
                for one in awaited:
                    self._check_can_come(one)
                if or_leave and self.has_left:
                    return
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise self._timeout(awaited[0])
                self._arrived.wait(remaining)

    def _check_can_come(self, awaited: Awaited) -> None:
        failure = self._failures.get((awaited.source, self._step))
        if failure is not None:
            raise CommunicationError(
                f"{self._situation(awaited)}: the connection is gone, since the step of pp_rank "
                f"{awaited.source} has failed: {failure}"
            )
        for source, step, name in self._mailbox:
            if source == awaited.source and step == self._step and awaited.name.cannot_follow(name):
                raise DivergenceError(
                    f"pp_rank {self.stage} at {awaited.line or user_code_line()} expected {awaited.name} "
                    f"({awaited.description}) from pp_rank {source}, which sent {name}: the stages did not run the "
                    "same program. Does the step function branch on the rank, on time or on unseeded randomness?\n"
                    f"{self.history(awaited.name.microbatch)}"
                )
        reason = self._gone.get(awaited.source)
        if reason is not None:
            raise CommunicationError(
                f"{self._situation(awaited)}: the connection is gone ({reason}); the peer has probably failed, see its "
                f"message.\n{self.history(awaited.name.microbatch)}"
            )

    def _timeout(self, awaited: Awaited) -> WaitTimeoutError:
        return WaitTimeoutError(
            f"{self._situation(awaited)}: no answer within timeout_seconds={self.timeout_seconds:g}. Is that process "
            f"alive, and does it run the same program? Its own message says where it stands.\n"
            f"{self.history(awaited.name.microbatch)}"
        )

    def _situation(self, awaited: Awaited) -> str:
        return (
            f"pp_rank {self.stage}, microbatch {awaited.name.microbatch}: waiting to receive "
            f"{awaited.description or awaited.name} from pp_rank {awaited.source} ({awaited.line or user_code_line()})"
        )

    def deliver(self, peer: int, step: int, name: MessageName, message: Message) -> None:
        """A message has come; called by whoever listens."""
        with self._arrived:
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


@dataclass
class _PendingSend:
    works: list[dist.Work]
    tensors: list[torch.Tensor]  # they, and the works, must stay alive until the message has arrived
    description: str


class GlooTransport(StageTransport):
    """Between processes. ``global_ranks[i]`` is the global rank of stage ``i``; ``process_group`` is a gloo group that
    spans them and is used by nothing else.
    """

    def __init__(
        self, stage: int, global_ranks: Sequence[int], process_group: dist.ProcessGroup, timeout_seconds: float
    ) -> None:
        super().__init__(stage, len(global_ranks), timeout_seconds)
        self._global_ranks = tuple(global_ranks)
        self._process_group = process_group
        self._pending: dict[int, deque[_PendingSend]] = {peer: deque() for peer in self.peers()}
        self._is_closing = False
        self._listeners = [
            threading.Thread(target=self._listen, args=(peer,), name=f"listen-to-stage-{peer}", daemon=True)
            for peer in self.peers()
        ]
        for listener in self._listeners:
            listener.start()

    def _listen(self, peer: int) -> None:
        global_rank = self._global_ranks[peer]
        frame = torch.empty(_FRAME_BYTES, dtype=torch.uint8)
        header: Any = frame.numpy()
        try:
            while True:
                self._process_group.recv([frame], global_rank, _TAG).wait(_FOREVER)
                kind, step, microbatch, event, presence, size = _HEADER.unpack_from(header)
                if kind == MessageKind.GOODBYE:
                    self.lose(peer, "its process has ended")
                    return
                if size <= _INLINE_BYTES:
                    payload = frame[_HEADER.size : _HEADER.size + size].clone()
                else:
                    payload = torch.empty(size, dtype=torch.uint8)
                    self._process_group.recv([payload], global_rank, _TAG).wait(_FOREVER)
                name = MessageName(MessageKind(kind), microbatch, event)
                self.deliver(peer, step, name, Message(presence, payload))
        except RuntimeError as error:
            if not self._is_closing:
                self.lose(peer, str(error).splitlines()[0])

    def _post(self, peer: int, step: int, name: MessageName, presence: int, payload: torch.Tensor, what: str) -> None:
        size = payload.numel()
        header = _HEADER.pack(name.kind, step, name.microbatch, name.event, presence, size)
        is_inline = size <= _INLINE_BYTES
        frame = torch.frombuffer(
            bytearray(header + payload.numpy().tobytes() if is_inline else header), dtype=torch.uint8
        )
        tensors = [frame] if is_inline else [frame, payload]
        what = f"send {what or name} to pp_rank {peer}"
        try:
            works = [self._process_group.send([tensor], self._global_ranks[peer], _TAG) for tensor in tensors]
        except RuntimeError as error:
            raise self._send_error(what, error) from error
        pending = self._pending[peer]
        pending.append(_PendingSend(works, tensors, what))
        if len(pending) > _MAX_PENDING_SENDS:
            self._finish(pending.popleft())

    def drain(self) -> None:
        for pending in self._pending.values():
            while pending:
                self._finish(pending.popleft())

    def _finish(self, send: _PendingSend) -> None:
        # The peer's listener takes every message as it comes, so this waits for the network only.
        for work in send.works:
            try:
                work.wait(timedelta(seconds=self.timeout_seconds))
            except RuntimeError as error:
                raise self._send_error(send.description, error) from error

    def _send_error(self, what: str, error: RuntimeError) -> CommunicationError:
        text = f"pp_rank {self.stage}: waiting to {what} ({user_code_line()})"
        if "imed out" in str(error) or "imeout" in str(error):
            return WaitTimeoutError(f"{text}: not taken within timeout_seconds={self.timeout_seconds:g}")
        return CommunicationError(
            f"{text}: the connection is gone ({str(error).splitlines()[0]}); the peer has probably failed, see its "
            "message."
        )

    def close(self) -> None:
        """Say goodbye to the peers and let the listeners end. Local; waits a few seconds at most."""
        if self._is_closing:
            return
        self._is_closing = True
        farewell = _HEADER.pack(MessageKind.GOODBYE, 0, 0, 0, 0, 0)
        works = []
        for peer in self.peers():
            if peer in self._gone:
                continue
            frame = torch.frombuffer(bytearray(farewell), dtype=torch.uint8)
            with suppress(RuntimeError):  # the peer has gone, too
                works.append((self._process_group.send([frame], self._global_ranks[peer], _TAG), frame))
        for work, _ in works:
            with suppress(RuntimeError):
                work.wait(timedelta(seconds=_GOODBYE_SECONDS))
        deadline = time.monotonic() + _GOODBYE_SECONDS
        for listener in self._listeners:  # most peers end at the same time as this process
            listener.join(max(0.0, deadline - time.monotonic()) if listener.is_alive() else 0.0)
        if any(listener.is_alive() for listener in self._listeners):
            with suppress(RuntimeError):
                self._process_group.abort()
            for listener in self._listeners:
                listener.join(1.0)


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

    def _post(self, peer: int, step: int, name: MessageName, presence: int, payload: torch.Tensor, what: str) -> None:
        self._all[peer].deliver(self.stage, step, name, Message(presence, payload.clone()))

    def drain(self) -> None:
        """Nothing is ever under way."""

    def close(self) -> None:
        for peer in self.peers():
            self._all[peer].lose(self.stage, "its stage has ended")
