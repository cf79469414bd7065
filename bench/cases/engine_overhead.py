"""pp=2: what the engine costs per call of a module and per operation between modules, in processor time.

Inside one step of one microbatch, with every announcement made before. Rank 0 holds the called module and the values,
so its loops are the local ones (the same loop on the bare module or operation is taken off); rank 1 runs the same
program and computes nothing, so its loops are the remote ones, whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import modelparallel as smp
from bench.cases.case import Case
from bench.harness import Result, plain_result
from bench.ranks import run_on_ranks

PARAMETERS = {"pipeline_parallel_degree": 2, "microbatches": 1, "auto_partition": False, "default_partition": 0}
LOOPS = 400
WIDTH = 8
TARGETS = {
    "engine_local_call": "ours <= 20",
    "engine_remote_call": "ours <= 30",
    "engine_glue_local": "ours <= 15",
    "engine_glue_remote": "ours <= 15",
}


class TwoLayers(nn.Module):
    """One layer on each stage."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(x).sum() if not HOOK else HOOK[0](self, x)


#: What the body of the step measures; called with the model and a value of stage 0.
HOOK: list[Callable[[TwoLayers, torch.Tensor], torch.Tensor]] = []


def call_once(model: TwoLayers, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A module's call."""
    return model.first(x)


def add_once(model: TwoLayers, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A binary operator."""
    return x + y


def gelu_once(model: TwoLayers, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A function of one tensor."""
    return F.gelu(x)


def view_once(model: TwoLayers, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A method that shares memory."""
    return x.view(-1)


def split_once(model: TwoLayers, x: torch.Tensor, y: torch.Tensor) -> Any:
    """A method that returns several tensors."""
    return x.split(2)


CALLS: dict[str, Callable[..., Any]] = {"call": call_once}
GLUE: dict[str, Callable[..., Any]] = {"add": add_once, "gelu": gelu_once, "view": view_once}
MORE: dict[str, Callable[..., Any]] = {"split": split_once}


def seconds_per_call(once: Callable[..., Any], model: TwoLayers, x: torch.Tensor, y: torch.Tensor) -> float:
    """Processor time of one call, its result dropped like that of a layer in a loop."""
    result = None
    start = time.process_time()
    for _ in range(LOOPS):
        result = once(model, x, y)
    spent = time.process_time() - start
    del result
    return spent / LOOPS


@smp.step
def measured_step(model: Any, x: torch.Tensor) -> torch.Tensor:
    """One microbatch; the loops run within the model's forward."""
    loss = model(x)
    model.backward(loss)
    return loss


def measure_on_rank(num_repetitions: int) -> dict[tuple[str, bool], float]:
    """(kind, grad mode) -> microseconds per call: at rank 0 beyond the bare operation, at rank 1 altogether."""
    torch.manual_seed(0)
    bare = TwoLayers()
    model = smp.DistributedModel(TwoLayers())
    smp.set_partition(model.module.first, 0)
    smp.set_partition(model.module.last, 1)
    batch = torch.randn(2, WIDTH)
    is_home = smp.pp_rank() == 0
    spent: dict[tuple[str, bool], list[float]] = {}
    kinds = {**CALLS, **GLUE, **MORE}

    def loops(layers: TwoLayers, x: torch.Tensor) -> torch.Tensor:
        y = layers.first(x)
        for has_grad in (True, False):
            with torch.set_grad_enabled(has_grad):
                for kind, once in kinds.items():
                    times = spent.setdefault((kind, has_grad), [])
                    once(layers, x, y)  # the first one is announced
                    for _ in range(2):
                        times.append(seconds_per_call(once, layers, x, y))
        return layers.last(y).sum()

    def bare_loops() -> dict[tuple[str, bool], float]:
        found = {}
        x = bare.first(batch)
        y = bare.first(x)
        for has_grad in (True, False):
            with torch.set_grad_enabled(has_grad):
                for kind, once in kinds.items():
                    times = [seconds_per_call(once, bare, x, y) for _ in range(2)]
                    found[kind, has_grad] = min(times)
        return found

    HOOK.append(loops)
    extra: dict[tuple[str, bool], list[float]] = {}
    for number in range(num_repetitions + 1):
        spent.clear()
        model.zero_grad()
        measured_step(model, batch)
        alone = bare_loops()
        if number == 0:
            continue  # announcements, caches
        for key, times in spent.items():
            extra.setdefault(key, []).append(min(times) - (alone[key] if is_home else 0.0))
    HOOK.clear()
    return {key: float(np.median(values)) * 1e6 for key, values in extra.items()}


def measure(num_pairs: int) -> list[Result]:
    """The costliest kind of each group, training; without gradients and for several outputs as further lines."""
    by_rank = run_on_ranks(measure_on_rank, 2, num_pairs, parameters=PARAMETERS)
    results = []
    for rank, place in enumerate(("local", "remote")):
        for group, name in ((CALLS, f"engine_{place}_call"), (GLUE, f"engine_glue_{place}")):
            for has_grad in (True, False):
                worst = max(by_rank[rank][kind, has_grad] for kind in group)
                full_name, target = (name, TARGETS[name]) if has_grad else (f"{name}_no_grad", "reported")
                results.append(plain_result(full_name, "us", worst, num_pairs, target))
        results.append(
            plain_result(f"engine_glue_{place}_split", "us", by_rank[rank]["split", True], num_pairs, "reported")
        )
    return results


CASES = [
    Case(
        "engine",
        "pp=2, inside a step: processor time that the engine adds to a call of a placed module and to an operation "
        "between modules (the costliest of `x + y`, `gelu` and `view`; `split` into four apart), where the data is "
        "(local) and on the other stage (remote, where nothing is computed).",
        measure,
    )
]
