"""Random numbers under a pipeline are those of one process, on any number of stages."""

from __future__ import annotations

import pytest

from engine_random import CASES
from engine_runs import compare, outcomes


@pytest.mark.parametrize("num_stages", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_random_numbers_do_not_depend_on_the_partition(num_stages: int) -> None:
    expected = outcomes("engine_random", list(CASES), 1)[0]
    ranks = outcomes("engine_random", list(CASES), num_stages)
    for name in CASES:
        compare(name, [rank[name] for rank in ranks], expected[name])
