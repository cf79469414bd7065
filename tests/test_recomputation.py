"""Activation checkpointing without a pipeline, and what its functions accept (statement 83)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modelparallel as smp
from modelparallel.errors import RecomputationError, SMPConfigError, StepUsageError
from modelparallel.recomputation.strategies import groups_of
from parity import assert_parity
from rank_tests import RankTests, on
from recomputation_models import Block, CountProducts, Runs, num_runs, same_random_numbers, saved_bytes
from training import square_step

ONE = RankTests(1, {"microbatches": 2})


def batch(num_samples: int = 6, width: int = 8) -> Tensor:
    return torch.randn(num_samples, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def stack(num_blocks: int = 3, **options: Any) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*(Block(**options) for _ in range(num_blocks))).double().train()


def plain_step(model: Any, x: Tensor) -> tuple[float, dict[str, Tensor]]:
    """One forward and backward outside a step function, from one state of the generator."""
    torch.manual_seed(7)
    loss = model(x).square().mean()
    loss.backward()
    inner = model.module if isinstance(model, smp.DistributedModel) else model
    return float(loss.detach()), {name: p.grad.clone() for name, p in inner.named_parameters()}


def step_gradients(model: Any) -> tuple[float, dict[str, Tensor]]:
    with same_random_numbers():
        loss = float(square_step(model, batch()).reduce_mean())
    return loss, {name: p.grad.clone() for name, p in model.module.named_parameters()}


# The strategies


FIVE = [frozenset({0}), frozenset({0}), frozenset({1}), frozenset({1}), frozenset({1})]


def spelled(homes: list[frozenset[int]], strategy: str) -> str:
    names = "abcdefghij"
    return "".join("(" + names[group.start : group.stop] + ")" for group in groups_of(homes, strategy))


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("group_3", "(ab)(cde)"),
        ("contiguous", "(ab)(cde)"),
        ("each", "(a)(b)(c)(d)(e)"),
        ("group_2", "(ab)(cd)(e)"),
        ("group_1", "(a)(b)(c)(d)(e)"),
        ("group_20", "(ab)(cde)"),
    ],
)
def test_c083_strategies_make_groups_of_children_on_one_partition(strategy: str, expected: str) -> None:
    assert spelled(FIVE, strategy) == expected


@pytest.mark.parametrize("strategy", ["foo", "group_0", "group_", "group_-1", "group_1.5", "Each", 3, None])
def test_c083_an_unknown_strategy_raises(strategy: Any) -> None:
    with pytest.raises(ValueError, match="strategy: expected 'each', 'contiguous' or 'group_x'"):
        groups_of(FIVE, strategy)


def test_children_without_weights_go_with_those_before() -> None:
    none, both = frozenset[int](), frozenset({0, 1})
    assert spelled([none, frozenset({0}), none, frozenset({1}), none], "contiguous") == "(abc)(de)"
    assert spelled([frozenset({0}), both, none, frozenset({1})], "contiguous") == "(a)(b)(cd)"
    assert spelled([frozenset({0}), both, both, frozenset({1})], "group_2") == "(a)(b)(c)(d)"
    assert spelled([none, none, none], "group_2") == "(ab)(c)"
    assert groups_of([], "each") == []


# Parity, dropout included


MARKS: dict[str, Callable[[Any], None]] = {
    "each": lambda model: smp.set_activation_checkpointing(model.get_module()),
    "contiguous": lambda model: smp.set_activation_checkpointing(model.get_module(), strategy="contiguous"),
    "group_2": lambda model: smp.set_activation_checkpointing(model.get_module(), strategy="group_2"),
    "inner modules": lambda model: [smp.set_activation_checkpointing(block.up) for block in model.get_module()],
    "one block": lambda model: smp.set_activation_checkpointing(model.get_module()[1]),
    "the model": lambda model: smp.set_activation_checkpointing(model),
    "inside and outside": lambda model: [
        smp.set_activation_checkpointing(part) for part in (model.get_module()[1].up, model.get_module()[1], model)
    ],
}
RECOMPUTED = {"inner modules": [], "one block": [1], "inside and outside": [0, 1, 2]}


@on(ONE)
def test_c083_same_gradients_and_fewer_saved_tensors() -> None:
    reference = stack()
    with saved_bytes(reference) as everything:
        expected = plain_step(reference, batch())
    for name, mark in MARKS.items():
        model = smp.DistributedModel(stack())
        mark(model)
        with saved_bytes(model.module) as saved:
            found = plain_step(model, batch())
        assert found[0] == expected[0], name
        assert_parity(found[1], expected[1], dtype=torch.float64)
        expected_runs = [2 if index in RECOMPUTED.get(name, [0, 1, 2]) else 1 for index in range(3)]
        assert num_runs(model.module) == expected_runs, name
        assert saved.num_tensors < everything.num_tensors, name
        assert saved.total < everything.total * (1.0 if name == "inner modules" else 0.8), name


@on(ONE)
def test_c083_same_gradients_in_steps() -> None:
    expected = step_gradients(smp.DistributedModel(stack()))
    for name, mark in MARKS.items():
        model = smp.DistributedModel(stack())
        mark(model)
        found = step_gradients(model)
        assert found[0] == expected[0], name
        assert_parity(found[1], expected[1], dtype=torch.float64)
        per_microbatch = [2 if index in RECOMPUTED.get(name, [0, 1, 2]) else 1 for index in range(3)]
        assert num_runs(model.module) == [2 * number for number in per_microbatch], name


@on(ONE)
def test_c083_without_preserve_rng_state_the_second_run_draws_other_numbers() -> None:
    expected = plain_step(stack(), batch())
    model = smp.DistributedModel(stack())
    smp.set_activation_checkpointing(model.get_module(), preserve_rng_state=False)
    found = plain_step(model, batch())
    assert found[0] == expected[0]
    assert any(not torch.allclose(found[1][name], value) for name, value in expected[1].items())


@on(ONE)
def test_evaluation_and_no_grad_run_once() -> None:
    model = smp.DistributedModel(stack())
    smp.set_activation_checkpointing(model.get_module(), strategy="group_2")
    model.eval()
    with saved_bytes(model.module) as saved:
        model(batch()).sum().backward()
    assert num_runs(model.module) == [1, 1, 1] and saved.num_tensors > 0
    model.train()
    with torch.no_grad():
        model(batch())
    assert num_runs(model.module) == [2, 2, 2]


@on(ONE)
def test_running_statistics_count_a_batch_once() -> None:
    reference = stack(has_norm=True)
    expected = plain_step(reference, batch())
    for strategy in ("each", "contiguous"):
        model = smp.DistributedModel(stack(has_norm=True))
        smp.set_activation_checkpointing(model.get_module(), strategy=strategy)
        found = plain_step(model, batch())
        assert found[0] == expected[0]
        assert_parity(found[1], expected[1], dtype=torch.float64)
        assert_parity(
            dict(model.module.named_buffers()), dict(reference.named_buffers()), dtype=torch.float64
        )  # num_batches_tracked, too


class Iterated(nn.Module):
    """Its buffer changes in every forward, and decides the output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        self.scale.mul_(0.5)
        return torch.tanh(self.linear(x) * self.scale)


