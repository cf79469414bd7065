"""Random programs as data, and the module that runs them.

A :class:`Program` says which modules there are, where they are placed, what ``forward`` does with them, and which steps
run. All values have the shape (samples, length, WIDTH), so that any operation fits any value. Indices are taken modulo
what there is, so that every program is valid and a smaller one is again a program.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine_runs import Outcome, readable

WIDTH = 4


@dataclass(frozen=True)
class Op:
    """One line of a forward: ``a`` and ``b`` choose values, ``k`` a variant; run from the step ``since`` on."""

    kind: str
    a: int = 0
    b: int = 0
    k: int = 0
    since: int = 0
    inner: tuple[Op, ...] = ()


@dataclass(frozen=True)
class Step:
    """``mode``: "train", "forward" (training mode, no backward), "eval", "no_grad" or "inference"."""

    mode: str = "train"
    num_samples: int = 4
    length: int = 2


@dataclass(frozen=True)
class Program:
    """See the head of this file. ``homes``: stages of the units, in turn. ``output``: in what form values come back."""

    seed: int = 0
    units: tuple[str, ...] = ("linear", "linear")
    inner_units: tuple[str, ...] = ("linear",)
    homes: tuple[int, ...] = (0, 1)
    ops: tuple[Op, ...] = ()
    inner_ops: tuple[Op, ...] = ()
    steps: tuple[Step, ...] = (Step(), Step(), Step())
    frozen: tuple[int, ...] = ()
    output: int = 0
    num_losses: int = 1

    @property
    def has_late_state(self) -> bool:
        """Whether something is carried from microbatch to microbatch that the first step may not have shown."""
        pending = [*self.ops, *self.inner_ops]
        while pending:
            op = pending.pop()
            if op.kind in STATE_OPS and (op.since or op in self.inner_ops):
                return True
            if op.inner and any(inner.kind in STATE_OPS for inner in op.inner):
                return True
            pending.extend(op.inner)
        return False


# Modules


@dataclass
class Pair:
    left: Tensor
    right: Any = None
    name: str = "pair"


class Block(nn.Module):
    """Several layers, with code between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.unused = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(torch.tanh(self.first(x)))
        y[:, 0] = 0.5
        return x + self.second(y)


class Norm(nn.Module):
    """BatchNorm over the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, 1)).view_as(x)


class Returns(nn.Module):
    """A linear layer that returns its output in some form."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.4)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        y = x @ self.weight
        if self.form == "tuple":
            return y, y.sum(-1), None
        if self.form == "dict":
            return {"y": y, "n": x.shape[0], "x": x, "view": y[:, :1]}
        if self.form == "dataclass":
            return Pair(y, [y.detach()])
        if self.form == "rows":
            return y[y.sum(-1) > 0]
        return [y, y.view(-1)]


