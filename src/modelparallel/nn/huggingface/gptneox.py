"""GPT-NeoX of transformers: GPTNeoXForCausalLM and GPTNeoXModel; no function of the original is documented for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from packaging.version import Version

from modelparallel.nn.huggingface import options, translation
from modelparallel.nn.huggingface.translation import NameLayout, StateDict, linear

LAYOUT = NameLayout(
    hf_body="gpt_neox",
    hf_layers="layers",
    smp_layers="transformer.seq_layers",
    before=(linear("embed_in", "embedding.word_embedding"),),
    layer=(
        linear("input_layernorm", "attention.pre_layernorm"),
        linear("attention.query_key_value", "attention.qkv"),
        linear("attention.dense", "attention.dense"),
        linear("post_attention_layernorm", "output.pre_layernorm"),
        linear("mlp.dense_h_to_4h", "output.dense1"),
        linear("mlp.dense_4h_to_h", "output.dense2"),
    ),
    after=(linear("final_layer_norm", "transformer.output_layernorm"),),
    head=linear("lm_head", "lm_head"),
    former_head=linear("embed_out", "lm_head"),
    renamed_in=Version("5.14.dev0"),
    hf_order=(
        "input_layernorm",
        "post_attention_layernorm",
        "attention.bias",
        "attention.masked_bias",
        "attention.rotary_emb.inv_freq",
        "attention.query_key_value",
        "attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    ),
    buffer_names=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
)


def translate_state_dict_to_hf_gptneox(state_dict: Mapping[str, Any], max_seq_len: int | None = None) -> StateDict:
    """The state dict of a replaced GPT-NeoX as transformers names it: of GPTNeoXForCausalLM, or of GPTNeoXModel if
    there is no head in it.

    ``max_seq_len`` has no effect: versions that are supported keep no causal masks. Tensors are those given.
    """
    return translation.model_to_hf(state_dict, LAYOUT, max_seq_len)


def translate_hf_state_dict_to_smdistributed_gptneox(
    state_dict: Mapping[str, Any], max_seq_len: int | None = None
) -> StateDict:
    """The state dict of GPTNeoXForCausalLM or GPTNeoXModel as the distributed module that replaces it names it.

    ``max_seq_len`` is accepted as in the other families: causal-mask buffers are left out anyway.
    """
    return translation.model_to_smp(state_dict, LAYOUT)


translate_hf_gptneox_state_dict_to_smdistributed = translate_hf_state_dict_to_smdistributed_gptneox


def model_arguments(config: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The init hook of GPTNeoXForCausalLM: its configuration as arguments of DistributedTransformerLMHead."""
    options.check_outputs(config)
    head_size = options.head_size(config, config.num_attention_heads)
    fraction, base = _rotary(config)
    arguments = {
        **options.decoder_arguments(config),
        "intermediate_size": config.intermediate_size,
        "num_positions": 0,
        "attention_dropout_prob": float(config.attention_dropout),
        "hidden_dropout_prob": float(config.hidden_dropout),
        "embedding_dropout_prob": float(config.hidden_dropout),
        "activation": options.activation(config, "hidden_act"),
        "layernorm_epsilon": config.layer_norm_eps,
        "parallel_attn_output": bool(config.use_parallel_residual),
        "single_pre_layernorm": False,
        "rotary_dim": int(head_size * fraction),
        "rotary_interleaved": False,
        "rotary_base": base,
        "qkv_by_head": True,
        "qkv_bias": bool(config.attention_bias),
        "attention_dense_bias": bool(config.attention_bias),
    }
    return (), arguments


def _rotary(config: Any) -> tuple[float, float]:
    """The fraction of each head that is rotated, and the base of the frequencies."""
    settings = getattr(config, "rope_parameters", None)  # transformers 5
    if settings is None:
        if config.rope_scaling is not None:
            options.refuse(config, "rope_scaling", "frequencies are those of the paper")
        return config.rotary_pct, config.rotary_emb_base
    if settings.get("rope_type", "default") != "default":
        options.refuse(config, "rope_parameters", "frequencies are those of the paper")
    return settings["partial_rotary_factor"], settings["rope_theta"]
