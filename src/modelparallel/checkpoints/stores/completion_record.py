"""The completion record of a checkpoint: which files it consists of; see [Note: What makes a checkpoint count]."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelparallel.checkpoints.stores.file_streams import FileRecord, checked_name, new_digest
from modelparallel.errors import CheckpointCorruptError, CheckpointError
from modelparallel.errors.foreign_text import finite, natural, parse_json

FORMAT = 1
RESERVED_FACTS = {"format", "files", "digest"}
#: Facts that readers use as numbers, and texts; what else stands in a record is only shown.
_NUMBERS = ("num_steps", "num_models", "num_optimizers", "sharded_data_parallel_degree", "world_size")
_TEXTS = ("kind", "modelparallel", "torch")
_MOST_SECONDS = 1e11  # some 3000 years


class UnknownFormatError(CheckpointError):
    """The record is of a format that this version does not know."""


@dataclass(frozen=True)
class CompletionRecord:
    """What a checkpoint consists of.

    Attributes:
        files: every file by its name below the checkpoint's folder (full checkpoints: below the path).
        time: when it was completed, in seconds since 1970; later checkpoints of one path have later times.
        facts: what else was noted, values of JSON.
    """

    files: Mapping[str, FileRecord]
    time: float
    facts: Mapping[str, Any]

    def as_json(self) -> bytes:
        """The text of the record, with a digest of itself. Local."""
        entries = {name: {"size": file.size, "xxh3_128": file.digest} for name, file in sorted(self.files.items())}
        values = {**self.facts, "format": FORMAT, "time": self.time, "files": entries}
        return json.dumps({**values, "digest": digest_of_values(values)}, indent=1).encode()

    @staticmethod
    def parse(data: bytes, path: str) -> "CompletionRecord":
        """Read the text of a record that lies at `path`. Local.

        Raises:
            CheckpointCorruptError: it is not a record, was changed, holds absurd values, or names files outside of its
                folder.
            UnknownFormatError: it is of a format that this version does not know.
        """
        try:
            values = parse_json(data)
            digest, number = values.pop("digest"), values["format"]
            if digest != digest_of_values(values):
                raise ValueError("its digest is not that of its text")
            if number != FORMAT:  # a whole one: a changed number is damage
                raise UnknownFormatError(
                    f"{path!r} is a completion record of format {number!r:.100}; this version reads format {FORMAT}. "
                    "Use a newer version of modelparallel"
                )
            files = {
                checked_name(name, path): FileRecord(
                    natural(entry["size"], f"the size of {name!r}"), str(entry["xxh3_128"])
                )
                for name, entry in values["files"].items()
            }
            facts = {key: value for key, value in values.items() if key not in RESERVED_FACTS | {"time"}}
            _check_facts(facts)
            moment = finite(values["time"], "the time")
            if not 0 <= moment <= _MOST_SECONDS:
                raise ValueError(f"the time is {moment}")
            return CompletionRecord(files, moment, facts)
        except UnknownFormatError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, CheckpointError) as error:
            raise CheckpointCorruptError(
                f"{path!r} is no whole completion record ({type(error).__name__}: {error}): the checkpoint does not "
                "count. Load another one"
            ) from error


def digest_of_values(values: Mapping[str, Any]) -> str:
    """The digest that a record has of its own values."""
    digest = new_digest()
    digest.update(json.dumps(values, sort_keys=True, separators=(",", ":")).encode())
    return digest.hexdigest()


def _check_facts(facts: Mapping[str, Any]) -> None:
    for name in _NUMBERS:
        if facts.get(name) is not None:
            natural(facts[name], name)
    for name in _TEXTS:
        if facts.get(name) is not None and not isinstance(facts[name], str):
            raise TypeError(f"{name} is no text")
    for axis, size in facts.get("shape", {}).items():
        natural(size, f"the size of axis {axis!r}", 2**31)
    models = facts.get("models", [])
    if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
        raise TypeError("models is no list of facts")
