"""Messages between stages that are processes, over gloo; see the notes in transport.py.

[Note: frames] gloo takes a message into a buffer that is longer than it, and aborts the process for one that is
shorter. So each message begins with a frame that tells the length; what fits lies in the frame itself, the rest follows
in a message of its own, whose buffer is made when the frame has come. A message of gloo costs much more than the copy
of its bytes (a handshake, and threads that wake up in both processes), so frames grow: after a message that did not fit
both ends, which have seen the same messages in the same order, take frames that would have held it, up to a limit. The
part of a buffer that no message fills is never touched, and takes no memory.
"""

from __future__ import annotations

import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from modelparallel.comm.ending import close_connections, join_threads
from modelparallel.comm.event_log import user_code_line
from modelparallel.comm.stages.channels import PairChannels
from modelparallel.comm.stages.diagnosis import place_of
from modelparallel.comm.stages.transport import Message, MessageKind, MessageName, StageTransport
from modelparallel.comm.waits import is_timeout
from modelparallel.errors import CommunicationError, WaitTimeoutError

_HEADER = struct.Struct("<7q")
#: Where the payload begins in a frame; views of any dtype can begin there.
_PAYLOAD_START = 64
_INLINE_BYTES = 4096 - _PAYLOAD_START
_MOST_INLINE_BYTES = 1 << 20
_MAX_PENDING_SENDS = 8  # for each peer: what was sent before has surely arrived, and is let go
_TAG = 0
#: Added to the kind of a message whose payload follows by a channel.
_BY_CHANNEL = 1 << 8
_FOREVER = timedelta(days=3650)  # an idle listener
_GOODBYE_SECONDS = 5.0


@dataclass
class _PendingSend:
    works: list[dist.Work]
    tensors: list[torch.Tensor]  # they, and the works, must stay alive until the message has arrived
    microbatch: int
    description: str
    is_needed: bool  # the peer waits for it; nobody waits for what is only told
    channel_work: dist.Work | None = None


def _grown(inline_bytes: int, size: int) -> int:
    """How many bytes frames take after a message of ``size`` bytes; see the note on frames."""
    return max(inline_bytes, size) if size <= _MOST_INLINE_BYTES else inline_bytes


def _frames(header: tuple[int, ...], payload: torch.Tensor, inline_bytes: int) -> list[torch.Tensor]:
    """The messages of gloo that carry this one."""
    is_inline = payload.numel() <= inline_bytes
    frame = torch.empty(_PAYLOAD_START + (payload.numel() if is_inline else 0), dtype=torch.uint8)
    _HEADER.pack_into(_memory_of(frame), 0, *header)
    if not is_inline:
        return [frame, payload]
    frame[_PAYLOAD_START:].copy_(payload)
    return [frame]


def _memory_of(frame: torch.Tensor) -> Any:
    return frame.numpy()


