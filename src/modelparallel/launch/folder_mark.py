"""The mark of a job folder. A folder that holds anything and has no mark of its own is never used for a job.

The mark is a file, `.modelparallel-job`, that names the folder it was made for: by its path, and by the numbers that
the file system has given to folder and mark. So a mark that was copied to other files, with the folder or alone, does
not make them a job's. A folder that was renamed stays one. The mark is locked as long as a job runs in the folder.
"""

import fcntl
import json
import os
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modelparallel.errors import LaunchError

MARK = ".modelparallel-job"
_KIND = "job folder of modelparallel"
_MAX_BYTES = 1 << 16
_MAX_SHOWN = 4
_ADVICE = (
    "nothing in it was touched. Name a folder that does not exist yet, or an empty one (--job-dir, job_dir); "
    "checkpoints that lie here can be read by their path"
)


@contextmanager
def held(root: Path) -> Iterator[None]:
    """Make the folder, or take an empty one or one of an earlier job, and keep other jobs out of it.

    Raises `LaunchError` for any other folder, before anything in it is changed.
    """
    descriptor = _open_mark(root)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LaunchError(
                f"another job is running in {root}: choose another folder (--job-dir, job_dir) or wait"
            ) from error
        _check_mark(root, descriptor)
        yield
    finally:
        os.close(descriptor)


def make_job_folder(root: Path, *, may_hold: bool = False) -> None:
    """Make the folder and its mark, for a job that was submitted into it.

    Args:
        may_hold: it was made, and filled, for this job by whoever submitted it.

    Raises `LaunchError` as `held`.
    """
    descriptor = _open_mark(root, may_hold)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if may_hold and not os.pread(descriptor, 1, 0):
            os.pwrite(descriptor, (json.dumps(_own(root, descriptor)) + "\n").encode(), 0)
        _check_mark(root, descriptor)
    except BlockingIOError:  # another node of the job holds it, so that it is one
        pass
    except OSError as error:
        raise LaunchError(f"{root} cannot be made a job folder ({error}): choose another one") from error
    finally:
        os.close(descriptor)


def _own(root: Path, descriptor: int) -> dict[str, Any]:
    """What the mark of this folder says."""
    numbers = [os.stat(root).st_ino, os.fstat(descriptor).st_ino]
    return {"kind": _KIND, "path": os.path.realpath(root), "numbers": numbers}


def _open_mark(root: Path, may_hold: bool = False) -> int:
    path, flags = root / MARK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        if not root.is_dir():
            root.parent.mkdir(parents=True, exist_ok=True)
            root.mkdir(mode=0o700, exist_ok=True)
        while True:
            try:
                return os.open(path, flags)
            except FileNotFoundError:
                if (others := _entries(root)) and not may_hold:
                    raise LaunchError(
                        f"{root} is no folder of a job and holds {_shown(others)}{_unmarked(others)}: {_ADVICE}"
                    ) from None
            os.chmod(root, 0o700)  # which only its owner can do
            try:
                return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
            except FileExistsError:  # another job was faster; its lock decides
                continue
    except OSError as error:
        raise LaunchError(f"{root} cannot be made a job folder ({error}): choose another one") from error


def _check_mark(root: Path, descriptor: int) -> None:
    """Whether the mark, which is open and locked, is of this folder; written if the folder is new."""
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise LaunchError(f"{root / MARK} is no file: {_ADVICE}")
        # Only the owner of a file may do this: another user's folder, with a mark that he made, is not taken.
        os.fchmod(descriptor, 0o600)
        os.chmod(root, stat.S_IMODE(os.stat(root).st_mode))
    except OSError as error:
        raise LaunchError(f"{root} belongs to another user ({error}): choose another folder") from error
    text = os.pread(descriptor, _MAX_BYTES, 0)
    own = _own(root, descriptor)
    others = [name for name in _entries(root) if name != MARK]
    if not text and not others:
        os.pwrite(descriptor, (json.dumps(own) + "\n").encode(), 0)
        return
    mark = _parsed(text)
    if mark.get("kind") != _KIND:
        raise LaunchError(f"{root / MARK} is not what a job writes, and {root} holds {_shown(others)}: {_ADVICE}")
    if mark.get("path") != own["path"] and mark.get("numbers") != own["numbers"]:
        raise LaunchError(
            f"{root} has the mark of another job folder ({mark.get('path')!r}), so it is a copy, or the mark is: "
            f"{_ADVICE}"
        )


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _entries(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def _unmarked(names: Collection[str]) -> str:
    """What to say of a folder that looks like one of an earlier version."""
    if not {"logs", "status"} <= set(names):
        return ""
    return f". It has no {MARK}; if it is of a job, then of a version that made no such file, and is not used again"


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    return (", ".join(map(repr, names[:_MAX_SHOWN])) or "nothing") + more
