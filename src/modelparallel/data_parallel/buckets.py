"""Flat gradient buckets: which parameter lies where, and how local gradients get in and final ones out.

Note: Bucket contents
    Gradients of one group, divisor, dtype and device lie one after another in a flat tensor. Behind them come one
    flag per parameter ("this rank has a gradient") and, in the last bucket of each group (the *carrier*), one flag
    per bucket of the group ("this rank's gradients changed after the bucket was launched"), and those of progress.py.
    The flags travel in the dtype of the bucket: a sum over ranks is only compared with zero. ``p.grad`` keeps the
    local gradient, untouched, until the reduction is over, so that a bucket can be packed again.

Note: Gradients as views
    A bucket keeps its flat tensor for the next reduction, unless gradients are to be views (``as_views``): then
    ``p.grad`` becomes a part of the flat tensor, the local gradient is let go, and the bucket forgets its flat tensor,
    which lives as long as one of its gradients does. The next reduction packs into a new one, since what is added to
    the gradients meanwhile is local and must stay intact like any local gradient. Without overlap the buckets are
    packed and taken over one by one, so that beside the gradients there is one flat tensor at a time.

Note: Scale
    The final gradient is the sum over the group of the local gradients, divided by ``divisor`` (the number of dp
    ranks, also where the group is only the rdp group). Local gradients are multiplied by 1 / divisor while they are
    packed, as DDP does: the same rounding, and no overflow in half precision. A gradient that was final before (no
    local gradient came since the last reduction, or new ones were added to it) is equal on all ranks and must stay as
    it is. The sum over the group divided by the divisor keeps it only if the group has ``divisor`` ranks; otherwise
    the final part is multiplied by divisor / group size first (``Slot.is_final``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import nn

from modelparallel.comm.waits import Wait
from modelparallel.data_parallel.progress import NUM_FLAGS
from modelparallel.data_parallel.shard_gradient import ShardGradient
from modelparallel.torch_compat.private_parts import foreach_copy_, foreach_mul_, version_of

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group

MEGABYTE = 1024 * 1024


@dataclass(frozen=True)
class ReducedParameter:
    """A parameter whose gradient is summed over ``group`` and divided by ``divisor`` (None: the reducer's)."""

    name: str
    parameter: nn.Parameter
    group: Group
    divisor: int | None = None


def gradient_dtype(parameter: torch.Tensor) -> torch.dtype:
    """The dtype in which autograd accumulates the gradient: the parameter's, unless ``grad_dtype`` says otherwise."""
    # torch 2.11 has no such attribute; None stands for "any".
    return getattr(parameter, "grad_dtype", None) or parameter.dtype


class Slot:
    """The place of one parameter."""

    __slots__ = (
        "divisor",
        "divisor_now",
        "group_size",
        "is_final",
        "is_fired",
        "is_silent",
        "name",
        "num_present",
        "parameter",
        "view",
    )

    def __init__(self, entry: ReducedParameter, divisor: int) -> None:
        self.name = entry.name
        self.parameter = entry.parameter
        self.divisor = divisor
        self.group_size = entry.group.size
        # Inside join() fewer ranks than those of the group may have gradients, and others than the divisor may count.
        self.divisor_now = divisor
        self.num_present = entry.group.size
        # This rank takes part in reductions without a gradient of its own.
        self.is_silent = False
        # What p.grad holds is equal on all ranks; see Note: Scale. What a user puts there before the first backward
        # counts as equal.
        self.is_final = True
        # A gradient has come since the reduction was armed.
        self.is_fired = False
        self.view: torch.Tensor | None = None

    @property
    def needs_rescaling(self) -> bool:
        """Whether a final gradient, summed like a local one, would become another."""
        return self.divisor != self.group_size

    def final_part_to_local(self) -> None:
        """Before new local gradients are added to a final one: make the sum over the group, divided, give the final
        one again.
        """
        if not self.is_final:
            return
        self.is_final = False
        gradient = self.parameter.grad
        with torch.no_grad():
            if isinstance(gradient, ShardGradient):
                self.parameter.grad = gradient.as_addend(self.divisor)
            elif gradient is not None and self.divisor != self.group_size:
                gradient.mul_(self.divisor / self.group_size)

    @property
    def pack_divisor(self) -> int:
        """What the sum over the group of the local gradients is divided by."""
        return self.num_present if self.is_final and self.needs_rescaling else self.divisor_now

    @property
    def gradient(self) -> torch.Tensor | None:
        """The local gradient."""
        gradient = self.parameter.grad
        return None if self.is_silent or isinstance(gradient, ShardGradient) else gradient

    @property
    def pack_scale(self) -> float:
        return 1.0 / self.pack_divisor


class Bucket:
    """Gradients that are reduced in one collective. ``index`` is the place in the launch order, the same on all ranks
    of the group.
    """

    # Whether unpacking gives up the local gradients.
    takes_over = False
    # Whether nothing may be launched before the backward is over.
    waits_for_the_end = False
    # Whether the flags do not travel in the bucket itself.
    needs_flag_bucket = False

    def __init__(
        self,
        slots: Sequence[Slot],
        group: Group,
        device: torch.device,
        dtype: torch.dtype,
        *,
        as_views: bool = False,
    ) -> None:
        self.index = 0
        self.slots = tuple(slots)
        self.group = group
        self.device = device
        self.dtype = dtype
        self.takes_over = as_views
        self.num_waiting = 0
        # Launched only when the step is over, since its gradients were once found to change after the launch.
        self.is_late = False
        # The last bucket of its group; launched when the step is over, since it tells which others had changed.
        self.is_carrier = False
        # Buckets of the same group whose "changed" flags this one carries; empty in all buckets but the last of a
        # group.
        self.carried: tuple[Bucket, ...] = ()
        # For each parameter whether any rank has a gradient, where a FlagBucket tells that.
        self.has_anywhere: tuple[bool, ...] = ()
        self.work: dist.Work | None = None
        self._flat: torch.Tensor | None = None
        self._has_flags: torch.Tensor | None = None
        self._changed_flags: torch.Tensor | None = None
        # Of a carrier: what this rank tells of itself, see progress.py.
        self.own_flags: tuple[bool, ...] = (False,) * NUM_FLAGS
        self._rank_flags: torch.Tensor | None = None
        # The gradients and their versions at the launch; held, so that another tensor cannot come to lie at the same
        # address.
        self._launched_gradients: list[torch.Tensor | None] = []
        self._launched_versions: list[int] = []

    @property
    def is_launched(self) -> bool:
        """Whether a reduction was started and not forgotten."""
        return self.work is not None

    @property
    def is_one_by_one(self) -> bool:
        """Whether, after the backward, each bucket is reduced and unpacked before the next one is packed."""
        return self.takes_over

    @property
    def flat(self) -> torch.Tensor | None:
        """The memory of the bucket; None while it has none."""
        return self._flat

    @property
    def title(self) -> str:
        names = f"{self.slots[0].name!r}" + (f" to {self.slots[-1].name!r}" if len(self.slots) > 1 else "")
        return f"gradient bucket {self.index} ({names})"

    def start_waiting(self) -> None:
        """Wait for a gradient of every parameter that is not frozen."""
        self.num_waiting = sum(slot.parameter.requires_grad for slot in self.slots)
        for slot in self.slots:
            slot.is_fired = False

    def _allocate(self) -> None:
        sizes = [slot.parameter.numel() for slot in self.slots]
        sizes += [len(sizes), len(self.carried), NUM_FLAGS if self.is_carrier else 0]
        self._flat = torch.empty(sum(sizes), dtype=self.dtype, device=self.device)
        *pieces, self._has_flags, self._changed_flags, self._rank_flags = self._flat.split(sizes)
        for slot, piece in zip(self.slots, pieces, strict=True):
            slot.view = flat_view(piece, slot.parameter) if self.takes_over else piece.view(slot.parameter.shape)

    @torch.no_grad()
    def pack(self) -> None:
        """Fill the bucket from the local gradients, scaled, and remember which they were."""
        if self._flat is None:
            self._allocate()
        gradients = self._pack_gradients()
        assert self._has_flags is not None and self._changed_flags is not None
        if all(gradient is not None for gradient in gradients):
            self._has_flags.fill_(1)
        else:
            self._has_flags.copy_(torch.tensor([gradient is not None for gradient in gradients]))
        if self.carried:
            flags = [bucket.has_changed() for bucket in self.carried]
            if any(flags):
                self._changed_flags.copy_(torch.tensor(flags))
            else:
                self._changed_flags.zero_()
        if self.is_carrier:
            assert self._rank_flags is not None
            self._rank_flags.copy_(torch.tensor(self.own_flags))

    def _pack_gradients(self) -> list[torch.Tensor | None]:
        """Fill the views of the slots; returns the local gradients, and remembers them."""
        gradients: list[torch.Tensor | None] = []
        present: list[tuple[Slot, torch.Tensor]] = []
        for slot in self.slots:
            gradient = slot.gradient
            gradients.append(gradient)
            assert slot.view is not None
            if gradient is None:
                slot.view.zero_()
            else:
                present.append((slot, gradient.to_dense() if gradient.is_sparse else gradient))
        self._fill(present)
        self._launched_gradients = gradients
        self._launched_versions = [-1 if gradient is None else version_of(gradient) for gradient in gradients]
        return gradients

    def _fill(self, present: Sequence[tuple[Slot, torch.Tensor]]) -> None:
        if self.device.type == "cpu":
            # One pass over the memory instead of the two of copy and multiply.
            for slot, gradient in present:
                torch.mul(gradient, self.scale_of(slot), out=slot.view)
            return
        views = [slot.view for slot, _ in present if slot.view is not None]
        foreach_copy_(views, [gradient for _, gradient in present])
        scales = [self.scale_of(slot) for slot, _ in present]
        if any(scale != 1.0 for scale in scales):
            foreach_mul_(views, scales)

    def scale_of(self, slot: Slot) -> float:
        """By which the local gradient is multiplied."""
        return slot.pack_scale

    @property
    def has_flags(self) -> Sequence[bool]:
        """For each parameter whether any rank has a gradient; after the wait."""
        assert self._has_flags is not None
        return [flag.real > 0 for flag in self._has_flags.tolist()]

    def launch(self) -> None:
        """Start the reduction of what was packed."""
        assert self._flat is not None
        self.work = dist.all_reduce(self._flat, group=self.group.process_group, async_op=True)

    def wait(self, timeout_seconds: float) -> None:
        """Wait for the reduction; again is cheap."""
        assert self.work is not None
        Wait(self.group, f"the reduction of {self.title}", seconds=timeout_seconds).end(self.work, self.device)

    def has_changed(self) -> bool:
        """Whether a local gradient is another one than was launched.

        The version of the tensor is compared and not only what the hooks saw: hooks do not fire for every way to
        accumulate a gradient, and a script may change gradients itself.
        """
        if not self.is_launched:
            return False
        for slot, gradient, version in zip(self.slots, self._launched_gradients, self._launched_versions, strict=True):
            now = slot.gradient
            if now is not gradient or (now is not None and version_of(now) != version):
                return True
        return False

    def changed_anywhere(self) -> tuple[bool, ...]:
        """For each carried bucket whether it changed on any rank of the group; only after the wait for this one."""
        assert self._changed_flags is not None
        return tuple(value.real > 0 for value in self._changed_flags.tolist())

    def rank_flags(self) -> list[bool]:
        """The flags by which the ranks tell of themselves, of all ranks together; of a carrier, after the wait."""
        assert self._rank_flags is not None
        return [value.real > 0 for value in self._rank_flags.tolist()]

    @torch.no_grad()
    def unpack(self) -> None:
        """Write the reduced gradients to ``p.grad``; where no rank had one it stays None."""
        if self.takes_over:
            # Reading the flags stops the host on a GPU.
            is_complete = all(slot.gradient is not None for slot in self.slots)
            flags = [True] * len(self.slots) if is_complete else self.has_flags
            for slot, has_gradient in zip(self.slots, flags, strict=True):
                slot.is_final = True
                if has_gradient:
                    assert slot.view is not None
                    # `data`: each gradient counts its own versions, so that has_changed() can tell them apart.
                    slot.parameter.grad = slot.view.data
            return
        targets: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        has_anywhere: Sequence[bool] | None = None
        for position, slot in enumerate(self.slots):
            gradient = slot.parameter.grad
            slot.is_final = True
            assert slot.view is not None
            if gradient is not None and not gradient.is_sparse:
                targets.append(gradient)
                values.append(slot.view)
                continue
            if has_anywhere is None:
                has_anywhere = self.has_flags
            if has_anywhere[position]:
                slot.parameter.grad = torch.empty_like(slot.parameter.detach(), dtype=self.dtype).copy_(slot.view)
        if targets:
            foreach_copy_(targets, values)

    def unpack_silently(self) -> None:
        """What a rank does that took part without gradients: ``p.grad`` stays as it is."""

    def forget(self) -> None:
        """After the reduction: nothing is under way, and the gradients are no longer held."""
        self.work = None
        self._launched_gradients = []
        self._launched_versions = []
        if self.takes_over:
            self._flat = self._has_flags = self._changed_flags = self._rank_flags = None
            for slot in self.slots:
                slot.view = None


class FlagBucket(Bucket):
    """The carrier of a group whose flags do not fit into its buckets: which of them changed, and which parameters have
    a gradient on any rank (``Bucket.has_anywhere``). Holds no gradients.
    """

    def __init__(self, group: Group, device: torch.device) -> None:
        super().__init__((), group, device, torch.uint8)

    @property
    def title(self) -> str:
        return f"the flags of the gradient buckets before bucket {self.index}"

    def pack(self) -> None:
        """Look at the local gradients."""
        flags: list[bool] = []
        for bucket in self.carried:
            flags.append(bucket.has_changed())
            flags.extend(slot.gradient is not None for slot in bucket.slots)
        flags.extend(self.own_flags)
        self._flat = torch.tensor(flags, dtype=self.dtype).to(self.device)

    def launch(self) -> None:
        """Send them to all ranks."""
        assert self._flat is not None
        self.work = dist.all_reduce(self._flat, dist.ReduceOp.MAX, group=self.group.process_group, async_op=True)

    def changed_anywhere(self) -> tuple[bool, ...]:
        """As of any carrier; also tells the buckets which of their parameters have a gradient."""
        assert self._flat is not None
        flags, position, changed = self._flat.tolist(), 0, []
        for bucket in self.carried:
            stop = position + 1 + len(bucket.slots)
            changed.append(flags[position] > 0)
            bucket.has_anywhere = tuple(flag > 0 for flag in flags[position + 1 : stop])
            position = stop
        return tuple(changed)

    def rank_flags(self) -> list[bool]:
        """As of any carrier."""
        assert self._flat is not None
        return [flag > 0 for flag in self._flat.tolist()[-NUM_FLAGS:]]

    def unpack(self) -> None:
        """Tell the buckets, where nothing could change."""
        self.changed_anywhere()

    def unpack_silently(self) -> None:
        """Tell the buckets; shards get gradients all the same."""
        self.changed_anywhere()


class SharedOut(Protocol):
    """What is shared out: a new sequence of buckets when it is laid out anew."""

    @property
    def buckets(self) -> Sequence[Bucket]:
        """In the order in which their gradients come."""


def flat_view(piece: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The flat ``piece`` in the shape of the parameter, and in its strides where these leave no holes."""
    expected = 1
    for stride, size in sorted(zip(parameter.stride(), parameter.shape, strict=True)):
        if size != 1 and stride != expected:
            return piece.view(parameter.shape)
        expected *= size
    return piece.as_strided(parameter.shape, parameter.stride(), piece.storage_offset())


def fill_buckets(
    entries: Sequence[ReducedParameter], slots: Sequence[Slot], bucket_cap_mb: float
) -> list[tuple[list[Slot], Group]]:
    """Put the slots into buckets, in the order in which they are to be launched; the slots of a bucket have one group,
    divisor, dtype and device.

    Backward makes the gradients in about the reverse of the order of the parameters, so the buckets are filled from
    the last parameter. A bucket takes its place in the launch order when it is full. All ranks of a group hold the
    same parameters, so they plan the same order.
    """
    cap_bytes = bucket_cap_mb * MEGABYTE
    filling: dict[tuple[object, ...], tuple[list[Slot], Group]] = {}
    sizes: dict[tuple[object, ...], int] = {}
    full: list[tuple[list[Slot], Group]] = []
    for entry, slot in zip(reversed(entries), reversed(slots), strict=True):
        parameter = entry.parameter
        dtype = gradient_dtype(parameter)
        key = (entry.group.ranks, slot.divisor, parameter.dtype, dtype, parameter.device)
        filling.setdefault(key, ([], entry.group))[0].append(slot)
        sizes[key] = sizes.get(key, 0) + parameter.numel() * dtype.itemsize
        if sizes[key] >= cap_bytes:
            full.append(filling.pop(key))
            del sizes[key]
    full.extend(filling.values())
    return full


def with_carriers(buckets: Sequence[Bucket]) -> tuple[Bucket, ...]:
    """Number the buckets, and let the last of each group, or one added for that, carry the flags of the others."""
    by_group: dict[tuple[int, ...], list[Bucket]] = {}
    for bucket in buckets:
        bucket.is_carrier, bucket.carried = False, ()
        by_group.setdefault(bucket.group.ranks, []).append(bucket)
    for members in by_group.values():
        if any(bucket.needs_flag_bucket for bucket in members):
            members.append(FlagBucket(members[0].group, members[0].device))
        *others, carrier = members
        carrier.carried = tuple(others)
        carrier.is_carrier = True
    added = [members[-1] for members in by_group.values() if not members[-1].slots]
    for index, bucket in enumerate((*buckets, *added)):
        bucket.index = index
    return (*buckets, *added)
