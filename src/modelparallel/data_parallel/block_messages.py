"""Blocks of flat tensors between the ranks of a group: to their owners, and from their owners to all.

[Note: point to point] As in comm/exchange.py, blocks on the CPU are sent straight from where they lie and received
straight into where they belong. The tags are others than there: these messages start when gradients are ready, which
need not be at the same place among the messages of split layers on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from modelparallel.comm.host_copies import HostWork, goes_by_host, on_host
from modelparallel.data_parallel.waits import wait_for

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group

_TO_OWNERS = 5231
_FROM_OWNERS = 5232


class BlockMessages:
    """What was started between the ranks; ``sent`` and ``received`` must stay as they are until ``wait``."""

    def __init__(self, works: Sequence[Any], group: Group, device: torch.device) -> None:
        self._works = works
        self._group = group
        self._device = device

    def wait(self, timeout_seconds: float, purpose: str) -> None:
        """Wait for all of them; again is cheap. Errors are those of `wait_for`."""
        for work in self._works:
            wait_for(work, timeout_seconds, purpose, self._group, self._device)
        self._works = ()


def start_to_owners(flat: torch.Tensor, bounds: Sequence[int], group: Group) -> tuple[BlockMessages, OwnBlock]:
    """Each rank gets its own block of the sum of ``flat`` over the ranks; block i is from bounds[i] to bounds[i + 1].

    Collective over the group, in one order on all ranks.
    """
    if goes_by_host(flat, group.process_group):
        messages, block = start_to_owners(on_host(flat), bounds, group)
        block.device = flat.device
        return messages, block
    blocks = _blocks(flat, bounds)
    own = blocks[group.rank_in_group]
    if flat.is_cuda:
        total = torch.empty_like(own)
        if _are_equal(blocks):
            work = _reduce_scatter_single(_real(total), _real(flat), group=group.process_group, async_op=True)
        else:
            parts = [_real(block) for block in blocks]
            work = dist.reduce_scatter(_real(total), parts, group=group.process_group, async_op=True)
        return BlockMessages([work], group, flat.device), OwnBlock([total])
    received = [own if rank == group.rank_in_group else torch.empty_like(own) for rank in range(group.size)]
    works = _start(received, blocks, group, _TO_OWNERS)
    return BlockMessages(works, group, flat.device), OwnBlock(received, group.rank_in_group)


def start_from_owners(flat: torch.Tensor, bounds: Sequence[int], group: Group) -> BlockMessages:
    """Each rank gets the blocks of all others, in place; each sends its own. Collective over the group."""
    if goes_by_host(flat, group.process_group):
        copy = on_host(flat)
        copies = _blocks(copy, bounds)
        works = _start(copies, [copies[group.rank_in_group]] * group.size, group, _FROM_OWNERS)
        return BlockMessages([HostWork(works, lambda: flat.copy_(copy))], group, flat.device)
    blocks = _blocks(flat, bounds)
    own = blocks[group.rank_in_group]
    if flat.is_cuda:
        if _are_equal(blocks):
            work = _all_gather_single(_real(flat), _real(own), group=group.process_group, async_op=True)
        else:
            work = dist.all_gather([_real(block) for block in blocks], _real(own), group.process_group, async_op=True)
        return BlockMessages([work], group, flat.device)
    return BlockMessages(_start(blocks, [own] * group.size, group, _FROM_OWNERS), group, flat.device)


class OwnBlock:
    """The parts of this rank's block that all ranks have sent."""

    def __init__(self, parts: Sequence[torch.Tensor], own: int = -1) -> None:
        """``own``: which of them is part of what this rank sent, and is not to be written to."""
        self._parts = list(parts)
        self._own = own
        #: Where the sum is wanted, if not where the parts are.
        self.device = parts[0].device

    def add_up(self) -> torch.Tensor:
        """Their sum, in the order of the ranks, in memory of its own; once, after the wait."""
        parts, self._parts = self._parts, []
        if len(parts) == 1:
            return parts[0].to(self.device)
        total = torch.add(parts[0], parts[1], out=parts[1 if self._own == 0 else 0])
        for part in parts[2:]:
            total += part
        return total.to(self.device)


def _blocks(flat: torch.Tensor, bounds: Sequence[int]) -> list[torch.Tensor]:
    return [flat[start:stop] for start, stop in pairwise(bounds)]


def _start(received: Sequence[torch.Tensor], sent: Sequence[torch.Tensor], group: Group, tag: int) -> list[Any]:
    """Block i of ``sent`` goes to rank i, whose block comes into block i of ``received``; nothing to oneself."""
    process_group = group.process_group
    peers = [rank for rank in range(group.size) if rank != group.rank_in_group]
    works = [process_group.recv([_real(received[peer])], peer, tag) for peer in peers if received[peer].numel()]
    works += [process_group.send([_real(sent[peer])], peer, tag) for peer in peers if sent[peer].numel()]
    return works


def _real(block: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(block) if block.is_complex() else block


def _are_equal(blocks: Sequence[torch.Tensor]) -> bool:
    return len({block.numel() for block in blocks}) == 1


# torch 2.13 renamed the two; 2.11 has only the old names.
_all_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
