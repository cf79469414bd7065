"""Waiting for other ranks: the one way in which the library does it, but for the messages between stages.

[Note: waits] Every wait has a limit, a name and an end. The name says what is waited for (a layer by its full name, a
reduction, a checkpoint), of whom, and at which line of the script; after 10 seconds it is logged, and the error of a
wait that took too long adds what the others have said of where they stand (lookout.py). Stages of a pipeline have a
mailbox, in which messages may come in any order, so they wait there (transport.py).

On GPUs a wait for NCCL only orders streams, as everywhere in torch, and the watchdog of NCCL ends a hang: a time limit
here would stop the host until the collective is through.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from modelparallel.comm.event_log import user_code_line
from modelparallel.comm.groups import Group
from modelparallel.comm.host_copies import is_nccl
from modelparallel.comm.lookout import Lookout, Waiting
from modelparallel.errors import CommunicationError, SMPError, WaitTimeoutError

_CPU = torch.device("cpu")
_LONGEST_PAUSE = 0.2  # between two looks at a store
_SAME_CALLS = "all ranks of the group must make the same calls in the same order; see its output"


@dataclass(slots=True)
class Wait:
    """What this rank waits for, in words that are put together when somebody asks.

    Attributes:
        purpose: "the reduction of ..."; empty: the layer that works on the group.
        peer: the global rank that it is waited for; None: all others of the group.
        what: is to come, or (``is_send``) to be taken by the peer.
        seconds, limit: after which time it fails, and the parameter that says so; 0: the group's.
        advice: what to look at.
    """

    group: Group
    purpose: str = ""
    peer: int | None = None
    what: str = "a tensor"
    is_send: bool = False
    seconds: float = 0.0
    limit: str = "timeout_seconds"
    advice: str = _SAME_CALLS

    @property
    def peers(self) -> tuple[int, ...]:
        """The global ranks that are waited for."""
        own = self.group.ranks[self.group.rank_in_group]
        return (self.peer,) if self.peer is not None else tuple(rank for rank in self.group.ranks if rank != own)

    def described(self, line: str, verb: str = "waits") -> str:
        """Who waits at which line of the script, for what."""
        group = self.group
        purpose = self.purpose or group.layer
        if self.peer is None:
            what = f"the others of the {group.kind} group {list(group.ranks)}"
        elif self.is_send:
            what = f"global rank {self.peer} to take {self.what}"
        else:
            what = f"{self.what} of global rank {self.peer}"
        if self.peer is not None and group.size > 1:
            what += f", of the {group.kind} group of global ranks {list(group.ranks)}"
        prefix = f"{purpose}: " if purpose else ""
        return f"{prefix}global rank {group.ranks[group.rank_in_group]} {verb} at {line} for {what}"

    def started(self, start: Callable[[], Any]) -> Any:
        """What ``start()`` gives: the work of a collective or message, or its end. Raises CommunicationError."""
        try:
            return start()
        except RuntimeError as error:
            raise self.failure(error) from error

    def run(self, start: Callable[[], Any], device: torch.device = _CPU) -> None:
        """Start it and wait for its end."""
        work = self.started(start)
        if work is not None:
            self.end(work, device)

    def end(self, work: Any, device: torch.device = _CPU) -> None:
        """Wait for ``work``, which is a collective or message on tensors of ``device``.

        Raises WaitTimeoutError when the time is up, CommunicationError when a peer has gone.
        """
        group = self.group
        if device.type != "cpu" and is_nccl(group.process_group):
            self.started(work.wait)
            return
        seconds = self.seconds or group.timeout_seconds
        waiting = Waiting(self.described, lambda: self.peers, seconds)
        waits, ident = {} if group.lookout is None else group.lookout.waits, threading.get_ident()
        outer = waits.get(ident)
        waits[ident] = waiting
        try:
            work.wait(_limit(seconds))
        except RuntimeError as error:
            raise self.failure(error, waiting.since) from error
        finally:
            if outer is None:
                del waits[ident]
            else:
                waits[ident] = outer

    @contextmanager
    def around(self) -> Iterator[None]:
        """For what waits in torch and takes no limit but that of the process group: name it, and its errors."""
        lookout, seconds = self.group.lookout, self.seconds or self.group.timeout_seconds
        since = time.monotonic()
        try:
            with nullcontext() if lookout is None else lookout.waiting(self.described, self.peers, seconds):
                yield
        except RuntimeError as error:
            if isinstance(error, SMPError) or not (is_timeout(error) or "onnect" in str(error)):
                raise
            raise self.failure(error, since) from error

    def failure(self, error: BaseException, since: float = 0.0) -> CommunicationError:
        """What to raise for an error of torch; ``since``: when the wait began."""
        text = self.described(user_code_line(), "waited")
        if not is_timeout(error):
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            return CommunicationError(
                f"{text}: the connection failed ({reason}): most often because a process that is waited for has ended, "
                "or runs another program; see its output"
            )
        lookout = self.group.lookout
        words = lookout.words_of(self.peers, since) if lookout is not None else ""
        seconds = self.seconds or self.group.timeout_seconds
        it = "It" if self.peer is not None else "One of them"
        return WaitTimeoutError(
            f"{text}: nothing came within {self.limit}={seconds:g}{f'{chr(10)}{words}{chr(10)}' if words else '. '}"
            f"{it} is stopped, slow, or does something else: {self.advice}"
        )


def reduce_in_place(
    value: torch.Tensor, group: Group, purpose: str, operation: Any = dist.ReduceOp.SUM, seconds: float = 0.0
) -> None:
    """Reduce ``value`` over the group, in place. Collective over it. Errors are those of `Wait.end`."""
    wait = Wait(group, purpose, seconds=seconds)
    wait.run(lambda: dist.all_reduce(value, operation, group=group.process_group, async_op=True), value.device)


class NamedWork(dist.Work):
    """A work of torch for others that wait for it without a limit and a name."""

    def __init__(self, work: dist.Work, wait: Wait, device: torch.device) -> None:
        super().__init__()
        self._work, self._wait, self._device = work, wait, device

    def wait(self, timeout: timedelta | None = None) -> bool:
        """As `Wait.end`."""
        self._wait.end(self._work, self._device)
        return True


class FutureWork(dist.Work):
    """A future to wait for as for a work; futures know no limit."""

    def __init__(self, future: torch.futures.Future[Any]) -> None:
        super().__init__()
        self._future = future

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait until it is done. Raises what it failed by, RuntimeError when the time is up."""
        if timeout is not None:
            done = threading.Event()
            self._future.add_done_callback(lambda _: done.set())
            if not done.wait(timeout.total_seconds()):
                raise RuntimeError("timed out")
        self._future.wait()
        return True


def is_timeout(error: BaseException) -> bool:
    """Whether an error of torch says that the time is up."""
    text = str(error).lower()
    return "timed out" in text or "timeout" in text


@functools.lru_cache(maxsize=16)
def _limit(seconds: float) -> timedelta:
    return timedelta(seconds=seconds)


def watch(
    condition: Callable[[], bool], lookout: Lookout, described: Callable[[str, str], str], seconds: float, advice: str
) -> None:
    """Look at a store until the condition holds. Looking instead of waiting in the store, which would keep the lookout,
    that wants to say who is missing, from asking it.

    Args:
        described: given a line of the script and "waits" or "waited", who does so there for whom.
        advice: said with the error.

    Raises WaitTimeoutError.
    """
    deadline, pause = time.monotonic() + seconds, 0.002
    with lookout.waiting(lambda line: described(line, "waits")):
        while not condition():
            if time.monotonic() > deadline:
                raise WaitTimeoutError(f"{described(user_code_line(), 'waited')}{advice}")
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE)
