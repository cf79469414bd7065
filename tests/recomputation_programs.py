"""Programs with recomputed regions, each in several spellings, for tests on different numbers of stages.

``CASES["name/how"]``: how the regions are made: "plain" (not at all), "torch" and "reentrant" (torch.utils.checkpoint).
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine_runs import Case
from recomputation_models import Runs

WIDTH = 6
Region = Callable[..., Any]


def plain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """No region."""
    return function(*args, **kwargs)


REGIONS: dict[str, Region] = {
    "plain": plain,
    "torch": functools.partial(checkpoint, use_reentrant=False),
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
}


class Unit(nn.Module):
    """A layer with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3)
        self.runs = Runs()

    def forward(self, x: Tensor) -> Tensor:
        self.runs.number += 1
        return self.drop(torch.tanh(self.linear(x)))


class Checkpointed(Unit):
    """A layer whose forward is a region, as layers of transformers 5 are."""

    def __init__(self, region: Region) -> None:
        super().__init__()
        self.region = region

    def forward(self, x: Tensor) -> Any:
        return self.region(functools.partial(Unit.forward, self), x)


class Net(nn.Module):
    """Six units, a norm with running statistics, a weight and a buffer; ``forward`` is a program of this file."""

    def __init__(self, forward: Callable[[Any, Tensor, Region], Any], region: Region) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e, self.f = (Unit() for _ in range(6))
        self.norm = nn.BatchNorm1d(WIDTH)
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.9))
        self.register_buffer("average", torch.zeros(WIDTH))
        self.program, self.region = forward, region

    def forward(self, x: Tensor) -> Any:
        return self.program(self, x, self.region)


def spanning(m: Any, x: Tensor, region: Region) -> Tensor:
    x = m.a(x)
    x = region(lambda y: y + F.dropout(m.c(torch.tanh(m.b(y))), 0.3), x)
    return m.f(region(lambda y: m.e(m.d(y)) * y, x))


def skips(m: Any, x: Tensor, region: Region) -> Tensor:
    z = m.a(x)
    w = m.b(z)
    y = region(lambda v: m.d(m.c(v) * z) + w.sin(), z)
    return m.f(m.e(y + z) + w)


def all_of_it(m: Any, x: Tensor, region: Region) -> Tensor:
    x = x.clone().requires_grad_()  # a reentrant region without such an input gives no gradients at all
    return region(lambda v: m.f(m.e(m.d(m.c(m.b(m.a(v)))))), x)


def nested(m: Any, x: Tensor, region: Region) -> Tensor:
    def inner(v: Tensor) -> Tensor:
        return m.c(m.b(v)) + v

    def outer(v: Tensor) -> Tensor:
        return m.d(region(inner, v).cos()) + region(inner, v * 2)

    return m.f(m.e(region(outer, m.a(x))))


