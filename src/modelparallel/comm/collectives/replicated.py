"""Collectives with gradients for tensors that all ranks of a group hold whole.

[Note: replicated gradients] Between the layers of the "speed" layout every rank holds the same tensor, and the same,
complete gradient of it. So what sums the parts of a result has no communication in backward (`sum_parts`), what hands a
whole tensor to a part of the work sums the gradients of the parts (`share`), and what is cut out of a tensor that is
whole everywhere has its gradient gathered (`take_rows`). The functions of `collectives` are the other kind: there each
rank's gradient is one summand.

Every function is collective over ``group``; ranks must call them in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import Function

from modelparallel.comm.collectives.started import start_all_reduce, start_gather_blocks, start_gather_rows

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group


def sum_parts(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """The sum of ``tensor`` over all ranks. Backward: the gradient as it is."""
    return tensor if group.size == 1 else _SumParts.apply(tensor, group)


def share(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """``tensor``, equal on all ranks, for work of which each rank does a part. Backward: the sum over all ranks."""
    return tensor if group.size == 1 else _Share.apply(tensor, group)


def gather_whole_rows(tensor: torch.Tensor, group: Group, counts: Sequence[int]) -> torch.Tensor:
    """``tensor`` of all ranks, one after another along dim 0. Backward: the gradient of the own part."""
    return tensor if group.size == 1 else _GatherWholeRows.apply(tensor, group, tuple(counts))


def take_rows(tensor: torch.Tensor, group: Group, counts: Sequence[int]) -> torch.Tensor:
    """The own part along dim 0 of a tensor that is equal on all ranks. Backward: the gradients of all parts."""
    return tensor if group.size == 1 else _TakeRows.apply(tensor, group, tuple(counts))


def gather_whole_features(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """[..., F/t] of all ranks side by side: [..., F]. Backward: the gradient of the own slice."""
    return tensor if group.size == 1 else _GatherWholeFeatures.apply(tensor, group)


def take_features(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """The own slice of the last dim of a tensor that is equal on all ranks. Backward: the gradients of all slices."""
    return tensor if group.size == 1 else _TakeFeatures.apply(tensor, group)


def scale_gradient(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """``tensor``. Backward: ``factor`` times the gradient."""
    return tensor if factor == 1.0 else _ScaleGradient.apply(tensor, factor)


def _own_rows(tensor: torch.Tensor, group: Group, counts: tuple[int, ...]) -> torch.Tensor:
    return tensor.narrow(0, sum(counts[: group.rank_in_group]), counts[group.rank_in_group])


class _SumParts(Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return start_all_reduce(tensor, group).wait()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return share(grads[0], ctx.group), None


class _Share(Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return sum_parts(grads[0], ctx.group), None


class _GatherWholeRows(Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Group, counts: tuple[int, ...]) -> torch.Tensor:
        ctx.group, ctx.counts = group, counts
        return start_gather_rows(tensor, group, counts).wait()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return take_rows(grads[0], ctx.group, ctx.counts), None, None


class _TakeRows(Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Group, counts: tuple[int, ...]) -> torch.Tensor:
        ctx.group, ctx.counts = group, counts
        return _own_rows(tensor, group, counts).clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gather_whole_rows(grads[0], ctx.group, ctx.counts), None, None


class _GatherWholeFeatures(Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return start_gather_blocks(tensor, group).wait()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return take_features(grads[0], ctx.group), None


class _TakeFeatures(Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return tensor.chunk(group.size, -1)[group.rank_in_group].clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gather_whole_features(grads[0], ctx.group), None


class _ScaleGradient(Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grads[0] * ctx.factor, None
