"""The backward of a piece in two parts gives the gradients of one backward, and leaves work for the second part."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from modelparallel.pipeline.program.splitting import SplitBackward

WIDTH = 8


class Doubled(torch.autograd.Function):
    """Makes both gradients at once, as functions written in Python do."""

    num_backwards = 0

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return 2 * x * weight

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        Doubled.num_backwards += 1
        x, weight = ctx.saved_tensors
        return 2 * gradient * weight, (2 * gradient * x).sum((0, 1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.convolution = nn.Conv1d(5, 5, 3, padding=1)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))
        self.table = nn.Embedding(5, WIDTH)


def straight(net: Net, x: Tensor) -> list[Tensor]:
    return [net.second(torch.tanh(net.first(x)))]


def residual(net: Net, x: Tensor) -> list[Tensor]:
    y = net.norm(net.first(x))
    y = y + net.attention(y, y, y, need_weights=False)[0]
    return [net.convolution(y) + x]


def used_twice(net: Net, x: Tensor) -> list[Tensor]:
    return [net.first(torch.tanh(net.first(x)))]


def weight_in_glue(net: Net, x: Tensor) -> list[Tensor]:
    transposed = net.first.weight.t()
    return [torch.tanh(x @ transposed) @ transposed]


def own_function(net: Net, x: Tensor) -> list[Tensor]:
    return [Doubled.apply(net.first(x), net.scale)]


def several_roots(net: Net, x: Tensor) -> list[Tensor]:
    """As after a cut: values that need no input (a bias made of weights alone), also used inside (T5's positions)."""
    positions = net.table(torch.arange(5)).unsqueeze(0)
    return [positions, net.second(torch.softmax(net.first(x) + positions, -1)), x * 1.0]


def only_weights(net: Net, x: Tensor) -> list[Tensor]:
    return [net.table(torch.arange(5)).unsqueeze(0) * net.scale]


def no_weights(net: Net, x: Tensor) -> list[Tensor]:
    return [torch.tanh(x) * x]


BODIES: dict[str, tuple[Callable[[Net, Tensor], list[Tensor]], set[str]]] = {
    # name -> (program, weights whose gradient must have waited for the second part)
    "straight": (straight, {"first.weight", "first.bias", "second.weight"}),
    "residual": (residual, {"first.weight", "convolution.weight", "attention.out_proj.weight", "norm.weight"}),
    "used_twice": (used_twice, set()),
    "weight_in_glue": (weight_in_glue, set()),
    "own_function": (own_function, {"first.weight", "first.bias"}),
    "several_roots": (several_roots, {"first.weight", "second.weight"}),
    "only_weights": (only_weights, {"table.weight", "scale"}),
    "no_weights": (no_weights, set()),
}


@pytest.mark.parametrize("name", list(BODIES))
@pytest.mark.parametrize("has_gradients_already", [False, True])
def test_two_parts_equal_one_backward(name: str, has_gradients_already: bool) -> None:
    body, expected_later = BODIES[name]
    torch.manual_seed(1)
    net = Net().double()
    reference = copy.deepcopy(net)
    values = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    if has_gradients_already:
        for module in (net, reference):
            for index, parameter in enumerate(module.parameters()):
                parameter.grad = torch.full_like(parameter, 0.1 * index)

    x = values.clone().requires_grad_()
    roots = body(reference, x)
    seeds = [torch.randn(root.shape, dtype=torch.float64) for root in roots]
    torch.autograd.backward(roots, seeds)

    leaf = values.clone().requires_grad_()
    split = SplitBackward({id(parameter) for parameter in net.parameters()})
    before = {key: None if p.grad is None else p.grad.clone() for key, p in net.named_parameters()}
    split.run_inputs(body(net, leaf), seeds)
    if name == "only_weights":
        assert leaf.grad is None
    else:
        torch.testing.assert_close(leaf.grad, x.grad, rtol=1e-12, atol=1e-12)
    unchanged = {
        key for key, p in net.named_parameters()
        if (p.grad is None) == (before[key] is None) and (p.grad is None or torch.equal(p.grad, before[key]))
    }  # fmt: skip
    assert expected_later <= unchanged
    split.run_weights()
    for (key, parameter), other in zip(net.named_parameters(), reference.parameters(), strict=True):
        if other.grad is None:
            assert parameter.grad is None, key
        else:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-12, atol=1e-12, msg=key)


def test_a_function_of_its_own_runs_once_and_hooks_of_weights_fire_once() -> None:
    torch.manual_seed(1)
    net = Net().double()
    fired: list[str] = []
    for key, parameter in net.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, key=key: fired.append(key))
    Doubled.num_backwards = 0
    split = SplitBackward({id(parameter) for parameter in net.parameters()})
    roots = own_function(net, torch.randn(3, 5, WIDTH, dtype=torch.float64, requires_grad=True))
    split.run_inputs(roots, [torch.ones_like(roots[0])])
    assert Doubled.num_backwards == 1 and fired == ["scale"]
    split.run_weights()
    assert Doubled.num_backwards == 1 and sorted(fired) == ["first.bias", "first.weight", "scale"]
