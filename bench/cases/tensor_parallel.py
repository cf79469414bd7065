"""tp=2: a pair of DistributedLinear against the layouts of torch's tensor parallelism."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import modelparallel as smp
from bench.cases.case import Case
from bench.harness import Result, measure_pairs, paired_result
from bench.ranks import run_on_ranks

NUM_RANKS = 2
HIDDEN = 512
ROWS = 512  # of each rank's own batch
# Steps per measurement: one lasts a few tens of milliseconds.
STEPS = 5

# Both take and return this rank's rows. Row-wise moves what DistributedLinear moves: features out, partial sums back.
ROWWISE = {
    "0": partial(RowwiseParallel, input_layouts=Shard(0), output_layouts=Shard(0)),
    "2": partial(RowwiseParallel, input_layouts=Shard(0), output_layouts=Shard(0)),
}
COLWISE_ROWWISE = {
    "0": partial(ColwiseParallel, input_layouts=Shard(0)),
    "2": partial(RowwiseParallel, output_layouts=Shard(0)),
}
PEERS: dict[str, dict[str, Any]] = {"rowwise": ROWWISE, "colwise_rowwise": COLWISE_ROWWISE}


def make_pair() -> nn.Sequential:
    """The two layers of a transformer's MLP."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(HIDDEN, 4 * HIDDEN), nn.ReLU(), nn.Linear(4 * HIDDEN, HIDDEN))


def compare_on_rank(peer_name: str, num_pairs: int) -> tuple[list[float], list[float]]:
    """Forward and backward of the pair."""
    with smp.tensor_parallelism():
        pair = make_pair()
    # Wrapping replaces the layers; the module is then called by itself, so that gradient reduction is in neither
    # figure.
    ours = smp.DistributedModel(pair).get_module()
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    plan: Any = {name: style() for name, style in PEERS[peer_name].items()}
    theirs = parallelize_module(make_pair(), mesh, plan)
    generator = torch.Generator().manual_seed(smp.rank())
    x = torch.randn(ROWS, HIDDEN, generator=generator)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)

    def train(module: nn.Module) -> None:
        for _ in range(STEPS):
            module.zero_grad()
            module(x.requires_grad_()).square().sum().backward()

    return measure_pairs(partial(train, ours), partial(train, theirs), num_pairs)


def measure(peer_name: str, target: str, num_pairs: int) -> list[Result]:
    """Seconds per five forwards and backwards."""
    parameters = {"tensor_parallel_degree": NUM_RANKS, "ddp": True}
    ours, peer = run_on_ranks(compare_on_rank, NUM_RANKS, peer_name, num_pairs, parameters=parameters)[0]
    return [paired_result(f"tensor_linear_{peer_name}", f"s/{STEPS} steps", ours, peer, target)]


CASES = [
    Case(
        "tensor_linear_rowwise",
        "tp=2, a pair of `DistributedLinear` (512 -> 2048 -> 512, 512 rows on each rank), forward and backward, "
        "against DTensor row-wise layers with the batch sharded in and out: the same bytes.",
        partial(measure, "rowwise", "ratio <= 1.00"),
    ),
    Case(
        "tensor_linear_colwise_rowwise",
        "The same pair against DTensor column-wise, then row-wise, with the batch sharded in and out: fewer messages.",
        partial(measure, "colwise_rowwise", "reported"),
    ),
]
