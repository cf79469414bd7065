"""Messages between the stages of one pipeline, in program order, with a name for every wait.

[Note: why headers] A gloo receive into a buffer that is too short aborts the process, and two programs that went apart
would exchange tensors that happen to fit. So each message starts with a header of fixed size that says what it is
(kind, microbatch, event) and how long its parts are; the receiver compares it with what it expects before it receives
anything else. Sends are posted and waited for at the end of the step: gloo matches a send only when the receive is
posted, so a blocking send would stop the sender's compute.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from enum import IntEnum
from pathlib import Path

import torch
import torch.distributed as dist

from modelparallel.errors import CommunicationError, DivergenceError, WaitTimeoutError

_PACKAGE_DIRECTORIES = (str(Path(__file__).resolve().parents[1]), str(Path(torch.__file__).resolve().parent))
_TAGS_PER_STEP = 4
_TAGS = (0, 1)  # in program order; pushed values
_MAX_FAILURE_TEXT = 4000
_MAX_TENSORS = 48  # presence flags travel in one int64


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


@dataclass(frozen=True)
class MessageName:
    """The identity of a message within a step; equal at both ends or the programs have diverged."""

    kind: MessageKind
    microbatch: int
    event: int

    def __str__(self) -> str:
        return f"{self.kind.name.lower()} of microbatch {self.microbatch}, event {self.event}"


@dataclass
class _PendingSend:
    works: list[dist.Work]
    tensors: list[torch.Tensor]  # must stay alive until the works are done
    description: str


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether a tensor of this shape and stride fills its storage without gaps or overlaps, in some order of its
    dimensions.
    """
    expected = 1
    for length, step in sorted(
        ((n, s) for n, s in zip(shape, stride, strict=True) if n != 1), key=lambda pair: pair[1]
    ):
        if length == 0:
            return True
        if step != expected:
            return False
        expected *= length
    return True


def user_code_line() -> str:
    """Where in the user's script the program stands, as ``file:line``; for error messages only (it walks the stack)."""
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(_PACKAGE_DIRECTORIES) and not frame.filename.startswith("<"):
            return f"{Path(frame.filename).name}:{frame.lineno}"
    return "unknown line"


