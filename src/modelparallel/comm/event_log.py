"""What the program of a microbatch has done so far, and at which lines of the user's code, for comparing the stages.

[Note: cheap events] An event is written down at every message of every microbatch, and read only when something is
wrong. So an entry is a tuple of what is at hand: texts are put together, and bytecode offsets turned into line numbers,
when somebody asks.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parents[1]
_LIBRARY_DIRECTORIES = (str(_PACKAGE), str(Path(torch.__file__).resolve().parent))
_PYTHON = str(Path(threading.__file__).resolve().parent)
_STEP_FILE = str(_PACKAGE / "stepping" / "function.py")
_PARKED_FILE = str(_PACKAGE / "pipeline" / "bodies.py")  # threads of microbatches whose turn it is not
_WORKER_THREAD = "microbatch"
#: Older events than these are only kept as a checksum.
_MAX_KEPT = 1024

#: (text, source and destination or -1, time, code and offset of the user's line, offset in the step function)
_Entry = tuple[str, int, int, float, CodeType | None, int, int]


class _LibraryFiles(dict[str, bool]):
    """Whether a file's code is the library's, torch's or Python's own machinery, and not the user's."""

    def __missing__(self, filename: str) -> bool:
        is_own = filename.startswith((*_LIBRARY_DIRECTORIES, "<"))
        is_python = filename.startswith(_PYTHON) and "site-packages" not in filename and "dist-packages" not in filename
        self[filename] = is_own or is_python
        return is_own or is_python


_is_library = _LibraryFiles()
#: How far above `EventLog.note` the user's frame was for an event of this text: walking there takes a microsecond or
#: more, since every frame on the way becomes an object.
_depths: dict[str, int] = {}


def _user_frame(text: str) -> FrameType | None:
    """The innermost frame of the user's code above `EventLog.note`, which calls this."""
    frame: FrameType | None = sys._getframe(2)
    depth = 1
    while frame is not None and _is_library[frame.f_code.co_filename]:
        frame = frame.f_back
        depth += 1
    if frame is not None:
        _depths[text] = depth
    return frame


def user_code_line() -> str:
    """Where in the user's script the calling thread stands, as ``file:line``."""
    return _line_of_frame(sys._getframe(1))


def line_of_thread(ident: int) -> str:
    """Where in the user's script another thread stands, as ``file:line``."""
    frames = sys._current_frames()
    try:
        return _line_of_frame(frames.get(ident))
    finally:
        frames.clear()  # see `line_of_work`


def line_of_work(main_thread: int) -> str:
    """Where the user's code stands now, asked from another thread: in ``main_thread``, or in the microbatch whose turn
    it is.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()
    frame: FrameType | None = None
    try:
        for ident, frame in frames.items():
            if names.get(ident) == _WORKER_THREAD and not _is_parked(frame):
                return _line_of_frame(frame)
        return _line_of_frame(frames.get(main_thread))
    finally:
        # The frame of this call is among them: a circle that would keep what the step has made alive.
        frames.clear()
        del frame


def line_of_error(error: BaseException) -> str:
    """The innermost line of the user's code that an exception came through so far; empty if there is none."""
    line, entry = "", error.__traceback__
    while entry is not None:
        if not _is_library[entry.tb_frame.f_code.co_filename]:
            line = f"{Path(entry.tb_frame.f_code.co_filename).name}:{entry.tb_lineno}"
        entry = entry.tb_next
    return line


