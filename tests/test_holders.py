"""Objects that glue fills with values of the step and blocks read; caches that layers fill; full backward hooks of what
has no home; tensors that glue fills inside opened modules.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine_models import WIDTH, square, vectors
from engine_runs import Case, compare, outcomes, run_case
from pool import run_ranks


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
        for pair in self.blocks:
            reader, linear = pair.children()
            x = linear(reader(x, context))
        return self.inner(x)


class Fills(nn.Module):
    """Puts its result into an ordinary tensor, as blocks of experts do, and returns a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        filled = torch.zeros(len(x), WIDTH, dtype=x.dtype)
        filled.index_add_(0, torch.arange(len(x)), torch.tanh(self.linear(x[:, 0])))
        return filled.reshape(len(x), 1, WIDTH)


class LookedInto(nn.Module):
    """Hooks keep what modules inside the blocks give, so that the blocks are opened, and what the blocks give."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Fills() for _ in range(4))
        self.kept: list[Any] = []
        for block in self.blocks:
            for module in (block, block.linear):
                module.register_forward_hook(lambda module, args, output: self.kept.append(output))

    def forward(self, x: Tensor) -> Tensor:
        self.kept.clear()
        x = x[:, None]
        for block in self.blocks:
            x = block(x)
        return x[:, 0] + sum(kept.reshape(len(x), WIDTH) for kept in self.kept)


CASES = {"context": Case(Net, vectors, square), "looked_into": Case(LookedInto, vectors, square)}
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


def run_with_caches(name: str) -> list[str]:
    """What a step says that looks at the cache its model has made: in the step, after it, and in a second forward."""
    import modelparallel as smp
    from zoo import tokens
    from zoo_catalogue import as_entry_wants, make_model

    with as_entry_wants(name):
        model = smp.DistributedModel(make_model(name)).eval()
    kept: list[Any] = []

    def cache_of(output: Any) -> Any:
        return output.get("past_key_values", output.get("cache_params"))

    def first_of(cache: Any) -> Tensor:
        return cache.layers[0].keys if hasattr(cache, "layers") else cache.ssm_states[0]

    def read(model: Any, ids: Tensor) -> Tensor:
        output = model(ids)
        return output.logits.mean() + first_of(cache_of(output)).mean()

    def keep(model: Any, ids: Tensor) -> Tensor:
        output = model(ids)
        kept.append(cache_of(output))
        return output.logits.mean()

    def go_on(model: Any, ids: Tensor) -> Tensor:
        cache = cache_of(model(ids))
        given = {"past_key_values": cache} if name == "llama" else {"cache_params": cache, "cache_position": ids[0]}
        return model(ids[:, -1:], **given).logits.mean()

    texts = []
    for body in (read, keep, go_on):
        try:
            with torch.no_grad():
                smp.step(body)(model, tokens(0)[0])
            if body is keep:
                texts.append(f"{first_of(kept[0]).sum()}")
        except Exception as error:
            texts.append(f"{type(error).__name__}: {error}")
    return texts


@pytest.mark.parametrize("name", ["llama", pytest.param("mamba", marks=pytest.mark.slow)])
def test_what_layers_keep_in_a_cache_is_refused_by_name(name: str) -> None:
    texts = run_ranks(run_with_caches, 2, name, parameters={"pipeline_parallel_degree": 2, "microbatches": 2})
    for index in range(3):
        told = [text for rank in texts if (text := rank[index]).startswith("UnsupportedError: module '")]
        assert told and "have kept tensors in a" in told[0], texts
