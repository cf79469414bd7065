"""torch.autograd.grad inside a step: penalties on gradients, adaptive weights, on one stage and across stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine_models import WIDTH, vectors
from engine_runs import Case, compare, outcomes


class Critic(nn.Module):
    """Glue before, between and after its layers; a value of the beginning is used at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.gain = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(len(x), -1)
        h = torch.tanh(self.first(x))
        h = h * self.gain + F.softplus(self.second(h))
        return self.last(h + 0.1 * x.pow(3))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.style = nn.Linear(WIDTH, WIDTH)
        self.maker = nn.Sequential(nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2))
        self.critic = Critic()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        style = self.style(x)
        return style, self.maker(style)


def squared(gradient: Tensor) -> Tensor:
    return (gradient.flatten(1).norm(2, dim=1) - 1).pow(2).mean()


def interpolated(model: Any, x: Tensor) -> Tensor:
    _, fake = model(x)
    between = (0.3 * x + 0.7 * fake.detach()).requires_grad_(True)
    critic = model.module.critic
    score = critic(between)
    (gradient,) = torch.autograd.grad(
        outputs=score, inputs=between, grad_outputs=torch.ones_like(score), create_graph=True, retain_graph=True
    )
    return critic(fake).mean() - critic(x).mean() + 10 * squared(gradient)


def on_real_data(model: Any, x: Tensor) -> Tensor:
    """The input is no value of the pipeline."""
    critic = model.module.critic
    real = x.clone().requires_grad_()
    score = critic(real)
    (gradient,) = torch.autograd.grad(score.sum(), real, create_graph=True)
    return F.softplus(-score).mean() + gradient.pow(2).sum(1).mean()


def on_styles(model: Any, x: Tensor) -> Tensor:
    """A value in the middle, which is used in two ways; the output is used, too."""
    style, fake = model(x)
    (gradient,) = torch.autograd.grad((fake * 0.3 + style).sin().sum(), [style], create_graph=True)
    return squared(gradient) + model.module.critic(fake).mean() + style.pow(2).mean()


def not_detached(model: Any, x: Tensor) -> Tensor:
    """The penalty trains the maker, too; what came before the input gets its gradient by it alone."""
    _, fake = model(x)
    between = 0.5 * (x + fake)
    (gradient,) = torch.autograd.grad(model.module.critic(between).pow(2).sum(), between, create_graph=True)
    return squared(gradient)


def adaptive(model: Any, x: Tensor) -> Tensor:
    """Weights of losses from gradients with respect to a parameter."""
    weight = model.module.maker[1].weight
    _, fake = model(x)
    first, second = (fake - x).pow(2).mean(), -model.module.critic(fake).mean()
    (one,) = torch.autograd.grad(first, weight, retain_graph=True)
    (other,) = torch.autograd.grad(second, weight, retain_graph=True)
    return first + (one.norm() / (other.norm() + 1e-4)).clamp(0, 100).detach() * second


def unused(model: Any, x: Tensor) -> Tensor:
    style, fake = model(x)
    found = torch.autograd.grad(style.sum(), (style, fake), allow_unused=True)
    assert found[1] is None
    filled = torch.autograd.grad(fake.sum(), (fake, model.module.critic.gain), materialize_grads=True)
    try:
        torch.autograd.grad(style.sum(), fake, retain_graph=True)
    except RuntimeError as error:
        assert "not have been used" in str(error)
    else:
        raise AssertionError("torch raises")
    _, again = model(x)
    return again.sum() + found[0].sum() + filled[1].sum()


def second_derivative(model: Any, x: Tensor) -> Tensor:
    start = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model.module.critic(start).sum(), start, create_graph=True)
    (bend,) = torch.autograd.grad(slope.pow(2).sum(), start, create_graph=True)
    return (bend + slope).pow(2).mean()


BODIES = [interpolated, on_real_data, on_styles, not_detached, adaptive, unused, second_derivative]
CASES = {body.__name__: Case(Pair, vectors, body) for body in BODIES}


@pytest.mark.parametrize(
    "num_stages, is_scattered, schedule",
    [
        (2, True, "interleaved"),
        pytest.param(2, False, "zero_bubble", marks=pytest.mark.slow),
        pytest.param(3, True, "zero_bubble", marks=pytest.mark.slow),
    ],
)
def test_gradients_inside_a_step(num_stages: int, is_scattered: bool, schedule: str) -> None:
    expected = outcomes(__name__, list(CASES), 1, min_steps=3)[0]
    ranks = outcomes(__name__, list(CASES), num_stages, min_steps=3, is_scattered=is_scattered, pipeline=schedule)
    for name in CASES:
        compare(name, [rank[name] for rank in ranks], expected[name])
