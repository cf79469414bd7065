"""A folder of safetensors, or one file, that is read by parts: first what is in it, then any rectangle of a tensor."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from modelparallel.checkpoints.huggingface.safetensors_files import DTYPE_NAMES, INDEX_NAME, WEIGHTS_NAME
from modelparallel.checkpoints.huggingface.weights import weight_map
from modelparallel.checkpoints.partial.torch_files import store_of_file
from modelparallel.checkpoints.stores.completion import MARK_NAME, RECORD_NAME
from modelparallel.checkpoints.stores.file_streams import checked_name, shown
from modelparallel.checkpoints.stores.local import Store
from modelparallel.checkpoints.stores.opening import open_store
from modelparallel.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError
from modelparallel.errors.foreign_text import natural, parse_json

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. ``start``: where its bytes begin. ``dtype`` None: one that torch, or this version, lacks."""

    store: Store
    file: str
    name: str
    dtype: torch.dtype | None
    dtype_name: str
    shape: tuple[int, ...]
    start: int


def stored_tensors(path: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """What is in ``path``: a folder with ``model.safetensors``, or with ``model.safetensors.index.json`` and the files
    that it names; a single file; or the URL of either. Reads the heads of the files alone. Local.

    Raises CheckpointNotFoundError, and CheckpointCorruptError for files that are cut off, missing, or of an export that
    was broken off.
    """
    text = os.fspath(path).rstrip("/")
    if text.endswith(".safetensors"):
        return _head(*store_of_file(text))
    folder = open_store(text)
    names = folder.names()
    if MARK_NAME in names and RECORD_NAME not in names:
        raise CheckpointCorruptError(f"{shown(text)!r} is being written, or its writing was broken off: take another")
    if INDEX_NAME not in names and WEIGHTS_NAME not in names:
        listing = f"there are {', '.join(names[:8])}" if names else "there is nothing"
        more = (
            "; a file of torch.save is read by smp.resume_from_checkpoint(path, tag='pytorch_model.bin', partial=False)"
            if any(name.startswith("pytorch_model") for name in names)
            else ""
        )
        raise CheckpointNotFoundError(
            f"{shown(text)!r} holds neither {WEIGHTS_NAME} nor {INDEX_NAME}; {listing}: check the path{more}"
        )
    if WEIGHTS_NAME in names:
        return _head(*store_of_file(f"{text}/{WEIGHTS_NAME}"))
    by_file: dict[str, list[str]] = {}
    for name, file in weight_map(text, INDEX_NAME).items():
        by_file.setdefault(checked_name(file, text), []).append(name)
    result: dict[str, StoredTensor] = {}
    for file, tensors in by_file.items():
        stored = _head(*store_of_file(f"{text}/{file}"))
        missing = [name for name in tensors if name not in stored]
        if missing:
            raise CheckpointCorruptError(
                f"{INDEX_NAME} in {shown(text)!r} says that {file} holds {', '.join(missing[:5])}, and it does not: "
                "the files are not of one model; take another copy"
            )
        result.update((name, stored[name]) for name in tensors)
    return result


def _head(store: Store, file: str) -> dict[str, StoredTensor]:
    where = shown(store.path_of(file))
    size = store.size_of(file)
    if size is None:
        raise CheckpointCorruptError(f"{where!r} is missing: the model is not whole; take another copy")
    try:
        with store.open(file) as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError(f"a head of {length} bytes")
            values = parse_json(stream.read(length))
        values.pop("__metadata__", None)
        ends = {name: _checked_place(name, entry, size - 8 - length) for name, entry in values.items()}
        position = 0
        for start, end in sorted(ends.values()):  # without gaps, too, as the format demands
            if start != position:
                raise ValueError(f"tensors {'overlap' if start < position else 'leave a gap'} at byte {start}")
            position = end
        if size != 8 + length + position:
            raise ValueError(f"{size} bytes, and its head says {8 + length + position}")
        return {
            name: StoredTensor(
                store,
                file,
                name,
                _DTYPES.get(entry["dtype"]),
                entry["dtype"],
                tuple(entry["shape"]),
                8 + length + ends[name][0],
            )
            for name, entry in values.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointCorruptError(
            f"{where!r} is not a whole file of safetensors ({type(error).__name__}: {error}): take another copy"
        ) from error


def _checked_place(name: str, entry: Any, most: int) -> tuple[int, int]:
    """Where the bytes of a tensor begin and end, if what the head says of it can be. Raises ValueError, TypeError."""
    if not isinstance(entry["dtype"], str) or not isinstance(entry["shape"], list):
        raise TypeError(f"{name!r} has no dtype and shape")
    shape = [natural(length, f"a length of {name!r}") for length in entry["shape"]]
    start, end = (natural(place, f"a place of {name!r}", most) for place in entry["data_offsets"])
    dtype = _DTYPES.get(entry["dtype"])
    if end < start or (dtype is not None and prod(shape) * dtype.itemsize != end - start):
        raise ValueError(f"{name!r} of shape {shape} has the bytes from {start} to {end}")
    return start, end


class RectangleReader:
    """Reads rectangles; files stay open until the context ends. Local."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}

    def __enter__(self) -> RectangleReader:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def read(self, tensor: StoredTensor, starts: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """The rectangle of ``lengths`` that begins at ``starts``. Of a remote file the rows (dim 0) of it are read.

        Raises CheckpointError for a dtype that is not known, CheckpointCorruptError where the file cannot be read.
        """
        if tensor.dtype is None:
            raise CheckpointError(
                f"'{tensor.name}' in {shown(tensor.store.path_of(tensor.file))!r} is of {tensor.dtype_name}, which is "
                "not known: convert it to a dtype of torch"
            )
        path = tensor.store.path_of(tensor.file)
        try:
            if tensor.store.is_remote:
                return self._read_remote(path, tensor, starts, lengths)
            if path not in self._open:
                self._open[path] = self._stack.enter_context(safe_open(path, framework="pt"))
            if not tensor.shape:
                scalar: torch.Tensor = self._open[path].get_tensor(tensor.name)
                return scalar
            places = tuple(slice(start, start + length) for start, length in zip(starts, lengths, strict=True))
            part: torch.Tensor = self._open[path].get_slice(tensor.name)[places]
            return part
        except (SafetensorError, OSError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointCorruptError(
                f"'{tensor.name}' cannot be read from {shown(path)!r}: {type(error).__name__}: {error}"
            ) from error

    def _read_remote(
        self, path: str, tensor: StoredTensor, starts: Sequence[int], lengths: Sequence[int]
    ) -> torch.Tensor:
        assert tensor.dtype is not None
        if path not in self._open:
            self._open[path] = self._stack.enter_context(tensor.store.open(tensor.file))
        rows = (starts[0], lengths[0]) if tensor.shape else (0, 1)
        row_shape = tensor.shape[1:]
        row_bytes = prod(row_shape) * tensor.dtype.itemsize
        stream = self._open[path]
        stream.seek(tensor.start + rows[0] * row_bytes)
        data = bytearray(stream.read(rows[1] * row_bytes))
        if len(data) != rows[1] * row_bytes:
            raise ValueError("the file has changed")
        if not tensor.shape:
            return torch.frombuffer(data, dtype=tensor.dtype).reshape(())
        part = torch.frombuffer(data, dtype=tensor.dtype).view(rows[1], *row_shape)
        for dim in range(1, len(tensor.shape)):
            part = part.narrow(dim, starts[dim], lengths[dim])
        return part