class Writes(nn.Module):
    """Writes to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mul_(0.5))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        states, last = self.rnn(x)
        return states + last[0].unsqueeze(1)


UNITS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "no_bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "sequential": lambda: nn.Sequential(nn.Linear(WIDTH, 6), nn.GELU(), nn.Linear(6, WIDTH)),
    "layer_norm": lambda: nn.LayerNorm(WIDTH),
    "batch_norm": Norm,
    "dropout": lambda: nn.Dropout(0.3),
    "inplace_relu": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True)),
    "block": Block,
    "attention": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 6, dropout=0.2, batch_first=True),
    "recurrent": Recurrent,
    "tuple": lambda: Returns("tuple"),
    "dict": lambda: Returns("dict"),
    "dataclass": lambda: Returns("dataclass"),
    "list": lambda: Returns("list"),
    "rows": lambda: Returns("rows"),
    "writes": Writes,
    "tied": lambda: nn.Linear(WIDTH, WIDTH),
}


def call_unit(unit: nn.Module, x: Tensor) -> Tensor:
    """The output of a unit as one value, whatever it returns."""
    found = unit(x)
    if isinstance(found, tuple):
        return found[0] + found[1].unsqueeze(-1) * 0.1
    if isinstance(found, dict):
        assert found["n"] == x.shape[0]
        return found["y"] + found["x"] + found["view"]
    if isinstance(found, Pair):
        return found.left - found.right[0] * len(found.name)
    if isinstance(found, list):
        return found[0] + found[1].view_as(found[0])
    if isinstance(unit, Returns):
        return x + found.sum(0)
    result: Tensor = found
    return result


# Operations between modules


class Run:
    """One run of a list of operations."""

    def __init__(self, model: Fuzzed, values: list[Tensor], x: Tensor) -> None:
        self.model = model
        self.values = values
        self.x = x
        self.views: list[Tensor] = []
        self.step = (model.outer[0] if model.outer else model).step

    def value(self, index: int) -> Tensor:
        return self.values[index % len(self.values)]

    def unit(self, index: int) -> nn.Module:
        units = self.model.units
        return units[index % len(units)]

    def weight(self, index: int) -> Tensor:
        weights = [p for p in self.model.parameters() if p.shape == (WIDTH, WIDTH)]
        return weights[index % len(weights)] if weights else torch.eye(WIDTH, dtype=self.x.dtype)

    def run(self, ops: tuple[Op, ...]) -> None:
        for op in ops:
            if self.step >= op.since:
                made = OPS[op.kind](self, op)
                if made is not None:
                    self.values.append(made)


def write(run: Run, op: Op, target: Tensor) -> Tensor:
    """Write to ``target`` in place; the one that is to be used afterwards."""
    other, k = run.value(op.b), op.k % 12
    if k == 0:
        target.mul_(0.5)
    elif k == 1:
        target += other
    elif k == 2:
        target[:, 0] = other[:, -1]
    elif k == 3:
        target[..., :2] += other[..., 2:]
    elif k == 4:
        target.view(-1)[::3].mul_(2.0)
    elif k == 5:
        target.clamp_(-1, 1)
    elif k == 6:
        target.relu_()
    elif k == 7:
        target.masked_fill_(other.detach() > 0, 0.3)
    elif k == 8:
        target = F.dropout(target, 0.2, inplace=True)
    elif k == 9:
        target.transpose(1, 2)[:, 0].add_(other[:, :, 1])
    elif k == 10:
        target.copy_(other)
    else:
        with torch.no_grad():
            target.unsqueeze(0).add_(1.0)
    return target


def take_view(run: Run, op: Op) -> None:
    value = run.value(op.a)
    kinds: list[Callable[[], Tensor]] = [
        lambda: value[:, 0], lambda: value[..., :2], lambda: value.view(-1)[::2], lambda: value.transpose(0, 1),
        lambda: value.narrow(2, 1, 2), lambda: value[0], lambda: value.view(value.shape), lambda: value.detach(),
    ]  # fmt: skip
    run.views.append(kinds[op.k % len(kinds)]())


def write_view(run: Run, op: Op) -> None:
    if run.views:
        view = run.views[op.a % len(run.views)]
        k = op.k % 4
        if k == 0:
            view.mul_(0.5)
        elif k == 1:
            view.add_(run.value(op.b).mean())
        elif k == 2:
            view.zero_()
        else:
            view += 1.0


def use_view(run: Run, op: Op) -> Tensor:
    value = run.value(op.b)
    return value + run.views[op.a % len(run.views)].mean() if run.views else value * 1.0


def into_plain(run: Run, op: Op) -> Tensor:
    first, second = run.value(op.a), run.value(op.b)
    collected = torch.zeros(2, *run.x.shape, dtype=run.x.dtype)
    collected[0] = first
    row = collected[1]
    row += second * 0.5
    if op.k % 2:
        return collected.sum(0)
    with torch.no_grad():
        out = torch.add(first, second, out=torch.empty(run.x.shape, dtype=run.x.dtype))
    return collected[1] - out


def choose(run: Run, op: Op) -> None:
    k = op.k % 5
    if k == 0:
        condition = run.value(op.a).mean().item() > 0
    elif k == 1:
        condition = bool(run.value(op.a).sum() > run.value(op.b).sum())
    elif k == 2:
        condition = bool(run.x[0, 0, 0] > 0)
    elif k == 3:
        condition = run.step % 3 == 1
    else:
        condition = run.step >= 2
    half = (len(op.inner) + 1) // 2
    run.run(op.inner[:half] if condition else op.inner[half:])


def repeat(run: Run, op: Op) -> None:
    times = int(run.value(op.a).detach().abs().sum() * 10) % 3 if op.k % 2 else run.step % 3
    for _ in range(times):
        run.run(op.inner)


def region(run: Run, op: Op) -> Tensor:
    """Recomputed in the backward; without a pipeline, in one process, an ordinary call."""
    import modelparallel as smp

    outside, half = run.value(op.b), (len(op.inner) + 1) // 2

    def part(ops: tuple[Op, ...], value: Tensor) -> Tensor:
        # What happens in a region must not be seen outside: it happens twice.
        own = Run(run.model, [outside * 0.5, value * 1.0], run.x)
        own.run(ops)
        return own.values[-1] + own.values[0]

    def whole(value: Tensor) -> Tensor:
        if op.k % 3:
            return part(op.inner, value)
        return part(op.inner[half:], recomputed(part, op.inner[:half], value))

    def recomputed(function: Callable[..., Tensor], *args: Any) -> Tensor:
        found: Tensor = function(*args) if smp.pp_size() == 1 else checkpoint(function, *args, use_reentrant=False)
        return found

    return recomputed(whole, run.value(op.a))


def arithmetic(run: Run, op: Op) -> Tensor:
    a, b, k = run.value(op.a), run.value(op.b), op.k % 10
    if k == 0:
        return a + b
    if k == 1:
        return torch.tanh(a * b)
    if k == 2:
        return torch.lerp(a, b, 0.3)
    if k == 3:
        return torch.cat([a, b], -1).chunk(2, -1)[op.k // 10 % 2] * 0.7
    if k == 4:
        return a * b.mean(-1, keepdim=True).sigmoid()
    if k == 5:
        return torch.stack([a, b]).max(0).values
    if k == 6:
        return torch.where(a > b, a, b * 0.5)
    if k == 7:
        return torch.einsum("ijk,ilk->ijl", a, b).softmax(-1) @ a
    if k == 8:
        return a - b.detach()
    return a.sub(b, alpha=0.5).clamp(-2, 2)


def reshaped(run: Run, op: Op) -> Tensor:
    a, k = run.value(op.a), op.k % 8
    if k == 0:
        return torch.tanh(a.transpose(1, 2)).transpose(1, 2)
    if k == 1:
        return a.reshape(a.shape[0], -1).flip(1).view_as(a)
    if k == 2:
        return a.view(-1, 2).sum(1, keepdim=True).expand(-1, 2).reshape(a.shape)
    if k == 3:
        return a.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    if k == 4:
        return F.layer_norm(a, (WIDTH,))
    if k == 5:
        return F.gelu(a) + a.norm()
    if k == 6:
        return a.roll(1, -1) / (1 + a.abs().sum(-1, keepdim=True))
    return a.float().double() * 1.0


def known(run: Run, op: Op) -> Tensor:
    a, k = run.value(op.a), op.k % 6
    if k == 0:
        return a * torch.arange(WIDTH, dtype=a.dtype)
    if k == 1:
        return a + run.x
    if k == 2:
        return a + a.sum().item() * 0.01
    if k == 3:
        return a * (1 + len((a > 0).nonzero()) * 0.1)
    if k == 4:
        with torch.no_grad():
            return a * 0.5 + run.value(op.b)
    made = run.unit(0)(a.detach() * 1.0)  # may well return something else than a tensor
    return made.detach().requires_grad_() * 1.0 if isinstance(made, Tensor) and made.shape == a.shape else a * 1.0


def weights(run: Run, op: Op) -> Tensor:
    a, weight, k = run.value(op.a), run.weight(op.b), op.k % 4
    if k == 0:
        return F.linear(a, weight)
    if k == 1:
        return a + weight.norm() * 0.1
    if k == 2:
        return a * weight[0]
    return a @ (weight + run.weight(op.b + 1)).T * 0.5


def noise(run: Run, op: Op) -> Tensor:
    a, k = run.value(op.a), op.k % 4
    if k == 0:
        return F.dropout(a, 0.3, run.model.training)
    if k == 1:
        return a + torch.rand_like(a) * 0.1
    if k == 2:
        return a * (1 + 0.1 * torch.rand(WIDTH, dtype=a.dtype))
    return a * random.uniform(0.5, 1.5)


def into_sum(run: Run, op: Op) -> Tensor | None:
    """Sums kept in a plain tensor on the module."""
    import modelparallel as smp

    model = run.model
    if smp.is_tracing():
        return run.value(op.b) * 1.0  # what is no buffer would keep what the trace adds to it
    with torch.no_grad():
        if op.k % 2:
            model.plain[1].add_(run.value(op.a).detach().mean())
        else:
            model.plain += run.value(op.a).detach().mean()
    return run.value(op.b) + model.plain.sum() * 0.1 if op.k % 3 else None


def into_buffer(run: Run, op: Op) -> Tensor | None:
    model = run.model
    mean = run.value(op.a).detach().mean((0, 1))
    if op.k % 2:
        model.average = 0.9 * model.average + 0.1 * mean
    else:
        with torch.no_grad():
            model.average.mul_(0.9).add_(mean, alpha=0.1)
    return run.value(op.b) + model.average if op.k % 3 else None


def keep(run: Run, op: Op) -> None:
    run.model.kept = run.value(op.a).detach() if op.k % 2 else run.value(op.a)


def log(run: Run, op: Op) -> None:
    import modelparallel as smp

    number = run.value(op.a).mean().item()
    if not smp.is_tracing():
        run.model.logs.setdefault(repr(op), []).append(number)


def count(run: Run, op: Op) -> Tensor:
    """Numbers and plain tensors that only Python and the glue know."""
    import modelparallel as smp

    model = run.model
    if op.k % 2:
        model.calls += 0 if smp.is_tracing() else 1  # the trace would count once more on one stage
        return run.value(op.a) * (1 + model.calls % 3)
    if not smp.is_tracing():
        model.ticks[op.k % 3] += 1
    return run.value(op.a) * (1 + model.ticks.sum())


def nested(run: Run, op: Op) -> Tensor:
    if run.model.inner is None:
        return run.value(op.a) * 1.0
    found: Tensor = run.model.inner(run.value(op.a), run.value(op.b))
    return found


OPS: dict[str, Callable[[Run, Op], Tensor | None]] = {
    "unit": lambda run, op: call_unit(run.unit(op.k), run.value(op.a)),
    "unused": lambda run, op: (call_unit(run.unit(op.k), run.value(op.a)), None)[1],
    "arithmetic": arithmetic,
    "reshaped": reshaped,
    "known": known,
    "weights": weights,
    "noise": noise,
    "clone_write": lambda run, op: write(run, op, run.value(op.a).clone()),
    "write": lambda run, op: write(run, op, run.value(op.a)),
    "into_plain": into_plain,
    "take_view": take_view,
    "write_view": write_view,
    "use_view": use_view,
    "choose": choose,
    "repeat": repeat,
    "region": region,
    "nested": nested,
    "log": log,
    "into_sum": into_sum,
    "into_buffer": into_buffer,
    "keep": keep,
    "count": count,
}
STATE_OPS = ("into_sum", "into_buffer", "keep", "count")
COMPOUND_OPS = ("choose", "repeat", "region")


class Fuzzed(nn.Module):
    """Runs a list of operations on its units; ``inner``, if there is one, runs another."""

    def __init__(self, units: tuple[str, ...], ops: tuple[Op, ...], inner: Fuzzed | None = None) -> None:
        super().__init__()
        self.units = nn.ModuleList(UNITS[name]() for name in units)
        tied = [unit for name, unit in zip(units, self.units, strict=True) if name == "tied"]
        for unit in tied[1:]:
            unit.weight = tied[0].weight
        self.inner = inner
        self.ops = ops
        self.register_buffer("average", torch.zeros(WIDTH))
        self.plain = torch.zeros(2, dtype=torch.float64)
        self.ticks = torch.zeros(3, dtype=torch.float64)
        self.kept: Any = None
        self.logs: dict[str, list[float]] = {}
        self.calls = 0
        self.step = 0
        self.outer: list[Fuzzed] = []
        if inner is not None:
            inner.outer = [self]
            self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        run = Run(self, [x, call_unit(self.units[-1], x)] if y is None else [x, y], x)
        run.run(self.ops)
        return run.values[-1] if self.outer else run.values


# Running


def batch_of(program: Program, index: int) -> Tensor:
    step = program.steps[index]
    generator = torch.Generator().manual_seed(program.seed * 100 + index)
    return torch.randn(step.num_samples, step.length, WIDTH, generator=generator, dtype=torch.float64)


def make_model(program: Program) -> Fuzzed:
    torch.manual_seed(program.seed)
    inner = Fuzzed(program.inner_units, program.inner_ops)
    # With one layer at least, or the model would be one unit and run on one stage, attributes and all.
    model = Fuzzed(("linear", *program.units), program.ops, inner)
    for index in program.frozen:
        model.units[index % len(model.units)].requires_grad_(False)
    return model.double()


def place(model: Any, homes: tuple[int, ...]) -> None:
    """Units in turn on the stages ``homes``; what shares a parameter stays together."""
    import modelparallel as smp
    from modelparallel.partitioning import find_units

    placed: dict[int, int] = {}
    modules = dict(model.module.named_modules())
    for index, name in enumerate(find_units(model.module)):
        parameters = list(modules[name].parameters())
        home = next((placed[id(p)] for p in parameters if id(p) in placed), homes[index % len(homes)] % smp.pp_size())
        placed.update((id(p), home) for p in parameters)
        smp.set_partition(modules[name], home)


def body(program: Program, model: Any, x: Tensor, *, has_backward: bool) -> Any:
    """One microbatch."""
    values = model(x)
    gained = torch.tanh(values[-1] * model.module.gain)
    losses = [gained.square().mean()]
    if program.num_losses > 1:
        # A graph of its own, since without a pipeline each backward frees its graph.
        losses.append((torch.tanh(model.module.inner(x, x)) * model.module.gain).mean())
    if has_backward:
        for loss in losses:
            model.backward(loss)
    results: list[Any] = [
        lambda: losses[0],
        lambda: {"loss": losses, "last": values[-1], "n": len(x), "none": None},
        lambda: (Pair(values[-1], values[0], f"{losses[0].item():.6f}"), gained.argmax(-1)),
        lambda: (losses[0].item(), [value.sum() for value in values], values[-1][:, 0]),
    ]
    return results[program.output % len(results)]()


def run_program(program: Program, *, is_placed: bool) -> Outcome:
    """All steps of a program in this process, as a user's script would do it."""
    import modelparallel as smp
    from modelparallel.training import runtime

    outcome = Outcome()
    start = time.perf_counter()
    torch.manual_seed(program.seed)
    random.seed(program.seed)
    try:
        model = smp.DistributedModel(make_model(program).train())
        net = model.module
        for unit in net.units:
            if isinstance(unit, Returns) and unit.form == "rows":
                smp.dynamic(unit)
        for unit in net.inner.units:
            if isinstance(unit, Returns) and unit.form == "rows":
                smp.dynamic(unit)
        if is_placed and smp.pp_size() > 1:
            place(model, program.homes)
        optimizer = smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9))
        train = smp.step(lambda model, x: body(program, model, x, has_backward=True))
        forward = smp.step(lambda model, x: body(program, model, x, has_backward=False))
        engine = runtime.current().engine
        plans = engine.plans
        plans.counts = type(plans.counts)()
        for index, step in enumerate(program.steps):
            x = batch_of(program, index)
            net.step = index
            # Without a pipeline random operations are looked for in the first step of a kind only.
            engine.kinds_without_random_glue.clear()
            if step.mode == "train":
                optimizer.zero_grad()
                outcome.results.append(readable(train(model, x)))
                for name, parameter in model.local_named_parameters():
                    if parameter.grad is not None:
                        outcome.gradients[f"{index}.{name}"] = parameter.grad.clone()
                optimizer.step()
                continue
            model.train(step.mode == "forward")
            with torch.inference_mode(step.mode == "inference"), torch.set_grad_enabled(step.mode != "no_grad"):
                outcome.results.append(readable(forward(model, x)))
            model.train()
        outcome.results.append([net.plain.clone(), net.inner.plain.clone(), net.logs, net.inner.logs])
        outcome.random_after = [float(torch.rand(())), random.random()]
        outcome.weights = model.state_dict()
        outcome.ways = plans.counts
    except Exception as error:
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.seconds = time.perf_counter() - start
    return outcome


def run_programs(programs: dict[int, Program], is_placed: bool) -> dict[int, Outcome]:
    """The body of a rank; programs by their number in the set."""
    return {number: run_program(program, is_placed=is_placed) for number, program in programs.items()}
