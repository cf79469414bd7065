"""Language models of transformers, as they come: decoders, encoders, encoder-decoders, mixtures of experts, state-space
models. Tiny, and without dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import VOCABULARY, Entry, tokens

TIED = "tied weights"
SHARED = "embedding shared by encoder, decoder and head"
_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_SEQ2SEQ = {
    "vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32,
    "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "pad_token_id": 1,
    "decoder_start_token_id": 2,
}  # fmt: skip
_T5 = {
    "vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
    "dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 1,
}  # fmt: skip


def make(name: str, **config: Any) -> Callable[[], nn.Module]:
    """Builds the class ``name`` of transformers from the given fields of its configuration."""

    def build() -> nn.Module:
        import transformers

        model_class = getattr(transformers, name)
        settings = model_class.config_class(**config)
        settings._experts_implementation = "eager"  # the default of transformers 5 does not know double precision
        model: nn.Module = model_class(settings)
        return model

    return build


def language_loss(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    # Not the models' own loss: it is computed in float32 whatever the model's dtype.
    logits = model(input_ids=ids, attention_mask=mask).logits
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def _hidden_loss(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return (hidden * mask.unsqueeze(-1)).pow(3).mean() + hidden[:, 0, :3].mean()


def _unmasked_loss(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def _encoder_decoder_loss(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids.roll(1, 1)).logits
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def _decoder(name: str, remarks: str = "", body: Any = language_loss, **config: Any) -> Entry:
    config = {**_SIZES, "pad_token_id": 0} | config
    return Entry(name, "decoders", make(name, **config), tokens, body, remarks)


def _own_sizes(name: str, family: str, remarks: str = "", body: Any = language_loss, **config: Any) -> Entry:
    return Entry(name, family, make(name, vocab_size=VOCABULARY, **config), tokens, body, remarks)


def _in_double(entry: Entry) -> Entry:
    return replace(entry, default_dtype=torch.float64)


def _encoder(name: str, remarks: str = "", body: Any = language_loss, **config: Any) -> Entry:
    return Entry(name, "encoders", make(name, **({**_SIZES, **_NO_DROPOUT} | config)), tokens, body, remarks)


def _seq2seq(name: str, remarks: str = "", body: Any = _encoder_decoder_loss, **config: Any) -> Entry:
    return Entry(name, "encoder-decoders", make(name, **(_SEQ2SEQ | config)), tokens, body, remarks)


def _experts(name: str, remarks: str = "", **config: Any) -> Entry:
    config = {**_SIZES, "pad_token_id": 0, "num_key_value_heads": 1} | config
    return Entry(name, "mixture of experts", make(name, **config), tokens, language_loss, remarks)


_GPT = {"n_positions": 32, "n_embd": 16, "n_layer": 3, "n_head": 2}
_GPT_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

# fmt: off
DECODERS: dict[str, Entry] = {
    "llama": _decoder("LlamaForCausalLM", num_key_value_heads=1),
    "mistral": _decoder("MistralForCausalLM", num_key_value_heads=1, sliding_window=4),
    "qwen2": _decoder("Qwen2ForCausalLM", num_key_value_heads=1),
    "qwen3": _decoder("Qwen3ForCausalLM", num_key_value_heads=1, head_dim=8),
    "gemma": _decoder("GemmaForCausalLM", TIED, num_key_value_heads=1, head_dim=8),
    "gemma2": _decoder(
        "Gemma2ForCausalLM", "tied weights, two kinds of layers", num_key_value_heads=1, head_dim=8,
        sliding_window=4, query_pre_attn_scalar=8,
    ),
    "gemma3": _decoder(
        "Gemma3ForCausalLM", "tied weights, two kinds of layers", num_key_value_heads=1, head_dim=8,
        sliding_window=4, query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"] * 2,
        num_hidden_layers=4,
    ),
    "gemma3n": _own_sizes(
        "Gemma3nForCausalLM", "decoders", "tied weights, four streams; embeddings for each layer", hidden_size=16,
        intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        vocab_size_per_layer_input=32, hidden_size_per_layer_input=4, max_position_embeddings=32, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=0, laurel_rank=4,
        altup_num_inputs=4, activation_sparsity_pattern=[0.0] * 4, pad_token_id=0,
    ),
    "gpt2_tied": _own_sizes("GPT2LMHeadModel", "decoders", TIED, **_GPT, **_GPT_NO_DROPOUT),
    "openai_gpt": _own_sizes("OpenAIGPTLMHeadModel", "decoders", TIED, **_GPT, **_GPT_NO_DROPOUT),
    "gpt_bigcode": _own_sizes("GPTBigCodeForCausalLM", "decoders", TIED, **_GPT,
                              **_GPT_NO_DROPOUT),
    "gpt_neo": _own_sizes(
        "GPTNeoForCausalLM", "decoders", TIED, hidden_size=16, num_layers=4, num_heads=2,
        intermediate_size=32, max_position_embeddings=32, window_size=4, attention_types=[[["global", "local"], 2]],
        resid_dropout=0.0, embed_dropout=0.0, attention_dropout=0.0,
    ),
    "gptj": _own_sizes("GPTJForCausalLM", "decoders", rotary_dim=4, **_GPT, **_GPT_NO_DROPOUT),
    "codegen": _own_sizes("CodeGenForCausalLM", "decoders", rotary_dim=4, **(_GPT | {"n_head": 4}), **_GPT_NO_DROPOUT),
    "gpt_neox": _decoder("GPTNeoXForCausalLM", attention_dropout=0.0, hidden_dropout=0.0),
    "opt": _decoder(
        "OPTForCausalLM", TIED, ffn_dim=32, word_embed_proj_dim=16, dropout=0.0,
        attention_dropout=0.0, pad_token_id=1,
    ),
    "phi": _decoder("PhiForCausalLM"),
    "phi3": _decoder("Phi3ForCausalLM"),
    "falcon": _decoder("FalconForCausalLM", TIED),
    "bloom": _own_sizes("BloomForCausalLM", "decoders", TIED, hidden_size=16, n_layer=3,
                        n_head=2),
    "mpt": _in_double(_own_sizes("MptForCausalLM", "decoders", TIED, d_model=16, n_layers=3, n_heads=2,
                      expansion_ratio=2, max_seq_len=32)),
    "stablelm": _decoder("StableLmForCausalLM", num_key_value_heads=1),
    "olmo2": _decoder("Olmo2ForCausalLM"),
    "cohere": _decoder("CohereForCausalLM", TIED),
    "starcoder2": _decoder("Starcoder2ForCausalLM", TIED, num_key_value_heads=1),
    "granite": _decoder("GraniteForCausalLM"),
    "biogpt": _decoder("BioGptForCausalLM", TIED, activation_dropout=0.0, **_NO_DROPOUT),
    "xglm": _in_double(_own_sizes(
        "XGLMForCausalLM", "decoders", TIED, d_model=16, num_layers=3, attention_heads=2,
        ffn_dim=32, max_position_embeddings=32, dropout=0.0, attention_dropout=0.0,
    )),
    "ctrl": _own_sizes("CTRLLMHeadModel", "decoders", TIED, n_positions=32, n_embd=16, dff=32,
                       n_layer=3, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0),
}
# fmt: on

# fmt: off
ENCODERS: dict[str, Entry] = {
    "bert_tied": _encoder("BertForMaskedLM", TIED),
    "bert_untied": _encoder("BertForMaskedLM", "`tie_word_embeddings=False`", tie_word_embeddings=False),
    "bert_dropout": Entry(
        "BertModel", "encoders", make("BertModel", **_SIZES), tokens, _hidden_loss, "with its dropout of 0.1",
        draws=True,
    ),
    "roberta": _encoder("RobertaForMaskedLM", TIED, max_position_embeddings=64),
    "distilbert": _own_sizes(
        "DistilBertForMaskedLM", "encoders", TIED, dim=16, n_layers=4, n_heads=2, hidden_dim=32,
        max_position_embeddings=32, dropout=0.0, attention_dropout=0.0,
    ),
    "albert": _encoder("AlbertForMaskedLM", "one layer, called for each of the layers; tied weights", embedding_size=8),
    "electra": _encoder("ElectraForMaskedLM", TIED, embedding_size=8),
    "deberta": _encoder(
        "DebertaForMaskedLM", TIED, relative_attention=True, pos_att_type=["c2p", "p2c"],
        max_relative_positions=8,
    ),
    "deberta_v2": _encoder(
        "DebertaV2ForMaskedLM", "tied weights; relative position embeddings that all layers read",
        relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=4, share_att_key=True,
        norm_rel_ebd="layer_norm", max_relative_positions=8,
    ),
    "mpnet": _encoder("MPNetForMaskedLM", TIED, max_position_embeddings=64),
    "xlnet": _own_sizes("XLNetLMHeadModel", "encoders", "tied weights; `use_mems_train=False` (the default)",
                        d_model=16, n_layer=3, n_head=2, d_inner=32, dropout=0.0, use_mems_eval=False),
    "convbert": _encoder("ConvBertForMaskedLM", TIED, embedding_size=16, conv_kernel_size=3, head_ratio=2),
    "fnet": _encoder("FNetForMaskedLM", "Fourier transforms; tied weights",
                     _unmasked_loss),
    "longformer": _encoder("LongformerForMaskedLM", "tied weights; windows of 4", attention_window=[4, 4, 4],
                           max_position_embeddings=64, pad_token_id=1),
    "mobilebert": _encoder("MobileBertForMaskedLM", TIED, embedding_size=8, intra_bottleneck_size=8,
                           num_feedforward_networks=2),
    "modernbert": _encoder("ModernBertForMaskedLM", "tied weights; eager or sdpa attention", pad_token_id=0,
                           global_attn_every_n_layers=2, local_attention=4, reference_compile=False,
                           attn_implementation="sdpa"),
    "roformer": _encoder("RoFormerForMaskedLM", TIED, embedding_size=16),
}
# fmt: on

# fmt: off
ENCODER_DECODERS: dict[str, Entry] = {
    "t5": Entry("T5ForConditionalGeneration", "encoder-decoders", make("T5ForConditionalGeneration", **_T5), tokens,
                _encoder_decoder_loss, SHARED),
    "mt5": Entry("MT5ForConditionalGeneration", "encoder-decoders", make("MT5ForConditionalGeneration", **_T5), tokens,
                 _encoder_decoder_loss, "embedding shared by encoder and decoder"),
    "longt5": Entry("LongT5ForConditionalGeneration", "encoder-decoders",
                    make("LongT5ForConditionalGeneration", **_T5, local_radius=3, global_block_size=2,
                         encoder_attention_type="transient-global"), tokens,
                    _encoder_decoder_loss, SHARED),
    "bart": _seq2seq("BartForConditionalGeneration", SHARED),
    "mbart": _seq2seq("MBartForConditionalGeneration", SHARED),
    "marian": _seq2seq("MarianMTModel", SHARED),
    "pegasus": _seq2seq(
        "PegasusForConditionalGeneration", SHARED
    ),
    "blenderbot": _seq2seq(
        "BlenderbotForConditionalGeneration", SHARED
    ),
    "m2m100": _seq2seq("M2M100ForConditionalGeneration", SHARED,
                       encoder_layerdrop=0.0, decoder_layerdrop=0.0),
    "prophetnet": _in_double(_own_sizes(
        "ProphetNetForConditionalGeneration", "encoder-decoders", f"predicts two tokens ahead; {SHARED}",
        _encoder_decoder_loss, hidden_size=16, encoder_ffn_dim=32, decoder_ffn_dim=32, num_encoder_layers=2,
        num_decoder_layers=2, num_encoder_attention_heads=2, num_decoder_attention_heads=2, max_position_embeddings=32,
        dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
    )),
    "led": _in_double(_seq2seq("LEDForConditionalGeneration", SHARED,
                    attention_window=4, max_encoder_position_embeddings=32, max_decoder_position_embeddings=32)),
}
# fmt: on

# fmt: off
EXPERTS: dict[str, Entry] = {
    "mixtral": _experts("MixtralForCausalLM", num_local_experts=3, num_experts_per_tok=2, intermediate_size=16),
    "qwen2_moe": _experts("Qwen2MoeForCausalLM", num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16,
                          shared_expert_intermediate_size=16),
    "qwen3_moe": _experts("Qwen3MoeForCausalLM", num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16,
                          head_dim=8),
    "olmoe": _experts("OlmoeForCausalLM", num_experts=3, num_experts_per_tok=2),
    "phimoe": _experts("PhimoeForCausalLM", num_local_experts=3, num_experts_per_tok=2, router_jitter_noise=0.0,
                       input_jitter_noise=0.0),
    "granitemoe": _experts("GraniteMoeForCausalLM", num_local_experts=3, num_experts_per_tok=2),
    "deepseek_v2": _experts(
        "DeepseekV2ForCausalLM", num_key_value_heads=2, n_routed_experts=4, n_group=2, topk_group=1,
        num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=16, first_k_dense_replace=1, kv_lora_rank=8,
        q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    ),
    "llama4": _own_sizes(
        "Llama4ForCausalLM", "mixture of experts", hidden_size=16, intermediate_size=16, intermediate_size_mlp=32,
        num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_local_experts=2,
        max_position_embeddings=32, attention_chunk_size=4, pad_token_id=0,
    ),
    "dbrx": _own_sizes(
        "DbrxForCausalLM", "mixture of experts", d_model=16, n_heads=2, n_layers=3, max_seq_len=32,
        attn_config={"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 3, "moe_top_k": 2},
    ),
    "gpt_oss": _experts("GptOssForCausalLM", num_local_experts=3, num_experts_per_tok=2, head_dim=8, sliding_window=4,
                        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                        rope_scaling=None),
    "switch": Entry(
        "SwitchTransformersForConditionalGeneration", "mixture of experts",
        make("SwitchTransformersForConditionalGeneration", **_T5, num_experts=2, num_sparse_encoder_layers=1,
             num_sparse_decoder_layers=1, router_jitter_noise=0.0, expert_capacity=64),
        tokens, _encoder_decoder_loss, SHARED,
    ),
}
# fmt: on

_STATE = {"hidden_size": 16, "num_hidden_layers": 3, "state_size": 4}

# fmt: off
STATE_SPACE: dict[str, Entry] = {
    "mamba": _own_sizes("MambaForCausalLM", "state-space models", TIED, _unmasked_loss, **_STATE,
                        time_step_rank=2),
    "mamba2": _own_sizes("Mamba2ForCausalLM", "state-space models", body=_unmasked_loss, **_STATE, head_dim=8,
                         num_heads=4, n_groups=1, chunk_size=4),
    "falcon_mamba": _own_sizes("FalconMambaForCausalLM", "state-space models", body=_unmasked_loss, **_STATE,
                               time_step_rank=2),
    "rwkv": _own_sizes("RwkvForCausalLM", "state-space models", body=_unmasked_loss, hidden_size=16,
                       num_hidden_layers=3, context_length=32, attention_hidden_size=16, intermediate_size=32),
    "bamba": _decoder(
        "BambaForCausalLM", "attention and Mamba layers", num_key_value_heads=1, attn_layer_indices=[1],
        mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=4, mamba_chunk_size=4,
    ),
    "lfm2": _decoder("Lfm2ForCausalLM", "convolution and attention layers; tied weights", num_key_value_heads=1,
                     layer_types=["conv", "full_attention", "conv"]),
    "jamba": _decoder(
        "JambaForCausalLM", "attention, Mamba and expert layers", num_key_value_heads=1,
        num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        num_experts=2, num_experts_per_tok=1, use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=2,
    ),
}
# fmt: on
