"""Restarts: what is kept of the attempts of a job; with how many processes, on which devices, the next one starts.

[Note: attempts] A job that may restart is a row of attempts. Each has an agent of torch elastic (or an mpirun) of its
own, a new rendezvous at a port that is free then, and empty logs; before it starts, every process of the one before is
gone. The agent's own restarts are not used: they keep the number of processes and the environment, and leave helpers of
the dead ranks (data loader workers) running beside the new ones.

Between two attempts the files of the first are put aside: `attempts/1/{logs,status,events}`. `attempts/1` then looks
like a job folder, so that `modelparallel explain` reads it as one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from modelparallel.errors import LaunchError
from modelparallel.errors.foreign_text import finite, natural, one_line, parse_json
from modelparallel.job.private_files import write_private

if TYPE_CHECKING:
    from modelparallel.launch.folder import JobFolder

#: How often the job was started before, 0 at first: for the script. On the elastic backend torch's own variable,
#: TORCHELASTIC_RESTART_COUNT, has the same number.
RESTART_COUNT_VARIABLE = "MODELPARALLEL_RESTART_COUNT"
MAX_RESTARTS_VARIABLE = "MODELPARALLEL_MAX_RESTARTS"


_MOST = 10**6


@dataclass(frozen=True)
class Attempt:
    """One start of all processes of a job, and how it ended.

    `number` counts from 1. `started` is in seconds since 1970. `first_rank` failed first; None if that is not known, or
    nothing failed. `reason` is "" after success. `devices` are those of the local ranks in order, None for the
    launcher's own.
    """

    number: int
    num_processes: int
    started: float
    seconds: float
    exit_code: int
    first_rank: int | None = None
    reason: str = ""
    devices: tuple[str, ...] | None = None

    def __str__(self) -> str:
        processes = f"{self.num_processes} process" + ("es" if self.num_processes > 1 else "")
        moment = datetime.fromtimestamp(self.started)
        end = self.reason or ("succeeded" if self.exit_code == 0 else f"exit code {self.exit_code}")
        return f"attempt {self.number} ({processes}, {moment:%H:%M:%S}, {self.seconds:.1f} s): {end}"


@dataclass(frozen=True)
class Start:
    """What an attempt starts: how many processes, on which devices (None: the launcher's own, in order), and why these
    are others than before ("" if they are not).
    """

    num_processes: int
    devices: tuple[str, ...] | None = None
    why: str = ""


def next_start(
    counts: Sequence[int], attempts: Sequence[Attempt], names: Sequence[str], working: Sequence[str]
) -> Start:
    """With what the next attempt starts: as many processes as before, or fewer.

    Fewer, if devices are lost; and if the same rank failed first in two attempts in a row with the same number of
    processes, since then its device or the memory of this host is likely to be the cause. In the latter case its device
    is the one that is left out. If no smaller number fits, the same one is tried again. A job never grows again.

    Args:
        counts: the numbers of processes that the model can have, the largest first.
        attempts: the attempts so far, at least one, all failed.
        names: the devices of this host; empty for the CPU.
        working: the devices among ``names`` that answer.

    Raises `LaunchError` if too few devices are left for the least number of processes.
    """
    last = attempts[-1]
    used = last.devices or tuple(names[: last.num_processes])
    # Those in use first, so that each rank keeps its device where it can.
    usable = [name for name in used if name in working] + [name for name in working if name not in used]
    limit = min(last.num_processes, len(usable)) if names else last.num_processes
    fitting = [count for count in counts if count <= limit]
    if not fitting:
        raise LaunchError(
            f"{len(usable)} of {len(names)} devices work ({', '.join(usable) or 'none'}), and the job needs "
            f"{min(counts)}: it is not started again"
        )
    num_processes, why = fitting[0], f"{len(usable)} of {len(names)} devices work"
    if _is_repeated(attempts) and num_processes == last.num_processes:
        rank, why = last.first_rank, f"rank {last.first_rank} failed first twice in a row"
        num_processes = fitting[1] if len(fitting) > 1 else num_processes
        if rank is not None and num_processes < len(usable) and used[rank] in usable:
            usable.append(usable.pop(usable.index(used[rank])))
    devices = tuple(usable[:num_processes])
    if num_processes == last.num_processes and devices == used:
        why = ""
    return Start(num_processes, None if devices == tuple(names[:num_processes]) else devices, why)


def _is_repeated(attempts: Sequence[Attempt]) -> bool:
    if len(attempts) < 2:
        return False
    before, last = attempts[-2:]
    return last.first_rank is not None and (before.first_rank, before.num_processes, before.devices) == (
        last.first_rank,
        last.num_processes,
        last.devices,
    )


def history(attempts: Sequence[Attempt], folder: JobFolder) -> str:
    """A line for each attempt, with where its logs are."""
    lines = []
    for attempt in attempts:
        is_last = attempt is attempts[-1]
        logs = folder.logs if is_last else folder.attempt(attempt.number).logs
        lines.append(f"  {attempt}; logs: {logs}")
    return "\n".join(lines)


def write_attempts(folder: JobFolder, attempts: Sequence[Attempt]) -> None:
    """Keep the attempts in attempts/attempts.json, whole: others may look at any moment."""
    path = folder.attempts_file
    path.parent.mkdir(mode=0o700, exist_ok=True)
    partial = path.with_suffix(".partial")
    write_private(partial, json.dumps([asdict(attempt) for attempt in attempts], indent=2) + "\n")
    partial.replace(path)


def read_attempts(folder: JobFolder) -> tuple[Attempt, ...]:
    """The attempts of the job in the folder, those that can be read; empty if it may not restart."""
    try:
        records = parse_json(folder.attempts_file.read_bytes())
    except (OSError, ValueError):
        return ()
    attempts = (_attempt_of(record) for record in (records if isinstance(records, list) else ()))
    return tuple(attempt for attempt in attempts if attempt is not None)


def _attempt_of(record: Any) -> Attempt | None:
    """What was written down; None for what cannot have been."""
    try:
        devices, first_rank = record.get("devices"), record.get("first_rank")
        moment = finite(record["started"], "the start")
        datetime.fromtimestamp(moment)
        return Attempt(
            natural(record["number"], "the attempt", _MOST),
            natural(record["num_processes"], "the number of processes", _MOST),
            moment,
            finite(record["seconds"], "the time"),
            int(record["exit_code"]),
            None if first_rank is None else natural(first_rank, "the rank", _MOST),
            one_line(record.get("reason", "")),
            None if devices is None else tuple(map(one_line, devices)),
        )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, OSError):
        return None
