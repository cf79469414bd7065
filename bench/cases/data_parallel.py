"""dp=2: the gradient reducer against DDP."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import modelparallel as smp
from bench.cases.case import Case
from bench.harness import Result, measure_pairs, paired_result
from bench.models import GPT, GPTSize, language_loss, token_batch
from bench.ranks import run_on_ranks

SIZE = GPTSize()
BATCH = 4


def compare_on_rank(num_pairs: int) -> tuple[list[float], list[float]]:
    """Forward and backward with reduced gradients, both by a plain ``loss.backward()``."""
    ids, targets = token_batch(SIZE, BATCH)
    torch.manual_seed(0)
    model = smp.DistributedModel(GPT(SIZE))
    torch.manual_seed(0)
    ddp = DistributedDataParallel(GPT(SIZE))

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
    ours, peer = run_on_ranks(compare_on_rank, 2, num_pairs, parameters={"ddp": True})[0]
    return [paired_result("data_parallel_gpt", "s/step", ours, peer, "ratio <= 1.03")]


CASES = [
    Case(
        "data_parallel_gpt",
        "dp=2, GPT of 8 layers x 512: forward and `loss.backward()` of `smp.DistributedModel` against DDP, both with "
        "default buckets.",
        measure_ddp,
    )
]
