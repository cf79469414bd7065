"""Steps whose stages go apart, sleep, fail or die, and what each stage says of it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine_models import WIDTH, Held
from engine_runs import scatter

# The file whose lines the errors name.
THIS = "stages_apart.py"
#: Far longer than any test may take: what ends sooner was found out and not waited for.
PATIENT = {"microbatches": 3, "timeout_seconds": 120, "auto_partition": False, "default_partition": 0}
#: What the ranks do differently from now on.
MODE: dict[str, Any] = {}


def is_apart(rank: int = 0) -> bool:
    """Whether this rank is the one that behaves differently, now."""
    import modelparallel as smp

    return bool(MODE.get("is_on")) and smp.pp_rank() == MODE.get("rank", rank) and not smp.is_tracing()


def chain(self: Any, x: Tensor) -> Tensor:
    return self.d(self.c(self.b(self.a(x))))


def finish(model: Any, y: Tensor) -> Tensor:
    loss = y.square().mean()
    model.backward(loss)
    return loss


def calls_once_more(model: Any, x: Tensor) -> Tensor:
    y = model(x)
    if is_apart():
        y = model(y)
    return finish(model, y)


def calls_once_less(model: Any, x: Tensor) -> Tensor:
    y = model(x)
    if not is_apart():
        y = model(y)
    return finish(model, y)


def reads_large(model: Any, x: Tensor) -> Tensor:
    y = model(x).repeat(2000, 1)
    if is_apart():
        y[0, 0].item()  # a view of a large value is not known everywhere
    return finish(model, y)


def forgets_backward(model: Any, x: Tensor) -> Tensor:
    loss = model(x).square().mean()
    if not is_apart():
        model.backward(loss)
    return loss


def another_way(model: Any, x: Tensor) -> Tensor:
    inner = model.module
    if is_apart():
        y = inner.c(inner.a(x))
    else:
        y = inner.b(inner.a(x))
    return finish(model, inner.d(y))


def sleeps(model: Any, x: Tensor) -> Tensor:
    if is_apart(1):
        time.sleep(MODE.pop("seconds", 0.0))  # in the first microbatch
    return finish(model, model(x))


def raises(model: Any, x: Tensor) -> Tensor:
    y = model(x)
    if is_apart():
        raise KeyError("only here")
    return finish(model, y)


def dies(model: Any, x: Tensor) -> Tensor:
    y = model(x)
    if is_apart(1):
        os.kill(os.getpid(), signal.SIGKILL)
    return finish(model, y)


def dies_before_it_is_sent_to(model: Any, x: Tensor) -> Tensor:
    """pp_rank 1 dies while pp_rank 0 computes what it will send to it."""
    if is_apart():
        # Past the look at what bodies register: this one is to be noticed by nobody.
        model.module.d._forward_pre_hooks[0] = lambda *_: time.sleep(1.5)
    y = model(x)
    if is_apart(1):
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    return finish(model, y)


def wrapped(layout: str) -> Any:
    """``straight``: each stage is visited once; ``turns``: neighbours on different stages, so each is visited twice."""
    import modelparallel as smp

    torch.manual_seed(1)
    model = smp.DistributedModel(Held(chain).double().train())
    if layout == "turns":
        scatter(model)
    else:
        homes = {2: (0, 0, 1, 1), 3: (0, 1, 2, 2)}[smp.pp_size()]
        for name, home in zip("abcd", homes, strict=True):
            smp.set_partition(getattr(model.module, name), home)
    return model


def batch() -> Tensor:
    return torch.ones(6, WIDTH, dtype=torch.float64)


def failure_of(train: Callable[..., Any], model: Any) -> tuple[str, float]:
    """The error that a step ends in, and after how long it came."""
    start = time.perf_counter()
    try:
        train(model, batch())
        error = "no error"
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    return error, time.perf_counter() - start


def go_apart(bodies: list[Callable[..., Any]], layout: str, num_good: int, **mode: Any) -> list[tuple[str, float]]:
    """For each of ``bodies``: ``num_good`` steps with all ranks alike, then one that is not, and then one that is."""
    import modelparallel as smp

    found = []
    for body in bodies:
        MODE.update(mode, is_on=False)
        model = wrapped(layout)
        train = smp.step(body)
        for _ in range(num_good):
            train(model, batch())
        MODE["is_on"] = True
        found.append(failure_of(train, model))
        MODE["is_on"] = False
        if len(bodies) > 1:
            dist.barrier()  # a script that goes on after an error sees to it that all ranks do
            train(model, batch())
    return found
