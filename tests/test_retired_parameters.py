"""Lists of parameters from before sharding or tensor parallelism put others in their place."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import modelparallel as smp
from modelparallel.errors import AbsentTensorError
from rank_tests import RankTests, on
from training import square_step

SHARDED = {"sharded_data_parallel_degree": 2, "sdp_param_persistence_threshold": 0, "sdp_gradient_clipping": 1e9}
SHARDED2 = RankTests(2, SHARDED)
SHARDED2_STEP = RankTests(2, {**SHARDED, "microbatches": 2, "sdp_gather": "step"})
SHARDED_PP = RankTests(4, {**SHARDED, "pipeline_parallel_degree": 2, "microbatches": 2})
TP2 = RankTests(2, {"tensor_parallel_degree": 2})


def make_net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 2)).double()


def batches(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return list(torch.randn(smp.dp_size(), 4, 6, generator=generator, dtype=torch.float64))


def decay(parameters) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(0.9)


def halve(parameters) -> None:
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(0.5)


def freeze(parameters) -> None:
    for parameter in list(parameters)[:2]:
        parameter.requires_grad_(False)


def use(listed, plain, do) -> None:
    do(listed)
    do(plain)


@on(SHARDED2, SHARDED2_STEP, SHARDED_PP)
def test_lists_from_before_the_shards_are_the_shards():
    net, model = make_net(), make_net()
    listed = list(model.parameters())
    model = smp.DistributedModel(model)
    optimizer = smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    plain = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(5):
        for parameter in (*listed, *net.parameters()):
            parameter.grad = None
        square_step(model, batches(step)[smp.dp_rank()])
        net(torch.cat(batches(step))).square().mean().backward()
        if step != 2:
            use(listed, net.parameters(), halve)
        for parameters in (listed, net.parameters()):
            torch.nn.utils.clip_grad_norm_(parameters, 0.05)
        optimizer.step()
        plain.step()
        if step == 1:
            use(listed, net.parameters(), decay)
        if step == 3:
            use(listed, net.parameters(), freeze)
    expected = net.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)


@on(TP2)
def test_lists_from_before_another_layer_took_the_place_are_an_error_that_names_them():
    torch.manual_seed(3)
    net = GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=16, n_positions=8))
    listed = dict(net.named_parameters())
    smp.set_tensor_parallelism(net)
    model = smp.DistributedModel(net)
    weight = next(value for name, value in listed.items() if name.endswith("attn.c_attn.weight"))
    assert all(weight is not parameter for parameter in model.parameters())
    for name, do in {
        "read": lambda: weight.norm(),
        "written": lambda: decay([weight]),
        "data": lambda: weight.data.mul_(2),
        "copied": lambda: copy.deepcopy(weight),
        "used": lambda: torch.ones(1) + weight.sum(),
    }.items():
        with pytest.raises(AbsentTensorError, match=r"(?s)attn.c_attn.weight'.*right: model = smp.DistributedModel"):
            do()
            raise AssertionError(name)
    frozen = [parameter.requires_grad for parameter in model.parameters()]
    weight.requires_grad_(False)
    assert sum(frozen) - sum(parameter.requires_grad for parameter in model.parameters()) == 1
