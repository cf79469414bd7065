"""Running a job on this machine: folder, environment, backend, supervision, outcome."""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, TextIO

from modelparallel.errors import LaunchError
from modelparallel.job.preemption import EXIT_PREEMPTED
from modelparallel.job.private_files import write_private
from modelparallel.job.rendezvous import STORE_VARIABLE
from modelparallel.launch.attempts import Attempt, Start, history, next_start, write_attempts
from modelparallel.launch.devices import device_names, working_devices
from modelparallel.launch.environment import job_environment, resource_config
from modelparallel.launch.failures import Candidate, JobInterrupted, failed_ends, first_candidate, was_preempted
from modelparallel.launch.fetched_channels import fetched_channels
from modelparallel.launch.folder import checked_job_name
from modelparallel.launch.memory_summary import memory_summary
from modelparallel.launch.node_place import port_of
from modelparallel.launch.processes import end_leftovers, guarded
from modelparallel.launch.rendezvous_port import reserved_port, store_file
from modelparallel.launch.signals import asked_by_signal, ended_by_signal
from modelparallel.launch.spec import JobResult, JobSpec, check_script
from modelparallel.launch.supervision import RankMonitor

logger = logging.getLogger("modelparallel.launch")

#: Exit code of a job that ran longer than its timeout, as coreutils' `timeout` has it.
TIMEOUT_EXIT_CODE = 124
#: Seconds that helpers of the script (data loader workers, ...) have to end after it succeeded.
LEFTOVER_SECONDS = 2.0
#: Seconds that the killed processes of a failed attempt have to be gone before the next one starts.
LEAVE_SECONDS = 30.0


def run_job(job: JobSpec, output: TextIO | None = None, monitor: RankMonitor | None = None) -> JobResult:
    """Run the job to its end and say how it ended; failures of the script are in the result.

    After a failure all processes are ended and started again, up to `job.max_restarts` times; not after a timeout, a
    signal to this process, or `monitor.request_stop`.

    Args:
        job: what to run.
        output: where the output of the processes goes, each line prefixed by its rank; None: stdout.
        monitor: watches the ranks, and can be asked from another thread to stop the job.

    Raises:
        LaunchError: the job could not be started.
    """
    check_script(job.script)
    checked_job_name(job.name)
    folder = job.folder
    with ExitStack() as stack:
        job, channels = stack.enter_context(fetched_channels(job, output or sys.stdout))
        stack.enter_context(folder.held())
        stack.enter_context(guarded(folder.description))
        folder.prepare(job.source_dir, channels, job.checkpoints)
        monitor = monitor or RankMonitor()
        monitor.attach(folder, output or sys.stdout, job.timeout)
        stack.callback(monitor.detach)
        stack.enter_context(asked_by_signal(monitor))
        monitor.say(_opening_line(job))
        for line in notices(job):
            monitor.say(line)
        started = time.monotonic()
        result, attempts = _run_attempts(job, monitor)
        return concluded(job, result, attempts, time.monotonic() - started, monitor)


def concluded(
    job: JobSpec, result: JobResult, attempts: Sequence[Attempt], seconds: float, monitor: RankMonitor
) -> JobResult:
    """The result of all attempts from that of the last one; says how the job ended."""
    folder, message = job.folder, result.message
    with monitor.spare_files():
        if len(attempts) > 1:
            # The traceback stays the last thing that is shown.
            how = "was preempted" if result.is_preempted else "was stopped" if result.is_stopped else "failed"
            message = (
                f"job {job.name} {how} in attempt {len(attempts)} of "
                f"{job.max_restarts + 1}, after {seconds:.1f} s:\n"
                f"{history(attempts, folder)}\n{message}"
            )
        if result.exit_code == 0:
            for line in memory_summary(folder):
                monitor.say(line)
            restarts = f", in attempt {len(attempts)} of {job.max_restarts + 1}" if len(attempts) > 1 else ""
            monitor.say(f"job {job.name} finished in {seconds:.1f} s{restarts}")
            message = ""
        elif not result.is_preempted:
            try:
                write_private(folder.failure_file, message.encode(errors="backslashreplace").decode() + "\n")
            except OSError as error:  # the caller has the message
                monitor.say(f"{folder.failure_file} cannot be written: {error.strerror}")
    return replace(result, seconds=seconds, message=message, attempts=tuple(attempts))


def _run_attempts(job: JobSpec, monitor: RankMonitor) -> tuple[JobResult, list[Attempt]]:
    """Start the job until it succeeds, must not be started again, or was started often enough: the last result."""
    attempts: list[Attempt] = []
    while True:
        result, attempt = _run_attempt(job, monitor, len(attempts) + 1)
        attempts.append(attempt)
        if job.max_restarts:
            write_attempts(job.folder, attempts)
        is_over = result.exit_code == 0 or result.is_stopped or monitor.stop_reason is not None
        if is_over or len(attempts) > job.max_restarts:
            return result, attempts
        try:
            job = _prepare_restart(job, monitor, attempts)
        except LaunchError as error:
            return replace(result, message=f"{error}\n{result.message}"), attempts
        except KeyboardInterrupt:
            message = f"job {job.name} was stopped by SIGINT before attempt {len(attempts) + 1}"
            return replace(result, exit_code=128 + signal.SIGINT, failure=None, message=message), attempts


