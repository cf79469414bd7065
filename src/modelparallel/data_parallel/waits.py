"""Waiting for asynchronous collectives with a time limit and a name, and checking that ranks agree before a
collective.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from modelparallel.comm.event_log import user_code_line
from modelparallel.errors import CommunicationError, DivergenceError, WaitTimeoutError

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group


def wait_for(work: dist.Work, timeout_seconds: float, purpose: str, group: Group, device: torch.device) -> None:
    """Wait for one collective. ``purpose`` says in the error what was waited for ("the reduction of ...").

    On a GPU the wait only orders streams, as everywhere in torch, and the watchdog of the backend ends a hang: a time
    limit here would stop the host until the collective is through.

    Raises WaitTimeoutError when the time is up, CommunicationError when a peer has gone.
    """
    try:
        if device.type == "cpu":
            work.wait(datetime.timedelta(seconds=timeout_seconds))
        else:
            work.wait()
    except RuntimeError as error:
        who = f"on global rank {group.ranks[group.rank_in_group]}, group {list(group.ranks)}, at {user_code_line()}"
        text = str(error).lower()
        if "timed out" in text or "timeout" in text:
            raise WaitTimeoutError(
                f"{purpose} ({who}) did not end within {timeout_seconds:g} s: another rank of the group did not reach "
                "it. Every rank of the group must run the same number of backward passes or steps; look at what "
                "the other ranks say."
            ) from error
        raise CommunicationError(
            f"{purpose} ({who}) failed, most often because another rank has ended: {error}"
        ) from error


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
    work = dist.all_reduce(values, dist.ReduceOp.MAX, group=group.process_group, async_op=True)
    wait_for(work, timeout_seconds, f"the comparison of {subject}", group, device)
    largest, smallest, most, fewest = values.tolist()
    if largest != -smallest or most != -fewest:
        listing = "\n  ".join(description[:20]) + ("\n  ..." if len(description) > 20 else "")
        raise DivergenceError(
            f"the ranks {list(group.ranks)} do not agree on {subject}: they hold {-fewest} to {most} entries, or "
            "entries that differ in name, shape, dtype or order. Build the same model, and freeze the same parameters, "
            f"on all of them. This rank (global rank {group.ranks[group.rank_in_group]}) has:\n  {listing}"
        )
