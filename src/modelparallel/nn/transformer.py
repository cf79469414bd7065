"""Transformer layers, and stacks of them, split over the tensor-parallel ranks (smp-api section 9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from modelparallel.comm.collectives.agreed_random import agreed_seed
from modelparallel.errors import TensorParallelError
from modelparallel.nn.attention import DistributedAttentionLayer, add_residual, whole_mask
from modelparallel.nn.dropout import hidden_dropout
from modelparallel.nn.family import FamilyModule, SplitLinear, as_tuple
from modelparallel.nn.normalization import DistributedLayerNorm
from modelparallel.nn.options import (
    OptionsModule,
    activation_function,
    check_layernorms,
    check_sizes,
    takes_options,
)

Entries = tuple[torch.Tensor | None, ...]


@takes_options
class DistributedTransformerOutputLayer(OptionsModule):
    """The feed-forward part of a layer: ``dense1``, activation, ``dense2``, dropout, residual, LayerNorm.

    [N, S, H] -> [N, S, H]. Each rank computes ``intermediate_size / t`` of the inner features for all ranks' samples.
    The residual is always added. ``fp32_residual_addition`` does that in fp32. Further keyword arguments:
    `TransformerOptions`. Construction is local; calls and backward are collective over TP_GROUP.

    Raises:
        TensorParallelError: ``hidden_size`` or ``intermediate_size`` is not divisible by t.

    Source: smp-api section 9.
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        intermediate_size: int = 4096,
        hidden_dropout_prob: float = 0.1,
        activation: str = "gelu",
        layernorm_epsilon: float = 1e-5,
        initializer_range: float = 0.02,
        use_normal_initialization: bool = False,
        pre_layernorm: bool = False,
        post_layernorm: bool = True,
        fp32_residual_addition: bool = False,
        **options: Any,
    ) -> None:
        super().__init__({"fp32_residual_addition": fp32_residual_addition, **options})
        who = type(self).__name__
        # With parallel_attn_output the LayerNorm is that of the attention.
        if not self.options.parallel_attn_output:
            check_layernorms(who, pre_layernorm, post_layernorm)
        check_sizes(who, self.tp_group.size, hidden_size=hidden_size, intermediate_size=intermediate_size)
        self.hidden_dropout_prob = hidden_dropout_prob
        self.activation_name = activation
        self.activation = activation_function(who, activation)
        std = initializer_range if use_normal_initialization else None
        norm = (hidden_size, layernorm_epsilon)
        self.pre_layernorm = DistributedLayerNorm(*norm, is_inner=True) if pre_layernorm else None
        self.dense1 = SplitLinear(hidden_size, intermediate_size, is_column=True, std=std)
        self.dense2 = SplitLinear(intermediate_size, hidden_size, is_column=False, std=std)
        self.post_layernorm = DistributedLayerNorm(*norm, is_inner=True) if post_layernorm else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, S, H] -> [N, S, H]."""
        counts: tuple[int, ...] = ()
        if not self.is_inner:
            counts = self.layout.scaled_rows(type(self).__name__, [hidden])
            hidden = self.layout.enter(hidden, counts)
        source = hidden if self.pre_layernorm is None else self.pre_layernorm(hidden)
        output = add_residual(hidden, self.branch(source), self.options)
        if self.post_layernorm is not None:
            output = self.post_layernorm(output)
        return output if self.is_inner else self.layout.leave(output, counts)

    def branch(self, source: torch.Tensor) -> torch.Tensor:
        """What is added to the residual, in the layout inside; ``source`` is normalised."""
        has_dropout = self.training and self.hidden_dropout_prob > 0.0
        seed = agreed_seed(self.tp_group) if has_dropout else None
        output = self.dense2(self.activation(self.dense1(source)))
        return hidden_dropout(output, self.hidden_dropout_prob, seed, self.layout)

    def extra_repr(self) -> str:
        """The activation."""
        return f"activation={self.activation_name}"


class _EntriesModule(OptionsModule):
    """Takes one tuple, and gives it with new hidden states."""

    has_cross_attention = False

    def forward(self, inputs: Sequence[torch.Tensor | None] | torch.Tensor) -> Entries:
        """One tuple -> the same tuple with new hidden states; see `DistributedTransformerLayer`."""
        entries = layer_entries(self, inputs, self.has_cross_attention)
        if self.is_inner:
            return (self._run(entries), *entries[1:])
        gathered, counts = enter_entries(self, entries, self.has_cross_attention)
        return (self.layout.leave(self._run(gathered), counts), *entries[1:])

    def _run(self, entries: Entries) -> torch.Tensor:
        """The new hidden states, in the layout inside."""
        raise NotImplementedError


@takes_options
class DistributedTransformerLayer(_EntriesModule):
    """Self-attention, cross-attention if asked for, and output layer: submodules ``attention``, ``cross_attention`` and
    ``output``.

    ``forward`` takes one tuple ``(hidden_states [N, S, H], attention_mask)`` and gives the same with new hidden states;
    with ``add_cross_attention`` ``(hidden_states [N, S1, H], cross_states [N, S2, H], attention_mask, cross_mask)``, of
    which only the first is new. For masks, further arguments and errors see `DistributedAttentionLayer`. Construction
    is local; calls and backward are collective over TP_GROUP. Source: smp-api section 9.
    """

    def __init__(
        self,
        num_attention_heads: int = 32,
        attention_head_size: int = 32,
        hidden_size: int = 1024,
        intermediate_size: int = 4096,
        attention_dropout_prob: float = 0.1,
        hidden_dropout_prob: float = 0.1,
        activation: str = "gelu",
        layernorm_epsilon: float = 1e-5,
        initializer_range: float = 0.02,
        use_normal_initialization: bool = False,
        causal_mask_size: int | None = None,
        add_cross_attention: bool = False,
        pre_layernorm: bool = False,
        post_layernorm: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(options)
        who = type(self).__name__
        is_parallel = self.options.parallel_attn_output
        if is_parallel and (add_cross_attention or post_layernorm or not pre_layernorm):
            raise TensorParallelError(
                f"{who}: parallel_attn_output=True needs pre_layernorm=True, post_layernorm=False and "
                "add_cross_attention=False"
            )
        extra = self.options.as_arguments()
        extra.pop("fp32_residual_addition")
        attention_arguments = {
            "num_attention_heads": num_attention_heads,
            "attention_head_size": attention_head_size,
            "hidden_size": hidden_size,
            "attention_dropout_prob": attention_dropout_prob,
            "hidden_dropout_prob": hidden_dropout_prob,
            "layernorm_epsilon": layernorm_epsilon,
            "initializer_range": initializer_range,
            "use_normal_initialization": use_normal_initialization,
            "pre_layernorm": pre_layernorm,
            "post_layernorm": post_layernorm,
            "fp32_residual_addition": self.options.fp32_residual_addition,
            **extra,
        }
        self.attention = DistributedAttentionLayer(causal_mask_size=causal_mask_size, **attention_arguments)
        self.attention.is_inner = True
        self.has_cross_attention = add_cross_attention
        self.cross_attention: DistributedAttentionLayer | None = None
        if add_cross_attention:
            # The masks of positions are those of self-attention.
            crossed = {**attention_arguments, "window_size": None, "use_alibi": False, "rotary_dim": None}
            self.cross_attention = DistributedAttentionLayer(cross_attention=True, **crossed)
            self.cross_attention.is_inner = True
        self.output = DistributedTransformerOutputLayer(
            hidden_size,
            intermediate_size,
            hidden_dropout_prob,
            activation,
            layernorm_epsilon,
            initializer_range,
            use_normal_initialization,
            pre_layernorm and not (is_parallel and self.options.single_pre_layernorm),
            post_layernorm,
            self.options.fp32_residual_addition,
            **extra,
        )
        self.output.is_inner = True

    def _run(self, entries: Entries) -> torch.Tensor:
        hidden = entries[0]
        assert hidden is not None
        if self.options.parallel_attn_output:
            assert self.attention.pre_layernorm is not None
            source = self.attention.pre_layernorm(hidden)
            attended = self.attention.branch(source, None, *entries[1:3])
            own_layernorm = self.output.pre_layernorm
            branches = attended + self.output.branch(source if own_layernorm is None else own_layernorm(hidden))
            return add_residual(hidden, branches, self.options)
        if self.cross_attention is None:
            attended = self.attention((hidden, *entries[1:]))
        else:
            attended = self.cross_attention((self.attention((hidden, entries[2])), entries[1], entries[3]))
        result: torch.Tensor = self.output(attended)
        return result


@takes_options
class DistributedTransformer(_EntriesModule):
    """A stack of ``num_layers`` layers in ``seq_layers``, an ``nn.Sequential``.

    ``forward`` takes and gives the tuples of `DistributedTransformerLayer`. Between the layers the hidden state is in
    the layout inside: the samples of all ranks, [n, S, H/t] with ``optimize="memory"``, [n, S, H] with "speed". With
    ``pre_layernorm`` and ``post_layernorm`` the whole stack has a LayerNorm on what it gets (``input_layernorm``) and
    on what it gives (``output_layernorm``), too; the options of these names switch them by themselves. Construction is
    local; calls and backward are collective over TP_GROUP. Source: smp-api section 9.
    """

    def __init__(
        self,
        num_layers: int = 12,
        num_attention_heads: int = 32,
        attention_head_size: int = 32,
        hidden_size: int = 1024,
        intermediate_size: int = 4096,
        attention_dropout_prob: float = 0.1,
        hidden_dropout_prob: float = 0.1,
        activation: str = "gelu",
        layernorm_epsilon: float = 1e-5,
        initializer_range: float = 0.02,
        use_normal_initialization: bool = False,
        causal_mask_size: int | None = None,
        add_cross_attention: bool = False,
        pre_layernorm: bool = False,
        post_layernorm: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(options)
        who = type(self).__name__
        check_layernorms(who, pre_layernorm, post_layernorm)
        windows = self.options.window_size
        if isinstance(windows, Sequence) and len(windows) != num_layers:
            raise TensorParallelError(f"{who}: window_size has {len(windows)} entries for {num_layers} layers")
        self.has_cross_attention = add_cross_attention
        has_both = pre_layernorm and post_layernorm
        has_input, has_output = self.options.input_layernorm, self.options.output_layernorm
        norm = (hidden_size, layernorm_epsilon)
        self.input_layernorm: nn.Module | None = None
        if has_both if has_input is None else has_input:
            self.input_layernorm = DistributedLayerNorm(*norm, is_inner=True)
        arguments = (
            num_attention_heads, attention_head_size, hidden_size, intermediate_size, attention_dropout_prob,
            hidden_dropout_prob, activation, layernorm_epsilon, initializer_range, use_normal_initialization,
            causal_mask_size, add_cross_attention, pre_layernorm, post_layernorm,
        )  # fmt: skip
        layers = [
            DistributedTransformerLayer(*arguments, **self.options.for_layer(index)) for index in range(num_layers)
        ]
        for layer in layers:
            layer.is_inner = True
        self.seq_layers = nn.Sequential(*layers)
        self.output_layernorm: nn.Module | None = None
        if has_both if has_output is None else has_output:
            self.output_layernorm = DistributedLayerNorm(*norm, is_inner=True)

    def _run(self, entries: Entries) -> torch.Tensor:
        if self.input_layernorm is not None:
            entries = (self.input_layernorm(entries[0]), *entries[1:])
        hidden: torch.Tensor = self.seq_layers(entries)[0]
        return hidden if self.output_layernorm is None else self.output_layernorm(hidden)


def layer_entries(module: FamilyModule, inputs: Any, is_crossed: bool) -> Entries:
    """The tuple that a layer takes, with None for what was left out at its end."""
    entries = as_tuple(inputs)
    length = 4 if is_crossed else 2
    expected = (
        "(hidden_states, cross_states, attention_mask, cross_mask)"
        if is_crossed
        else ("(hidden_states, attention_mask)")
    )
    has_positions = not is_crossed and len(entries) == 3  # for rotary embeddings
    if not entries or entries[0] is None or (len(entries) > length and not has_positions):
        raise TensorParallelError(f"{type(module).__name__}: got {len(entries)} entries, expected one tuple {expected}")
    if is_crossed and (len(entries) < 2 or entries[1] is None):
        raise TensorParallelError(f"{type(module).__name__}: cross_states are missing, expected one tuple {expected}")
    return (*entries, *[None] * (length - len(entries)))


def enter_entries(module: FamilyModule, entries: Entries, is_crossed: bool) -> tuple[Entries, tuple[int, ...]]:
    """The entries of all ranks in the layout inside, and how many samples each rank has. Collective."""
    layout, hidden = module.layout, entries[0]
    assert hidden is not None
    num_states = 2 if is_crossed else 1
    states = list(entries[:num_states])
    num_masks = 2 if is_crossed else 1
    rest = [
        whole_mask(entry, hidden) if index < num_masks else entry for index, entry in enumerate(entries[num_states:])
    ]
    counts = layout.scaled_rows(type(module).__name__, [*states, *rest])
    entered = [None if state is None else layout.enter(state, counts) for state in states]
    gathered = [None if entry is None else layout.gather_rows(entry, counts) for entry in rest]
    return (*entered, *gathered), counts