def _prepare_restart(job: JobSpec, monitor: RankMonitor, attempts: list[Attempt]) -> JobSpec:
    """What to start next. Raises `LaunchError` if there is nothing that can be."""
    start = possible_start(job, (job.num_processes, *job.fewer_processes), attempts)
    job.folder.put_aside(len(attempts))
    last = attempts[-1]
    monitor.say(f"attempt {len(attempts) + 1} of {job.max_restarts + 1} after: {last.reason}")
    if start.why:
        devices = "" if start.devices is None else f" on devices {', '.join(start.devices)}"
        monitor.say(f"{start.num_processes} processes{devices} (there were {last.num_processes}): {start.why}")
    fewer = tuple(count for count in job.fewer_processes if count < start.num_processes)
    return replace(job, num_processes=start.num_processes, fewer_processes=fewer, devices=start.devices)


def possible_start(job: JobSpec, counts: Sequence[int], attempts: Sequence[Attempt]) -> Start:
    """What this host can start after the attempts, once nothing of the last one is left.

    Raises `LaunchError` if something cannot be ended, or too few devices work.
    """
    if num_left := end_leftovers(job.folder.description, patience=LEAVE_SECONDS):
        raise LaunchError(
            f"{num_left} processes of attempt {len(attempts)} cannot be ended within {LEAVE_SECONDS:g} s (they hang in "
            "the system, as after a fault of a device or a file server): the job is not started again beside them"
        )
    names: tuple[str, ...] = ()
    working: tuple[str, ...] = ()
    is_here = not job.hosts.sizes  # devices of other hosts are not asked
    if (
        is_here and job.device == "cuda" and (job.parameters or {}).get("ddp_dist_backend") != "gloo"
    ):  # which lets them share
        surroundings = {**os.environ, **job.environment}
        names, working = device_names(surroundings), working_devices(surroundings)
    return next_start(counts, attempts, names, working)


def _run_attempt(job: JobSpec, monitor: RankMonitor, number: int) -> tuple[JobResult, Attempt]:
    folder, moment, started = job.folder, time.time(), time.monotonic()
    folder.store.unlink(missing_ok=True)
    preferred = port_of(job.name) if job.hosts.sizes else job.preferred_port
    with reserved_port(preferred) as port, store_file(folder.store) as store:
        describe(job)
        environment = job_environment(job, port, restart_count=number - 1)
        if not job.hosts.sizes:
            environment[STORE_VARIABLE] = f"{port}:{store}"
        monitor.start(job.ranks)
        ended = run_processes(job, monitor, lambda: _run_backend(job, environment, port, monitor))
    seconds = time.monotonic() - started
    result = _outcome(job, ended, seconds)
    first_rank = None if result.failure is None else result.failure.global_rank
    reason = result.message if result.failure is None else result.failure.reason
    attempt = Attempt(number, job.num_processes, moment, seconds, result.exit_code, first_rank, reason, job.devices)
    return result, attempt


@dataclass(frozen=True)
class ProcessesEnded:
    """How the processes of this host ended: with which exit code of the job (EXIT_PREEMPTED if their script has left
    for that); why they were stopped from outside, if they were; which of them failed first.
    """

    exit_code: int
    stop: str = ""
    first: Candidate | None = None
    is_by_signal: bool = False

    def stop_text(self, seconds: float) -> str:
        """How it was stopped, to follow "was stopped"."""
        after = f"after {seconds:.1f} s"
        return f"by {self.stop} {after}" if self.is_by_signal else f"{after}: {self.stop}"


def run_processes(
    job: JobSpec, monitor: RankMonitor, backend: Callable[[], tuple[int, dict[int, int]]]
) -> ProcessesEnded:
    """Let a backend run the processes of this host, which `monitor` follows already, until nothing of them is left."""
    interrupted: JobInterrupted | None = None
    exit_codes: dict[int, int] = {}
    code = 1
    try:
        code, exit_codes = backend()
    except JobInterrupted as interruption:
        interrupted = interruption
    finally:
        with monitor.spare_files():
            end_leftovers(job.folder.description, patience=LEFTOVER_SECONDS if code == 0 else 0.0)
        monitor.finish()
    if interrupted is not None:
        return ProcessesEnded(128 + interrupted.signal, interrupted.signal.name, is_by_signal=True)
    preempted = ProcessesEnded(EXIT_PREEMPTED)
    has_left = was_preempted(job.folder, job.ranks)
    if monitor.stop_reason is not None and not (code == 0 and has_left):
        return ProcessesEnded(TIMEOUT_EXIT_CODE if monitor.has_timed_out else 143, monitor.stop_reason)
    exit_codes = {**exit_codes, **monitor.exit_codes}
    with monitor.spare_files():
        if code != 0 and all(job.folder.finished_file(rank).exists() for rank in job.ranks):
            # The end of a process may go wrong when its work is done; what the others did then, too.
            for line in failed_ends(exit_codes):
                monitor.say(line)
            code = 0
        if code == 0:
            return preempted if has_left else ProcessesEnded(0)
        first = first_candidate(job.folder, monitor.deaths, exit_codes, job.ranks)
    if first is not None and first.failure.process_exit_code == EXIT_PREEMPTED:  # a script that leaves by os._exit
        return preempted
    return ProcessesEnded(code, first=first)


