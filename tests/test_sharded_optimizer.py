"""smp.DistributedOptimizer over shards of the parameters (``shard_optimizer_state``; smp-api section 7)."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, StepLR

import modelparallel as smp
from distributed_run import own_share, shared_folder
from modelparallel.errors import SMPConfigError, SMPError
from parity import assert_parity
from pool import run_ranks
from pooled_model import Pooled, make_pooled, pooled_batch
from rank_tests import RankTests, on
from training import classification_step

SHARDED = {"shard_optimizer_state": True}
DP2 = RankTests(2, SHARDED)
DP3 = RankTests(3, {**SHARDED, "microbatches": 2})
PP2 = RankTests(4, {**SHARDED, "pipeline_parallel_degree": 2, "microbatches": 2})
TP2 = RankTests(4, {**SHARDED, "tensor_parallel_degree": 2}, is_slow=True)
TP_ALONE = RankTests(2, {**SHARDED, "tensor_parallel_degree": 2})
FP16 = RankTests(4, {**SHARDED, "pipeline_parallel_degree": 2, "microbatches": 2, "fp16": True})
ALL = (DP2, DP3, PP2, TP2, TP_ALONE)


NUM_ROWS = 61


def make_net() -> Pooled:
    return make_pooled(NUM_ROWS)


def make_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    return pooled_batch(NUM_ROWS, step)


def train(model, optimizer, steps, after_step=lambda: None, max_norm=None):
    for step in steps:
        optimizer.zero_grad()
        if isinstance(model, smp.DistributedModel):
            classification_step(model, *own_share(make_batch(step)))
        else:
            tokens, targets = make_batch(step)
            F.cross_entropy(model(tokens), targets).backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        after_step()
    return {name: value.clone() for name, value in model.state_dict().items()}


class NormScaled(torch.optim.Optimizer):
    """Divides each gradient by the norm of the whole parameter's; says nothing of itself, as foreign optimizers do."""

    def __init__(self, parameters, lr=0.05):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter].setdefault("sum", torch.zeros_like(parameter)).add_(parameter.grad)
                    parameter.add_(self.state[parameter]["sum"] / parameter.grad.norm(), alpha=-group["lr"])


OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, amsgrad=True),
    "AdamW fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "Adadelta": lambda parameters: torch.optim.Adadelta(parameters, lr=1.0),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.01),
    "NormScaled": NormScaled,
    "FusedAdam": lambda parameters: smp.optimizers.FusedAdam(parameters, lr=0.01, weight_decay=0.01),
    "FusedLAMB": lambda parameters: smp.optimizers.FusedLAMB(parameters, lr=0.01, max_grad_norm=0.1),
    "FusedNovoGrad": lambda parameters: smp.optimizers.FusedNovoGrad(parameters, lr=0.01),
}


@on(*ALL)
def test_c062_training_is_that_of_the_unsharded_optimizer():
    for name, make_optimizer in OPTIMIZERS.items():
        if (name == "Adafactor" and smp.tp_size() > 1) or (name == "NormScaled" and smp.tp_size() > 1):
            continue  # norms of slices are not those of the whole, with or without sharding
        model, plain = smp.DistributedModel(make_net()), make_net()
        optimizer = smp.DistributedOptimizer(make_optimizer(model.parameters()))
        state = train(model, optimizer, range(3), max_norm=0.3)
        try:
            assert_parity(state, train(plain, make_optimizer(plain.parameters()), range(3), max_norm=0.3),
                          dtype=torch.float64)  # fmt: skip
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@on(*ALL)
def test_c062_each_element_of_the_state_is_on_one_holder_and_they_are_balanced():
    model = smp.DistributedModel(make_net())
    optimizer = smp.DistributedOptimizer(torch.optim.Adam(model.parameters()))
    train(model, optimizer, range(1))
    assert all("exp_avg" in values for values in optimizer.state.values())
    sizes = [values["exp_avg"].numel() for values in optimizer.state.values()]
    local = sum(parameter.numel() for parameter in model.parameters())
    over_copies = smp.allgather((sum(sizes), smp.pp_rank(), smp.tp_rank()), smp.DP_GROUP)
    whole = sum(parameter.numel() for parameter in make_net().parameters())
    of_stage = smp.allgather(sum(size for size, *_ in over_copies), smp.PP_GROUP)
    if smp.tp_size() == 1:
        assert sum(of_stage) == whole
    buckets = len(sizes) + 1
    assert abs(sum(sizes) - local / smp.dp_size()) <= buckets + (local if smp.tp_size() > 1 else 0)
    assert max(size for size, *_ in over_copies) - min(size for size, *_ in over_copies) <= 2 * buckets


