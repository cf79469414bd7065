"""One GPU: how long a save holds up training, in the background and not, and how long resuming takes.

    python -m bench.gpu.checkpoint_stall [--small] [--pairs 3]

A GPT with AdamW, fp32: 4 GB of weights and states. Checks that the resumed losses are those that went on. ``--small``
takes a small shape, and runs on a CPU too: it shows that the script works, not how fast.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch

import modelparallel as smp
from bench.gpu.language_models import synchronize
from bench.gpu.memory_settings import SMALL
from bench.models import GPT, GPTSize, token_batch
from bench.pipelines import train_step
from bench.ranks import run_on_ranks

LARGE = GPTSize(num_layers=24, hidden=1024, num_heads=16, vocabulary=32000, sequence=512)


def save_on_rank(size: GPTSize, num_pairs: int, folder: str) -> dict[str, Any]:
    """Seconds: of steps, of calls of save_checkpoint by whether they are in the background, of resuming."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    ids, targets = (tensor.to(device) for tensor in token_batch(size, 8))
    torch.manual_seed(0)
    with device:
        net = GPT(size)
    model: Any = smp.DistributedModel(net)
    optimizer: Any = smp.DistributedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-4))

    def step() -> float:
        optimizer.zero_grad()
        loss = train_step(model, ids, targets).reduce_mean()
        optimizer.step()
        return float(loss)

    def timed(function: Any) -> float:
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        return time.perf_counter() - start

    for _ in range(3):
        step()
    spent: dict[str, list[float]] = {name: [] for name in ("step", "blocking", "background", "step during it")}
    for number in range(num_pairs):
        spent["step"].append(timed(step))
        save = {"model": model, "optimizer": optimizer, "num_kept_partial_checkpoints": 2}
        start = time.perf_counter()
        smp.save_checkpoint(folder, f"blocking{number}", **save)
        spent["blocking"].append(time.perf_counter() - start)
        start = time.perf_counter()
        pending: Any = smp.save_checkpoint(folder, f"background{number}", async_save=True, **save)
        spent["background"].append(time.perf_counter() - start)
        spent["step during it"].append(timed(step))
        pending.wait()
    smp.save_checkpoint(folder, "last", model=model, optimizer=optimizer)
    going_on = step()
    resume = timed(lambda: smp.resume_from_checkpoint(folder, "last"))
    again = step()
    if again != going_on:
        raise AssertionError(f"the loss after resuming is {again!r}, without the interruption {going_on!r}")
    num_bytes = 3 * sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return {"gb": num_bytes / 1e9, "resume": resume, **{name: statistics.median(all) for name, all in spent.items()}}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a small shape, for a CPU")
    parser.add_argument("--pairs", type=int, default=3)
    chosen = parser.parse_args()
    size = SMALL if chosen.small else LARGE
    with tempfile.TemporaryDirectory() as folder:
        result = run_on_ranks(save_on_rank, 1, size, chosen.pairs, folder, parameters={"microbatches": 2})[0]
    print(f"{result.pop('gb'):.2f} GB: " + ", ".join(f"{name} {value:.3f} s" for name, value in result.items()))


if __name__ == "__main__":
    main()
