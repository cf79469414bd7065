"""Data-parallel ranks that are a step apart, or freeze other parameters, are found at the next reduction, by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import modelparallel as smp
from modelparallel.errors import DivergenceError, SMPError
from rank_tests import RankTests, on

M = {"microbatches": 2}
SHARDED = {**M, "sharded_data_parallel_degree": 2, "sdp_param_persistence_threshold": 0}
SETS = [M, {**M, "shard_optimizer_state": True}, SHARDED, {**SHARDED, "sdp_gather": "visit"}]
# Each ends with an error: a set for itself.
CAUGHT = [RankTests(2, parameters) for parameters in SETS[:2]]
FROZEN, THAWED = ([RankTests(2, parameters) for parameters in SETS[:3]] for _ in range(2))
CAUGHT_SHARDED = [RankTests(2, {**parameters, "timeout_seconds": 5}) for parameters in SETS[2:]]
SKIPPED = [RankTests(2, M)]  # updates of shards are collective: there the others wait for the one that leaves it out
FROZEN_BY_VISIT, THAWED_BY_VISIT = RankTests(2, SETS[3]), RankTests(2, SETS[3])
PIPELINED = RankTests(4, {**M, "pipeline_parallel_degree": 2})
DP3 = RankTests(3, M)
FINE = [RankTests(2, parameters) for parameters in SETS]


def make(**options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    model = smp.DistributedModel(net, **options)
    optimizer = smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))

    @smp.step
    def step(model, x, fails=False):
        loss = model(x).pow(2).mean()
        if fails:
            raise ValueError("not this batch")
        model.backward(loss)
        return loss

    return model, optimizer, lambda *args: step(model, *args)


def samples(index: int) -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * index + smp.dp_rank()))


def other_rank() -> bool:
    return smp.dp_rank() == smp.dp_size() - 1


@on(*CAUGHT, DP3, PIPELINED)
def test_an_exception_caught_on_one_rank():
    _, optimizer, step = make()
    step(samples(0))
    optimizer.step()
    if other_rank():
        with pytest.raises((ValueError, SMPError)):
            step(samples(1), True)
    with pytest.raises(SMPError, match="are not at the same step"):
        for index in range(1, 3):
            step(samples(index))
            optimizer.step()


@pytest.mark.slow
@on(*CAUGHT_SHARDED)
def test_an_exception_caught_on_one_rank_beside_sharded_parameters():
    _, optimizer, step = make()
    for index in range(2):
        step(samples(index))
        optimizer.step()
    if other_rank():
        with pytest.raises(ValueError, match="not this batch"):
            step(samples(2), True)
    with pytest.raises(DivergenceError, match=r"global rank 1 has caught an exception .* global rank 0 has not left"):
        step(samples(3))


@on(*SKIPPED)
def test_an_update_left_out_by_one_rank():
    _, optimizer, step = make()
    for _ in range(2):
        step(samples(0))
        optimizer.step()
        optimizer.zero_grad()
    step(samples(1))
    if not other_rank():
        optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(DivergenceError, match=r"made 4 training steps and [23] updates, another rank [23] updates"):
        step(samples(2))


def find(model, name):
    return dict(model.module.named_parameters())[name]


@on(*FROZEN, FROZEN_BY_VISIT)
def test_a_parameter_frozen_on_one_rank():
    model, optimizer, step = make()
    for index in range(2):
        step(samples(index))
        optimizer.step()
        optimizer.zero_grad()
    if other_rank():
        for name in ("2.weight", "2.bias"):
            find(model, name).requires_grad_(False)
    with pytest.raises(DivergenceError, match=r"parameter '2\.(weight|bias)' has requires_grad=False on"):
        step(samples(2))


@on(*THAWED, THAWED_BY_VISIT)
def test_a_parameter_thawed_on_one_rank():
    model, optimizer, step = make()
    for name in ("2.weight", "0.bias"):
        find(model, name).requires_grad_(False)
    for index in range(2):
        step(samples(index))
        optimizer.step()
        optimizer.zero_grad()
    if other_rank():
        find(model, "2.weight").requires_grad_(True)
    with pytest.raises(DivergenceError, match=r"parameter '2\.weight' has requires_grad=False on"):
        step(samples(2))


@on(*FINE)
def test_what_all_ranks_do_alike_is_fine():
    model, optimizer, step = make()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    reference = torch.optim.SGD(plain.parameters(), lr=0.1)
    frozen = [(), ("2.weight", "2.bias"), ("2.weight",), ("4.weight", "4.bias", "0.weight"), ()]
    for index, names in enumerate(frozen):
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_(name not in names)
            find(model, name).requires_grad_(name not in names)
        with pytest.raises(ValueError, match="not this batch"):
            step(samples(index), True)
        step(samples(index))
        for rank in range(2):
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * index + rank))
            (plain(x).pow(2).mean() / 2).backward()
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
        reference.zero_grad()
    found = model.state_dict()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
