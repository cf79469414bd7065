"""How the engine's processor time grows with microbatches, stages and layers."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import modelparallel as smp
from bench.cases.case import Case
from bench.harness import Result, plain_result
from bench.ranks import run_on_ranks
from bench.sessions import session_with

WIDTH = 8
FEW_MICROBATCHES, MANY_MICROBATCHES = 4, 64
FEW_STAGES, MANY_STAGES = 2, 8
FEW_LAYERS, MANY_LAYERS = 8, 128


@smp.step
def tiny_step(model: Any, x: torch.Tensor) -> torch.Tensor:
    """One microbatch."""
    loss = model(x).mean()
    model.backward(loss)
    return loss


def processor_time(num_stages: int, num_microbatches: int, num_layers: int, num_steps: int) -> float:
    """Microseconds of one microbatch on one stage, averaged over the stages: the median over steps."""
    parameters = {
        "pipeline_parallel_degree": num_stages,
        "microbatches": num_microbatches,
        "auto_partition": False,
        "default_partition": 0,
    }
    with session_with(parameters):
        model = smp.DistributedModel(nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(num_layers))))
        layers: Any = model.module
        for index, layer in enumerate(layers):
            smp.set_partition(layer, index * num_stages // num_layers)
        batch = torch.ones(num_microbatches, WIDTH)
        times = []
        for number in range(num_steps + 2):  # the first in discovery order
            dist.barrier()
            start = time.process_time()
            tiny_step(model, batch)
            if number >= 2:
                times.append(time.process_time() - start)
    own = torch.tensor(float(np.median(times)) / num_microbatches * 1e6, dtype=torch.float64)
    dist.all_reduce(own)
    return float(own) / num_stages


def settings_of(num_stages: int) -> list[tuple[int, int, int]]:
    """(stages, microbatches, layers) that are measured in as many processes."""
    if num_stages == MANY_STAGES:
        return [(num_stages, 8, 16)]
    few = FEW_STAGES
    return [
        (few, 8, 16),
        (few, FEW_MICROBATCHES, 16),
        (few, MANY_MICROBATCHES, 16),
        (few, 8, FEW_LAYERS),
        (few, 8, MANY_LAYERS),
    ]


def on_rank(num_stages: int, num_steps: int) -> dict[tuple[int, int, int], float]:
    """All settings with this number of stages."""
    return {setting: processor_time(*setting, num_steps) for setting in settings_of(num_stages)}


def measure(num_pairs: int) -> list[Result]:
    """The larger setting against the smaller one."""
    few, many = FEW_STAGES, MANY_STAGES
    times = run_on_ranks(on_rank, few, few, num_pairs)[0] | run_on_ranks(on_rank, many, many, num_pairs)[0]

    def line(name: str, unit: str, large: float, small: float) -> Result:
        return plain_result(f"pipeline_growth_{name}", unit, large, num_pairs, "reported", peer=small)

    return [
        line(
            "microbatches",
            "us per microbatch and stage",
            times[few, MANY_MICROBATCHES, 16],
            times[few, FEW_MICROBATCHES, 16],
        ),
        line("stages", "us per microbatch and stage", times[many, 8, 16], times[few, 8, 16]),
        line(
            "layers",
            "us per microbatch, stage and layer",
            times[few, 8, MANY_LAYERS] / MANY_LAYERS,
            times[few, 8, FEW_LAYERS] / FEW_LAYERS,
        ),
    ]


CASES = [
    Case(
        "pipeline_growth",
        "Linear layers of width 8, 1F1B: processor time of a process, forward, backward and messages. The columns are "
        "the larger and the smaller setting: 64 and 4 microbatches (pp=2, 16 layers); 8 and 2 stages (8 microbatches, "
        "16 layers); 128 and 8 layers (pp=2, 8 microbatches), per layer.",
        measure,
    )
]
