"""Watching the processes of a job, whichever backend started them.

One thread follows their logs, sees their deaths within milliseconds (pidfd, which also works for processes that mpirun
started), stops the job when its time is over, and ends what does not end by itself after a failure. Only processes of
the job are ever signalled: they are known by a file each of them writes, and, for what they started themselves, by the
variable MODELPARALLEL_JOB in their environment.
"""

import contextlib
import json
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from modelparallel.launch.folder import JobFolder
from modelparallel.launch.output import Console, LogRelay

JOB_VARIABLE = "MODELPARALLEL_JOB"

#: Seconds that processes have to end after a failure or a SIGTERM before they are killed.
GRACE = 5.0
_POLL_SECONDS = 0.05
#: Seconds that helpers of the script (data loader workers, ...) have to end after the script succeeded.
_LEFTOVER_SECONDS = 2.0
_STACK_SECONDS = 0.5


class RankMonitor:
    """Follows one job. `deaths` and `exit_codes` are filled while it runs; an exit code is known here only for
    processes that this process itself started.
    """

    def __init__(self) -> None:
        self.deaths: dict[int, float] = {}
        self.exit_codes: dict[int, int] = {}
        self.stop_reason: str | None = None
        self.has_timed_out = False
        self._descriptors: dict[int, int] = {}  # global rank -> pidfd, while the process lives
        self._pids: dict[int, int] = {}
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._failed_at: float | None = None
        self._stop_at: float | None = None
        self._was_terminated = False

    def attach(self, folder: JobFolder, num_processes: int, output: TextIO, timeout: float | None) -> None:
        self._folder: JobFolder = folder
        self._num_processes = num_processes
        self._console = Console(output, folder)
        self._relays = [LogRelay(folder, rank, self._console) for rank in range(num_processes)]
        self._timeout = timeout

    def start(self) -> None:
        self._deadline = None if self._timeout is None else time.monotonic() + self._timeout
        self._thread = threading.Thread(target=self._run, name="modelparallel-monitor", daemon=True)
        self._thread.start()

    def say(self, text: str) -> None:
        """Print a line of the launcher."""
        self._console.say(text)

    def request_stop(self, reason: str) -> None:
        """Stop the job soon; may be called from any thread."""
        if self.stop_reason is None:
            self.stop_reason = reason

    @property
    def has_processes(self) -> bool:
        """Whether any process of the job is known to be alive."""
        return bool(self._descriptors)

    def close(self) -> None:
        """Show the rest of the logs and end the thread. All processes of the job have ended."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        for relay in self._relays:
            relay.close()
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        self._console.flush()

    def _run(self) -> None:
        while not self._closing.is_set():
            self._notice_starts()
            self._wait_for_deaths()
            for relay in self._relays:
                relay.forward()
            self._console.flush()
            self._enforce()
        self._notice_starts()
        self._wait_for_deaths(0.0)

    def _notice_starts(self) -> None:
        for global_rank in range(self._num_processes):
            if global_rank in self._pids:
                continue
            try:
                record = json.loads(self._folder.started_file(global_rank).read_text(encoding="utf-8"))
            except FileNotFoundError:
                continue
            self._pids[global_rank] = record["pid"]
            try:
                self._descriptors[global_rank] = os.pidfd_open(record["pid"])
            except ProcessLookupError:
                self.deaths[global_rank] = time.time()

    def _wait_for_deaths(self, seconds: float = _POLL_SECONDS) -> None:
        poller = select.poll()
        by_descriptor = {descriptor: rank for rank, descriptor in self._descriptors.items()}
        for descriptor in by_descriptor:
            poller.register(descriptor, select.POLLIN)
        for descriptor, _ in poller.poll(seconds * 1000):
            global_rank = by_descriptor[descriptor]
            self.deaths[global_rank] = time.time()
            self._peek_exit_code(global_rank, descriptor)
            os.close(self._descriptors.pop(global_rank))

    def _peek_exit_code(self, global_rank: int, descriptor: int) -> None:
        """Look at the exit status and leave it for the backend, whose child the process is."""
        try:
            status = os.waitid(os.P_PIDFD, descriptor, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        except ChildProcessError:  # it is mpirun's child, or the backend was faster
            return
        if status is not None:
            is_exit = status.si_code == os.CLD_EXITED
            self.exit_codes[global_rank] = status.si_status if is_exit else -status.si_status

    def _enforce(self) -> None:
        now = time.monotonic()
        if self._deadline is not None and now > self._deadline and self.stop_reason is None:
            self.has_timed_out = True
            self.stop_reason = (
                f"it ran longer than its timeout of {self._timeout:g} s; the stacks of all ranks are in their logs, "
                f"{self._folder.logs}"
            )
            self._signal_all(signal.SIGUSR1)  # the bootstrap has asked faulthandler to print the stacks
            self._stop_at = now + _STACK_SECONDS
        if self.stop_reason is not None:
            self._stop_at = self._stop_at or now
            if now >= self._stop_at and not self._was_terminated:
                self._was_terminated = True
                self._failed_at = now
                self._signal_all(signal.SIGTERM)
        if self._failed_at is None and self._has_failure():
            self._failed_at = now
        if self._failed_at is not None and now > self._failed_at + GRACE:
            self._signal_all(signal.SIGKILL)

    def _has_failure(self) -> bool:
        return any(self.exit_codes.values()) or any(
            self._folder.error_file(rank).exists() for rank in range(self._num_processes)
        )

    def _signal_all(self, signal_number: int) -> None:
        """Signal every process that still lives; for an end also the group that it leads."""
        for global_rank, descriptor in list(self._descriptors.items()):
            pid = self._pids[global_rank]
            # While the pidfd has not reported a death the pid cannot belong to anyone else.
            with contextlib.suppress(ProcessLookupError):
                if signal_number != signal.SIGUSR1 and os.getpgid(pid) == pid:
                    os.killpg(pid, signal_number)
                else:
                    signal.pidfd_send_signal(descriptor, signal_number)


def end_leftovers(description: Path, *, patience: float = _LEFTOVER_SECONDS) -> int:
    """Kill what is left of the job after its end: processes with its MODELPARALLEL_JOB in their environment.

    They have `patience` seconds to end by themselves. Returns how many were killed.
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
    mark = f"{JOB_VARIABLE}={description}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0") and _is_alive(entry):
                yield int(entry.name)
        except OSError:  # gone meanwhile, or not ours to read
            continue


def _is_alive(entry: Path) -> bool:
    """False for a zombie, which only waits to be collected."""
    return (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in ("Z", "X")
