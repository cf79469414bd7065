"""Files and folders that only their owner can read, opened without following links.

A name in a folder that others can write to may lead to any file of the user's. So what the library opens by a name that
others know is never followed as a link, and must be the user's own.
"""

import os
import stat
from pathlib import Path


def open_private(path: str | os.PathLike[str], flags: int) -> int:
    """``os.open`` for the ``opener`` of ``open``: no link is followed, and a new file is its owner's alone.

    Raises OSError for a link.
    """
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def write_private(path: Path, text: str) -> None:
    """Write the whole file, so that nobody else can read it. Raises OSError."""
    with open(path, "w", encoding="utf-8", opener=open_private) as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(text)


def is_own(descriptor: int) -> bool:
    """Whether an open file is a plain file of this user that nobody else can read or write."""
    status = os.fstat(descriptor)
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077
