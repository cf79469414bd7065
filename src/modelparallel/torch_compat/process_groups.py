"""What of ``torch.distributed`` has another name in other versions, or only a private one."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d


def start_all_gather(output: torch.Tensor, part: torch.Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Gather equal flat parts into ``output``, asynchronously. torch 2.13 renamed it; 2.11 has only the old name."""
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work: dist.Work = gather(output, part, group=group, async_op=True)
    return work


def start_reduce_scatter(
    output: torch.Tensor, whole: torch.Tensor, group: dist.ProcessGroup, op: Any = dist.ReduceOp.SUM
) -> dist.Work:
    """Reduce ``whole`` and keep this rank's flat part of it, asynchronously. Named as :func:`start_all_gather`."""
    scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    work: dist.Work = scatter(output, whole, op=op, group=group, async_op=True)
    return work


def set_timeout(group: dist.ProcessGroup | None, seconds: float) -> None:
    """How long an operation of a group that exists (None: the default one) may take from now on. The name is private,
    and documented.
    """
    distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
