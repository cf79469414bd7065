"""A folder of safetensors as Hugging Face has them, written tensor by tensor: none is kept, nothing is sent.

    <path>/model.safetensors                    or, if that would be larger than ``max_shard_size``,
    <path>/model-00001-of-00003.safetensors     ... and
    <path>/model.safetensors.index.json         which file holds which tensor
    <path>/config.json, ...                     what else the caller gives; written last
    <path>/complete.json                        sizes and digests of these files (completion.py)

A file of safetensors begins with the names, dtypes, shapes and places of all its tensors, so that these have to be
known first; the numbers follow in turn. Everything here is local: one process may write all files (`write_folder`), or
each some of them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from modelparallel.checkpoints.stores.completion import MARK_NAME, RECORD_NAME, Draft, folder_of
from modelparallel.checkpoints.stores.file_streams import FileRecord, shown
from modelparallel.checkpoints.stores.local import Store
from modelparallel.checkpoints.stores.opening import open_store
from modelparallel.errors import CheckpointError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"
#: transformers' own default.
MAX_SHARD_SIZE = "5GB"
#: What safetensors calls the dtypes.
DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor that is going to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its length in a file."""
        return prod(self.shape) * self.dtype.itemsize

    @staticmethod
    def of(tensor: torch.Tensor) -> TensorToWrite:
        """Dtype and shape of a tensor that exists (or is on the meta device)."""
        return TensorToWrite(tensor.dtype, tuple(tensor.shape))


def parse_size(size: int | str) -> int:
    """A number of bytes, given as such or as in "5GB" (10^9 bytes) or "5GiB" (2^30). Raises CheckpointError."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)\s*", size.upper()) if isinstance(size, str) else None
    number = int(float(match[1]) * _UNITS[match[2]]) if match is not None and match[2] in _UNITS else 0
    if number < 1:
        raise CheckpointError(f"max_shard_size={size!r}: expected a number of bytes, or a text such as '5GB'")
    return number


def split_into_files(
    tensors: Mapping[str, TensorToWrite], max_shard_size: int | str = MAX_SHARD_SIZE
) -> dict[str, list[str]]:
    """Which file holds which tensors: by the name of the file, in the given order; as huggingface_hub divides them.

    A file is closed before the tensor that would make it larger than ``max_shard_size``; a tensor that is larger has a
    file of its own. Raises CheckpointError for a size that is none.
    """
    limit = parse_size(max_shard_size)
    files: list[list[str]] = []
    current: list[str] = []
    size = 0
    for name, spec in tensors.items():
        if spec.num_bytes > limit:
            files.append([name])
            continue
        if current and size + spec.num_bytes > limit:
            files.append(current)
            current, size = [], 0
        current.append(name)
        size += spec.num_bytes
    if current or not files:
        files.append(current)
    if len(files) == 1:
        return {WEIGHTS_NAME: files[0]}
    stem = WEIGHTS_NAME.removesuffix(".safetensors")
    return {f"{stem}-{n:05d}-of-{len(files):05d}.safetensors": names for n, names in enumerate(files, 1)}


def index_of(files: Mapping[str, Sequence[str]], tensors: Mapping[str, TensorToWrite]) -> bytes:
    """The text of ``model.safetensors.index.json``."""
    weight_map = {name: file for file, names in files.items() for name in names}
    values = {
        "metadata": {
            "total_parameters": sum(prod(spec.shape) for spec in tensors.values()),
            "total_size": sum(spec.num_bytes for spec in tensors.values()),
        },
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(values, indent=2) + "\n").encode()


class SafetensorsWriter:
    """A file that is being written; `write` is called for each tensor, in the order of ``order``.

    Attributes:
        order: the names of its tensors as they lie in the file: dtypes of more bytes first, so that each begins at a
            multiple of its size.
        record: the size and the digest, when the file is complete.
    """

    def __init__(self, stream: Any, tensors: Mapping[str, TensorToWrite], metadata: Mapping[str, str]) -> None:
        self._stream = stream
        self._tensors = tensors
        self.order = order_in_file(tensors)
        self._next = 0
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
        position = 0
        for name in self.order:
            spec = tensors[name]
            end = position + spec.num_bytes
            places = [position, end]
            header[name] = {"dtype": _dtype_name(name, spec), "shape": list(spec.shape), "data_offsets": places}
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        stream.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor, of any device and strides. Raises CheckpointError for another than the next."""
        expected = self.order[self._next] if self._next < len(self.order) else None
        if name != expected or TensorToWrite.of(tensor) != self._tensors[name]:
            raise CheckpointError(
                f"'{name}' ({TensorToWrite.of(tensor)}) was given to a file in which '{expected}' "
                f"({self._tensors.get(expected or '')}) comes next: give each tensor once, in the order of the file"
            )
        self._next += 1
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        for start in range(0, flat.size, _CHUNK_BYTES):
            self._stream.write(flat[start : start + _CHUNK_BYTES])

    def check_complete(self) -> None:
        """Raises CheckpointError while tensors are missing."""
        if self._next < len(self.order):
            raise CheckpointError(f"'{self.order[self._next]}' was not written")

    @property
    def record(self) -> FileRecord:
        """Size and digest of what was written so far."""
        written: FileRecord = self._stream.record
        return written


