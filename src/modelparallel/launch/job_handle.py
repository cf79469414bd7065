"""A job on this machine that an estimator has started."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import TextIO

from modelparallel.errors import LaunchError
from modelparallel.launch.clusters.cluster import JobStatus
from modelparallel.launch.failures import JobFailedError
from modelparallel.launch.job import run_job
from modelparallel.launch.spec import JobResult, JobSpec
from modelparallel.launch.supervision import RankMonitor

_POLL_SECONDS = 0.2
_STOPPED_EXIT_CODES = (130, 143)


class JobHandle:
    """A job that was started by `fit`."""

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec
        self.name = spec.name
        self.folder = spec.folder
        self._monitor = RankMonitor()
        self._result: JobResult | None = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._has_begun = False

    def run(self, output: TextIO | None = None) -> JobResult:
        """Run the job to its end in this thread.

        Raises:
            JobFailedError: the job was started and failed.
            LaunchError: it could not be started.
        """
        self._has_begun = True
        self._result = run_job(self.spec, output, self._monitor)
        return self._checked()

    def start(self, output: TextIO | None = None) -> None:
        """Run the job in a thread of its own; returns at once."""

        self._has_begun = True

        def work() -> None:
            try:
                self._result = run_job(self.spec, output, self._monitor)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=work, name=f"job-{self.name}")
        self._thread.start()

    def wait(self, timeout: float | None = None) -> JobResult:
        """Wait for the end of a job that was started by `start`, for ``timeout`` seconds at most if they are given.

        Raises what `run` raises, and `LaunchError` if the job has not ended by then; it goes on.
        """
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                raise LaunchError(f"job {self.name} has not ended within {timeout:g} s; it goes on")
        if self._error is not None:
            raise self._error
        return self._checked()

    def stop(self) -> None:
        """Ask the job to end; `wait` then raises `JobFailedError` with exit code 143."""
        self._monitor.request_stop("stop() was called")

    def status(self) -> JobStatus:
        """How the job is now; its reason is that of its failure."""
        if self._error is not None:
            return JobStatus("failed", str(self._error))
        if self._result is None:
            return JobStatus("running" if self._has_begun else "pending")
        code = self._result.exit_code
        if code == 0:
            return JobStatus("succeeded", exit_code=0)
        failure = self._result.failure
        reason = failure.reason if failure is not None else self._result.message.partition("\n")[0]
        return JobStatus("stopped" if code in _STOPPED_EXIT_CODES else "failed", reason, code)

    def logs(self, rank: int | None = None, node: int | None = None, follow: bool = False) -> Iterator[str]:
        """Lines of the job's output, the rank in front; with ``follow`` until the job has ended.

        Raises `LaunchError` for a rank or node that the job does not have.
        """
        if rank is not None and not 0 <= rank < self.spec.num_processes:
            raise LaunchError(f"rank {rank}: job {self.name} has the ranks 0..{self.spec.num_processes - 1}")
        if node not in (None, 0):
            raise LaunchError(f"node {node}: job {self.name} runs on this machine alone, node 0")
        return self._lines(range(self.spec.num_processes) if rank is None else (rank,), follow)

    def _lines(self, ranks: Sequence[int], follow: bool) -> Iterator[str]:
        places = dict.fromkeys(ranks, 0)
        while True:
            is_last = not follow or self.status().is_final
            for global_rank in ranks:
                path = self.folder.rank_log(global_rank)
                if not path.exists():
                    continue
                with open(path, encoding="utf-8", errors="replace") as file:
                    file.seek(places[global_rank])
                    while line := file.readline():
                        if not line.endswith("\n") and not is_last:
                            break  # the rest comes
                        places[global_rank] = file.tell()
                        yield f"[rank {global_rank}] {line.rstrip()}"
            if is_last:
                return
            time.sleep(_POLL_SECONDS)

    @property
    def is_running(self) -> bool:
        """Whether the thread of `start` still runs the job."""
        return self._thread is not None and self._thread.is_alive()

    def _checked(self) -> JobResult:
        if self._result is None:
            raise LaunchError(f"job {self.name} has not been run: call fit()")
        result = self._result
        if result.exit_code != 0:
            raise JobFailedError(result.message, result.exit_code, result.failure, result.folder, result.attempts)
        return result
