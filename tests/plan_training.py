"""Train a model by a plan on ranks, and compare with one process: for the tests of plans."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import modelparallel as smp
from parity import assert_parity, reference_run
from plan_models import (
    F64,
    TOWERS,
    make_tower,
    tower_batch,
    tower_loss,
)
from pool import run_ranks
from training import step_of

NUM_SAMPLES = 4
# Its router computes in float32, whatever the dtype of the model.
SINGLE_PRECISION = {"mixtral"}


def settings(tp: int, **more: Any) -> dict[str, Any]:
    return {"tensor_parallel_degree": tp, "ddp": True, "timeout_seconds": 20, **more}


def make_optimizer(kind: str) -> Callable[[Any], torch.optim.Optimizer]:
    def make(parameters: Any) -> torch.optim.Optimizer:
        if kind == "adam":
            return torch.optim.Adam(parameters, lr=0.01)
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)

    return make


def setup_of(
    name: str,
) -> tuple[Callable[[], nn.Module], Any, Callable[[int, int], tuple[Tensor, ...]], Callable[..., Tensor]]:
    """(make the model, the plan or None, a batch of a step, the loss) of a tower or a family."""
    if name in TOWERS:
        return lambda: make_tower(name), TOWERS[name][1], tower_batch, tower_loss
    from plan_families import family_batch, family_loss, make_family

    return lambda: make_family(name), None, family_batch, family_loss


def train(name: str, kind: str) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
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
    train_step = step_of(loss_of)

    @smp.step
    def evaluate(model: Any, *batch: Any) -> Tensor:
        return loss_of(model, *batch)

    losses, gradients = [], {}
    is_prescaled = smp.job.session.current().config.prescaled_batch
    copy, num_copies = (smp.rdp_rank(), smp.rdp_size()) if is_prescaled else (smp.dp_rank(), smp.dp_size())
    own = slice(copy * NUM_SAMPLES, (copy + 1) * NUM_SAMPLES)
    for step in range(3):
        batch = batch_of(step, NUM_SAMPLES * num_copies)
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
    check_states(
        make, model, weights, lambda: evaluate(model, *mine).reduce_mean(), lambda plain: loss_of(plain, *mine)
    )
    return losses, gradients, weights


def check_states(
    make: Callable[[], nn.Module],
    model: Any,
    weights: dict[str, Tensor],
    evaluate: Callable[[], Tensor],
    loss_of: Callable[[nn.Module], Tensor],
) -> None:
    model.eval()
    plain = make().eval()
    plain.load_state_dict(weights)
    with torch.no_grad():
        torch.testing.assert_close(evaluate(), loss_of(plain).detach(), rtol=1e-7, atol=0)
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


def train_all(names: Sequence[str], kind: str) -> dict[str, Any]:
    return {name: train(name, kind) for name in names}


def check_training(names: Sequence[str], num_ranks: int, parameters: dict[str, Any], kind: str) -> None:
    ranks = run_ranks(train_all, num_ranks, names, kind, parameters=parameters, timeout=170)
    num_copies = num_ranks // parameters.get("pipeline_parallel_degree", 1)
    if parameters.get("prescaled_batch"):
        num_copies //= parameters["tensor_parallel_degree"]
    for name in names:
        make, _, batch_of, loss_of = setup_of(name)
        expected = reference_run(
            make,
            [batch_of(step, NUM_SAMPLES * num_copies) for step in range(3)],
            loss_of,
            num_microbatches=parameters.get("microbatches", 1),
            make_optimizer=make_optimizer(kind),
            num_copies=num_copies,
        )
        for results in ranks:
            _, gradients, weights = results[name]
            dtype = torch.float32 if name in SINGLE_PRECISION else F64
            assert_parity(gradients, {key: expected.gradients[key] for key in gradients}, dtype=dtype)
            assert set(weights) == set(expected.weights)
            assert_parity(weights, expected.weights, dtype=dtype)
        losses = torch.tensor([results[name][0] for results in ranks]).mean(0)
        torch.testing.assert_close(losses, torch.tensor(expected.losses))


def own_rows(counts: Sequence[int]) -> tuple[slice, int]:
    counts = counts[: smp.tp_size()]
    start = sum(counts[: smp.tp_rank()])
    return slice(start, start + counts[smp.tp_rank()]), sum(counts)
