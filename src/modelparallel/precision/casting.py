"""Models, inputs and outputs in another floating dtype (smp-api section 7)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from modelparallel import trees
from modelparallel.torch_compat.functions import unchanged, with_backward


def cast_tensors(module: nn.Module, dtype: torch.dtype, keep: set[int] | None = None) -> None:
    """Cast the floating parameters and buffers of ``module`` in place; they stay the same objects.

    keep: identities of tensors that stay as they are.
    """
    kept = keep or set()
    for part in module.modules():
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is None or id(tensor) in kept or not tensor.is_floating_point() or tensor.dtype == dtype:
                continue
            tensor.data = tensor.data.to(dtype)
            if isinstance(tensor, nn.Parameter) and tensor.grad is not None:
                tensor.grad = tensor.grad.to(dtype)


def cast_floating(values: Any, dtype: torch.dtype, only: torch.dtype | None = None) -> Any:
    """``values``, nested, with the floating tensors in ``dtype``; ``only``: those of this dtype alone."""

    def cast(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point() or leaf.dtype == dtype:
            return leaf
        return leaf.to(dtype) if only is None or leaf.dtype == only else leaf

    return trees.map_leaves(cast, values)


def scaled_backward(values: Any, scale_of: Any) -> Any:
    """``values``, nested, whose gradients are multiplied by ``scale_of()`` on their way back.

    For a backward that does not know of the scale of the loss: it has the same effect as scaling the loss.
    """

    def scaled(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            return with_backward(leaf, unchanged, lambda gradient: gradient * scale_of())
        return leaf

    return trees.map_leaves(scaled, values)
