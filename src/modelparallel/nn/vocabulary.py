"""The two ends of a language model with the vocabulary divided over the ranks: word embedding and head.

[Note: vocabulary] The original cuts the width of the embedding, and its head has to sum and send all logits: n * S * V
numbers. Here each rank holds V/t rows of the table (the last one fewer, if that is not whole). The head's logits then
are slices of the vocabulary, and the loss needs three numbers a position from each rank: its greatest logit, its sum
of exponentials, and the logit of the label if it holds it. Logits are put together only for callers who want them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from modelparallel.comm.collectives.replicated import (
    gather_whole_features,
    scale_gradient,
    sum_into_slices,
    sum_parts,
    take_features,
    take_rows,
)
from modelparallel.comm.collectives.split import merge_features
from modelparallel.comm.collectives.started import (
    start_all_reduce,
    start_gather_blocks,
    start_gather_rows,
    start_reduce_blocks,
)
from modelparallel.nn.family import FamilyModule
from modelparallel.nn.linear_maps import column_linear
from modelparallel.plan.rows import SplitSpec
from modelparallel.torch_compat.functions import TensorFunction

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group

#: Rows of logits are worked on in blocks of about this many numbers, so that what is made of a block stays in caches.
_BLOCK = 1 << 20
IGNORED = -100


class VocabularyEmbedding(FamilyModule):
    """ids of all ranks [n, S] -> hidden states in the layout inside; ``weight`` (V/t, H), or (V, H) if not split."""

    weight: nn.Parameter

    def __init__(self, num_embeddings: int, embedding_dim: int, std: float, *, is_split: bool) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.is_split = num_embeddings, embedding_dim, is_split
        full = torch.empty(num_embeddings, embedding_dim)
        with torch.no_grad():
            full.normal_(0.0, std)
        self.weight = self.slice_parameter(full, 0 if is_split else None)

    def split_tensors(self) -> dict[str, SplitSpec]:
        """The table is cut along dim 0, the vocabulary."""
        return {"weight": SplitSpec(0, (self.num_embeddings, self.embedding_dim))} if self.is_split else {}

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[n, S] -> [n, S, H] or, in the memory layout, [n, S, H/t]."""
        group = self.tp_group
        if group.size == 1:
            return F.embedding(ids, self.weight)
        if not self.is_split:
            embedded = F.embedding(ids, self.weight)
            return take_features(embedded, group) if self.is_memory else embedded
        first = first_row(self.num_embeddings, group)
        is_own = (ids >= first) & (ids < first + self.weight.shape[0])
        if self.weight.shape[0] == 0:
            embedded = self.weight.new_zeros((*ids.shape, self.embedding_dim)) + self.weight.sum()
        else:
            embedded = F.embedding((ids - first).clamp(0, self.weight.shape[0] - 1), self.weight)
            embedded = embedded * is_own.unsqueeze(-1).to(embedded.dtype)
        return sum_into_slices(embedded, group) if self.is_memory else sum_parts(embedded, group)

    def extra_repr(self) -> str:
        """The global sizes and the local slice."""
        return f"{self.num_embeddings}, {self.embedding_dim}, local_weight={tuple(self.weight.shape)}"