@on(*ALL)
def test_groups_and_schedulers_keep_working():
    def groups_of(net):
        decayed = [value for value in net.parameters() if value.ndim > 1]
        others = [value for value in net.parameters() if value.ndim <= 1]
        return [{"params": decayed, "weight_decay": 0.1, "lr": 0.05}, {"params": others}]

    results = []
    for net in (smp.DistributedModel(make_net()), make_net()):
        optimizer = torch.optim.AdamW(groups_of(net), lr=0.02)
        if isinstance(net, smp.DistributedModel):
            optimizer = smp.DistributedOptimizer(optimizer)
        first, second = StepLR(optimizer, 1, 0.7), LambdaLR(getattr(optimizer, "optimizer", optimizer), lambda n: 1 + n)

        def after_step(schedulers=(first, second)):
            for scheduler in schedulers:
                scheduler.step()

        results.append(train(net, optimizer, range(3), after_step))
    assert_parity(results[0], results[1], dtype=torch.float64)


@on(*ALL)
def test_states_go_on_in_every_form_and_without_sharding():
    def fresh():
        model = smp.DistributedModel(make_net())
        return model, smp.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=0.01))

    model, optimizer = fresh()
    train(model, optimizer, range(2))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    forms = {
        "whole": (copy.deepcopy(optimizer.state_dict()), {}),
        "local": (copy.deepcopy(optimizer.local_state_dict()), {}),
        "shards": (copy.deepcopy(optimizer.local_state_dict(gather_if_shard=False)), {"gather_if_shard": False}),
        "shards, not called so": (copy.deepcopy(optimizer.local_state_dict(gather_if_shard=False)), {}),
    }
    expected = train(model, optimizer, range(2, 4))
    for name, (state, arguments) in forms.items():
        model, optimizer = fresh()
        model.load_state_dict(weights)
        optimizer.load_state_dict(state, **arguments)
        result = train(model, optimizer, range(2, 4))
        assert all(torch.equal(result[key], value) for key, value in expected.items()), name
    plain = make_net()
    plain_optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)
    plain.load_state_dict(weights)
    plain_optimizer.load_state_dict(copy.deepcopy(forms["whole"][0]))
    shapes = [tuple(values["exp_avg"].shape) for values in forms["whole"][0]["state"].values()]
    assert shapes == [tuple(parameter.shape) for parameter in plain.parameters()]
    assert_parity(expected, train(plain, plain_optimizer, range(2, 4)), dtype=torch.float64)
    model, optimizer = fresh()
    model.load_state_dict(weights)
    optimizer.load_state_dict(plain_optimizer.state_dict() | {"state": forms["whole"][0]["state"]})
    result = train(model, optimizer, range(2, 4))
    assert all(torch.equal(result[key], value) for key, value in expected.items())


@on(DP2, PP2, TP2, TP_ALONE)
def test_files_of_shards_are_saved_and_loaded_as_hugging_face_s_trainer_does():
    """Each rank its own (``v3``); loaded by a hook of the first step (clients.md section 4.3)."""
    file = shared_folder() + "/optimizer.pt"
    model = smp.DistributedModel(make_net())
    optimizer = smp.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=0.01))
    train(model, optimizer, range(2))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = optimizer.local_state_dict(gather_if_shard=False)
    smp.barrier()
    if smp.rdp_rank() == 0 or smp.state.cfg.shard_optimizer_state:
        smp.save(state, file, partial=True, v3=smp.state.cfg.shard_optimizer_state)
    smp.barrier()
    expected = train(model, optimizer, range(2, 4))
    model = smp.DistributedModel(make_net())
    optimizer = smp.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=0.01))
    model.load_state_dict(weights)
    model.register_post_step_hook(lambda _, optimizer: optimizer.load_state_dict(smp.load(file, partial=True)))
    result = train(model, optimizer, range(2, 4))
    assert all(torch.equal(result[key], value) for key, value in expected.items())


