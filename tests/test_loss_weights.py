"""``model.backward(loss, weight=number of tokens)``: microbatches and copies with different numbers of tokens give
the mean over all of them, to the last digits, in gradients, weights and losses.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modelparallel as smp
from logs import logged_lines
from modelparallel.errors import StepUsageError
from modelparallel.stepping.output import StepOutput
from rank_tests import RankTests, on

NUM_MICROBATCHES = 2
M = {"microbatches": NUM_MICROBATCHES}
LOCAL = RankTests(1, M)
PP2 = RankTests(2, {**M, "pipeline_parallel_degree": 2})
DP2 = RankTests(2, M)
TP2 = RankTests(2, {**M, "tensor_parallel_degree": 2, "_match_weights": True})
OWNERS = RankTests(2, {**M, "shard_optimizer_state": True})
SHARDED = RankTests(2, {**M, "sharded_data_parallel_degree": 2, "sdp_param_persistence_threshold": 0})
BY_VISIT = RankTests(
    2, {**M, "sharded_data_parallel_degree": 2, "sdp_param_persistence_threshold": 0, "sdp_gather": "visit"}
)
PP2_DP2 = RankTests(4, {**M, "pipeline_parallel_degree": 2})
PP3 = RankTests(3, {**M, "pipeline_parallel_degree": 3, "microbatches": 4})
ALL = (LOCAL, PP2, DP2, TP2, OWNERS, SHARDED, BY_VISIT, PP2_DP2, PP3)


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(11, 8), nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 11)
    ).double()


def make_model(**options: Any) -> Any:
    net = make_net()
    if smp.tp_size() > 1:
        smp.set_tensor_parallelism(net[1])
    return smp.DistributedModel(net, **options)


def tokens(step: int, *, has_empty: bool = False) -> tuple[Tensor, Tensor]:
    """The batch of all ranks; samples with different numbers of tokens, those of the first microbatch with none."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randint(11, (8, 6), generator=generator)
    y = x.roll(1, 1)
    for row in range(8):
        y[row, 1 + (row * 3 + step) % 6 :] = -100
    if has_empty:
        y[:2] = -100
    return x, y


def mine(batch: tuple[Tensor, ...]) -> list[Tensor]:
    return [part.tensor_split(smp.dp_size())[smp.dp_rank()] for part in batch]


def token_loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-100)


def number_of(y: Tensor, kind: str, logits: Tensor | None = None) -> Any:
    count = (y != -100).sum()
    return {"number": int(count), "tensor": count, "value": None}[kind]


@smp.step
def train(model, x, y, kind="number"):
    logits = model(x)
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100)
    weight = number_of(y, kind)
    if kind == "value":  # of the pipeline: it is where the model's last part is
        weight = ((logits.detach().amax(-1) > -1e9) & (y != -100)).sum()
    model.backward(loss, weight=weight)
    return loss


def compare_weights(model: Any, net: nn.Module) -> None:
    expected = net.state_dict()
    found = model.state_dict()
    for name, value in expected.items():
        difference = float((found[name] - value).norm() / value.norm())
        assert difference < 1e-9, f"{name} differs by {difference}"


def run(make_options: dict[str, Any], kinds: list[str], *, has_empty: bool = False, per_update: int = 1) -> None:
    """Steps with weights, beside plain torch on the whole batch."""
    model = make_model(**make_options)
    optimizer = smp.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=0.05))
    net = make_net()
    plain = torch.optim.Adam(net.parameters(), lr=0.05)
    for index, kind in enumerate(kinds):
        batch = tokens(index, has_empty=has_empty)
        own = mine(batch)
        expected = token_loss(net, *batch)
        expected.backward()
        if index % per_update == 0:
            optimizer.zero_grad()
        loss = train(model, *own, kind)
        own_loss = token_loss(make_loaded(net), *own).detach()
        counts = [int((part != -100).sum()) for part in own[1].tensor_split(len(loss.outputs))]
        assert loss.total_weight == sum(counts)
        assert loss.weights == pytest.approx([count / max(sum(counts), 1) for count in counts])
        if sum(counts):
            torch.testing.assert_close(loss.reduce_mean(), own_loss, rtol=1e-9, atol=0)
        if index % per_update == per_update - 1:
            optimizer.step()
            plain.step()
            plain.zero_grad()
    compare_weights(model, net)


