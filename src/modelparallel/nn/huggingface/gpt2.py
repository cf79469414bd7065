"""GPT-2 of transformers: GPT2LMHeadModel and GPT2Model, or one GPT2Block (smp-api sections 10 and 18)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from modelparallel.nn.huggingface import answers, options, translation
from modelparallel.nn.huggingface.translation import NameLayout, StateDict, conv1d, linear

LAYOUT = NameLayout(
    hf_layers="h",
    smp_layers="transformer.seq_layers",
    before=(
        linear("wte", "embedding.word_embedding"),
        linear("wpe", "embedding.position_embedding"),
    ),
    layer=(
        linear("ln_1", "attention.pre_layernorm"),
        conv1d("attn.c_attn", "attention.qkv"),
        conv1d("attn.c_proj", "attention.dense"),
        linear("ln_cross_attn", "cross_attention.pre_layernorm"),
        conv1d("crossattention.q_attn", "cross_attention.query"),
        conv1d("crossattention.c_attn", "cross_attention.key_value"),
        conv1d("crossattention.c_proj", "cross_attention.dense"),
        linear("ln_2", "output.pre_layernorm"),
        conv1d("mlp.c_fc", "output.dense1"),
        conv1d("mlp.c_proj", "output.dense2"),
    ),
    after=(linear("ln_f", "transformer.output_layernorm"),),
    head=linear("lm_head", "lm_head"),
    hf_order=(
        "ln_1",
        "attn.bias",
        "attn.masked_bias",
        "attn.c_attn",
        "attn.c_proj",
        "ln_2",
        "crossattention.bias",
        "crossattention.masked_bias",
        "crossattention.c_attn",
        "crossattention.q_attn",
        "crossattention.c_proj",
        "ln_cross_attn",
        "mlp.c_fc",
        "mlp.c_proj",
    ),
    buffer_names=("attn.bias", "attn.masked_bias", "crossattention.bias", "crossattention.masked_bias"),
    buffers=functools.partial(translation.causal_masks, -1e4),
)


def translate_state_dict_to_hf_gpt2(state_dict: Mapping[str, Any], max_seq_len: int | None = None) -> StateDict:
    """The state dict of a replaced GPT-2 as transformers names it: of GPT2LMHeadModel, or of GPT2Model if there is no
    head in it.

    ``max_seq_len``: with the causal-mask buffers ``attn.bias`` and ``attn.masked_bias`` of that length, which versions
    of transformers before 4.30 keep in the state dict. Tensors are views of those given.
    """
    return translation.model_to_hf(state_dict, LAYOUT, max_seq_len)


def translate_hf_state_dict_to_smdistributed_gpt2(
    state_dict: Mapping[str, Any], max_seq_len: int | None = None
) -> StateDict:
    """The state dict of GPT2LMHeadModel or GPT2Model as the distributed module that replaces it names it.

    ``max_seq_len`` is accepted for older scripts: causal-mask buffers are left out anyway. Tensors are views of those
    given.
    """
    return translation.model_to_smp(state_dict, LAYOUT)


translate_hf_state_dict_to_smdistributed = translate_hf_state_dict_to_smdistributed_gpt2


def translate_hf_block_state_dict_to_smdistributed(
    state_dict: Mapping[str, Any], max_seq_len: int | None = None
) -> StateDict:
    """Every GPT2Block in the state dict, of a block alone or of a model around blocks, as the
    DistributedTransformerLayer that replaces it names it.
    """
    places = translation.places_found(state_dict, LAYOUT, r"attn\.c_attn\.weight", is_layer=True)
    return translation.to_smp(state_dict, places)


def translate_layer_state_dict_to_hf_gpt2_block(
    state_dict: Mapping[str, Any], max_seq_len: int | None = None
) -> StateDict:
    """The inverse: every DistributedTransformerLayer as GPT2Block names it. ``max_seq_len``: with causal-mask
    buffers.
    """
    places = translation.places_found(state_dict, LAYOUT, r"attention\.qkv\.weight", is_layer=True)
    return translation.to_hf(state_dict, places, max_seq_len)


def model_arguments(config: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The init hook of GPT2LMHeadModel: its configuration as arguments of DistributedTransformerLMHead."""
    options.check_outputs(config)
    arguments = {
        **_layer_arguments(config),
        "num_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "num_positions": config.max_position_embeddings,
        "embedding_dropout_prob": config.embd_pdrop,
        "output_layernorm": True,
        "tie_word_embeddings": bool(config.tie_word_embeddings),
    }
    return (), arguments


def _layer_arguments(config: Any) -> dict[str, Any]:
    return {
        "num_attention_heads": config.num_attention_heads,
        "attention_head_size": options.head_size(config, config.num_attention_heads),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.n_inner if config.n_inner is not None else 4 * config.hidden_size,
        "attention_dropout_prob": config.attn_pdrop,
        "hidden_dropout_prob": config.resid_pdrop,
        "activation": options.activation(config, "activation_function"),
        "layernorm_epsilon": config.layer_norm_epsilon,
        "initializer_range": config.initializer_range,
        "use_normal_initialization": True,
        "causal_mask_size": config.max_position_embeddings,
        "add_cross_attention": bool(config.add_cross_attention),
        "pre_layernorm": True,
        "post_layernorm": False,
        "attention_in_fp32": bool(config.reorder_and_upcast_attn),
        "scale_attention_scores": bool(config.scale_attn_weights),
        "scale_attn_by_layer_idx": bool(config.scale_attn_by_inverse_layer_idx),
    }


def block_arguments(config: Any, layer_idx: int | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The init hook of GPT2Block: its arguments as those of DistributedTransformerLayer."""
    return (), {**_layer_arguments(config), "layer_idx": layer_idx}


def block_call(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The forward hook of GPT2Block: hidden states and the additive attention mask (causality is the layer's own)."""
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block

    signature = answers.Signature.of(GPT2Block)
    given = signature.bind((hidden_states, *args), kwargs)
    for name in ("hidden_states", "cache_position", "position_ids", "use_cache"):
        given.pop(name, None)
    mask, states = given.pop("attention_mask", None), given.pop("encoder_hidden_states", None)
    cross_mask = given.pop("encoder_attention_mask", None)
    answers.drop_empty_cache(given)
    signature.refuse_rest(given)
    mask = answers.additive_mask(mask, hidden_states, hidden_states.shape[1])
    if states is None:
        return ((hidden_states, mask),), {}
    return ((hidden_states, states, mask, answers.additive_mask(cross_mask, hidden_states, states.shape[1])),), {}


def block_result(output: tuple[Any, ...]) -> Any:
    """The return hook of GPT2Block: transformers 4 expects a tuple, 5 the hidden states alone."""
    return output[0] if translation.transformers_version().major >= 5 else (output[0],)


def get_hf_gpt2_transformer_layer_hooks() -> tuple[Any, Any, Any]:
    """The init, forward and return hooks that map a GPT2Block to a DistributedTransformerLayer:
    ``smp.tp_register_with_module(GPT2Block, smp.nn.DistributedTransformerLayer, *hooks)``.

    Register before the model is built. Source: smp-api section 18.
    """
    return block_arguments, block_call, block_result
