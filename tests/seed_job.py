"""The example jobs on made-up digits, recorded step by step; also a script that a launcher starts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import smdistributed.modelparallel.torch
from scripts import load_script

smp: Any = smdistributed.modelparallel.torch  # an alias that takes the place of the package
#: Of a data-parallel rank. In fp32 it takes many samples for Adadelta not to magnify the rounding of small gradients.
BATCH_SIZES = {torch.float32: 64, torch.float64: 16}
NUM_STEPS = 5
PARAMETERS = {
    "train_tensor_parallel": {
        "pipeline_parallel_degree": 1,
        "placement_strategy": "cluster",
        "tensor_parallel_degree": 4,
        "ddp": True,
    },
    "train_tensor_pipeline_parallel": {
        "microbatches": 4,
        "pipeline_parallel_degree": 2,
        "placement_strategy": "cluster",
        "tensor_parallel_degree": 2,
        "ddp": True,
    },
}


def make_digits(num_samples: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    images = torch.rand(num_samples, 1, 28, 28, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.randint(0, 10, (num_samples,), generator=generator)


def make_net(script: str, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        return load_script(f"examples/mnist/{script}.py").Net()
    finally:
        torch.set_default_dtype(torch.float32)


def train(script: str, dtype: torch.dtype) -> tuple[int, list[float], dict[str, torch.Tensor], dict[str, str]]:
    """What the script does up to its training loop, with made-up digits, some for each data-parallel rank and step.

    Returns (dp_rank, this rank's losses, the full weights after the steps, the classes of the four layers).
    """
    module = load_script(f"examples/mnist/{script}.py")
    has_pipeline = "pipeline" in script
    batch_size = BATCH_SIZES[dtype]
    dataset = TensorDataset(*make_digits(batch_size * NUM_STEPS * smp.dp_size(), dtype))
    loader = DataLoader(module.shard(dataset), batch_size=batch_size, drop_last=has_pipeline)
    if has_pipeline:
        model = make_net(script, dtype)
        smp.set_tensor_parallelism(model.fc1, True)
    else:
        with smp.tensor_parallelism():
            model = make_net(script, dtype)
    model = smp.DistributedModel(model)
    optimizer = smp.DistributedOptimizer(torch.optim.Adadelta(model.parameters(), lr=4.0))
    model.train()
    losses = []
    for data, target in loader:
        optimizer.zero_grad()
        if has_pipeline:
            loss = module.train_step(model, data, target)[1].reduce_mean()
        else:
            loss = F.nll_loss(model(data), target, reduction="mean")
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    classes = {name: type(child).__name__ for name, child in model.get_module().named_children()}
    return smp.dp_rank(), losses, dict(model.state_dict()), classes


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("script")
    parser.add_argument("results")
    args = parser.parse_args()
    smp.init()
    torch.save(train(args.script, torch.float32), Path(args.results) / f"rank{smp.rank()}.pt")