@dataclass
class StageTransport:
    """Point-to-point messages among the stages of the caller's PP_GROUP.

    ``global_ranks[i]`` is the global rank of stage ``i``; ``process_group`` is a gloo group that spans them;
    ``timeout_seconds`` bounds every wait. ``history`` is asked for the last events of the program when a wait fails.
    """

    stage: int
    global_ranks: tuple[int, ...]
    process_group: dist.ProcessGroup
    timeout_seconds: float
    device: torch.device
    history: Callable[[], str] = lambda: ""
    _pending: list[_PendingSend] = field(default_factory=list)
    _abandoned: list[_PendingSend] = field(default_factory=list)
    _first_tag: int = 0

    def begin_step(self, step: int) -> None:
        """Messages from now on belong to step call ``step``, and meet only those of the same one.

        Whatever a step that ended by an exception has left under way can so never be taken for a message of a later
        one.
        """
        self._first_tag = _TAGS_PER_STEP * (step % (2**31 // _TAGS_PER_STEP))

    def send_tensors(
        self,
        peer: int,
        name: MessageName,
        tensors: Sequence[torch.Tensor | None],
        description: str = "",
        tag: int = 0,
        *,
        is_stable: Sequence[bool] | None = None,
    ) -> None:
        """Post a message of tensors to stage ``peer``; None marks an absent tensor. Returns at once.

        ``is_stable``: which tensors nobody writes to before the end of the step; the others are copied, since they
        leave later.
        """
        flats = [None if tensor is None else tensor.detach().cpu().contiguous() for tensor in tensors]
        for index, (flat, tensor) in enumerate(zip(flats, tensors, strict=True)):
            if flat is None or tensor is None or (is_stable is not None and is_stable[index]):
                continue
            if flat.data_ptr() == tensor.data_ptr():
                flats[index] = flat.clone()
        presence = sum(1 << index for index, flat in enumerate(flats) if flat is not None)
        sizes = sum(flat.numel() * flat.element_size() for flat in flats if flat is not None)
        self._post(
            peer, name, presence, sizes, [flat for flat in flats if flat is not None and flat.numel()], description, tag
        )

    def receive_tensors(
        self, peer: int, name: MessageName, buffers: Sequence[torch.Tensor], description: str = "", tag: int = 0
    ) -> list[torch.Tensor | None]:
        """Receive a message of tensors from stage ``peer`` into ``buffers`` (contiguous, on the CPU); absent ones come
        back as None.
        """
        presence, size = self._receive_header(peer, name, description, tag)
        expected = sum(
            buffer.numel() * buffer.element_size() for index, buffer in enumerate(buffers) if presence >> index & 1
        )
        if size != expected:
            raise DivergenceError(
                f"pp_rank {self.stage}: {name} ({description}) from pp_rank {peer} has {size} bytes, expected "
                f"{expected}: the stages disagree about its shapes. Do all ranks run the same program on the same "
                "inputs?"
            )
        received: list[torch.Tensor | None] = []
        for index, buffer in enumerate(buffers):
            if not presence >> index & 1:
                received.append(None)
                continue
            if buffer.numel():
                flat = buffer.as_strided((buffer.numel(),), (1,))
                self._wait(self._receive(peer, flat, tag), f"receive {description or name} from pp_rank {peer}", name)
            received.append(buffer)
        return received

    def send_object(self, peer: int, name: MessageName, payload: bytes, description: str = "", tag: int = 0) -> None:
        """Post pickled bytes to stage ``peer``. Returns at once."""
        data = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        self._post(peer, name, 0, len(payload), [data], description, tag)

    def receive_object(self, peer: int, name: MessageName, description: str = "", tag: int = 0) -> bytes:
        """Receive pickled bytes from stage ``peer``."""
        _, size = self._receive_header(peer, name, description, tag)
        data = torch.empty(size, dtype=torch.uint8)
        self._wait(self._receive(peer, data, tag), f"receive {description or name} from pp_rank {peer}", name)
        return data.numpy().tobytes()

    def peers(self) -> list[int]:
        """All other stages."""
        return [stage for stage in range(len(self.global_ranks)) if stage != self.stage]

    def drain(self) -> None:
        """Wait until every posted send has been received; call it at the end of a step."""
        pending, self._pending = self._pending, []
        for send in pending:
            for work in send.works:
                self._wait(work, send.description, None)
        self._abandoned = []  # the peers have come through a whole step, and do not wait for older messages any more

    def abandon(self, error: BaseException) -> None:
        """After an error: tell the peers, and wait for no posted send, but let the peers receive them.

        A peer learns of it when it next waits for a message of this stage. If it has come to the same error by itself
        it never asks.
        """
        text = f"{type(error).__name__}: {error}"[:_MAX_FAILURE_TEXT].encode()
        name = MessageName(MessageKind.FAILURE, 0, 0)
        for peer in self.peers():
            for tag in _TAGS:
                try:
                    self.send_object(peer, name, text, "the failure of this stage", tag)
                except CommunicationError:
                    break  # that peer is gone already
        self._abandoned += self._pending
        self._pending = []

    def _post(
        self,
        peer: int,
        name: MessageName,
        presence: int,
        size: int,
        parts: list[torch.Tensor],
        description: str,
        tag: int,
    ) -> None:
        header = torch.tensor([name.kind, name.microbatch, name.event, presence, size], dtype=torch.int64)
        messages = [header, *parts]
        global_rank = self.global_ranks[peer]
        try:
            works = [self.process_group.send([message], global_rank, self._first_tag + tag) for message in messages]
        except RuntimeError as error:
            raise self._failure(f"send {description or name} to pp_rank {peer}", name, error) from error
        self._pending.append(_PendingSend(works, messages, f"send {description or name} to pp_rank {peer}"))

    def _receive(self, peer: int, buffer: torch.Tensor, tag: int) -> dist.Work:
        return self.process_group.recv([buffer], self.global_ranks[peer], self._first_tag + tag)

    def _receive_header(self, peer: int, name: MessageName, description: str, tag: int) -> tuple[int, int]:
        header = torch.empty(5, dtype=torch.int64)
        what = f"receive {description or name} from pp_rank {peer}"
        try:
            work = self._receive(peer, header, tag)
        except RuntimeError as error:
            raise self._failure(what, name, error) from error
        self._wait(work, what, name)
        kind, microbatch, event, presence, size = header.tolist()
        found = MessageName(MessageKind(kind), microbatch, event)
        if found.kind is MessageKind.FAILURE:
            data = torch.empty(size, dtype=torch.uint8)
            self._wait(self._receive(peer, data, tag), what, name)
            raise CommunicationError(
                f"{self._situation(what, name)}: the connection is gone, since the step of pp_rank "
                f"{peer} has failed: {data.numpy().tobytes().decode(errors='replace')}"
            )
        if found != name:
            raise DivergenceError(
                f"pp_rank {self.stage} at {user_code_line()} expected {name} ({description}) from pp_rank {peer}, "
                f"which sent {found}: the stages did not run the same program. Does the step function branch on the "
                f"rank, on time or on unseeded randomness?\n{self.history()}"
            )
        return presence, size

    def _wait(self, work: dist.Work, what: str, name: MessageName | None) -> None:
        try:
            work.wait(timedelta(seconds=self.timeout_seconds))
        except RuntimeError as error:
            raise self._failure(what, name, error) from error

    def _failure(self, what: str, name: MessageName | None, error: RuntimeError) -> CommunicationError:
        text = self._situation(what, name)
        if "imed out" in str(error) or "imeout" in str(error):
            return WaitTimeoutError(
                f"{text}: no answer within timeout_seconds={self.timeout_seconds:g}. Is that process alive, and does "
                f"it run the same program? Its own message says where it stands.\n{self.history()}"
            )
        return CommunicationError(
            f"{text}: the connection is gone ({str(error).splitlines()[0]}); the peer has probably failed, see its "
            f"message.\n{self.history()}"
        )

    def _situation(self, what: str, name: MessageName | None) -> str:
        microbatch = f", microbatch {name.microbatch}" if name is not None else ""
        return f"pp_rank {self.stage}{microbatch}: waiting to {what} ({user_code_line()})"
