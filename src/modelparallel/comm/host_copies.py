"""Tensors of a GPU between processes that have no NCCL, since several of them share the GPU: by way of the CPU.

NCCL wants a GPU for each process. With ``ddp_dist_backend: gloo`` processes may share one; gloo sums and broadcasts
tensors of a GPU, but neither sends nor scatters them. What it cannot do is done with copies on the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` on the CPU; from a GPU by way of pinned memory, which the copy runs at full speed to."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return host


def goes_by_host(tensor: torch.Tensor, process_group: dist.ProcessGroup) -> bool:
    """Whether ``tensor`` is on a GPU and the group has only gloo for it."""
    return tensor.is_cuda and "cuda:gloo" in _backends(process_group)


def is_nccl(process_group: dist.ProcessGroup) -> bool:
    """Whether the group carries tensors of a GPU by NCCL."""
    return "cuda:nccl" in _backends(process_group)


@functools.lru_cache(maxsize=256)
def _backends(process_group: dist.ProcessGroup) -> str:
    return dist.get_backend_config(process_group)


class HostWork(dist.Work):
    """Works on copies on the CPU; ``wait`` also copies back, on the stream that is current there, once."""

    def __init__(self, works: Sequence[dist.Work], copy_back: Callable[[], object]) -> None:
        super().__init__()
        self._works = tuple(works)
        self._copy_back: Callable[[], object] | None = copy_back

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait, at most ``timeout`` for each work, then copy back."""
        for work in self._works:
            if timeout is None:
                work.wait()
            else:
                work.wait(timeout)
        copy_back, self._copy_back, self._works = self._copy_back, None, ()
        if copy_back is not None:
            copy_back()
        return True


def start_collective(
    start: Callable[[torch.Tensor, torch.Tensor], dist.Work],
    output: torch.Tensor,
    input: torch.Tensor,
    process_group: dist.ProcessGroup,
) -> dist.Work:
    """``start(output, input)``, by way of the CPU where the group does not carry tensors of a GPU."""
    if not goes_by_host(input, process_group):
        return start(output, input)
    received = torch.empty_like(output, device="cpu")
    work = start(received, on_host(input))
    return HostWork([work], lambda: output.copy_(received))
