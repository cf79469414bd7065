"""Hooks that run in the backward, at the home of their module alone: what they change is right on every stage, and what
they keep is an error that names the module, unless each stage is to keep its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import modelparallel as smp
from modelparallel.errors import UnsupportedError
from modelparallel.pipeline.side_doors.kept_state import KeptState
from pool import run_ranks
from rank_tests import RankTests, on

PP2 = RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 2})
PP3 = RankTests(3, {"pipeline_parallel_degree": 3, "microbatches": 2})
COUNTS = {"calls": 0}
TOTAL = 0.0


class Recorder:
    """Keeps norms in itself; bound, or called."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.last: torch.Tensor | None = None

    def bound(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        self.last = outputs[0].detach()

    def __call__(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        self.norms.append(outputs[0].norm().item())


def counts_in_global(*_: Any) -> None:
    COUNTS["calls"] += 1


def adds_to_global(module: nn.Module, inputs: Any, outputs: Any) -> None:
    global TOTAL
    TOTAL += outputs[0].sum().item()


def keeps_on_module(module: nn.Module, inputs: Any, outputs: Any) -> None:
    module.seen = outputs[0].norm().item()


def make_hooks() -> dict[str, Callable[..., Any]]:
    norms: list[float] = []
    last = None

    def keeps_in_closure(module: nn.Module, inputs: Any, outputs: Any) -> None:
        nonlocal last
        last = outputs[0]

    return {
        "list": lambda module, inputs, outputs: norms.append(outputs[0].norm().item()),
        "closure": keeps_in_closure,
        "dict": counts_in_global,
        "global": adds_to_global,
        "attribute": keeps_on_module,
        "bound": Recorder().bound,
        "object": Recorder(),
    }


def make_model() -> Any:
    torch.manual_seed(0)
    return smp.DistributedModel(nn.Sequential(*(nn.Linear(6, 6) for _ in range(5))).double())


@smp.step
def train(model: Any, x: torch.Tensor, hook: Callable[..., Any] | None = None) -> torch.Tensor:
    out = model(x)
    if hook is not None:
        out.register_hook(lambda gradient: hook(None, None, (gradient,)))
    loss = out.square().mean()
    model.backward(loss)
    return loss


@smp.step
def train_patched(model: Any, x: torch.Tensor) -> torch.Tensor:
    part = model.get_module()[1]
    before = part.forward
    part.forward = lambda x: x @ part.weight
    loss = model(x).square().mean()
    part.forward = before
    model.backward(loss)
    return loss


def batch() -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def keeps(name: str, is_of_value: bool) -> None:
    hook = make_hooks()[name]
    model = make_model()
    if not is_of_value:
        model.get_module()[1].register_full_backward_hook(hook)
    train(model, batch(), hook if is_of_value else None)


@pytest.mark.parametrize(("name", "is_of_value"), [*((name, False) for name in make_hooks()), ("dict", True)])
def test_what_a_hook_in_the_backward_keeps_is_an_error_that_names_the_module(name: str, is_of_value: bool) -> None:
    failures = run_ranks(keeps, 2, name, is_of_value, parameters=PP2.parameters, return_failures=True)
    texts = [failure.summary for failure in failures if failure is not None]
    title = "a value of the step" if is_of_value else "'1'"
    assert any("keeps something" in text and title in text for text in texts), texts


@on(PP2)
def test_a_forward_that_passes_the_hooks_by_is_an_error():
    model = make_model()
    part = model.get_module()[1]
    part.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 0.5,))
    with pytest.raises(UnsupportedError, match="full backward hooks"):
        train_patched(model, batch())


def test_a_set_whose_copy_is_in_another_order_has_not_changed():
    known: set[int] = set()
    for number in (0, 8, 16, 24, 1):
        known.add(number)
    known.discard(0)
    known.add(0)
    assert list(known) != list(set(known))

    def hook(*_: Any) -> None:
        known.discard(5)

    kept = KeptState([], [hook])
    hook()
    assert not kept.has_changed()
    known.add(5)
    assert kept.has_changed()
    kept.restore()
    assert known == {0, 8, 16, 24, 1}


@on(PP2)
def test_each_stage_may_keep_its_own_if_the_script_says_so():
    def hook(module: nn.Module, inputs: Any, outputs: Any) -> None:
        seen.append(outputs[0].norm().item())

    seen: list[float] = []
    hook.keeps_local = True  # type: ignore[attr-defined]
    model = make_model()
    for part in model.get_module():
        part.register_full_backward_hook(hook)
    for _ in range(2):
        train(model, batch())
    assert sum(smp.allgather(len(seen), smp.PP_GROUP)) == 5 * 2 * 2


@on(PP2, PP3)
def test_what_a_hook_in_the_backward_changes_counts():
    model, plain = make_model(), nn.Sequential(*(nn.Linear(6, 6) for _ in range(5))).double()
    plain.load_state_dict(model.state_dict())
    for net in (model.get_module(), plain):
        net[1].register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 0.5,))
        net[3].register_full_backward_pre_hook(lambda module, outputs: (outputs[0] * 3,))
    train(model, batch())
    plain(batch()).square().mean().backward()
    expected = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-9, atol=1e-12)
