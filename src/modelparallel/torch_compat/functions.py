"""Functions of autograd, and modes that see operations: torch's classes, with the annotations that they lack."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Map = Callable[..., torch.Tensor]


class TensorFunction(torch.autograd.Function):
    """A function of autograd that gives one tensor."""

    if TYPE_CHECKING:

        @classmethod
        def apply(cls, *args: Any) -> torch.Tensor: ...


class DispatchMode(TorchDispatchMode):
    """Sees every operation below autograd that runs while it is entered."""

    if TYPE_CHECKING:

        def __init__(self) -> None: ...

        def __enter__(self) -> DispatchMode: ...

        def __exit__(self, *exception: Any) -> None: ...


def with_backward(tensor: torch.Tensor, forward: Map, backward: Map, *how: Any) -> torch.Tensor:
    """``forward(tensor, *how)``, whose gradient becomes ``backward(gradient, *how)``: of maps that are linear, so that
    they need to know nothing but ``how`` in backward.
    """
    return _LinearMap.apply(tensor, forward, backward, *how)


def unchanged(tensor: torch.Tensor, *how: Any) -> torch.Tensor:
    """The same numbers, in a tensor that autograd tells from the given one."""
    return tensor.view_as(tensor)


class _LinearMap(TensorFunction):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, forward: Map, backward: Map, *how: Any) -> torch.Tensor:
        ctx.backward_map, ctx.how = backward, how
        return forward(tensor, *how)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.backward_map(grads[0], *ctx.how), None, None, *(None for _ in ctx.how)
