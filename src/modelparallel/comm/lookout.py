"""What this process waits for, said in its log and to ranks that ask; and what other ranks have answered.

[Note: lookout] Who waits in gloo cannot say so, and who computes does not know that it is waited for. So each process
has one thread that looks, about once a second, at what the other threads wait for. After 10, 20, 40, ... seconds it
logs that. After one second it asks those that are waited for, and again from time to time; their threads answer
whatever their main threads are busy with. So a wait that fails can say where the others stand. A question is a frame of
fixed length over the process group of messages, with a tag of its own. Receives of one frame from each rank are posted
beforehand and never waited for: the last byte of a frame that has come is 1, and looking at the memory costs nothing.
A send is not waited for either, so neither a stopped process nor one that is gone holds anybody. In a step that goes on
nothing is sent.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from modelparallel.comm.event_log import line_of_thread, line_of_work

logger = logging.getLogger("modelparallel")

#: After so many seconds a wait is logged, and again when it has lasted twice as long, four times as long, ...
SAY_AFTER_SECONDS = 10.0
_ASK_AFTER_SECONDS = 1.0
_LONGEST_PAUSE = 10.0  # between two questions of a wait
_TAG = 5241
_FRAME = 1024
_MOST_ASKED = 64  # of a group: who is missing there is found among them, or by the log of another rank
_MOST_NAMED = 4
_WAITS = "waits, too: "


class Waiting:
    """A wait of a thread that is under way. ``describe`` puts it into words, given the line of the script;
    ``peers`` gives the global ranks that can end it.
    """

    __slots__ = ("_pause", "ask_at", "describe", "last_at", "peers", "say_at", "since")

    def __init__(self, describe: Callable[[str], str], peers: Callable[[], Sequence[int]], seconds: float) -> None:
        self.describe = describe
        self.peers = peers
        now = self.since = time.monotonic()
        self.say_at = now + SAY_AFTER_SECONDS
        self._pause = min(_ASK_AFTER_SECONDS, seconds / 4)
        self.ask_at = now + self._pause
        self.last_at = now + seconds - self._pause  # the time is nearly up

    def note_asked(self, now: float) -> None:
        """The next question comes after twice the time, and once more shortly before the end."""
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        self.ask_at = now + self._pause
        if now < self.last_at < self.ask_at:
            self.ask_at = self.last_at

    def note_said(self) -> None:
        """The next line of the log comes when it has lasted twice as long."""
        self.say_at += self.say_at - self.since


class Lookout:
    """See the note. ``timeout_seconds``: of most waits; the shorter it is, the more often the thread looks.

    Attributes:
        waits: what the threads wait for, by the identity of the thread.
    """

    def __init__(self, global_rank: int, timeout_seconds: float) -> None:
        self.waits: dict[int, Waiting] = {}
        self._rank = global_rank
        self._pause = min(1.0, timeout_seconds / 16)
        self._is_closed = threading.Event()
        self._process_group: dist.ProcessGroup | None = None
        self._frames = torch.empty(0, _FRAME, dtype=torch.uint8)
        self._memory: Any = self._frames.numpy()
        self._receives: dict[int, Any] = {}
        self._sent: dict[tuple[int, bool], tuple[torch.Tensor, Any]] = {}  # must live until it has arrived
        self._asked: set[int] = set()  # who has not answered yet
        self._heard: dict[int, tuple[str, float]] = {}
        self._thread = threading.Thread(target=self._look, name="lookout", daemon=True)
        self._thread.start()

    def listen(self, process_group: dist.ProcessGroup) -> None:
        """Ask and answer from now on, over a gloo group of the world whose members have proved who they are. Local."""
        if self._process_group is None and process_group.size() > 1:
            self._frames = torch.zeros(process_group.size(), _FRAME, dtype=torch.uint8)
            self._memory = self._frames.numpy()
            self._process_group = process_group

    @contextmanager
    def waiting(
        self, describe: Callable[[str], str], peers: Sequence[int] = (), seconds: float = 600.0
    ) -> Iterator[None]:
        """While the block lasts, this thread waits. ``describe`` is called in another thread and may itself wait."""
        ident = threading.get_ident()
        outer = self.waits.get(ident)
        self.waits[ident] = Waiting(describe, lambda: peers, seconds)
        try:
            yield
        finally:
            if outer is None:
                del self.waits[ident]
            else:
                self.waits[ident] = outer

    def words_of(self, peers: Sequence[int], since: float) -> str:
        """What the ranks that are waited for have said of where they stand, a line for each. Local.

        ``since``: what is older says nothing. Of many peers, those that do not wait themselves come first.
        """
        if self._process_group is None:
            return ""
        now, lines = time.monotonic(), []
        heard = {peer: self._heard[peer] for peer in peers if peer in self._heard and self._heard[peer][1] >= since}
        working = [peer for peer, (words, _) in heard.items() if not words.startswith(_WAITS)]
        named = [*working, *(peer for peer in peers if peer not in heard)] or list(heard)
        for peer in named[:_MOST_NAMED]:
            if peer in heard:
                words, moment = heard[peer]
                lines.append(f"global rank {peer} {words} ({now - moment:.1f} s ago)")
            else:
                lines.append(
                    f"global rank {peer} has not said anything: its process has ended or is stopped, or its "
                    "interpreter is held by one long operation"
                )
        if len(named) > _MOST_NAMED:
            lines.append(f"and {len(named) - _MOST_NAMED} more")
        return "\n".join(lines)

    def close(self) -> None:
        """Let the thread end. Local."""
        self._is_closed.set()
        self._thread.join(5.0)

    # In the thread

    def _look(self) -> None:
        while not self._is_closed.wait(self._pause):
            try:
                for ident, waiting in list(self.waits.items()):
                    self._attend(ident, waiting)
                if self._process_group is not None:
                    self._hear(self._process_group)
            except Exception:  # what is only there to explain failures must not be one
                logger.warning("global rank %d could not tell what it waits for", self._rank, exc_info=True)

    def _attend(self, ident: int, waiting: Waiting) -> None:
        now = time.monotonic()
        if now >= waiting.ask_at:
            waiting.note_asked(now)
            peers = [peer for peer in list(waiting.peers())[:_MOST_ASKED] if peer not in self._asked]
            for peer in peers:
                self._send(peer, is_question=True)
        if now >= waiting.say_at:
            text = waiting.describe(line_of_thread(ident))
            if self.waits.get(ident) is waiting:
                words = self.words_of(waiting.peers(), waiting.since)
                seconds = time.monotonic() - waiting.since
                logger.warning("%s (for %.0f s so far)%s", text, seconds, f"\n{words}" if words else "")
            waiting.note_said()

    def _hear(self, process_group: dist.ProcessGroup) -> None:
        for peer in range(process_group.size()):
            if peer != self._rank and peer not in self._receives:
                self._receive(process_group, peer)
        for peer in self._memory[:, -1].nonzero()[0].tolist():
            # All of it is there, since the last byte is; this also tells torch so.
            self._receives[peer].wait(timedelta(seconds=_LONGEST_PAUSE))
            is_question, told = bool(self._memory[peer, 0]), bytes(self._memory[peer, 1:-1])
            self._receive(process_group, peer)
            if is_question:
                self._send(peer, is_question=False, words=self._standing())
            else:
                self._heard[peer] = told.rstrip(b"\0").decode(errors="replace"), time.monotonic()
                self._asked.discard(peer)

    def _receive(self, process_group: dist.ProcessGroup, peer: int) -> None:
        self._memory[peer] = 0
        try:
            self._receives[peer] = process_group.recv([self._frames[peer]], peer, _TAG)
        except RuntimeError:  # it has ended: nothing will come
            self._receives[peer] = None

    def _send(self, peer: int, *, is_question: bool, words: str = "") -> None:
        if self._process_group is None:
            return
        told = words.encode()[: _FRAME - 2].ljust(_FRAME - 2, b"\0")
        frame = torch.frombuffer(bytearray(bytes([is_question]) + told + b"\1"), dtype=torch.uint8)
        with suppress(RuntimeError):  # it has ended, which the wait itself finds out
            # One of a kind is under way at a time: that the peer has asked again, or answered, shows that the last one
            # has arrived.
            self._sent[peer, is_question] = frame, self._process_group.send([frame], peer, _TAG)
            if is_question:
                self._asked.add(peer)

    def _standing(self) -> str:
        main = threading.main_thread().ident or 0
        for ident, waiting in sorted(self.waits.items(), key=lambda item: item[0] != main):
            return f"{_WAITS}{waiting.describe(line_of_thread(ident))}"
        return f"is alive, at {line_of_work(main)}"
