"""What a rank writes down when a step fails, or when it ends: `rank<global rank>.jsonl`, one record a line.

`modelparallel explain` makes one story of the files of a job. The records, by "kind":

    rank    who writes: global_rank, pp_rank, pipeline (the global ranks of its stages), call (of step functions, from
            1), time
    event   microbatch, number, text, line, time
    wait    what the failed step waited for: source (a pp_rank), microbatch, what, line, seconds
    peer    what another stage said last about where it stands: pp_rank, text
    error   type, text, line (the innermost one of the user's code), time
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelparallel.comm.event_log import as_records, line_of_error, user_code_line
from modelparallel.comm.stages.transport import StageTransport
from modelparallel.errors import SMPConfigError

logger = logging.getLogger("modelparallel")

#: The directory of the files; the launcher sets it. Nothing is written without it.
DIRECTORY_VARIABLE = "SMP_EVENT_DIR"
#: "error" (the default): when a step fails; "exit": at the end of the process, too; "off".
WHEN_VARIABLE = "SMP_EVENTS"
_EVENTS_OF_A_MICROBATCH = 50


@dataclass(frozen=True)
class EventFile:
    """The file of one rank. ``is_written_at_exit``: also if nothing failed."""

    path: Path
    is_written_at_exit: bool

    @property
    def memory_path(self) -> Path:
        """The file beside it for the memory of the rank, see ``memory_use.note_update``."""
        return self.path.with_suffix(".memory.json")

    @staticmethod
    def from_environment(global_rank: int, environ: Mapping[str, str] | None = None) -> EventFile | None:
        """What the variables ask for; None for nothing. Raises SMPConfigError for a value that is not known."""
        environ = os.environ if environ is None else environ
        when = environ.get(WHEN_VARIABLE, "error")
        if when not in ("error", "exit", "off"):
            raise SMPConfigError(
                f"environment variable {WHEN_VARIABLE}: must be one of 'error', 'exit', 'off', got {when!r}"
            )
        directory = environ.get(DIRECTORY_VARIABLE, "")
        if not directory or when == "off":
            return None
        return EventFile(Path(directory) / f"rank{global_rank}.jsonl", when == "exit")

    def write(
        self,
        global_rank: int,
        pipeline: Sequence[int],
        num_calls: int,
        transport: StageTransport | None,
        error: BaseException | None,
    ) -> None:
        """Write everything anew. That it cannot be written is only logged: the step may have failed already."""
        head = {
            "kind": "rank", "global_rank": global_rank, "pp_rank": list(pipeline).index(global_rank),
            "pipeline": list(pipeline), "call": num_calls, "time": time.time(),
        }  # fmt: skip
        records: list[dict[str, Any]] = [head]
        if transport is not None:
            for log in transport.logs:
                records += as_records(log.report(_EVENTS_OF_A_MICROBATCH))
            waits, seconds = transport.failed_wait or ((), 0.0)
            for wait in waits:
                records.append({"kind": "wait", **vars(wait), "seconds": round(seconds, 3)})
            for peer, text in transport.words_of_peers().items():
                records.append({"kind": "peer", "pp_rank": peer, "text": text})
        if error is not None:
            records.append(
                {
                    "kind": "error", "type": type(error).__name__, "text": str(error),
                    "line": line_of_error(error) or user_code_line(), "time": time.time(),
                }
            )  # fmt: skip
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
            partial.replace(self.path)
        except OSError as problem:
            logger.warning("cannot write the events of rank %d to %s: %s", global_rank, self.path, problem)