def make_loaded(net: nn.Module) -> nn.Module:
    copy = make_net()
    copy.load_state_dict(net.state_dict())
    return copy


@on(*ALL)
def test_the_mean_over_tokens_is_that_of_the_whole_batch():
    run({}, ["number", "tensor", "value", "number"])


@on(*ALL)
def test_a_microbatch_without_tokens_counts_nothing():
    run({"average_grads_across_microbatches": False}, ["number", "value", "number"], has_empty=True)


@on(*ALL)
def test_gradients_of_several_steps_are_added_up():
    run({}, ["number", "tensor", "number", "value"], per_update=2)


@on(DP2, OWNERS, SHARDED, BY_VISIT, PP2_DP2)
def test_also_without_reductions_in_between():
    run({"backward_passes_per_step": 2}, ["number", "tensor", "number", "number"], per_update=2)


@on(DP2, PP2)
def test_what_an_unweighted_step_has_left_is_not_scaled():
    model = make_model()
    net = make_net()
    batch = tokens(0)

    @smp.step
    def unweighted(model, x):
        loss = model(x).pow(2).mean()
        model.backward(loss)
        return loss

    unweighted(model, mine(batch)[0])
    train(model, *mine(batch))
    net(batch[0]).pow(2).mean().backward()
    token_loss(net, *batch).backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    for name, parameter in model.local_named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-9, atol=1e-13)


@on(LOCAL, PP2)
def test_all_losses_have_a_weight_or_none():
    model = make_model()
    x, y = mine(tokens(0))

    @smp.step
    def mixed(model, x, y, flag):
        loss = token_loss(model, x, y)
        model.backward(loss, weight=3 if flag[0] else None)

    @smp.step
    def two(model, x, y):
        loss = token_loss(model, x, y)
        model.backward(loss, weight=3)
        model.backward(loss.clone(), weight=4)

    @smp.step
    def wrong(model, x, y, weight):
        model.backward(token_loss(model, x, y), weight=weight)

    train(model, x, y)
    with pytest.raises(StepUsageError, match="for some losses of this step and none for others"):
        mixed(model, x, y, torch.tensor([True, False]))
    with pytest.raises(StepUsageError, match="two weights in one microbatch"):
        two(model, x, y)
    for weight in (-1.0, math.nan, "3"):
        with pytest.raises(StepUsageError, match="expected a number from 0"):
            wrong(model, x, y, weight)
    with pytest.raises(StepUsageError, match="there is nothing to take"):
        wrong(model, x, y, 0)
    train(model, x, y)


@on(LOCAL, DP2)
def test_only_inside_a_step():
    model = make_model()
    loss = token_loss(model, *mine(tokens(0)))
    with pytest.raises(StepUsageError, match="inside a function decorated"):
        model.backward(loss, weight=3)
    loss.backward()


def test_reduce_mean_leaves_out_what_has_no_weight():
    output = StepOutput([torch.tensor(torch.nan), torch.tensor(2.0)], (0.0, 1.0), 5.0)
    assert float(output.reduce_mean()) == 2.0
    assert math.isnan(float(StepOutput([torch.tensor(1.0)], (0.0,), 0.0).reduce_mean()))


LOSSES = [
    ("mse_loss", F.mse_loss, True), ("l1_loss", F.l1_loss, True), ("smooth_l1_loss", F.smooth_l1_loss, True),
    ("bce", F.binary_cross_entropy_with_logits, True),
]  # fmt: skip


@on(LOCAL, PP2)
def test_a_summed_loss_is_said_once():
    with logged_lines() as lines:
        x = torch.rand(4, 3)
        told = 0
        for name, function, _ in LOSSES:
            for reduction in ("sum", "mean"):
                model = smp.DistributedModel(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))

                @smp.step
                def step(model, x):
                    loss = function(model(x), x, reduction=reduction)  # noqa: B023
                    model.backward(loss)
                    return loss

                for _ in range(2):
                    step(model, x)
                now = smp.allgather(sum("sum over samples" in line for line in lines), smp.WORLD)
                assert sum(now) - told == (reduction == "sum"), (name, reduction)
                told = sum(now)
