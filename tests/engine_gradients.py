"""Gradients across the stages: detached and frozen parts, hooks, several backwards, custom functions, precision,
control flow, changing shapes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine_models import WIDTH, Stack, held, sequences, square, vectors
from engine_runs import Case

# Where gradients flow


def detached(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    with torch.no_grad():
        y = self.b(x)
        y += 1
    z = self.c(x.detach()) + y
    with torch.enable_grad():
        z = z + self.d(y)
    return z * x.data + self.b(x)


def wants_grad(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = self.a(x)
    x = x.detach().requires_grad_()
    y = self.b(x)
    plain = torch.ones(WIDTH, dtype=x.dtype)
    y.requires_grad_()
    return self.c(y * plain)


def own_input_wants_grad(self: Any, x: Tensor) -> Tensor:
    """As the feature encoders of speech models do, for checkpointing; nobody looks at the gradient."""
    x = x[:, :]
    x.requires_grad = True
    scaled = (x * 2).exp() * 0.1
    first = self.a(x) + self.b(scaled)
    return self.c(first + scaled) * x + self.d(scaled)


def hooked(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    x.register_hook(lambda gradient: gradient * 2)
    y = self.b(x)
    y.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    y.retain_grad()
    z = self.c(y) + x
    handle = z.register_hook(lambda gradient: gradient * 100)
    handle.remove()
    return self.d(z) + y


class AsksParameters(nn.Module):
    """Looks at the properties of its parameters between the modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.b = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))
        self.fixed = nn.Parameter(torch.linspace(2.0, 1.0, WIDTH), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        for parameter in (self.scale, self.fixed):
            x = x * parameter if parameter.requires_grad else x + parameter
            assert parameter.grad_fn is None and parameter.is_leaf and parameter.shape == (WIDTH,)
        handle = self.scale.register_hook(lambda gradient: gradient * 100)
        handle.remove()
        self.scale.register_hook(lambda gradient: None)
        return self.b(x)


def freeze(net: Any, *names: str) -> Any:
    for name in names:
        getattr(net, name).requires_grad_(False)
    return net


def chain(self: Any, x: Tensor) -> Tensor:
    return self.d(torch.tanh(self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))))


