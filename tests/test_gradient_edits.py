"""What scripts do to ``p.grad`` between the backward and the update, wherever the gradient is: as in one process."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import modelparallel as smp
from modelparallel.data_parallel.shard_gradient import ShardGradient
from modelparallel.errors import StepUsageError, UnsupportedError
from parity import assert_parity
from pooled_model import Pooled, make_pooled, pooled_batch
from rank_tests import RankTests, on
from training import classification_step

SHARDED = {"shard_optimizer_state": True}
SHARDED2 = RankTests(2, SHARDED)
SHARDED3 = RankTests(3, {**SHARDED, "microbatches": 2})
SHARDED_PP = RankTests(4, {**SHARDED, "pipeline_parallel_degree": 2, "microbatches": 2, "pipeline": "zero_bubble"})
SHARDED_TP = RankTests(4, {**SHARDED, "tensor_parallel_degree": 2})
SDP2 = RankTests(
    2, {"sharded_data_parallel_degree": 2, "sdp_param_persistence_threshold": 0, "sdp_gradient_clipping": 1e9}
)
PP3 = RankTests(3, {"pipeline_parallel_degree": 3, "microbatches": 2})
TP2 = RankTests(2, {"tensor_parallel_degree": 2})
DP2 = RankTests(2, {})
QUICK = (SHARDED3,)
OTHERS = (SDP2, SHARDED2, SHARDED_PP, SHARDED_TP, PP3, TP2, DP2)
SLOW_SHARDS = (SHARDED2, SHARDED_PP, SHARDED_TP)


NUM_ROWS = 23


def make_net() -> Pooled:
    return make_pooled(NUM_ROWS)


def make_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    return pooled_batch(NUM_ROWS, step)


# Ways to clear: (model as the script has it, the module in it, the optimizer).


def by_none(model, net, optimizer):
    for parameter in model.parameters():
        parameter.grad = None


def by_zero(model, net, optimizer):
    for parameter in net.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()


def some(model, net, optimizer):
    """The rest goes on adding up."""
    net.first.zero_grad()
    net.table.weight.grad = None
    net.last.zero_grad(set_to_none=False)


CLEARS = {
    "optimizer": lambda model, net, optimizer: optimizer.zero_grad(),
    "optimizer, zeros": lambda model, net, optimizer: optimizer.zero_grad(set_to_none=False),
    "model": lambda model, net, optimizer: model.zero_grad(),
    "model, zeros": lambda model, net, optimizer: model.zero_grad(set_to_none=False),
    "module": lambda model, net, optimizer: net.zero_grad(),
    "module, zeros": lambda model, net, optimizer: net.zero_grad(set_to_none=False),
    "none": by_none,
    "zero_": by_zero,
    "some": some,
    "never": lambda model, net, optimizer: None,
}

# Edits of a gradient between the backward and the update.


def add_noise(p):
    p.grad.add_(torch.linspace(-1, 1, p.numel(), dtype=p.dtype).view(p.shape), alpha=1e-3)


def replace_by_arithmetic(p):
    p.grad = p.grad * 0.5 + p.detach() * 0.01


def replace_by_another(p):
    p.grad = torch.linspace(-1, 1, p.numel(), dtype=p.dtype).view(p.shape) * 1e-2


def edit_what_was_put(p):
    replace_by_another(p)
    p.grad.mul_(3)


def clear_bias(p):
    if p.ndim == 1:
        p.grad = None


EDITS = {
    "mul_": lambda p: p.grad.mul_(0.5),
    "data.clamp_": lambda p: p.grad.data.clamp_(-1e-3, 1e-3),
    "clamp_": lambda p: p.grad.clamp_(min=-1e-3),
    "weight decay": lambda p: p.grad.add_(p.detach(), alpha=0.1),
    "where": lambda p: p.grad.copy_(torch.where(p.grad.abs() > 1e-3, p.grad, torch.zeros_like(p.grad))),
    "masked_fill_": lambda p: p.grad.masked_fill_(p.detach() > 0, 0.0),
    "sign": lambda p: setattr(p, "grad", p.grad.sign()),
    "nan_to_num_": lambda p: torch.nan_to_num_(p.grad, 0.0),
    "foreach": lambda p: torch._foreach_mul_([p.grad], 0.25),
    "foreach, two lists": lambda p: torch._foreach_add_([p.grad], [p.detach()], alpha=0.01),
    "augmented": lambda p: p.grad.__itruediv__(4),
    "clone": lambda p: setattr(p, "grad", p.grad.clone().mul(2).to(p.dtype)),
    "noise": add_noise,
    "arithmetic": replace_by_arithmetic,
    "another": replace_by_another,
    "another, edited": edit_what_was_put,
    "some none": clear_bias,
}
#: Of whole tensors; a slice or a stage's part of it is another.
NEEDS_WHOLE = ("noise", "another", "another, edited")


def update(model, net, optimizer, clear, edit, step):
    CLEARS[clear](model, net, optimizer)
    if isinstance(model, smp.DistributedModel):
        classification_step(model, *(part.tensor_split(smp.dp_size())[smp.dp_rank()] for part in make_batch(step)))
    else:
        tokens, targets = make_batch(step)
        F.cross_entropy(model(tokens), targets).backward()
    if edit is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                EDITS[edit](parameter)
    optimizer.step()


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)


def train(model, net, optimizer, clear, edit=None, num_steps=4):
    for step in range(num_steps):
        update(model, net, optimizer, clear, edit, step)
    return {name: value.clone() for name, value in model.state_dict().items()}


@functools.cache
def reference(clear, edit=None):
    net = make_net()
    return train(net, net, sgd(net.parameters()), clear, edit)


def wrapped() -> tuple[Any, Any, Any]:
    model = smp.DistributedModel(make_net(), bucket_cap_mb=3e-4)
    return model, model.get_module(), smp.DistributedOptimizer(sgd(model.parameters()))


def verify(clear, edit=None):
    state = train(*wrapped(), clear, edit)
    try:
        assert_parity(state, reference(clear, edit), dtype=torch.float64)
    except AssertionError as error:
        raise AssertionError(f"cleared by {clear}, edit {edit}: {error}") from error


@on(*QUICK)
def test_every_way_to_clear_gradients_is_as_in_one_process():
    clear_in_every_way()


def clear_in_every_way():
    for clear in CLEARS:
        if clear == "some" and smp.pp_size() > 1:
            continue  # layers of other stages are stand-ins, whose gradients are nobody's
        verify(clear)


@pytest.mark.slow
@on(*OTHERS)
def test_every_way_to_clear_gradients_at_other_degrees():
    clear_in_every_way()


@on(*QUICK)
def test_every_edit_of_gradients_is_as_in_one_process():
    edit_in_every_way()


@pytest.mark.slow
@on(*OTHERS)
def test_every_edit_of_gradients_at_other_degrees():
    edit_in_every_way()


def edit_in_every_way():
    for edit in EDITS:
        if edit in NEEDS_WHOLE and smp.tp_size() > 1:
            continue
        if smp.state.cfg.sharded_data_parallel_degree > 1 and (edit in NEEDS_WHOLE or "foreach" in edit):
            continue  # gradients are DTensors, which plain tensors are not mixed with
        for clear in ("none", "never"):
            verify(clear, edit)


@on(SHARDED3)
def test_edits_meet_clipping_groups_and_accumulation():
    edit_between_clips()


def edit_between_clips():
    """Clipping after an edit and before it; gradients in the groups of the inner optimizer; passes without reduction;
    a caught exception.
    """

    def run(model, net, optimizer):
        is_wrapped = isinstance(model, smp.DistributedModel)
        inner = optimizer.optimizer if is_wrapped else optimizer
        for step in range(5):
            if step == 3:
                inner.zero_grad()
            elif step != 2:
                by_none(model, net, optimizer)
            tokens, targets = make_batch(step)
            if is_wrapped:
                tokens, targets = (part.tensor_split(smp.dp_size())[smp.dp_rank()] for part in (tokens, targets))
            halves = list(zip(tokens.tensor_split(2), targets.tensor_split(2), strict=True))
            if is_wrapped:
                with model.no_sync():
                    classification_step(model, *halves[0])
                classification_step(model, *halves[1])
            else:
                copies = zip(tokens.tensor_split(smp.dp_size()), targets.tensor_split(smp.dp_size()), strict=True)
                for own_tokens, own_targets in copies:
                    for own in zip(own_tokens.tensor_split(2), own_targets.tensor_split(2), strict=True):
                        (F.cross_entropy(model(own[0]), own[1]) / smp.dp_size()).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.grad.mul_(0.5)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)
                for parameter in model.parameters():
                    parameter.grad = parameter.grad * 2
                torch.nn.utils.clip_grad_value_(model.parameters(), 0.05)
                for group in inner.param_groups:
                    for parameter in group["params"]:
                        parameter.grad.mul_(0.5)
                if step == 1:
                    for group in inner.param_groups:
                        for parameter in group["params"]:
                            parameter.grad = parameter.grad.clone()
            optimizer.step()
        return {name: value.clone() for name, value in model.state_dict().items()}

    net = make_net()
    expected = run(net, net, sgd(net.parameters()))
    assert_parity(run(*wrapped()), expected, dtype=torch.float64)


@on(SHARDED3)
def test_an_exception_between_forward_and_update_leaves_nothing_behind():
    raise_between_steps()


def raise_between_steps():
    class Odd(Exception):
        pass

    @smp.step
    def failing(model, tokens, targets):
        model.backward(F.cross_entropy(model(tokens), targets))
        raise Odd

    for clear in ("none", "module", "module, zeros"):
        model, net, optimizer = wrapped()
        for step in range(3):
            if step and smp.pp_size() == 1:
                with pytest.raises(Odd):
                    failing(model, *make_batch(7))
            update(model, net, optimizer, clear, None, step)
        expected = make_net()
        train(expected, expected, sgd(expected.parameters()), clear, num_steps=3)
        assert_parity(model.state_dict(), expected.state_dict(), dtype=torch.float64)


@on(SHARDED3)
def test_what_needs_the_whole_gradient_is_refused_by_name():
    refuse_what_needs_the_whole()


def refuse_what_needs_the_whole():
    model, _, optimizer = wrapped()
    update(model, None, optimizer, "never", None, 0)
    name, parameter = next((name, p) for name, p in model.local_named_parameters() if isinstance(p.grad, ShardGradient))
    manual = parameter.detach().clone()
    for use in (
        lambda g: g.norm(),
        lambda g: torch._foreach_norm([g]),
        lambda g: float(g.abs().max()),
        lambda g: g[0].mul_(2),
        lambda g: manual.add_(g, alpha=-0.1),
        lambda g: torch._foreach_add_([manual], [g]),
        lambda g: torch.stack([g, g]),
        lambda g: g.add_(torch.ones(7, *g.shape)),
        lambda g: g.tolist(),
        lambda g: g.numpy(),
        lambda g: torch.mul(g, 2, out=manual),
    ):
        with pytest.raises(UnsupportedError, match=f"the gradient of '{name}' is shared out.*shard_optimizer_state"):
            use(parameter.grad)
    assert name in repr(parameter.grad)
    assert isinstance(copy.deepcopy(parameter.grad), ShardGradient)
    norm = smp.clip_grad_norm_(model, float("inf"))
    expected = make_net()
    update(expected, expected, sgd(expected.parameters()), "never", None, 0)
    wanted = torch.nn.utils.clip_grad_norm_(expected.parameters(), float("inf"))
    torch.testing.assert_close(norm, wanted, rtol=1e-9, atol=0)


@pytest.mark.slow
@on(*SLOW_SHARDS)
def test_all_of_this_with_other_shards():
    edit_between_clips()
    raise_between_steps()
    refuse_what_needs_the_whole()


BF16 = RankTests(2, {"bf16": True, "pipeline_parallel_degree": 2, "microbatches": 2})


@on(BF16)
def test_edits_beside_masters_count_or_are_refused():
    def gradients(optimizer):
        return [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]

    model, net, optimizer = wrapped()
    update(model, net, optimizer, "none", None, 0)
    classification_step(model, *make_batch(1))
    for parameter in model.parameters():
        parameter.grad.mul_(0.5)
    optimizer.collect_gradients()
    halves = gradients(optimizer)
    for parameter in model.parameters():
        parameter.grad.mul_(4)  # the masters' are made anew
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert float(norm) > 1e-3
    for clipped, half in zip(gradients(optimizer), halves, strict=True):
        torch.testing.assert_close(clipped, half * 4 * 1e-3 / (float(norm) + 1e-6), rtol=1e-4, atol=1e-12)
    for parameter in model.parameters():
        parameter.grad.mul_(2)
    with pytest.raises(StepUsageError, match=r"change p\.grad first, then clip"):
        optimizer.step()
    optimizer.zero_grad()
    update(model, net, optimizer, "none", None, 2)
    # The inner optimizer clears what the masters' gradients are made from, too.
    optimizer.optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
