"""Values of the step, as code between modules uses them, are those of one process."""

from __future__ import annotations

import pytest

from engine_runs import compare, outcomes
from engine_values import CASES


@pytest.mark.parametrize("num_stages", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_values_between_modules(num_stages: int) -> None:
    expected = outcomes("engine_values", list(CASES), 1)[0]
    ranks = outcomes("engine_values", list(CASES), num_stages)
    for name in CASES:
        compare(name, [rank[name] for rank in ranks], expected[name])
    for rank, outcome in enumerate(ranks):
        lines = outcome["read_by_some"].printed.splitlines()
        wanted = ["first"] if rank == 0 else ["last"] if rank == num_stages - 1 else []
        whole = [line for line in expected["read_by_some"].printed.splitlines() if line.split()[0] in wanted]
        assert [line.split()[0] for line in lines] == wanted * 4
        for line, other in zip(lines, whole, strict=True):
            assert [float(v) for v in line.split()[1:]] == pytest.approx([float(v) for v in other.split()[1:]], 1e-9)
