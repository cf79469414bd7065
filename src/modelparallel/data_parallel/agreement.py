"""Checking that ranks agree before a collective."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from modelparallel.comm.waits import reduce_in_place
from modelparallel.errors import DivergenceError

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group


def check_agreement(
    group: Group, device: torch.device, description: Sequence[str], subject: str, timeout_seconds: float
) -> None:
    """Check that every rank of ``group`` has the same ``description``; collective over the group.

    A collective over tensors of different sizes can end the process or mix up values in silence, so the layout is
    compared first.

    Raises DivergenceError, which names ``subject``.
    """
    if group.size == 1:
        return
    digest = hashlib.sha256("\n".join(description).encode()).digest()
    number = int.from_bytes(digest[:7], "big")
    values = torch.tensor([number, -number, len(description), -len(description)], dtype=torch.int64, device=device)
    reduce_in_place(values, group, f"the comparison of {subject}", dist.ReduceOp.MAX, timeout_seconds)
    largest, smallest, most, fewest = values.tolist()
    if largest != -smallest or most != -fewest:
        listing = "\n  ".join(description[:20]) + ("\n  ..." if len(description) > 20 else "")
        raise DivergenceError(
            f"the ranks {list(group.ranks)} do not agree on {subject}: they hold {-fewest} to {most} entries, or "
            "entries that differ in name, shape, dtype or order. Build the same model, and freeze the same parameters, "
            f"on all of them. This rank (global rank {group.ranks[group.rank_in_group]}) has:\n  {listing}"
        )
