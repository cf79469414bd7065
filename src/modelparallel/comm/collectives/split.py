"""Explicit collectives of the tensor-parallel layers, on local tensors, exact in backward (and in double backward).

[Note: rows and features] A layer sees its input as a matrix: *rows* (all leading dims flattened, the batch first) by
*features* (the last dim). Each rank of the group starts with all features of its own rows. Two layouts are used inside
the layers:

    split_features    [own rows, all features]  ->  [rows of all ranks, own features]     merge_features is the way back
    all_gather        [own rows, ...]           ->  [rows of all ranks, ...]              reduce_scatter is its gradient

The rows of all ranks stand in the order of rank_in_group. ``counts`` says how many rows each rank has; ranks may have
different numbers (`gather_counts` finds them out). None means equal numbers everywhere, which the caller must know:
ranks that disagree crash in gloo and hang in NCCL.

Every function here is collective over ``group``; ranks must call them in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from modelparallel.comm.collectives.replicated import (
    gathered_features,
    gathered_rows,
    scale_gradient,
    share,
    summed,
    summed_features,
)
from modelparallel.comm.collectives.started import (
    exchange_integers,
    start_merge_features,
    start_reduce_rows,
    start_split_features,
)
from modelparallel.errors import TensorParallelError
from modelparallel.torch_compat.functions import with_backward

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group


def gather_counts(count: int, group: Group, like: torch.Tensor | None = None, who: str = "") -> tuple[int, ...]:
    """The ``count`` of every rank of the group, in the order of rank_in_group. ``who``: see `exchange_integers`.

    One tiny message per call, deliberately: no cache on one rank can know that another rank's batch changed.
    If ``like`` is a meta tensor, shapes are being propagated: nobody communicates, and equal batches are assumed.
    """
    if group.size == 1 or (like is not None and like.is_meta):
        return (count,) * group.size
    return tuple(values[0] for values in exchange_integers((count,), group, who))


def all_gather(tensor: torch.Tensor, group: Group, dim: int = 0, counts: Sequence[int] | None = None) -> torch.Tensor:
    """``tensor`` of all ranks, concatenated along ``dim``. Backward: each rank gets the sum of all ranks' gradients of
    its part.
    """
    if group.size == 1:
        return tensor
    rows = tensor.movedim(dim, 0)
    return _gather_rows(rows, group, _checked_counts("all_gather", rows, counts, group)).movedim(0, dim)


def gather_features(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """[.., F/t] of all ranks side by side, [.., F]. Backward: the sum of all ranks' gradients of the own slice."""
    return tensor if group.size == 1 else with_backward(tensor, gathered_features, summed_features, group)


def reduce_scatter(
    tensor: torch.Tensor, group: Group, dim: int = 0, counts: Sequence[int] | None = None
) -> torch.Tensor:
    """This rank's part along ``dim`` of the sum of ``tensor`` over all ranks. Backward: all_gather.

    Without ``counts``, ``dim`` is cut into equal parts.
    """
    if group.size == 1:
        return tensor
    rows = tensor.movedim(dim, 0)
    return _reduce_rows(rows, group, _checked_parts("reduce_scatter", rows, counts, group)).movedim(0, dim)


def split_features(matrix: torch.Tensor, group: Group, counts: Sequence[int] | None = None) -> torch.Tensor:
    """[own rows, F] -> [rows of all ranks, F/t]: this rank's slice of the features, for everybody's rows. Backward:
    merge_features.
    """
    if group.size == 1:
        return matrix
    if matrix.dim() != 2 or matrix.shape[1] % group.size:
        raise TensorParallelError(
            f"split_features: a tensor of shape {tuple(matrix.shape)} cannot be cut into {group.size} equal slices of "
            f"features: "
            "it needs 2 dims, the second divisible by the tensor parallel degree"
        )
    return _split_features(matrix, group, _checked_counts("split_features", matrix, counts, group))


