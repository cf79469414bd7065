"""Batches of other sizes and shapes: training with one, evaluation with others and smaller ones, last batches that do
not divide, lengths that change from step to step and from microbatch to microbatch. Every result equals plain torch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modelparallel as smp
from engine_runs import SCHEDULES, assert_equal_results, readable
from parity import assert_parity
from pool import run_ranks
from training import step_of
from zoo import BATCH_SIZE
from zoo_catalogue import ZOO, make_model

QUICK = ("llama", "lstm", "cnn_batchnorm", "routed")
MODELS = (
    *QUICK, "t5", "bert_tied", "tree", "gluey", "torch_encoder", "unet", "vit", "early_exit", "branching", "containers",
)  # fmt: skip
NUM_MICROBATCHES = 4


@dataclass(frozen=True)
class Round:
    """A call of a step: ``mode`` is "train", "no_grad" (and eval mode), "eval" (without no_grad) or "inference"."""

    mode: str
    size: int
    length: int = 8


ROUNDS = (
    Round("train", 8), Round("no_grad", 8), Round("no_grad", 5), Round("no_grad", 1), Round("train", 8),
    Round("train", 7), Round("no_grad", 13, 5), Round("inference", 3), Round("train", 2, 6), Round("eval", 6, 3),
    Round("train", 8), Round("no_grad", 2, 8), Round("no_grad", 24, 7), Round("train", 5, 5), Round("no_grad", 5),
)  # fmt: skip


def batch(name: str, seed: int, size: int, length: int) -> tuple[Tensor, ...]:
    """``size`` samples for a model of the zoo; token sequences are cut to ``length``."""
    parts = [ZOO[name].make_batch(100 * seed + index) for index in range(-(-size // BATCH_SIZE))]
    joined = [torch.cat(column)[:size] for column in zip(*parts, strict=True)]
    is_sequence = [tensor.dtype == torch.long and tensor.ndim == 2 for tensor in joined]
    return tuple([part[:, :length] if cut else part for part, cut in zip(joined, is_sequence, strict=True)])


def trimmed_loss(name: str, model: Any, *inputs: Tensor) -> Tensor:
    """The loss of a microbatch cut to its longest sample: other lengths in every microbatch."""
    if len(inputs) == 2 and inputs[1].ndim == 2:
        ids, mask = inputs
        length = 2 + int(ids[:, 0].sum()) % (ids.shape[1] - 1)
        inputs = (ids[:, :length], mask[:, :length])
    return ZOO[name].body(model, *inputs)


def plain_losses(body: Any, inputs: tuple[Tensor, ...]) -> list[tuple[float, Tensor]]:
    """(share of the samples, loss) of each microbatch, in one process."""
    size = len(inputs[0])
    columns = [tensor.tensor_split(min(NUM_MICROBATCHES, size)) for tensor in inputs]
    return [(len(part[0]) / size, body(*part)) for part in zip(*columns, strict=True)]


@functools.cache
def plain(name: str, is_trimmed: bool) -> tuple[list[Any], dict[str, Tensor]]:
    """(the losses of each round by microbatch, the final weights) with plain torch."""
    model = make_model(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    results = []
    for index, round_ in enumerate(ROUNDS):
        inputs = batch(name, index, round_.size, round_.length)
        body = functools.partial(trimmed_loss, name, model) if is_trimmed else functools.partial(ZOO[name].body, model)
        if round_.mode == "train":
            optimizer.zero_grad()
            parts = plain_losses(body, inputs)
            for share, loss in parts:
                (loss * share).backward()
            optimizer.step()
        else:
            model.eval()
            with torch.no_grad():
                parts = plain_losses(body, inputs)
            model.train()
        results.append([loss.detach() for _, loss in parts])
    return results, {key: value.detach().clone() for key, value in model.state_dict().items()}


def run_rounds(names: tuple[str, ...], is_trimmed: bool) -> dict[str, Any]:
    """The body of a rank."""
    found: dict[str, Any] = {}
    for name in names:
        model = smp.DistributedModel(make_model(name))
        optimizer = smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
        loss_of = functools.partial(trimmed_loss, name) if is_trimmed else ZOO[name].body
        train = step_of(loss_of)

        @smp.step
        def evaluate(model: Any, *inputs: Any) -> Any:
            return loss_of(model, *inputs)  # noqa: B023

        results = []
        for index, round_ in enumerate(ROUNDS):
            inputs = batch(name, index, round_.size, round_.length)
            if round_.mode == "train":
                optimizer.zero_grad()
                results.append(readable(train(model, *inputs)))
                optimizer.step()
                continue
            model.eval()
            context = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "eval": torch.enable_grad}
            with context[round_.mode]():
                results.append(readable(evaluate(model, *inputs)))
            model.train()
        found[name] = results, model.state_dict()
    return found


def settings(num_stages: int, schedule: str) -> dict[str, Any]:
    return {
        "pipeline_parallel_degree": num_stages, "microbatches": NUM_MICROBATCHES, "pipeline": schedule,
        "timeout_seconds": 30,
    }  # fmt: skip


@pytest.mark.parametrize("is_trimmed", [False, True], ids=["by_step", "by_microbatch"])
@pytest.mark.parametrize(
    "names, num_stages, schedule",
    [
        pytest.param(QUICK, 2, SCHEDULES[-1], id=f"quick-2-{SCHEDULES[-1]}"),
        *[
            pytest.param(MODELS, stages, schedule, id=f"all-{stages}-{schedule}", marks=pytest.mark.slow)
            for stages in (2, 4) for schedule in SCHEDULES
        ],
    ],
)  # fmt: skip
def test_shapes_change_between_steps_and_microbatches(
    names: tuple[str, ...], num_stages: int, schedule: str, is_trimmed: bool
) -> None:
    ranks = run_ranks(run_rounds, num_stages, names, is_trimmed, parameters=settings(num_stages, schedule))
    for name in names:
        losses, weights = plain(name, is_trimmed)
        for rank in ranks:
            assert_equal_results(rank[name][0], losses, name)
            assert_parity(rank[name][1], weights, dtype=torch.float64)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [part for _ in range(4) for part in (nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh())]
        self.layers = nn.Sequential(*layers, nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def data_set(num_samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(num_samples, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 4, (num_samples,), generator=generator)


def evaluate_data_set(num_samples: int, batch_size: int) -> dict[str, Any]:
    """The body of a rank: some training, then an evaluation as scripts write it, whose last batch is smaller."""
    torch.manual_seed(5)
    model = smp.DistributedModel(Classifier().double())
    optimizer = smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))

    @smp.step
    def train(model: Any, x: Tensor, y: Tensor) -> Any:
        loss = F.cross_entropy(model(x), y)
        model.backward(loss)
        return loss

    @smp.step
    def evaluate(model: Any, x: Tensor, y: Tensor) -> Any:
        logits = model(x)
        return F.cross_entropy(logits, y, reduction="sum"), logits, (logits.argmax(-1) == y).sum()

    x, y = data_set(num_samples)
    for start in range(0, 3 * batch_size, batch_size):
        optimizer.zero_grad()
        train(model, x[start : start + batch_size], y[start : start + batch_size])
        optimizer.step()
    total, num_right, rows = 0.0, 0, []
    model.eval()
    with torch.no_grad():
        for start in range(0, num_samples, batch_size):
            loss, logits, right = evaluate(model, x[start : start + batch_size], y[start : start + batch_size])
            total += loss.reduce_sum().item()
            num_right += int(right.reduce_sum())
            rows.append(logits.concat())
    return {"total": total, "num_right": num_right, "logits": torch.cat(rows), "weights": model.state_dict()}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_stages", [2, 4])
def test_the_evaluation_of_a_data_set_with_a_smaller_last_batch(num_stages: int, schedule: str) -> None:
    num_samples, batch_size = 85, 16  # the last batch: 5 samples for 4 microbatches
    ranks = run_ranks(evaluate_data_set, num_stages, num_samples, batch_size, parameters=settings(num_stages, schedule))
    x, y = data_set(num_samples)
    for rank in ranks:
        model = Classifier().double().eval()
        model.load_state_dict(rank["weights"])
        with torch.no_grad():
            logits = model(x)  # the whole set at once
        assert_equal_results(rank["logits"], logits, "logits")
        assert_equal_results(rank["total"], F.cross_entropy(logits, y, reduction="sum").item(), "total loss")
        assert rank["num_right"] == int((logits.argmax(-1) == y).sum())
