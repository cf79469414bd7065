"""Which process of a job failed first, and what the user is shown of it.

When one process fails, the others fail after it: their messages are refused ("Connection closed by peer") or they are
stopped by the launcher. What the user has to see is the first one. Each process writes its own exception with a time;
a process that could not (killed, os._exit) is known by the time of its death.
"""

import json
import re
import signal
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from modelparallel.errors import LaunchError
from modelparallel.launch.attempts import Attempt
from modelparallel.launch.folder import JobFolder
from modelparallel.launch.supervision import GRACE

#: A process that was killed counts as dead this long before its death was seen: its peers report the broken connection
#: within milliseconds, and must not come first.
_DEATH_LEAD = 0.5

_CONSEQUENCE = re.compile(
    r"Connection (closed|reset) by peer|the connection (failed|is gone)|Broken pipe|connectFullMesh|Connection refused|"
    r"remote process exited or there was a network error|NCCL communicator was aborted",
    re.IGNORECASE,
)
_TAIL_LINES = 15


class JobInterrupted(Exception):
    """The launcher was told by a signal to stop."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signal_number).name}")
        self.signal = signal.Signals(signal_number)


@dataclass(frozen=True)
class RankFailure:
    """The first failing process. `exit_code` is negative for a signal, None if the process did not say and nobody else
    saw it; `detail` is its traceback, or the last lines that it printed; `host` is "" for a job of one machine.
    """

    global_rank: int
    exit_code: int | None
    summary: str
    detail: str
    log: Path
    host: str = ""

    @property
    def process_exit_code(self) -> int | None:
        """The exit code as a shell gives it: 128 + signal number for a process ended by a signal."""
        if self.exit_code is None or self.exit_code >= 0:
            return self.exit_code
        return 128 - self.exit_code

    @property
    def reason(self) -> str:
        """Who failed and why, in one line: `rank 1 was killed by SIGKILL`."""
        summary = self.summary.removeprefix("it ")
        on_host = f" on {self.host}" if self.host else ""
        return f"rank {self.global_rank}{on_host}{': ' if summary == self.summary else ' '}{summary}"

    def render(self, num_processes: int, seconds: float) -> str:
        """The text for the user: who, where the log is, and last the traceback."""
        on_host = f" on {self.host}" if self.host else ""
        head = (
            f"rank {self.global_rank} of {num_processes}{on_host} failed first, after {seconds:.1f} s: {self.summary}\n"
            f"its log{on_host}: {self.log}"
        )
        return f"{head}\n\n{self.detail.rstrip()}" if self.detail.strip() else head


class JobFailedError(LaunchError):
    """A job was started and did not succeed. `exit_code`, `failure` (or None), `folder` (None of a job on a cluster)
    and `attempts` say more.
    """

    def __init__(
        self,
        message: str,
        exit_code: int,
        failure: RankFailure | None,
        folder: JobFolder | None,
        attempts: tuple[Attempt, ...] = (),
    ) -> None:
        super().__init__(message)
        self.attempts = attempts
        self.exit_code = exit_code
        self.failure = failure
        self.folder = folder


@dataclass(frozen=True)
class Candidate:
    """A process that failed, and when (seconds since 1970); not the first one if its failure follows from another's."""

    is_consequence: bool
    time: float
    failure: RankFailure


def first_candidate(
    folder: JobFolder, deaths: Mapping[int, float], exit_codes: Mapping[int, int], ranks: Iterable[int]
) -> Candidate | None:
    """The process of this host that failed first, or None.

    Args:
        deaths: time at which each process was seen to be gone.
        exit_codes: exit code of each process, where it is known; negative for a signal.
    """
    candidates = []
    for global_rank in ranks:
        candidate = _recorded(folder, global_rank, exit_codes.get(global_rank)) or _unrecorded(
            folder, global_rank, deaths.get(global_rank), exit_codes.get(global_rank)
        )
        if candidate is not None:
            candidates.append(candidate)
    if not candidates:
        return None
    # What is killed so long after a failure was killed by the launcher: it was stopped, or did not want to end.
    end_of_grace = min(candidate.time for candidate in candidates) + GRACE - _DEATH_LEAD

    def order(candidate: Candidate) -> tuple[bool, float]:
        is_ended = candidate.failure.exit_code == -signal.SIGKILL and candidate.time >= end_of_grace
        return candidate.is_consequence or is_ended, candidate.time

    return min(candidates, key=order)


def was_preempted(folder: JobFolder, ranks: Iterable[int]) -> bool:
    """Whether a rank has left because of a preemption, of a job whose processes have all finished."""
    for global_rank in ranks:
        with suppress(OSError, ValueError):
            record = json.loads(folder.finished_file(global_rank).read_text(encoding="utf-8"))
            if isinstance(record, dict) and record.get("is_preempted"):
                return True
    return False


def failed_ends(exit_codes: Mapping[int, int]) -> list[str]:
    """Warnings for a job whose processes have all done their work, and some of which did not end well."""
    lines = []
    for global_rank, code in sorted(exit_codes.items()):
        if code:
            how = f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
            lines.append(f"warning: rank {global_rank} {how} after its script had finished; it counts as finished")
    return lines


def _recorded(folder: JobFolder, global_rank: int, exit_code: int | None) -> Candidate | None:
    """A process that wrote down its exception."""
    try:
        record = json.loads(folder.error_file(global_rank).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    failure = RankFailure(
        global_rank, record["exit_code"], record["summary"], record["traceback"], folder.rank_log(global_rank)
    )
    # The text of the last exception alone decides: a traceback may name a connection on its way.
    is_consequence = bool(_CONSEQUENCE.search(record["summary"])) or record["is_interrupt"]
    return Candidate(is_consequence, record["time"], failure)


def _unrecorded(folder: JobFolder, global_rank: int, death: float | None, exit_code: int | None) -> Candidate | None:
    """A process that ended without a word: killed, or left by os._exit, or never reached the bootstrap."""
    if exit_code == 0 or (exit_code is None and death is None):
        return None
    has_finished = folder.finished_file(global_rank).exists()
    if has_finished and exit_code is None:
        return None
    log = folder.rank_log(global_rank)
    detail = ""
    if not folder.started_file(global_rank).exists():
        summary = f"it ended with exit code {exit_code} before the script was started"
        log, detail = folder.mpirun_log, _tail(folder.mpirun_log)
    elif exit_code is not None and exit_code < 0:
        name = _signal_name(-exit_code)
        summary = f"it was killed by {name}"
        if name == "SIGKILL":
            summary += " (by hand, or by the kernel because memory ran out)"
        # A crash in native code leaves a stack in the log (faulthandler); what a killed process printed is no reason.
        detail = _tail(log) if name in ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL") else ""
    else:
        summary = "it ended without an exception" + (f" (exit code {exit_code})" if exit_code is not None else "")
        detail = _tail(log)
    if has_finished:
        summary += ", after the script had finished"
    # SIGTERM is what the launcher itself sends to those that are still alive after a failure; and mpirun tells the exit
    # code of the process that failed first only.
    is_consequence = exit_code in (None, -signal.SIGTERM, -signal.SIGINT)
    time = (death if death is not None else float("inf")) - _DEATH_LEAD
    return Candidate(is_consequence, time, RankFailure(global_rank, exit_code, summary, detail, log))


def _tail(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return "\n".join(["last lines of its log:", *lines[-_TAIL_LINES:]]) if lines else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
