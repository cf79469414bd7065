"""The job whose checkpoints are measured: a GPT with Adam, split over the processes.

With the default size parameters and moments are 1.0 GB together: 84 million parameters of 12 bytes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import modelparallel as smp
from bench.models import GPT, GPTSize, language_loss, token_batch
from modelparallel.checkpoints.partial.pieces import Piece
from modelparallel.checkpoints.partial.writing import take_snapshot
from modelparallel.training import runtime

#: 1.0 GB of parameters and moments.
GIGABYTE = GPTSize(num_layers=6, hidden=1024, num_heads=16, vocabulary=4096, sequence=16)
SMALL = GPTSize(num_layers=2, hidden=64, num_heads=4, vocabulary=128, sequence=16)
BATCH = 4

#: How the state is spread: by pipeline and tensor parallelism, or in shards.
SPREADS: dict[str, Mapping[str, Any]] = {
    "pp2_tp2": {"pipeline_parallel_degree": 2, "tensor_parallel_degree": 2, "microbatches": 2, "ddp": True},
    "sharded4": {"ddp": True, "sharded_data_parallel_degree": 4, "sdp_param_persistence_threshold": 0},
    # What resumes on two processes.
    "pp2": {"pipeline_parallel_degree": 2, "microbatches": 2, "ddp": True},
}


@smp.step
def train_step(model: smp.DistributedModel, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    loss = language_loss(model(ids), targets)
    model.backward(loss)
    return loss


@dataclass
class Job:
    """A wrapped model and optimizer, and a batch."""

    model: Any
    optimizer: Any
    ids: torch.Tensor
    targets: torch.Tensor

    def step(self) -> None:
        """Forward, backward, update. Collective over the world."""
        self.optimizer.zero_grad()
        train_step(self.model, self.ids, self.targets).reduce_mean()
        self.optimizer.step()


def make_job(size: GPTSize, num_steps: int = 1) -> Job:
    """The job after some steps. Collective over the world."""
    torch.manual_seed(0)
    model = GPT(size)
    if smp.tp_size() > 1:
        for block in model.blocks:
            for name in ("attention_in", "attention_out", "mlp_in", "mlp_out"):
                smp.set_tensor_parallelism(getattr(block, name))
    wrapped = smp.DistributedModel(model)
    optimizer = smp.DistributedOptimizer(torch.optim.Adam(wrapped.parameters(), lr=1e-4))
    job = Job(wrapped, optimizer, *token_batch(size, BATCH))
    for _ in range(num_steps):
        job.step()
    return job


def own_pieces(job: Job) -> list[Piece]:
    """What this rank offers to a checkpoint of the job. Keep the job: the library holds no optimizer by itself."""
    pieces = take_snapshot(runtime.current(), [job.model], [job.optimizer], None, None).contents.pieces
    if not any(piece.key.startswith("optimizer.") for piece in pieces):
        raise RuntimeError("the optimizer has no state yet: make a step first")
    return pieces


# Time and files


def timed(function: Callable[[], object], before: Callable[[], object] | None = None) -> float:
    """Seconds until the slowest rank is done; ``before`` is not counted. Collective over the world."""
    if before is not None:
        before()
    dist.barrier()
    start = time.perf_counter()
    function()
    seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def forget_cached(folder: str | Path) -> None:
    """Let the system drop what it keeps of the files in memory, so that reading them reads the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in Path(folder).rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
