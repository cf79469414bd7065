"""Processor time of wrapping models of many small parameters under sharded data parallelism."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import modelparallel as smp
from bench.cases.case import Case
from bench.cases.sharded import DEGREE, PARAMETERS
from bench.harness import Result, plain_result
from bench.models import Block, GPTSize
from bench.ranks import run_on_ranks

WIDTH = 8
NUM_EXPERTS = 64
NUM_EXPERT_BLOCKS = 100
NUM_BLOCKS = 1667
NUM_LAUNCHES = 3


class Expert(nn.Module):
    """Three matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


class Mixture(nn.Module):
    """Experts, all of which look at everything."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, NUM_EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(NUM_EXPERTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.router(x).softmax(-1).unbind(-1)
        outputs = [weight.unsqueeze(-1) * expert(x) for weight, expert in zip(weights, self.experts, strict=True)]
        return torch.stack(outputs).sum(0)


class ExpertBlock(nn.Module):
    """A block with a mixture of experts, as in language models."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = Block(GPTSize(hidden=WIDTH, num_heads=1))
        self.mixture = Mixture()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dense(x)
        return x + self.mixture(x)


def few_large_groups() -> nn.Sequential:
    """100 blocks of 64 experts: 20,500 parameters."""
    return nn.Sequential(*(ExpertBlock() for _ in range(NUM_EXPERT_BLOCKS)))


def many_small_groups() -> nn.Sequential:
    """1,667 blocks of a GPT: 20,004 parameters."""
    return nn.Sequential(*(Block(GPTSize(hidden=WIDTH, num_heads=1)) for _ in range(NUM_BLOCKS)))


def wrap_by_hand(model: nn.Sequential) -> None:
    """FSDP2 on each block and on the root; parameters are gathered by the first forward only."""
    mesh = init_device_mesh("cpu", (DEGREE,), mesh_dim_names=("shard",))
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def on_rank(make: Callable[[], nn.Sequential], is_ours: bool) -> float:
    """Seconds of processor time. In a process of its own."""
    model = make()
    dist.barrier()
    start = time.process_time()
    if is_ours:
        smp.DistributedModel(model)
    else:
        wrap_by_hand(model)
    return time.process_time() - start


def measure(name: str, make: Callable[[], nn.Sequential], target: str) -> list[Result]:
    """The medians of a few launches, on the rank that takes longer."""
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(NUM_LAUNCHES):
        for is_ours, found in times.items():
            found.append(max(run_on_ranks(on_rank, DEGREE, make, is_ours, parameters=PARAMETERS)))
    ours, peer = (statistics.median(times[is_ours]) for is_ours in (True, False))
    return [plain_result(name, "s", ours, NUM_LAUNCHES, target, peer)]


CASES = [
    Case(
        "sharded_wrap_experts",
        "Processor time of a process in which `smp.DistributedModel` wraps 20,500 small parameters, "
        "sharded dp=2: 100 blocks of 64 experts, each block a group. The peer is FSDP2 by hand, which leaves the first "
        "gathering to the first forward.",
        lambda num_pairs: measure("sharded_wrap_experts", few_large_groups, "ratio <= 2.5"),
    ),
    Case(
        "sharded_wrap_blocks",
        "The same with 1,667 blocks of a GPT, 20,004 parameters: 1,667 groups of twelve.",
        lambda num_pairs: measure("sharded_wrap_blocks", many_small_groups, "ratio <= 2.5"),
    ),
]
