"""Whole programs: several models, evaluation between steps, sums kept outside the step, inputs that share memory,
libraries' models, memory.
"""

from __future__ import annotations

import gc
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine_libraries import CASES
from engine_models import WIDTH, Held, Stack
from engine_runs import (
    check,
    compare,
    data,
    gradients_of,
    layout,
    outcomes,
    readable,
    wrapped,
)
from modelparallel.comm.lookout import _FRAME
from pool import run_ranks
from training import square_loss, step_of

# Two models in one step


def adversarial() -> Any:
    import modelparallel as smp

    generator = wrapped(lambda: Stack(torch.tanh, 3))
    critic = wrapped(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1)))
    optimizers = [smp.DistributedOptimizer(torch.optim.Adam(m.parameters(), lr=0.01)) for m in (generator, critic)]

    @smp.step
    def train_critic(generator: Any, critic: Any, real: Tensor, noise: Tensor) -> Any:
        with torch.no_grad():
            fake = generator(noise)
        loss = F.softplus(-critic(real)).mean() + F.softplus(critic(fake)).mean()
        critic.backward(loss)
        return loss, fake

    @smp.step
    def train_generator(generator: Any, critic: Any, noise: Tensor) -> Any:
        loss = F.softplus(-critic(generator(noise))).mean()
        generator.backward(loss)
        return loss

    results = []
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        results.append(readable(train_critic(generator, critic, data(step), data(step + 10))))
        optimizers[1].step()
        optimizers[0].zero_grad()
        results.append(readable(train_generator(generator, critic, data(step + 20))))
        gradients = {f"g.{k}": v for k, v in gradients_of(generator).items()}
        gradients |= {f"c.{k}": v for k, v in gradients_of(critic).items()}
        optimizers[0].step()
    return (results, generator.state_dict(), critic.state_dict()), gradients


@pytest.mark.parametrize("num_stages", [2, 3])
def test_two_models_with_values_flowing_between_them(num_stages: int) -> None:
    check(adversarial, num_stages)


# Tensors kept outside the step


