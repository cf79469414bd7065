"""Attention with its heads divided over the tensor-parallel ranks (smp-api section 9)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from modelparallel.comm.collectives.agreed_random import agreed_seed, default_generator_at, derived_seed
from modelparallel.errors import TensorParallelError
from modelparallel.nn.dropout import hidden_dropout, keep_mask
from modelparallel.nn.family import SplitLinear, as_tuple
from modelparallel.nn.masks import alibi_bias, attention_mask
from modelparallel.nn.normalization import DistributedLayerNorm
from modelparallel.nn.options import OptionsModule, TransformerOptions, check_layernorms, check_sizes, takes_options
from modelparallel.nn.rotary import rotated


class FlashAttentionLayer(nn.Module):
    """Softmax attention of queries, keys and values that lie beside each other. Local.

    ``forward(qkv, attn_mask=None, causal=False)``: qkv [N, S, 3, heads, head_size] -> [N, heads, S, head_size]. Runs on
    ``torch.nn.functional.scaled_dot_product_attention``: flash kernels on GPUs, fused ones elsewhere, any dtype.

    - Scores are multiplied by ``scale``, or, if that is None, by 1/sqrt(attention_head_size) (with
      ``scale_attention_scores``) and by 1/(layer_idx + 1) (with ``scale_attn_by_layer_idx``).
    - ``attn_mask`` [N or 1, heads or 1, S or 1, S]: added to the scores, or, a bool, True where a key may be seen. The
      original takes it with ``triton_flash_attention`` and ``use_alibi`` only; here the two are accepted and not
      needed.
    - ``causal``: keys after the query are not seen.

    Raises:
        TensorParallelError: a factor of the scale is asked for and its number is missing.

    Source: smp-api section 9.
    """

    def __init__(
        self,
        attention_dropout_prob: float = 0.1,
        attention_head_size: int | None = None,
        scale_attention_scores: bool = True,
        scale_attn_by_layer_idx: bool = False,
        layer_idx: int | None = None,
        scale: float | None = None,
        triton_flash_attention: bool = False,
        use_alibi: bool = False,
    ) -> None:
        super().__init__()
        self.attention_dropout_prob = attention_dropout_prob
        self.triton_flash_attention = triton_flash_attention
        self.use_alibi = use_alibi
        if scale is None:
            scale = 1.0
            if scale_attention_scores:
                if attention_head_size is None:
                    raise TensorParallelError(
                        "FlashAttentionLayer: scale_attention_scores=True needs attention_head_size (scores are "
                        "divided by its square root): give it, or scale, or scale_attention_scores=False"
                    )
                scale /= math.sqrt(attention_head_size)
            if scale_attn_by_layer_idx:
                if layer_idx is None:
                    raise TensorParallelError(
                        "FlashAttentionLayer: scale_attn_by_layer_idx=True needs layer_idx (scores are divided by "
                        "layer_idx + 1)"
                    )
                scale /= layer_idx + 1
        self.scale = scale

    def forward(self, qkv: torch.Tensor, attn_mask: torch.Tensor | None = None, causal: bool = False) -> torch.Tensor:
        """[N, S, 3, heads, head_size] -> [N, heads, S, head_size]."""
        if qkv.dim() != 5 or qkv.shape[2] != 3:
            raise TensorParallelError(
                f"FlashAttentionLayer: qkv has shape {tuple(qkv.shape)}, expected [N, S, 3, heads, head_size]"
            )
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.attend(query, key, value, attn_mask, causal=causal)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        *,
        causal: bool = False,
    ) -> torch.Tensor:
        """The attention of queries, keys and values, [N, heads, S, head_size] each (queries may have another S)."""
        if causal and attn_mask is not None:
            attn_mask = attention_mask(attn_mask, query, key, causal=True, window_size=None)
            causal = False
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=self.attention_dropout_prob if self.training else 0.0,
            is_causal=causal,
            scale=self.scale,
        )

    def extra_repr(self) -> str:
        """Dropout and scale."""
        return f"attention_dropout_prob={self.attention_dropout_prob}, scale={self.scale:g}"


@takes_options
class DistributedAttentionLayer(OptionsModule):
    """Self- or cross-attention with its residual and layer normalisation.

    Each rank computes ``num_attention_heads / t`` heads of all ranks' samples. ``forward`` takes one tuple:
    ``(hidden_states [N, S, H], attention_mask)``, with ``cross_attention=True`` ``(hidden_states [N, S1, H],
    cross_states [N, S2, H], attention_mask)``, and gives [N, S, H]. The mask is added to the scores, [N, 1, 1, S] or
    anything that broadcasts to [N, 1, S, S] ([N, 1, S1, S2]), or a bool (True: seen), or None. With ``rotary_dim`` a
    third entry may hold position ids [N, S].

    Queries come from ``LN_pre(x)`` or x, keys and values from the same, or from the raw ``cross_states``; the residual
    is always added; with ``post_layernorm`` the result is normalised. ``causal_mask_size``: None for no causal mask
    (cross-attention has none either), else the greatest S. Further keyword arguments: `TransformerOptions`.

    Construction is local; calls and backward are collective over TP_GROUP.

    Raises:
        TensorParallelError: heads or hidden size are not divisible by t, both LayerNorms are off, or tensors have wrong
            shapes.

    Source: smp-api section 9.
    """

    def __init__(
        self,
        num_attention_heads: int = 32,
        attention_head_size: int = 32,
        hidden_size: int = 1024,
        attention_dropout_prob: float = 0.1,
        hidden_dropout_prob: float = 0.1,
        layernorm_epsilon: float = 1e-5,
        initializer_range: float = 0.02,
        use_normal_initialization: bool = False,
        cross_attention: bool = False,
        causal_mask_size: int | None = None,
        pre_layernorm: bool = False,
        post_layernorm: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(options)
        who = type(self).__name__
        group = self.tp_group
        check_layernorms(who, pre_layernorm, post_layernorm)
        check_sizes(who, group.size, num_attention_heads=num_attention_heads, hidden_size=hidden_size)
        self.num_attention_heads, self.attention_head_size = num_attention_heads, attention_head_size
        self.hidden_size, self.causal_mask_size = hidden_size, causal_mask_size
        self.hidden_dropout_prob, self.attention_dropout_prob = hidden_dropout_prob, attention_dropout_prob
        self.is_cross_attention = cross_attention
        width = num_attention_heads * attention_head_size
        std = initializer_range if use_normal_initialization else None
        qkv: dict[str, Any] = {"is_column": True, "bias": self.options.qkv_bias, "std": std}
        self.pre_layernorm = (
            DistributedLayerNorm(hidden_size, layernorm_epsilon, is_inner=True) if pre_layernorm else None
        )
        if cross_attention:
            self.query = SplitLinear(hidden_size, width, **qkv)
            self.key_value = SplitLinear(hidden_size, width, num_maps=2, **qkv)
        else:
            by_head = self.options.qkv_by_head
            self.qkv = SplitLinear(hidden_size, 3 * width if by_head else width, num_maps=1 if by_head else 3, **qkv)
        self.attention_core = FlashAttentionLayer(
            attention_dropout_prob,
            attention_head_size,
            self.options.scale_attention_scores,
            self.options.scale_attn_by_layer_idx,
            self.options.layer_idx,
            use_alibi=self.options.use_alibi,
        )
        self.dense = SplitLinear(width, hidden_size, is_column=False, bias=self.options.attention_dense_bias, std=std)
        self.post_layernorm = (
            DistributedLayerNorm(hidden_size, layernorm_epsilon, is_inner=True) if post_layernorm else None
        )

    def forward(self, inputs: Sequence[torch.Tensor | None] | torch.Tensor) -> torch.Tensor:
        """One tuple -> [N, S, H]; see the class."""
        hidden, states, mask, positions = self._unpacked(inputs)
        if not self.is_inner:
            layout, who = self.layout, type(self).__name__
            mask = whole_mask(mask, hidden)
            counts = layout.scaled_rows(who, [hidden, states, mask, positions])
            hidden = layout.enter(hidden, counts)
            states = None if states is None else layout.enter(states, counts)
            mask = None if mask is None else layout.gather_rows(mask, counts)
            positions = None if positions is None else layout.gather_rows(positions, counts)
        source = hidden if self.pre_layernorm is None else self.pre_layernorm(hidden)
        output = self.branch(source, states, mask, positions)
        output = add_residual(hidden, output, self.options)
        if self.post_layernorm is not None:
            output = self.post_layernorm(output)
        return output if self.is_inner else self.layout.leave(output, counts)

    def branch(
        self,
        source: torch.Tensor,
        states: torch.Tensor | None,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What is added to the residual, in the layout inside; ``source`` is normalised."""
        seed = agreed_seed(self.tp_group) if self._has_dropout() else None
        if states is None:
            query, key, value = self._heads(self.qkv(source), 3, by_head=self.options.qkv_by_head)
        else:
            (query,) = self._heads(self.query(source), 1)
            key, value = self._heads(self.key_value(states), 2)
        self._check_length(query)
        context = self._attend(query, key, value, mask, positions, seed)
        output = self.dense(context.transpose(1, 2).flatten(2))
        return hidden_dropout(output, self.hidden_dropout_prob, seed, self.layout)

    def _has_dropout(self) -> bool:
        return self.training and (self.hidden_dropout_prob > 0.0 or self.attention_dropout_prob > 0.0)

    def _heads(self, mapped: torch.Tensor, num_maps: int, *, by_head: bool = False) -> tuple[torch.Tensor, ...]:
        """[N, S, num_maps * local width] -> ``num_maps`` tensors [N, local heads, S, head_size]."""
        if by_head:
            shape = (*mapped.shape[:2], -1, num_maps, self.attention_head_size)
            return mapped.view(shape).permute(3, 0, 2, 1, 4).unbind(0)
        shape = (*mapped.shape[:2], num_maps, -1, self.attention_head_size)
        return mapped.view(shape).permute(2, 0, 3, 1, 4).unbind(0)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        seed: int | None,
    ) -> torch.Tensor:
        options, dtype = self.options, query.dtype
        if options.rotary_dim is not None:
            query, key = rotated(query, key, positions, options)
        if options.attention_in_fp32 and dtype != torch.float64:
            query, key, value = query.float(), key.float(), value.float()
        causal = self.causal_mask_size is not None and not self.is_cross_attention
        window = options.window_size
        if not (window is None or isinstance(window, int)):
            raise TensorParallelError(f"{type(self).__name__}: window_size={window!r} of one layer is an int or None")
        if options.use_alibi:
            mask = alibi_bias(mask, query, key, self.num_attention_heads, self.tp_group, options.alibi_bias_max)
        if mask is not None or window is not None:
            mask = attention_mask(mask, query, key, causal=causal, window_size=window)
            causal = False
        if seed is None or self.attention_dropout_prob == 0.0:
            context = self.attention_core.attend(query, key, value, mask, causal=causal)
        elif options.deterministic_dropout:
            context = self._attend_with_mask_of_all_heads(query, key, value, mask, causal, seed)
        else:
            with default_generator_at(derived_seed(seed, 1 + self.tp_group.rank_in_group), query.device):
                context = self.attention_core.attend(query, key, value, mask, causal=causal)
        return context.to(dtype)

    def _attend_with_mask_of_all_heads(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        causal: bool,
        seed: int,
    ) -> torch.Tensor:
        # scaled_dot_product_attention takes no dropout mask, so this is written out.
        scores = (query * self.attention_core.scale) @ key.transpose(-2, -1)
        if causal:
            mask = attention_mask(None, query, key, causal=True, window_size=None)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        weights = scores.softmax(-1)
        shape = (query.shape[0], self.num_attention_heads, *scores.shape[-2:])
        keep = keep_mask(shape, self.attention_dropout_prob, scores, derived_seed(seed, 0))
        group = self.tp_group
        return (weights * keep.chunk(group.size, 1)[group.rank_in_group]) @ value

    def _unpacked(
        self, inputs: Sequence[torch.Tensor | None] | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        entries = as_tuple(inputs)
        needed = 2 if self.is_cross_attention else 1
        if not needed <= len(entries) <= needed + 2 or entries[0] is None:
            expected = (
                "(hidden_states, cross_states, attention_mask)"
                if self.is_cross_attention
                else "(hidden_states, attention_mask)"
            )
            raise TensorParallelError(
                f"{type(self).__name__}: got {len(entries)} entries, expected one tuple {expected}"
            )
        padded = (*entries, None, None)
        states = padded[1] if self.is_cross_attention else None
        mask, positions = padded[needed], padded[needed + 1]
        return entries[0], states, mask, positions

    def _check_length(self, query: torch.Tensor) -> None:
        length = query.shape[2]
        if self.causal_mask_size is not None and length > self.causal_mask_size and not self.is_cross_attention:
            raise TensorParallelError(
                f"{type(self).__name__}: the input has {length} positions, more than causal_mask_size="
                f"{self.causal_mask_size}"
            )

    def extra_repr(self) -> str:
        """Sizes; the local number of heads."""
        local = self.num_attention_heads // self.tp_group.size
        return f"heads={self.num_attention_heads} (local {local}), head_size={self.attention_head_size}"


def add_residual(hidden: torch.Tensor, output: torch.Tensor, options: TransformerOptions) -> torch.Tensor:
    """The sum, computed in fp32 if the options say so, in the dtype of ``hidden``."""
    if options.fp32_residual_addition and hidden.dtype in (torch.float16, torch.bfloat16):
        return (hidden.float() + output.float()).to(hidden.dtype)
    return hidden + output


def whole_mask(mask: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor | None:
    """A mask with one row for each sample, so that the masks of all ranks can be gathered."""
    if mask is None:
        return None
    if mask.dim() != 4 or mask.shape[0] not in (1, hidden.shape[0]):
        raise TensorParallelError(
            f"attention_mask has shape {tuple(mask.shape)}, expected [N, 1, 1, S] or [N, 1, S, S] with "
            f"N={hidden.shape[0]} samples (it is added to the scores)"
        )
    return mask.expand(hidden.shape[0], -1, -1, -1)
