"""Ordinary tensors that microbatches see and write to while they take turns.

[Note: state] A tensor that lives outside the step (a running sum, a counter) carries something from one microbatch to
the next. Where that shows in the discovery step, the microbatches of later steps do not take turns. Where it begins
later, behind a branch, a microbatch could read what the one before is yet to write, or miss it. Nobody can put that
right afterwards; here it is noticed, and the step fails instead of computing with the wrong numbers.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch

from modelparallel.errors import StepUsageError
from modelparallel.pipeline.values.stage_tensor import last_element, storage_address
from modelparallel.torch_compat.private_parts import base_of

_MOST_PIECES = 64


@dataclass
class _MemoryRange:
    """Elements of a tensor's memory; not kept alive: when the tensor is gone, the memory may be given to others."""

    owner: weakref.ref[torch.Tensor]
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def overlaps(self, other: _MemoryRange) -> bool:
        """Whether both have an element in common, as far as that is quickly told; True when in doubt."""
        if self.owner() is None or other.owner() is None:
            return False
        if 0 in self.shape or 0 in other.shape or self.end() < other.offset or other.end() < self.offset:
            return False
        if self.stride != other.stride:
            return True
        # Two slices of one tensor: both are boxes in its coordinates, which divide the offset by the strides.
        left, right = self.offset, other.offset
        for dim in sorted(range(len(self.stride)), key=lambda index: -self.stride[index]):
            step = self.stride[dim]
            if step == 0:
                continue
            first, second = left // step, right // step
            left, right = left % step, right % step
            if first + self.shape[dim] <= second or second + other.shape[dim] <= first:
                return False
        return True

    def end(self) -> int:
        """The last element."""
        return last_element(self.offset, self.shape, self.stride)


class Sightings:
    """Which memory the microbatches of one step, which take turns, have seen and written. Microbatches that are done do
    not count any more.
    """

    def __init__(self) -> None:
        self._seen: dict[int, dict[int, list[_MemoryRange]]] = {}
        self._written: dict[int, dict[int, list[_MemoryRange]]] = {}
        self._changed_by: dict[str, int] = {}  # module -> the last microbatch whose call changed its buffers

    def changed_buffers(self, microbatch: int, module: str) -> None:
        """A call of a module by ``microbatch`` has changed its buffers (running statistics)."""
        last = self._changed_by.get(module, microbatch)
        if microbatch < last:
            raise StepUsageError(
                f"module '{module}' changes its buffers (running statistics) and is called again by microbatch "
                f"{microbatch} after microbatch {last} has called it. They take turns on each stage, since in the "
                "first step of this kind it was called once, so the order differs from that without a pipeline: call "
                "it as often in the first step (then they run one after another)"
            )
        self._changed_by[module] = microbatch

    def used(self, microbatch: int, tensor: torch.Tensor, *, is_written: bool) -> None:
        """Code of ``microbatch`` reads an ordinary tensor, or has written, or is about to write, to it."""
        address = storage_address(tensor)
        if address is None:
            return
        piece = _piece(tensor)
        own, opposite = (self._written, self._seen) if is_written else (self._seen, self._written)
        self._check(microbatch, address, piece, opposite, tensor)
        _add(own, microbatch, address, piece)

    def done(self, microbatch: int) -> None:
        """The body of ``microbatch`` is at its end."""
        self._seen.pop(microbatch, None)
        self._written.pop(microbatch, None)

    @staticmethod
    def _check(
        microbatch: int,
        address: int,
        piece: _MemoryRange,
        noted: dict[int, dict[int, list[_MemoryRange]]],
        tensor: torch.Tensor,
    ) -> None:
        for other, pieces in noted.items():
            if other != microbatch and any(piece.overlaps(one) for one in pieces.get(address, ())):
                raise StepUsageError(
                    f"a tensor of shape {tuple(tensor.shape)} that is kept outside the step is written to while "
                    f"microbatches {min(microbatch, other)} and {max(microbatch, other)} use it. They take turns on "
                    "each stage, since the first step of this kind did not write to it, so one would see the wrong "
                    "value: write to it in the first step, too (then they run one after another), or return what is to "
                    "be added from the step function and add it outside"
                )


def _piece(tensor: torch.Tensor) -> _MemoryRange:
    owner = weakref.ref(base_of(tensor))
    return _MemoryRange(owner, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())


def _add(noted: dict[int, dict[int, list[_MemoryRange]]], microbatch: int, address: int, piece: _MemoryRange) -> None:
    pieces = noted.setdefault(microbatch, {}).setdefault(address, [])
    place = (piece.offset, piece.shape, piece.stride)
    if any(one.owner() is piece.owner() and (one.offset, one.shape, one.stride) == place for one in pieces):
        return
    if len(pieces) < _MOST_PIECES:
        pieces.append(piece)
        return
    # Many small parts: all from the first to the last element.
    first = min(one.offset for one in (*pieces, piece))
    last = max(one.end() for one in (*pieces, piece))
    pieces[:] = [_MemoryRange(piece.owner, first, (last + 1 - first,), (1,))]
