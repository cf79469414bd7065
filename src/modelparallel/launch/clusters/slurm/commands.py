"""Slurm's own commands, and what their answers mean."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence

from modelparallel.errors import LaunchError
from modelparallel.launch.clusters.cluster import JobStatus, State

#: Slurm's daemon answers in milliseconds, or is overloaded for a minute.
_SECONDS = 120.0
_STATES: dict[str, State] = {
    **dict.fromkeys(("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD"), "pending"),
    **dict.fromkeys(("SPECIAL_EXIT",), "pending"),
    **dict.fromkeys(("RUNNING", "COMPLETING", "SUSPENDED", "STAGE_OUT", "RESIZING", "SIGNALING", "STOPPED"), "running"),
    "COMPLETED": "succeeded",
    **dict.fromkeys(("CANCELLED", "REVOKED"), "stopped"),
}
#: As `modelparallel run` has them: what `timeout` of coreutils says, and 128 + the signal that ended the job.
_EXIT_CODES = {"TIMEOUT": 124, "CANCELLED": 143, "OUT_OF_MEMORY": 137}
_OF_OTHER_JOBS = ("SLURM_", "SLURMD_", "PMI", "OMPI_")
_UNKNOWN_JOB = re.compile(r"Invalid job id", re.IGNORECASE)


class UnknownJobError(LaunchError):
    """Slurm has forgotten the job, or never knew it."""


def check_tools(names: Iterable[str]) -> None:
    """Raise `LaunchError` unless the commands are on PATH."""
    missing = [name for name in names if shutil.which(name) is None]
    if missing:
        raise LaunchError(
            f"{', '.join(missing)} not found on PATH: jobs are submitted to Slurm by its own commands: run this on a "
            "login node of the cluster, or install its slurm-client; --dry-run works without"
        )


def ask(command: Sequence[str], environ: Mapping[str, str] | None = None, seconds: float = _SECONDS) -> str:
    """The output of a command. Raises `LaunchError` with all that it said if it fails, or takes too long."""
    shown = shlex.join(command)
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=seconds,
            start_new_session=True,  # Ctrl-C is for this process, which decides
            env=None if environ is None else dict(environ),
        )
    except OSError as error:
        raise LaunchError(f"{shown}: cannot be run: {error.strerror}: is this a login node of the cluster?") from error
    except subprocess.TimeoutExpired as error:
        raise LaunchError(
            f"{shown}: Slurm did not answer within {seconds:g} s: its daemon (slurmctld) is down, overloaded, or "
            "cannot be reached from here; try `sinfo`"
        ) from error
    if done.returncode != 0:
        said = (done.stderr.strip() + "\n" + done.stdout.strip()).strip()
        kind = UnknownJobError if _UNKNOWN_JOB.search(said) else LaunchError
        raise kind(f"{shown}: exit code {done.returncode}: {said}")
    return done.stdout


def outer_variables(environ: Mapping[str, str], without: Iterable[str]) -> dict[str, str]:
    """What sbatch hands on to the job: the environment, without what belongs to another job or launcher, and without
    the names given. In a job of its own (a terminal on a node) the variables of that one would decide for this one.
    """
    kept, left_out = {"SLURM_CONF", "SLURM_CLUSTERS"}, set(without)
    return {
        name: value
        for name, value in environ.items()
        if name not in left_out and (name in kept or not name.startswith(_OF_OTHER_JOBS))
    }


def known_status(engine_id: str) -> JobStatus | None:
    """What the daemon knows of the job; None if it has forgotten it."""
    try:
        text = ask(["scontrol", "show", "job", "--oneliner", engine_id])
    except UnknownJobError:
        return None
    values = dict(re.findall(r"(\w+)=(\S*)", text))
    reason = values.get("Reason", "")
    history = [f"submitted {values['SubmitTime']}"] if "SubmitTime" in values else []
    if values.get("Restarts", "0") != "0":
        history.append(f"requeued {values['Restarts']} times")
    for what, key in (("started", "StartTime"), ("ended", "EndTime")):
        if values.get(key, "Unknown") != "Unknown" and values.get("JobState") != "PENDING":
            history.append(f"{what} {values[key]}" + (f" on {values.get('NodeList')}" if what == "started" else ""))
    if values.get("JobState") in ("RUNNING", "COMPLETING"):
        history = history[:-1] if history and history[-1].startswith("ended") else history
    return status_of(values.get("JobState", ""), reason, values.get("ExitCode", ""), history)


def accounted_status(engine_id: str) -> JobStatus | None:
    """What the accounting of the cluster has kept; None where there is none, or no such job."""
    if shutil.which("sacct") is None:
        return None
    columns = "State,ExitCode,Reason"
    try:
        text = ask(["sacct", "--jobs", engine_id, "--allocations", "--noheader", "--parsable2", f"--format={columns}"])
    except LaunchError:  # clusters without accounting say so by an exit code
        return None
    lines = text.strip().splitlines()
    if not lines:
        return None
    state, exit_code, reason, *_ = (*lines[-1].split("|"), "", "")
    return status_of(state.split()[0] if state else "", reason, exit_code)


def status_of(state: str, reason: str, exit_code: str, history: Sequence[str] = ()) -> JobStatus:
    """Slurm's words as a status. `exit_code`: `code:signal`."""
    ours = _STATES.get(state, "failed" if state else "unknown")
    reason = "" if reason in ("None", "(null)") else reason
    if ours not in ("succeeded", "failed", "stopped"):
        return JobStatus(ours, reason if ours == "pending" else "", history=tuple(history))
    code, _, signal_number = exit_code.partition(":")
    number = int(code) if code.isdigit() else None
    if not number and signal_number.isdigit() and int(signal_number):
        number = 128 + int(signal_number)
    if ours != "succeeded":
        number = number if number and state not in _EXIT_CODES else _EXIT_CODES.get(state, number or 1)
        words = [state, *([reason] if reason and reason.lower() != state.replace("_", "").lower() else [])]
        reason = ": ".join(words)
    return JobStatus(ours, reason, number, tuple(history))
