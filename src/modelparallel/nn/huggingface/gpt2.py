"""GPT-2 of transformers: GPT2LMHeadModel and GPT2Model, or one GPT2Block (smp-api sections 10 and 18)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from modelparallel.nn.huggingface import translation
from modelparallel.nn.huggingface.translation import Layout, Place, StateDict, conv1d, fused_conv1d, linear


def _causal_masks(index: int, max_seq_len: int) -> list[tuple[str, torch.Tensor]]:
    mask = torch.ones(max_seq_len, max_seq_len, dtype=torch.bool).tril().view(1, 1, max_seq_len, max_seq_len)
    return [("attn.bias", mask), ("attn.masked_bias", torch.tensor(-1e4))]


LAYOUT = Layout(
    hf_layers="h",
    smp_layers="transformer.seq_layers",
    before=(
        linear("wte", "embedding.word_embedding"),
        linear("wpe", "embedding.position_embedding"),
    ),
    layer=(
        linear("ln_1", "attention.pre_layernorm"),
        fused_conv1d("attn.c_attn", "attention.qkv", 3),
        conv1d("attn.c_proj", "attention.dense"),
        linear("ln_cross_attn", "cross_attention.pre_layernorm"),
        conv1d("crossattention.q_attn", "cross_attention.query"),
        fused_conv1d("crossattention.c_attn", "cross_attention.key_value", 2),
        conv1d("crossattention.c_proj", "cross_attention.dense"),
        linear("ln_2", "output.pre_layernorm"),
        conv1d("mlp.c_fc", "output.dense1"),
        conv1d("mlp.c_proj", "output.dense2"),
    ),
    after=(linear("ln_f", "transformer.output_layernorm"),),
    head=linear("lm_head", "lm_head"),
    tied=("lm_head.weight", "transformer.wte.weight"),
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
    buffers=_causal_masks,
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
