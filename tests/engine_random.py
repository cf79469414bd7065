"""Random numbers under a pipeline: the same losses, gradients and weights on any number of stages, and the same random
stream outside the step.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine_models import WIDTH, Stack, sequences, square, vectors
from engine_runs import Case


def tokens(step: int) -> tuple[Tensor, ...]:
    return (torch.randint(0, 32, (4, 6), generator=torch.Generator().manual_seed(step)),)


class DropoutLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5, inplace=True),
            nn.Linear(WIDTH, WIDTH), nn.AlphaDropout(0.2), nn.Linear(WIDTH, WIDTH), nn.RReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class DropoutRates(nn.Module):
    """One operation with other rates, also those with which it draws nothing and gives back its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for layer, rate in zip(self.layers, (0.3, 0.0, 0.6, 0.0, 1.0), strict=True):
            x = x + F.dropout(layer(x), rate)
        return x


class Unit(nn.Module):
    """Draws inside a placed module."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x @ self.weight, 0.4, self.training)
        return x + torch.randn_like(x) * torch.rand(()).double()


class Units(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.units = nn.ModuleList(Unit() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for unit in (*self.units, self.units[0]):
            x = unit(x)
        return x


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.2 if self.training else 0.0)
        return self.out(y.transpose(1, 2).flatten(2))


def plain_noise(x: Tensor) -> Tensor:
    return x * (1 + 0.1 * torch.rand(WIDTH, dtype=x.dtype)) + torch.randn(x.shape, dtype=x.dtype) * 0.1


def stage_noise(x: Tensor) -> Tensor:
    kept = torch.bernoulli(torch.full_like(x, 0.7))
    return x * kept + torch.rand_like(x) * 0.1 + torch.randn_like(x).uniform_(-0.1, 0.1)


def python_noise(x: Tensor) -> Tensor:
    return x * random.uniform(0.5, 1.5) if random.random() > 0.3 else x.flip(0)


def permuted(x: Tensor) -> Tensor:
    return x[torch.randperm(x.shape[0])] + torch.normal(0.0, 0.1, (WIDTH,)).double() + torch.randint(0, 2, (1,))


def own_generator(x: Tensor) -> Tensor:
    return x + torch.rand(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)


def in_place_noise(x: Tensor) -> Tensor:
    mask = torch.empty(x.shape, dtype=x.dtype).bernoulli_(0.8)
    return x * mask.div_(0.8) + x.detach().clone().normal_() * 0.01


def gumbel(x: Tensor) -> Tensor:
    return x + F.gumbel_softmax(x, tau=0.5, dim=-1) + torch.distributions.Normal(x, 0.1).rsample() * 0.1


def reseeded(x: Tensor) -> Tensor:
    torch.manual_seed(5)
    return x + torch.rand(WIDTH, dtype=x.dtype)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.2, batch_first=True)
    return nn.TransformerEncoder(layer, 3)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=32,
            hidden_size=WIDTH,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=8,
        )
    )


CASES = {
    "dropout_layers": Case(DropoutLayers, vectors, square, num_steps=3),
    "dropout_functions": Case(lambda: Stack(lambda x: F.dropout(x, 0.4)), vectors, square),
    "dropout_rates": Case(DropoutRates, vectors, square),
    "dropout2d": Case(lambda: Stack(lambda x: F.dropout2d(x.unsqueeze(0), 0.4).squeeze(0)), sequences, square),
    "units": Case(Units, vectors, square, num_steps=3),
    "attention": Case(Attention, sequences, square),
    "plain_noise": Case(lambda: Stack(plain_noise), vectors, square),
    "stage_noise": Case(lambda: Stack(stage_noise), vectors, square),
    "python_noise": Case(lambda: Stack(python_noise, 6), vectors, square, num_steps=4),
    "permuted": Case(lambda: Stack(permuted), vectors, square),
    "own_generator": Case(lambda: Stack(own_generator), vectors, square),
    "in_place_noise": Case(lambda: Stack(in_place_noise), vectors, square),
    "gumbel": Case(lambda: Stack(gumbel), vectors, square),
    "reseeded": Case(lambda: Stack(reseeded), vectors, square),
    "encoder": Case(encoder, sequences, square),
    "bert": Case(bert, tokens, lambda model, x: model(input_ids=x).logits.square().mean()),
}
