"""A small language model with tied weights, its loss and its batches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 16
VOCABULARY = 24


class Tied(nn.Module):
    """An embedding, three blocks, and a head that shares the embedding's weight; the last block shares the first one's
    bias.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.blocks[2][0].bias = self.blocks[0][0].bias

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def make_tied() -> nn.Module:
    torch.manual_seed(3)
    return Tied().double().train()


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten())


def batches(num: int, size: int = 8) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.randint(VOCABULARY, (size, 6), generator=generator),) for _ in range(num)]