class Counts(nn.Module):
    """Keeps plain tensors on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.seen = torch.zeros(WIDTH, dtype=torch.float64)
        self.history = torch.zeros(8, dtype=torch.float64)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.b(self.a(x)))
        self.seen += x.detach().sum(0)
        self.history[self.calls] = x.detach().norm()
        self.calls += 1
        self.last = torch.zeros(x.shape, dtype=x.dtype)
        self.last[:, 1:] = x[:, 1:]
        return self.c(x * self.seen.sigmoid() + self.last) + self.history.sum()


def accumulates() -> Any:
    import modelparallel as smp

    model = wrapped(Counts)
    totals = {"loss": torch.zeros((), dtype=torch.float64), "rows": torch.zeros(2, WIDTH, dtype=torch.float64)}

    @smp.step
    def train(model: Any, x: Tensor) -> Any:
        y = model(x)
        loss = y.square().mean()
        totals["loss"] += loss.detach()
        totals["rows"][1].add_(y.detach().mean(0))
        with torch.no_grad():
            totals["rows"][0] = totals["rows"][1] * 2
        model.backward(loss)
        return loss

    results = []
    for step in range(2):
        model.zero_grad()
        results.append(readable(train(model, data(step))))
        net = model.module
        results.append({k: v.clone() for k, v in totals.items()} | {"s": net.seen.clone(), "h": net.history.clone()})
        results.append(net.last.detach().clone())
    return results, gradients_of(model)


@pytest.mark.parametrize("num_stages", [2, 3])
def test_plain_tensors_that_outlive_the_microbatch_are_equal_on_all_stages(num_stages: int) -> None:
    check(accumulates, num_stages)


# Reads


def reads_late() -> Any:
    import modelparallel as smp

    def forward(self: Any, x: Tensor) -> Any:
        y = self.b(self.a(x))
        return self.d(self.c(y)).square().mean(), y.mean()

    model = wrapped(lambda: Held(forward))
    read: list[float] = []
    calls = [0]

    @smp.step
    def train(model: Any, x: Tensor) -> Any:
        loss, side = model(x)
        calls[0] += 1
        if calls[0] % 3 == 0:
            read.append(loss.item())
            read.append((side * 2).item())
        model.backward(loss)
        return loss

    results = [readable(train(model, data(step))) for step in range(5)]
    return (results, read), gradients_of(model)


@pytest.mark.parametrize("limit", [0, 8, 1 << 20])
def test_outputs_read_in_some_microbatches_only(limit: int) -> None:
    check(reads_late, 3, push_limit_bytes=limit)


# Evaluation, other sizes, uneven batches


def evaluates_between() -> Any:
    import modelparallel as smp

    model = wrapped(
        lambda: nn.Sequential(
            nn.Linear(WIDTH, WIDTH),
            nn.BatchNorm1d(WIDTH),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(WIDTH, WIDTH),
            nn.BatchNorm1d(WIDTH, affine=False),
            nn.Linear(WIDTH, 2),
        )
    )
    optimizer = smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    train = step_of(square_loss)

    @smp.step
    def evaluate(model: Any, x: Tensor) -> Any:
        y = model(x)
        return {"y": y, "sum": y.sum(), "top": y.argmax(-1), "n": len(x)}

    results = []
    for step, size in enumerate([6, 5, 4, 7]):
        optimizer.zero_grad()
        loss = train(model, data(step, size))
        results.append((readable(loss), float(loss.reduce_mean())))
        optimizer.step()
        model.eval()
        with torch.no_grad():
            results.append(readable(evaluate(model, data(step, 3))))
        with torch.inference_mode():
            results.append(readable(evaluate(model, data(step, 1))))
        results.append(readable(evaluate(model, data(step, 5))))
        model.train()
    return (results, model.state_dict()), gradients_of(model)


@pytest.mark.parametrize("num_stages", [2, 3])
def test_evaluation_between_training_steps_and_uneven_batches(num_stages: int) -> None:
    check(evaluates_between, num_stages)


# Inputs that share memory


def shared_inputs() -> Any:
    import modelparallel as smp

    model = wrapped(lambda: Stack(torch.tanh))
    is_first = smp.pp_rank() == 0

    @smp.step
    def train(model: Any, x: Tensor, same: Tensor, left: Tensor, right: Tensor, lot: Any) -> Any:
        x[:, 0] = 0.5  # `same` is x
        left[:, -1] *= 2.0  # overlaps `right`
        y = model(x) + model(same) * lot["again"] + right.sum()
        loss = y.square().mean() + left.sum()
        model.backward(loss)
        return loss, x.clone(), same.clone(), right.clone(), lot["again"].clone()

    results = []
    for step in range(2):
        x, wide = data(step), data(step + 5)
        if not is_first:
            x, wide = torch.zeros(4, WIDTH), torch.zeros(4, WIDTH)  # placeholders
        results.append(readable(train(model, x, x, wide[:, :-1], wide[:, 1:], {"again": x, "none": None})))
    return results, gradients_of(model)


@pytest.mark.parametrize("num_stages", [2, 3])
def test_inputs_that_share_memory_still_do_on_every_stage(num_stages: int) -> None:
    check(shared_inputs, num_stages)


# Sent, then written to


def writes_after_sending(is_training: bool) -> Any:
    import modelparallel as smp

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.a(x)
        first = self.b(x)
        x.mul_(0.5)
        second = self.b(x)  # stage 1 receives it after the first call
        x.add_(1.0)
        kept = (x > 0).to(x.dtype)
        third = self.b(kept)
        kept.zero_()
        y = self.c(x)
        fourth = self.b(y)
        y.detach().mul_(2.0)
        with torch.no_grad():
            y.unsqueeze(0).add_(1.0)
        return x + first + second + third + kept + fourth + self.d(y)

    model = wrapped(lambda: Held(forward))
    model.module.get_submodule("b").requires_grad_(False)  # or it would save its input for the backward
    model.module.b.register_forward_hook(lambda *_: time.sleep(0.05))

    @smp.step
    def evaluate(model: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x)

    train = step_of(square_loss)
    results = [readable(evaluate(model, data(step))) for step in range(2)]
    if not is_training:
        return results, {}
    return [readable(train(model, data(step))) for step in range(2)], gradients_of(model)


@pytest.mark.parametrize("is_training", [False, True])
def test_values_written_to_after_they_were_sent(is_training: bool) -> None:
    check(writes_after_sending, 2, is_training)


# Memory


def is_of_lookout(item: Tensor) -> bool:
    """Whether another rank's question will be received into it; the lookout's thread begins to listen when it likes."""
    return item.dtype is torch.uint8 and item.numel() == _FRAME


def retained() -> list[int]:
    """How many tensors (and bytes of them) live after a step, by number of steps."""
    import modelparallel as smp

    model = wrapped(lambda: Stack(lambda x: torch.relu(x) + x.mean()))
    counts = []
    gc.disable()

    @smp.step
    def train(model: Any, x: Tensor) -> Any:
        y = model(x)
        loss = y.square().mean()
        if loss.item() < 0:
            return None
        model.backward(loss)
        return loss

    for step in range(6):
        float(train(model, data(step)).reduce_mean())
        counts.append(sum(isinstance(item, Tensor) and not is_of_lookout(item) for item in gc.get_objects()))
    gc.enable()
    return counts


def test_nothing_of_a_step_stays_alive_after_it() -> None:
    for counts in run_ranks(retained, 2, parameters=layout(2)):
        assert counts[-1] <= counts[1], counts


def peak() -> tuple[int, int]:
    """(most StageTensors alive, those after the step) of a long loop in glue."""
    import modelparallel as smp
    from modelparallel.pipeline.values.stage_tensor import StageTensor

    model = wrapped(lambda: Stack(torch.tanh, 2))
    most = [0]
    gc.disable()

    @smp.step
    def train(model: Any, x: Tensor) -> Any:
        y = model(x)
        for _ in range(60):
            y = torch.tanh(y + 0.1)
        most[0] = max(most[0], sum(type(item) is StageTensor for item in gc.get_objects()))
        model.backward(y.mean())
        return None

    train(model, data(0))
    gc.enable()
    return most[0], sum(type(item) is StageTensor for item in gc.get_objects())


def test_values_of_a_step_are_freed_when_nothing_refers_to_them() -> None:
    for most, after in run_ranks(peak, 2, parameters=layout(2, push_limit_bytes=0)):
        assert most < 20 and after == 0


# Models of libraries


@pytest.mark.parametrize(("num_stages", "is_scattered"), [pytest.param(2, False, marks=pytest.mark.slow), (3, True)])
def test_models_of_libraries(num_stages: int, is_scattered: bool) -> None:
    expected = outcomes("engine_libraries", list(CASES), 1)[0]
    ranks = outcomes("engine_libraries", list(CASES), num_stages, is_scattered=is_scattered)
    for name in CASES:
        compare(name, [rank[name] for rank in ranks], expected[name])
