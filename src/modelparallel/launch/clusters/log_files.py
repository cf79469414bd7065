"""Reading what the ranks of a job print, from files that lie where this machine can see them."""

from __future__ import annotations

import codecs
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from modelparallel.errors import LaunchError

_POLL_SECONDS = 0.5
_CHUNK = 1 << 16
_RANK_LOG = re.compile(r"rank_(\d+)\.log")
_NODE = re.compile(r"node_(\d+)")


class _File:
    """A log that grows, line by line."""

    def __init__(self, path: Path, prefix: str) -> None:
        self.prefix = prefix
        self._path = path
        self._place = 0
        self._identity: tuple[int, int] | None = None
        self._partial = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def lines(self, *, is_last: bool) -> Iterator[str]:
        """What was added since; a carriage return ends a line, too. `is_last`: a line without an end counts."""
        try:
            with open(self._path, "rb") as file:
                found = os.fstat(file.fileno())
                if self._identity not in (None, (found.st_dev, found.st_ino)) or found.st_size < self._place:
                    self._place = 0  # another attempt writes a file of the same name
                self._identity = found.st_dev, found.st_ino
                file.seek(self._place)
                while data := file.read(_CHUNK):
                    self._place += len(data)
                    text = self._partial + self._decoder.decode(data)
                    *lines, self._partial = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
                    yield from (self.prefix + line for line in lines)
        except FileNotFoundError:
            return
        if is_last and self._partial:
            yield self.prefix + self._partial
            self._partial = ""


def rank_logs(root: Path) -> dict[int, tuple[Path, int | None]]:
    """rank -> (its log, its node if the folder says so), of `logs/rank_R.log` and `logs/node_K/rank_R.log`."""
    found: dict[int, tuple[Path, int | None]] = {}
    for pattern in ("logs/rank_*.log", "logs/node_*/rank_*.log"):
        for path in sorted(root.glob(pattern)):
            match, node = _RANK_LOG.fullmatch(path.name), _NODE.fullmatch(path.parent.name)
            if match is not None:
                found[int(match[1])] = path, None if node is None else int(node[1])
    return found


def followed_lines(
    find: Callable[[], dict[str, Path]], is_over: Callable[[], bool], *, follow: bool, seconds: float = _POLL_SECONDS
) -> Iterator[str]:
    """The lines of files that `find` gives anew each time, by what stands in front of each line; with `follow` until
    `is_over`.
    """
    files: dict[str, _File] = {}
    while True:
        is_last = not follow or is_over()  # asked first: what was written until then is read
        for prefix, path in find().items():
            file = files.setdefault(prefix, _File(path, prefix))
            file._path = path
            yield from file.lines(is_last=is_last)
        if is_last:
            return
        time.sleep(seconds)


def check_rank(rank: int | None, num_processes: int | None, name: str) -> None:
    """Raise `LaunchError` for a rank that the job does not have."""
    if rank is not None and (rank < 0 or (num_processes is not None and rank >= num_processes)):
        most = "" if num_processes is None else f" 0..{num_processes - 1}"
        raise LaunchError(f"rank {rank}: job {name} has the ranks{most}")
