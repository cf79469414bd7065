"""A small classifier of token sequences, with layers that can be split, and its batches."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

import modelparallel as smp

Model = TypeVar("Model", bound=nn.Module)


class Pooled(nn.Module):
    """Odd sizes; an embedding that may be larger than all the rest."""

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_rows, 6)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)
        self.norm = nn.LayerNorm(6)
        self.last = nn.Linear(6, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens).mean(1)
        return self.last(self.norm(x + self.second(torch.tanh(self.first(x)))))


def split_pair(net: Model) -> Model:
    """Its layers ``first`` and ``second`` are split where there are tensor-parallel ranks."""
    if smp.tp_size() > 1:
        for name in ("first", "second"):
            smp.set_tensor_parallelism(net.get_submodule(name))
    return net


def make_pooled(num_rows: int) -> Pooled:
    torch.manual_seed(8)
    return split_pair(Pooled(num_rows).double())


def pooled_batch(num_rows: int, step: int) -> tuple[Tensor, Tensor]:
    """Of all copies together."""
    generator = torch.Generator().manual_seed(step)
    shape = (4 * smp.dp_size(), 3)
    return torch.randint(0, num_rows, shape, generator=generator), torch.randint(0, 5, shape[:1], generator=generator)
