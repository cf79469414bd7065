"""What the wrappers cost when nothing is parallel, in processor time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import modelparallel as smp
from bench.cases.case import Case
from bench.harness import Result, measure_pairs, paired_result, plain_result
from bench.models import GPT, GPTSize, language_loss, token_batch
from bench.ranks import run_on_ranks

STEPS_PER_MEASUREMENT = 200
NUM_MICROBATCHES = 8
GPT_SIZE = GPTSize()
GPT_MICROBATCHES = 4
GPT_BATCH = 8


@smp.step
def small_step(model: Any, x: torch.Tensor) -> torch.Tensor:
    """One microbatch of the small model."""
    loss = model(x).sum()
    model.backward(loss)
    return loss


@smp.step
def gpt_step(model: Any, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """One microbatch of the GPT."""
    loss = language_loss(model(ids), targets)
    model.backward(loss)
    return loss


def small_model() -> nn.Module:
    """Two layers, so that the figure is nearly the wrappers alone."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def compare_small(num_microbatches: int, num_pairs: int) -> tuple[list[float], list[float]]:
    """Processor seconds per step, ours and a plain training loop that does the same arithmetic."""
    batch = torch.randn(num_microbatches * 2, 8)
    model = smp.DistributedModel(small_model())
    optimizer = smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1e-3))
    plain = small_model()
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=1e-3)

    def ours() -> None:
        optimizer.zero_grad()
        small_step(model, batch)
        optimizer.step()

    def theirs() -> None:
        plain_optimizer.zero_grad()
        for microbatch in batch.chunk(num_microbatches):
            loss = plain(microbatch).sum()
            (loss / num_microbatches).backward()
        plain_optimizer.step()

    return measure_pairs(repeated(ours), repeated(theirs), num_pairs, clock=time.process_time)


def repeated(function: Callable[[], None]) -> Callable[[], None]:
    """A measurement long enough for the clock."""

    def run() -> None:
        for _ in range(STEPS_PER_MEASUREMENT):
            function()

    return run


def measure_small(num_pairs: int) -> list[Result]:
    """A fit over 1 and 8 microbatches: so much a step, and so much a microbatch."""
    microseconds: dict[int, np.ndarray[Any, Any]] = {}
    for num_microbatches in (1, NUM_MICROBATCHES):
        parameters = {"microbatches": num_microbatches}
        ours, peer = run_on_ranks(compare_small, 1, num_microbatches, num_pairs, parameters=parameters)[0]
        microseconds[num_microbatches] = (np.array(ours) - np.array(peer)) / STEPS_PER_MEASUREMENT * 1e6
    few, many = (float(np.median(values)) for values in microseconds.values())
    per_microbatch = (many - few) / (NUM_MICROBATCHES - 1)
    return [
        plain_result("overhead_per_step", "us", few - per_microbatch, num_pairs, "ours <= 150"),
        plain_result("overhead_per_microbatch", "us", per_microbatch, num_pairs, "ours <= 20"),
    ]


def compare_gpt(num_pairs: int) -> tuple[list[float], list[float]]:
    """Processor seconds of a training step of the GPT without and with the wrappers."""
    ids, targets = token_batch(GPT_SIZE, GPT_BATCH)
    torch.manual_seed(0)
    model = smp.DistributedModel(GPT(GPT_SIZE))
    optimizer = smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1e-3))
    plain = GPT(GPT_SIZE)
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=1e-3)

    def ours() -> None:
        optimizer.zero_grad()
        gpt_step(model, ids, targets)
        optimizer.step()

    def theirs() -> None:
        plain_optimizer.zero_grad()
        for microbatch in zip(ids.chunk(GPT_MICROBATCHES), targets.chunk(GPT_MICROBATCHES), strict=True):
            loss = language_loss(plain(microbatch[0]), microbatch[1])
            (loss / GPT_MICROBATCHES).backward()
        plain_optimizer.step()

    return measure_pairs(ours, theirs, num_pairs, clock=time.process_time)


def measure_gpt(num_pairs: int) -> list[Result]:
    """The same on a model with real work in it."""
    ours, peer = run_on_ranks(compare_gpt, 1, num_pairs, parameters={"microbatches": GPT_MICROBATCHES})[0]
    return [paired_result("overhead_gpt", "s/step of processor time", ours, peer, "ratio <= 1.03")]


CASES = [
    Case(
        "overhead",
        "One process: processor time that `DistributedModel`, `DistributedOptimizer` and `smp.step` add to a plain "
        "loop over microbatches, on a model of two small layers; fitted over 1 and 8 microbatches.",
        measure_small,
    ),
    Case(
        "overhead_gpt",
        "One process, GPT of 8 layers x 512, 4 microbatches: processor time of a training step against a plain loop.",
        measure_gpt,
    ),
]