def used_on_both_sides(m: Any, x: Tensor, region: Region) -> Tensor:
    def first(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = m.b(v)
        return y, m.c(y) + y, y.detach()

    def second(u: Tensor, v: Tensor) -> dict[str, Any]:
        return {"sum": m.d(u) + v, "list": [u * v, 7, None]}

    x = m.a(x)
    y, z, w = region(first, x)
    found = region(second, y, z)
    assert found["list"][1] == 7
    return m.f(m.e(found["sum"] + y) * z + found["list"][0] + w + x)


def called_again(m: Any, x: Tensor, region: Region) -> Tensor:
    x = m.b(m.a(x))
    x = region(lambda v: m.a(m.b(m.a(v)) + v), x)
    x = region(lambda v: m.c(m.a(v)), x)
    return m.a(x) + m.f(x)


def statistics(m: Any, x: Tensor, region: Region) -> Tensor:
    return m.f(region(lambda v: m.c(m.norm(m.b(v))) + m.norm(v), m.a(x)))


def reading(m: Any, x: Tensor, region: Region) -> Tensor:
    def choose(v: Tensor) -> Tensor:
        y = m.b(v)
        factor = float(y.detach().mean())
        if y.detach().abs().max() > 0.01:
            y = m.c(y) * (1 + factor)
        rows = y[y.detach().sum(-1) > 0]
        return y + (m.d(rows).sum() if len(rows) else 0.0)

    return m.f(region(choose, m.a(x)))


def writing(m: Any, x: Tensor, region: Region) -> Tensor:
    def write(v: Tensor) -> Tensor:
        y = m.b(v)
        y[:, 0] = 0.5
        z = m.c(y * 1.0)
        y += z
        y.mul_(1.5)
        w = torch.zeros(v.shape[0], WIDTH, dtype=v.dtype)
        w[:, 1] = y[:, 2]
        w[:, :2] += z[:, :2]
        u = m.d(y + w)
        z.add_(1)
        return u * z

    return m.f(region(write, m.a(x)))


def weights_in_glue(m: Any, x: Tensor, region: Region) -> Tensor:
    def scaled(v: Tensor) -> Tensor:
        y = m.b(v * m.scale)
        m.average = 0.9 * m.average + 0.1 * y.detach().mean(0)
        return m.c(y + m.average) @ torch.diag(m.scale)

    return m.f(region(scaled, m.a(x)) * m.scale)


def drawing(m: Any, x: Tensor, region: Region) -> Tensor:
    def draw(v: Tensor) -> Tensor:
        y = m.b(v)
        if random.random() < 0.6:
            y = m.c(y)
        if torch.rand(()) < 0.6:
            y = m.d(y)
        return y + torch.randn_like(y) * y + random.random()

    return m.f(region(draw, m.a(x)))


def without_gradients(m: Any, x: Tensor, region: Region) -> Tensor:
    def partly(v: Tensor) -> Tensor:
        with torch.no_grad():
            fixed = m.c(m.b(v))
        return m.d(v) * fixed + m.e(fixed).detach()

    return m.f(region(partly, m.a(x)))


def in_a_loop(m: Any, x: Tensor, region: Region) -> Tensor:
    x = m.a(x)
    for part in (m.b, m.c, m.d, m.e, m.f):
        x = region(lambda v, part=part: v + part(v), x)
    return x


def views(m: Any, x: Tensor, region: Region) -> Tensor:
    def turn(v: Tensor) -> Tensor:
        left, right = m.b(v).t().chunk(2)
        return m.c(torch.cat([right, left]).t().contiguous()) + m.d(v.t().flip(0).t())

    return m.f(region(turn, m.a(x)))


PROGRAMS = {
    program.__name__: program
    for program in (
        spanning, skips, all_of_it, nested, used_on_both_sides, called_again, statistics, reading, writing,
        weights_in_glue, drawing, without_gradients, in_a_loop, views,
    )
}  # fmt: skip


def mean_square(model: Any, x: Tensor) -> Tensor:
    return model(x).square().mean()


def loss_in_region(model: Any, x: Tensor, region: Region) -> Any:
    def loss_of(v: Tensor) -> Tensor:
        return (model(v) - 1).square().mean()

    loss = region(loss_of, x.clone().requires_grad_() if region is REGIONS["reentrant"] else x)
    return loss, float(loss.detach())


def batch(step: int) -> tuple[Tensor]:
    return (torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step), dtype=torch.float64),)


def with_regions_inside(region: Region) -> Net:
    net = Net(spanning, plain)
    net.b, net.d, net.e = (Checkpointed(region) for _ in range(3))
    return net


def make_cases() -> dict[str, Case]:
    """All programs, in all spellings."""
    cases = {}
    for how, region in REGIONS.items():
        for name, program in PROGRAMS.items():
            cases[f"{name}/{how}"] = Case(functools.partial(Net, program, region), batch, mean_square)
        cases[f"inside/{how}"] = Case(functools.partial(with_regions_inside, region), batch, mean_square)
        cases[f"loss/{how}"] = Case(
            functools.partial(Net, spanning, plain), batch, functools.partial(loss_in_region, region=region)
        )
    return cases


CASES = make_cases()
