"""Save a checkpoint in a job of one shape, resume in a job of every other one: the losses go on as if nothing had been.

A job trains, saves, and trains on; later jobs resume from what the others saved, each in models and optimizers made
anew, with other weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import modelparallel as smp
from checkpoint_jobs import make_job, train
from pool import run_ranks

NUM_BEFORE, NUM_AFTER = 3, 5


@dataclass(frozen=True)
class Shape:
    """A shape of a job."""

    name: str
    num_ranks: int
    parameters: dict[str, Any] = field(default_factory=dict)


def shape(pp: int, tp: int, dp: int, **more: Any) -> Shape:
    """``dp``: copies of the whole model."""
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


PAIRS = [(source, target) for source in SHAPES for target in SHAPES]
# Each shape is saved at and resumed at, and all that makes shapes differ is in it; `slow` has all others.
SAMPLE = [(SHAPES[0], SHAPES[5]), (SHAPES[5], SHAPES[3]), (SHAPES[3], SHAPES[3]), (SHAPES[3], SHAPES[0])]


@pytest.mark.parametrize(("source", "target"), SAMPLE, ids=lambda shape: shape.name)
def test_losses_go_on_in_a_job_of_another_shape(saved, source, target):
    check(saved, source, target, torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "target"), [pair for pair in PAIRS if pair not in SAMPLE], ids=lambda shape: shape.name
)
def test_losses_go_on_in_a_job_of_any_shape(saved, source, target):
    check(saved, source, target, torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda shape: shape.name)
def test_losses_go_on_in_full_precision(saved, source, target):
    check(saved, source, target, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("more", MORE_SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("other", [SHAPES[0], SHAPES[3], SHAPES[5]], ids=lambda shape: shape.name)
def test_losses_go_on_with_shared_out_optimizers(saved, more, other):
    check(saved, more, other, torch.float64)
    check(saved, other, more, torch.float64)
    check(saved, more, more, torch.float64)
