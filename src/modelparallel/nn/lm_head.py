"""A language model split over the tensor-parallel ranks: embeddings, transformer, head (smp-api section 9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from modelparallel.comm.collectives.agreed_random import agreed_seed
from modelparallel.errors import TensorParallelError
from modelparallel.nn.dropout import hidden_dropout
from modelparallel.nn.family import FamilyModule, as_tuple
from modelparallel.nn.masks import padding_mask
from modelparallel.nn.options import OptionsModule, check_sizes, takes_options
from modelparallel.nn.transformer import DistributedTransformer
from modelparallel.nn.vocabulary import IGNORED, SlicedEmbedding, VocabularyEmbedding, VocabularyHead

Output = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class TransformerEmbedding(FamilyModule):
    """The sum of word, position and token-type embeddings, with dropout, for the ids of all ranks."""

    def __init__(
        self,
        vocab_size: int,
        num_positions: int,
        num_token_types: int,
        hidden_size: int,
        dropout_prob: float,
        std: float,
        *,
        is_split: bool,
    ) -> None:
        super().__init__()
        self.dropout_prob = dropout_prob
        self.word_embedding = VocabularyEmbedding(vocab_size, hidden_size, std, is_split=is_split)
        self.position_embedding = SlicedEmbedding(num_positions, hidden_size, std) if num_positions else None
        self.token_type_embedding = SlicedEmbedding(num_token_types, hidden_size, std) if num_token_types else None

    def forward(
        self, ids: torch.Tensor, token_types: torch.Tensor | None, positions: torch.Tensor | None
    ) -> torch.Tensor:
        """[n, S] each -> [n, S, H] or [n, S, H/t]."""
        hidden = self.word_embedding(ids)
        if self.position_embedding is not None:
            if positions is None:
                positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
            hidden = hidden + self.position_embedding(positions)
        if self.token_type_embedding is not None and token_types is not None:
            hidden = hidden + self.token_type_embedding(token_types)
        seed = agreed_seed(self.tp_group) if self.training and self.dropout_prob > 0.0 else None
        return hidden_dropout(hidden, self.dropout_prob, seed, self.layout)


@takes_options
class DistributedTransformerLMHead(OptionsModule):
    """Embeddings, a `DistributedTransformer`, and a head over the vocabulary.

    ``forward`` takes one tuple ``(input_ids, attention_mask, token_type_ids, position_ids, labels)``, with
    ``add_cross_attention`` ``(input_ids, attention_mask, token_type_ids, position_ids, cross_states, cross_mask,
    labels)``; entries may be None, or left out at the end. ``input_ids`` [N, S]; ``attention_mask`` [N, S] with **1
    where a position is masked** (``cross_mask`` [N, S2] likewise); ``labels`` [N, S], -100 where there is none.

    Gives the loss if there are labels, else the logits [N, S, V]; without ``add_lm_head`` the hidden states [N, S, H].
    Word embedding and head are split over the vocabulary, and the loss is computed from slices of the logits, which are
    never put together: so ``return_logits=True`` must be given to get ``(loss, logits)``. By default that is what
    evaluation (no gradients) gives for labels, and training gives the loss alone.

    Each rank feeds its own batch and gets its own loss or logits; with ``prescaled_batch`` all ranks feed the same.
    Construction is local; calls and backward are collective over TP_GROUP.

    Arguments beyond the documented ones (keyword only): ``tie_word_embeddings``: head and word embedding are one
    parameter; ``lm_head_bias``; ``embedding_dropout_prob`` (None: ``hidden_dropout_prob``); ``shift_labels``: the label
    of a position is that of the next one (None: if ``causal_mask_size`` is given); ``num_positions=0``: no position
    embedding; and `TransformerOptions`.

    Raises:
        TensorParallelError: sizes are not divisible by t (the vocabulary need not be), or inputs do not fit.

    Source: smp-api section 9.
    """

    def __init__(
        self,
        num_layers: int = 12,
        num_attention_heads: int = 32,
        attention_head_size: int = 32,
        hidden_size: int = 1024,
        intermediate_size: int = 4096,
        vocab_size: int = 30522,
        num_positions: int = 1024,
        attention_dropout_prob: float = 0.1,
        hidden_dropout_prob: float = 0.1,
        activation: str = "gelu",
        layernorm_epsilon: float = 1e-5,
        num_token_types: int = 0,
        causal_mask_size: int | None = None,
        add_cross_attention: bool = False,
        add_lm_head: bool = True,
        initializer_range: float = 0.02,
        use_normal_initialization: bool = False,
        pre_layernorm: bool = False,
        post_layernorm: bool = True,
        *,
        tie_word_embeddings: bool = True,
        lm_head_bias: bool = False,
        embedding_dropout_prob: float | None = None,
        shift_labels: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__(options)
        who = type(self).__name__
        check_sizes(who, 1, vocab_size=vocab_size, num_layers=num_layers)
        check_sizes(who, self.tp_group.size, hidden_size=hidden_size)
        self.num_positions, self.num_token_types = num_positions, num_token_types
        self.has_cross_attention = add_cross_attention
        self.shifts_labels = causal_mask_size is not None if shift_labels is None else shift_labels
        is_split = self.options.distribute_embedding
        self.embedding = TransformerEmbedding(
            vocab_size,
            num_positions,
            num_token_types,
            hidden_size,
            hidden_dropout_prob if embedding_dropout_prob is None else embedding_dropout_prob,
            initializer_range,
            is_split=is_split,
        )
        arguments = (
            num_layers, num_attention_heads, attention_head_size, hidden_size, intermediate_size,
            attention_dropout_prob, hidden_dropout_prob, activation, layernorm_epsilon, initializer_range,
            use_normal_initialization, causal_mask_size, add_cross_attention, pre_layernorm, post_layernorm,
        )  # fmt: skip
        self.transformer = DistributedTransformer(*arguments, **self.options.as_arguments())
        self.transformer.is_inner = True
        self.lm_head: nn.Module | None = None
        if add_lm_head:
            self.lm_head = VocabularyHead(
                hidden_size,
                vocab_size,
                initializer_range,
                bias=lm_head_bias,
                is_split=is_split,
                tied_to=self.embedding.word_embedding if tie_word_embeddings else None,
            )

    def forward(
        self, inputs: Sequence[torch.Tensor | None] | torch.Tensor, return_logits: bool | None = None
    ) -> Output:
        """One tuple -> loss, logits, (loss, logits) or hidden states; see the class."""
        ids, masked, token_types, positions, states, cross_masked, labels = self._unpacked(inputs)
        layout, who = self.layout, type(self).__name__
        given = [ids, masked, token_types, positions, labels, cross_masked]
        counts = layout.scaled_rows(who, [*given, states])
        ids, masked, token_types, positions, labels, cross_masked = self._gathered(given, counts)
        if labels is not None and self.shifts_labels:
            labels = torch.cat([labels[:, 1:], labels.new_full((labels.shape[0], 1), IGNORED)], 1)
        hidden = self.embedding(ids, token_types, positions)
        entries: tuple[torch.Tensor | None, ...]
        if self.has_cross_attention:
            assert states is not None
            entries = (hidden, layout.enter(states, counts), padding_mask(masked), padding_mask(cross_masked))
        elif self.options.rotary_dim is not None:
            entries = (hidden, padding_mask(masked), positions)
        else:
            entries = (hidden, padding_mask(masked))
        hidden = self.transformer(entries)[0]
        if self.lm_head is None:
            return layout.leave(hidden, counts)
        if return_logits is None:
            return_logits = labels is None or not torch.is_grad_enabled()
        loss, logits = self.lm_head(hidden, labels, counts, needs_logits=return_logits or labels is None)
        result: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
        result = logits if loss is None else loss if logits is None else (loss, logits)
        return result

    def _unpacked(self, inputs: Any) -> tuple[Any, ...]:
        entries = as_tuple(inputs)
        length = 7 if self.has_cross_attention else 5
        if not 1 <= len(entries) <= length or not isinstance(entries[0], torch.Tensor):
            names = "input_ids, attention_mask, token_type_ids, position_ids, " + (
                "cross_states, cross_mask, labels" if self.has_cross_attention else "labels"
            )
            raise TensorParallelError(
                f"{type(self).__name__}: got {len(entries)} entries, expected one tuple ({names}); leave out only at "
                "the end"
            )
        padded = [*entries, *[None] * (length - len(entries))]
        if not self.has_cross_attention:
            padded = [*padded[:4], None, None, padded[4]]
        elif padded[4] is None:
            raise TensorParallelError(f"{type(self).__name__}: add_cross_attention=True needs cross_states")
        ids = padded[0]
        for name, entry in zip(("attention_mask", "token_type_ids", "position_ids"), padded[1:4], strict=True):
            self._check_like_ids(name, entry, ids)
        self._check_like_ids("labels", padded[6], ids)
        if self.num_positions and ids.shape[1] > self.num_positions and padded[3] is None:
            raise TensorParallelError(
                f"{type(self).__name__}: input_ids have {ids.shape[1]} positions, more than num_positions="
                f"{self.num_positions}"
            )
        return tuple(padded)

    def _check_like_ids(self, name: str, entry: Any, ids: torch.Tensor) -> None:
        if ids.dim() != 2 or (entry is not None and tuple(entry.shape) not in (tuple(ids.shape), (1, ids.shape[1]))):
            shape = tuple(ids.shape) if entry is None else tuple(entry.shape)
            raise TensorParallelError(
                f"{type(self).__name__}: {name} has shape {shape}, input_ids {tuple(ids.shape)}; both must be [N, S]"
            )

    def _gathered(self, tensors: list[torch.Tensor | None], counts: Sequence[int]) -> list[torch.Tensor | None]:
        """The whole-number inputs of all ranks, in one message."""
        first = tensors[0]
        assert first is not None
        if self.tp_group.size == 1 or self.is_prescaled:
            return tensors
        given = [tensor for tensor in tensors if tensor is not None]
        parts = [tensor.expand(first.shape[0], -1).long() for tensor in given]
        packed = self.layout.gather_rows(torch.cat(parts, 1), counts)
        unpacked = iter(packed.split([part.shape[1] for part in parts], 1))
        return [None if tensor is None else next(unpacked) for tensor in tensors]
