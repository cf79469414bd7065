"""Buckets whose gradients go to owners: the memory of parameters, gradients and shards of one bucket.

[Note: shard buckets] The parameters of a bucket lie one after another in one flat tensor, ``p.data`` are views of it.
It is cut into one block for each rank of the group; what of a parameter lies in the rank's own block is a shard, a view
of the same memory, which an optimizer updates. So after an update the blocks of all ranks are gathered in place.
Gradients are packed into a flat tensor of the same layout; each rank gets the sum of its own block. Then the local
gradients of whole parameters and the flat tensor are let go, and the gradients of shards, views of the sum, stay. What
stands at ``p.grad`` for them is in shard_gradient.py; what a script does there counts (`take_edits`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import nn

from modelparallel.comm.collectives.started import Pending, start_from_owners, start_to_owners
from modelparallel.data_parallel.buckets import Bucket, Slot, gradient_dtype
from modelparallel.data_parallel.shard_gradient import ShardGradient, part_of_whole
from modelparallel.errors import StepUsageError
from modelparallel.parameters.shards import Shard

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group


@dataclass(frozen=True)
class _Place:
    """A shard of this rank: the position of its slot, and its range in the own block."""

    shard: Shard
    position: int
    start: int
    stop: int


class ShardBucket(Bucket):
    """Parameters that are reduced to the owners of blocks, and gathered from them."""

    needs_flag_bucket = True

    def __init__(
        self,
        slots: Sequence[Slot],
        group: Group,
        bounds: Sequence[int],
        counted: set[int],
        *,
        has_whole_parameters: bool = False,
    ) -> None:
        """Moves the parameters' data. ``bounds``: block i of the group's rank i is from bounds[i] to bounds[i + 1].
        ``counted``: slots, by id, of which this rank adds its range to a norm. ``has_whole_parameters``: blocks end
        where parameters end, and shards have the shape of their parameter.
        """
        first = slots[0].parameter
        super().__init__(slots, group, first.device, gradient_dtype(first), as_views=True)
        self.bounds = tuple(bounds)
        # Whether the gradients of the shards have been used by an update.
        self._is_consumed = False
        #: Whether gradients were reduced, or an update was gathered.
        self.is_used = False
        self._reduction: Pending | None = None
        self._own_block: torch.Tensor | None = None
        sizes = [slot.parameter.numel() for slot in self.slots]
        self._starts = [sum(sizes[:position]) for position in range(len(sizes))]
        self._parameters = torch.zeros(self.bounds[-1], dtype=first.dtype, device=first.device)
        # Where each parameter's data must be, by which a replaced one is noticed.
        self._addresses: list[int] = []
        for slot, start in zip(self.slots, self._starts, strict=True):
            data = self._parameters[start : start + slot.parameter.numel()].view(slot.parameter.shape)
            data.copy_(slot.parameter.detach())
            slot.parameter.data = data
            self._addresses.append(data.data_ptr())
        self._places = self._cut_shards(counted, has_whole_parameters)
        self._place_at = {place.position: place for place in self._places}
        # What stands at ``p.grad`` of each parameter for the gradient of its shards, since it was put there.
        self._shown: list[ShardGradient | None] = [None] * len(self.slots)

    def _cut_shards(self, counted: set[int], has_whole_parameters: bool) -> list[_Place]:
        places = []
        own_start, own_stop = self.bounds[self.group.rank_in_group : self.group.rank_in_group + 2]
        for position, (slot, first) in enumerate(zip(self.slots, self._starts, strict=True)):
            start, stop = max(first, own_start), min(first + slot.parameter.numel(), own_stop)
            if start >= stop:
                continue
            data = self._parameters[start:stop]
            if has_whole_parameters:
                data = data.view(slot.parameter.shape)
            shard = Shard(
                slot.parameter,
                nn.Parameter(data),
                start - first,
                stop - first,
                self.group,
                is_counted=id(slot) in counted,
            )
            places.append(_Place(shard, position, start - own_start, stop - own_start))
        return places

    @property
    def shards(self) -> list[Shard]:
        """This rank's shards, in the order of the parameters."""
        return [place.shard for place in self._places]

    # The reduction

    @property
    def is_launched(self) -> bool:
        return self._reduction is not None

    def _allocate(self) -> None:
        self.dtype = reduce(torch.promote_types, (gradient_dtype(slot.parameter) for slot in self.slots))
        self._flat = torch.empty(self.bounds[-1], dtype=self.dtype, device=self.device)
        for slot, start in zip(self.slots, self._starts, strict=True):
            slot.view = self._flat[start : start + slot.parameter.numel()].view(slot.parameter.shape)

    @torch.no_grad()
    def pack(self) -> None:
        """Fill the flat gradients from the local ones, scaled, and remember which they were."""
        if self._flat is None:
            self._allocate()
        self._pack_gradients()

    def launch(self) -> None:
        """Start to send what was packed to the owners."""
        assert self._flat is not None
        self.is_used = True
        self._reduction = start_to_owners(self._flat, self.bounds, self.group)

    @torch.no_grad()
    def wait(self, timeout_seconds: float) -> None:
        """Wait for the sum of the own block; again is cheap."""
        assert self._reduction is not None
        purpose = f"the reduction of {self.title} to the owners of shards"
        self._own_block = self._reduction.wait(purpose, timeout_seconds)

    @torch.no_grad()
    def unpack(self) -> None:
        """Write the gradients of the shards, or add to them; where no rank had a gradient they stay. Whole parameters
        show them.
        """
        block, self._own_block = self._own_block, None
        assert block is not None
        self.take_edits(is_reduced=True)
        for position, slot in enumerate(self.slots):
            slot.is_final = True
            if not self.has_anywhere[position]:
                continue
            place = self._place_at.get(position)
            if place is not None:
                tensor = place.shard.tensor
                gradient = block[place.start : place.stop].view(tensor.shape)
                if tensor.grad is not None:
                    tensor.grad.add_(gradient)
                else:
                    self._give(place, gradient.data)
            self._show(position)
        self._is_consumed = False

    # What stands at ``p.grad``

    def _give(self, place: _Place, gradient: torch.Tensor | None) -> None:
        tensor = place.shard.tensor
        if gradient is not None and gradient_dtype(tensor) != gradient.dtype:
            tensor.grad_dtype = gradient.dtype
        tensor.grad = gradient

    def _show(self, position: int) -> None:
        slot, place = self.slots[position], self._place_at.get(position)
        if self._shown[position] is None:
            dtype = self.dtype if place is None or place.shard.tensor.grad is None else place.shard.tensor.grad.dtype
            start, stop = (0, 0) if place is None else (place.shard.start, place.shard.stop)
            self._shown[position] = ShardGradient(
                slot.name, slot.parameter.shape, start, stop, dtype=dtype, device=slot.parameter.device,
                shard=None if place is None else place.shard.tensor,
            )  # fmt: skip
        slot.parameter.grad = self._shown[position]

    def take_edits(self, *, is_reduced: bool = False) -> None:
        """What a script has put at ``p.grad`` since the gradients were shown, or taken away there, holds for the
        shards. ``is_reduced``: ordinary gradients there are in the sum that has come, and go.
        """
        for position, slot in enumerate(self.slots):
            now, shown, place = slot.parameter.grad, self._shown[position], self._place_at.get(position)
            if now is shown:
                if shown is not None and shown.is_taken:
                    slot.parameter.grad = self._shown[position] = None
                continue
            is_given = isinstance(now, ShardGradient) or (now is not None and slot.is_final and not is_reduced)
            if place is not None:
                self._give(place, self._part_of(now, place) if now is not None and is_given else None)
            if is_given:
                self._show(position)
                continue
            self._shown[position] = None
            if is_reduced:
                slot.parameter.grad = None

    @staticmethod
    def _part_of(gradient: torch.Tensor, place: _Place) -> torch.Tensor:
        if isinstance(gradient, ShardGradient):
            own = gradient.to_local()
        else:
            own = part_of_whole(gradient, place.shard.start, place.shard.stop)
        return own.view(place.shard.tensor.shape)

    def unpack_silently(self) -> None:
        """The shards get their gradients: this rank goes on updating them. Nobody else clears used ones now."""
        if self._is_consumed:
            self.forget_gradients(set_to_none=True)
        self.unpack()

    def forget_gradients(self, *, set_to_none: bool) -> None:
        """``zero_grad`` of the shards, and of what is or waits at ``p.grad``."""
        self.take_edits()
        for position, slot in enumerate(self.slots):
            if set_to_none:
                slot.parameter.grad = self._shown[position] = None
            elif slot.parameter.grad is not None:
                slot.parameter.grad.zero_()
        for shard in self.shards:
            if set_to_none:
                shard.tensor.grad = None
            elif shard.tensor.grad is not None:
                shard.tensor.grad.zero_()

    def forget(self) -> None:
        """After the reduction: nothing is under way, and nothing of it is held."""
        super().forget()
        self._reduction = self._own_block = None

    # The update

    def take_back(self) -> None:
        """Parameters whose ``data`` was replaced come back, with their values, to the common memory."""
        for slot, start, address in zip(self.slots, self._starts, self._addresses, strict=True):
            parameter = slot.parameter
            if parameter.data_ptr() == address:
                continue
            if parameter.dtype != self._parameters.dtype or parameter.device != self._parameters.device:
                raise StepUsageError(
                    f"parameter '{slot.name}' was {self._parameters.dtype} on {self._parameters.device} when its "
                    f"optimizer state was sharded (shard_optimizer_state) and is {parameter.dtype} on "
                    f"{parameter.device} now: convert the model before smp.DistributedModel wraps it, or before the "
                    "first step with pipelining"
                )
            data = self._parameters[start : start + parameter.numel()].view(parameter.shape)
            data.copy_(parameter.detach())
            parameter.data = data

    def start_gather(self) -> Pending:
        """All ranks get the values of all shards."""
        self.is_used = self._is_consumed = True
        return start_from_owners(self._parameters, self.bounds, self.group)

    def note_changed(self) -> None:
        """The gathered values are there: graphs that were made with the old ones notice it."""
        for slot in self.slots:
            torch.autograd.graph.increment_version(slot.parameter)


def equal_bounds(slots: Sequence[Slot], size: int) -> list[int]:
    """Blocks of equal length; the last ones are filled up by less than one element for each rank."""
    length = -(-sum(slot.parameter.numel() for slot in slots) // size)
    return [rank * length for rank in range(size + 1)]


def whole_bounds(slots: Sequence[Slot], owners: Sequence[int], size: int) -> list[int]:
    """Blocks of whole parameters; ``owners`` ascend."""
    lengths = [0] * size
    for slot, owner in zip(slots, owners, strict=True):
        lengths[owner] += slot.parameter.numel()
    return [0, *accumulate(lengths)]
