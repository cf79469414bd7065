"""A training job that saves and leaves when it is asked to, and goes on when it is started again; a script to launch.

preempted_job.py FOLDER [STEPS [SECONDS]]: every step appends its loss to FOLDER/losses.jsonl and takes so long.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import modelparallel as smp
from modelparallel.errors import CheckpointNotFoundError

PARAMETERS = {"pipeline_parallel_degree": 2, "microbatches": 2, "ddp": True, "timeout_seconds": 120}


def main(folder: Path, num_steps: int, seconds: float) -> None:
    smp.init()
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float64)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.1), torch.nn.Linear(16, 16))
    model = smp.DistributedModel(net)
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
        batch = torch.randn(8, 8, generator=torch.Generator().manual_seed(step * 100 + smp.dp_rank()))
        optimizer.zero_grad()
        loss = train(model, batch).reduce_mean()
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
    folder, num_steps, seconds = (*sys.argv[1:], *("5", "0")[len(sys.argv) - 2 :])
    main(Path(folder), int(num_steps), float(seconds))