class SlicedEmbedding(FamilyModule):
    """A small table (positions, token types) whose lookups come in the layout inside; ``weight`` (num, H), in the
    memory layout (num, H/t).
    """

    weight: nn.Parameter

    def __init__(self, num_embeddings: int, embedding_dim: int, std: float) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        full = torch.empty(num_embeddings, embedding_dim)
        with torch.no_grad():
            full.normal_(0.0, std)
        self.weight = self.slice_parameter(full, 1 if self.is_memory else None)

    def split_tensors(self) -> dict[str, SplitSpec]:
        """The table is cut along the width where the hidden state is."""
        return {"weight": SplitSpec(1, (self.num_embeddings, self.embedding_dim))} if self.is_memory else {}

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[n, S] -> [n, S, H] or [n, S, H/t]."""
        return F.embedding(ids, self.weight)

    def extra_repr(self) -> str:
        """The global sizes."""
        return f"{self.num_embeddings}, {self.embedding_dim}"


class VocabularyHead(FamilyModule):
    """Hidden states -> logits or loss; ``weight`` (V/t, H) and, if asked for, ``bias`` (V/t,)."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        std: float,
        *,
        bias: bool,
        is_split: bool,
        tied_to: VocabularyEmbedding | None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.vocab_size, self.is_split = hidden_size, vocab_size, is_split
        if tied_to is not None:
            self.weight = tied_to.weight
        else:
            full = torch.empty(vocab_size, hidden_size)
            with torch.no_grad():
                full.normal_(0.0, std)
            self.weight = self.slice_parameter(full, 0 if is_split else None)
        self.bias = self.slice_parameter(torch.zeros(vocab_size), 0 if is_split else None) if bias else None

    def split_tensors(self) -> dict[str, SplitSpec]:
        """Cut along dim 0, the vocabulary."""
        if not self.is_split:
            return {}
        specs = {"weight": SplitSpec(0, (self.vocab_size, self.hidden_size))}
        if self.bias is not None:
            specs["bias"] = SplitSpec(0, (self.vocab_size,))
        return specs

    def forward(
        self, hidden: torch.Tensor, labels: torch.Tensor | None, counts: Sequence[int], *, needs_logits: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(loss of the own samples or None, logits of the own samples [N, S, V] or None).

        ``labels`` of all ranks, [n, S], with -100 where there is none; the loss is the mean over the own labels.
        """
        if needs_logits:
            logits = self._logits(hidden, counts)
            if labels is None:
                return None, logits
            own = self._own_rows(labels, counts)
            exact = logits if logits.dtype == torch.float64 else logits.float()
            return F.cross_entropy(exact.flatten(0, -2), own.flatten(), ignore_index=IGNORED), logits
        assert labels is not None
        losses = self._losses(hidden, labels)
        group, own = self.tp_group, self._own_rows(labels, counts)
        if self.is_prescaled:
            losses = scale_gradient(losses, float(group.size))
        else:
            losses = take_rows(losses, group, counts)
        return losses.sum() / (own != IGNORED).sum(), None

    def _own_rows(self, labels: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        return labels if self.is_prescaled else take_rows(labels, self.tp_group, counts)

    def _whole_on_each_rank(self, hidden: torch.Tensor) -> torch.Tensor:
        return gather_whole_features(hidden, self.tp_group) if self.is_memory else hidden

    def _losses(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """One loss for each position of all ranks, [n, S]; zero where the label is -100."""
        group = self.tp_group
        if not self.is_split and group.size > 1:
            logits = F.linear(self._whole_on_each_rank(hidden), self.weight, self.bias)
            exact = logits if logits.dtype == torch.float64 else logits.float()
            losses = F.cross_entropy(exact.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none")
            return losses.view(labels.shape)
        first = first_row(self.vocab_size, group)
        weight: torch.Tensor = self.weight
        bias: torch.Tensor | None = self.bias
        device_type = hidden.device.type
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        losses = _LinearCrossEntropy.apply(hidden, weight, bias, labels, first, group, self.is_memory)
        return losses.view(labels.shape)

    def _logits(self, hidden: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        group = self.tp_group
        if group.size == 1:
            return F.linear(hidden, self.weight, self.bias)
        if not self.is_split:
            logits = F.linear(self._whole_on_each_rank(hidden), self.weight, self.bias)
            if self.is_prescaled:
                return scale_gradient(logits, float(group.size))
            return take_rows(logits, group, counts)
        local = column_linear(hidden, self.weight, self.bias, group, is_memory=self.is_memory)
        width = -(-self.vocab_size // group.size)
        local = F.pad(local, (0, width - local.shape[-1]))  # the last ranks may hold fewer rows
        if self.is_prescaled:
            whole = scale_gradient(gather_whole_features(local, group), float(group.size))
            return whole[..., : self.vocab_size]
        inner = local.shape[1:-1]
        merged = merge_features(local.flatten(0, -2), group, [count * inner.numel() for count in counts])
        return merged.view(counts[group.rank_in_group], *inner, -1)[..., : self.vocab_size]

    def extra_repr(self) -> str:
        """The global sizes and the local slice."""
        return f"{self.hidden_size}, {self.vocab_size}, local_weight={tuple(self.weight.shape)}"


def first_row(num_rows: int, group: Group) -> int:
    """The first row of the slice of a table of ``num_rows`` that this rank holds."""
    row: int = SplitSpec(0, (num_rows,)).ranges(group.rank_in_group, group.size)[0].start
    return row


class _LinearCrossEntropy(TensorFunction):
    """The cross-entropy of ``hidden @ weight.T + bias`` without any tensor of the logits' size but one.

    The slice of the logits is kept for backward, which turns it into its own gradient, in place. A second backward over
    the same graph computes it again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        first: int,
        group: Group,
        is_memory: bool,
    ) -> torch.Tensor:
        is_gathered = is_memory and group.size > 1
        whole = start_gather_blocks(hidden, group).wait() if is_gathered else hidden
        logits = F.linear(whole.reshape(-1, whole.shape[-1]), weight, bias)
        own_labels = labels.reshape(-1) - first
        greatest, total, chosen = _row_statistics(logits, own_labels)
        if group.size > 1:
            own = torch.stack([greatest, total, chosen]).unsqueeze(0)
            statistics = start_gather_rows(own, group, (1,) * group.size).wait()
            greatest = statistics[:, 0].amax(0)
            total = (statistics[:, 1] * (statistics[:, 0] - greatest).exp()).sum(0)
            chosen = statistics[:, 2].sum(0)
        log_total = greatest + total.log()
        is_counted = labels.reshape(-1) != IGNORED
        ctx.save_for_backward(hidden, weight, bias, own_labels, log_total, is_counted)
        ctx.group, ctx.is_gathered = group, is_gathered
        ctx.logits = logits if any(ctx.needs_input_grad) else None
        return torch.where(is_counted, log_total - chosen, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, own_labels, log_total, is_counted = ctx.saved_tensors
        group = ctx.group
        gathering = start_gather_blocks(hidden, group) if ctx.is_gathered else None
        logits, ctx.logits = ctx.logits, None
        whole = hidden
        if logits is None:
            if gathering is not None:
                whole, gathering = gathering.wait(), None
            logits = F.linear(whole.reshape(-1, whole.shape[-1]), weight, bias)
        grad = torch.where(is_counted, grads[0], 0.0)
        _turn_into_gradient(logits, own_labels, log_total, grad)
        reducing = None
        if ctx.needs_input_grad[0]:
            hidden_grad = (logits @ weight).view(*hidden.shape[:-1], weight.shape[1])
            if group.size > 1:
                reducing = (
                    start_reduce_blocks(hidden_grad.chunk(group.size, -1), group)
                    if ctx.is_gathered
                    else start_all_reduce(hidden_grad, group)
                )
        if gathering is not None:
            whole = gathering.wait()
        weight_grad = logits.t() @ whole.reshape(-1, whole.shape[-1]) if ctx.needs_input_grad[1] else None
        bias_grad = logits.sum(0) if ctx.needs_input_grad[2] else None
        if not ctx.needs_input_grad[0]:
            input_grad = None
        else:
            input_grad = hidden_grad if reducing is None else reducing.wait()
        return input_grad, weight_grad, bias_grad, None, None, None, None


def _blocks(logits: torch.Tensor) -> list[slice]:
    num_rows = max(1, _BLOCK // max(1, logits.shape[1]))
    return [slice(start, start + num_rows) for start in range(0, logits.shape[0], num_rows)]


def _row_statistics(logits: torch.Tensor, own_labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three numbers for each row: the greatest logit, the sum of the exponentials relative to it, the logit of the
    label (0 if another rank holds it); in fp32 at least.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    num_rows, num_columns = logits.shape
    greatest = torch.full((num_rows,), torch.finfo(dtype).min, dtype=dtype, device=logits.device)
    total, chosen = torch.zeros_like(greatest), torch.zeros_like(greatest)
    if num_columns == 0:
        return greatest, total, chosen
    is_own = (own_labels >= 0) & (own_labels < num_columns)
    columns = own_labels.clamp(0, num_columns - 1).unsqueeze(1)
    for rows in _blocks(logits):
        block = logits[rows].to(dtype)
        greatest[rows] = block.amax(1)
        chosen[rows] = block.gather(1, columns[rows]).squeeze(1)
        total[rows] = (block - greatest[rows].unsqueeze(1)).exp_().sum(1)
    return greatest, total, torch.where(is_own, chosen, 0.0)


def _turn_into_gradient(
    logits: torch.Tensor, own_labels: torch.Tensor, log_total: torch.Tensor, grad: torch.Tensor
) -> None:
    """``logits`` become (softmax - one_hot) * grad, in place."""
    num_columns = logits.shape[1]
    if num_columns == 0:
        return
    is_own = (own_labels >= 0) & (own_labels < num_columns)
    columns = own_labels.clamp(0, num_columns - 1).unsqueeze(1)
    for rows in _blocks(logits):
        block = logits[rows]
        exact = block if block.dtype == log_total.dtype else block.to(log_total.dtype)
        scale = grad[rows].unsqueeze(1)
        exact.sub_(log_total[rows].unsqueeze(1)).exp_().mul_(scale)
        exact.scatter_add_(1, columns[rows], -scale * is_own[rows].unsqueeze(1))
        if exact is not block:
            block.copy_(exact)
