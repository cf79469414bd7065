"""What is known of each parameter and buffer of a distributed model: the rows of the parameter table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SplitSpec:
    """How a tensor is cut over the tensor-parallel ranks, and all the arithmetic of it.

    ``dim`` is the cut dimension (not negative), ``full_shape`` the shape before the cut. ``parts`` are the lengths of
    blocks that lie one after another along ``dim`` (queries, keys and values in one weight; gate and up), each of which
    is cut for itself; empty means one block. A block whose length does not divide is cut as ``torch.chunk`` does it,
    into slices of the rounded-up length of which the last ones are shorter, or empty.
    """

    dim: int
    full_shape: tuple[int, ...]
    parts: tuple[int, ...] = ()

    def ranges(self, tp_rank: int, tp_size: int) -> tuple[slice, ...]:
        """The index ranges of ``dim`` that ``tp_rank`` holds, one for each block."""
        result = []
        start = 0
        for length in self._blocks():
            width = -(-length // tp_size)
            low, high = min(tp_rank * width, length), min((tp_rank + 1) * width, length)
            result.append(slice(start + low, start + high))
            start += length
        return tuple(result)

    def local_length(self, tp_rank: int, tp_size: int) -> int:
        """The length along ``dim`` of the slice of ``tp_rank``."""
        return sum(part.stop - part.start for part in self.ranges(tp_rank, tp_size))

    def local_shape(self, tp_rank: int, tp_size: int) -> tuple[int, ...]:
        """The shape of the slice of ``tp_rank``."""
        return (*self.full_shape[: self.dim], self.local_length(tp_rank, tp_size), *self.full_shape[self.dim + 1 :])

    def slice_of(self, full: torch.Tensor, tp_rank: int, tp_size: int, dim: int | None = None) -> torch.Tensor:
        """The slice of ``tp_rank``; a view of ``full`` if it is one range.

        ``dim``: the dim to cut, of a tensor in which another one has that length.
        """
        dim = self.dim if dim is None else dim
        parts = [full.narrow(dim, part.start, part.stop - part.start) for part in self.ranges(tp_rank, tp_size)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def join(self, slices: Sequence[torch.Tensor]) -> torch.Tensor:
        """The full tensor from the slices of all ranks, in the order of tp_rank."""
        if len(self._blocks()) == 1:
            return torch.cat(list(slices), self.dim)
        lengths = [
            [part.stop - part.start for part in self.ranges(tp_rank, len(slices))] for tp_rank in range(len(slices))
        ]
        blocks = [part.split(own, self.dim) for part, own in zip(slices, lengths, strict=True)]
        return torch.cat([part for block in zip(*blocks, strict=True) for part in block], self.dim)

    def _blocks(self) -> tuple[int, ...]:
        return self.parts or (self.full_shape[self.dim],)


@dataclass(frozen=True)
class ParameterRow:
    """One logical parameter or buffer.

    ``name`` is its name in the user's model (the key of every state dict), ``aliases`` the other names of the same
    tensor. ``home`` is the pp_rank that holds it, None as long as the model is not partitioned and for constant
    buffers, which every stage holds. ``tied_copies`` are the other pp_ranks that hold a copy of a tied parameter
    (``tied_weights``), with which modules of theirs compute.
    """

    name: str
    aliases: tuple[str, ...]
    is_buffer: bool
    is_persistent: bool
    dtype: torch.dtype
    full_shape: tuple[int, ...]
    split: SplitSpec | None = None
    is_scaled_batch: bool = False
    home: int | None = None
    tied_copies: tuple[int, ...] = ()

    @property
    def holders(self) -> tuple[int, ...]:
        """The pp_ranks that hold a parameter with a home, that one first."""
        return () if self.home is None else (self.home, *self.tied_copies)

    @property
    def reducer_axis(self) -> str:
        """The group over which its gradient is summed: "rdp" where the gradient already holds the whole tp group's
        batch, else "dp".
        """
        return "rdp" if self.split is not None or self.is_scaled_batch else "dp"
