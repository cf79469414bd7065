"""What leaves a module other than by its return value: hooks, recorders, attributes, lists, numbers.

Every kind is a small script: a model whose blocks keep something, and a step that reads it. A script runs on one stage
and on several, in training and evaluation, and gives the same everywhere.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine_runs import assert_equal_results, readable, scatter
from modelparallel.errors import StepUsageError
from pool import run_ranks

WIDTH = 6
SEEN: dict[Any, Any] = {}
LIST: list[Any] = []


class Meter:
    def __init__(self) -> None:
        self.total = 0.0
        self.values: list[Any] = []

    def update(self, value: float) -> None:
        self.total += value
        self.values.append(value)


METER = Meter()


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.act = nn.Tanh()
        self.keep: Callable[[Any, Tensor], Any] | None = None
        self.noted: Any = None
        self.count = 0
        self.average = torch.zeros(WIDTH, dtype=torch.float64)
        self.history: list[Any] = []
        self.recent: collections.deque[Any] = collections.deque(maxlen=2)
        self.table: dict[str, Any] = {"runs": []}
        self.meter = Meter()

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.act(self.up(x)))
        if self.keep is not None:
            changed = self.keep(self, y)
            y = y if changed is None else changed
        return y


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), Inner()
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.inner(self.norm(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


@dataclass(frozen=True)
class Script:
    """``install(net, when)`` is called before the model is wrapped and after it; ``read(net)`` adds to the loss."""

    read: Callable[[Net], Any]
    keep: Callable[[Inner, Tensor], Any] | None = None
    install: Callable[[Net, str], None] | None = None


def each(net: Net, read: Callable[[Inner], Any]) -> Any:
    return sum(read(block.inner) for block in net.blocks)


def seen(net: Net) -> Any:
    assert SEEN, "nothing was kept"
    return sum((value.square().mean() for value in SEEN.values()), torch.zeros((), dtype=torch.float64))


def put(key: Any, value: Any) -> None:
    SEEN[key] = value


def hooks(register: Callable[[nn.Module, int], Any], where: Callable[[Block], nn.Module], wanted: str) -> Any:
    def install(net: Net, when: str) -> None:
        if when == wanted:
            for index, block in enumerate(net.blocks):
                register(where(block), index)

    return install


def forward_hook(module: nn.Module, index: int) -> Any:
    return module.register_forward_hook(lambda m, a, out: put(index, out))


def detaching_hook(module: nn.Module, index: int) -> Any:
    return module.register_forward_hook(lambda m, a, out: put(index, out.detach()))


def number_hook(module: nn.Module, index: int) -> Any:
    return module.register_forward_hook(lambda m, a, out: put(index, torch.tensor(out.norm().item()).double()))


def pre_hook(module: nn.Module, index: int) -> Any:
    return module.register_forward_pre_hook(lambda m, a: put(index, a[0]))


def keyword_hook(module: nn.Module, index: int) -> Any:
    return module.register_forward_hook(lambda m, a, k, out: put(index, (out * 2, a)[0]), with_kwargs=True)


def changing_hook(module: nn.Module, index: int) -> Any:
    put(index, torch.ones(1, dtype=torch.float64))
    return module.register_forward_hook(lambda m, a, out: out * 1.1 + 0.01 * index)


def noisy_hook(module: nn.Module, index: int) -> Any:
    put(index, torch.ones(1, dtype=torch.float64))
    return module.register_forward_hook(lambda m, a, out: out + 0.01 * torch.rand(out.shape, dtype=out.dtype))


def partial_hook(module: nn.Module, index: int) -> Any:
    def hook(number: int, m: nn.Module, args: Any, out: Tensor) -> None:
        put(number, out)

    return module.register_forward_hook(functools.partial(hook, index))


def recorder(module: nn.Module, index: int) -> None:
    original = module.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        put(index, out)
        return out

    module.forward = forward


def keep_average(inner: Inner, y: Tensor) -> Tensor:
    inner.average = 0.9 * inner.average + 0.1 * y.detach().mean(0)
    return y + inner.average


def keep_average_in_place(inner: Inner, y: Tensor) -> Tensor:
    inner.average.mul_(0.9).add_(0.1 * y.detach().mean(0))
    return y + inner.average


def keep_recent(inner: Inner, y: Tensor) -> Tensor:
    inner.recent.append(y.detach().mean(0))
    return y + torch.stack(list(inner.recent)).mean(0)


def set_noted(change: Callable[[Tensor], Any]) -> Callable[[Inner, Tensor], None]:
    def keep(inner: Inner, y: Tensor) -> None:
        inner.noted = change(y)

    return keep


def keep_count(inner: Inner, y: Tensor) -> None:
    inner.count += 1


def keep_table(inner: Inner, y: Tensor) -> None:
    inner.table["mean"] = y.mean()
    inner.table["runs"].append(y.std())


def block_of(block: Block) -> nn.Module:
    return block


def linear_of(block: Block) -> nn.Module:
    return block.inner.up


def act_of(block: Block) -> nn.Module:
    return block.inner.act


def dropout_of(block: Block) -> nn.Module:
    return block.drop


SCRIPTS = {
    "hook on blocks": Script(seen, None, hooks(forward_hook, block_of, "before")),
    "hook on blocks, later": Script(seen, None, hooks(forward_hook, block_of, "after")),
    "hook on layers": Script(seen, None, hooks(forward_hook, linear_of, "before")),
    "hook on activations": Script(seen, None, hooks(forward_hook, act_of, "after")),
    "hook on dropouts": Script(seen, None, hooks(detaching_hook, dropout_of, "after")),
    "detaching hook": Script(seen, None, hooks(detaching_hook, block_of, "after")),
    "numbers by a hook": Script(seen, None, hooks(number_hook, linear_of, "before")),
    "hook before": Script(seen, None, hooks(pre_hook, block_of, "before")),
    "hook before layers": Script(seen, None, hooks(pre_hook, linear_of, "after")),
    "hook with keywords": Script(seen, None, hooks(keyword_hook, block_of, "before")),
    "hook that changes": Script(seen, None, hooks(changing_hook, block_of, "before")),
    "hook that changes inside": Script(seen, None, hooks(changing_hook, linear_of, "after")),
    "random hook": Script(seen, None, hooks(noisy_hook, linear_of, "after")),
    "partial hook": Script(seen, None, hooks(partial_hook, block_of, "before")),
    "recorder on blocks": Script(seen, None, hooks(recorder, block_of, "after")),
    "recorder on blocks, before": Script(seen, None, hooks(recorder, block_of, "before")),
    "recorder on layers": Script(seen, None, hooks(recorder, linear_of, "after")),
    "recorder on layers, before": Script(seen, None, hooks(recorder, linear_of, "before")),
    "attribute": Script(lambda net: each(net, lambda m: m.noted), set_noted(lambda y: y.square().mean())),
    "detached attribute": Script(lambda net: each(net, lambda m: m.noted.std()), set_noted(lambda y: y.detach())),
    "number in an attribute": Script(lambda net: each(net, lambda m: m.noted), set_noted(lambda y: y.norm().item())),
    "tuple in an attribute": Script(
        lambda net: each(net, lambda m: m.noted[0] * m.noted[1]["b"]), set_noted(lambda y: (y.mean(), {"b": 3.0}))
    ),
    "counter": Script(lambda net: 0.1 * each(net, lambda m: m.count), keep_count),
    "running average": Script(lambda net: each(net, lambda m: m.average.sum()), keep_average),
    "running average in place": Script(lambda net: each(net, lambda m: m.average.sum()), keep_average_in_place),
    "list": Script(lambda net: each(net, lambda m: sum(m.history)), lambda m, y: m.history.append(y.abs().mean())),
    "numbers in a list": Script(
        lambda net: each(net, lambda m: m.history[-1]), lambda m, y: m.history.append(y.abs().mean().item())
    ),
    "deque": Script(lambda net: each(net, lambda m: m.recent[-1].sum()), keep_recent),
    "dictionary": Script(lambda net: each(net, lambda m: m.table["mean"] + m.table["runs"][-1]), keep_table),
    "object": Script(
        lambda net: each(net, lambda m: m.meter.total + m.meter.values[-1]),
        lambda m, y: m.meter.update(y.mean().item()),
    ),
    "global list": Script(lambda net: sum(LIST), lambda m, y: LIST.append(y.square().mean())),
    "global object": Script(lambda net: METER.values[-1], lambda m, y: METER.update(y.norm().item())),
}


def run_script(name: str) -> dict[str, Any]:
    """One script in this process: its losses and outputs, in training and evaluation, and the weights after it."""
    import modelparallel as smp

    script = SCRIPTS[name]
    SEEN.clear()
    LIST.clear()
    METER.__init__()
    torch.manual_seed(3)
    net = Net().double()
    for block in net.blocks:
        block.inner.keep = script.keep
    if script.install is not None:
        script.install(net, "before")
    model = smp.DistributedModel(net)
    if script.install is not None:
        script.install(net, "after")
    if smp.pp_size() > 1:
        scatter(model)
    optimizer = smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))

    def clear() -> None:
        for block in net.blocks:
            block.inner.history.clear()
        LIST.clear()

    @smp.step
    def train(model: Any, x: Tensor, y: Tensor) -> Any:
        clear()
        loss = F.cross_entropy(model(x), y)
        loss = loss + 0.1 * script.read(net) * loss
        model.backward(loss)
        return loss

    @smp.step
    def evaluate(model: Any, x: Tensor) -> Any:
        clear()
        out = model(x)
        return out, script.read(net)

    results: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(1)
    for index in range(3):
        x = torch.randn(6, WIDTH, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (6,), generator=generator)
        optimizer.zero_grad()
        model.train()
        results[f"loss {index}"] = readable(train(model, x, y))
        optimizer.step()
        if index < 2:
            model.eval()
            with torch.no_grad():
                results[f"evaluated {index}"] = readable(evaluate(model, x))
    results["weights"] = dict(sorted(model.state_dict().items()))
    return results


def run_scripts(names: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        try:
            found[name] = run_script(name)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def parameters(num_stages: int, **more: Any) -> dict[str, Any]:
    manual = {"auto_partition": False, "default_partition": 0} if num_stages > 1 else {}
    return {
        "microbatches": 2,
        "seed": 5,
        "timeout_seconds": 20,
        "pipeline_parallel_degree": num_stages,
        **manual,
        **more,
    }


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    found = run_ranks(run_scripts, 1, list(SCRIPTS), parameters=parameters(1))[0]
    assert not [text for text in found.values() if isinstance(text, str)], found
    return found


@pytest.mark.parametrize("num_stages", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_what_leaves_by_a_side_door_is_right(num_stages: int, one_process: dict[str, Any]) -> None:
    ranks = run_ranks(run_scripts, num_stages, list(SCRIPTS), parameters=parameters(num_stages), timeout=300)
    failures = {}
    for rank, found in enumerate(ranks):
        for name, results in found.items():
            try:
                assert not isinstance(results, str), results
                assert_equal_results(results, one_process[name], f"{name} on pp_rank {rank}")
            except AssertionError as error:
                failures[name, rank] = str(error)[:600]
    assert not failures, "\n".join(f"{key}: {text}" for key, text in failures.items())


class Box:
    """An object that the library does not look into."""

    __slots__ = ("value",)
    value: Any


BOX = Box()


def unseen(has_graph: bool) -> list[str]:
    """What the step says where a module puts a tensor where nobody follows it."""
    import modelparallel as smp

    torch.manual_seed(3)
    net = Net().double()
    for block in net.blocks:
        block.inner.keep = lambda inner, y: setattr(BOX, "value", y.mean() if has_graph else y.detach().mean())
    model = smp.DistributedModel(net)
    scatter(model)
    BOX.value = torch.zeros((), dtype=torch.float64)

    @smp.step
    def train(model: Any, x: Tensor) -> Any:
        loss = model(x).square().mean()
        loss = loss * BOX.value
        model.backward(loss)
        return loss

    try:
        train(model, torch.randn(4, WIDTH, dtype=torch.float64))
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    return ["no error"]


def test_what_nobody_follows_is_an_error_in_the_first_step() -> None:
    for text in run_ranks(unseen, 2, False, parameters=parameters(2)):
        assert "operation mul at test_side_doors.py" in text[0], text
        assert "keep it in an attribute of the module" in text[0]
    for text in run_ranks(unseen, 2, True, parameters=parameters(2)):
        assert "computed with the parameter 'blocks." in text[0], text


def unseen_numbers(is_training: bool) -> list[str]:
    """What the step says where the modules put a number each where nobody follows it, so that every stage has as many
    as it has modules: the loss is known on every stage, which adds them by itself.
    """
    import modelparallel as smp

    torch.manual_seed(3)
    net = Net().double()
    for block in net.blocks:
        block.inner.keep = lambda inner, y: BOX.value.append(float(y.detach().mean()))
    model = smp.DistributedModel(net)
    smp.set_partition(net.blocks[-1], 1)

    @smp.step
    def run(model: Any, x: Tensor) -> Any:
        BOX.value = []
        loss = model(x).square().mean()
        for number in BOX.value:
            loss = loss + number
        if is_training:
            model.backward(loss)
        return loss

    try:
        with torch.set_grad_enabled(is_training):
            run(model, torch.randn(4, WIDTH, dtype=torch.float64))
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    return ["no error"]


@pytest.mark.parametrize("is_training", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_how_many_numbers_nobody_follows_is_compared_too(is_training: bool) -> None:
    where = "model.backward" if is_training else "the output of the step function"
    for text in run_ranks(unseen_numbers, 2, is_training, parameters=parameters(2)):
        assert f"DivergenceError: {where} at test_side_doors.py" in text[0], text


def read_after_the_step() -> list[str]:
    """Values that hooks have kept, read when the step is over: a number is right, a tensor says what to do."""
    import modelparallel as smp

    torch.manual_seed(3)
    net = Net().double()
    model = smp.DistributedModel(net)
    scatter(model)
    kept: dict[str, Any] = {}
    net.blocks[0].register_forward_hook(lambda m, a, out: kept.update(tensor=out, number=out.norm().item()))

    @smp.step
    def train(model: Any, x: Tensor) -> Any:
        loss = model(x).square().mean()
        model.backward(loss)
        return loss

    train(model, torch.randn(4, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    with pytest.raises(StepUsageError, match="after the step has ended"):
        kept["tensor"].sum()
    return [kept["number"]]


def test_what_was_kept_is_read_after_the_step() -> None:
    first, second = run_ranks(read_after_the_step, 2, parameters=parameters(2))
    assert first == second
