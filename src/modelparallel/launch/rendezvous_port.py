"""The port at which the processes of a local job meet: 7777 as in a training container if it is free, else any.

Jobs of one machine that start together must not both take 7777 between looking and binding, so the port is held by a
lock file as long as the job runs.
"""

import errno
import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from modelparallel.private_files import is_own, open_private


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
            is_mine = True
    try:
        yield preferred if is_mine and _is_free(preferred) else _any_free_port()
    finally:
        if lock is not None:
            os.close(lock)


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
