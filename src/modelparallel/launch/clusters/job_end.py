"""How a job is going, as the launcher of its first node writes it down: what is left when the engine has forgotten it.

FOLDER/status.json
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modelparallel.errors.foreign_text import finite, one_line, parse_json
from modelparallel.job.preemption import EXIT_PREEMPTED
from modelparallel.job.private_files import write_private
from modelparallel.launch.clusters.cluster import FINAL_STATES, JobStatus, State

FILE_NAME = "status.json"
FORMAT = 1
_MOST_BYTES = 1 << 20
_STATES: tuple[State, ...] = ("pending", "running", *FINAL_STATES)  # type: ignore[assignment]


@dataclass(frozen=True)
class JobEnd:
    """The state of a job, and how it came there.

    Attributes:
        exit_code: None as long as it runs.
        reason: in one line: who failed first and why, or by what it was stopped.
        failure: of the rank that failed first: `rank`, `host`, `summary`, `log`, `traceback`; None if there is none.
        started: of this start of the job, in seconds since 1970.
        updated: when this was written.
        starts: how often the engine had started the job before.
        node: the name of the host that says so.
    """

    name: str
    state: State
    exit_code: int | None = None
    reason: str = ""
    failure: Mapping[str, Any] | None = None
    started: float = 0.0
    updated: float = 0.0
    starts: int = 0
    node: str = ""

    @property
    def status(self) -> JobStatus:
        """As commands show it."""
        return JobStatus(self.state, self.reason, self.exit_code)


def state_of(exit_code: int) -> State:
    """What an exit code of the launcher says; a job that was preempted waits for being started again."""
    if exit_code == 0:
        return "succeeded"
    if exit_code == EXIT_PREEMPTED:
        return "pending"
    return "stopped" if exit_code in (130, 143) else "failed"


def write_job_end(folder: Path, end: JobEnd) -> None:
    """Write the file whole: others may look at any moment. Raises OSError."""
    path = folder / FILE_NAME
    partial = path.with_name(f".{FILE_NAME}.partial")
    content = {"format": FORMAT, **asdict(end), "updated": time.time()}
    try:
        write_private(partial, json.dumps(content, indent=2, default=str) + "\n")
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def read_job_end(folder: Path) -> JobEnd | None:
    """What was written last; None if there is nothing, or nothing that can be read."""
    try:
        with open(folder / FILE_NAME, "rb") as file:
            return job_end_of(file.read(_MOST_BYTES))
    except OSError:
        return None


def job_end_of(content: bytes) -> JobEnd | None:
    """What a file holds; None for what cannot have been written here."""
    try:
        values = parse_json(content)
        if values.get("format") != FORMAT or values["state"] not in _STATES:
            return None
        code, failure = values.get("exit_code"), values.get("failure")
        return JobEnd(
            one_line(values["name"]),
            values["state"],
            None if code is None else int(code),
            one_line(values.get("reason", "")),
            failure if isinstance(failure, dict) else None,
            finite(values.get("started", 0.0), "started"),
            finite(values.get("updated", 0.0), "updated"),
            int(values.get("starts", 0)),
            one_line(values.get("node", "")),
        )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return None
