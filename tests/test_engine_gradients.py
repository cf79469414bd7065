"""Gradients across the stages, and control flow, are those of one process."""

from __future__ import annotations

import pytest

from engine_gradients import CASES
from engine_runs import compare, outcomes


@pytest.mark.parametrize("num_stages", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_gradients_and_control_flow(num_stages: int) -> None:
    expected = outcomes("engine_gradients", list(CASES), 1)[0]
    ranks = outcomes("engine_gradients", list(CASES), num_stages)
    for name in CASES:
        compare(name, [rank[name] for rank in ranks], expected[name])
