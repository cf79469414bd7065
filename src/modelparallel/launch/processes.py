"""Watching and ending processes by means of the system: pidfd and /proc on Linux, less exact ones elsewhere.

[Note: when the launcher dies] Nothing of a job is left when its launcher is killed by SIGKILL, at whatever moment. The
kernel ends the ranks (`worker.py`), and mpirun. What the ranks have started themselves is ended by the guardian, a
small process that the launcher starts before any other: it waits for the launcher's end, and then looks for processes
of the job until there are none. It is this file, run by path, and imports next to nothing.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

JOB_VARIABLE = "MODELPARALLEL_JOB"

_HAS_PIDFD = hasattr(os, "pidfd_open")
_POLL_SECONDS = 0.05
#: How long the processes of a job whose launcher was killed have to end: mpirun cleans up after itself.
_PATIENCE_SECONDS = 1.0
_QUIET_SECONDS = 3.0


class WatchedProcess:
    """A process of the job, started by whomever. While `is_alive` was not seen to be False its pid is its own."""

    def __init__(self, pid: int) -> None:
        """Raises ProcessLookupError if it is gone already."""
        self.pid = pid
        self.exit_code: int | None = None
        self._descriptor: int | None = None
        os.kill(pid, 0)
        if _HAS_PIDFD:
            try:
                self._descriptor = os.pidfd_open(pid)
            except ProcessLookupError:
                raise
            except OSError:  # too many open files: then it is looked at by its pid
                self._descriptor = None

    @property
    def descriptor(self) -> int | None:
        return self._descriptor

    def check(self) -> bool:
        """Whether it is alive. Once it is not, `exit_code` is known if it is a child of this process, and still there:
        it is only looked at, and stays for the backend to collect.
        """
        if self._descriptor is not None:
            poller = select.poll()  # select() takes no descriptor above 1023
            poller.register(self._descriptor, select.POLLIN)
            if not poller.poll(0):
                return True
        kind, which = (os.P_PID, self.pid) if self._descriptor is None else (os.P_PIDFD, self._descriptor)
        with contextlib.suppress(ChildProcessError):  # mpirun's child, or collected already
            status = os.waitid(kind, which, os.WEXITED | os.WNOWAIT | os.WNOHANG)
            if status is not None:
                is_exit = status.si_code == os.CLD_EXITED
                self.exit_code = status.si_status if is_exit else -status.si_status
                return False
        return self._descriptor is None and _exists(self.pid)

    def signal(self, signal_number: int, *, with_group: bool) -> None:
        """Signal it, and the processes of the group that it leads if asked."""
        with contextlib.suppress(ProcessLookupError):
            if with_group and os.getpgid(self.pid) == self.pid:
                os.killpg(self.pid, signal_number)
            else:
                os.kill(self.pid, signal_number)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def wait_for_any(processes: Mapping[int, WatchedProcess], seconds: float) -> list[int]:
    """Keys of the processes that have ended; waits up to `seconds` for the first."""
    descriptors = [process.descriptor for process in processes.values() if process.descriptor is not None]
    if descriptors and len(descriptors) == len(processes):
        poller = select.poll()
        for descriptor in descriptors:
            poller.register(descriptor, select.POLLIN)
        poller.poll(seconds * 1000)
    else:
        time.sleep(seconds)
    return [key for key, process in processes.items() if not process.check()]


def end_leftovers(description: Path, *, patience: float) -> int:
    """Kill what is left of a job: processes with its MODELPARALLEL_JOB in their environment, whoever started them.

    They have `patience` seconds to end by themselves. Returns how many were killed. Without /proc only the groups of
    the ranks are known.
    """
    deadline = time.monotonic() + patience
    while pids := list(_processes_of(description)):
        if time.monotonic() >= deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            return len(pids)
        time.sleep(_POLL_SECONDS)
    return 0


def _processes_of(description: Path) -> Iterator[int]:
    if sys.platform != "linux":
        yield from _ranks_of(description.parent.glob("rank_*.started.json"))
        return
    mark = f"{JOB_VARIABLE}={description}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0") and _is_running(entry):
                yield int(entry.name)
        except OSError:  # gone meanwhile, or not ours to read
            continue


def _ranks_of(started_files: Iterable[Path]) -> Iterator[int]:
    for path in started_files:
        pid = json.loads(path.read_text(encoding="utf-8"))["pid"]
        if _exists(pid):
            yield pid


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _is_running(entry: Path) -> bool:
    """False for a zombie, which only waits to be collected."""
    return (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in ("Z", "X")


@contextlib.contextmanager
def guarded(description: Path) -> Iterator[None]:
    """While the block lasts, see to it that nothing is left of the job if this process is killed: see the note."""
    guardian = None
    if sys.platform == "linux":
        environment = {name: value for name, value in os.environ.items() if name != JOB_VARIABLE}
        with contextlib.suppress(OSError):  # the job can do without
            guardian = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, str(description), str(os.getpid())],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
    try:
        yield
    finally:
        if guardian is not None:
            guardian.kill()
            guardian.wait()


def _guard(description: Path, launcher: int) -> None:
    # Batch systems send these to all processes of a job, and the launcher ends this one.
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        watched: WatchedProcess | None = WatchedProcess(launcher)
    except ProcessLookupError:
        watched = None
    while watched is not None and os.getppid() == launcher:
        wait_for_any({0: watched}, 1.0)
    # A process that is just being started becomes one of the job a moment later.
    quiet_since = time.monotonic()
    while time.monotonic() < quiet_since + _QUIET_SECONDS:
        if end_leftovers(description, patience=_PATIENCE_SECONDS):
            quiet_since = time.monotonic()
        time.sleep(_POLL_SECONDS)


if __name__ == "__main__":
    _guard(Path(sys.argv[1]), int(sys.argv[2]))
