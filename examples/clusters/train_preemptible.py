"""Training that saves and leaves when its job is preempted, and goes on from there when it is started again.

    modelparallel run --nproc 2 --parameters '{"pipeline_parallel_degree": 2, "ddp": true}' train_preemptible.py results
    kill -USR1 <pid of modelparallel>       # what a batch system sends some time before it ends the job: exit code 85
    modelparallel run ...                   # the same command goes on, with the losses of a run that nobody disturbed

The folder keeps the checkpoints, and a line with step and loss for each step.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import modelparallel as smp
from modelparallel.errors import CheckpointNotFoundError


def make_model() -> torch.nn.Module:
    torch.manual_seed(1)
    layers = [torch.nn.Linear(8, 16), torch.nn.Dropout(0.1), torch.nn.Linear(16, 16)]
    return torch.nn.Sequential(*layers).double()


def batch_of(step: int) -> torch.Tensor:
    """The same for a step whenever it is done: a script that goes on must find its place in the data, too."""
    generator = torch.Generator().manual_seed(100 * step + smp.dp_rank())
    return torch.randn(8, 8, generator=generator, dtype=torch.float64)


def main(folder: Path, num_steps: int = 5, seconds: float = 0.0) -> None:
    """Train to the end, or until the job is preempted."""
    smp.init()
    model = smp.DistributedModel(make_model())
    optimizer = smp.DistributedOptimizer(torch.optim.Adam(model.parameters(), 0.01))

    @smp.step
    def train(model: Any, x: torch.Tensor) -> torch.Tensor:
        loss = model(x).square().mean()
        model.backward(loss)
        return loss

    try:
        first = smp.resume_from_checkpoint(folder / "checkpoints", tag="newest-complete")["step"]
    except CheckpointNotFoundError:
        first = 0
    for step in range(first, num_steps):
        optimizer.zero_grad()
        loss = train(model, batch_of(step)).reduce_mean()
        optimizer.step()
        print(f"step {step} loss {loss.item():.10f}", flush=True)
        if smp.rank() == 0:
            with open(folder / "losses.jsonl", "a") as file:
                file.write(json.dumps([step, loss.item()]) + "\n")
        time.sleep(seconds)
        if smp.preemption_requested():
            smp.save_checkpoint(folder / "checkpoints", f"step{step + 1}", user_content={"step": step + 1})
            sys.exit(smp.EXIT_PREEMPTED)
    print("all steps are done", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.0, help="a step takes so much longer")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    main(args.folder, args.steps, args.seconds)