class GlooTransport(StageTransport):
    """Between processes. ``global_ranks[i]`` is the global rank of stage ``i``; ``process_group`` is a gloo group that
    spans them and is used by nothing else; tensors on a GPU go by the ``channels``, if there are any.
    """

    def __init__(
        self,
        stage: int,
        global_ranks: Sequence[int],
        process_group: dist.ProcessGroup,
        timeout_seconds: float,
        channels: PairChannels | None = None,
    ) -> None:
        super().__init__(stage, len(global_ranks), timeout_seconds)
        self._global_ranks = tuple(global_ranks)
        self._process_group = process_group
        self.channels = channels
        self._pending: dict[int, deque[_PendingSend]] = {peer: deque() for peer in self.peers()}
        # A listener answers while the main thread sends, and the parts of a message must follow each other.
        self._send_locks = {peer: threading.Lock() for peer in self.peers()}
        self._inline_bytes = dict.fromkeys(self.peers(), _INLINE_BYTES)  # of what is sent to each peer
        self._is_closing = False
        self.listeners = [
            threading.Thread(target=self._listen, args=(peer,), name=f"listen-to-stage-{peer}", daemon=True)
            for peer in self.peers()
        ]
        for listener in self.listeners:
            listener.start()

    def _listen(self, peer: int) -> None:
        global_rank = self._global_ranks[peer]
        inline_bytes = _INLINE_BYTES
        frame = torch.empty(_PAYLOAD_START + inline_bytes, dtype=torch.uint8)
        try:
            while True:
                self._process_group.recv([frame], global_rank, _TAG).wait(_FOREVER)
                kind, step, microbatch, event, check, presence, size = _HEADER.unpack_from(_memory_of(frame))
                if kind == MessageKind.GOODBYE:
                    self.lose(peer, f"its process has ended, after call {step + 1} of a step function")
                    return
                make_ready = None
                is_inline = size <= inline_bytes
                if kind & _BY_CHANNEL and self.channels is not None:
                    kind, is_inline = kind ^ _BY_CHANNEL, False
                    payload, wait = self.channels.receive(peer, size)
                    make_ready = partial(self._make_ready, peer, wait)
                elif not is_inline:
                    payload = torch.empty(size, dtype=torch.uint8)
                    self._process_group.recv([payload], global_rank, _TAG).wait(_FOREVER)
                    inline_bytes = _grown(inline_bytes, size)
                elif is_kept := size > max(_INLINE_BYTES, inline_bytes // 2):
                    payload = frame[_PAYLOAD_START : _PAYLOAD_START + size]
                else:
                    payload = frame[_PAYLOAD_START : _PAYLOAD_START + size].clone()
                if frame.numel() < _PAYLOAD_START + inline_bytes or (is_inline and is_kept):
                    frame = torch.empty(_PAYLOAD_START + inline_bytes, dtype=torch.uint8)
                name = MessageName(MessageKind(kind), microbatch, event, check)
                self.deliver(peer, step, name, Message(presence, payload, make_ready))
        except RuntimeError as error:
            if not self._is_closing:
                self.lose(peer, str(error).splitlines()[0])

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
        size = payload.numel()
        kind = name.kind | _BY_CHANNEL if by_channel else name.kind
        header = (kind, step, name.microbatch, name.event, name.check, presence, size)
        what = f"send {what or name} to pp_rank {peer}"
        pending = self._pending[peer]
        with self._send_locks[peer]:
            carried = payload[:0].cpu() if by_channel else payload
            tensors = _frames(header, carried, self._inline_bytes[peer])
            self._inline_bytes[peer] = _grown(self._inline_bytes[peer], carried.numel())
            try:
                works = [self._process_group.send([tensor], self._global_ranks[peer], _TAG) for tensor in tensors]
            except RuntimeError as error:
                raise self._send_error(name.microbatch, what, error) from error
            channel_work = None
            if by_channel and self.channels is not None:
                channel_work = self.channels.send(peer, payload)
                tensors.append(payload)
            is_needed = name.kind is not MessageKind.STATUS
            pending.append(_PendingSend(works, tensors, name.microbatch, what, is_needed, channel_work))
        while may_wait and len(pending) > _MAX_PENDING_SENDS:
            oldest = pending[0].channel_work
            if oldest is not None and not oldest.is_completed():
                break  # waiting for it would hold up the stream that computes
            self._finish(pending.popleft())

    def drain(self) -> None:
        for pending in self._pending.values():
            while pending:
                self._finish(pending.popleft())

    def _finish(self, send: _PendingSend) -> None:
        # The peer's listener takes every message as it comes, so this waits for the network only.
        if send.channel_work is not None:
            send.channel_work.wait()
        for work in send.works:
            try:
                work.wait(timedelta(seconds=self.timeout_seconds))
            except RuntimeError as error:
                if send.is_needed:
                    raise self._send_error(send.microbatch, send.description, error) from error

    def _make_ready(self, peer: int, wait: Callable[[], object]) -> None:
        try:
            wait()
        except RuntimeError as error:
            raise CommunicationError(
                f"pp_rank {self.stage}: a message of pp_rank {peer} has been announced and not come "
                f"({str(error).splitlines()[0]})"
            ) from error

    def _send_error(self, microbatch: int, what: str, error: RuntimeError) -> CommunicationError:
        text = f"pp_rank {self.stage}, {place_of(microbatch)}: waiting to {what} ({user_code_line()})"
        history = self._history(microbatch)
        if is_timeout(error):
            return WaitTimeoutError(f"{text}: not taken within timeout_seconds={self.timeout_seconds:g}\n{history}")
        return CommunicationError(
            f"{text}: the connection is gone ({str(error).splitlines()[0]}); the peer has probably failed, see its "
            f"message.\n{history}"
        )

    def say_goodbye(self) -> None:
        """Tell the peers that no message will come any more. Local; waits a few seconds at most."""
        if self._is_closing:
            return
        self._is_closing = True
        farewell = (MessageKind.GOODBYE, self._step, 0, 0, 0, 0, 0)
        works = []
        for peer in self.peers():
            if peer in self._gone:
                continue
            frame = _frames(farewell, torch.empty(0, dtype=torch.uint8), _INLINE_BYTES)[0]
            with suppress(RuntimeError):  # the peer has gone, too
                works.append((self._process_group.send([frame], self._global_ranks[peer], _TAG), frame))
        deadline = time.monotonic() + _GOODBYE_SECONDS
        for work, _ in works:
            with suppress(RuntimeError):
                work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))

    def close(self) -> None:
        """Say goodbye and let the listeners end, whatever the peers do. Local."""
        self.say_goodbye()
        close_connections([self._process_group])
        join_threads(self.listeners)
        if self.channels is not None:
            self.channels.close()
