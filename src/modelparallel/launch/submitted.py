"""Jobs on other machines, once they are submitted: following, waiting, stopping; from any shell of the same user."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TextIO

from modelparallel.errors import LaunchError, SMPError
from modelparallel.launch.cluster_jobs import check_job
from modelparallel.launch.clusters.cluster import Cluster, JobRecord, JobStatus
from modelparallel.launch.clusters.cluster_file import kinds, make_cluster
from modelparallel.launch.clusters.description import ClusterJob
from modelparallel.launch.clusters.interrupts import written_down
from modelparallel.launch.clusters.records import find_record, read_record, record_path, write_record
from modelparallel.launch.failures import JobFailedError

logger = logging.getLogger("modelparallel.launch")

_SHORT_KINDS = {"k8s": "kubernetes"}
#: Between two questions to the engine while a job is waited for.
POLL_SECONDS = 5.0
#: In which the last lines of a job that has ended are still to come.
_LAST_LINES_SECONDS = 60.0
#: How long an engine that has answered before may be silent: a restart of its daemon, a network that is away.
SILENT_SECONDS = 600.0
STOPPED_EXIT_CODE = 143


class NotEndedError(LaunchError):
    """The job goes on, and the time to wait for it is over."""


@dataclass(frozen=True)
class SubmittedJob:
    """A job that a cluster has accepted. It goes on whatever becomes of this process."""

    cluster: Cluster
    record: JobRecord
    #: How it was asked for, if there is no record of it: `slurm:1234`.
    engine_address: str = ""

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def address(self) -> str:
        """How the commands call it: `<cluster>/<name>`; without a record of it, `<kind>:<what the engine calls it>`."""
        return self.engine_address or self.record.address

    def status(self) -> JobStatus:
        """How the job is now, as the engine says it. Local. Raises `LaunchError` if the engine cannot be asked."""
        return self.cluster.status(self.record)

    def logs(self, rank: int | None = None, node: int | None = None, follow: bool = False) -> Iterator[str]:
        """Lines of the job's output, the rank in front; of one rank or node if it is named.

        Args:
            follow: go on until the job has ended; otherwise what is there now.

        Raises `LaunchError` if the engine cannot be asked, or there is no such rank or node.
        """
        return self.cluster.logs(self.record, rank=rank, node=node, follow=follow)

    def stop(self) -> None:
        """Ask the engine to end the job. Raises `LaunchError` with the engine's text if it refuses."""
        self.cluster.stop(self.record)

    def wait(self, timeout: float | None = None, *, logs: bool = False, output: TextIO | None = None) -> JobStatus:
        """Wait for the end of the job; every change of its state is a line of ``output``.

        An interruption (Ctrl-C) ends the waiting alone: the job goes on, and the last line says how to come back.

        Args:
            timeout: seconds; None waits as long as the job takes.
            logs: show what the ranks print, too.
            output: default: stdout.

        Raises:
            JobFailedError: the job has failed or was stopped; `exit_code` is the job's own, 143 if it was stopped.
            NotEndedError: it has not ended within ``timeout``; a LaunchError.
            LaunchError: the engine has forgotten it, or has not answered for ten minutes.
        """
        screen = _Screen(output or sys.stdout)
        reader = threading.Thread(target=self._show, args=(screen,), name=f"logs-{self.name}", daemon=True)
        if logs:
            reader.start()
        try:
            status = self._followed(screen, timeout)
        except KeyboardInterrupt:
            screen.close(
                f"the wait was interrupted; job {self.address} goes on: `modelparallel attach {self.address}` comes "
                f"back to it, `modelparallel stop {self.address}` ends it"
            )
            raise
        except BaseException:
            screen.close()
            raise
        if logs:
            reader.join(_LAST_LINES_SECONDS)
            screen.close()
        if status.state == "succeeded":
            return status
        why = f": {status.reason}" if status.reason else ""
        if status.state == "unknown":
            raise LaunchError(
                f"job {self.address} ({self.record.engine_id}): {self.cluster.title} does not know how it ended{why}; "
                f"what it left: {self.record.folder or 'see the engine'}"
            )
        code = STOPPED_EXIT_CODE if status.state == "stopped" else status.exit_code or 1
        raise JobFailedError(f"job {self.address} {status.state}{why}", code, None, None)

    def _followed(self, screen: _Screen, timeout: float | None) -> JobStatus:
        deadline = None if timeout is None else time.monotonic() + timeout
        said: JobStatus | None = None
        while True:
            status = self._asked_again(screen, deadline) if said else self.status()
            if said is None or (status.state, status.reason) != (said.state, said.reason):
                screen.say(f"{self.address}: {status.state}" + (f" ({status.reason})" if status.reason else ""))
                said = status
            if status.is_final or status.state == "unknown":
                return status
            if deadline is not None and time.monotonic() >= deadline:
                raise NotEndedError(
                    f"job {self.address} has not ended within {timeout:g} s (it is {status.state}"
                    f"{': ' + status.reason if status.reason else ''}); it goes on"
                )
            left = POLL_SECONDS if deadline is None else max(0.0, deadline - time.monotonic())
            time.sleep(min(POLL_SECONDS, left))

    def _asked_again(self, screen: _Screen, deadline: float | None) -> JobStatus:
        """The status; an engine that does not answer is asked again, since the job goes on without it."""
        last = time.monotonic() + SILENT_SECONDS
        is_said = False
        while True:
            try:
                return self.status()
            except LaunchError as error:
                now = time.monotonic()
                if now >= last:
                    raise
                if deadline is not None and now >= deadline:
                    raise NotEndedError(f"job {self.address}: nobody says that it has ended: {error}") from error
                if not is_said:
                    screen.say(f"{self.address}: its state cannot be asked, and is asked again: {error}")
                    is_said = True
                time.sleep(POLL_SECONDS)

    def _show(self, screen: _Screen) -> None:
        try:
            for line in self.logs(follow=True):
                if screen.is_closed:
                    return
                screen.line(line)
        except Exception as error:  # the job is waited for all the same
            screen.say(f"its output cannot be shown: {error}")