def merge_features(matrix: torch.Tensor, group: Group, counts: Sequence[int] | None = None) -> torch.Tensor:
    """[rows of all ranks, F/t] -> [own rows, F]: all features of this rank's rows. Backward: split_features."""
    if group.size == 1:
        return matrix
    if matrix.dim() != 2:
        raise TensorParallelError(f"merge_features: a tensor of shape {tuple(matrix.shape)} does not have 2 dims")
    return _merge_features(matrix, group, _checked_parts("merge_features", matrix, counts, group))


def all_reduce(tensor: torch.Tensor, group: Group, *, has_equal_gradients: bool = False) -> torch.Tensor:
    """The sum of ``tensor`` over all ranks, on each of them. Backward: the sum of all ranks' gradients.

    That is right where each rank's gradient is that of its own share of the loss, so that the true one is their sum.
    ``has_equal_gradients``: the ranks' gradients are known to be equal, so that the sum needs no message.
    """
    if group.size == 1:
        return tensor
    # One map, and not two one after the other: code of a model may write to the sum, which must be no view.
    return with_backward(tensor, summed, _sum_of_equal if has_equal_gradients else all_reduce, group)


def average_gradient(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """``tensor`` itself, equal on all ranks. Backward: the mean of all ranks' gradients."""
    return share(scale_gradient(tensor, 1.0 / group.size), group)


def _sum_of_equal(gradient: torch.Tensor, group: Group) -> torch.Tensor:
    return share(gradient * float(group.size), group)


def _gather_rows(rows: torch.Tensor, group: Group, counts: Sequence[int]) -> torch.Tensor:
    return with_backward(rows, gathered_rows, _reduce_rows, group, counts)


def _reduce_rows(rows: torch.Tensor, group: Group, counts: Sequence[int]) -> torch.Tensor:
    return with_backward(rows, _reduced_rows, _gather_rows, group, counts)


def _reduced_rows(rows: torch.Tensor, group: Group, counts: Sequence[int]) -> torch.Tensor:
    return start_reduce_rows(rows, group, counts).wait()


def _split_features(matrix: torch.Tensor, group: Group, counts: Sequence[int]) -> torch.Tensor:
    return with_backward(matrix, _split, _merge_features, group, counts)


def _split(matrix: torch.Tensor, group: Group, counts: Sequence[int]) -> torch.Tensor:
    return start_split_features(matrix, group, counts).wait()


def _merge_features(matrix: torch.Tensor, group: Group, counts: Sequence[int]) -> torch.Tensor:
    return with_backward(matrix, _merged, _split_features, group, counts)


def _merged(matrix: torch.Tensor, group: Group, counts: Sequence[int]) -> torch.Tensor:
    return start_merge_features(matrix, group, counts).wait()


def _checked_counts(what: str, rows: torch.Tensor, counts: Sequence[int] | None, group: Group) -> tuple[int, ...]:
    if counts is None:
        return (rows.shape[0],) * group.size
    if len(counts) != group.size or counts[group.rank_in_group] != rows.shape[0]:
        raise TensorParallelError(
            f"{what}: counts {tuple(counts)} do not describe {group.size} ranks, of which rank {group.rank_in_group} "
            f"has a tensor of shape "
            f"{tuple(rows.shape)}"
        )
    return tuple(counts)


def _checked_parts(what: str, rows: torch.Tensor, counts: Sequence[int] | None, group: Group) -> tuple[int, ...]:
    if counts is None:
        if rows.shape[0] % group.size:
            raise TensorParallelError(
                f"{what}: a tensor of shape {tuple(rows.shape)} has no {group.size} equal parts; give counts"
            )
        return (rows.shape[0] // group.size,) * group.size
    if len(counts) != group.size or sum(counts) != rows.shape[0]:
        raise TensorParallelError(
            f"{what}: counts {tuple(counts)} do not cut a tensor of shape {tuple(rows.shape)} into {group.size} parts"
        )
    return tuple(counts)
