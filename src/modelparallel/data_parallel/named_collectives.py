"""The collectives of FSDP, with a time limit, a name, and a way by the CPU where a group has no NCCL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from modelparallel.comm.host_copies import start_collective
from modelparallel.comm.waits import NamedWork, Wait
from modelparallel.torch_compat.process_groups import start_all_gather, start_reduce_scatter

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group


class NamedGather:
    """FSDP's all-gather, with a time limit and a name."""

    purpose = "the gathering of the parameters"

    def __init__(self, title: str, group: Group, timeout_seconds: float) -> None:
        self._group, self._purpose, self._timeout = group, f"{self.purpose} of {title}", timeout_seconds

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for a flat buffer."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        return self._run(start_all_gather, output_tensor, input_tensor, group, async_op)

    def _run(
        self,
        start: Callable[[torch.Tensor, torch.Tensor, dist.ProcessGroup], dist.Work],
        output: torch.Tensor,
        input: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool,
    ) -> dist.Work | None:
        wait = Wait(self._group, self._purpose, seconds=self._timeout)
        work = wait.started(lambda: start_collective(lambda to, of: start(to, of, group), output, input, group))
        if async_op:
            return NamedWork(work, wait, input.device)
        wait.end(work, input.device)
        return None


class NamedReduceScatter(NamedGather):
    """FSDP's reduce-scatter, likewise."""

    purpose = "the reduction of the gradients"

    def __call__(  # type: ignore[override]
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        start = partial(start_reduce_scatter, op=op)
        return self._run(start, output_tensor, input_tensor, group, async_op)
