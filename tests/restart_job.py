"""A training job that goes on from its newest checkpoint, and can be told to die; also a script to launch."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import modelparallel as smp
from modelparallel.errors import CheckpointNotFoundError

PARAMETERS = {"pipeline_parallel_degree": 2, "microbatches": 2, "ddp": True, "timeout_seconds": 60}
NUM_STEPS = 6
GLOBAL_BATCH = 16
STEPS_BETWEEN_CHECKPOINTS = 2


def make_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))


def own_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of the global batch of the step, which is the same for every number of ranks."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(GLOBAL_BATCH, 8, generator=generator)
    y = torch.randint(0, 4, (GLOBAL_BATCH,), generator=generator)
    return x[smp.dp_rank() :: smp.dp_size()], y[smp.dp_rank() :: smp.dp_size()]


def resume(folder: Path) -> int:
    """The number of steps that the newest complete checkpoint has behind it."""
    try:
        return smp.resume_from_checkpoint(folder, tag="newest-complete")["step"]
    except CheckpointNotFoundError:
        return 0


def train(folder: str, dies_in_step: int | None = None, dying_rank: int | None = None) -> dict[str, torch.Tensor]:
    """Train to the end, from the newest checkpoint; returns the weights. The process of the dying rank kills itself
    between forward and backward of a step.
    """
    checkpoints = Path(folder) / "checkpoints"
    model = smp.DistributedModel(make_model())
    optimizer = smp.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=0.05))

    @smp.step
    def train_step(model: Any, x: torch.Tensor, y: torch.Tensor, step: int) -> torch.Tensor:
        loss = F.cross_entropy(model(x), y)
        if step == dies_in_step and smp.rank() == dying_rank:
            os.kill(os.getpid(), signal.SIGKILL)
        model.backward(loss)
        return loss

    first = resume(checkpoints)
    for step in range(first, NUM_STEPS):
        print(f"step {step} of {smp.size()} ranks", flush=True)
        optimizer.zero_grad()
        train_step(model, *own_batch(step), step)
        optimizer.step()
        if (step + 1) % STEPS_BETWEEN_CHECKPOINTS == 0:
            smp.save_checkpoint(checkpoints, f"step{step + 1}", user_content={"step": step + 1})
    return dict(model.state_dict())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--dies-in-step", type=int)
    parser.add_argument("--dying-rank", type=int)
    parser.add_argument("--deaths", type=int, default=0, help="in so many attempts")
    args = parser.parse_args()
    smp.init()
    dies = int(os.environ["TORCHELASTIC_RESTART_COUNT"]) < args.deaths
    weights = train(args.folder, args.dies_in_step if dies else None, args.dying_rank)
    torch.save(weights, Path(args.folder) / f"weights{smp.rank()}.pt")
