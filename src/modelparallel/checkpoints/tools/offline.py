"""The tensors of a partial checkpoint one by one, in one process without process groups; and tensors that live on disk.

[Note: scratch] A file of ``torch.save``, and the translators of names, want all tensors of a model at once. A tool that
runs beside a training job has not the memory for that. So large tensors are kept in files that are mapped into memory:
the system writes them out when it needs the memory. A file is removed as soon as it is mapped, and its space is free
when the tensor is; nothing stays behind, whatever ends the process.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from math import prod
from typing import Any

import torch

from modelparallel.checkpoints.partial.contents import MASTER_KEY, numbered, state_keys
from modelparallel.checkpoints.partial.dcp_storage import RecordedReader, read_metadata
from modelparallel.checkpoints.partial.pieces import whole_piece
from modelparallel.checkpoints.partial.planners import PieceLoadPlanner, is_object
from modelparallel.checkpoints.partial.user_content import Allowed, open_object
from modelparallel.checkpoints.stores.file_streams import FileRecord, shown
from modelparallel.checkpoints.stores.local import Store
from modelparallel.errors import CheckpointCorruptError, CheckpointError
from modelparallel.optimizer.states import SCALER_KEY

#: Smaller tensors are kept in memory.
SCRATCH_BYTES = 1 << 20


class Scratch:
    """Makes tensors whose memory is a file that has no name any more; see [Note: scratch]."""

    def __init__(self, folder: str | None = None) -> None:
        """``folder``: a local folder with room for them; None: the system's for temporary files."""
        self._folder = folder

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor to be filled. Local. Raises CheckpointError where there is no room."""
        num_bytes = prod(shape) * dtype.itemsize
        if num_bytes < SCRATCH_BYTES:
            return torch.empty(tuple(shape), dtype=dtype)
        try:
            number, name = tempfile.mkstemp(prefix=".scratch-", dir=self._folder)
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(number, 0, num_bytes)  # a full disk is an error here, and not a crash later
                flat = torch.from_file(name, shared=True, size=prod(shape), dtype=dtype)
            finally:
                os.close(number)
                with suppress(PermissionError):  # a mapped file stays on Windows
                    os.unlink(name)
        except OSError as error:
            raise CheckpointError(
                f"there is no room for {num_bytes} bytes in {self._folder or tempfile.gettempdir()!r}: {error}. Free "
                "space there, or set TMPDIR"
            ) from error
        return flat.view(tuple(shape))


class StoredPartial:
    """A partial checkpoint, read without a job.

    ``facts``: of its completion record; ``expected``: the files of it. ``scratch``: makes the tensors; None: they are
    in memory. ``allowed``: classes that objects may be of; ``trusts_pickles``: any. Local.
    """

    def __init__(
        self,
        store: Store,
        expected: Mapping[str, FileRecord] | None,
        facts: Mapping[str, Any],
        scratch: Scratch | None = None,
        *,
        allowed: Sequence[Allowed] = (),
        trusts_pickles: bool = False,
    ) -> None:
        self._store = store
        self._empty = torch.empty if scratch is None else scratch.empty
        self._allowed = tuple(allowed)
        self._trusts_pickles = trusts_pickles
        self.facts = facts
        self.metadata = read_metadata(store, trusts_pickles)
        self._reader = RecordedReader(store, self.metadata, expected)

    @property
    def entries(self) -> Mapping[str, Any]:
        """DCP's descriptions of all entries, by key."""
        return self.metadata.state_dict_metadata

    def read(self, key: str, dtype: torch.dtype | None = None) -> Any:
        """The whole tensor, or the object, of a key. Local. ``dtype``: what floating-point tensors become.

        Raises CheckpointCorruptError where the files do not hold it.
        """
        described = self.entries[key]
        values: list[Any] = []

        def take(key: str, data: io.BytesIO) -> None:
            values.append(open_object(data, f"the entry '{key}'", self._allowed, self._trusts_pickles))

        if is_object(described):
            planner = PieceLoadPlanner([], [key], take)
        else:
            own = described.properties.dtype
            tensor = self._empty(described.size, dtype=dtype if dtype and own.is_floating_point else own)
            values.append(tensor)
            planner = PieceLoadPlanner([whole_piece(key, tensor)], [], take)
        try:
            self._reader.fill(planner)
        except CheckpointError:
            raise
        except Exception as error:  # damaged bytes may fail with nearly any error
            raise CheckpointCorruptError(
                f"'{key}' cannot be read from {shown(self._store.path_of())!r} ({type(error).__name__}: {error}): take "
                "another checkpoint"
            ) from error
        return values[0]


def model_state(
    stored: StoredPartial, index: int = 0, dtype: torch.dtype | None = None, takes_masters: bool = False
) -> dict[str, Any]:
    """The state dict of a model of a partial checkpoint, under the names of its module; tied tensors under all names,
    where the checkpoint says so. Local. ``dtype``: what floating-point tensors become. ``takes_masters``: the fp32
    masters in place of parameters in half precision.
    """
    prefix = f"{numbered('model', index)}."
    facts = model_facts_of(stored, index)
    result: dict[str, Any] = {}
    for key in stored.entries:
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            master = f"{numbered('optimizer', index)}.state.{name}.{MASTER_KEY}"
            source = master if takes_masters and master in stored.entries else key
            result[name] = stored.read(source, dtype)
    for name, aliases in facts.get("tied", {}).items():
        result.update({alias: result[name] for alias in aliases if name in result})
    for name, (shape, own) in facts.get("empty", {}).items():
        result[name] = torch.empty(shape, dtype=getattr(torch, own.removeprefix("torch.")))
    return result


def model_facts_of(stored: StoredPartial, index: int) -> Mapping[str, Any]:
    """What `contents.model_facts` has noted; nothing in checkpoints of older versions."""
    facts = stored.facts.get("models", [])
    return facts[index] if index < len(facts) else {}


def optimizer_state(stored: StoredPartial, index: int = 0) -> dict[str, Any] | None:
    """What ``optimizer.state_dict()`` was in the job; None if the checkpoint has no such optimizer. Local.

    Raises CheckpointError for state of a part of a parameter, which cannot be joined.
    """
    prefix = numbered("optimizer", index)
    if f"{prefix}.param_groups" not in stored.entries:
        return None
    groups: list[dict[str, Any]] = []
    names: list[str] = []
    for group in stored.read(f"{prefix}.param_groups"):
        positions = list(range(len(names), len(names) + len(group["params"])))
        names += group["params"]
        groups.append({**group, "params": positions})
    keys = state_keys(stored.entries, prefix)
    state = {}
    for position, name in enumerate(names):
        if name in keys:
            state[position] = dict(_values_of(stored, name, keys[name]))
    result: dict[str, Any] = {"state": state, "param_groups": groups}
    scaler = f"{prefix}.{SCALER_KEY}"
    if scaler in stored.entries:
        result[SCALER_KEY] = stored.read(scaler)
    return result


def _values_of(stored: StoredPartial, name: str, keys: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    for entry, key in sorted(keys.items(), key=lambda item: item[0] == MASTER_KEY):
        if "@" in entry:
            raise CheckpointError(
                f"the optimizer's '{entry.partition('@')[0]}' of '{name}' was computed from a part of the parameter "
                f"({entry.partition('@')[2]}), and cannot be joined: convert the model alone (--model-only)"
            )
        yield entry, stored.read(key)
