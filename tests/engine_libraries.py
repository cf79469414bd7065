"""Models of torchvision and transformers in a pipeline."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine_models import WIDTH, square
from engine_runs import Case


def resnet() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(num_classes=4)


def llama(*, is_checkpointed: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        use_cache=False, attention_dropout=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if is_checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=32, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        use_cache=False, hidden_dropout=0.1,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config)


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=32, d_model=WIDTH, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16,
        encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=16, use_cache=False,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


def pictures(step: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(step)
    return (torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64),)


def tokens(step: int) -> tuple[Tensor, ...]:
    return (torch.randint(2, 32, (4, 6), generator=torch.Generator().manual_seed(step)),)


def language(model: Any, x: Tensor) -> Any:
    output = model(input_ids=x, attention_mask=torch.ones_like(x), labels=x)
    # The model's own loss is in single precision.
    return F.cross_entropy(output.logits.flatten(0, 1), x.flatten()), f"{output.loss.item():.3f}", output.logits.shape


CASES = {
    "resnet18": Case(resnet, pictures, square),
    "llama": Case(lambda: llama(is_checkpointed=False), tokens, language),
    "llama_checkpointed": Case(lambda: llama(is_checkpointed=True), tokens, language),
    "neox": Case(neox, tokens, language),
    "bart": Case(bart, tokens, language),
}
