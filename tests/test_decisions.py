"""What configurations mean for the training of a process."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from modelparallel.config.reading import load_config
from modelparallel.training.decisions import Decisions


@dataclass(frozen=True)
class FakeGroup:
    kind: str
    size: int


def decided(pp: int = 1, tp: int = 1, rdp: int = 1, **parameters: Any) -> Decisions:
    sizes = {"pp": pp, "tp": tp, "rdp": rdp, "dp": tp * rdp, "mp": pp * tp, "world": pp * tp * rdp}
    groups: Any = SimpleNamespace(**{kind: FakeGroup(kind, size) for kind, size in sizes.items()})
    if tp * rdp > 1:
        parameters["ddp"] = True
    parameters |= {"pipeline_parallel_degree": pp, "tensor_parallel_degree": tp}
    return Decisions.of(load_config(parameters, {}), groups)


def named(decisions: Decisions) -> tuple[Any, ...]:
    lockstep = None if decisions.lockstep is None else decisions.lockstep.kind
    return (
        decisions.is_divided, decisions.shares_out_parameters, decisions.shards_parameters,
        decisions.whole_model.kind, decisions.samples.kind, decisions.optimizer_shards, lockstep,
    )  # fmt: skip


SHARDED = {"sharded_data_parallel_degree": 2}


@pytest.mark.parametrize(
    ("degrees", "parameters", "expected"),
    [
        ((1, 1, 1), {}, (False, False, False, "mp", "dp", 1, None)),
        ((2, 1, 1), {}, (True, False, False, "mp", "dp", 1, None)),
        ((1, 1, 4), {}, (False, False, False, "mp", "dp", 1, None)),
        ((1, 2, 2), {}, (True, False, False, "mp", "dp", 1, "tp")),
        ((1, 2, 2), {"prescaled_batch": True}, (True, False, False, "mp", "rdp", 1, "tp")),
        ((1, 1, 2), {"prescaled_batch": True}, (False, False, False, "mp", "dp", 1, None)),
        ((2, 1, 2), {"shard_optimizer_state": True}, (True, True, False, "world", "dp", 2, None)),
        ((1, 2, 1), {"shard_optimizer_state": True}, (True, True, False, "world", "dp", 1, "tp")),
        ((1, 1, 4), SHARDED, (True, True, True, "world", "dp", 2, None)),
        ((2, 2, 2), SHARDED, (True, True, True, "world", "dp", 2, "tp")),
        ((2, 2, 2), {**SHARDED, "sdp_gather": "visit"}, (True, True, True, "world", "dp", 2, "dp")),
    ],
)
def test_who_holds_and_updates_what(degrees, parameters, expected):
    assert named(decided(*degrees, **parameters)) == expected


def test_optimizer_state_is_not_shared_out_by_one_rank():
    decisions = decided(1, 1, 1, shard_optimizer_state=True, ddp=True)
    assert not decisions.shares_out_parameters and not decisions.is_divided


def test_precision():
    full, half, bf16 = decided(), decided(fp16=True), decided(bf16=True)
    assert [each.half for each in (full, half, bf16)] == [None, torch.float16, torch.bfloat16]
    assert [each.has_loss_scale for each in (full, half, bf16)] == [False, True, False]


@pytest.mark.parametrize("finds_unused", [False, True])
def test_how_sharded_parameters_are_gathered(finds_unused):
    def by_visit(pp: int, **parameters: Any) -> bool:
        return decided(pp, 1, 2, **SHARDED, **parameters).gathers_by_visit(finds_unused=finds_unused)

    assert by_visit(1) is not finds_unused and not by_visit(2)
    assert all(by_visit(pp, sdp_gather="visit") and not by_visit(pp, sdp_gather="step") for pp in (1, 2))
