"""Watching the processes of a job, whichever backend started them.

One thread follows their logs, sees their deaths within milliseconds, stops the job when its time is over, and ends what
does not end by itself after a failure. Only processes of the job are ever signalled: they are known by a file each of
them writes, and, for what they started themselves, by the variable MODELPARALLEL_JOB in their environment.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TextIO

from modelparallel.job.preemption import ASKS_SUFFIX
from modelparallel.launch.folder import JobFolder
from modelparallel.launch.output import Console, LogRelay
from modelparallel.launch.processes import WatchedProcess, end_leftovers, wait_for_any
from modelparallel.launch.worker import STACKS_SIGNAL

#: Seconds that processes have to end after a failure or a SIGTERM before they are killed.
GRACE = 5.0
_POLL_SECONDS = 0.05
_STACK_SECONDS = 0.5
#: As many as reading what a failed job left takes at a time.
_NUM_SPARE_FILES = 8


class RankMonitor:
    """Follows one job, attempt after attempt. `deaths` and `exit_codes` are those of the latest attempt, filled while
    it runs; an exit code is known here only for processes that this process itself started.
    """

    def __init__(self) -> None:
        self.deaths: dict[int, float] = {}
        self.exit_codes: dict[int, int] = {}
        self.stop_reason: str | None = None
        self.has_timed_out = False
        self._alive: dict[int, WatchedProcess] = {}
        self._started: set[int] = set()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._failed_at: float | None = None
        self._stop_at: float | None = None
        self._was_terminated = False
        self._preemption: str | None = None
        self._is_preemption_told = False
        self._asks_file: str | None = None
        self._preemption_ends_at: float | None = None
        self._spares: list[int] = []
        self._troubles: set[str] = set()

    def attach(self, folder: JobFolder, output: TextIO | None, timeout: float | None) -> None:
        """Say which job to follow; its time, all attempts together, runs from now on."""
        self._folder = folder
        self._asks_file = f"{folder.preemption_file}{ASKS_SUFFIX}"
        self._console = Console(output, folder)
        self._timeout = timeout
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._take_spares()

    def detach(self) -> None:
        """The job is over, and nothing is said any more."""
        self._give_spares()
        self._console.close()

    @contextmanager
    def spare_files(self) -> Iterator[None]:
        """For what must not fail because this process has too many open files: a few may be opened in the block."""
        self._give_spares()
        try:
            yield
        finally:
            self._take_spares()

    def _take_spares(self) -> None:
        with suppress(OSError):
            while len(self._spares) < _NUM_SPARE_FILES:
                self._spares.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))

    def _give_spares(self) -> None:
        with suppress(IndexError):  # two threads may do so at a time
            while True:
                os.close(self._spares.pop())

    def start(
        self,
        ranks: Sequence[int],
        *,
        host: str = "",
        shown: Collection[int] | None = None,
        look: Callable[[], bool] | None = None,
    ) -> None:
        """Follow an attempt with these ranks. A stop that was asked for before it counts for it, too.

        Args:
            host: stands before the ranks where output is shown.
            shown: the ranks whose output is shown; None for all.
            look: called often from the thread that watches; true if the attempt has failed elsewhere.
        """
        self._ranks, self._look, self._host = ranks, look, host
        self._relays = [
            LogRelay(self._folder, global_rank, self._console, host)
            for global_rank in ranks
            if shown is None or global_rank in shown
        ]
        self.deaths, self.exit_codes = {}, {}
        self._started.clear()
        self._failed_at = self._stop_at = None
        self._was_terminated = self._is_preemption_told = False
        self._closing.clear()
        self._thread = threading.Thread(target=self._run, name="modelparallel-monitor", daemon=True)
        self._thread.start()

    def show_end(self, global_rank: int, num_lines: int) -> None:
        """Show the last lines of the log of a rank that is not followed."""
        with self.spare_files():
            path = self._folder.rank_log(global_rank)
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        self._console.write_lines(f"{self._host} rank {global_rank}".lstrip(), lines[-num_lines:])

    def say(self, text: str) -> None:
        """Print a line of the launcher."""
        self._console.say(text)

    def request_stop(self, reason: str) -> None:
        """Stop the job soon; may be called from any thread."""
        if self.stop_reason is None:
            self.stop_reason = reason

    def request_preemption(self, reason: str, *, ends_after: float | None = None) -> None:
        """Ask the script to save and leave, in this attempt and later ones; the job is stopped if it has not left after
        so many seconds. Sets values only, so that a handler of a signal may call it.
        """
        if self._preemption is None:
            self._preemption = reason
        if ends_after is not None:
            self._preemption_ends_at = time.monotonic() + ends_after

    @property
    def script_asks(self) -> bool:
        """Whether the script of this attempt has called `smp.preemption_requested`."""
        return self._asks_file is not None and os.path.exists(self._asks_file)

    @property
    def has_processes(self) -> bool:
        """Whether any process of the job is known to be alive."""
        return bool(self._alive)

    def finish(self) -> None:
        """Show the rest of the logs and end the thread. All processes of the attempt have ended."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        with self.spare_files():
            for relay in self._relays:
                self._attempt(relay.close)
        for process in self._alive.values():
            process.close()
        self._alive.clear()
        self._console.flush()

    def _run(self) -> None:
        while not self._closing.is_set():
            self._attempt(self._notice_starts)
            self._attempt(lambda: self._notice_deaths(_POLL_SECONDS))
            for relay in self._relays:
                self._attempt(relay.forward)
            self._console.flush()
            self._attempt(self._enforce)
        with self.spare_files():
            self._attempt(self._notice_starts)
            self._attempt(lambda: self._notice_deaths(0.0))

    def _attempt(self, action: Callable[[], object]) -> None:
        """Do a part of the work; if the system refuses (too many open files), it is done the next time."""
        try:
            action()
        except OSError as error:
            if str(error) not in self._troubles:
                self._troubles.add(str(error))
                self._console.note(f"supervision goes on after: {type(error).__name__}: {error}")
            time.sleep(_POLL_SECONDS)

    def _notice_starts(self) -> None:
        for global_rank in self._ranks:
            if global_rank in self._started:
                continue
            try:
                record = json.loads(self._folder.started_file(global_rank).read_text(encoding="utf-8"))
            except FileNotFoundError:
                continue
            self._started.add(global_rank)
            if record.get("host", os.uname().nodename) != os.uname().nodename:
                continue  # mpirun watches it there
            try:
                self._alive[global_rank] = WatchedProcess(record["pid"])
            except ProcessLookupError:
                self.deaths[global_rank] = time.time()

    def _notice_deaths(self, seconds: float) -> None:
        for global_rank in wait_for_any(self._alive, seconds):
            process = self._alive.pop(global_rank)
            self.deaths[global_rank] = time.time()
            if process.exit_code is not None:
                self.exit_codes[global_rank] = process.exit_code
            process.close()

    def _tell_preemption(self) -> None:
        if self._preemption is None or self._is_preemption_told:
            return
        self._folder.preemption_file.touch(mode=0o600)
        self._is_preemption_told = True
        self._console.say(
            f"{self._preemption}: the job is to be preempted; "
            + (
                "its script is told, to save and leave"
                if self.script_asks
                else "its script learns it if it calls smp.preemption_requested(), which it has not done yet"
            )
        )

    def _enforce(self) -> None:
        self._tell_preemption()
        now = time.monotonic()
        if self._preemption_ends_at is not None and now > self._preemption_ends_at:
            self.request_stop(f"{self._preemption}: its script was asked to save and leave, and has not left in time")
        if self._deadline is not None and now > self._deadline and self.stop_reason is None:
            self.has_timed_out = True
            self.stop_reason = (
                f"it ran longer than its timeout of {self._timeout:g} s; the stacks of all ranks are in their logs, "
                f"{self._folder.logs}"
            )
            self._signal_all(STACKS_SIGNAL)  # the bootstrap has asked faulthandler to print the stacks
            self._stop_at = now + _STACK_SECONDS
        if self.stop_reason is not None:
            self._stop_at = self._stop_at or now
            if now >= self._stop_at and not self._was_terminated:
                self._was_terminated = True
                self._failed_at = now
                self._signal_all(signal.SIGTERM)
        if self._look is not None and self._look() and not self._was_terminated:
            self._was_terminated = True
            self._failed_at = now
            self._signal_all(signal.SIGTERM)
        if self._failed_at is None and self.has_failure():
            self._failed_at = now
        if self._failed_at is not None and now > self._failed_at + GRACE:
            with self.spare_files():
                end_leftovers(self._folder.description, patience=0.0)

    def has_failure(self) -> bool:
        """Whether a process of the attempt has failed, as far as was seen."""
        return any(self.exit_codes.values()) or any(
            self._folder.error_file(global_rank).exists() for global_rank in self._ranks
        )

    def _signal_all(self, signal_number: int) -> None:
        for process in list(self._alive.values()):
            process.signal(signal_number, with_group=signal_number != STACKS_SIGNAL)
