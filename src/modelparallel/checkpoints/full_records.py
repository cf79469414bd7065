"""Stand-in until the completion layer is merged."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

import xxhash

from modelparallel.checkpoints.file_streams import FileRecord, shown
from modelparallel.checkpoints.storage import Store
from modelparallel.errors import CheckpointCorruptError


def write_record(store: Store, tag: str, records: Mapping[str, FileRecord]) -> None:
    """Write the record, then ``newest``."""
    files = {name: {"size": record.size, "xxh3_128": record.digest} for name, record in records.items()}
    text = json.dumps({"format": 1, "files": files, "time": time.time()}, indent=1)
    store.write(f"complete_{tag}.json", text.encode())
    store.write("newest", tag.encode())


def check_record(store: Store, tag: str) -> list[str]:
    """The names of the files in the record; none if there is no record."""
    name = f"complete_{tag}.json"
    if not store.exists(name):
        return []
    files = json.loads(store.read(name))["files"]
    for file, expected in files.items():
        data = store.read(file) if store.exists(file) else None
        if data is None or len(data) != expected["size"] or xxhash.xxh3_128_hexdigest(data) != expected["xxh3_128"]:
            raise CheckpointCorruptError(f"{shown(store.path_of(file))!r} is not what was written")
    return list(files)
