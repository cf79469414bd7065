"""What is written down of every submitted job, so that another shell finds it: a file for each, and no secret in it.

~/.local/state/modelparallel/jobs/<cluster>/<name>.json      ($XDG_STATE_HOME in place of ~/.local/state)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from urllib.parse import quote

from modelparallel.config.reading import nearest
from modelparallel.errors import LaunchError
from modelparallel.errors.foreign_text import finite, one_line, parse_json
from modelparallel.job.private_files import write_private
from modelparallel.launch.clusters.cluster import JobRecord

FORMAT = 1
_MOST_BYTES = 1 << 20
#: In seconds since 1970: the year 9999.
_LAST_MOMENT = 253_000_000_000.0


def records_folder(environ: Mapping[str, str]) -> Path:
    """The folder with a folder for each cluster."""
    base = environ.get("XDG_STATE_HOME", "")
    # The convention says that a relative path there counts for nothing.
    state = Path(base) if os.path.isabs(base) else Path.home() / ".local" / "state"
    return state / "modelparallel" / "jobs"


def record_path(cluster: str, name: str, environ: Mapping[str, str]) -> Path:
    """Where the record of a job is; it need not be there."""
    return records_folder(environ) / _file_name(cluster) / f"{_file_name(name)}.json"


def write_record(record: JobRecord, environ: Mapping[str, str]) -> Path:
    """Keep the record, whole, for its owner alone. One of the same address is replaced.

    Raises `LaunchError`, which says how to find the job without.
    """
    path = record_path(record.cluster, record.name, environ)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(partial, json.dumps({"format": FORMAT, **asdict(record)}, indent=2, default=str) + "\n")
        partial.replace(path)
    except OSError as error:
        raise LaunchError(
            f"job {record.address} was submitted ({record.kind}: {record.engine_id}), but cannot be written down in "
            f"{path}: {error.strerror}. It goes on; modelparallel attach {record.kind}:{record.engine_id} finds it"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return path


def forget_record(record: JobRecord, environ: Mapping[str, str]) -> None:
    """Remove the record; the job itself is not touched. Raises `LaunchError`."""
    path = record_path(record.cluster, record.name, environ)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise LaunchError(f"{path} cannot be removed: {error.strerror}") from error


def read_record(path: Path) -> JobRecord:
    """The record in a file. Raises `ValueError` saying what is wrong with it, and OSError."""
    with open(path, "rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError("it is too long")
    values = parse_json(content)
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise ValueError(f"it is no record of format {FORMAT}")
    required = {field.name for field in fields(JobRecord) if field.default is MISSING}
    if missing := sorted(required - set(values)):
        raise ValueError(f"it does not say {', '.join(missing)}")
    if unknown := sorted(set(values) - {field.name for field in fields(JobRecord)}):
        raise ValueError(f"it has more entries than this version knows: {', '.join(unknown)}")
    for name in values:
        if name not in ("settings", "submitted") and not isinstance(values[name], str):
            raise ValueError(f"{name} is no text")
    if not 0 <= finite(values["submitted"], "submitted") < _LAST_MOMENT:
        raise ValueError("submitted is no time")
    if not isinstance(values["settings"], dict):
        raise ValueError("settings is no object")
    return JobRecord(**values)


def list_records(
    environ: Mapping[str, str], cluster: str | None = None
) -> tuple[tuple[JobRecord, ...], tuple[str, ...]]:
    """(the records of all clusters or of one, the last submitted first; a line for each file that is none)."""
    folder = records_folder(environ)
    clusters = sorted(folder.iterdir()) if folder.is_dir() else []
    records, problems = [], []
    for parent in clusters:
        if cluster is not None and parent.name != _file_name(cluster):
            continue
        for path in sorted(parent.glob("*.json")) if parent.is_dir() else ():
            try:
                record = read_record(path)
                if record_path(record.cluster, record.name, environ) != path:
                    raise ValueError(f"it says that it is of {one_line(record.address)}")
                records.append(record)
            except (ValueError, OSError, UnicodeDecodeError) as error:
                problems.append(f"{path} is no record of a job and was skipped: {one_line(error)}")
    return tuple(sorted(records, key=lambda record: -record.submitted)), tuple(problems)


def names_in_use(cluster: str, environ: Mapping[str, str]) -> frozenset[str]:
    """The names of jobs that were submitted to the cluster from here."""
    return frozenset(record.name for record in list_records(environ, cluster)[0])


def find_record(address: str, environ: Mapping[str, str]) -> JobRecord:
    """The record of `<cluster>/<name>`, or of a name that only one cluster has a job of.

    Raises `LaunchError`: there is none, with the nearest; several, with all; or the file is damaged.
    """
    records, problems = list_records(environ)
    exact = [record for record in records if record.address == address]
    found = exact or [record for record in records if record.name == address]
    if len(found) == 1:
        return found[0]
    if found:
        raise LaunchError(
            f"job {address!r} is on several clusters: name one of "
            f"{', '.join(sorted(record.address for record in found))}"
        )
    cluster, _, name = address.rpartition("/")
    damaged = [line for line in problems if f"{_file_name(name)}.json is" in line]
    if damaged:
        raise LaunchError(
            f"job {address!r}: {damaged[0]}. modelparallel attach <kind>:<what the engine calls it> works"
        )
    if not records:
        raise LaunchError(f"job {address!r}: no job was submitted from here ({records_folder(environ)} has none)")
    known = [record.address for record in records] + ([] if cluster else [record.name for record in records])
    raise LaunchError(
        f"job {address!r} is not known here: did you mean {nearest(address, known)!r}? `modelparallel jobs` lists all; "
        "attach takes a job that another machine has submitted"
    )


def _file_name(text: str) -> str:
    """One name of a file for each text: no folder, and no hidden file."""
    quoted = quote(text, safe="@+=,")
    return f"%2E{quoted[1:]}" if quoted.startswith(".") else quoted
