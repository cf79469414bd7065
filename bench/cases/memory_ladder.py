"""What fits: one model of about 200 million parameters, trained with less and less memory in each process."""

from __future__ import annotations

import ctypes
import gc
import math
from dataclasses import dataclass, field
from typing import Any

import torch

import modelparallel as smp
from bench.cases.case import Case
from bench.cases.memory import MEBIBYTE, reset_peak, status_bytes
from bench.harness import Result, plain_result
from bench.models import GPT, GPTSize, language_loss, token_batch
from bench.pipelines import train_step
from bench.ranks import run_on_ranks

SIZE = GPTSize(num_layers=13, hidden=1024, num_heads=16, vocabulary=16384, sequence=64)
BATCH = 4
NUM_STEPS = 2
BYTES = 4
ADAM = 2 * BYTES
BUCKET_MEGABYTES = 25
MMAP_THRESHOLD = -3  # of mallopt


@dataclass(frozen=True)
class Rung:
    """A way to train it. ``parameters``: of smp.init; ``model``: arguments of smp.DistributedModel."""

    name: str
    num_ranks: int
    parameters: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    recomputes: bool = False

    @property
    def num_stages(self) -> int:
        return int(self.parameters.get("pipeline_parallel_degree", 1))

    @property
    def shards(self) -> int:
        return int(self.parameters.get("sharded_data_parallel_degree", 1))


def _sharded(degree: int, **more: Any) -> dict[str, Any]:
    return {"sharded_data_parallel_degree": degree, "sdp_param_persistence_threshold": 10_000, **more}


VIEWS = {"gradient_as_bucket_view": True, "overlapping_allreduce": False}
RUNGS = [
    Rung("replicated", 2),
    Rung("views", 2, model=VIEWS),
    Rung("optimizer_sharded", 2, {"shard_optimizer_state": True}, VIEWS),
    Rung("sharded_2", 2, _sharded(2)),
    Rung("sharded_4", 4, _sharded(4)),
    Rung("sharded_4_recomputed", 4, _sharded(4), recomputes=True),
    Rung("sharded_2_recomputed_pp2", 4, _sharded(2, pipeline_parallel_degree=2, microbatches=4), recomputes=True),
]


@dataclass(frozen=True)
class Activations:
    """Bytes that autograd keeps of a forward: in a block, of its input, and in all the rest."""

    block: int
    block_input: int
    rest: int


def probe_activations(batch: int) -> Activations:
    """Count what autograd saves, parameters and what is counted already left out."""
    torch.manual_seed(0)
    small = GPTSize(2, SIZE.hidden, SIZE.num_heads, SIZE.vocabulary, SIZE.sequence)
    model = GPT(small)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    ids, targets = token_batch(small, batch)
    kept: list[torch.Tensor] = []

    def saved(function: Any, *args: Any) -> tuple[Any, int]:
        start = len(kept)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda x: x):
            result = function(*args)
        before = {tensor.untyped_storage().data_ptr() for tensor in kept[:start]} | parameters
        new = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept[start:]}
        return result, sum(count for pointer, count in new.items() if pointer not in before)

    x, embedding = saved(model.embedding, ids)
    x, _ = saved(model.blocks[0], x)
    x, block = saved(model.blocks[1], x)
    _, head = saved(lambda value: language_loss(model.head(value), targets), x)
    return Activations(block, x.untyped_storage().nbytes(), embedding + head)


