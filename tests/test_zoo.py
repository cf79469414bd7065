"""Unmodified models in a pipeline against one process: losses, every gradient by name, weights after optimizer
steps.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from parity import assert_parity, reference_run
from pool import run_ranks
from zoo import ZOO

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
}


def make_model(name: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    torch.manual_seed(7)
    return ZOO[name].make_model().to(dtype).train()


def train_pipelined(names: list[str], optimizer: str) -> dict[str, Any]:
    import modelparallel as smp

    results: dict[str, Any] = {}
    for name in names:
        entry = ZOO[name]
        model = smp.DistributedModel(make_model(name))
        wrapped = smp.DistributedOptimizer(OPTIMIZERS[optimizer](model.parameters()))

        @smp.step
        def train_step(model: Any, *batch: Any) -> Any:
            loss = entry.body(model, *batch)  # noqa: B023
            model.backward(loss)
            return loss

        losses, gradients = [], {}
        for step in range(entry.num_steps):
            wrapped.zero_grad()
            losses.append(float(train_step(model, *entry.make_batch(step)).reduce_mean()))
            if step == 0:
                gradients = {
                    key: torch.zeros_like(value) if value.grad is None else value.grad.clone()
                    for key, value in model.local_named_parameters()
                }
            wrapped.step()
        results[name] = (losses, gradients, model.state_dict())
    return results


def check(names: list[str], num_stages: int, num_microbatches: int, optimizer: str) -> None:
    parameters = {"pipeline_parallel_degree": num_stages, "microbatches": num_microbatches, "timeout_seconds": 60}
    ranks = run_ranks(train_pipelined, num_stages, names, optimizer, parameters=parameters, timeout=120)
    for name in names:
        entry = ZOO[name]
        expected = reference_run(
            lambda: make_model(name),  # noqa: B023
            [entry.make_batch(step) for step in range(entry.num_steps)],
            entry.body,
            num_microbatches=num_microbatches,
            make_optimizer=OPTIMIZERS[optimizer],
        )
        gradients = {key: value for rank in ranks for key, value in rank[name][1].items()}
        for rank in ranks:
            losses = {"losses": torch.tensor(rank[name][0], dtype=torch.float64)}
            assert_parity(losses, {"losses": torch.tensor(expected.losses, dtype=torch.float64)}, dtype=torch.float64)
            assert_parity(rank[name][2], expected.weights, dtype=torch.float64)
        assert_parity(gradients, expected.gradients, dtype=torch.float64)


@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("name", list(ZOO))
def test_pipelined_model_equals_one_process(name: str, num_stages: int) -> None:
    check(
        [name], num_stages, num_microbatches=2 if num_stages == 2 else 3, optimizer="sgd" if num_stages == 2 else "adam"
    )
