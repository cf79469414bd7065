"""One GPU, bf16 with fp32 masters: a model of 1.5 billion parameters, recomputation and offload off and on.

    python -m bench.gpu.memory_settings [--small] [--steps 5]

Checks that the settings give the same losses, then prints tokens/s and the peak of the allocator for each, and what
`smp.memory_report` says. ``--small`` takes a small shape, and runs on a CPU too: it shows that the script works, not
how fast. Each setting runs in a process of its own.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import nn

import modelparallel as smp
from bench.gpu.language_models import synchronize
from bench.models import GPT, GPTSize, token_batch
from bench.pipelines import train_step
from bench.ranks import run_on_ranks

LARGE = GPTSize(num_layers=48, hidden=1600, num_heads=25, vocabulary=50304, sequence=1024)
SMALL = GPTSize(num_layers=4, hidden=64, num_heads=4, vocabulary=256, sequence=32)
MICROBATCHES = 4

SETTINGS: dict[str, dict[str, Any]] = {
    "everything kept": {},
    "recomputed": {"recomputes": True},
    "recomputed, offloaded": {"recomputes": True, "offload_activations": True},
}


def train_on_rank(size: GPTSize, samples: int, num_steps: int, recomputes: bool) -> dict[str, Any]:
    """Losses, seconds of the later steps, and the peak of the allocator in MiB."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    ids, targets = (tensor.to(device) for tensor in token_batch(size, samples))

    torch.manual_seed(0)
    with device, smp.delay_param_initialization():
        net: nn.Module = GPT(size)
    model: Any = smp.DistributedModel(net)
    if recomputes:
        smp.set_activation_checkpointing(model.get_module().blocks)
    optimizer = smp.DistributedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True))
    losses, spent = [], []
    for step in range(num_steps + 2):
        if step == 2 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        synchronize(device)
        start = time.perf_counter()
        optimizer.zero_grad()
        losses.append(float(train_step(model, ids, targets).reduce_mean()))
        optimizer.step()
        synchronize(device)
        spent.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else float("nan")
    return {
        "losses": losses,
        "seconds": sorted(spent[2:])[num_steps // 2],
        "peak": peak,
        "report": str(smp.memory_report()),
    }


def main() -> None:
    """Run all settings and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a small shape, for a CPU")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each setting")
    chosen = parser.parse_args()
    size, samples = (SMALL, 8) if chosen.small else (LARGE, 32)
    reference: list[float] | None = None
    for name, setting in SETTINGS.items():
        parameters = {
            "bf16": True,
            "microbatches": MICROBATCHES,
            "offload_activations": setting.get("offload_activations", False),
        }
        arguments = (size, samples, chosen.steps, setting.get("recomputes", False))
        result = run_on_ranks(train_on_rank, 1, *arguments, parameters=parameters)[0]
        reference = reference or result["losses"]
        if any(abs(own - other) > 0.01 * abs(other) for own, other in zip(result["losses"], reference, strict=True)):
            raise AssertionError(f"{name}: losses {result['losses']}, with everything kept {reference}")
        tokens = samples * size.sequence / result["seconds"]
        print(f"{name}: {tokens:,.0f} tokens/s, peak {result['peak']:,.0f} MiB\n{result['report']}", flush=True)


if __name__ == "__main__":
    main()
