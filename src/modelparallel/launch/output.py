"""What the processes of a job print: read from one log file per rank, shown line by line with the rank in front.

    [rank 3] loss 0.4711
    [launcher] job demo finished in 12.3 s

The bootstrap in each process has sent stdout and stderr to that file, so the order within a rank is kept, and what
libraries print from C++ is there too.
"""

import codecs
import os
import threading
from collections.abc import Callable
from typing import TextIO

from modelparallel.launch.folder import JobFolder
from modelparallel.private_files import open_private

_CHUNK = 1 << 16


class Console:
    """Writes whole lines from several threads; a reader that went away (a closed pipe) does not end the job."""

    def __init__(self, stream: TextIO, folder: JobFolder) -> None:
        self._stream = stream
        self._folder = folder
        self._lock = threading.Lock()
        self._is_closed = False

    def say(self, text: str) -> None:
        """A line of the launcher itself; kept in logs/launcher.log as well."""
        with open(self._folder.launcher_log, "a", encoding="utf-8", opener=open_private) as log:
            log.write(text + "\n")
        self.write_lines("launcher", [text])
        self.flush()

    def write_lines(self, source: str, lines: list[str]) -> None:
        with self._lock:
            self._try(lambda: self._stream.write("".join(f"[{source}] {line}\n" for line in lines)))

    def flush(self) -> None:
        with self._lock:
            self._try(self._stream.flush)

    def _try(self, action: Callable[[], object]) -> None:
        if self._is_closed:
            return
        try:
            action()
        except (BrokenPipeError, ValueError):
            # The logs keep everything, so the job goes on for whoever waits for its result.
            self._is_closed = True


class LogRelay:
    """Follows the log file of one rank and passes on its complete lines. A carriage return ends a line too, so that
    progress bars are seen.
    """

    def __init__(self, folder: JobFolder, global_rank: int, console: Console) -> None:
        self._path = folder.rank_log(global_rank)
        self._name = f"rank {global_rank}"
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
