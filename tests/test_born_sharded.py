"""Models that are built late under sharded data parallelism: no process ever holds the whole of it."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from torch import nn

import modelparallel as smp
from pool import run_ranks
from training import square_step
from training_cells import Cell, train_on_rank

WIDTH, LAYERS = 1536, 12
LAYER_BYTES = 4 * WIDTH * WIDTH


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.inner(self.norm(x)))


def build() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(*(Block() for _ in range(LAYERS)), nn.Linear(WIDTH, 3))


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def grown_on_rank(is_delayed: bool) -> tuple[int, dict[str, torch.Tensor]]:
    """Peak of the resident memory until the model is placed, and its values.

    While a layer is sharded there are some copies of it: built, broadcast, gathered once.
    """
    ctypes.CDLL(None).mallopt(-3, 256 * 1024)  # M_MMAP_THRESHOLD: freed layers go back at once
    torch.manual_seed(0)
    torch.ones(2, 2) @ torch.ones(2, 2)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    with smp.delay_param_initialization(is_delayed):
        net = build()
    model = smp.DistributedModel(net)
    peaks: list[int] = []
    model.register_post_partition_hook(lambda *_: peaks.append(resident("VmHWM")))
    square_step(model, torch.ones(2, WIDTH))
    values = {name: value[:2].clone() for name, value in model.state_dict().items()}
    return peaks[0] - before, values


@pytest.mark.parametrize(("num_ranks", "stages"), [pytest.param(4, 1, marks=pytest.mark.slow), (4, 2)])
def test_parameters_are_born_sharded_with_the_values_of_eager_construction(num_ranks, stages):
    degree = num_ranks // stages
    parameters = {
        "pipeline_parallel_degree": stages, "ddp": True, "sharded_data_parallel_degree": degree,
        "sdp_param_persistence_threshold": 10_000, "skip_tracing": True,
    }  # fmt: skip
    late = run_ranks(grown_on_rank, num_ranks, True, parameters=parameters)
    at_once = run_ranks(grown_on_rank, num_ranks, False, parameters=parameters)
    share = LAYERS * LAYER_BYTES / num_ranks
    for (peak, values), (other, expected) in zip(late, at_once, strict=True):
        assert all(torch.equal(values[name], value) for name, value in expected.items())
        assert peak <= share + 5 * LAYER_BYTES, (peak / LAYER_BYTES, other / LAYER_BYTES)
        assert other >= LAYERS * LAYER_BYTES


@pytest.mark.parametrize(
    "cell",
    [
        Cell(2, 2, 1, "ddp", "fp16", True),
        Cell(4, 2, 1, "sdp", "bf16", False),
        Cell(2, 1, 1, "sdp", "fp32", True),
        Cell(2, 1, 1, "optimizer", "bf16", False),
    ],
    ids=str,
)
def test_c094_late_models_train_as_those_built_at_once(cell):
    late, at_once = (
        run_ranks(train_on_rank, cell.num_ranks, cell, is_late, parameters=cell.parameters())
        for is_late in (True, False)
    )
    for (losses, norms, weights), (expected_losses, expected_norms, expected) in zip(late, at_once, strict=True):
        assert losses == expected_losses and norms == expected_norms
        assert all(torch.equal(weights[name], value) for name, value in expected.items())
