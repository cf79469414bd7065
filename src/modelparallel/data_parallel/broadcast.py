"""Equal tensors on all ranks of their groups: fused broadcasts from the first rank of each group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from modelparallel.comm.waits import Wait
from modelparallel.data_parallel.agreement import check_agreement

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group

# One message holds at most about this much, so that the copy of a large model does not double its memory.
MESSAGE_BYTES = 128 * 1024 * 1024


@dataclass(frozen=True)
class BroadcastTensor:
    """A parameter or buffer and the group over which it must be equal; ``name`` is used in errors and to compare the
    ranks. ``source``: the rank_in_group whose value counts.
    """

    name: str
    tensor: torch.Tensor
    group: Group
    source: int = 0


def broadcast_parameters(
    tensors: Sequence[BroadcastTensor], *, is_checked: bool = True, timeout_seconds: float = 600.0
) -> None:
    """Overwrite every tensor by the value of the source, usually the first rank, of its group (smp-api section 5).

    Collective over every group named; all ranks of a group must pass the same tensors in the same order, which is
    compared first unless ``is_checked`` is False (buffers that are sent each step). Tensors of any dtype and device
    travel together, as bytes, one message per 128 MiB. The tensors change in place.

    Raises DivergenceError when the ranks' lists differ, WaitTimeoutError when a rank does not take part.
    """
    families: dict[tuple[tuple[int, ...], int, torch.device], list[BroadcastTensor]] = {}
    for entry in tensors:
        if entry.group.size > 1 and entry.tensor.numel() > 0:
            families.setdefault((entry.group.ranks, entry.source, entry.tensor.device), []).append(entry)
    for (_, _, device), entries in families.items():
        if is_checked:
            listing = [f"{entry.name} {tuple(entry.tensor.shape)} {entry.tensor.dtype}" for entry in entries]
            check_agreement(entries[0].group, device, listing, "the tensors to be broadcast", timeout_seconds)
        message: list[BroadcastTensor] = []
        size = 0
        for entry in entries:
            num_bytes = entry.tensor.numel() * entry.tensor.element_size()
            if message and size + num_bytes > MESSAGE_BYTES:
                _broadcast_message(message, device, timeout_seconds)
                message, size = [], 0
            message.append(entry)
            size += num_bytes
        _broadcast_message(message, device, timeout_seconds)


@torch.no_grad()
def _broadcast_message(entries: Sequence[BroadcastTensor], device: torch.device, timeout_seconds: float) -> None:
    group = entries[0].group
    source = entries[0].source
    is_source = group.rank_in_group == source
    sizes = [entry.tensor.numel() * entry.tensor.element_size() for entry in entries]
    flat = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    pieces = flat.split(sizes)
    if is_source:
        for piece, entry in zip(pieces, entries, strict=True):
            piece.copy_(entry.tensor.detach().contiguous().reshape(-1).view(torch.uint8))
    purpose = f"the broadcast of {len(entries)} tensors from {entries[0].name!r} to {entries[-1].name!r}"
    wait = Wait(group, purpose, seconds=timeout_seconds)
    source_rank = group.ranks[source]
    wait.run(lambda: dist.broadcast(flat, source_rank, group.process_group, async_op=True), device)
    if not is_source:
        for piece, entry in zip(pieces, entries, strict=True):
            # A piece may start at an odd address; a copy of its own is aligned for any dtype.
            entry.tensor.detach().copy_(piece.clone().view(entry.tensor.dtype).view(entry.tensor.shape))