@on(DP2, PP2)
def test_gradients_of_shards_are_forgotten_and_accumulate():
    model, plain = smp.DistributedModel(make_net()), make_net()
    optimizer = smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(2):
        classification_step(model, *own_share(make_batch(step)))
        tokens, targets = make_batch(step)
        F.cross_entropy(plain(tokens), targets).backward()
    torch.testing.assert_close(
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9),
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1e9),
    )
    optimizer.step()
    plain_optimizer.step()
    assert_parity(model.state_dict(), plain.state_dict(), dtype=torch.float64)
    for forget in (optimizer.zero_grad, model.zero_grad, lambda: optimizer.zero_grad(set_to_none=False)):
        classification_step(model, *own_share(make_batch(0)))
        forget()
        optimizer.step()
        assert_parity(model.state_dict(), plain.state_dict(), dtype=torch.float64)


@on(DP2, PP2)
def test_an_optimizer_that_needs_whole_parameters_beside_one_that_does_not():
    model, plain = smp.DistributedModel(make_net()), make_net()

    def pair(net):
        parameters = dict(net.named_parameters())
        table = [parameters.pop("table.weight")] if "table.weight" in parameters else []
        return [
            torch.optim.Adam(list(parameters.values()), lr=0.01),
            NormScaled(table or [nn.Parameter(torch.ones(1))]),
        ]

    optimizers = [smp.DistributedOptimizer(optimizer) for optimizer in pair(model)]
    for step in range(2):
        model.zero_grad()
        classification_step(model, *own_share(make_batch(step)))
        for optimizer in optimizers:
            optimizer.step()
    others = pair(plain)
    for step in range(2):
        plain.zero_grad()
        tokens, targets = make_batch(step)
        F.cross_entropy(plain(tokens), targets).backward()
        for optimizer in others:
            optimizer.step()
    assert_parity(model.state_dict(), plain.state_dict(), dtype=torch.float64)


@on(DP2)
def test_lbfgs_is_refused():
    model = smp.DistributedModel(make_net())
    with pytest.raises(SMPConfigError, match="LBFGS"):
        smp.DistributedOptimizer(torch.optim.LBFGS(model.parameters()))
    optimizer = smp.DistributedOptimizer(torch.optim.Adam(model.parameters()))
    train(model, optimizer, range(1))
    with pytest.raises(SMPError, match="NormScaled"):
        smp.DistributedOptimizer(NormScaled(model.parameters()))


@on(FP16)
def test_masters_of_shards_and_an_overflow_on_one_rank():
    torch.manual_seed(8)
    model = smp.DistributedModel(Pooled(NUM_ROWS))
    optimizer = smp.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=0.01), dynamic_loss_scale=True,
                                         init_scale=256.0)  # fmt: skip
    train(model, optimizer, range(2))
    assert not optimizer.overflow
    masters = [master for group in optimizer.fp32_from_fp16_groups for master in group]
    held = smp.allgather(sum(master.numel() for master in masters), smp.WORLD)
    assert sum(held) == sum(parameter.numel() for parameter in Pooled(NUM_ROWS).parameters())
    before = model.state_dict()
    optimizer.zero_grad()
    classification_step(model, *own_share(make_batch(2)))
    optimizer.update_master_grads()
    if smp.rank() == smp.size() - 1:
        optimizer._overflow.fill_(1.0)
    optimizer.step()
    assert optimizer.overflow and optimizer.loss_scale == 128
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    state = optimizer.state_dict()["state"]
    whole = {name: state[index]["fp32_master"] for name, index in optimizer.param_name_to_index().items()}
    assert all(torch.equal(whole[name].half(), value) for name, value in before.items())


def build_without_copies():
    model = smp.DistributedModel(nn.Linear(3, 3))
    optimizer = smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return True


def test_one_process_shares_nothing_out():
    assert run_ranks(build_without_copies, 1, parameters={"ddp": True, **SHARDED}) == [True]
