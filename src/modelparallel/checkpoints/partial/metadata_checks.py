"""Whether an index of DCP can be what a checkpoint says of itself, before anything is read by it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from modelparallel.checkpoints.stores.file_streams import checked_name
from modelparallel.errors import CheckpointCorruptError, CheckpointError
from modelparallel.errors.foreign_text import natural

#: (offsets, sizes)
Rectangle = tuple[tuple[int, ...], tuple[int, ...]]


def checked_metadata(metadata: Any, where: str) -> Metadata:
    """The index, if names, shapes, pieces and places in it can be. Local. Raises CheckpointCorruptError."""
    try:
        if not isinstance(metadata, Metadata):
            raise TypeError(f"it is a {type(metadata).__name__}")
        for key, described in metadata.state_dict_metadata.items():
            if not isinstance(key, str):
                raise TypeError(f"{key!r:.100} is no name")
            if isinstance(described, TensorStorageMetadata):
                _check_tensor(key, described)
            elif not isinstance(described, BytesStorageMetadata):
                raise TypeError(f"'{key}' is neither a tensor nor an object")
        for index, place in (metadata.storage_data or {}).items():
            if not isinstance(index, MetadataIndex):
                raise TypeError(f"{index!r:.100} names no entry")
            checked_name(place.relative_path, where)
            natural(place.offset, f"the place of '{index.fqn}'")
            natural(place.length, f"the length of '{index.fqn}'")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, CheckpointError) as error:
        raise CheckpointCorruptError(
            f"{where} is not an index of a checkpoint ({type(error).__name__}: {error}). Load another checkpoint"
        ) from error
    return metadata


def _check_tensor(key: str, described: TensorStorageMetadata) -> None:
    if not isinstance(described.properties.dtype, torch.dtype):
        raise TypeError(f"'{key}' has no dtype")
    shape = tuple(natural(length, f"a length of '{key}'") for length in described.size)
    chunks = [
        (
            tuple(natural(offset, f"an offset of '{key}'") for offset in chunk.offsets),
            tuple(natural(length, f"a length of a piece of '{key}'") for length in chunk.sizes),
        )
        for chunk in described.chunks
    ]
    for problem in place_problems(shape, chunks):
        raise ValueError(f"the tensor '{key}' {problem}")


def coverage_problems(shape: tuple[int, ...], chunks: Sequence[Rectangle]) -> Iterator[str]:
    """What is wrong with rectangles (offsets, sizes) that should make up a tensor: each element is in one."""
    problem = next(place_problems(shape, chunks), None)
    held = sum(prod(sizes) for _, sizes in chunks)
    if problem is not None:
        yield problem
    elif held != prod(shape):
        yield f"of shape {shape} has {prod(shape)} elements, and its pieces hold {held}"


def place_problems(shape: tuple[int, ...], chunks: Sequence[Rectangle]) -> Iterator[str]:
    """What is wrong with where the rectangles lie: they are inside of the tensor, and none in two places."""
    for offsets, sizes in chunks:
        is_inside = len(offsets) == len(sizes) == len(shape) and all(
            low >= 0 and length >= 0 and low + length <= end
            for low, length, end in zip(offsets, sizes, shape, strict=True)
        )
        if not is_inside:
            yield f"has a piece at {offsets} of shape {sizes} outside of its shape {shape}"
            return
    filled = sorted(chunk for chunk in chunks if prod(chunk[1]))
    for number, (offsets, sizes) in enumerate(filled):
        for other_offsets, other_sizes in filled[number + 1 :]:
            if shape and other_offsets[0] >= offsets[0] + sizes[0]:
                break  # they are sorted, so that no later one overlaps either
            if all(
                low < other_low + other_length and other_low < low + length
                for low, length, other_low, other_length in zip(offsets, sizes, other_offsets, other_sizes, strict=True)
            ):
                yield f"has pieces at {offsets} and {other_offsets} that overlap"
                return
