"""A small model, its batches and its step function, for the tests of the wrappers. All in float64."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import modelparallel as smp


class Classifier(nn.Module):
    """4 features in, 10 classes out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(self.second(torch.tanh(self.first(x))), 1)


def make_classifier() -> Classifier:
    torch.manual_seed(1)
    return Classifier().double()


def make_batch(num_samples: int, seed: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_samples, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 10, (num_samples,), generator=generator)


def mean_loss(model: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.nll_loss(model(x), y)


@smp.step
def train_step(model: Any, data: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    output = model(data)
    loss = F.nll_loss(output, target, reduction="mean")
    model.backward(loss)
    return output, loss
