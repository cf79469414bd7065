"""BERT of transformers: BertEncoder; embeddings, pooler and heads stay what they are (smp-api section 10)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelparallel.nn.huggingface import options, translation
from modelparallel.nn.huggingface.translation import NameLayout, StateDict, apart, linear

# RobertaEncoder has the same names.
LAYOUT = NameLayout(
    hf_layers="layer",
    smp_layers="seq_layers",
    layer=(
        apart("attention.self.query", "attention.self.key", "attention.self.value", smp="attention.qkv"),
        linear("attention.output.dense", "attention.dense"),
        linear("attention.output.LayerNorm", "attention.post_layernorm"),
        linear("crossattention.self.query", "cross_attention.query"),
        apart("crossattention.self.key", "crossattention.self.value", smp="cross_attention.key_value"),
        linear("crossattention.output.dense", "cross_attention.dense"),
        linear("crossattention.output.LayerNorm", "cross_attention.post_layernorm"),
        linear("intermediate.dense", "output.dense1"),
        linear("output.dense", "output.dense2"),
        linear("output.LayerNorm", "output.post_layernorm"),
    ),
    hf_order=(
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "attention.output.LayerNorm",
        "crossattention.self.query",
        "crossattention.self.key",
        "crossattention.self.value",
        "crossattention.output.dense",
        "crossattention.output.LayerNorm",
        "intermediate.dense",
        "output.dense",
        "output.LayerNorm",
    ),
)


def encoders_to_hf(state_dict: Mapping[str, Any]) -> StateDict:
    """Every replaced encoder in the state dict, wherever it lies, as transformers names it."""
    places = translation.places_found(state_dict, LAYOUT, r"seq_layers\.\d+\.attention\.qkv\.weight")
    return translation.to_hf(state_dict, places)


def encoders_to_smp(state_dict: Mapping[str, Any]) -> StateDict:
    """Every encoder in the state dict, wherever it lies, as the DistributedTransformer that replaces it names it."""
    places = translation.places_found(state_dict, LAYOUT, r"layer\.\d+\.attention\.self\.query\.weight")
    return translation.to_smp(state_dict, places)


def translate_state_dict_to_hf_bert(state_dict: Mapping[str, Any], max_seq_len: int | None = None) -> StateDict:
    """The state dict of a model with a replaced BertEncoder as transformers names it.

    ``max_seq_len`` has no effect: BERT keeps no causal masks. Tensors are views of those given.
    """
    return encoders_to_hf(state_dict)


def translate_hf_state_dict_to_smdistributed_bert(
    state_dict: Mapping[str, Any], max_seq_len: int | None = None
) -> StateDict:
    """The state dict of a BERT model as the model with a replaced BertEncoder names it.

    Query, key and value are joined in one new tensor; the given dict then holds views of it (see the note in
    ``translation``).
    """
    return encoders_to_smp(state_dict)


def encoder_arguments(config: Any, layer_idx: int | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The init hook of BertEncoder and RobertaEncoder: the configuration as arguments of DistributedTransformer."""
    options.check_outputs(config)
    kind = getattr(config, "position_embedding_type", None) or "absolute"
    if kind != "absolute":
        options.refuse(config, "position_embedding_type", "position embeddings inside the layers are not")
    arguments = {
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "attention_head_size": options.head_size(config, config.num_attention_heads),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "attention_dropout_prob": config.attention_probs_dropout_prob,
        "hidden_dropout_prob": config.hidden_dropout_prob,
        "activation": options.activation(config, "hidden_act"),
        "layernorm_epsilon": config.layer_norm_eps,
        "initializer_range": config.initializer_range,
        "use_normal_initialization": True,
        # transformers leaves a mask out that is only causal, and then relies on the layer to be so.
        "causal_mask_size": config.max_position_embeddings if config.is_decoder else None,
        "add_cross_attention": bool(config.is_decoder and config.add_cross_attention),
        "pre_layernorm": False,
        "post_layernorm": True,
    }
    return (), arguments