def _is_parked(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_filename.endswith("threading.py"):
        frame = frame.f_back
    return frame is None or frame.f_code.co_filename == _PARKED_FILE


def _line_of_frame(frame: FrameType | None) -> str:
    while frame is not None:
        if not _is_library[frame.f_code.co_filename]:
            return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown line"


@functools.lru_cache(maxsize=4096)
def _line_at(code: CodeType, offset: int) -> str:
    number = next((line for start, end, line in code.co_lines() if start <= offset < end and line), "?")
    return f"{Path(code.co_filename).name}:{number}"


@dataclass(frozen=True)
class LoggedEvent:
    """An event as it is told: equal texts on two stages mean the same event."""

    number: int
    text: str
    line: str
    time: float

    def __str__(self) -> str:
        return f"event {self.number}: {self.text} ({self.line})"


@dataclass(frozen=True)
class LogReport:
    """What a stage tells of one microbatch.

    Attributes:
        microbatch: which one.
        events: the last events, without gaps.
        checksum: of the texts of all events before them.
        num_forward: how many events its forward had; None while it is under way.
    """

    microbatch: int
    events: tuple[LoggedEvent, ...]
    checksum: int
    num_forward: int | None

    @property
    def num_events(self) -> int:
        """How many there were."""
        return self.events[-1].number if self.events else 0

    @property
    def num_in_forward(self) -> int:
        """How many of them belong to the forward, as far as it is known."""
        return self.num_events if self.num_forward is None else self.num_forward

    def event(self, number: int) -> LoggedEvent | None:
        """The event of this number; None if there is none yet, or none any more."""
        index = number - self.events[0].number if self.events else -1
        return self.events[index] if 0 <= index < len(self.events) else None


_checks: dict[str, int] = {}


def check_of(text: str) -> int:
    """A number for the text of an event, equal in all processes."""
    check = _checks.get(text)
    if check is None:
        check = _checks[text] = zlib.crc32(text.encode())
    return check


class EventLog:
    """The events of one microbatch on one stage; written by the thread that runs it, read by any."""

    def __init__(self, microbatch: int) -> None:
        self.microbatch = microbatch
        self.num_events = 0
        self._entries: list[_Entry] = []
        #: (how many older events there were, their checksum, the others); replaced as a whole, for readers.
        self._kept: tuple[int, int, list[_Entry]] = (0, 0, self._entries)
        self._num_forward: int | None = None
        # The user's step function while it runs: its frame moves on with it. Only its locals live longer by that, so
        # `leave` must be called as soon as it is done.
        self._step_frame: FrameType | None = None
        self._step_code: CodeType | None = None

    def note(self, text: str, source: int = -1, destination: int = -1) -> int:
        """An event happens now, at the line of the user's code that the caller was called from; returns its number.

        ``source`` and ``destination``: the stages that a value moves between; the event reads the same on all stages.
        """
        frame: FrameType | None
        try:
            depth = _depths[text]
            frame = sys._getframe(depth)
            if _is_library[frame.f_code.co_filename] or not _is_library[sys._getframe(depth - 1).f_code.co_filename]:
                frame = _user_frame(text)
        except (KeyError, ValueError):
            frame = _user_frame(text)
        if self._step_code is None and frame is not None:
            self._find_step(frame)
        step_frame = self._step_frame
        self._entries.append(
            (
                text,
                source,
                destination,
                time.time(),
                None if frame is None else frame.f_code,
                0 if frame is None else frame.f_lasti,
                -1 if step_frame is None else step_frame.f_lasti,
            )
        )
        self.num_events += 1
        if len(self._entries) >= 2 * _MAX_KEPT:
            self._drop()
        return self.num_events

    def _find_step(self, frame: FrameType) -> None:
        """The step function is the user's frame that stepping/function.py has called."""
        outer: FrameType | None = frame
        while outer is not None:
            if outer.f_back is not None and outer.f_back.f_code.co_filename == _STEP_FILE:
                self._step_frame, self._step_code = outer, outer.f_code
                return
            outer = outer.f_back

    def _drop(self) -> None:
        dropped, checksum, entries = self._kept
        for entry in entries[:_MAX_KEPT]:
            checksum = zlib.crc32(_text_of(entry).encode(), checksum)
        self._entries = entries[_MAX_KEPT:]
        self._kept = (dropped + _MAX_KEPT, checksum, self._entries)

    def leave(self) -> None:
        """The user's function has returned."""
        self._step_frame = None

    def end_forward(self) -> None:
        """What comes from now on belongs to the outputs of the step."""
        self._step_frame = None
        self._num_forward = self.num_events

    def report(self, num_events: int = _MAX_KEPT) -> LogReport:
        """The last events, for others; from any thread."""
        dropped, checksum, kept = self._kept
        entries = list(kept)
        # Read after the entries: a finished forward may look unfinished, but never have too many events.
        num_forward = self._num_forward
        cut = max(0, len(entries) - num_events)
        for entry in entries[:cut]:
            checksum = zlib.crc32(_text_of(entry).encode(), checksum)
        events = [
            LoggedEvent(dropped + index + 1, _text_of(entry), self._line_of(entry), entry[3])
            for index, entry in enumerate(entries)
            if index >= cut
        ]
        return LogReport(self.microbatch, tuple(events), checksum, num_forward)

    def _line_of(self, entry: _Entry) -> str:
        code, offset, step_offset = entry[4:]
        if code is None:
            return "unknown line"
        line = _line_at(code, offset)
        if self._step_code is None or step_offset < 0 or code is self._step_code:
            return line
        return f"{line}, called from {_line_at(self._step_code, step_offset)}"

    def last(self, stage: int, num_events: int = 12) -> str:
        """The last events in words, for error messages of ``stage``."""
        lines = "\n  ".join(str(event) for event in self.report(num_events).events) or "none"
        return f"last events of microbatch {self.microbatch} on pp_rank {stage}:\n  {lines}"


def _text_of(entry: _Entry) -> str:
    text, source, destination = entry[:3]
    return text if source < 0 else f"{text}: pp_rank {source} -> {destination}"


def first_difference(own: LogReport, other: LogReport) -> int | None:
    """The number of the first event that two stages do not share, for one microbatch; None if the one who is behind
    may still do the same.
    """
    if not own.events or not other.events:
        shorter, longer = (own, other) if not own.events else (other, own)
        return 1 if shorter.num_forward == 0 and longer.num_in_forward else None
    first = max(own.events[0].number, other.events[0].number)
    last = min(own.num_events, other.num_events)
    if first <= last and _checksum_before(own, first) != _checksum_before(other, first):
        return first  # they went apart before; where is not known any more
    for number in range(first, last + 1):
        mine, theirs = own.event(number), other.event(number)
        if mine is not None and theirs is not None and mine.text != theirs.text:
            return number
    for done, more in ((own, other), (other, own)):
        if done.num_forward is not None and more.num_in_forward > done.num_forward:
            return done.num_forward + 1
    return None


def _checksum_before(report: LogReport, number: int) -> int:
    checksum = report.checksum
    for event in report.events:
        if event.number >= number:
            break
        checksum = zlib.crc32(event.text.encode(), checksum)
    return checksum


def as_records(report: LogReport) -> list[dict[str, Any]]:
    """The events as they are written to a file."""
    return [
        {
            "kind": "event", "microbatch": report.microbatch, "number": event.number, "text": event.text,
            "line": event.line, "time": event.time,
        }
        for event in report.events
    ]  # fmt: skip
