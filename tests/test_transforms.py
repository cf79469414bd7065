"""torch.func between the modules: transforms and calls with other weights, one operation each."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import (
    functional_call,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)

from engine_models import WIDTH, Stack, square, vectors
from engine_runs import Case, compare, outcomes, run_case
from pool import run_ranks


def scaled(v: Tensor) -> Tensor:
    return torch.tanh(v) * v.norm()


def energy(v: Tensor) -> Tensor:
    return (torch.sin(v) ** 2).sum()


class Layers(nn.Module):
    """Four layers, and parameters of the model's own; ``way(model, layer, x)`` is what happens around each layer."""

    def __init__(self, way: Any, **more: nn.Module) -> None:
        super().__init__()
        self.way = way
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.scale = nn.Parameter(torch.rand(WIDTH))
        self.register_buffer("shift", torch.rand(WIDTH))
        for name, module in more.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.way(self, layer, x)
        return x

    def scale_it(self, v: Tensor) -> Tensor:
        return v * self.scale + self.shift


def over_parameter(self: Any, layer: Any, x: Tensor) -> Tensor:
    return vmap(lambda v: v * self.scale)(layer(x))


def over_method(self: Any, layer: Any, x: Tensor) -> Tensor:
    return vmap(self.scale_it)(layer(x))


def over_value(self: Any, layer: Any, x: Tensor) -> Tensor:
    y = layer(x)
    return vmap(lambda row, other: (row * other).tanh() + y.mean(0), in_dims=(0, None))(y, x.sum(0))


def over_layer(self: Any, layer: Any, x: Tensor) -> Tensor:
    """The transform calls a placed module, and differentiates through it."""
    return torch.tanh(x + vmap(grad(lambda v: layer(v).pow(2).sum()))(x))


def over_far_layers(self: Any, layer: Any, x: Tensor) -> Tensor:
    """Two modules, on two stages, inside one transform."""
    first, last = self.layers[0], self.layers[3]
    return layer(x) + vmap(lambda v: last(torch.tanh(first(v))))(x)


def with_jvp(self: Any, layer: Any, x: Tensor) -> Tensor:
    y, t = jvp(torch.tanh, (layer(x),), (torch.ones_like(x),))
    return y + 0.1 * t


def with_vjp(self: Any, layer: Any, x: Tensor) -> Tensor:
    y, back = vjp(lambda v: torch.sin(v) * self.scale, layer(x))
    (pulled,) = back(y.detach())
    return y + pulled


def with_jacobians(self: Any, layer: Any, x: Tensor) -> Tensor:
    y = layer(x)[:2]
    rows = vmap(jacrev(lambda v: torch.sin(v) * self.scale))(y).sum(-1)
    whole = jacrev(lambda v: (v * v).sum(0))(y).sum((0, 1))
    columns = jacfwd(lambda v: (v**3).sum(1))(y).sum(0)
    curvature = hessian(energy)(y[0]).sum(0)
    return torch.tanh(x + rows.sum(0) + whole + columns.sum(0) + curvature + layer(x))


def with_value(self: Any, layer: Any, x: Tensor) -> Tensor:
    gradient, (value, aux) = grad_and_value(lambda v, w: ((v * w).sin().sum(), v.mean()), argnums=1, has_aux=True)(
        layer(x), self.scale
    )
    return torch.tanh(x * gradient + value.tanh() + aux)


def other_weights(self: Any, layer: Any, x: Tensor) -> Tensor:
    return torch.tanh(functional_call(layer, {name: p * 1.5 for name, p in layer.named_parameters()}, (x,)))


def weights_from_afar(self: Any, layer: Any, x: Tensor) -> Tensor:
    """A layer is called with the weight of another one; its bias is its own."""
    return functional_call(layer, {"weight": self.layers[0].weight.t() * x.mean()}, x)


def whole_list(self: Any, layer: Any, x: Tensor) -> Tensor:
    """A container whose layers are on several stages."""
    given = {f"{name}": p * 0.9 for name, p in self.chain.named_parameters() if name.endswith("weight")}
    return x + functional_call(self.chain, given, (layer(x),))


def per_sample(self: Any, layer: Any, x: Tensor) -> Tensor:
    weights = dict(layer.named_parameters())

    def loss(given: Any, row: Tensor) -> Tensor:
        return functional_call(layer, given, (row,)).pow(2).mean()

    found = vmap(grad(loss), in_dims=(None, 0))(weights, x)
    return torch.tanh(x + found["weight"].pow(2).sum(1) + found["bias"])


