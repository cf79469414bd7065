"""Any model by a tensor-parallel plan: the user's own, or the one that the model carries (docs/plans.md)."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modelparallel as smp
from modelparallel.errors import TensorParallelError
from modelparallel.plan.parameters import SplitSpec
from modelparallel.tensor_parallel.plans import carried_plan, user_plan
from modelparallel.tensor_parallel.replace import replace_marked_modules
from parity import assert_parity, reference_run
from plan_models import (
    ATTENTION,
    EXPERTS,
    F64,
    FUSED,
    MLP,
    OUT,
    TOWERS,
    VOCABULARY,
    Expert,
    Tower,
    make_tower,
    tower_batch,
    tower_loss,
)
from pool import preload, run_ranks
from rank_tests import RankTests, on
from test_tensor_parallel import imaginary

TP2 = RankTests(2, {"tensor_parallel_degree": 2})
TP4 = RankTests(4, {"tensor_parallel_degree": 4})
NUM_SAMPLES = 4


def settings(tp: int, **more) -> dict:
    return {"tensor_parallel_degree": tp, "ddp": True, "timeout_seconds": 20, **more}


def make_optimizer(kind: str):
    def make(parameters):
        if kind == "adam":
            return torch.optim.Adam(parameters, lr=0.01)
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)

    return make


def setup_of(name: str):
    """(make the model, the plan or None, a batch of a step, the loss) of a tower or a family."""
    if name in TOWERS:
        return lambda: make_tower(name), TOWERS[name][1], tower_batch, tower_loss
    from plan_families import family_batch, family_loss, make_family

    return lambda: make_family(name), None, family_batch, family_loss


def train(name: str, kind: str):
    """Three steps on this rank's share: losses, gradients of the first step and final weights, un-sliced; and that the
    state dict gives the plain model the same outputs, and comes back.
    """
    make, plan, batch_of, loss_of = setup_of(name)
    model = make()
    smp.set_tensor_parallelism(model, plan=plan)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*stays whole")
        model = smp.DistributedModel(model)
    optimizer = smp.DistributedOptimizer(make_optimizer(kind)(model.parameters()))

    @smp.step
    def train_step(model, *batch):
        loss = loss_of(model, *batch)
        model.backward(loss)
        return loss

    @smp.step
    def evaluate(model, *batch):
        return loss_of(model, *batch)

    losses, gradients = [], {}
    for step in range(3):
        batch = batch_of(step, NUM_SAMPLES * smp.dp_size())
        own = slice(smp.dp_rank() * NUM_SAMPLES, (smp.dp_rank() + 1) * NUM_SAMPLES)
        mine = [part[own] for part in batch]
        optimizer.zero_grad()
        losses.append(float(train_step(model, *mine).reduce_mean()))
        if not gradients:
            for parameter_name, parameter in model.local_named_parameters():
                local = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                row = model.table.row_of(parameter)
                gradients[parameter_name] = (
                    local if row.split is None else row.split.join(smp.allgather(local, smp.TP_GROUP))
                )
        optimizer.step()
    for stage in smp.allgather(gradients, smp.PP_GROUP):
        gradients.update(stage)
    weights = model.state_dict()
    check_states(make, model, weights, lambda: evaluate(model, *mine).reduce_mean(), lambda plain: loss_of(plain, *mine))
    return losses, gradients, weights


def check_states(make, model, weights, evaluate, loss_of):
    model.eval()
    plain = make().eval()
    plain.load_state_dict(weights)
    with torch.no_grad():
        torch.testing.assert_close(evaluate(), loss_of(plain).detach(), rtol=1e-9, atol=0)
    local = {name: value.clone() if isinstance(value, torch.Tensor) else value
             for name, value in model.local_state_dict().items()}  # fmt: skip
    with torch.no_grad():
        for _, parameter in model.local_named_parameters():
            parameter.zero_()
    for state, more in ((weights, {}), (local, {}), (local, {"same_partition_load": True})):
        model.load_state_dict(state, **more)
        again = model.local_state_dict()
        assert set(again) == set(local)
        assert all(torch.equal(again[name], value) for name, value in local.items() if isinstance(value, torch.Tensor))
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def train_all(names, kind):
    return {name: train(name, kind) for name in names}


def check_training(names, num_ranks, parameters, kind):
    ranks = run_ranks(train_all, num_ranks, names, kind, parameters=parameters, timeout=170)
    num_replicas = num_ranks // parameters.get("pipeline_parallel_degree", 1)
    for name in names:
        make, _, batch_of, loss_of = setup_of(name)
        expected = reference_run(
            make,
            [batch_of(step, NUM_SAMPLES * num_replicas) for step in range(3)],
            loss_of,
            num_microbatches=parameters.get("microbatches", 1),
            make_optimizer=make_optimizer(kind),
            num_replicas=num_replicas,
        )
        for results in ranks:
            _, gradients, weights = results[name]
            assert_parity(gradients, {key: expected.gradients[key] for key in gradients}, dtype=F64)
            assert set(weights) == set(expected.weights)
            assert_parity(weights, expected.weights, dtype=F64)
        losses = torch.tensor([results[name][0] for results in ranks]).mean(0)
        torch.testing.assert_close(losses, torch.tensor(expected.losses))


def test_models_with_a_users_plan_train_as_in_one_process():
    check_training(list(TOWERS), 2, settings(2, microbatches=2), "sgd")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "parameters", "kind"),
    [
        (4, settings(4), "adam"),
        (4, settings(2), "adam"),
        (4, settings(2, pipeline_parallel_degree=2, microbatches=2), "sgd"),
    ],
    ids=["tp4", "tp2 rdp2", "tp2 pp2"],
)
def test_models_with_a_users_plan_train_as_in_one_process_on_more_ranks(num_ranks, parameters, kind):
    check_training(list(TOWERS), num_ranks, parameters, kind)
