"""Flat gradient buckets: which parameter lies where, and how local gradients get in and final ones out.

Note: Bucket contents
    Gradients of one group, divisor, dtype and device lie one after another in a flat tensor. Behind them come one
    flag per parameter ("this rank has a gradient") and, in the last bucket of each group (the *carrier*), one flag
    per bucket of the group ("this rank's gradients changed after the bucket was launched"). The flags travel in the
    dtype of the bucket: a sum over ranks is only compared with zero. ``p.grad`` keeps the local gradient, untouched,
    until the reduction is over, so that a bucket can be packed again.

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
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

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


class Slot:
    """The place of one parameter."""

    __slots__ = ("divisor", "group_size", "is_final", "is_fired", "name", "parameter", "view")

    def __init__(self, entry: ReducedParameter, divisor: int) -> None:
        self.name = entry.name
        self.parameter = entry.parameter
        self.divisor = divisor
        self.group_size = entry.group.size
        # What p.grad holds is equal on all ranks; see Note: Scale. What a user puts there before the first backward
        # counts as equal.
        self.is_final = True
        # A gradient has come since the reduction was armed.
        self.is_fired = False
        self.view: torch.Tensor | None = None

    @property
    def needs_rescaling(self) -> bool:
        return self.divisor != self.group_size

    def final_part_to_local(self) -> None:
        """Before new local gradients are added to a final one: make the sum over the group, divided, give the final
        one again.
        """
        if self.is_final:
            self.is_final = False
            if self.parameter.grad is not None:
                with torch.no_grad():
                    self.parameter.grad.mul_(self.divisor / self.group_size)

    @property
    def pack_scale(self) -> float:
        return 1.0 / (self.group_size if self.is_final and self.needs_rescaling else self.divisor)


class Bucket:
    """Gradients that are reduced in one collective. ``index`` is the place in the launch order, the same on all ranks
    of the group.
    """

    def __init__(
        self, index: int, slots: Sequence[Slot], group: Group, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.index = index
        self.slots = tuple(slots)
        self.group = group
        self.device = device
        self.dtype = dtype
        self.num_waiting = len(self.slots)
        # Launched only when the step is over, since its gradients were once found to change after the launch.
        self.is_late = False
        # The last bucket of its group; launched when the step is over, since it tells which others had changed.
        self.is_carrier = False
        # Buckets of the same group whose "changed" flags this one carries; empty in all buckets but the last of a
        # group.
        self.carried: tuple[Bucket, ...] = ()
        self.work: dist.Work | None = None
        self._flat: torch.Tensor | None = None
        self._has_flags: torch.Tensor | None = None
        self._changed_flags: torch.Tensor | None = None
        # The gradients and their versions at the launch; held, so that another tensor cannot come to lie at the same
        # address.
        self._launched_gradients: list[torch.Tensor | None] = []
        self._launched_versions: list[int] = []

    @property
    def is_launched(self) -> bool:
        return self.work is not None

    @property
    def flat(self) -> torch.Tensor | None:
        """The memory of the bucket; None before the first reduction."""
        return self._flat

    @property
    def title(self) -> str:
        names = f"{self.slots[0].name!r}" + (f" to {self.slots[-1].name!r}" if len(self.slots) > 1 else "")
        return f"gradient bucket {self.index} ({names})"

    def start_waiting(self) -> None:
        """Wait for a gradient of every parameter."""
        self.num_waiting = len(self.slots)
        for slot in self.slots:
            slot.is_fired = False

    def _allocate(self) -> None:
        sizes = [slot.parameter.numel() for slot in self.slots]
        self._flat = torch.zeros(sum(sizes) + len(sizes) + len(self.carried), dtype=self.dtype, device=self.device)
        *pieces, self._has_flags, self._changed_flags = self._flat.split([*sizes, len(sizes), len(self.carried)])
        for slot, piece in zip(self.slots, pieces, strict=True):
            slot.view = piece.view(slot.parameter.shape)

    @torch.no_grad()
    def pack(self) -> None:
        """Fill the bucket from the local gradients, scaled, and remember which they were."""
        if self._flat is None:
            self._allocate()
        assert self._flat is not None and self._has_flags is not None and self._changed_flags is not None
        gradients: list[torch.Tensor | None] = []
        present: list[tuple[Slot, torch.Tensor]] = []
        for slot in self.slots:
            gradient = slot.parameter.grad
            gradients.append(gradient)
            assert slot.view is not None
            if gradient is None:
                slot.view.zero_()
            else:
                present.append((slot, gradient.to_dense() if gradient.is_sparse else gradient))
        self._fill(present)
        if len(present) == len(self.slots):
            self._has_flags.fill_(1)
        else:
            self._has_flags.copy_(torch.tensor([gradient is not None for gradient in gradients]))
        if self.carried:
            flags = [bucket.has_changed() for bucket in self.carried]
            if any(flags):
                self._changed_flags.copy_(torch.tensor(flags))
            else:
                self._changed_flags.zero_()
        self._launched_gradients = gradients
        self._launched_versions = [-1 if gradient is None else gradient._version for gradient in gradients]

    def _fill(self, present: Sequence[tuple[Slot, torch.Tensor]]) -> None:
        if self.device.type == "cpu":
            # One pass over the memory instead of the two of copy and multiply.
            for slot, gradient in present:
                torch.mul(gradient, slot.pack_scale, out=slot.view)
            return
        views = [slot.view for slot, _ in present if slot.view is not None]
        torch._foreach_copy_(views, [gradient for _, gradient in present])
        scales = [slot.pack_scale for slot, _ in present]
        if any(scale != 1.0 for scale in scales):
            torch._foreach_mul_(views, scales)

    def launch(self) -> None:
        """Start the reduction of what was packed."""
        assert self._flat is not None
        self.work = dist.all_reduce(self._flat, group=self.group.process_group, async_op=True)

    def has_changed(self) -> bool:
        """Whether the local gradients are others than those that were launched.

        The version of the tensor is compared and not only what the hooks saw: hooks do not fire for every way to
        accumulate a gradient, and a script may change gradients itself.
        """
        if self.work is None:
            return False
        for slot, gradient, version in zip(self.slots, self._launched_gradients, self._launched_versions, strict=True):
            now = slot.parameter.grad
            if now is not gradient or (now is not None and now._version != version):
                return True
        return False

    def changed_anywhere(self) -> tuple[bool, ...]:
        """For each carried bucket whether it changed on any rank of the group; only after the wait for this one."""
        assert self._changed_flags is not None
        return tuple(value.real > 0 for value in self._changed_flags.tolist())

    @torch.no_grad()
    def unpack(self) -> None:
        """Write the reduced gradients to ``p.grad``; where no rank had one it stays None."""
        assert self._has_flags is not None
        targets: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        has_anywhere: list[complex] | None = None
        for position, slot in enumerate(self.slots):
            gradient = slot.parameter.grad
            slot.is_final = True
            assert slot.view is not None
            if gradient is not None and not gradient.is_sparse:
                targets.append(gradient)
                values.append(slot.view)
                continue
            if has_anywhere is None:
                has_anywhere = self._has_flags.tolist()
            if has_anywhere[position].real > 0:
                slot.parameter.grad = torch.empty_like(slot.parameter.detach()).copy_(slot.view)
        if targets:
            torch._foreach_copy_(targets, values)

    def forget(self) -> None:
        """After the reduction: nothing is under way, and the gradients are no longer held."""
        self.work = None
        self._launched_gradients = []
        self._launched_versions = []


def plan_buckets(entries: Sequence[ReducedParameter], slots: Sequence[Slot], bucket_cap_mb: float) -> list[Bucket]:
    """Put the slots into buckets, in the order in which they are to be launched.

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
        key = (entry.group.ranks, slot.divisor, parameter.dtype, parameter.device)
        filling.setdefault(key, ([], entry.group))[0].append(slot)
        sizes[key] = sizes.get(key, 0) + parameter.numel() * parameter.element_size()
        if sizes[key] >= cap_bytes:
            full.append(filling.pop(key))
            del sizes[key]
    full.extend(filling.values())
    buckets = [
        Bucket(index, members, group, members[0].parameter.device, members[0].parameter.dtype)
        for index, (members, group) in enumerate(full)
    ]
    by_group: dict[tuple[int, ...], list[Bucket]] = {}
    for bucket in buckets:
        by_group.setdefault(bucket.group.ranks, []).append(bucket)
    for members_of_group in by_group.values():
        *others, carrier = members_of_group
        carrier.carried = tuple(others)
        carrier.is_carrier = True
    return buckets
