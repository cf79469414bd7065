"""What the processes of a job print: read from one log file per rank, shown line by line with the rank in front.

    [rank 3] loss 0.4711
    [node-b rank 5] loss 0.4711                   (of several hosts)
    [launcher] job demo finished in 12.3 s

The bootstrap in each process has sent stdout and stderr to that file, so the order within a rank is kept, and what
libraries print from C++ is there too.
"""

import codecs
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

from modelparallel.job.private_files import open_private
from modelparallel.launch.folder import JobFolder

_CHUNK = 1 << 16


def open_missing_descriptors() -> None:
    """Where this process was started without standard input, output or error, open /dev/null: a file of the job would
    take their numbers, and the processes of the job would take it for theirs.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest number that is free


class Console:
    """Writes whole lines from several threads. Whatever happens to the stream, the job goes on, and the logs keep
    everything: a reader that went away (a closed pipe), a full disk, an encoding without a character.
    """

    def __init__(self, stream: TextIO | None, folder: JobFolder) -> None:
        """``stream`` None: standard output was closed before this process started."""
        self._stream = stream
        self._lock = threading.Lock()
        self._is_closed = stream is None
        self._num_lost = 0
        # Open from now on: later there may be too many open files.
        self._log: int | None = open_private(folder.launcher_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def say(self, text: str) -> None:
        """A line of the launcher itself; kept in logs/launcher.log as well."""
        self.note(text)
        self.write_lines("launcher", [text])
        self.flush()

    def note(self, text: str) -> None:
        """A line for logs/launcher.log alone."""
        with self._lock, suppress(OSError):
            if self._log is not None:
                os.write(self._log, (text + "\n").encode(errors="backslashreplace"))

    def write_lines(self, source: str, lines: list[str]) -> None:
        text = "".join(f"[{source}] {line}\n" for line in lines)
        with self._lock:
            if self._num_lost:
                text = f"[launcher] {self._num_lost} lines could not be shown; the logs have them\n{text}"
            if self._try(lambda stream: stream.write(_writable(text, stream))):
                self._num_lost = 0
            else:
                self._num_lost += len(lines)

    def flush(self) -> None:
        with self._lock:
            self._try(lambda stream: stream.flush())

    def close(self) -> None:
        """Let go of the log, and of a stream that does not take what it holds: Python would fail at its end."""
        with self._lock:
            if self._log is not None:
                os.close(self._log)
                self._log = None
            if not self._try(lambda stream: stream.flush()) and self._stream is sys.stdout is not None:
                with suppress(OSError, ValueError):
                    nowhere = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(nowhere, self._stream.fileno())
                    os.close(nowhere)

    def _try(self, action: Callable[[TextIO], object]) -> bool:
        if self._stream is None or self._is_closed:
            return False
        try:
            action(self._stream)
        except (BrokenPipeError, ValueError):
            self._is_closed = True
            return False
        except OSError:  # a disk may have room again later
            return False
        return True


def _writable(text: str, stream: TextIO) -> str:
    """The text with what the stream's encoding cannot show written as escapes."""
    encoding = getattr(stream, "encoding", None)
    if not encoding:
        return text
    try:
        text.encode(encoding, getattr(stream, "errors", None) or "strict")
    except UnicodeError:
        return text.encode(encoding, "backslashreplace").decode(encoding)
    return text


class LogRelay:
    """Follows the log file of one rank and passes on its complete lines. A carriage return ends a line too, so that
    progress bars are seen.
    """

    def __init__(self, folder: JobFolder, global_rank: int, console: Console, host: str = "") -> None:
        self._path = folder.rank_log(global_rank)
        self._name = f"{host} rank {global_rank}".lstrip()
        self._console = console
        self._descriptor: int | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._partial = ""

    def forward(self) -> None:
        """Pass on what was written since the last call."""
        if self._descriptor is None:
            try:
                self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return
        while data := os.read(self._descriptor, _CHUNK):
            text = self._partial + self._decoder.decode(data)
            *lines, self._partial = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
            if lines:
                self._console.write_lines(self._name, lines)
            if len(data) < _CHUNK:
                break

    def close(self) -> None:
        """Pass on the rest, also a last line without an end."""
        self.forward()
        if self._partial:
            self._console.write_lines(self._name, [self._partial])
            self._partial = ""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
