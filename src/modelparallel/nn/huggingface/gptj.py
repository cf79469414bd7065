"""GPT-J of transformers: GPTJForCausalLM and GPTJModel (smp-api section 10)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from modelparallel.nn.huggingface import gpt2, options, translation
from modelparallel.nn.huggingface.translation import StateDict, apart, linear

# Around the layers the names are those of GPT-2, without position embeddings.
LAYOUT = dataclasses.replace(
    gpt2.LAYOUT,
    before=(linear("wte", "embedding.word_embedding"),),
    layer=(
        linear("ln_1", "attention.pre_layernorm"),
        apart("attn.q_proj", "attn.k_proj", "attn.v_proj", smp="attention.qkv"),
        linear("attn.out_proj", "attention.dense"),
        linear("mlp.fc_in", "output.dense1"),
        linear("mlp.fc_out", "output.dense2"),
    ),
    has_head_bias=True,
    hf_order=(
        "ln_1",
        "attn.bias",
        "attn.masked_bias",
        "attn.k_proj",
        "attn.v_proj",
        "attn.q_proj",
        "attn.out_proj",
        "mlp.fc_in",
        "mlp.fc_out",
    ),
    buffer_names=("attn.bias", "attn.masked_bias"),
    buffers=functools.partial(translation.causal_masks, -1e9),
)


def translate_state_dict_to_hf_gptj(state_dict: Mapping[str, Any], max_seq_len: int | None = None) -> StateDict:
    """The state dict of a replaced GPT-J as transformers names it: of GPTJForCausalLM, or of GPTJModel if there is no
    head in it.

    ``max_seq_len``: with the causal-mask buffers ``attn.bias`` and ``attn.masked_bias`` of that length, which older
    versions of transformers keep in the state dict. Tensors are views of those given.
    """
    return translation.model_to_hf(state_dict, LAYOUT, max_seq_len)


def translate_hf_gptj_state_dict_to_smdistributed_gptj(
    state_dict: Mapping[str, Any], max_seq_len: int | None = None
) -> StateDict:
    """The state dict of GPTJForCausalLM or GPTJModel as the distributed module that replaces it names it.

    ``max_seq_len`` is accepted for older scripts: causal-mask buffers are left out anyway. Query, key and value are
    joined in one new tensor; the given dict then holds views of it (see the note in ``translation``).
    """
    return translation.model_to_smp(state_dict, LAYOUT)


translate_hf_gptj_state_dict_to_smdistributed = translate_hf_gptj_state_dict_to_smdistributed_gptj
translate_hf_state_dict_to_smdistributed_gptj = translate_hf_gptj_state_dict_to_smdistributed_gptj


def model_arguments(config: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The init hook of GPTJForCausalLM: its configuration as arguments of DistributedTransformerLMHead.

    The scores, which transformers computes in fp32, stay in the dtype of the model: the kernels of
    scaled_dot_product_attention keep them in fp32 themselves (``attention_in_fp32=True`` of the context overrides it).
    """
    options.check_outputs(config)
    head_size = options.head_size(config, config.num_attention_heads)
    arguments = {
        **options.decoder_arguments(config),
        "intermediate_size": config.n_inner if config.n_inner is not None else 4 * config.hidden_size,
        "num_positions": 0,
        "attention_dropout_prob": config.attn_pdrop,
        "hidden_dropout_prob": config.resid_pdrop,
        "embedding_dropout_prob": config.embd_pdrop,
        "activation": options.activation(config, "activation_function"),
        "layernorm_epsilon": config.layer_norm_epsilon,
        "parallel_attn_output": True,
        "rotary_dim": config.rotary_dim if config.rotary_dim is not None else head_size,
        "qkv_bias": False,
        "attention_dense_bias": False,
        "lm_head_bias": True,
    }
    return (), arguments
