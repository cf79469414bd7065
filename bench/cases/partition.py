"""pp=2, models whose layers cost unequal amounts: our partition against equal layers, and against the best split."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

import modelparallel as smp
from bench.cases.case import Case
from bench.harness import Result, measure_pairs, paired_result
from bench.models import GPT, ConvPyramid, EncoderDecoder, GPTSize, image_batch, language_loss, token_batch
from bench.ranks import run_on_ranks
from bench.sessions import session_with
from bench.splits import contiguous, equal_layers, makespan, visits_of
from modelparallel.partitioning import Trace, find_units, trace_step

NUM_STAGES = 2
NUM_MICROBATCHES = 8
MICROBATCH = 2
#: Splits whose predicted time is within this factor of the best one are measured.
WORTH_TRYING = 1.35
TRIALS = 3

Homes = Mapping[str, int]
Batch = tuple[torch.Tensor, torch.Tensor]
#: GPT-2's vocabulary.
BIG_HEAD, PLAIN = GPTSize(vocabulary=50257), GPTSize()


@dataclass(frozen=True)
class Unbalanced:
    """A model, its loss from (model, inputs, targets), and batches of a number of samples."""

    description: str
    make: Callable[[], nn.Module]
    loss: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
    batch: Callable[[int], Batch]

    def make_model(self) -> nn.Module:
        """The same weights whenever it is called."""
        torch.manual_seed(0)
        return self.make()

    def make_step(self) -> Any:
        """A step function of its own for every model, so that each has its own plan."""

        @smp.step
        def train_step(model: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            loss = self.loss(model, x, y)
            model.backward(loss)
            return loss

        return train_step


def _source_and_target(batch: int) -> Batch:
    """The target is a quarter as long as the source."""
    source, targets = token_batch(PLAIN, batch)
    return source, targets[:, : PLAIN.sequence // 4].contiguous()


MODELS = {
    "big_head": Unbalanced(
        "GPT of 8 layers x 512 with the vocabulary of GPT-2 (50257), whose head costs more than all layers together",
        lambda: GPT(BIG_HEAD),
        lambda model, ids, targets: language_loss(model(ids), targets),
        lambda batch: token_batch(BIG_HEAD, batch),
    ),
    "pyramid": Unbalanced(
        "a convolutional pyramid of 4 levels with 2 blocks each, whose early layers cost more",
        lambda: ConvPyramid(32),
        lambda model, images, classes: functional.cross_entropy(model(images), classes),
        image_batch,
    ),
    "encoder_decoder": Unbalanced(
        "an encoder of 8 layers over a source four times as long as the target, a decoder of 4 layers",
        lambda: EncoderDecoder(PLAIN),
        lambda model, source, target: language_loss(model(source, target), target),
        _source_and_target,
    ),
}


def parameters(*, is_automatic: bool) -> dict[str, Any]:
    """Our configuration: for speed alone, or with a split made by hand."""
    common = {"pipeline_parallel_degree": NUM_STAGES, "microbatches": NUM_MICROBATCHES}
    if is_automatic:
        return {**common, "memory_weight": 0.0}
    return {**common, "auto_partition": False, "default_partition": 0}


def our_homes(chosen: Unbalanced, batch: Batch) -> dict[str, int]:
    """The split that the partitioner makes by itself."""
    with session_with(parameters(is_automatic=True)):
        model = smp.DistributedModel(chosen.make_model())
        chosen.make_step()(model, *batch)
        plan = model.partition_plan
        if plan is None:
            raise RuntimeError("the model was not partitioned")
        return dict(plan.modules)


def training(chosen: Unbalanced, homes: Homes, batch: Batch) -> Callable[[], Any]:
    """A function that runs a step of the model with this split; warmed up."""
    model = smp.DistributedModel(chosen.make_model())
    modules = dict(model.module.named_modules())
    for unit, home in homes.items():
        smp.set_partition(modules[unit], home)
    step = chosen.make_step()

    def run() -> Any:
        model.zero_grad()
        return step(model, *batch)

    run()  # in discovery order
    run()
    return run


def worth_trying(trace: Trace) -> list[dict[str, int]]:
    """The contiguous splits, best first, whose predicted makespan is not much longer than the best one's."""
    splits = list(contiguous(trace.order, NUM_STAGES))
    times = [makespan(visits_of(trace, homes), NUM_STAGES, NUM_MICROBATCHES, NUM_STAGES + 2) for homes in splits]
    limit = WORTH_TRYING * min(times)
    return [splits[index] for index in sorted(range(len(splits)), key=times.__getitem__) if times[index] <= limit]


def fastest(candidates: list[Callable[[], Any]]) -> Callable[[], Any]:
    """The one with the smallest median over some steps, which are run in turn. Collective."""
    times = torch.zeros(len(candidates), TRIALS, dtype=torch.float64)
    for trial in range(TRIALS):
        for index, run in enumerate(candidates):
            dist.barrier()
            start = time.perf_counter()
            run()
            times[index, trial] = time.perf_counter() - start
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return candidates[int(np.argmin(np.median(times.numpy(), axis=1)))]


def compare_on_rank(name: str, num_pairs: int) -> dict[str, tuple[list[float], list[float]]]:
    """(ours, the other) for "equal" and "best"; where ours is the best itself it is compared with itself."""
    chosen = MODELS[name]
    batch = chosen.batch(NUM_MICROBATCHES * MICROBATCH)
    homes = our_homes(chosen, batch)
    with session_with(parameters(is_automatic=False)):
        plain = chosen.make_model()
        few = [tensor[:MICROBATCH] for tensor in batch]
        trace = trace_step(plain, find_units(plain), lambda: chosen.loss(plain, *few))
        candidates = [dict(split) for split in worth_trying(trace)]
        ours = training(chosen, homes, batch)
        others = [training(chosen, split, batch) for split in candidates if split != homes]
        best = fastest([ours, *others])
        equal = training(chosen, equal_layers(trace.order, NUM_STAGES), batch)
        found = {"equal": measure_pairs(ours, equal, num_pairs)}
        found["best"] = measure_pairs(ours, best, num_pairs)
    return found


def measure(name: str, num_pairs: int) -> list[Result]:
    """Seconds per step."""
    found = run_on_ranks(compare_on_rank, NUM_STAGES, name, num_pairs)[0]
    return [
        paired_result(f"partition_{name}", "s/step", *found["equal"], "ratio <= 0.83"),
        paired_result(f"partition_{name}_best", "s/step", *found["best"], "ratio <= 1.03"),
    ]


CASES = [
    Case(
        f"partition_{name}",
        f"pp=2, {NUM_MICROBATCHES} microbatches, 1F1B, {chosen.description}: the partition that we find against equal "
        f"numbers of modules per stage, and (`_best`) against the fastest of all contiguous splits, found by trying "
        f"those whose predicted time is within {WORTH_TRYING:g} times the best.",
        partial(measure, name),
    )
    for name, chosen in MODELS.items()
]