def _run_backend(
    job: JobSpec, environment: Mapping[str, str], port: int, monitor: RankMonitor
) -> tuple[int, dict[int, int]]:
    if job.backend == "mpi":
        from modelparallel.launch import mpi_backend

        with ended_by_signal(monitor):
            return mpi_backend.run(job, environment, monitor)
    from modelparallel.launch import agent_meeting, elastic_backend  # import torch's agent, which takes a second

    meeting = agent_meeting.local_meeting(job.name, job.hosts.address, port)
    with ended_by_signal(monitor):
        return elastic_backend.run(job, environment, meeting)


def describe(job: JobSpec, clock_ahead: float = 0.0) -> None:
    """Write what the bootstrap in each process needs, and the configuration files of the toolkit.

    ``clock_ahead``: of several hosts, how far the clock of this one is ahead of that of node 0.
    """
    folder = job.folder
    description: dict[str, Any] = {
        "name": job.name,
        "device": job.device,
        "num_devices": job.num_processes,
        "source_dir": str(job.source_dir),
        "working_directory": str(job.working_directory),
        "logs": str(folder.logs),
        "status": str(folder.status),
        "launcher": os.getpid(),
    }
    if job.hosts.sizes:
        description |= {"first_rank": job.hosts.first_rank, "host": job.hosts.name, "clock_ahead": clock_ahead}
    if job.hosts.sizes and job.backend == "mpi":
        # A rank finds its host by its number: mpirun gives the same environment to all.
        description |= {"host": "", "hosts": list(zip(job.hosts.names, job.hosts.sizes, strict=True))}
    write_private(folder.description, json.dumps(description, indent=2) + "\n")
    folder.write_input_config("hyperparameters", job.hyperparameters)
    folder.write_input_config("resourceconfig", resource_config(job))
    folder.write_input_config("inputdataconfig", {name: {"TrainingInputMode": "File"} for name in job.channels})


def _opening_line(job: JobSpec) -> str:
    processes = f"{job.num_processes} process" + ("es" if job.num_processes > 1 else "")
    pairs = zip(job.hosts.names, job.hosts.sizes, strict=True) if job.hosts.sizes else ()
    hosts = f" ({', '.join(f'{size} on {name}' for name, size in pairs)})" if job.hosts.sizes else ""
    return f"job {job.name}: {processes}{hosts} by {job.backend} on {job.device}; folder {job.folder.root}"


def notices(job: JobSpec) -> list[str]:
    lines = []
    if job.device == "cpu":
        lines.append(
            "rehearsal on the CPU: the CUDA calls of the script are mapped to the CPU, libraries see no GPU "
            "(docs/rehearsal.md)"
        )
    if job.backend == "elastic" and job.custom_mpi_options.strip():
        lines.append(
            "mpi options are accepted; torch elastic starts the processes and has no use for the options of mpirun "
            "other than -x and --NCCL_DEBUG (use --backend mpi, backend='mpi' or MODELPARALLEL_BACKEND=mpi for mpirun)"
        )
    return lines


def _outcome(job: JobSpec, ended: ProcessesEnded, seconds: float) -> JobResult:
    if ended.stop:
        message = f"job {job.name} was stopped {ended.stop_text(seconds)}"
        return JobResult(ended.exit_code, seconds, job.folder, message=message, is_stopped=True)
    if ended.exit_code == 0:
        return JobResult(0, seconds, job.folder)
    if ended.exit_code == EXIT_PREEMPTED and ended.first is None:
        message = preempted_message(job.name, seconds)
        return JobResult(EXIT_PREEMPTED, seconds, job.folder, message=message, is_stopped=True)
    if ended.first is None:
        message = f"job {job.name} failed (exit code {ended.exit_code}); see {job.folder.logs}"
        return JobResult(ended.exit_code, seconds, job.folder, message=message)
    failure = ended.first.failure
    exit_code = failure.process_exit_code or ended.exit_code or 1
    return JobResult(exit_code, seconds, job.folder, failure, failure.render(job.num_processes, seconds))


def preempted_message(name: str, seconds: float) -> str:
    """What is said of a job whose script has saved its state and left."""
    return (
        f"job {name} was preempted after {seconds:.1f} s: its script has left with exit code {EXIT_PREEMPTED}, and "
        "goes on when the job is started again"
    )
