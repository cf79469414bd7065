"""pp=2: what a process holds after training steps, and at most during them."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch

import modelparallel as smp
from bench.cases.case import Case
from bench.cases.pipeline import SETTINGS
from bench.harness import Result, plain_result
from bench.models import token_batch
from bench.pipelines import BATCH, NUM_STAGES, SIZE, PeerPipeline, Setting, our_model, train_step
from bench.ranks import run_on_ranks

MEBIBYTE = 1024 * 1024
NUM_STEPS = 3
# Weight, gradient, and the two moments of Adam.
TENSORS_PER_PARAMETER = 4
NAMES = ("1f1b", "gpipe", "virtual", "zero_bubble", "zero_bubble_virtual", "zero_bubble_v")


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


def peer_on_rank(setting: Setting) -> dict[str, int]:
    """torch's pipeline: peak resident memory above what the process had before the model."""
    ids, targets = token_batch(SIZE, BATCH)
    base = status_bytes("VmRSS")
    peer = PeerPipeline(setting)
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


def ours_on_rank(setting: Setting) -> dict[str, int]:
    """The same with our engine, the first step (in discovery order) left out; also the bytes of all tensors alive
    between steps.
    """
    ids, targets = token_batch(SIZE, BATCH)
    base = status_bytes("VmRSS")
    base_held = held_bytes()
    model: Any = our_model(setting)
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


def measure_peak(name: str, num_pairs: int) -> list[Result]:
    """MiB of the process with the larger ratio; with 1F1B also what is held between steps, relative to what its stage
    must hold.
    """
    setting = SETTINGS[f"pipeline_gpt_{name}"]
    ours = run_on_ranks(ours_on_rank, NUM_STAGES, setting, parameters=setting.parameters())
    peers = run_on_ranks(peer_on_rank, NUM_STAGES, setting)
    for mine, other in zip(ours, peers, strict=True):
        if mine["parameters"] != other["parameters"]:
            raise RuntimeError(
                f"a stage holds {mine['parameters']} bytes of parameters, expected {other['parameters']}"
            )
    most = max(range(NUM_STAGES), key=lambda stage: ours[stage]["peak"] / peers[stage]["peak"])
    peak, other_peak = ours[most]["peak"] / MEBIBYTE, peers[most]["peak"] / MEBIBYTE
    results = [plain_result(f"memory_peak_{name}", "MiB", peak, 1, "ratio <= 1.00", peer=other_peak)]
    if name == "1f1b":
        worst = max(ours, key=lambda figures: figures["held"] / figures["parameters"])
        ideal = TENSORS_PER_PARAMETER * worst["parameters"] / MEBIBYTE
        results.append(plain_result("memory_held", "MiB", worst["held"] / MEBIBYTE, 1, "ratio <= 1.01", peer=ideal))
    return results


def measure(num_pairs: int) -> list[Result]:
    """All schedules."""
    return [result for name in NAMES for result in measure_peak(name, num_pairs)]


CASES = [
    Case(
        "memory",
        "pp=2, GPT of 8 layers x 512 with Adam. `memory_held`: all tensors alive between steps on the process that "
        "holds most, against weights, gradients and optimizer state of its stage. `memory_peak`: peak resident memory "
        "during planned steps above the process before the model, against the peer of the benchmark `pipeline_gpt` of "
        "the same schedule, each in fresh processes; the process with the larger ratio.",
        measure,
    )
]