def order_in_file(tensors: Mapping[str, TensorToWrite]) -> list[str]:
    """The names as they lie in the file, see `SafetensorsWriter`."""
    return sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)


@contextmanager
def safetensors_file(
    store: Store, name: str, tensors: Mapping[str, TensorToWrite], metadata: Mapping[str, str] | None = None
) -> Iterator[SafetensorsWriter]:
    """Write a file; it appears under its name, whole, when the block ends without an error. Local.

    Args:
        tensors: what will be in it, by name.
        metadata: what the file shall say beside ``{"format": "pt"}``; texts.

    Raises CheckpointError when the file cannot be written, or a tensor has a dtype that safetensors do not have.
    """
    with store.open(name, "wb") as stream:
        writer = SafetensorsWriter(stream, tensors, metadata or {})
        yield writer
        writer.check_complete()


def folder_draft(path: str | os.PathLike[str], token: str = "") -> Draft:
    """The draft of the folder ``path``, see completion.py. Nothing is made yet. Local."""
    text = os.fspath(path)
    if "://" in text and not text.startswith(("file://", "local://")):
        head, _, name = text.rstrip("/").rpartition("/")
        head = f"{head}/" if head.endswith(":/") else head
    else:
        head, name = os.path.split(os.path.abspath(text.split("://", 1)[-1]))
    if not name:
        raise CheckpointError(f"{shown(text)!r} cannot be a folder that is written as one: give a path below it")
    return Draft(open_store(head), name, token)


def check_free(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Whether the folder may be written. Local.

    Raises CheckpointError if there is something that is not to be replaced: anything but an empty folder, unless
    ``overwrite``, and then anything but a folder of weights.
    """
    draft = folder_draft(path)
    store = draft.parent
    name = folder_of(store, draft.name)
    where = shown(store.path_of(draft.name))
    if not store.exists(name):
        return
    if not store.is_folder(name):
        raise CheckpointError(f"{where!r} is a file: give the path of a folder")
    present = store.names(name)
    is_left_over = store.is_remote and MARK_NAME in present and RECORD_NAME not in present
    if not present or is_left_over:
        return
    if not overwrite:
        raise CheckpointError(
            f"{where!r} is there already and holds {', '.join(present[:5])}: give another path, or overwrite=True to "
            "replace the whole folder"
        )
    if not {WEIGHTS_NAME, INDEX_NAME} & set(present):
        raise CheckpointError(
            f"{where!r} holds {', '.join(present[:5])} and no weights ({WEIGHTS_NAME}): overwrite=True replaces a "
            "whole folder, and only one of weights; give another path, or remove it yourself"
        )


def write_folder(
    path: str | os.PathLike[str],
    tensors: Mapping[str, TensorToWrite],
    read: Callable[[str], torch.Tensor],
    *,
    other_files: Mapping[str, bytes] | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, list[str]]:
    """Write a whole folder from one process; at any time it is there whole or not at all. Local.

    Args:
        path: the folder, which is made, or a URL of fsspec.
        tensors: dtype and shape of each tensor by name, in the order in which they are divided into files.
        read: gives a tensor by its name. It is called once for each, and the tensor is written and forgotten before the
            next call.
        other_files: by name, such as ``config.json``; written last.
        max_shard_size: see `split_into_files`.
        metadata: texts in the header of each file.
        overwrite: replace a folder of weights that is there.
        facts: what the completion record says beside.

    Returns the names of the tensors by file. Raises CheckpointError when the folder is there, or cannot be written;
    what was there is untouched then.
    """
    files = split_into_files(tensors, max_shard_size)
    check_free(path, overwrite)
    draft = folder_draft(path)
    records: dict[str, FileRecord] = {}
    draft.start()
    try:
        for file, names in files.items():
            specs = {name: tensors[name] for name in names}
            with safetensors_file(draft.store, file, specs, metadata) as writer:
                for name in writer.order:
                    writer.write(name, read(name))
            records[file] = writer.record
        records.update(write_other_files(draft.store, files, tensors, other_files or {}))
        draft.commit(records, {"kind": "safetensors", **(facts or {})})
    except BaseException:
        draft.discard()
        raise
    return files


def write_other_files(
    store: Store,
    files: Mapping[str, Sequence[str]],
    tensors: Mapping[str, TensorToWrite],
    other_files: Mapping[str, bytes],
) -> dict[str, FileRecord]:
    """The index, if there are several files of weights, and ``other_files``. Local."""
    texts = {**({INDEX_NAME: index_of(files, tensors)} if len(files) > 1 else {}), **other_files}
    return {name: store.write(name, text) for name, text in texts.items()}


def _dtype_name(name: str, spec: TensorToWrite) -> str:
    if spec.dtype not in DTYPE_NAMES:
        raise CheckpointError(f"'{name}' is of {spec.dtype}, which safetensors do not have: convert it (dtype=...)")
    return DTYPE_NAMES[spec.dtype]
