"""Messages between stages that are processes, over gloo; see the notes in transport.py.

[Note: frames] gloo takes a message into a buffer that is longer than it, and aborts the process for one that is
shorter. So each message is a frame of a fixed maximal size that tells the length; what is small lies in the frame
itself, the rest follows in a message of its own, whose buffer is made when the frame has come.
"""

from __future__ import annotations

import struct
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from modelparallel.comm.event_log import user_code_line
from modelparallel.comm.transport import Message, MessageKind, MessageName, StageTransport
from modelparallel.errors import CommunicationError, WaitTimeoutError

_HEADER = struct.Struct("<7q")
_FRAME_BYTES = 4096
_INLINE_BYTES = _FRAME_BYTES - _HEADER.size
_MAX_PENDING_SENDS = 8  # for each peer: what was sent before has surely arrived, and is let go
_TAG = 0
_FOREVER = timedelta(days=3650)  # an idle listener
_GOODBYE_SECONDS = 5.0


@dataclass
class _PendingSend:
    works: list[dist.Work]
    tensors: list[torch.Tensor]  # they, and the works, must stay alive until the message has arrived
    description: str
    is_needed: bool  # the peer waits for it; nobody waits for what is only told


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
        # A listener answers while the main thread sends, and the parts of a message must follow each other.
        self._send_locks = {peer: threading.Lock() for peer in self.peers()}
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
                kind, step, microbatch, event, check, presence, size = _HEADER.unpack_from(header)
                if kind == MessageKind.GOODBYE:
                    self.lose(peer, f"its process has ended, after call {step + 1} of a step function")
                    return
                if size <= _INLINE_BYTES:
                    payload = frame[_HEADER.size : _HEADER.size + size].clone()
                else:
                    payload = torch.empty(size, dtype=torch.uint8)
                    self._process_group.recv([payload], global_rank, _TAG).wait(_FOREVER)
                name = MessageName(MessageKind(kind), microbatch, event, check)
                self.deliver(peer, step, name, Message(presence, payload))
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
    ) -> None:
        size = payload.numel()
        header = _HEADER.pack(name.kind, step, name.microbatch, name.event, name.check, presence, size)
        is_inline = size <= _INLINE_BYTES
        frame = torch.frombuffer(
            bytearray(header + payload.numpy().tobytes() if is_inline else header), dtype=torch.uint8
        )
        tensors = [frame] if is_inline else [frame, payload]
        what = f"send {what or name} to pp_rank {peer}"
        pending = self._pending[peer]
        with self._send_locks[peer]:
            try:
                works = [self._process_group.send([tensor], self._global_ranks[peer], _TAG) for tensor in tensors]
            except RuntimeError as error:
                raise self._send_error(what, error) from error
            pending.append(_PendingSend(works, tensors, what, name.kind is not MessageKind.STATUS))
        while may_wait and len(pending) > _MAX_PENDING_SENDS:
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
                if send.is_needed:
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
        farewell = _HEADER.pack(MessageKind.GOODBYE, self._step, 0, 0, 0, 0, 0)
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
