"""dp=2: the gradient reducer against DDP, and sharding of the optimizer state against ZeroRedundancyOptimizer."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import modelparallel as smp
from bench.cases.case import Case
from bench.harness import Result, measure_pairs, paired_result
from bench.models import GPT, GPTSize, language_loss, token_batch
from bench.ranks import pairs_of_launches, run_on_ranks

SIZE = GPTSize()
BATCH = 4


def compare_on_rank(num_pairs: int, is_ours_first: bool) -> tuple[list[float], list[float]]:
    """Forward and backward with reduced gradients, both by a plain ``loss.backward()``."""
    ids, targets = token_batch(SIZE, BATCH)

    def wrapped(is_ours: bool) -> nn.Module:
        torch.manual_seed(0)
        model = GPT(SIZE)
        return smp.DistributedModel(model) if is_ours else DistributedDataParallel(model, process_group=dp_group)

    dp_group = smp.get_dp_process_group()
    both = {is_ours: wrapped(is_ours) for is_ours in (is_ours_first, not is_ours_first)}
    model, ddp = both[True], both[False]

    def training(module: nn.Module) -> None:
        module.zero_grad()
        language_loss(module(ids), targets).backward()

    training(model)
    training(ddp)
    for mine, other in zip(model.parameters(), ddp.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    return measure_pairs(lambda: training(model), lambda: training(ddp), num_pairs)


def measure_ddp(num_pairs: int) -> list[Result]:
    """Seconds per forward and backward."""
    ours, peer = pairs_of_launches(compare_on_rank, 2, num_pairs, {"ddp": True})
    return [paired_result("data_parallel_gpt", "s/step", ours, peer, "ratio <= 1.02")]


def compare_sharded_on_rank(num_pairs: int) -> tuple[list[float], list[float]]:
    """Forward, backward and update with Adam, the optimizer state shared out over two ranks."""
    ids, targets = token_batch(SIZE, BATCH)
    torch.manual_seed(0)
    model = smp.DistributedModel(GPT(SIZE))
    optimizer = smp.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=1e-4))
    torch.manual_seed(0)
    ddp = DistributedDataParallel(GPT(SIZE))
    zero = ZeroRedundancyOptimizer(ddp.parameters(), torch.optim.Adam, lr=1e-4)

    def training(module: nn.Module, update: torch.optim.Optimizer) -> None:
        update.zero_grad()
        module.zero_grad()
        language_loss(module(ids), targets).backward()
        update.step()

    training(model, optimizer)
    training(ddp, zero)
    for mine, other in zip(model.parameters(), ddp.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    return measure_pairs(lambda: training(model, optimizer), lambda: training(ddp, zero), num_pairs)


def measure_sharded(num_pairs: int) -> list[Result]:
    """Seconds per step."""
    parameters = {"ddp": True, "shard_optimizer_state": True}
    ours, peer = run_on_ranks(compare_sharded_on_rank, 2, num_pairs, parameters=parameters)[0]
    return [paired_result("shard_optimizer_state_gpt", "s/step", ours, peer, "ratio <= 1.0")]


CASES = [
    Case(
        "shard_optimizer_state_gpt",
        "dp=2, the same GPT: forward, backward and Adam with `shard_optimizer_state` against DDP and "
        "`ZeroRedundancyOptimizer`.",
        measure_sharded,
    ),
    Case(
        "data_parallel_gpt",
        "dp=2, GPT of 8 layers x 512: forward and `loss.backward()` of `smp.DistributedModel` against DDP, both with "
        "default buckets and over one process group.",
        measure_ddp,
    ),
]