class LowRank(nn.Module):
    """A frozen layer with a trained correction, as LoRA does it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, WIDTH) * 0.3)
        self.up = nn.Parameter(torch.randn(WIDTH, 2) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


class LowRanks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.layers = nn.ModuleList(LowRank() for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = self.norm(layer(x)) + x
        return x


def unused(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    first, _, third = self.b(x).split(2, dim=-1)[:3]
    self.c(x)  # its output is not used at all
    return first.sum() * third + self.d(x)[:, :2] * 0


def two_losses(model: Any, x: Tensor) -> Any:
    y = model(x)
    one, two = y.square().mean(), model(x + 1).abs().sum() * 0.1
    model.backward(one)
    z = model(x.flip(0))
    model.backward([z.square().mean(), two])
    return one + two, z


def with_gradient(model: Any, x: Tensor) -> Any:
    y = model(x)
    model.backward(y, torch.ones_like(y) * 0.1)
    z = model(x * 2)
    model.backward([z, z.mean()], [z.detach() * 0.01, None])
    return y.mean()


def one_element(model: Any, x: Tensor) -> Any:
    return model(x).square().mean().reshape(1, 1)


class _Several(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, factor: float, name: str, nothing: None) -> Any:
        ctx.save_for_backward(x, y)
        ctx.factor = factor
        mask = x > 0
        ctx.mark_non_differentiable(mask)
        return x * y * factor, mask, x - y

    @staticmethod
    def backward(ctx: Any, one: Tensor, _: Any, two: Tensor) -> Any:
        x, y = ctx.saved_tensors
        return one * y * ctx.factor * 2 + two, one * x * ctx.factor - two, None, None, None


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


def functions(self: Any, x: Tensor) -> Tensor:
    x, y = self.a(x), self.b(x)
    product, mask, difference = _Several.apply(x, y, 0.5, "name", None)
    assert mask.dtype == torch.bool and not mask.requires_grad
    z = _Several.apply(self.c.weight, x[:1], 2.0, "", None)[0]
    return self.d(product * mask + _Reverse.apply(difference)) + self.c(x) + z.sum() + _Reverse.apply(self.c.bias)


def residual_twice(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    kept = torch.tanh(x)
    y = kept * 2  # before the send
    z = self.b(kept) + y
    w = kept + self.c(z) * y + x  # and after it
    return self.d(w) * kept + z


def penalty(model: Any, x: Tensor) -> Any:
    """Weights read in the loss; weights of several stages in one operation of the norm."""
    norms = [p.square().sum() for p in model.parameters()]
    return model(x).square().mean() + 0.01 * torch.stack(norms).sum() + sum(p.abs().sum() for p in model.parameters())


# Precision


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:2]:
            x = torch.tanh(layer(x))
        with torch.autocast("cpu", torch.bfloat16):
            for layer in self.layers[2:]:
                x = layer(x) @ torch.eye(WIDTH)
            assert x.dtype == torch.bfloat16
            x = self.norm(x)
        return x.float() + x.to(torch.bfloat16)


def autocast_around(model: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x.float())
        loss = F.mse_loss(y.float(), torch.zeros(y.shape))
    return loss, str(y.dtype)


def single_vectors(step: int) -> tuple[Tensor, ...]:
    return (vectors(step)[0].float(),)


def half_vectors(step: int) -> tuple[Tensor, ...]:
    return (vectors(step)[0].bfloat16(),)


# Control flow


def loops(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    count = 0
    while x.detach().norm() < 30 and count < 6:
        x = self.b(x) * 2 + x
        count += 1
    for _ in range(int(x.detach().abs().max().item()) % 3):
        x = self.c(x)
    return self.d(x / (1 + x.detach().norm()))


def by_microbatch(self: Any, x: Tensor) -> Tensor:
    return self.d(self.a(self.b(x)) if x[0, 0] > 0 else self.c(x) + self.b(x[:, :].roll(1)))


class Tree(nn.Module):
    """Recursion, shared parents, partial, lambda and generators in between."""

    def __init__(self) -> None:
        super().__init__()
        self.leaf = nn.Linear(WIDTH, WIDTH)
        self.join = nn.Bilinear(WIDTH, WIDTH, WIDTH)
        self.also = nn.ModuleDict({"leaf": self.leaf, "top": nn.Linear(WIDTH, WIDTH)})

    def reduce(self, x: Tensor, depth: int) -> Tensor:
        if depth == 0 or x.shape[0] == 1:
            return torch.tanh(self.leaf(x)).mean(0, keepdim=True)
        half = x.shape[0] // 2
        left, right = (self.reduce(part, depth - 1) for part in (x[:half], x[half:]))
        return torch.tanh(self.join(left, right)) + left

    def forward(self, x: Tensor) -> Tensor:
        apply = partial(lambda module, value: module(value), self.also["top"])
        return apply(self.reduce(x, 2)) + self.also["leaf"](x)


def caught(model: Any, x: Tensor) -> Tensor:
    try:
        model(x).reshape(7, 7, 7)
    except RuntimeError:
        x = x * 2
    try:
        raise ValueError("of the body")
    except ValueError:
        y = model(x)
    return y.square().mean()


def changing(step: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(step)
    return (torch.randn(3 + 2 * step, 2 + step, WIDTH, generator=generator, dtype=torch.float64),)


class Checked(nn.Module):
    """Evaluates itself in the middle of training."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, WIDTH),
            nn.BatchNorm1d(WIDTH, affine=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def evaluates(model: Any, x: Tensor) -> Any:
    model.eval()
    with torch.no_grad():
        before = model(x)
    model.train()
    return model(x).square().mean() + before.mean(), before


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.lstm = nn.LSTM(WIDTH, 6, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.head = nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        lengths = torch.tensor([5, 3, 2, 1][: x.shape[0]])
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        output, (state, _) = self.lstm(packed)
        y, sizes = nn.utils.rnn.pad_packed_sequence(output, batch_first=True)
        assert sizes.tolist() == lengths.tolist()
        y, weights = self.attention(y, y, y, attn_mask=torch.zeros(y.shape[1], y.shape[1], dtype=torch.bool))
        return self.head(y + state.mean()) * weights.sum(-1, keepdim=True)


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Transformer(WIDTH, 2, 2, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.net(x, x.flip(1), tgt_mask=mask)


CASES = {
    "detached": Case(held(detached), vectors, square),
    "wants_grad": Case(held(wants_grad), vectors, square),
    "own_input_wants_grad": Case(held(own_input_wants_grad), vectors, square),
    "hooked": Case(held(hooked), vectors, square),
    "asks_parameters": Case(AsksParameters, vectors, square),
    "frozen_first": Case(lambda: freeze(held(chain)(), "a"), vectors, square),
    "frozen_stage": Case(lambda: freeze(held(chain)(), "a", "c"), vectors, square),
    "frozen_last": Case(lambda: freeze(held(chain)(), "b", "d"), vectors, square),
    "low_rank": Case(LowRanks, vectors, square),
    "unused": Case(held(unused), vectors, square),
    "two_losses": Case(held(chain), vectors, two_losses, runs_backward=True),
    "with_gradient": Case(held(chain), vectors, with_gradient, runs_backward=True),
    "one_element": Case(held(chain), vectors, one_element),
    "functions": Case(held(functions), vectors, square),
    "residual_twice": Case(held(residual_twice), vectors, square),
    "penalty": Case(held(chain), vectors, penalty),
    "mixed": Case(Mixed, single_vectors, square, dtype=torch.float32),
    "autocast_around": Case(lambda: Stack(torch.tanh), vectors, autocast_around, dtype=torch.float32),
    "half": Case(lambda: Stack(torch.tanh), half_vectors, square, dtype=torch.bfloat16),
    "loops": Case(held(loops), vectors, square, num_steps=4),
    "by_microbatch": Case(held(by_microbatch), vectors, square, num_steps=4),
    "tree": Case(Tree, vectors, square),
    "caught": Case(held(chain), vectors, caught),
    "changing": Case(lambda: Stack(torch.tanh), changing, square, num_steps=4),
    "evaluates": Case(Checked, vectors, evaluates, num_steps=3),
    "recurrent": Case(Recurrent, sequences, square),
    "translator": Case(Translator, sequences, square),
}  # fmt: skip
