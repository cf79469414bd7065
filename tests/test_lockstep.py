"""Pipelines whose stages are tensor-parallel groups: all run the same actions, although batches and programs differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modelparallel as smp
from modelparallel.errors import StepUsageError
from parity import assert_parity
from pool import run_ranks
from training import sgd, square_loss, step_of

F64 = torch.float64
NUM_STEPS, LENGTH, V = 4, 6, 19
#: Samples of the two tensor-parallel ranks.
SAMPLES = (3, 2)


def make_llama(is_tied: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=V, max_position_embeddings=LENGTH, use_cache=False, tie_word_embeddings=is_tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Some microbatches are padded and some are not: transformers then makes no mask, which is another program."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    ids = torch.randint(V, (SAMPLES[rank], LENGTH), generator=generator)
    kept = torch.ones_like(ids)
    if (step + rank) % 2:
        kept[0, -2:] = 0
    return ids, kept


def loss_of(model: nn.Module, ids: Tensor, kept: Tensor) -> Tensor:
    return model(ids, attention_mask=kept, labels=ids.masked_fill(kept == 0, -100)).loss


def train(is_tied: bool) -> tuple[dict[str, Tensor], Any]:
    model = make_llama(is_tied)
    smp.set_tensor_parallelism(model)
    wrapped = smp.DistributedModel(model)
    optimizer = smp.DistributedOptimizer(sgd(wrapped.parameters()))
    train_step = step_of(loss_of)
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        train_step(wrapped, *batch(step, smp.dp_rank()))
        optimizer.step()
    return wrapped.state_dict(), wrapped._runtime.engine.plans.counts


def expected_weights(is_tied: bool) -> dict[str, Tensor]:
    """One process: the mean of the ranks' losses, each weighted by samples within its rank."""
    model = make_llama(is_tied)
    optimizer = sgd(model.parameters())
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        for rank, num_samples in enumerate(SAMPLES):
            ids, kept = batch(step, rank)
            for part in range(2):
                own = ids.tensor_split(2)[part], kept.tensor_split(2)[part]
                (loss_of(model, *own) * len(own[0]) / num_samples / 2).backward()
        optimizer.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("is_tied", "more"),
    [
        (True, {}),
        (True, {"tied_weights": "replicate"}),
        (False, {"pipeline": "zero_bubble"}),
        (False, {"pipeline": "simple"}),
    ],
    ids=str,
)
def test_batches_and_programs_that_differ_between_pipelines(is_tied: bool, more: dict[str, Any]) -> None:
    parameters = {
        "tensor_parallel_degree": 2, "pipeline_parallel_degree": 2, "microbatches": 2, "ddp": True,
        "timeout_seconds": 20, **more,
    }  # fmt: skip
    found = run_ranks(train, 4, is_tied, parameters=parameters)
    expected = expected_weights(is_tied)
    for weights, counts in found:
        assert_parity(weights, expected, dtype=F64)
        # Tied weights in one place make a stage that is visited twice.
        assert (counts.unplanned > 0) == (is_tied and not more)


def feed(samples: tuple[int, int]) -> str:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    smp.set_tensor_parallelism(model)
    wrapped = smp.DistributedModel(model)
    train_step = step_of(square_loss)
    try:
        train_step(wrapped, torch.ones(samples[smp.tp_rank()], 4))
    except StepUsageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("pp", [1, 2])
def test_ranks_with_different_numbers_of_microbatches_are_told(pp: int) -> None:
    parameters = {
        "tensor_parallel_degree": 2, "pipeline_parallel_degree": pp, "microbatches": 3, "ddp": True,
        "timeout_seconds": 20,
    }  # fmt: skip
    for error in run_ranks(feed, 2 * pp, (3, 2), parameters=parameters):
        assert "microbatches=3" in error and "(3 on tp_rank 0, 2 on tp_rank 1 samples)" in error, error
    assert run_ranks(feed, 2 * pp, (2, 2), parameters=parameters) == [""] * 2 * pp
    assert run_ranks(feed, 2 * pp, (4, 3), parameters=parameters) == [""] * 2 * pp