def ensemble(self: Any, layer: Any, x: Tensor) -> Tensor:
    stacked, _ = stack_module_state(list(self.chain)[::2])
    outputs = vmap(lambda given: functional_call(self.chain[0], given, (x,)))(stacked)
    return layer(x) + outputs.mean(0)


def with_randomness(self: Any, layer: Any, x: Tensor) -> Tensor:
    y = vmap(lambda v: F.dropout(v, 0.5) * self.scale, randomness="different")(layer(x))
    return y + torch.rand_like(y) * functional_call(self.noisy, {"1.weight": self.layers[0].weight}, (x,))


def with_partial(self: Any, layer: Any, x: Tensor) -> Tensor:
    y = layer(x)
    return vmap(partial(torch.add, alpha=2.0), in_dims=(0, None))(y, self.scale) + vmap(scaled)(x)


def plain(self: Any, layer: Any, x: Tensor) -> Tensor:
    """Only ordinary tensors."""
    return layer(x) + vmap(scaled)(torch.ones(3, WIDTH, dtype=x.dtype)).sum(0)


def chained() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def noisy() -> nn.Module:
    return nn.Sequential(nn.Dropout(0.3), nn.Linear(WIDTH, WIDTH))


def case(way: Any, **more: Any) -> Case:
    return Case(lambda: Layers(way, **{name: make() for name, make in more.items()}), vectors, square)


# Flags of values


def thawed_and_frozen(x: Tensor) -> Tensor:
    y = x.detach().requires_grad_()
    first = (y * y).sum(-1, keepdim=True)
    y.requires_grad = False
    assert not y.requires_grad and first.requires_grad
    z = x.detach()
    z.requires_grad_(False)
    z.requires_grad = False
    z.requires_grad_(True).requires_grad_(False)
    return x + y * 0.5 + z


def computed(x: Tensor) -> Tensor:
    try:
        x.requires_grad_(False)
    except RuntimeError as error:
        assert "leaf variables" in str(error)
    else:
        raise AssertionError("torch refuses it")
    return x * 2


CASES = {
    "parameter in a closure": case(over_parameter),
    "method": case(over_method),
    "values": case(over_value),
    "layer": case(over_layer),
    "layers of two stages": case(over_far_layers),
    "jvp": case(with_jvp),
    "vjp": case(with_vjp),
    "jacobians": case(with_jacobians),
    "grad_and_value": case(with_value),
    "other weights": case(other_weights),
    "weights of another stage": case(weights_from_afar),
    "container": case(whole_list, chain=chained),
    "gradients of samples": case(per_sample),
    "ensemble": case(ensemble, chain=chained),
    "random": case(with_randomness, noisy=noisy),
    "partial": case(with_partial),
    "plain": case(plain),
    "flags": Case(lambda: Stack(thawed_and_frozen), vectors, square),
    "flag of a computed value": Case(lambda: Stack(computed), vectors, square),
}


QUICK = ["parameter in a closure", "layer", "vjp", "other weights", "gradients of samples", "random", "flags"]
SLOW = [name for name in CASES if name not in QUICK]


def check(names: list[str], num_stages: int) -> None:
    expected = outcomes(__name__, names, 1)[0]
    ranks = outcomes(__name__, names, num_stages)
    for name in names:
        compare(name, [rank[name] for rank in ranks], expected[name])


def test_transforms_are_operations() -> None:
    check(QUICK, 2)


@pytest.mark.slow
@pytest.mark.parametrize("num_stages", [2, 3])
def test_more_transforms(num_stages: int) -> None:
    check(SLOW if num_stages == 2 else list(CASES), num_stages)


def hidden(self: Any, layer: Any, x: Tensor) -> Tensor:
    """Which parameters it reads shows nowhere in its code."""
    return layer(x) + vmap(lambda v: v * self.scale * sum(getattr(part, "wei" + "ght").sum() for part in every(self)))(
        x
    )


def every(self: Any) -> Any:
    return list(vars(self)["_modules"]["layers"])


HIDDEN = {"hidden": case(hidden)}


def run_hidden() -> dict[str, Any]:
    return {name: run_case(case, is_scattered=True) for name, case in HIDDEN.items()}


def test_what_is_not_found_in_the_code_of_a_function_is_refused_by_name() -> None:
    parameters = {"pipeline_parallel_degree": 2, "microbatches": 2, "auto_partition": False, "default_partition": 0}
    errors = [rank["hidden"].error for rank in run_ranks(run_hidden, 2, parameters=parameters)]
    assert any("torch.func.vmap runs on pp_rank" in error and "reads 'layers." in error for error in errors), errors
