"""A model of sizes that nothing divides, whose weights are tied, frozen, sometimes and never used; and its steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

NUM_STEPS = 3
CAP = 2e-4  # MiB: 26 elements of float64, so that a model has many buckets


class Odd(nn.Module):
    """Sizes that nothing divides; tied, frozen, sometimes and never used weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.wide = nn.Linear(6, 10)
        self.back = nn.Linear(10, 6)
        self.narrow = nn.Linear(6, 5)
        self.frozen = nn.Linear(5, 6)
        self.sometimes = nn.Linear(6, 6)
        self.never = nn.Linear(3, 5)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(6, 13, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)

    def forward(self, tokens: Tensor, use: Tensor) -> Tensor:
        x = torch.tanh(self.back(torch.tanh(self.wide(self.embed(tokens)))))
        x = self.frozen(torch.tanh(self.narrow(x))) * self.scale
        if use.sum().item() > 0:
            x = x + self.sometimes(x)
        return self.head(x)


def make_model() -> nn.Module:
    torch.manual_seed(3)
    return Odd().double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    """`use` is off in the last microbatches, and everywhere in step 1."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 13, (24, 3), generator=generator)
    use = torch.ones(24, dtype=torch.long)
    use[14:] = 0
    if step == 1:
        use[:] = 0
    return tokens, use
