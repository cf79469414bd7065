"""Run a split layer on the ranks of a test, and put its parameters and gradients together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modelparallel.comm.groups import Group
from modelparallel.config.topology import GroupKind
from modelparallel.tensor_parallel.distributed_module import DistributedModule, using_tp_group

F64 = torch.float64


def everybody() -> Group:
    """A TP_GROUP of all ranks of the test."""
    return Group(GroupKind.TP, tuple(range(dist.get_world_size())), dist.get_rank(), dist.group.WORLD)


def imaginary(size: int, rank: int = 0) -> Group:
    """A group that nobody communicates over: for construction alone."""
    return Group(GroupKind.TP, tuple(range(size)), rank, None)


def batch_of(rank: int, *shape: int) -> Tensor:
    """The batch of a rank; any rank can compute that of any other."""
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(100 + rank))


def make(build: Callable[[], nn.Module], *, seed: int = 0, dtype: torch.dtype = F64, **settings: Any) -> nn.Module:
    """``build()`` on all ranks of the test, from one seed; ``settings``: is_memory, is_prescaled."""
    before = torch.get_default_dtype()
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        with using_tp_group(everybody(), **settings):
            return build()
    finally:
        torch.set_default_dtype(before)


def make_whole(build: Callable[[], nn.Module], *, seed: int = 0, dtype: torch.dtype = F64) -> dict[str, Tensor]:
    """The parameters of ``build()`` on one rank, by name: what the slices were cut from."""
    before = torch.get_default_dtype()
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        with using_tp_group(imaginary(1)):
            whole = build()
    finally:
        torch.set_default_dtype(before)
    return {name: parameter.detach().clone() for name, parameter in whole.named_parameters()}


def specs_of(module: nn.Module) -> dict[str, Any]:
    return {
        f"{prefix}.{name}" if prefix else name: spec
        for prefix, part in module.named_modules()
        if isinstance(part, DistributedModule)
        for name, spec in part.split_tensors().items()
    }


def joined(module: nn.Module, what: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
    """``what`` of each parameter, whole: slices joined, and equal on all ranks where it is not split. Collective."""
    specs, result = specs_of(module), {}
    for name, parameter in module.named_parameters():
        own = what(parameter)
        own = torch.zeros_like(parameter) if own is None else own.detach()
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, own)
        if name in specs:
            result[name] = specs[name].join(parts)
            continue
        for rank, part in enumerate(parts):
            difference = float((part - parts[0]).abs().max())
            assert difference <= 1e-12 * max(1.0, float(parts[0].abs().max())), f"{name} differs on rank {rank}"
        result[name] = parts[0]
    return result


def values(module: nn.Module) -> dict[str, Tensor]:
    return joined(module, lambda parameter: parameter)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return joined(module, lambda parameter: parameter.grad)


def settings(tp: int, pp: int = 1, microbatches: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "tensor_parallel_degree": tp, "pipeline_parallel_degree": pp, "microbatches": microbatches, "ddp": True, **more,
    }  # fmt: skip
