"""Models that the tests of the partitioner place: small, and each with something that is hard to place."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from modelparallel.partitioning.costs import Flow, Trace, UnitCosts

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
}


def layers(num_layers: int, width: int = 8) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(num_layers)))


def chain(costs: Sequence[tuple[int, int, float, int]], ties: tuple[Any, ...] = ()) -> Trace:
    """The trace of units u0, u1, ... that were called one after another.

    costs: for every unit (bytes of parameters, of activations, FLOPs, bytes handed to the next unit).
    """
    units = [
        UnitCosts(
            name=f"u{position}",
            num_parameters=state // 4,
            parameter_bytes=state,
            trainable_bytes=0,
            buffer_bytes=0,
            first_call=position,
            num_calls=1,
            activation_bytes=activation,
            flops=flops,
        )
        for position, (state, activation, flops, _) in enumerate(costs)
    ]
    flows = [Flow(f"u{position}", (f"u{position + 1}",), cost[3]) for position, cost in enumerate(costs[:-1])]
    return Trace(tuple(units), (), ties=ties, source="run", has_gradients=True, flows=tuple(flows))


class Attention(nn.Module):
    def __init__(self, num_heads: int = 2) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Projections() for _ in range(num_heads))
        self.proj = nn.Linear(4, 4)


class Projections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.key, self.query = nn.Linear(4, 4), nn.Linear(4, 4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))


class Decoder(nn.Module):
    """Everything at once: a table used again as head, parameters of its own, blocks, a constant."""

    def __init__(self, num_blocks: int = 3, vocabulary: int = 11) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, 4)
        self.positions = nn.Parameter(torch.zeros(5, 4))
        self.scale = nn.Parameter(torch.ones(()))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(4)
        self.unused = nn.Linear(4, 4)
        self.register_buffer("mask", torch.tril(torch.ones(5, 5)))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.table(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return F.linear(self.norm(hidden), self.table.weight) * self.scale


class Eventful(nn.Module):
    """Changes everything that a step body can change in a model."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("grown", torch.zeros(2))
        self.register_buffer("constant", torch.tensor([float("nan"), 1.0]))
        self.register_buffer("moved", torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(self.norm(self.layer(x)))
        self.count += 1
        self.replaced = self.replaced + x.detach().mean()
        self.grown.data = torch.ones(3)
        self.moved = self.moved.clone()
        self.register_buffer("late", torch.ones(1))
        return x.sum() * random.random()


def hugging_face_model(name: str) -> nn.Module:
    import transformers

    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 50}
    t5["decoder_start_token_id"] = 0
    vit = {**SMALL, "image_size": 32, "patch_size": 8}
    vit.pop("vocab_size")
    moe = {**SMALL, "num_key_value_heads": 2, "num_local_experts": 4}
    swin = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "image_size": 32, "window_size": 2}
    configurations = {
        "LlamaForCausalLM": lambda: transformers.LlamaConfig(**SMALL),
        "BertForPreTraining": lambda: transformers.BertConfig(**SMALL),
        "GPT2LMHeadModel": lambda: transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50),
        "T5ForConditionalGeneration": lambda: transformers.T5Config(**t5),
        "ViTForImageClassification": lambda: transformers.ViTConfig(**vit),
        "MixtralForCausalLM": lambda: transformers.MixtralConfig(**moe),
        "ConvNextForImageClassification": lambda: transformers.ConvNextConfig(
            num_stages=2, hidden_sizes=[8, 16], depths=[2, 2], image_size=32
        ),
        "SwinForImageClassification": lambda: transformers.SwinConfig(**swin),
    }
    return getattr(transformers, name)(configurations[name]())
