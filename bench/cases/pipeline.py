"""pp=2: discovery order against torch.distributed.pipelining, in the same two processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

import modelparallel as smp
from bench.cases.case import Case
from bench.harness import Result, measure_pairs, paired_result
from bench.models import GPT, GPTSize, language_loss, stage_of_gpt, token_batch
from bench.ranks import run_on_ranks

NUM_STAGES = 2
NUM_MICROBATCHES = 8
BATCH = 16
BALANCED = GPTSize()
# The head costs as much as five blocks.
UNBALANCED = GPTSize(vocabulary=16384)

SAME_SPLIT = {
    "pipeline_parallel_degree": NUM_STAGES,
    "microbatches": NUM_MICROBATCHES,
    "auto_partition": False,
    "default_partition": 0,
}
OUR_SPLIT = {"pipeline_parallel_degree": NUM_STAGES, "microbatches": NUM_MICROBATCHES, "memory_weight": 0.0}


@smp.step
def train_step(model: Any, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """One microbatch, as a user writes it."""
    loss = language_loss(model(ids), targets)
    model.backward(loss)
    return loss


def make_gpt(size: GPTSize) -> GPT:
    """The same weights on every rank."""
    torch.manual_seed(0)
    return GPT(size)


def our_model(size: GPTSize, is_same_split: bool) -> Any:
    """The wrapped GPT, with the split of the peer if asked."""
    model = smp.DistributedModel(make_gpt(size))
    if is_same_split:
        gpt: Any = model.module
        half = size.num_layers // NUM_STAGES
        for stage in range(NUM_STAGES):
            for block in gpt.blocks[stage * half : (stage + 1) * half]:
                smp.set_partition(block, stage)
        smp.set_partition(gpt.embedding, 0)
        smp.set_partition(gpt.head, NUM_STAGES - 1)
    return model


class PeerPipeline:
    """ScheduleGPipe over an equal number of layers per stage."""

    def __init__(self, size: GPTSize) -> None:
        self.pp_rank = dist.get_rank()
        self.module: nn.Module = stage_of_gpt(make_gpt(size), self.pp_rank, NUM_STAGES)
        stage = PipelineStage(self.module, self.pp_rank, NUM_STAGES, torch.device("cpu"))
        self.schedule = ScheduleGPipe(stage, NUM_MICROBATCHES, loss_fn=language_loss)

    def step(self, ids: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
        """Forward and backward of a batch; the losses of the microbatches on the last stage."""
        losses: list[torch.Tensor] = []
        if self.pp_rank == 0:
            self.schedule.step(ids, return_outputs=False)
        else:
            self.schedule.step(target=targets, losses=losses, return_outputs=False)
        return losses


def compare_on_rank(size: GPTSize, is_same_split: bool, num_pairs: int) -> tuple[list[float], list[float]]:
    """On each of the two ranks."""
    ids, targets = token_batch(size, BATCH)
    model, peer = our_model(size, is_same_split), PeerPipeline(size)

    def ours() -> Any:
        model.zero_grad()
        return train_step(model, ids, targets)

    def theirs() -> Any:
        peer.module.zero_grad()
        return peer.step(ids, targets)

    our_loss, their_losses = ours().reduce_mean(), theirs()
    if peer.pp_rank == NUM_STAGES - 1:
        torch.testing.assert_close(our_loss, torch.stack(their_losses).mean().detach(), rtol=1e-4, atol=1e-4)
    return measure_pairs(ours, theirs, num_pairs)


def measure_same_split(num_pairs: int) -> list[Result]:
    """The balanced GPT with one split for both."""
    ours, peer = run_on_ranks(compare_on_rank, NUM_STAGES, BALANCED, True, num_pairs, parameters=SAME_SPLIT)[0]
    return [paired_result("pipeline_gpt", "s/step", ours, peer, "ratio <= 1.05")]


def measure_unbalanced(num_pairs: int) -> list[Result]:
    """A head that costs as much as several blocks, each with its own split."""
    ours, peer = run_on_ranks(compare_on_rank, NUM_STAGES, UNBALANCED, False, num_pairs, parameters=OUR_SPLIT)[0]
    return [paired_result("pipeline_unbalanced", "s/step", ours, peer, "reported")]


CASES = [
    Case(
        "pipeline_gpt",
        "pp=2, GPT of 8 layers x 512, 8 microbatches: discovery order against `ScheduleGPipe`, the same split.",
        measure_same_split,
    ),
    Case(
        "pipeline_unbalanced",
        "pp=2, the same GPT with a vocabulary of 16384: our partition against `ScheduleGPipe` with equal "
        "numbers of layers.",
        measure_unbalanced,
    ),
]