def predicted_bytes(rung: Rung, activations: Activations, stage_elements: int, num_blocks: int) -> int:
    """Peak of a process: the larger of the end of the forward and the end of the backward.

    ``stage_elements``: of the parameters of the largest stage, of which ``num_blocks`` are blocks.
    """
    weights = BYTES * stage_elements
    microbatches = int(rung.parameters.get("microbatches", 1))
    in_flight = min(rung.num_stages, microbatches)
    saved = num_blocks * activations.block + activations.rest
    if rung.recomputes:  # inputs of all blocks, and what one of them saves
        saved = num_blocks * activations.block_input + activations.block + activations.rest
    saved *= in_flight
    largest = BYTES * SIZE.vocabulary * SIZE.hidden
    bucket = BUCKET_MEGABYTES * MEBIBYTE + largest  # a bucket is full when it has reached its size
    if rung.shards > 1:
        state = (BYTES + ADAM) * stage_elements // rung.shards
        block = BYTES * 12 * SIZE.hidden**2
        if rung.num_stages > 1:  # gathered for the whole step, and gradients stay whole until its end
            return state + weights + max(saved, weights + block + block // rung.shards)
        # The root's own (embedding, head) stays gathered, and two blocks at a time; on the way back there is the
        # gradient of one more, and what is being reduced. The root comes last: gathered, its gradient, and the copy of
        # that which is reduced.
        root = weights - num_blocks * block
        shard = weights // rung.shards
        return state + max(root + 2 * block + max(saved, shard + 2 * block), shard + 3 * root)
    optimizer = ADAM * stage_elements
    if rung.parameters.get("shard_optimizer_state"):
        optimizer //= rung.num_ranks
    if rung.model.get("gradient_as_bucket_view"):
        return weights + optimizer + max(saved, weights + bucket)
    return weights + optimizer + weights + max(saved, weights)  # with the buckets


def train_on_rank(rung: Rung) -> dict[str, int]:
    """Peak resident memory of a process above what it had before the model, and the elements of its stage."""
    # Give freed memory back at once, so that the process holds what tensors hold, and not what glibc keeps for later.
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 256 * 1024)
    ids, targets = token_batch(SIZE, BATCH)
    base = status_bytes("VmRSS")

    torch.manual_seed(0)
    model: Any = smp.DistributedModel(GPT(SIZE), **rung.model)
    if rung.recomputes:
        for block in model.get_module().blocks:
            smp.set_activation_checkpointing(block)
    optimizer = smp.DistributedOptimizer(torch.optim.Adam(model.parameters(), fused=True))
    train_step(model, ids, targets)
    optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    reset_peak()
    for _ in range(NUM_STEPS):
        train_step(model, ids, targets)
        optimizer.step()
        optimizer.zero_grad()
    names = [name for name, _ in model.local_named_parameters()]
    blocks = {name.split(".")[1] for name in names if name.startswith("blocks.")}
    elements = sum(math.prod(row.full_shape) for row, _ in model.table.parameters() if row.name in set(names))
    return {"peak": status_bytes("VmHWM") - base, "elements": elements, "blocks": len(blocks)}


def measure(num_pairs: int) -> list[Result]:
    """MiB of the process that needs most, against the formula."""
    results = []
    for rung in RUNGS:
        batch = BATCH // int(rung.parameters.get("microbatches", 1))
        activations = run_on_ranks(probe_activations, 1, batch)[0]
        parameters = {"ddp": True, **rung.parameters}
        figures = run_on_ranks(train_on_rank, rung.num_ranks, rung, parameters=parameters)
        most = max(figures, key=lambda figure: figure["peak"])
        expected = predicted_bytes(rung, activations, most["elements"], most["blocks"])
        name = f"memory_ladder_{rung.name}"
        peak = most["peak"] / MEBIBYTE
        results.append(plain_result(name, "MiB", peak, 1, "ratio <= 1.10", peer=expected / MEBIBYTE))
        print(f"  {name}: {peak:.0f} MiB, predicted {expected / MEBIBYTE:.0f}", flush=True)
    return results


CASES = [
    Case(
        "memory_ladder",
        "One GPT of 197 million parameters (13 layers x 1024, fp32, fused Adam, batch of 4 x 64 tokens) with less and "
        "less memory in each process: peak resident memory of the process that needs most, above the process before "
        "the model, against the formula in docs/memory.md (`replicated` 20 bytes per parameter with the buckets of the "
        "reduction, `views` 16, then what is shared out among ranks).",
        measure,
    )
]
