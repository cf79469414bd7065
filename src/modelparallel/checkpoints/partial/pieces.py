"""What this rank holds of the tensors of a checkpoint, as rectangles of the whole, unsplit tensors.

[Note: pieces] Whatever splits a tensor - tensor parallelism along a dimension (in blocks, for queries, keys and values
in one weight), sharded data parallelism by rows, sharding of the optimizer state anywhere in the flat parameter - a
rank's part of it is a few rectangles. A checkpoint is made of these, so that a job of another shape, whose ranks hold
other rectangles, reads what it needs of each file and nothing else. Everything here is local.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch

from modelparallel.plan.rows import SplitSpec


@dataclass(frozen=True, eq=False)
class Piece:
    """The rectangle of the tensor ``key``, of ``full_shape``, that begins at ``offsets``; ``tensor`` is the memory of
    it in this process, a view of the rectangle's shape.
    """

    key: str
    full_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: torch.Tensor

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape of the rectangle."""
        return tuple(self.tensor.shape)


def rectangle_of(tensor: torch.Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    """The view of the rectangle of ``tensor`` that begins at ``offsets``."""
    for dim, (start, length) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor


def whole_piece(key: str, tensor: torch.Tensor) -> Piece:
    """The one piece of a tensor that is not split."""
    return Piece(key, tuple(tensor.shape), (0,) * tensor.ndim, tensor)


def pieces_of_slice(key: str, tensor: torch.Tensor, split: SplitSpec | None, tp_rank: int, tp_size: int) -> list[Piece]:
    """The pieces of the slice that ``tp_rank`` holds of a tensor, or (``split`` None) of the whole tensor, without
    empty ones.
    """
    if split is None:
        return [whole_piece(key, tensor)] if tensor.numel() else []
    return [
        Piece(key, split.full_shape, offsets, tensor.narrow(split.dim, start, length))
        for offsets, start, length in _blocks(split, (0,) * tensor.ndim, tuple(tensor.shape), tp_rank, tp_size)
    ]


def pieces_of_range(
    key: str,
    flat: torch.Tensor,
    start: int,
    local_shape: Sequence[int],
    split: SplitSpec | None,
    tp_rank: int,
    tp_size: int,
) -> list[Piece]:
    """The pieces of a shard: ``flat`` (any shape, contiguous) holds the elements from ``start`` on of the local slice,
    of shape ``local_shape``, laid out flat.
    """
    elements, shape = flat.reshape(-1), tuple(local_shape)
    result = []
    for corner, sizes, position in rectangles(shape, start, start + elements.numel()):
        part = elements[position : position + prod(sizes)].view(sizes)
        if split is None:
            result.append(Piece(key, shape, corner, part))
            continue
        for offsets, low, length in _blocks(split, corner, sizes, tp_rank, tp_size):
            result.append(Piece(key, split.full_shape, offsets, part.narrow(split.dim, low, length)))
    return result


def rectangles(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """The elements from ``start`` to ``stop`` of a flat tensor as rectangles of ``shape``: (corner, sizes, position
    behind ``start``), ascending. There are at most 2 * ndim - 1.
    """
    position, shape = start, tuple(shape)
    while position < stop:
        # The largest block that begins here: whole sub-tensors of the last dimensions, as many as fit.
        dim, stride = len(shape), 1
        while dim > 0 and position % (stride * shape[dim - 1]) == 0 and position + stride * shape[dim - 1] <= stop:
            dim -= 1
            stride *= shape[dim]
        if dim == 0:
            yield (0,) * len(shape), shape, position - start
            return
        corner, rest = [], position
        for length in reversed(shape):
            corner.append(rest % length)
            rest //= length
        corner.reverse()
        count = min((stop - position) // stride, shape[dim - 1] - corner[dim - 1])
        yield tuple(corner), (*(1,) * (dim - 1), count, *shape[dim:]), position - start
        position += count * stride


def _blocks(
    split: SplitSpec, corner: Sequence[int], sizes: Sequence[int], tp_rank: int, tp_size: int
) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """The parts of a rectangle of the local slice that are rectangles of the whole tensor, too: (offsets in that, start
    in the rectangle along ``split.dim``, length).
    """
    if prod(sizes) == 0:
        return
    low, high = corner[split.dim], corner[split.dim] + sizes[split.dim]
    behind = 0  # where the block begins in the slice
    for block in split.ranges(tp_rank, tp_size):
        width = block.stop - block.start
        first, last = max(low, behind), min(high, behind + width)
        if first < last:
            offset = block.start + first - behind
            yield (*corner[: split.dim], offset, *corner[split.dim + 1 :]), first - low, last - first
        behind += width
