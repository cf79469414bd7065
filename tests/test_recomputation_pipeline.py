"""Activation checkpointing over the stages of a pipeline: parity, and one recomputation for each microbatch."""

from __future__ import annotations

import functools

import pytest

from engine_runs import compare, outcomes
from recomputation_programs import CASES

MODULE = "recomputation_programs"
NAMES = sorted({name.split("/")[0] for name in CASES})


@functools.cache
def expected(num_microbatches: int) -> dict:
    names = [f"{name}/plain" for name in NAMES]
    return outcomes(MODULE, names, 1, num_microbatches=num_microbatches, min_steps=3)[0]


@pytest.mark.parametrize(
    ("num_stages", "how", "more"),
    [
        (2, "torch", {"pipeline": "interleaved"}),
        (2, "torch", {"pipeline": "zero_bubble"}),
        (2, "reentrant", {"pipeline": "simple"}),
        (3, "torch", {"pipeline": "zero_bubble"}),
        (3, "reentrant", {"pipeline": "interleaved"}),
        (4, "torch", {"pipeline": "interleaved"}),
    ],
)
def test_c083_regions_over_stages_give_the_same_gradients(num_stages: int, how: str, more: dict) -> None:
    names = [f"{name}/{how}" for name in NAMES if f"{name}/{how}" in CASES]
    found = outcomes(MODULE, names, num_stages, num_microbatches=4, min_steps=3, **more)
    wanted = expected(4)
    for name in names:
        compare(name, [rank[name] for rank in found], wanted[name.split("/")[0] + "/plain"])
