"""What one microbatch leaves to the next where they take turns: right, or an error that names it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine_models import WIDTH
from engine_runs import check, data, gradients_of, layout, readable, wrapped
from pool import run_ranks
from training import square_loss, step_of

SIZE = 8


class Turns(nn.Module):
    """Its stages are visited twice; ``change(self, x)`` is called in between, from the step ``since`` on."""

    def __init__(self, change: Callable[[Any, Tensor], Tensor], since: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.register_buffer("average", torch.zeros(WIDTH))
        self.total = torch.zeros(WIDTH, dtype=torch.float64)
        self.count = torch.zeros((), dtype=torch.float64)
        self.calls = 0
        self.is_on = False
        self.tail = nn.Identity()
        self.handle: Any = None
        self.step, self.since = 0, since
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            if index in (1, 3) and self.step >= self.since:
                x = self.change(self, x)
        return x


def running_sum(net: Any, x: Tensor) -> Tensor:
    net.total += x.detach().mean(0)
    return x + net.total * 0.1


def assigned_buffer(net: Any, x: Tensor) -> Tensor:
    net.average = 0.9 * net.average + 0.1 * x.detach().mean(0)
    return x + net.average


def written_buffer(net: Any, x: Tensor) -> Tensor:
    net.average.mul_(0.9).add_(x.detach().mean(0))
    return x + net.average


def counter(net: Any, x: Tensor) -> Tensor:
    net.count += 1.0
    return x * (1 + 0.1 * net.count)


def number(net: Any, x: Tensor) -> Tensor:
    net.calls += 1
    return x * (1 + 0.1 * net.calls)


def grown_buffer(net: Any, x: Tensor) -> Tensor:
    net.average = torch.cat([net.average, x.detach().mean().reshape(1)])
    return x + net.average.mean()


def flag_for_a_while(net: Any, x: Tensor) -> Tensor:
    net.is_on = not net.is_on
    return x * (1.5 if net.is_on else 0.5)


def mode_for_a_while(net: Any, x: Tensor) -> Tensor:
    net.tail.train(not net.tail.training)
    return x * (1.5 if net.tail.training else 0.5)


def forward_for_a_while(net: Any, x: Tensor) -> Tensor:
    if "forward" in vars(net.tail):
        x = net.tail(x)
        del net.tail.forward
    else:
        before = net.tail.forward
        net.tail.forward = lambda x: before(x) * 1.5
    return net.tail(x)


def hook_for_a_while(net: Any, x: Tensor) -> Tensor:
    if net.handle is None:
        net.handle = net.tail.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
        return x
    x = net.tail(x)
    net.handle.remove()
    net.handle = None
    return net.tail(x)


CHANGES = {
    function.__name__: function
    for function in (
        running_sum,
        assigned_buffer,
        written_buffer,
        counter,
        number,
        grown_buffer,
        flag_for_a_while,
        mode_for_a_while,
        forward_for_a_while,
        hook_for_a_while,
    )
}


def trained(name: str, since: int) -> Any:
    """(results and state, gradients) of five steps."""
    import modelparallel as smp
    from modelparallel.training import runtime

    model = wrapped(lambda: Turns(CHANGES[name], since))
    net = model.module
    train = step_of(square_loss)
    results = []
    for net.step in range(5):
        results.append(readable(train(model, data(net.step, SIZE))))
        results.append([net.total.clone(), net.average.clone(), net.count.clone(), net.calls])
    ways = runtime.current().engine.plans.counts
    assert smp.pp_size() == 1 or since or (ways.planned, ways.unplanned) == (0, 4), ways
    return results, gradients_of(model)


@pytest.mark.parametrize("name", list(CHANGES))
def test_state_that_shows_in_the_first_step_keeps_the_microbatches_in_order(name: str) -> None:
    check(trained, 2, name, 0, microbatches=4)


@pytest.mark.parametrize(
    "name",
    [
        "running_sum", "assigned_buffer", "written_buffer", "counter", "number", "flag_for_a_while",
        "forward_for_a_while", "hook_for_a_while",
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["simple", "interleaved", "zero_bubble"])
def test_state_that_begins_in_a_later_step_is_an_error(kind: str, name: str) -> None:
    parameters = layout(2, microbatches=4, pipeline=kind)
    failures = run_ranks(trained, 2, name, 3, parameters=parameters, return_failures=True)
    texts = [failure.summary for failure in failures]
    wanted = (
        "kept outside the step is written to while microbatches", "a value of microbatch",
        ", while other microbatches are under way",
    )  # fmt: skip
    assert all(any(part in text for part in wanted) for text in texts), texts


def writes_to_inputs() -> Any:
    """In place, from the third step on, to the parts of a batch that is split along its second axis."""
    import modelparallel as smp
    from modelparallel.training import runtime

    model = wrapped(lambda: Turns(running_sum, 99))
    net = model.module

    @smp.step(input_split_axes={"x": 1})
    def train(model: Any, x: Tensor) -> Tensor:
        y = model(x)
        if net.step >= 2:
            x *= 2.0
            x += y.detach()
            y = model(x)
        loss = y.square().mean()
        model.backward(loss)
        return loss

    results = []
    for net.step in range(4):
        x = torch.randn(3, 8, WIDTH, generator=torch.Generator().manual_seed(net.step), dtype=torch.float64)
        results.append(readable(train(model, x)))
    ways = runtime.current().engine.plans.counts
    assert smp.pp_size() == 1 or (ways.planned, ways.left) == (1, 2), ways
    return results, gradients_of(model)


def test_microbatches_may_write_to_their_parts_of_an_input() -> None:
    check(writes_to_inputs, 2, microbatches=4)


def writes_under_inference_mode() -> Any:
    import modelparallel as smp

    model = wrapped(lambda: Turns(running_sum, 99))

    @smp.step
    def evaluate(model: Any, x: Tensor, y: Tensor) -> Any:
        x[:, 0] = 0.5
        y += 1.0
        return model(x), y

    results = []
    for step in range(3):
        outside = data(step, SIZE)
        with torch.inference_mode():
            results.append(readable(evaluate(model, outside, data(step + 5, SIZE))))
    return results, {}


def test_inputs_may_be_written_to_under_inference_mode() -> None:
    check(writes_under_inference_mode, 2, microbatches=2)


def writes_in_the_trace() -> Any:
    import modelparallel as smp

    torch.manual_seed(1)
    model = smp.DistributedModel(Turns(running_sum, 99).double())

    @smp.step
    def train(model: Any, x: Tensor, same: Tensor) -> Any:
        x *= 0.5
        loss = model(x).square().mean()
        model.backward(loss)
        return loss, same.clone()

    x = data(0, SIZE)
    return readable(train(model, x, x)), {}


def test_what_the_trace_writes_to_its_inputs_is_gone_after_it() -> None:
    check(writes_in_the_trace, 2, auto_partition=True)


def hook_once(net: Any, x: Tensor) -> Tensor:
    if not net.is_on:
        net.is_on = True
        net.layers[4].register_forward_hook(lambda module, args, output: output * 1.5)
    return x


def hooks_in_the_trace() -> Any:
    import modelparallel as smp

    torch.manual_seed(1)
    model = smp.DistributedModel(Turns(hook_once, 0).double())

    @smp.step
    def train(model: Any, x: Tensor) -> Any:
        loss = model(x).square().mean()
        model.backward(loss)
        return loss

    return [readable(train(model, data(step, SIZE))) for step in range(2)], gradients_of(model)


def test_hooks_that_the_trace_registers_are_gone_after_it() -> None:
    check(hooks_in_the_trace, 2, auto_partition=True)


class Normed(nn.Module):
    """Calls a BatchNorm, from the step ``since`` on once more after the other stage was visited."""

    def __init__(self, since: int) -> None:
        super().__init__()
        self.first, self.norm, self.second, self.third = (
            nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH),
        )  # fmt: skip
        self.step, self.since = 0, since

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.norm(self.first(x)))
        return self.third(self.norm(x) if self.step >= self.since else x)


def normed(since: int) -> Any:
    import modelparallel as smp
    from modelparallel.training import runtime

    model = wrapped(lambda: Normed(since))
    net = model.module
    train = step_of(square_loss)
    results = [readable(train(model, data(net.step, SIZE))) for net.step in range(4)]
    ways = runtime.current().engine.plans.counts
    assert smp.pp_size() == 1 or (ways.planned, ways.unplanned) == ((0, 3) if since == 0 else (3, 0)), ways
    return (results, model.state_dict()), gradients_of(model)


@pytest.mark.parametrize("since", [0, 99])
def test_running_statistics_see_the_microbatches_in_order(since: int) -> None:
    check(normed, 2, since, microbatches=4)


def test_a_second_call_that_begins_later_is_an_error_where_it_would_change_running_statistics() -> None:
    failures = run_ranks(normed, 2, 2, parameters=layout(2, microbatches=4), return_failures=True)
    assert all("module 'norm' changes its buffers" in failure.summary for failure in failures), failures
