"""A short training job that says where it is, for signals at random moments: it loads, trains, saves and ends.

modelparallel run ... signal_job.py FOLDER SHAPE
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch

import modelparallel as smp
from modelparallel.errors import CheckpointNotFoundError

SHAPES = {
    "pp": {"pipeline_parallel_degree": 2},
    "tp": {"tensor_parallel_degree": 2},
    "dp": {},
    "sharded": {"sharded_data_parallel_degree": 2, "sdp_param_persistence_threshold": 0},
}
NUM_STEPS = 6


def at(place: str) -> None:
    print("at", place, flush=True)
    if place in os.environ.get("SIGNAL_JOB_LINGERS", ""):
        time.sleep(0.2)


def main(folder: str, shape: str) -> None:
    at("start")
    smp.init({"microbatches": 2, "ddp": True, "timeout_seconds": 8, "message_timeout_seconds": 8, **SHAPES[shape]})
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))
    if shape == "tp":
        smp.set_tensor_parallelism(net, True)
    model = smp.DistributedModel(net)
    optimizer = smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.01))

    @smp.step
    def train(model: Any, x: torch.Tensor) -> torch.Tensor:
        loss = model(x).square().mean()
        model.backward(loss)
        return loss

    at("load")
    try:
        first = smp.resume_from_checkpoint(folder, tag="newest-complete")["step"]
    except CheckpointNotFoundError:
        first = 0
    for step in range(first, NUM_STEPS):
        at("step")
        optimizer.zero_grad()
        train(model, torch.ones(4, 32))
        optimizer.step()
        at("save")
        content = {"step": step + 1}
        smp.save_checkpoint(folder, f"t{step + 1}", user_content=content, async_save=step % 2 == 1)
    at("exit")


if __name__ == "__main__":
    main(*sys.argv[1:3])
    if os.environ.get("RANK") == "0":
        print(json.dumps({"finished": True}))
