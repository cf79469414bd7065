"""How a tensor's elements travel: in the order of its storage where it is dense, else row by row."""

from __future__ import annotations

import torch

from modelparallel.comm.transport import is_dense
from modelparallel.pipeline.stage_tensor import TensorSpec


def wire_view(tensor: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """``tensor`` with its dimensions in the order in which its elements travel: that of ``spec``'s storage where it is
    dense.
    """
    if not is_dense(spec.shape, spec.stride):
        return tensor
    order = sorted(range(len(spec.shape)), key=lambda dim: -spec.stride[dim])
    return tensor if order == list(range(len(order))) else tensor.permute(order)


def empty_of(spec: TensorSpec) -> torch.Tensor:
    """A buffer on the CPU for a tensor of this spec, with its strides where they are dense."""
    if is_dense(spec.shape, spec.stride):
        return torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype)
    return torch.empty(spec.shape, dtype=spec.dtype)
