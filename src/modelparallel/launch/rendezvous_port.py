"""Where the processes of a local job meet: the file of their store, and a port for scripts that need one, 7777 as in a
training container if it is free, else any.

Jobs of one machine that start together must not both take 7777 between looking and binding, so the port is held by a
lock file as long as the job runs.
"""

import errno
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from modelparallel.job.private_files import is_own, open_private

_IN_MEMORY = "/dev/shm"


@contextmanager
def reserved_port(preferred: int) -> Iterator[int]:
    """A port that is free now, and that no other job of this launcher takes."""
    lock_path = Path(tempfile.gettempdir()) / f"modelparallel-port-{os.getuid()}-{preferred}.lock"
    # Others may have put a link or a file of theirs under the name; then there is no lock, and 7777 is left alone.
    lock: int | None = None
    is_mine = False
    with suppress(OSError):
        lock = open_private(lock_path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK)
        os.fchmod(lock, 0o600)  # of a file of another user this fails
        if is_own(lock):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who had it until now has taken the file away: then the next one makes another, and both would hold one.
            is_mine = _lies_at(lock, lock_path)
    try:
        yield preferred if is_mine and _is_free(preferred) else _any_free_port()
    finally:
        if lock is not None:
            with suppress(OSError):
                if is_mine and _lies_at(lock, lock_path):
                    lock_path.unlink()
            os.close(lock)


@contextmanager
def store_file(otherwise: Path) -> Iterator[Path]:
    """A file for the store of an attempt, in a folder that this user alone can enter; gone afterwards.

    In memory where the system has a folder for that: a disk that is full, which a failed save finds out, would leave
    half of a record in the store, and nobody could read on. Else the file ``otherwise``.
    """
    folder = None
    with suppress(OSError):
        folder = tempfile.mkdtemp(prefix="modelparallel-", dir=_IN_MEMORY)
    try:
        yield otherwise if folder is None else Path(folder) / "store"
    finally:
        if folder is None:
            otherwise.unlink(missing_ok=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _lies_at(file: int, path: Path) -> bool:
    return os.path.samestat(os.fstat(file), os.lstat(path))


def _is_free(port: int) -> bool:
    for family, address in ((socket.AF_INET, ""), (socket.AF_INET6, "::")):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((address, port))
        except OSError as error:
            if family == socket.AF_INET6 and error.errno != errno.EADDRINUSE:  # this machine has no IPv6
                continue
            return False
    return True


def _any_free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
