"""The place of a node for what a job needs there and does not leave: fetched channels, unpacked code.

It is below $MODELPARALLEL_SCRATCH, else $SLURM_TMPDIR, else $TMPDIR, else /tmp, under the same name on all nodes, since
links in a shared job folder lead there. Several launchers of one job on a machine share it: what is fetched is fetched
once, and the last to leave removes it. What was complete when a node died is used again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from modelparallel.errors import LaunchError
from modelparallel.job.private_files import open_private, write_private
from modelparallel.launch.clusters.description import NodeDescription

SCRATCH_VARIABLE = "MODELPARALLEL_SCRATCH"
_USERS_FILE = ".users"
#: Seconds that one launcher waits for another one on this machine which fetches the same.
FETCH_SECONDS = 6 * 3600.0


class NodeScratch:
    """The scratch folder of a job on this machine, while it is held."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def once(self, name: str, source: str, make: Callable[[Path], None]) -> Path:
        """The folder `name`, made by `make` if nobody has made it from the same source before.

        Args:
            make: gets the path of a folder that is not there, and makes it, whole or not at all.
        """
        folder, note = self.root / name, self.root / f".{name}.json"
        lock = FileLock(self.root / f".{name}.lock")
        try:
            lock.acquire(timeout=FETCH_SECONDS)
        except Timeout as error:
            raise LaunchError(
                f"{folder}: another launcher of this job on this machine has been making it for {FETCH_SECONDS:.0f} s: "
                "look at its output"
            ) from error
        try:
            if not (folder.is_dir() and _source_of(note) == source):
                shutil.rmtree(folder, ignore_errors=True)
                make(folder)
                write_private(note, json.dumps({"source": source}) + "\n")
        except OSError as error:
            raise LaunchError(f"{folder} cannot be made: {error.strerror or error}") from error
        finally:
            lock.release()
        return folder


@contextmanager
def held_scratch(description: NodeDescription, environ: Mapping[str, str]) -> Iterator[NodeScratch]:
    """The scratch folder of a job, made if need be, and removed by the last who leaves it.

    Raises `LaunchError` if it cannot be made, or is another user's.
    """
    base = next(filter(None, (environ.get(name) for name in (SCRATCH_VARIABLE, "SLURM_TMPDIR", "TMPDIR"))), "/tmp")
    digest = hashlib.sha256(str(description.folder).encode()).hexdigest()[:12]
    root = Path(base, f"modelparallel-{os.getuid()}-{description.job.name}-{digest}")
    users = _entered(root)
    try:
        yield NodeScratch(root)
    finally:
        with suppress(OSError):
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while others are in it
            shutil.rmtree(root, ignore_errors=True)
        os.close(users)


def _entered(root: Path) -> int:
    """The descriptor whose lock says that we are in the folder."""
    try:
        while True:
            root.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                root.mkdir(mode=0o700)
            try:
                status = root.lstat()
            except FileNotFoundError:
                continue
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                raise LaunchError(f"{root} is no folder of this user: set {SCRATCH_VARIABLE} to another place")
            # Somebody who leaves may remove it meanwhile.
            with suppress(FileNotFoundError):
                root.chmod(0o700)
                descriptor = open_private(root / _USERS_FILE, os.O_RDWR | os.O_CREAT)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.stat(root / _USERS_FILE), os.fstat(descriptor)):
                        return descriptor
                os.close(descriptor)
    except OSError as error:
        raise LaunchError(
            f"{root} cannot be made ({error.strerror}): set {SCRATCH_VARIABLE} to a place on the nodes with room"
        ) from error


def _source_of(note: Path) -> str | None:
    try:
        return str(json.loads(note.read_text(encoding="utf-8"))["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
