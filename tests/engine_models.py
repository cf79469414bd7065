"""Models, batches and a loss that programs for pipelines are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 8


def vectors(step: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(step)
    return (torch.randn(4, WIDTH, generator=generator, dtype=torch.float64),)


def sequences(step: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(step)
    return (torch.randn(4, 5, WIDTH, generator=generator, dtype=torch.float64),)


class Stack(nn.Module):
    """Three linear layers with ``between`` after each."""

    def __init__(self, between: Callable[..., Tensor], num_layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(num_layers))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.between(torch.tanh(layer(x)))
        return x


def square(model: Any, *batch: Any) -> Tensor:
    return model(*batch).square().mean()


class Held(nn.Module):
    """Four linear layers; ``run(self, x)`` is its forward."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def held(run: Callable[..., Any]) -> Callable[[], nn.Module]:
    return lambda: Held(run)


class Returns(nn.Module):
    """A placed module that returns ``make(y)``, y = its linear layer's output."""

    def __init__(self, make: Callable[..., Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.4)
        self.make = make

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.make(x @ self.weight, *args, **kwargs)


def between(make: Callable[..., Any], use: Callable[..., Tensor]) -> Callable[[], nn.Module]:
    """A model of four stages' worth of modules where the second returns ``make(y)``, read by ``use(returned, y)``."""

    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(WIDTH, WIDTH)
            self.second = Returns(make)
            self.third = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.third(use(self.second(x), x)) + x

    return Between
