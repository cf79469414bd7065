"""A disk that dies at the n-th operation, and one that says which names were never brought to it.

Put in the place of `os` in the module under test. What was done before the n-th operation stays; from then on nothing
is done any more, as after SIGKILL: handlers of errors run, but cannot change anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

CHANGING = {"mkdir", "unlink", "rmdir", "replace", "rename", "fsync"}


class Crash(BaseException):
    """The process is dead."""


class Disk:
    """Counts operations; `fails_at`-th and all later ones raise Crash, or only that one raises `error`."""

    def __init__(self, fails_at: int | None = None, error: Exception | None = None) -> None:
        self.fails_at, self.error = fails_at, error
        self.count = 0
        self.is_dead = False
        self.paths: dict[int, str] = {}  # descriptor -> path
        self.unsynced: set[str] = set()  # files written, folders changed
        self.complaints: list[str] = []

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in CHANGING:
            return real
        return lambda *arguments, **options: self.do(name, real, arguments, options)

    def step(self) -> None:
        if self.is_dead:
            raise Crash
        self.count += 1
        if self.count == self.fails_at:
            if self.error is not None:
                raise self.error
            self.is_dead = True
            raise Crash

    def do(self, name: str, real: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if name in ("replace", "rename"):
            source = os.fspath(arguments[0])
            below = [path for path in self.unsynced if path == source or PurePath(source) in PurePath(path).parents]
            if below:
                self.complaints.append(f"{name} of {source} before {below} were brought to the disk")
        self.step()
        result = real(*arguments, **options)
        if name == "fsync":
            self.unsynced.discard(self.paths[arguments[0]])
        else:
            for path in arguments[: 2 if name in ("replace", "rename") else 1]:
                # What is removed need not be removed for good.
                if name not in ("unlink", "rmdir"):
                    self.unsynced.add(os.path.dirname(os.fspath(path)))
            self.unsynced -= {os.fspath(arguments[0])} if name != "mkdir" else set()
        return result

    def open(self, path: str, flags: int, *mode: int) -> int:
        if flags & os.O_CREAT:
            self.step()
        descriptor = os.open(path, flags, *mode)
        self.paths[descriptor] = os.fspath(path)
        if flags & os.O_CREAT:
            self.unsynced.add(os.path.dirname(path))
        return descriptor

    def fdopen(self, descriptor: int, mode: str, buffering: int = -1) -> Any:
        return os.fdopen(descriptor, mode) if mode == "rb" else File(self, os.fdopen(descriptor, mode, buffering=0))


class File:
    """A file being written without a buffer; dying in a write leaves half of it."""

    def __init__(self, disk: Disk, raw: Any) -> None:
        self.disk, self.raw = disk, raw

    def write(self, data: Any) -> int:
        try:
            self.disk.step()
        except BaseException:
            if not self.disk.is_dead or self.disk.count == self.disk.fails_at:
                self.raw.write(memoryview(data)[: memoryview(data).nbytes // 2])
            raise
        self.disk.unsynced.add(self.disk.paths[self.raw.fileno()])
        return self.raw.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)
