"""Collectives with gradients for tensors that all ranks of a group hold whole.

[Note: replicated gradients] Between the layers of the "speed" layout every rank holds the same tensor, and the same,
complete gradient of it. So what sums the parts of a result has no communication in backward (`sum_parts`), what hands a
whole tensor to a part of the work sums the gradients of the parts (`share`), and what is cut out of a tensor that is
whole everywhere has its gradient gathered (`take_rows`). The functions of `collectives` are the other kind: there each
rank's gradient is one summand.

Every function is collective over ``group``; ranks must call them in the same order.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from modelparallel.comm.collectives.started import (
    start_all_reduce,
    start_gather_blocks,
    start_gather_rows,
    start_reduce_blocks,
)
from modelparallel.torch_compat.functions import unchanged, with_backward

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group


def sum_parts(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """The sum of ``tensor`` over all ranks. Backward: the gradient as it is."""
    return tensor if group.size == 1 else with_backward(tensor, summed, share, group)


def share(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """``tensor``, equal on all ranks, for work of which each rank does a part. Backward: the sum over all ranks."""
    return tensor if group.size == 1 else with_backward(tensor, unchanged, sum_parts, group)


def gather_whole_rows(tensor: torch.Tensor, group: Group, counts: Sequence[int]) -> torch.Tensor:
    """``tensor`` of all ranks, one after another along dim 0. Backward: the gradient of the own part."""
    return tensor if group.size == 1 else with_backward(tensor, gathered_rows, take_rows, group, tuple(counts))


def take_rows(tensor: torch.Tensor, group: Group, counts: Sequence[int]) -> torch.Tensor:
    """The own part along dim 0 of a tensor that is equal on all ranks. Backward: the gradients of all parts."""
    return tensor if group.size == 1 else with_backward(tensor, _own_rows, gather_whole_rows, group, tuple(counts))


def gather_whole_features(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """[..., F/t] of all ranks side by side: [..., F]. Backward: the gradient of the own slice."""
    return tensor if group.size == 1 else with_backward(tensor, gathered_features, take_features, group)


def take_features(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """The own slice of the last dim of a tensor that is equal on all ranks. Backward: the gradients of all slices."""
    return tensor if group.size == 1 else with_backward(tensor, _own_features, gather_whole_features, group)


def sum_into_slices(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """[..., F] of which each rank has a summand -> the own slice of the sum, [..., F/t]. Backward: the gradients of all
    slices.
    """
    return tensor if group.size == 1 else with_backward(tensor, summed_features, gather_whole_features, group)


def scale_gradient(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """``tensor``. Backward: ``factor`` times the gradient."""
    return tensor if factor == 1.0 else with_backward(tensor, unchanged, operator.mul, factor)


# The same without gradients.


def gathered_rows(tensor: torch.Tensor, group: Group, counts: Sequence[int]) -> torch.Tensor:
    """``tensor`` of all ranks, one after another along dim 0."""
    return start_gather_rows(tensor, group, counts).wait()


def gathered_features(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """[..., F/t] of all ranks side by side: [..., F]."""
    return start_gather_blocks(tensor, group).wait()


def summed_features(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """The own slice of the last dim of the sum over all ranks."""
    return start_reduce_blocks(tensor.chunk(group.size, -1), group).wait()


def summed(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """The sum of ``tensor`` over all ranks."""
    return start_all_reduce(tensor, group).wait()


def _own_rows(tensor: torch.Tensor, group: Group, counts: Sequence[int]) -> torch.Tensor:
    return tensor.narrow(0, sum(counts[: group.rank_in_group]), counts[group.rank_in_group]).clone()


def _own_features(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    return tensor.chunk(group.size, -1)[group.rank_in_group].clone(memory_format=torch.contiguous_format)
