"""Optimizers that look beyond one parameter, or beyond a slice of it: right where nothing is split, else refused."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modelparallel as smp
from modelparallel.errors import SMPConfigError, UnsupportedError
from parity import assert_parity
from pooled_model import split_pair
from rank_tests import RankTests, on
from training import classification_step, square_loss, step_of

DP2 = RankTests(2, {})
PP2 = RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 2})
PP3 = RankTests(3, {"pipeline_parallel_degree": 3, "microbatches": 2})
TP2 = RankTests(2, {"tensor_parallel_degree": 2})
SHARDED2 = RankTests(2, {"shard_optimizer_state": True})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(6, 8, bias=False)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.tanh(self.inp(x))
        return self.last(x + self.second(torch.tanh(self.first(x))))


def make_net() -> Net:
    torch.manual_seed(5)
    return split_pair(Net().double())


def make_batch(step: int):
    generator = torch.Generator().manual_seed(step)
    size = 8 * smp.dp_size()
    x = torch.randn(size, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (size,), generator=generator)


class OwnOptimizer(torch.optim.Optimizer):
    """The frame of those below, which are as foreign ones: they say nothing of themselves."""

    def __init__(self, parameters, lr=0.1):
        super().__init__(parameters, {"lr": lr})

    def trained(self):
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update_all()
        return loss

    def update_all(self):
        for p in self.trained():
            self.update(p)

    def update(self, p):
        raise NotImplementedError


class Signs(OwnOptimizer):
    """Each element by itself."""

    def update(self, p):
        state = self.state[p].setdefault("average", torch.zeros_like(p))
        p.add_(state.mul_(0.9).add_(p.grad, alpha=0.1).sign(), alpha=-0.01)


class Layers(OwnOptimizer):
    """Norms of single parameters, with a branch on their values, as LARS has them."""

    def update(self, p):
        weight, gradient = p.norm(), p.grad.norm()
        ratio = (weight / gradient).item() if weight > 0 and gradient > 0 else 1.0
        p.add_(p.grad, alpha=-0.1 * ratio)


class Rows(OwnOptimizer):
    """Divides by a running mean for each row."""

    def update(self, p):
        state = self.state[p].setdefault("rows", torch.zeros_like(p.sum(-1, keepdim=True)))
        p.addcdiv_(p.grad, state.add_(p.grad.square().mean(-1, keepdim=True)).sqrt().add_(1e-3), value=-0.01)


class Matrices(OwnOptimizer):
    """Orthogonal updates after a warm-up; before that only a statistic is kept."""

    def update(self, p):
        state = self.state[p]
        matrix = p.grad.view(p.shape[0], -1)
        state["outer"] = state.get("outer", 0) + matrix @ matrix.T
        state["step"] = state.get("step", 0) + 1
        if state["step"] < 3:
            p.add_(p.grad, alpha=-0.1)
        else:
            p.add_(torch.linalg.inv(state["outer"] + torch.eye(p.shape[0]).double()) @ matrix.view_as(p), alpha=-0.1)


class Noise(OwnOptimizer):
    """Langevin noise: the copies draw other numbers, which is no influence."""

    def update(self, p):
        p.add_(p.grad + 1e-3 * torch.randn_like(p), alpha=-0.1)


class Estimates(OwnOptimizer):
    """A step size from sums over all parameters that leave torch as numbers, as in Prodigy and D-Adaptation."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=1.0)
        self.param_groups[0]["d"] = 1e-2

    def update_all(self):
        total = 0.0
        for p in self.trained():
            total += p.grad.abs().sum().item()
        d = max(self.param_groups[0]["d"], 1e-3 * total)
        for group in self.param_groups:
            group["d"] = d
        for p in self.trained():
            p.add_(p.grad, alpha=-d)


class Sharpness(torch.optim.Optimizer):
    """SAM: ``first`` climbs by the norm of the whole gradient."""

    def __init__(self, parameters):
        super().__init__(parameters, {"rho": 0.05})
        self.base = torch.optim.SGD(self.param_groups, lr=0.1, momentum=0.9)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first(self, rho=0.05):
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.norm(torch.stack([p.grad.norm() for p in parameters]))
        for p in parameters:
            self.state[p]["e"] = p.grad * (rho / (norm + 1e-12))
            p.add_(self.state[p]["e"])

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:  # both passes here
            with torch.enable_grad():
                loss = closure()
            self.first()
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for p in group["params"]:
                if "e" in self.state[p]:
                    p.sub_(self.state[p].pop("e"))
        self.base.step()
        return loss if closure is not None else None


class Nested(OwnOptimizer):
    """Wraps another optimizer and keeps slow weights: each element by itself."""

    def __init__(self, parameters):
        super().__init__(parameters)
        self.base = torch.optim.Adam(self.param_groups, lr=0.01)
        self.slow, self.count = {}, 0

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.trained():
            self.slow.setdefault(p, p.detach().clone())
        self.base.step()
        self.count += 1
        if self.count % 2 == 0:
            for p, slow in self.slow.items():
                p.copy_(slow.lerp_(p, 0.5))


