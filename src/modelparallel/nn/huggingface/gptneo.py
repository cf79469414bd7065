"""GPT-Neo of transformers: GPTNeoForCausalLM and GPTNeoModel (smp-api section 10)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from modelparallel.nn.huggingface import gpt2, options, translation
from modelparallel.nn.huggingface.translation import StateDict, apart, linear

# Around the layers the names are those of GPT-2.
LAYOUT = dataclasses.replace(
    gpt2.LAYOUT,
    layer=(
        linear("ln_1", "attention.pre_layernorm"),
        apart("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj", smp="attention.qkv"),
        linear("attn.attention.out_proj", "attention.dense"),
        linear("ln_2", "output.pre_layernorm"),
        linear("mlp.c_fc", "output.dense1"),
        linear("mlp.c_proj", "output.dense2"),
    ),
    hf_order=(
        "ln_1",
        "attn.attention.bias",
        "attn.attention.masked_bias",
        "attn.attention.k_proj",
        "attn.attention.v_proj",
        "attn.attention.q_proj",
        "attn.attention.out_proj",
        "ln_2",
        "mlp.c_fc",
        "mlp.c_proj",
    ),
    buffer_names=("attn.attention.bias", "attn.attention.masked_bias"),
    buffers=None,
)


def translate_state_dict_to_hf_gptneo(
    state_dict: Mapping[str, Any],
    max_seq_len: int | None = None,
    *,
    attention_layers: Sequence[str] | None = None,
    window_size: int = 256,
) -> StateDict:
    """The state dict of a replaced GPT-Neo as transformers names it: of GPTNeoForCausalLM, or of GPTNeoModel if there
    is no head in it.

    ``max_seq_len``: with the causal-mask buffers ``attn.attention.bias`` and ``attn.attention.masked_bias`` of that
    length, which older versions of transformers keep in the state dict. They depend on the configuration's
    ``attention_layers`` (default: "global" and "local" in turn, as in all published models) and ``window_size``.
    Tensors are views of those given.
    """

    def causal_masks(index: int, length: int) -> list[tuple[str, torch.Tensor]]:
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        kind = ("global", "local")[index % 2] if attention_layers is None else attention_layers[index]
        if kind == "local":
            mask = mask ^ mask.tril(-window_size)
        return [
            ("attn.attention.bias", mask.view(1, 1, length, length)),
            ("attn.attention.masked_bias", torch.tensor(-1e9)),
        ]

    return translation.model_to_hf(state_dict, dataclasses.replace(LAYOUT, buffers=causal_masks), max_seq_len)


def translate_hf_state_dict_to_smdistributed_gptneo(
    state_dict: Mapping[str, Any], max_seq_len: int | None = None
) -> StateDict:
    """The state dict of GPTNeoForCausalLM or GPTNeoModel as the distributed module that replaces it names it.

    ``max_seq_len`` is accepted for older scripts: causal-mask buffers are left out anyway. Query, key and value are
    joined in one new tensor; the given dict then holds views of it (see the note in ``translation``).
    """
    return translation.model_to_smp(state_dict, LAYOUT)


translate_hf_gptneo_state_dict_to_smdistributed = translate_hf_state_dict_to_smdistributed_gptneo


def model_arguments(config: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The init hook of GPTNeoForCausalLM: its configuration as arguments of DistributedTransformerLMHead.

    Scores are not scaled. As for GPT-J they stay in the dtype of the model.
    """
    options.check_outputs(config)
    windows = [None if kind == "global" else config.window_size for kind in config.attention_layers]
    arguments = {
        **options.decoder_arguments(config),
        "intermediate_size": config.intermediate_size or 4 * config.hidden_size,
        "attention_dropout_prob": float(config.attention_dropout),
        "hidden_dropout_prob": float(config.resid_dropout),
        "embedding_dropout_prob": float(config.embed_dropout),
        "activation": options.activation(config, "activation_function"),
        "layernorm_epsilon": config.layer_norm_epsilon,
        "window_size": windows,
        "scale_attention_scores": False,
        "qkv_bias": False,
    }
    return (), arguments