@on(ONE)
def test_the_second_run_sees_the_buffers_of_the_first() -> None:
    def make() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(Iterated(), Iterated()).double().train()

    reference = make()
    expected = [plain_step(reference, batch()) for _ in range(3)]
    model = smp.DistributedModel(make())
    smp.set_activation_checkpointing(model.get_module())
    for loss, gradients in expected:
        found = plain_step(model, batch())
        assert found[0] == loss
        assert_parity(found[1], gradients, dtype=torch.float64)
    assert_parity(dict(model.module.named_buffers()), dict(reference.named_buffers()), dtype=torch.float64)


# Functions


class Nested(nn.Module):
    """Takes and returns containers, with keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.runs = Runs()

    def forward(self, values: dict[str, Any], *, scale: float = 1.0, extra: Any = None) -> dict[str, Any]:
        self.runs.number += 1
        x, (y, _) = values["x"], values["pair"]
        out = torch.tanh(self.linear(x)) * scale + y
        return {"out": out, "same": x, "list": [out * 2, None, 3], "extra": extra["z"] * out}


class Caller(nn.Module):
    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.inner = Nested()
        self.__dict__["call"] = call

    def forward(self, x: Tensor) -> Tensor:
        found = self.call(self.inner, {"x": x, "pair": (x * 2, None)}, scale=0.5, extra={"z": x + 1})
        assert found["list"][2] == 3
        return found["out"] + found["same"] + found["list"][0] + found["extra"]


def plain_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)


@on(ONE)
def test_checkpoint_takes_nested_and_keyword_arguments() -> None:
    def make(call: Callable[..., Any]) -> nn.Module:
        torch.manual_seed(1)
        return Caller(call).double().train()

    for call in (smp.checkpoint, smp.patches.checkpoint.checkpoint):
        caller = make(call)
        x = batch().requires_grad_()
        caller(x).square().mean().backward()
        reference, y = make(plain_call), batch().requires_grad_()
        loss = reference(y).square().mean()
        loss.backward()
        assert_parity({"x": x.grad}, {"x": y.grad}, dtype=torch.float64)
        assert_parity(
            {name: p.grad for name, p in caller.inner.named_parameters()},
            {name: p.grad for name, p in reference.inner.named_parameters()},
            dtype=torch.float64,
        )
        assert caller.inner.runs.number == 2


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.runs = Runs()

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        self.runs.number += 1
        return torch.tanh(self.linear(x) * mask), mask


class Packed(Several):
    def forward(self, values: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return super().forward(*values)


@on(ONE)
def test_checkpoint_sequential_packs_or_spreads_tuples() -> None:
    def run(kind: type, sequential: Any) -> tuple[Tensor, dict[str, Tensor], list[int]]:
        torch.manual_seed(1)
        model = nn.Sequential(kind(), kind(), kind()).double().train()
        out = sequential(model, (batch(), torch.full((1, 8), 0.5, dtype=torch.float64)))[0]
        out.sum().backward()
        return out.detach(), {name: p.grad for name, p in model.named_parameters()}, num_runs(model)

    expected = run(Packed, lambda model, values: model(values))
    for strategy in ("each", "group_2", "contiguous"):
        for packs in (True, False):
            found = run(Packed, lambda m, v, s=strategy, p=packs: smp.checkpoint_sequential(m, v, s, True, p))
            assert torch.equal(found[0], expected[0]) and found[2] == [2, 2, 2]
            assert_parity(found[1], expected[1], dtype=torch.float64)
        spread = run(Several, lambda m, v, s=strategy: smp.checkpoint_sequential(m, v, strategy=s))
        assert torch.equal(spread[0], expected[0]) and spread[2] == [2, 2, 2]
        assert_parity(spread[1], expected[1], dtype=torch.float64)


@on(ONE)
def test_checkpoint_wrapper_works_before_the_model_is_wrapped() -> None:
    expected = step_gradients(smp.DistributedModel(stack()))
    made = stack()
    assert smp.checkpoint_wrapper(made[1]) is made[1]
    model = smp.DistributedModel(made)
    found = step_gradients(model)
    assert found[0] == expected[0]
    assert_parity(found[1], expected[1], dtype=torch.float64)
    assert num_runs(made) == [2, 4, 2]


@on(ONE)
def test_containers_and_sequentials_with_a_forward_of_their_own() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](self.blocks[0](x))

    class Backwards(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for child in reversed(list(self)):
                x = child(x)
            return x

    for make, part in ((Listed, lambda m: m.blocks), (lambda: Backwards(Block(), Block()), lambda m: m)):
        torch.manual_seed(1)
        reference = make().double().train()
        model = smp.DistributedModel(copy.deepcopy(reference))
        smp.set_activation_checkpointing(part(model.get_module()))
        expected, found = plain_step(reference, batch()), plain_step(model, batch())
        assert found[0] == expected[0]
        assert_parity(found[1], expected[1], dtype=torch.float64)
        assert num_runs(model.module) == [2, 2]


@on(ONE)
def test_hooks_of_a_sequential_run_once_and_copies_stay_apart() -> None:
    model = smp.DistributedModel(stack())
    seen: list[str] = []
    model.get_module().register_forward_pre_hook(lambda *_: seen.append("before"))
    model.get_module().register_forward_hook(lambda *_: seen.append("after"))
    smp.set_activation_checkpointing(model.get_module(), strategy="contiguous")
    plain_step(model, batch())
    assert seen == ["before", "after"]
    copied = copy.deepcopy(model.get_module())
    plain_step(copied, batch())
    assert num_runs(copied) == [3, 3, 3] and num_runs(model.module) == [2, 2, 2]


@on(ONE)
def test_torch_checkpoint_around_and_inside() -> None:
    from torch.utils.checkpoint import checkpoint as torch_checkpoint

    class Inside(nn.Module):
        def __init__(self, use_reentrant: bool) -> None:
            super().__init__()
            self.block, self.use_reentrant = Block(), use_reentrant

        def forward(self, x: Tensor) -> Tensor:
            return torch_checkpoint(self.block, x, use_reentrant=self.use_reentrant)

    for use_reentrant in (False, True):
        torch.manual_seed(1)
        reference = nn.Sequential(Block(), Block()).double().train()
        torch.manual_seed(1)
        model = nn.Sequential(Block(), Inside(use_reentrant)).double().train()
        x, y = batch().requires_grad_(), batch().requires_grad_()
        expected = plain_step(reference, y)
        torch.manual_seed(7)
        out = torch_checkpoint(lambda v, m=model: smp.checkpoint(m[1], m[0](v)), x, use_reentrant=use_reentrant)
        loss = out.square().mean()
        loss.backward()
        assert float(loss) == expected[0]
        assert_parity(
            dict(enumerate(p.grad for p in model.parameters())),
            dict(enumerate(p.grad for p in reference.parameters())),
            dtype=torch.float64,
        )
        assert_parity({"x": x.grad}, {"x": y.grad}, dtype=torch.float64)


@on(ONE)
def test_the_graph_may_be_used_twice_and_differentiated_twice() -> None:
    def run(call: Callable[..., Any]) -> list[Tensor]:
        torch.manual_seed(1)
        block, x = Block(dropout=0.0).double().train(), batch().requires_grad_()
        loss = call(block, x).square().mean()
        loss.backward(retain_graph=True)
        first = [p.grad.clone() for p in block.parameters()]
        loss.backward(retain_graph=True)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        slope.square().sum().backward()
        return [*first, *(p.grad.clone() for p in block.parameters()), x.grad]

    for one, other in zip(run(smp.checkpoint), run(plain_call), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@on(ONE)
def test_autocast_of_the_first_run_holds_in_the_second() -> None:
    def run(mark: bool) -> dict[str, Tensor]:
        torch.manual_seed(1)
        made = nn.Sequential(Block(dropout=0.0), Block(dropout=0.0)).train()
        model = smp.DistributedModel(made)
        if mark:
            smp.set_activation_checkpointing(model.get_module())
        for _ in range(2):  # the casts of the second step must be of the new weights
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(batch().float()).float().square().mean()
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in made.parameters():
                    parameter -= parameter.grad
        return {name: p.detach().clone() for name, p in made.named_parameters()}

    assert_parity(run(True), run(False), dtype=torch.float32)


# Selective


@on(ONE)
def test_selective_keeps_the_results_of_the_named_operations() -> None:
    expected = plain_step(stack(), batch())
    ops = [torch.ops.aten.addmm.default]

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
        from torch.utils.checkpoint import CheckpointPolicy

        seen.append(context.is_recompute)
        return CheckpointPolicy.MUST_SAVE if op in ops else CheckpointPolicy.PREFER_RECOMPUTE

    def products(mode: str, given: Any) -> int:
        model = smp.DistributedModel(stack())
        smp.set_activation_checkpointing(model.get_module(), mode=mode, policy=given)
        with CountProducts() as counter:
            found = plain_step(model, batch())
        assert found[0] == expected[0]
        assert_parity(found[1], expected[1], dtype=torch.float64)
        return counter.number

    seen: list[bool] = []
    # Two products for each of three blocks, and again in the second run where they are not kept.
    assert products("full", None) == 12
    assert products("selective", ops) == products("selective", policy) == 6
    assert products("selective", [torch.ops.aten.tanh.default]) == 12
    assert seen and not seen[0]
    if torch.__version__ >= (2, 13):
        assert not any(seen)  # torch asks in the first run only; 2.11 in the second one, too


# Wrong use


@on(ONE)
def test_wrong_arguments_are_named() -> None:
    model = smp.DistributedModel(stack())
    root = model.get_module()
    mark = smp.set_activation_checkpointing
    for call, error, text in (
        (lambda: smp.checkpoint(torch.tanh, batch()), SMPConfigError, "torch.utils.checkpoint.checkpoint, which works"),
        (lambda: mark(lambda x: x), SMPConfigError, "takes a module"),
        (lambda: smp.checkpoint_sequential(root[0], batch()), SMPConfigError, "use smp.checkpoint"),
        (lambda: smp.checkpoint_sequential(root, batch(), strategy="foo"), ValueError, "group_x"),
        (lambda: mark(root, strategy="foo"), ValueError, "strategy: expected"),
        (lambda: mark(root[0], strategy="contiguous"), SMPConfigError, "nn.Sequential alone, got a Block"),
        (lambda: mark(root[0], pack_args_as_tuple=True), SMPConfigError, "nn.Sequential alone"),
        (lambda: mark(nn.Linear(2, 2)), SMPConfigError, "part of no smp.DistributedModel"),
        (lambda: mark(root, mode="some"), SMPConfigError, "'full' or 'selective'"),
        (lambda: mark(root, mode="selective"), SMPConfigError, "needs a policy"),
        (lambda: mark(root, policy=[]), SMPConfigError, "mode='full' takes none"),
        (lambda: mark(root, mode="selective", policy=[torch.ops.aten.mm]), SMPConfigError, "mm.default"),
    ):
        with pytest.raises(error, match=text):
            call()
    plain_step(model, batch())
    with pytest.raises(StepUsageError, match="before the first step"):
        mark(root)


@on(ONE)
def test_a_second_run_that_differs_is_found_out() -> None:
    class Counting(Block):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return (out[:3] if self.runs.number == 2 else out).sin()

    class Writing(Block):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            x.mul_(2)
            return out

    class Looking(Block):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            return out + slope

    model = Counting().double()
    with pytest.raises(RecomputationError, match=r"the saved tensor \d+ is \(3, 8\)"):
        smp.checkpoint(model, batch()).sum().backward()
    with pytest.raises(RecomputationError, match="written to in place"):
        smp.checkpoint(Writing().double(), batch()).sum().backward()
    with pytest.raises(RecomputationError, match="leave it out of the activation checkpointing"):
        smp.checkpoint(Looking().double(), batch().requires_grad_())
    shorter = nn.Sequential(Block().double(), nn.Identity())
    out = smp.checkpoint(shorter, batch())
    shorter[0] = nn.Identity()
    with pytest.raises(RecomputationError, match="it saved 0 tensors"):
        out.sum().backward()
