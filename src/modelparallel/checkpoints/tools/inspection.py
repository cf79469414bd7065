"""What is in a checkpoint, without loading it: for tools that run in one process, outside of a job.

Tensors are described from the index, from headers, or from files that are mapped into memory; pickles are opened with
the lists of unpickling.py and user_content.py only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from modelparallel.checkpoints.huggingface.safetensors_reading import stored_tensors
from modelparallel.checkpoints.huggingface.weights import INDEX_ENDING, weight_map
from modelparallel.checkpoints.partial import job_state
from modelparallel.checkpoints.partial.dcp_storage import file_group, read_metadata
from modelparallel.checkpoints.partial.torch_files import store_of_file
from modelparallel.checkpoints.partial.user_content import read_restricted, read_user_content
from modelparallel.checkpoints.partial.writing import USER_CONTENT_NAME
from modelparallel.checkpoints.stores import completion
from modelparallel.checkpoints.stores.file_streams import checked_name
from modelparallel.checkpoints.tools.catalogue import ListedCheckpoint, rank_file
from modelparallel.errors import CheckpointCorruptError, CheckpointError
from modelparallel.optimizer.states import MASTER_KEY

#: The parts of a checkpoint that sizes are added up for.
PARTS = ("model", "optimizer", "masters", "other")
_PART_OF_NOUN = {"model": "model", "optimizer": "optimizer", "fp16_states": "masters"}


@dataclass(frozen=True)
class TensorFacts:
    """One tensor: its shape is that of the whole, ``num_pieces`` how many rectangles of it the files hold."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    part: str
    num_pieces: int = 1


@dataclass(frozen=True)
class Description:
    """What is in a checkpoint.

    Attributes:
        place, name, kind: see `catalogue.ListedCheckpoint`.
        is_complete, problem: whether all files are there with their sizes, by the record; None without a record.
        time: when it was completed, in seconds since 1970.
        facts: what the record says beside the files: versions, number of steps, shape of the job.
        num_processes: of the job that saved it; None where nothing says so.
        files: their sizes in bytes, by name.
        tensors: by name. ``objects``: the names of what is no tensor.
        num_random_states, num_data_loaders: how many ranks' are kept.
        user_content: its keys with their types, or its type; None if there is none.
    """

    place: str
    name: str
    kind: str
    is_complete: bool | None
    problem: str
    time: float | None
    facts: Mapping[str, Any]
    num_processes: int | None
    files: Mapping[str, int]
    tensors: Sequence[TensorFacts]
    objects: Sequence[str] = ()
    num_random_states: int = 0
    num_data_loaders: int = 0
    user_content: Any = None

    def totals(self) -> dict[str, tuple[int, int, int]]:
        """(number of tensors, elements, bytes) of each part that has some."""
        result = {}
        for part in PARTS:
            tensors = [tensor for tensor in self.tensors if tensor.part == part]
            if tensors:
                result[part] = (
                    len(tensors),
                    sum(prod(tensor.shape) for tensor in tensors),
                    sum(tensor.num_bytes for tensor in tensors),
                )
        return result


@dataclass
class _Entries:
    tensors: list[TensorFacts] = field(default_factory=list)
    objects: list[str] = field(default_factory=list)


def describe(checkpoint: ListedCheckpoint) -> Description:
    """What is in a checkpoint. Local; reads only.

    Raises CheckpointCorruptError for files that cannot be read as what they are, CheckpointError for a pickle that
    names what is not allowed.
    """
    try:
        entries = _ENTRIES_OF[checkpoint.kind](checkpoint)
        content = _content(checkpoint)
    except RecursionError as error:
        raise CheckpointCorruptError(
            f"{checkpoint.place!r} holds values that are nested too deeply to be shown"
        ) from error
    facts = checkpoint.facts
    shape = facts.get("shape")
    num_processes = prod(shape.values()) if isinstance(shape, dict) else facts.get("world_size")
    return Description(
        place=checkpoint.place,
        name=checkpoint.name,
        kind=checkpoint.kind,
        is_complete=checkpoint.is_complete,
        problem=checkpoint.problem,
        time=None if checkpoint.record is None else checkpoint.record.time,
        facts=facts,
        num_processes=num_processes if checkpoint.kind != "original" else _num_rank_files(checkpoint),
        files=files_of(checkpoint),
        tensors=entries.tensors,
        objects=entries.objects,
        num_random_states=_count(entries, job_state.RANDOM_KEY),
        num_data_loaders=_count(entries, job_state.LOADER_KEY),
        user_content=content,
    )


def files_of(checkpoint: ListedCheckpoint) -> dict[str, int]:
    """The files of a checkpoint and their sizes in bytes: those of its record if it has one. Local."""
    if checkpoint.files is not None:
        return {name: file.size for name, file in checkpoint.files.items()}
    if checkpoint.kind in ("partial", "dcp", "original"):
        return checkpoint.folder.sizes()
    names = [checkpoint.name]
    if checkpoint.name.endswith(INDEX_ENDING):
        names += sorted(set(weight_map(checkpoint.path, checkpoint.name).values()))
    return {name: size for name in names if (size := _size(checkpoint.path, name)) is not None}


def part_of(key: str) -> str:
    """The part that an entry of a partial checkpoint belongs to."""
    return _PART_OF_NOUN.get(file_group(key), "other")


