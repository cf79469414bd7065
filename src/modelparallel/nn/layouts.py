"""How the hidden state lies on the tensor-parallel ranks while it is inside the transformer family.

[Note: layouts] Outside, each of the t ranks of TP_GROUP has a batch of its own, [N, S, H] (N may differ). Inside, the
family works on the batch of all ranks, n = sum of N, in the order of the ranks:

- ``optimize="speed"``: every rank holds the whole hidden state, [n, S, H].
- ``optimize="memory"``: every rank holds a slice of the features, [n, S, H/t].

With ``prescaled_batch=True`` the ranks feed the same batch, which then is the one that is worked on: nothing is
gathered on the way in, and everybody gets all of it on the way out.

[Note: whose gradient] Inside, gradients are those of the *sum* of the ranks' losses: each rank's loss is its own, so
the gradients of all rows come together on the way in, backwards. With a prescaled batch the ranks' losses are t times
the same one; that is why the gradient is multiplied by t where it enters, and divided where it leaves. So in both cases
a parameter inside has a gradient that is summed over RDP_GROUP and divided by dp (smp-api section 8).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from modelparallel.comm.collectives.replicated import (
    gather_whole_features,
    gather_whole_rows,
    scale_gradient,
    take_features,
    take_rows,
)
from modelparallel.comm.collectives.split import all_gather, merge_features, split_features
from modelparallel.comm.collectives.started import exchange_integers
from modelparallel.errors import DivergenceError, TensorParallelError

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group


@dataclass(frozen=True)
class HiddenLayout:
    """Which layout a module works in, and over whom."""

    group: Group
    is_memory: bool
    is_prescaled: bool
    is_debug: bool = False

    def local_width(self, width: int) -> int:
        """How many of the ``width`` features of the hidden state a rank holds."""
        return width // self.group.size if self.is_memory else width

    def scaled_rows(self, who: str, tensors: Sequence[torch.Tensor | None]) -> tuple[int, ...]:
        """How many rows (dim 0) each rank has; checks that the other dims of all ``tensors`` agree. Collective.

        One tiny message a call, and none for a prescaled batch (with ``is_debug`` one, to see that it is the same
        everywhere). ``who`` asks, for error messages.
        """
        first = tensors[0]
        assert first is not None
        if self.group.size > 1 and self.is_prescaled and self.is_debug:
            self._check_equal(who, tensors)
        if self.group.size == 1 or self.is_prescaled:
            return (first.shape[0],) * self.group.size
        described = [first.shape[0]]
        for tensor in tensors:
            dims = () if tensor is None else tuple(tensor.shape)
            described.append(hash((tensor is None, dims[1:])))
        rows = exchange_integers(described, self.group, who)
        for rank, theirs in enumerate(rows):
            if theirs[1:] != rows[0][1:]:
                shapes = ", ".join("None" if tensor is None else str(tuple(tensor.shape)) for tensor in tensors)
                raise TensorParallelError(
                    f"{who}: the inputs of the tensor-parallel ranks must agree in number, and in all dims but the "
                    f"first. This rank has {shapes}; ranks 0 and {rank} of the group differ. Pad the batches of one "
                    "step to equal lengths"
                )
        return tuple(theirs[0] for theirs in rows)

    def _check_equal(self, who: str, tensors: Sequence[torch.Tensor | None]) -> None:
        sums = [0 if tensor is None else _checksum(tensor) for tensor in tensors]
        for rank, theirs in enumerate(exchange_integers(sums, self.group, who)):
            differing = [index for index, (own, other) in enumerate(zip(sums, theirs, strict=True)) if own != other]
            if differing:
                raise DivergenceError(
                    f"{who}: with prescaled_batch=True all ranks of a tensor-parallel group must feed the same batch, "
                    f"but input {differing[0]} (of {len(sums)}) of rank {rank} of the group is not that of rank "
                    f"{self.group.rank_in_group}: shard the data by smp.rdp_rank() and smp.rdp_size(), or use "
                    "prescaled_batch=False"
                )

    def gather_rows(self, tensor: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Something without a gradient (ids, masks) of all ranks: [N, ...] -> [n, ...]."""
        return tensor if self.is_prescaled else all_gather(tensor, self.group, counts=counts)

    def enter(self, hidden: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """[N, S, H] of the caller -> the layout inside."""
        group = self.group
        if group.size == 1:
            return hidden
        if self.is_prescaled:
            hidden = scale_gradient(hidden, 1.0 / group.size)
            return take_features(hidden, group) if self.is_memory else hidden
        if not self.is_memory:
            return gather_whole_rows(hidden, group, counts)
        inner = hidden.shape[1:-1]
        length = inner.numel()
        slices = split_features(hidden.reshape(-1, hidden.shape[-1]), group, [count * length for count in counts])
        return slices.view(sum(counts), *inner, slices.shape[-1])

    def leave(self, hidden: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """The layout inside -> [N, S, H] of the caller."""
        group = self.group
        if group.size == 1:
            return hidden
        if self.is_prescaled:
            whole = gather_whole_features(hidden, group) if self.is_memory else hidden
            return scale_gradient(whole, float(group.size))
        if not self.is_memory:
            return take_rows(hidden, group, counts)
        inner = hidden.shape[1:-1]
        length = inner.numel()
        merged = merge_features(hidden.reshape(-1, hidden.shape[-1]), group, [count * length for count in counts])
        return merged.view(counts[group.rank_in_group], *inner, merged.shape[-1])


def _checksum(tensor: torch.Tensor) -> int:
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return zlib.crc32(repr(tuple(tensor.shape)).encode(), zlib.crc32(content.numpy().tobytes()))
