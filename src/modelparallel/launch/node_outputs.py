"""What a submitted job leaves: sent to where it was wanted, and checkpoints kept behind a URL while it runs."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from modelparallel.checkpoints.stores.file_streams import shown
from modelparallel.errors import LaunchError
from modelparallel.launch.clusters.job_end import FILE_NAME as STATUS_NAME
from modelparallel.launch.clusters.transfers import fetch, files_below, names_at, send
from modelparallel.launch.folder import JobFolder

#: Seconds between two looks for new checkpoints. A file is sent when it has not changed from one to the next.
KEEP_SECONDS = 60.0
#: Seconds that a node waits for another one that fetches the checkpoints into the folder that they share.
FETCH_SECONDS = 6 * 3600.0
#: What is sent, by the first part of the name in the job folder. The rest is input, or of this node alone.
_SENT = ("model", "output", "logs", "events", "status", "attempts", "starts", STATUS_NAME)
#: What ranks of several nodes may have written under the same name.
_OF_ALL = ("model", "output")
_NOT_SENT = ("store",)


def send_outputs(folder: JobFolder, location: str, is_first: bool) -> int:
    """Put model, outputs, logs and what `modelparallel explain` reads below a URL or into another folder, under the
    names that they have in the job folder. Returns the number of files.

    Args:
        is_first: whether this is node 0. The others leave alone what is there already under names that all share.

    Raises `LaunchError`.
    """
    names = list(_outputs(folder.root))
    if not is_first:
        there = names_at(location, "output")
        names = [name for name in names if not (name.split("/")[0] in _OF_ALL and name in there)]
        names = [name for name in names if name != STATUS_NAME]
    return send(folder.root, names, location, "output")


def _outputs(root: Path) -> Iterator[str]:
    for top in _SENT:
        path = root / top
        if path.is_file():
            yield top
        for file in files_below(path):
            if file.name not in _NOT_SENT and not file.name.endswith(".partial"):
                yield file.relative_to(root).as_posix()


def is_shared(folder: JobFolder, node: int) -> bool:
    """Whether another node than node 0 works in a folder of node 0's."""
    return node > 0 and folder.nodes_file.exists()


class CheckpointKeeper:
    """Keeps the checkpoints of a job behind a URL: fetched before a start that has none, sent while it runs and at its
    end, in the order in which they were written. So what makes a checkpoint complete, which is written last, is sent
    last, and a node that dies leaves complete checkpoints there, or such as are known not to be.

    A script may as well use the URL itself, and leave the folder empty.
    """

    def __init__(self, url: str, folder: Path, is_sender: Callable[[], bool], say: Callable[[str], None]) -> None:
        """``is_sender``: whether it is this node that sends; asked when there is something."""
        self._url, self._folder, self._is_sender, self._say = url, folder, is_sender, say
        self._sent: dict[str, tuple[int, int]] = {}
        self._seen: dict[str, tuple[int, int]] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keep-checkpoints", daemon=True)

    def fetch(self) -> None:
        """Get what is there, if this folder has nothing. Raises `LaunchError`."""
        lock = FileLock(self._folder.with_name(f".{self._folder.name}.lock"))
        try:
            with suppress(NotImplementedError):  # a file server without locks
                lock.acquire(timeout=FETCH_SECONDS)
            if any(files_below(self._folder)) or not names_at(self._url, "checkpoints"):
                return
            self._say(f"fetching the checkpoints from {shown(self._url)}")
            with suppress(FileNotFoundError):
                shutil.rmtree(self._folder)  # empty, as was seen
            fetch(self._url, self._folder, "checkpoints")
        except Timeout as error:
            raise LaunchError(
                f"checkpoints: another node has been fetching {shown(self._url)} into {self._folder} for "
                f"{FETCH_SECONDS:.0f} s: look at its output"
            ) from error
        except OSError as error:
            raise LaunchError(f"checkpoints: {self._folder} is in the way: {error}") from error
        finally:
            if lock.is_locked:
                lock.release()

    def start(self) -> None:
        """Begin to send what is written from now on."""
        self._sent = dict(self._files())
        self._seen = dict(self._sent)
        self._thread.start()

    def finish(self) -> None:
        """Send the rest. Nothing writes any more. Raises `LaunchError`."""
        self._closing.set()
        self._thread.join()
        if self._is_sender():
            self._send(dict(self._files()))

    def _run(self) -> None:
        while not self._closing.wait(KEEP_SECONDS):
            try:
                if self._is_sender():
                    self.send_settled()
            except (LaunchError, OSError) as error:
                self._say(f"{error}; it is tried again in {KEEP_SECONDS:.0f} s")

    def send_settled(self) -> None:
        """Send what has not changed since the last look."""
        files = dict(self._files())
        settled = {name: state for name, state in files.items() if self._seen.get(name) == state}
        self._seen = files
        self._send(settled)

    def _send(self, files: dict[str, tuple[int, int]]) -> None:
        new = [name for name, state in files.items() if self._sent.get(name) != state]
        for name in sorted(new, key=lambda name: (files[name][1], name)):
            send(self._folder, [name], self._url, "checkpoints")
            self._sent[name] = files[name]

    def _files(self) -> Iterator[tuple[str, tuple[int, int]]]:
        for path in files_below(self._folder):
            with suppress(FileNotFoundError):
                status = path.stat()
                yield path.relative_to(self._folder).as_posix(), (status.st_size, status.st_mtime_ns)