# The entries of each kind


def _dcp_entries(checkpoint: ListedCheckpoint) -> _Entries:
    result = _Entries()
    for key, described in sorted(read_metadata(checkpoint.folder).state_dict_metadata.items()):
        if isinstance(described, BytesStorageMetadata):
            result.objects.append(key)
            continue
        dtype = described.properties.dtype
        shape = tuple(described.size)
        result.tensors.append(_facts(key, shape, dtype, part_of(key), len(described.chunks)))
    return result


def _original_entries(checkpoint: ListedCheckpoint) -> _Entries:
    result, folder = _Entries(), checkpoint.folder
    for name in folder.names():
        file = rank_file(name)
        if file is not None:
            value = read_restricted(folder, name, f"the entry {name!r}", mmap=True)
            _add_leaves(result, f"{name}: ", value, _PART_OF_NOUN[file[0]])
    return result


def _full_entries(checkpoint: ListedCheckpoint) -> _Entries:
    result, store = _Entries(), checkpoint.store
    files = checkpoint.files or {}
    for name, part in ((checkpoint.name, "model"), (f"optimizer_{checkpoint.name}", "optimizer")):
        if name in files:
            place = completion.file_of(store, checkpoint.name, name)
            value = read_restricted(store, place, f"the entry {name!r}", mmap=True)
            _add_leaves(result, "" if part == "model" else "optimizer: ", value, part)
    return result


def _file_entries(checkpoint: ListedCheckpoint) -> _Entries:
    result = _Entries()
    names = [checkpoint.name]
    if checkpoint.name.endswith(INDEX_ENDING):
        names = sorted(set(weight_map(checkpoint.path, checkpoint.name).values()))
    for name in names:
        path = f"{checkpoint.path.rstrip('/')}/{checked_name(name, checkpoint.path)}"
        store, file = store_of_file(path)
        if name.endswith(".safetensors"):
            _add_stored(result, path)
        else:
            _add_leaves(result, "", read_restricted(store, file, "the state dict", mmap=True), "model")
    return result


def _exported_entries(checkpoint: ListedCheckpoint) -> _Entries:
    result = _Entries()
    _add_stored(result, checkpoint.folder.path_of())
    return result


def _add_stored(result: _Entries, path: str) -> None:
    for name, tensor in stored_tensors(path).items():
        # A dtype that torch lacks: of which the number of bytes is not known here.
        itemsize = 0 if tensor.dtype is None else tensor.dtype.itemsize
        dtype = tensor.dtype_name if tensor.dtype is None else _name_of(tensor.dtype)
        result.tensors.append(TensorFacts(name, tensor.shape, dtype, prod(tensor.shape) * itemsize, "model"))


_ENTRIES_OF = {
    "partial": _dcp_entries,
    "dcp": _dcp_entries,
    "original": _original_entries,
    "full": _full_entries,
    "exported": _exported_entries,
    "huggingface": _file_entries,
    "torch": _file_entries,
    "safetensors": _file_entries,
}


def _add_leaves(result: _Entries, start: str, value: Any, part: str) -> None:
    for name, leaf in leaves(value):
        if isinstance(leaf, torch.Tensor):
            own = part
            if name.rpartition(".")[2] == MASTER_KEY:
                own = "masters"
            result.tensors.append(_facts(start + name, tuple(leaf.shape), leaf.dtype, own))
        else:
            result.objects.append(start + name)


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(name, leaf) of nested dicts, lists and tuples; the parts of a name are joined by '.'."""
    if isinstance(value, Mapping):
        items: Sequence[tuple[Any, Any]] = list(value.items())
    elif isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        items = list(enumerate(value))
    else:
        yield name, value
        return
    for key, child in items:
        yield from leaves(child, f"{name}.{key}" if name else str(key))


def _facts(name: str, shape: tuple[int, ...], dtype: torch.dtype, part: str, num_pieces: int = 1) -> TensorFacts:
    return TensorFacts(name, shape, _name_of(dtype), prod(shape) * dtype.itemsize, part, num_pieces)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _count(entries: _Entries, key: str) -> int:
    return sum(name.startswith(f"{key}.") for name in entries.objects)


def _num_rank_files(checkpoint: ListedCheckpoint) -> int:
    files = [rank_file(name) for name in checkpoint.folder.names()]
    return len([file for file in files if file is not None and file[0] == "model"])


def _content(checkpoint: ListedCheckpoint) -> Any:
    """Keys and types of the user content; a text that says so where it names what is not allowed."""
    if checkpoint.kind in ("partial", "original"):
        store, name = checkpoint.folder, USER_CONTENT_NAME
    elif checkpoint.kind == "full":
        store, name = checkpoint.store, f"user_content_{checkpoint.name}"
        name = completion.file_of(store, checkpoint.name, name)
    else:
        return None
    try:
        content = read_user_content(store, name)
    except CheckpointError as error:
        return f"not opened: {error}"
    if isinstance(content, Mapping):
        return {str(key): type(value).__name__ for key, value in content.items()}
    return None if content is None else type(content).__name__


def _size(path: str, name: str) -> int | None:
    store, file = store_of_file(f"{path.rstrip('/')}/{checked_name(name, path)}")
    return store.size_of(file)
