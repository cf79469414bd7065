"""Objects that glue fills with values of the step and blocks read; full backward hooks of what has no home."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine_runs import Case, compare, outcomes, run_case
from pool import run_ranks
from test_engine_random import WIDTH, square, vectors


class Context:
    def __init__(self, **values: Any) -> None:
        self.values, self.count = values, 3


class Reader(nn.Module):
    """One unit: its weight is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH, WIDTH))
        self.writes = False

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if self.writes:
            context.count += 1
        return torch.tanh(x @ self.weight * context.values["gate"]) + context.values["inner"].values["shift"]


class Net(nn.Module):
    def __init__(self, writes: bool = False, hooked: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(nn.ModuleList([Reader(), nn.Linear(WIDTH, WIDTH)]) for _ in range(2))
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
        for pair in self.blocks:
            pair[0].writes = writes
        if hooked:
            self.inner.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 2,))

    def forward(self, x: Tensor) -> Tensor:
        context = Context(gate=torch.sigmoid(self.gate(x)), inner=Context(shift=x.mean(0)))
        context.values["inner"].values["shift"] = self.gate(x).mean(0)
        for reader, linear in self.blocks:
            x = linear(reader(x, context))
        return self.inner(x)


CASES = {"context": Case(Net, vectors, square)}
REFUSED = {
    "writes": Case(lambda: Net(writes=True), vectors, square),
    "hook": Case(lambda: Net(hooked=True), vectors, square),
}


@pytest.mark.parametrize("num_stages", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_objects_that_hold_values(num_stages: int) -> None:
    expected = outcomes(__name__, list(CASES), 1)[0]
    ranks = outcomes(__name__, list(CASES), num_stages)
    for name in CASES:
        compare(name, [rank[name] for rank in ranks], expected[name])


def run_refused() -> dict[str, str]:
    return {name: run_case(case, is_scattered=True).error for name, case in REFUSED.items()}


def test_what_would_stay_at_home_is_refused_by_name() -> None:
    parameters = {"pipeline_parallel_degree": 2, "microbatches": 2, "auto_partition": False, "default_partition": 0}
    errors = run_ranks(run_refused, 2, parameters=parameters)
    assert any("changed its argument of type Context" in rank["writes"] for rank in errors), errors
    assert any("module 'inner' (Sequential) has full backward hooks" in rank["hook"] for rank in errors), errors
