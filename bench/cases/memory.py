"""pp=2: what a process holds after training steps."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch

import modelparallel as smp
from bench.cases.case import Case
from bench.pipelines import BATCH, NUM_STAGES, SIZE, PeerPipeline, Setting, our_model, train_step
from bench.harness import Result, plain_result
from bench.models import token_batch
from bench.ranks import run_on_ranks

MEBIBYTE = 1024 * 1024
NUM_STEPS = 3
# Weight, gradient, and the two moments of Adam.
TENSORS_PER_PARAMETER = 4


def held_bytes() -> int:
    """Bytes of all tensors that are alive in this process, each storage counted once."""
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            try:
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            except (NotImplementedError, RuntimeError):
                continue  # a tensor subclass without memory of its own
    return sum(storages.values())


def status_bytes(field: str) -> int:
    """VmRSS or VmHWM (its peak) of this process, from /proc."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def reset_peak() -> None:
    """Let VmHWM start again from now; where that is not allowed the peak of the whole life is reported."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        print(f"peak memory could not be reset: {error}")


def peer_on_rank() -> dict[str, int]:
    """torch's pipeline: peak resident memory above what the process had before the model."""
    ids, targets = token_batch(SIZE, BATCH)
    base = status_bytes("VmRSS")
    peer = PeerPipeline(SIZE)
    gc.collect()
    optimizer = torch.optim.Adam(peer.module.parameters())
    peer.step(ids, targets)
    optimizer.step()
    reset_peak()
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        peer.step(ids, targets)
        optimizer.step()
    parameters = sum(parameter.numel() * parameter.element_size() for parameter in peer.module.parameters())
    return {"peak": status_bytes("VmHWM") - base, "parameters": parameters}


def ours_on_rank() -> dict[str, int]:
    """The same with our engine; also the bytes of all tensors alive between steps."""
    ids, targets = token_batch(SIZE, BATCH)
    base = status_bytes("VmRSS")
    base_held = held_bytes()
    model: Any = our_model(SIZE, True)
    optimizer = smp.DistributedOptimizer(torch.optim.Adam(model.parameters()))
    train_step(model, ids, targets)
    optimizer.step()
    reset_peak()
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        train_step(model, ids, targets)
        optimizer.step()
    parameters = sum(parameter.numel() * parameter.element_size() for parameter in model.local_parameters())
    return {"peak": status_bytes("VmHWM") - base, "held": held_bytes() - base_held, "parameters": parameters}


def measure_memory(num_pairs: int) -> list[Result]:
    """MiB of the process that holds or needs most, relative to what its stage must hold."""
    ours = run_on_ranks(ours_on_rank, NUM_STAGES, parameters=Setting('interleaved','Schedule1F1B').parameters())
    peers = run_on_ranks(peer_on_rank, NUM_STAGES)
    for mine, other in zip(ours, peers, strict=True):
        if mine["parameters"] != other["parameters"]:
            raise RuntimeError(
                f"a stage holds {mine['parameters']} bytes of parameters, expected {other['parameters']}"
            )
    worst = max(ours, key=lambda figures: figures["held"] / figures["parameters"])
    ideal = TENSORS_PER_PARAMETER * worst["parameters"] / MEBIBYTE
    most = max(range(NUM_STAGES), key=lambda stage: ours[stage]["peak"] / peers[stage]["peak"])
    return [
        plain_result("memory_held", "MiB", worst["held"] / MEBIBYTE, 1, "ratio <= 1.01", peer=ideal),
        plain_result(
            "memory_peak", "MiB", ours[most]["peak"] / MEBIBYTE, 1, "reported", peer=peers[most]["peak"] / MEBIBYTE
        ),
    ]


CASES = [
    Case(
        "memory",
        "pp=2, GPT of 8 layers x 512 with Adam. `memory_held`: all tensors alive between steps on the process that "
        "holds most, against weights, gradients and optimizer state of its stage. `memory_peak`: peak resident memory "
        "during a step above the process before the model, against `ScheduleGPipe` on the same stage.",
        measure_memory,
    )
]