class _Screen:
    """Whole lines of two threads."""

    def __init__(self, output: TextIO) -> None:
        self._output = output
        self._lock = threading.Lock()
        self.is_closed = False

    def close(self, text: str = "") -> None:
        """Nothing is shown after this, whatever the other thread still reads."""
        if text:
            self.say(text)
        with self._lock:
            self.is_closed = True

    def say(self, text: str) -> None:
        self.line(f"[launcher] {text}")

    def line(self, text: str) -> None:
        with self._lock:
            if not self.is_closed:
                self._output.write(text.rstrip("\n") + "\n")
                self._output.flush()


def submit_job(cluster: Cluster, job: ClusterJob) -> SubmittedJob:
    """Check the job, ask the cluster whether it can be had, submit it, and write down how it is found again.

    Raises `LaunchError` or `SMPConfigError`; then nothing was submitted. `KeyboardInterrupt`: nothing was, or the job
    has a record, and the log says how it is stopped.
    """
    check_job(cluster, job)
    _check_no_other_runs(cluster, job)
    cluster.check_access(job)
    submitted: SubmittedJob | None = None
    try:
        with written_down():
            record = cluster.submit(job)
            submitted = SubmittedJob(cluster, record, _written(record))
    except KeyboardInterrupt:
        if submitted is not None:
            logger.warning("job %s is submitted: `modelparallel stop %s` ends it", *[submitted.address] * 2)
        raise
    return submitted


def _written(record: JobRecord) -> str:
    """Keep the record; "", or how the job is found if that is not possible: it runs all the same."""
    try:
        write_record(record, os.environ)
    except (LaunchError, OSError, RuntimeError) as error:  # RuntimeError: there is no home
        logger.warning("%s", error)
        return f"{record.kind}:{record.engine_id}"
    return ""


def _check_no_other_runs(cluster: Cluster, job: ClusterJob) -> None:
    """A job of the same address, of another folder or namespace, would lose its record. Raises `LaunchError`."""
    try:
        other = read_record(record_path(cluster.title, job.name, os.environ))
        state = job_of(other).status().state
    except (OSError, ValueError, RuntimeError, SMPError):  # there is none, or nobody can say
        return
    if state in ("pending", "running"):
        raise LaunchError(
            f"job name {job.name!r} is in use: {other.address} ({other.engine_id}) was submitted from here and is "
            f"{state}: choose another name"
        )


def find_job(address: str, session: Any = None) -> SubmittedJob:
    """The job that was submitted as `<cluster>/<name>`; a name alone is enough where one job has it; or, without a
    record of it, the engine's own address: `slurm:1234`, `sagemaker:NAME`, `kubernetes:namespace/name` (or `k8s:...`).

    Args:
        session: of the cloud's SDK or of boto3, for a job of SageMaker; then the name alone is enough without a record.

    Raises `LaunchError` if there is none, or several.
    """
    kind, _, engine_id = address.partition(":")
    kind = _SHORT_KINDS.get(kind, kind)
    if engine_id and kind in kinds():
        return _adopted(kind, engine_id, session)
    try:
        record = find_record(address, os.environ)
    except LaunchError as error:
        if session is None:
            raise
        try:
            return _adopted("sagemaker", address, session)
        except LaunchError as unknown:
            raise LaunchError(f"{error}; {unknown}") from error
    return job_of(record, session)


def job_of(record: JobRecord, session: Any = None) -> SubmittedJob:
    """The job of a record. Raises `SMPConfigError` if this version does not know the record's cluster any more."""
    cluster = make_cluster(record.cluster, {"kind": record.kind, **record.settings}, f"record of {record.address}")
    return SubmittedJob(cluster.with_session(session), record)


def _adopted(kind: str, engine_id: str, session: Any) -> SubmittedJob:
    """A job of which the engine alone knows."""
    cluster = make_cluster("", {"kind": kind}, f"{kind}:{engine_id}").with_session(session)
    return SubmittedJob(cluster, cluster.adopt(engine_id), f"{kind}:{engine_id}")
