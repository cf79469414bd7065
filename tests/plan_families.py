"""Tiny Hugging Face models for the tests of plans, on transformers 4.57 and 5: only public names of both."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

SIZES = {
    "vocab_size": 33,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 32,
    "use_cache": False,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 4}
# family -> (class, configuration, more of the configuration)
FAMILIES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", GROUPED | {"tie_word_embeddings": True, "attention_bias": True}),
    "llama-eager": ("LlamaForCausalLM", "LlamaConfig", GROUPED | {"attn_implementation": "eager"}),
    # Its only layer is opened by the partitioner, so that regions are units of their own.
    "llama-single": (
        "LlamaForCausalLM",
        "LlamaConfig",
        GROUPED | {"attn_implementation": "eager", "num_hidden_layers": 1},
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED | {"sliding_window": 4}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED | {"head_dim": 8}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", GROUPED | {"head_dim": 8, "tie_word_embeddings": True}),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        GROUPED | {"num_local_experts": 3, "output_router_logits": False, "experts_implementation": "eager"},
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GROUPED),
}

EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "experts_implementation": "eager",
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
HEADS = GROUPED | {"head_dim": 4}
LLAMA4 = HEADS | EXPERTS | {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 1}
# Called once, not trained. Some are in one of the two versions only, or can be split in one only.
MORE: dict[str, tuple[str, str, dict]] = {
    **{
        name: (f"{name}ForCausalLM", f"{name}Config", HEADS)
        for name in (
            "Olmo", "Olmo2", "Olmo3", "Cohere", "Cohere2", "Gemma2", "Glm", "Glm4", "Granite", "Starcoder2", "Phi",
            "SmolLM3", "Helium", "Ernie4_5", "Exaone4", "SeedOss", "Apertus", "Arcee",
        )
    },
    **{
        name: (f"{name}ForCausalLM", f"{name}Config", HEADS | EXPERTS)
        for name in (
            "Qwen3Moe", "Olmoe", "GraniteMoe", "GptOss", "MiniMax", "FlexOlmo", "Glm4Moe", "Dots1", "MiniMaxM2",
        )
    },
    "Gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", HEADS),
    "Llama4": ("Llama4ForCausalLM", "Llama4TextConfig", LLAMA4),
    "DeepseekV3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        EXPERTS | LATENT | {"head_dim": 4, "num_key_value_heads": 8},
    ),
}  # fmt: skip


def make_family(name: str) -> nn.Module:
    """The model in float64, seeded; every bias and norm weight random, so that no gradient is right by chance."""
    model_class, config_class, more = (FAMILIES | MORE)[name]
    sizes = SIZES | more
    implementations = {key: sizes.pop(key) for key in ("attn_implementation", "experts_implementation") if key in sizes}
    config = getattr(transformers, config_class)(**sizes)
    for key, value in implementations.items():
        setattr(config, f"_{key}", value)
    torch.manual_seed(7)
    model: nn.Module = getattr(transformers, model_class)(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def family_batch(step: int, num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and an attention mask with padding at the end, at least one in each row."""
    generator = torch.Generator().manual_seed(50 + step)
    ids = torch.randint(3, 33, (num_samples, 6), generator=generator)
    lengths = torch.randint(3, 6, (num_samples, 1), generator=generator)
    return ids, (torch.arange(6) < lengths).long()


def family_loss(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean over the samples, so that batches of different length can be weighted by their samples."""
    logits = model(input_ids=ids, attention_mask=mask).logits
    losses = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return losses.mean(1).mean()
