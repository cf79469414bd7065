"""The embedding with its width divided over the tensor-parallel ranks (smp-api section 9)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from modelparallel.comm.collectives.split import all_gather, gather_counts, merge_features
from modelparallel.errors import TensorParallelError, UnsupportedError
from modelparallel.plan.rows import SplitSpec
from modelparallel.tensor_parallel.distributed_module import DistributedModule
from modelparallel.tensor_parallel.placements import NotSplittableError, cut_weight, slice_length, slice_of

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group


class DistributedEmbedding(DistributedModule):
    """``nn.Embedding`` whose table is cut along the embedding dim: ids [N, S] (any shape) -> [N, S, embedding_dim].

    Each of the t ranks of TP_GROUP calls it with its own ids, gathers the ids of all, looks up its slice of the width,
    and gets all slices of its own rows back. The number of ids may differ from rank to rank. Construction is local;
    calls and backward are collective over TP_GROUP.

    Parameter: ``weight`` (num_embeddings, embedding_dim / t); its gradient is the sum over the batches of the group.

    Args:
        num_embeddings, embedding_dim, norm_type: as for ``nn.Embedding``.
        padding_idx: that row starts as zeros and gets no gradient.
        max_norm: rows that any rank of the group looks up are rescaled, in place, by the norm of the *whole* row.
        scale_grad_by_freq: by the frequency within each rank's own batch, as ``nn.Embedding`` on that rank would do it.
        sparse: only False: gradients of slices are dense.
        _weight: the full table to start from, (num_embeddings, embedding_dim); otherwise the full table is drawn and
            then sliced, so that it does not depend on t for one seed.
        initializer_range: the full table is drawn from N(0, initializer_range), or N(0, 1) if that is None.
        _skip_allgather: the ids of all ranks are given, [t*N, S], in rank order, equal on all ranks.
        _skip_scatter_and_merge: leave the result as it is inside, [t*N, S, embedding_dim / t].

    Raises:
        TensorParallelError: ``embedding_dim`` is not divisible by t.
        UnsupportedError: ``sparse=True``.

    Source: smp-api section 9.
    """

    weight: nn.Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: torch.Tensor | None = None,
        initializer_range: float | None = 0.02,
        _skip_allgather: bool = False,
        _skip_scatter_and_merge: bool = False,
    ) -> None:
        super().__init__()
        group = self.tp_group
        slice_length(embedding_dim, group.size, "embedding_dim of a DistributedEmbedding")
        if sparse:
            raise UnsupportedError(
                "DistributedEmbedding: sparse=True is not supported, gradients of a sliced table are dense: use "
                "sparse=False"
            )
        if padding_idx is not None:
            if not -num_embeddings <= padding_idx < num_embeddings:
                raise TensorParallelError(
                    f"DistributedEmbedding: padding_idx={padding_idx} is not one of the {num_embeddings} rows"
                )
            padding_idx %= num_embeddings
        if _weight is not None and tuple(_weight.shape) != (num_embeddings, embedding_dim):
            raise TensorParallelError(
                f"DistributedEmbedding: _weight has shape {tuple(_weight.shape)}, expected the full table "
                f"{(num_embeddings, embedding_dim)}"
            )
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.max_norm = max_norm
        self.norm_type = norm_type
        self.scale_grad_by_freq = scale_grad_by_freq
        self.sparse = sparse
        self.initializer_range = initializer_range
        self._skip_allgather = _skip_allgather
        self._skip_scatter_and_merge = _skip_scatter_and_merge
        full = self._initial_table(None, None) if _weight is None else _weight.detach()
        self.weight = nn.Parameter(slice_of(full, self._weight_spec(), group.rank_in_group, group.size))

    @classmethod
    def convert(cls, module: nn.Module, tp_group: Group) -> None:
        """Turn an ``nn.Embedding`` into a DistributedEmbedding in place: same object, same parameter, each rank its
        slice.
        """
        assert isinstance(module, nn.Embedding)
        if module.sparse:
            raise NotSplittableError("sparse=True, and gradients of a sliced table are dense")
        spec = SplitSpec(1, (module.num_embeddings, module.embedding_dim))
        cut_weight(module, {"weight"}, spec, "embedding_dim", tp_group)
        module.__dict__.update(initializer_range=None, _skip_allgather=False, _skip_scatter_and_merge=False)
        cls._adopt(module, tp_group)

    def reset_parameters(self) -> None:
        """Draw the full table again and keep this rank's slice."""
        full = self._initial_table(self.weight.device, self.weight.dtype)
        with torch.no_grad():
            self.weight.copy_(slice_of(full, self._weight_spec(), self.tp_group.rank_in_group, self.tp_group.size))

    def split_tensors(self) -> dict[str, SplitSpec]:
        """The table is cut along dim 1, the embedding dim."""
        return {"weight": self._weight_spec()}

    def _weight_spec(self) -> SplitSpec:
        return SplitSpec(1, (self.num_embeddings, self.embedding_dim))

    def _initial_table(self, device: torch.device | None, dtype: torch.dtype | None) -> torch.Tensor:
        table = torch.empty(self.num_embeddings, self.embedding_dim, device=device, dtype=dtype)
        nn.init.normal_(table, std=1.0 if self.initializer_range is None else self.initializer_range)
        if self.padding_idx is not None:
            table[self.padding_idx].zero_()
        return table

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """ids of any shape -> [*shape, embedding_dim], for the caller's own batch (see the class for the two
        switches).
        """
        group = self.tp_group
        if input.dtype not in (torch.int64, torch.int32):
            raise TensorParallelError(
                f"DistributedEmbedding: ids must be int64 or int32, got {input.dtype} of shape {tuple(input.shape)}"
            )
        ids, own_shape = input.reshape(-1), tuple(input.shape)
        if self._skip_allgather:
            if input.dim() == 0 or input.shape[0] % group.size:
                raise TensorParallelError(
                    f"DistributedEmbedding: with _skip_allgather the ids are those of all {group.size} ranks, but "
                    f"their "
                    f"shape {own_shape} is not divisible by that: give every rank the same number of rows"
                )
            own_shape = (input.shape[0] // group.size, *input.shape[1:])
            counts = (ids.numel() // group.size,) * group.size
        else:
            counts = gather_counts(ids.numel(), group, input, self.described)
            ids = all_gather(ids, group, counts=counts)
        slices = self._look_up(ids, counts)
        if self._skip_scatter_and_merge:
            return slices.view(*_scaled_shape(own_shape, counts), slices.shape[-1])
        return merge_features(slices, group, counts).view(*own_shape, self.embedding_dim)

    def _look_up(self, ids: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:
        """This rank's slice of the width, for the ids of all ranks: [len(ids), embedding_dim / t]."""
        if self.max_norm is not None:
            self._renormalise(ids)
        if self.scale_grad_by_freq:
            # One lookup per rank's ids, since each counts for itself.
            parts = [
                F.embedding(part, self.weight, self.padding_idx, scale_grad_by_freq=True)
                for part in ids.split(list(counts))
            ]
            return torch.cat(parts)
        return F.embedding(ids, self.weight, self.padding_idx)

    @torch.no_grad()
    def _renormalise(self, ids: torch.Tensor) -> None:
        """Rescale the rows that are looked up to at most max_norm, as ``nn.Embedding`` does, by the norm over all
        slices.
        """
        assert self.max_norm is not None
        group, rows = self.tp_group, ids.unique()
        partial = torch.linalg.vector_norm(self.weight[rows], self.norm_type, dim=1)
        if self.norm_type == float("inf"):
            norms = all_gather(partial.unsqueeze(0), group).amax(0)
        else:
            norms = torch.linalg.vector_norm(all_gather(partial.unsqueeze(0), group), self.norm_type, dim=0)
        scales = torch.where(norms > self.max_norm, self.max_norm / (norms + 1e-7), torch.ones_like(norms))
        self.weight[rows] = self.weight[rows] * scales.unsqueeze(1)

    def extra_repr(self) -> str:
        """The global sizes and the local slice."""
        padding = f", padding_idx={self.padding_idx}" if self.padding_idx is not None else ""
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, local_weight={tuple(self.weight.shape)}"


def _scaled_shape(own_shape: tuple[int, ...], counts: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the ids of all ranks, if this rank's have ``own_shape`` and each rank has ``counts`` of them."""
    row_length = math.prod(own_shape[1:])
    if not own_shape or any(count % max(1, row_length) for count in counts):
        raise TensorParallelError(
            "DistributedEmbedding: with _skip_scatter_and_merge the ids of all ranks must agree in all dims but the "
            f"first; this rank has shape {own_shape}, the ranks have {counts} ids"
        )
    return (sum(counts) // max(1, row_length), *own_shape[1:])
