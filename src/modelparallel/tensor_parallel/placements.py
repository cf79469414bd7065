"""How tensors are cut over the tensor-parallel ranks, and what cannot be cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn

from modelparallel.errors import TensorParallelError
from modelparallel.parameters.table import waits_for_storage
from modelparallel.plan.rows import SplitSpec

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group


class NotSplittableError(TensorParallelError):
    """This module cannot be distributed. One that was only marked is then left as it is, with a warning."""


def slice_length(length: int, tp_size: int, what: str) -> int:
    """``length / tp_size``; raises NotSplittableError if that is not whole. ``what`` names the length: "in_features of
    ...".
    """
    if length % tp_size:
        degrees = ", ".join(str(degree) for degree in range(1, min(length, 64) + 1) if length % degree == 0)
        raise NotSplittableError(
            f"{what} is {length}, not divisible by tensor_parallel_degree={tp_size}: use one of the degrees {degrees}"
        )
    return length // tp_size


def slice_of(full: torch.Tensor, spec: SplitSpec, tp_rank: int, tp_size: int) -> torch.Tensor:
    """The part of ``full`` that ``tp_rank`` holds, with storage of its own (so that the full tensor can be freed)."""
    if tuple(full.shape) != spec.full_shape:
        raise TensorParallelError(
            f"a tensor of shape {tuple(full.shape)} was given where the full shape is {spec.full_shape}"
        )
    if tp_size == 1:
        return full
    return spec.slice_of(full, tp_rank, tp_size).clone(memory_format=torch.contiguous_format)


def is_plain_parameter(tensor: torch.Tensor) -> TypeGuard[nn.Parameter]:
    """Whether ``tensor`` is a parameter that holds its own numbers: not quantised, sharded, or otherwise a tensor
    subclass.
    """
    if waits_for_storage(tensor):
        return isinstance(tensor, nn.Parameter)
    return type(tensor) is nn.Parameter and type(tensor.data) is torch.Tensor


def shrink_to_slice(parameter: nn.Parameter, spec: SplitSpec, tp_rank: int, tp_size: int) -> nn.Parameter:
    """Make ``parameter`` its own slice, in place: optimizers, hooks and names that hold it keep holding it.

    Returns the parameter to use: a new one if a graph of an earlier forward, still alive, expects gradients of the full
    shape (autograd remembers the shape, and would refuse the slice's gradient).
    """
    grad, parameter.grad = parameter.grad, None
    parameter.data = slice_of(parameter.detach(), spec, tp_rank, tp_size)
    usable = parameter if _takes_gradients(parameter) else nn.Parameter(parameter.detach())
    if grad is not None:
        usable.grad = slice_of(grad, spec, tp_rank, tp_size)
    return usable


def cut_weight(module: nn.Module, tensors: set[str], spec: SplitSpec, what: str, group: Group) -> None:
    """Let each rank keep its slice of ``module.weight``, in place; ``what`` names the length that is cut.

    Raises NotSplittableError where the module has other ``tensors``, or the length is not divisible.
    """
    weight: Any = module.weight
    if set(module._parameters) != tensors or not is_plain_parameter(weight) or module._buffers:
        raise NotSplittableError("its weight is not a plain parameter (pruned, normalised, quantised or sharded)")
    slice_length(spec.full_shape[spec.dim], group.size, what)
    module.weight = shrink_to_slice(weight, spec, group.rank_in_group, group.size)


def _takes_gradients(parameter: nn.Parameter) -> bool:
    if not parameter.requires_grad:
        return True
    with torch.enable_grad():
        probe = parameter.view_as(parameter)
    try:
        torch.autograd.grad(probe, parameter, torch.zeros((), dtype=probe.dtype, device=probe.device).expand_as(probe))
    except RuntimeError:  # "invalid gradient ... expected shape": the only thing that such a small graph can refuse
        return False
    return True