def train(model, optimizer, num_steps, how):
    is_wrapped = isinstance(model, smp.DistributedModel)

    def one_pass(step):
        optimizer.zero_grad()
        x, y = make_batch(step)
        if is_wrapped:
            own = (part.tensor_split(smp.dp_size())[smp.dp_rank()] for part in (x, y))
            return classification_step(model, *own).reduce_mean()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    for step in range(num_steps):
        if how == "closure":
            optimizer.step(lambda step=step: one_pass(step))
            continue
        one_pass(step)
        if how == "two passes":
            (optimizer.optimizer if is_wrapped else optimizer).first(rho=0.1)
            one_pass(step)
        optimizer.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


def wrapped(make) -> tuple[Any, Any]:
    model = smp.DistributedModel(make_net())
    return model, smp.DistributedOptimizer(make(model.parameters()))


@functools.cache
def reference(make, how):
    net = make_net()
    return train(net, make(net.parameters()), 4, how)


def lbfgs(parameters):
    return torch.optim.LBFGS(parameters, lr=0.5, max_iter=3)


def searching(parameters):
    return torch.optim.LBFGS(parameters, lr=0.5, max_iter=3, line_search_fn="strong_wolfe")


PLAIN = ((Signs, "plain"), (Nested, "plain"), (Signs, "closure"))
OF_PARAMETERS = ((Layers, "plain"), (Rows, "plain"), (Matrices, "plain"), (Layers, "closure"))
OF_ALL = (
    (Estimates, "plain", "step"),
    (Estimates, "closure", "step"),
    (Sharpness, "two passes", "first"),
    (Sharpness, "closure", "step"),
)


def verify(make, how):
    try:
        assert_parity(train(*wrapped(make), 4, how), reference(make, how), dtype=torch.float64)
    except AssertionError as error:
        raise AssertionError(f"{make.__name__}, {how}: {error}") from error


def refuse_or_train_rightly():
    is_sharded = smp.state.cfg.shard_optimizer_state
    for make, how in PLAIN if is_sharded or smp.tp_size() > 1 else PLAIN + OF_PARAMETERS:
        verify(make, how)
    for make, how, name in OF_ALL:
        if smp.tp_size() == smp.pp_size() == 1 and not is_sharded:
            verify(make, how)
            continue
        with pytest.raises(
            SMPConfigError,
            match=rf"{make.__name__}\.{name}: .* (depends on other parameters|evaluates its closure several times)",
        ):
            train(*wrapped(make), 4, how)
    if smp.tp_size() > 1:
        for make, how in OF_PARAMETERS:
            with pytest.raises(SMPConfigError, match=rf"{make.__name__}\.step: .*elements of it, of which"):
                train(*wrapped(make), 4, how)
    train(*wrapped(Noise), 3, "plain")


@on(PP2, SHARDED2)
def test_optimizers_of_unknown_kind_are_right_or_refused():
    refuse_or_train_rightly()


@pytest.mark.slow
@on(PP3, TP2, DP2)
def test_optimizers_of_unknown_kind_at_other_degrees():
    refuse_or_train_rightly()


@pytest.mark.slow
@on(DP2)
def test_lbfgs_works_where_nothing_is_split():
    for make in (lbfgs, searching):
        verify(make, "closure")


HALF = RankTests(1, {"bf16": True})


@on(HALF)
def test_methods_beside_step_reach_the_model_from_the_masters():
    """SAM in bf16: the climb is in the model that makes the second gradient."""
    model, optimizer = wrapped(Sharpness)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = make_batch(0)
    classification_step(model, x, y)
    optimizer.first(rho=1.0)
    climbed = {name: value.clone() for name, value in model.state_dict().items()}
    assert all(not torch.equal(climbed[name], value) for name, value in before.items())
    optimizer.zero_grad()
    classification_step(model, x, y)
    optimizer.step()
    moved = sum(float((model.state_dict()[name].double() - value.double()).norm()) for name, value in before.items())
    away = sum(float((climbed[name].double() - value.double()).norm()) for name, value in before.items())
    assert 0 < moved < away / 2  # the climb was taken back
    with pytest.raises(UnsupportedError, match="several times"):
        optimizer.step(lambda: classification_step(model, x, y).reduce_mean())


@on(DP2)
def test_sparse_adam_says_why_not():
    model = smp.DistributedModel(nn.Embedding(9, 3, sparse=True))
    with pytest.raises(SMPConfigError, match="SparseAdam takes sparse gradients, but gradients become dense"):
        smp.DistributedOptimizer(torch.optim.SparseAdam(model.parameters()))


@on(PP2)
def test_sparse_adam_works_in_a_pipeline():
    def make():
        torch.manual_seed(3)
        return nn.Sequential(nn.Embedding(9, 6, sparse=True), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()

    step = step_of(square_loss)

    def optimizers(model):
        named = [(name, p) for name, p in model.named_parameters()]
        sparse = [p for name, p in named if p.shape == (9, 6)]
        return torch.optim.SparseAdam(sparse, lr=0.1), torch.optim.SGD(
            [p for _, p in named if p.shape != (9, 6)], lr=0.1
        )

    plain, model = make(), smp.DistributedModel(make())
    pairs = [(model, [smp.DistributedOptimizer(other) for other in optimizers(model)]), (plain, optimizers(plain))]
    for number in range(3):
        tokens = torch.arange(8) % (4 + number)
        for net, ours in pairs:
            for optimizer in ours:
                optimizer.zero_grad()
            if net is plain:
                net(tokens).square().mean().backward()
            else:
                step(net, tokens)
            for optimizer in ours:
                optimizer.step()
    assert_parity(model.state_dict(), plain.state_dict(), dtype=torch.float64)
