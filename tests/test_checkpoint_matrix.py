"""Save a checkpoint in a job of one shape, resume in a job of every other one: the losses go on as if nothing had been.

A job trains, saves, and trains on; later jobs resume from what the others saved, each in models and optimizers made
anew, with other weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import modelparallel as smp
from distributed_run import mean_over_replicas, own_share
from pool import run_ranks
from sharded_training import TiedGPT

NUM_BEFORE, NUM_AFTER, GLOBAL_BATCH = 3, 5, 8


@dataclass(frozen=True)
class Shape:
    """A shape of a job."""

    name: str
    num_ranks: int
    parameters: dict[str, Any] = field(default_factory=dict)


def shape(pp: int, tp: int, dp: int, **more: Any) -> Shape:
    """``dp``: replicas of the whole model."""
    parameters = {
        "pipeline_parallel_degree": pp, "tensor_parallel_degree": tp, "ddp": True, "microbatches": 2,
        "sdp_param_persistence_threshold": 0, "sdp_gradient_clipping": 1e6, "timeout_seconds": 60, **more,
    }  # fmt: skip
    words = [f"pp{pp}", f"tp{tp}", f"dp{dp}", *(key.split("_")[0] for key, value in more.items() if value)]
    return Shape("-".join(words), pp * tp * dp, parameters)


SHAPES = [
    shape(1, 1, 1),
    shape(2, 1, 1),
    shape(1, 2, 1),
    shape(2, 2, 1),
    shape(2, 2, 2),
    shape(1, 1, 4, sharded_data_parallel_degree=4),
]
MORE_SHAPES = [
    shape(1, 1, 2, shard_optimizer_state=True),
    shape(2, 1, 2, sharded_data_parallel_degree=2),
    shape(1, 2, 2, shard_optimizer_state=True),
]


@smp.step
def train_step(model, tokens, targets):
    loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    model.backward(loss)
    return loss


def make_job(seed: int, dtype: torch.dtype) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    net = TiedGPT().to(dtype)
    if smp.tp_size() > 1:
        for block in net.blocks:
            smp.set_tensor_parallelism(block.up)
            smp.set_tensor_parallelism(block.down)
    model = smp.DistributedModel(net)
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = smp.DistributedOptimizer(torch.optim.AdamW(groups, lr=1e-2))
    return model, optimizer


def train(model: Any, optimizer: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 13, (GLOBAL_BATCH, 6), generator=generator)
        tokens, targets = own_share((tokens[:, :-1], tokens[:, 1:]))
        optimizer.zero_grad()
        losses.append(mean_over_replicas(train_step(model, tokens, targets).reduce_mean()))
        optimizer.step()
    return losses


AFTER = range(NUM_BEFORE, NUM_BEFORE + NUM_AFTER)


def save_on_ranks(path: str, tag: str, dtype: torch.dtype) -> list[float]:
    model, optimizer = make_job(0, dtype)
    train(model, optimizer, range(NUM_BEFORE))
    smp.save_checkpoint(path, tag, model=model, optimizer=optimizer, user_content={"tag": tag})
    return train(model, optimizer, AFTER)


def resume_on_ranks(path: str, tag: str, dtype: torch.dtype) -> list[float]:
    model, optimizer = make_job(1, dtype)
    assert smp.resume_from_checkpoint(path, tag) == {"tag": tag}
    return train(model, optimizer, AFTER)


def save_at(shape: Shape, path: str, dtype: torch.dtype) -> list[float]:
    """The losses after the save."""
    return run_ranks(save_on_ranks, shape.num_ranks, path, shape.name, dtype, parameters=shape.parameters)[0]


def resume_at(shape: Shape, path: str, tag: str, dtype: torch.dtype) -> list[float]:
    """The losses after the resumption."""
    return run_ranks(resume_on_ranks, shape.num_ranks, path, tag, dtype, parameters=shape.parameters)[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Losses by shape and dtype, and the folder; saved when first asked for."""
    path = str(tmp_path_factory.mktemp("checkpoints"))
    losses: dict[tuple[str, torch.dtype], list[float]] = {}

    def get(shape: Shape, dtype: torch.dtype) -> tuple[str, list[float]]:
        folder = f"{path}/{str(dtype).removeprefix('torch.')}"
        if (shape.name, dtype) not in losses:
            losses[shape.name, dtype] = save_at(shape, folder, dtype)
        return folder, losses[shape.name, dtype]

    return get


def check(saved: Any, source: Shape, target: Shape, dtype: torch.dtype) -> None:
    folder, expected = saved(source, dtype)
    found = resume_at(target, folder, source.name, dtype)
    assert len(found) == NUM_AFTER
    if source.name == target.name:
        assert found == expected
    else:
        assert found == pytest.approx(expected, rel=1e-9 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("target", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("source", SHAPES, ids=lambda shape: shape.name)
def test_losses_go_on_in_a_job_of_any_shape(saved, source, target):
    check(saved, source, target, torch.float64)
