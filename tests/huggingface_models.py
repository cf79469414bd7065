"""Small models of transformers, one for each family and what is special about it, with batches and a loss.

transformers computes some things in float32 whatever the dtype of the model; `in_float64` undoes that, so that
distributed models can be compared with it to the last digits.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.bert.configuration_bert import BertConfig
from transformers.models.bert.modeling_bert import BertForMaskedLM, BertLMHeadModel, BertModel
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2ForSequenceClassification, GPT2LMHeadModel, GPT2Model
from transformers.models.gpt_neo.configuration_gpt_neo import GPTNeoConfig
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoForCausalLM, GPTNeoModel
from transformers.models.gpt_neox.configuration_gpt_neox import GPTNeoXConfig
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXForCausalLM, GPTNeoXModel
from transformers.models.gptj.configuration_gptj import GPTJConfig
from transformers.models.gptj.modeling_gptj import GPTJForCausalLM, GPTJModel
from transformers.models.roberta.configuration_roberta import RobertaConfig
from transformers.models.roberta.modeling_roberta import RobertaForSequenceClassification

import modelparallel as smp

F64 = torch.float64
VOCAB, LENGTH, WIDTH, HEADS, LAYERS = 13, 6, 16, 4, 2
_TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "use_cache": False}


def gpt2_config(**more: Any) -> GPT2Config:
    sizes = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 8}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(**{**sizes, **dropout, **_TOKENS, **more})


def gptj_config(**more: Any) -> GPTJConfig:
    sizes = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 8}
    return GPTJConfig(**{**sizes, "rotary_dim": 2, **_TOKENS, **more})


def gptneo_config(**more: Any) -> GPTNeoConfig:
    sizes = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_layers": LAYERS, "num_heads": HEADS}
    kinds = {"attention_types": [[["global", "local"], LAYERS // 2]], "window_size": 3, "max_position_embeddings": 8}
    return GPTNeoConfig(**{**sizes, **kinds, **_TOKENS, **more})


def gptneox_config(**more: Any) -> GPTNeoXConfig:
    sizes = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    kinds = {"intermediate_size": 24, "max_position_embeddings": 8, "rotary_pct": 0.5}
    dropout = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
    return GPTNeoXConfig(**{**sizes, **kinds, **dropout, **_TOKENS, **more})


def bert_config(cls: type = BertConfig, **more: Any) -> Any:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": 24,
        "max_position_embeddings": 10,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return cls(**{**sizes, **_TOKENS, **more})


def token_loss(logits: torch.Tensor, labels: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """transformers' causal loss, without its conversion to float32."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def masked_ids(num_samples: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, and a mask that is 0 at the end of every second sample."""
    ids = torch.randint(2, VOCAB, (num_samples, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1::2, -2:] = 0
    return ids, mask


def language_batches(num_samples: int) -> list[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    batches: list[tuple[torch.Tensor, ...]] = []
    for _ in range(3):
        ids, mask = masked_ids(num_samples, generator)
        batches.append((ids, mask, ids.masked_fill(mask == 0, -100)))
    return batches


def class_batches(num_samples: int) -> list[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(2)
    return [(*masked_ids(num_samples, generator), torch.arange(num_samples) % 2) for _ in range(3)]


def crossed_batches(num_samples: int) -> list[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(3)
    states = [torch.randn(num_samples, 4, WIDTH, dtype=F64, generator=generator) for _ in range(3)]
    seen = torch.ones(num_samples, 4, dtype=torch.int64)
    seen[::3, -1] = 0
    return [(*batch, state, seen) for batch, state in zip(language_batches(num_samples), states, strict=True)]


def loss_of(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, attention_mask=mask, labels=labels)["loss"]


def crossed_loss(model: nn.Module, ids: Any, mask: Any, labels: Any, states: Any, seen: Any) -> torch.Tensor:
    return model(
        input_ids=ids,
        attention_mask=mask,
        labels=labels,
        encoder_hidden_states=states,
        encoder_attention_mask=seen,
    )["loss"]


@dataclass(frozen=True)
class Kind:
    """A model with its batches. ``replaced``: the names of the modules that tensor parallelism replaces."""

    model_class: Any
    config: Callable[[], Any]
    replaced: tuple[str, ...]
    batches: Callable[[int], list[tuple[torch.Tensor, ...]]] = language_batches
    loss: Callable[..., torch.Tensor] = loss_of
    options: dict[str, Any] = field(default_factory=dict)

    def make(self) -> nn.Module:
        torch.manual_seed(5)
        model = self.model_class(self.config())
        with torch.no_grad():  # biases and LayerNorms begin at values that hide mistakes
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                else:
                    parameter.mul_(4.0)
        if hasattr(model, "lm_head") or hasattr(model, "embed_out") or self.model_class is BertLMHeadModel:
            model.loss_function = token_loss
        return model.double()


KINDS: dict[str, Kind] = {
    "gpt2": Kind(GPT2LMHeadModel, gpt2_config, ("",)),
    "gpt2-options": Kind(
        GPT2LMHeadModel,
        lambda: gpt2_config(
            activation_function="relu",
            n_inner=24,
            scale_attn_weights=False,
            scale_attn_by_inverse_layer_idx=True,
            tie_word_embeddings=False,
            layer_norm_epsilon=1e-3,
            attn_implementation="eager",  # the other one ignores how scores are scaled
        ),
        ("",),
    ),
    "gpt2-crossed": Kind(
        GPT2LMHeadModel, lambda: gpt2_config(add_cross_attention=True), ("",), crossed_batches, crossed_loss
    ),
    "gpt2-classes": Kind(GPT2ForSequenceClassification, gpt2_config, ("transformer",), class_batches),
    "gptj": Kind(GPTJForCausalLM, lambda: gptj_config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), ("",)),
    "gptneo": Kind(GPTNeoForCausalLM, gptneo_config, ("",)),
    "gptneox": Kind(GPTNeoXForCausalLM, gptneox_config, ("",)),
    "gptneox-options": Kind(
        GPTNeoXForCausalLM,
        lambda: gptneox_config(
            use_parallel_residual=False, tie_word_embeddings=True, rotary_pct=1.0, rotary_emb_base=100.0
        ),
        ("",),
    ),
    "bert": Kind(BertForMaskedLM, bert_config, ("bert.encoder",)),
    "bert-crossed": Kind(
        BertLMHeadModel,
        lambda: bert_config(
            is_decoder=True, add_cross_attention=True, hidden_act="gelu_new", attn_implementation="eager"
        ),
        ("bert.encoder",),
        crossed_batches,
        crossed_loss,
    ),
    "roberta": Kind(
        RobertaForSequenceClassification, lambda: bert_config(RobertaConfig), ("roberta.encoder",), class_batches
    ),
}
BODIES = (
    (GPT2Model, gpt2_config),
    (GPTJModel, gptj_config),
    (GPTNeoModel, gptneo_config),
    (GPTNeoXModel, gptneox_config),
    (BertModel, bert_config),
)


class _Torch:
    """``torch``, but for float32, which is float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """GPT-J and GPT-Neo convert queries, keys and logits to float32; here to float64."""
    with contextlib.ExitStack() as stack:
        for family in ("gptj", "gpt_neo"):
            module = sys.modules[f"transformers.models.{family}.modeling_{family}"]
            stack.enter_context(mock.patch.object(module, "torch", _Torch()))
        yield


def settings(tp: int, pp: int = 1, **more: Any) -> dict[str, Any]:
    degrees = {"tensor_parallel_degree": tp, "pipeline_parallel_degree": pp}
    return {**degrees, "ddp": True, "_match_weights": True, "microbatches": 2 if pp > 1 else 1, **more}


def folded(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict of the library as transformers' classes have it."""
    for to_transformers, _ in smp.state.module_manager.translate_functions:
        state = to_transformers(state)
    return state
