"""Tied weights with a copy on each stage: one logical parameter, exact gradients, a chain without a second visit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distributed_run import assert_equal_over, distributed_run
from parity import assert_parity, reference_run
from pool import run_ranks
from tied_model import batches, loss_of, make_tied
from training import step_of
from zoo_catalogue import ZOO

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
}


def train(optimizer: str, size: int) -> Any:
    import modelparallel as smp

    result = distributed_run(make_tied, batches(4, size), loss_of, make_optimizer=OPTIMIZERS[optimizer])
    from modelparallel.training import runtime

    engine = runtime.current().engine
    wrapped: Any = runtime.current().models[0]
    local = {name: value.detach().clone() for name, value in wrapped.local_named_parameters()}
    shared = {name: local[name] for name in local if name in ("embedding.weight", "blocks.0.0.bias")}
    assert_equal_over(smp.RDP_GROUP, shared)
    holders = {row.name: row.holders for row in wrapped.table.rows() if row.tied_copies}
    (plan,) = [engine.plans.get(kind) for kind in engine.plans.kinds()]
    return result, holders, shared, None if plan is None else plan.is_sequential


@pytest.mark.parametrize("schedule", ["simple", "interleaved", "zero_bubble"])
@pytest.mark.parametrize(
    "num_stages, num_ranks, optimizer, size", [(2, 2, "sgd", 8), (3, 3, "adam", 7), (2, 4, "adam", 8)]
)
def test_copies_of_tied_weights_train_like_one(
    schedule: str, num_stages: int, num_ranks: int, optimizer: str, size: int
) -> None:
    num_copies = num_ranks // num_stages
    parameters = {
        "pipeline_parallel_degree": num_stages, "microbatches": 4 if size == 8 and num_copies == 1 else 2,
        "pipeline": schedule, "tied_weights": "replicate", "memory_weight": 0.0, "ddp": num_copies > 1,
    }  # fmt: skip
    expected = reference_run(
        make_tied, batches(4, size), loss_of, num_microbatches=parameters["microbatches"],
        num_copies=num_copies, make_optimizer=OPTIMIZERS[optimizer],
    )  # fmt: skip
    ranks = run_ranks(train, num_ranks, optimizer, size, parameters=parameters)
    for result, holders, _, is_sequential in ranks:
        losses = {"losses": torch.tensor(result.losses, dtype=torch.float64)}
        assert_parity(losses, {"losses": torch.tensor(expected.losses, dtype=torch.float64)}, dtype=torch.float64)
        assert_parity(result.gradients, expected.gradients, dtype=torch.float64)
        assert_parity(result.weights, expected.weights, dtype=torch.float64)
        assert holders["embedding.weight"] == (0, num_stages - 1)
        assert is_sequential  # no stage is visited twice
    copies = [shared["embedding.weight"] for _, _, shared, _ in ranks if "embedding.weight" in shared]
    assert len(copies) == 2 * num_copies
    for copy in copies:
        assert torch.equal(copy, copies[0])


def accumulate(is_zeroed_in_place: bool) -> dict[str, Tensor]:
    """Several steps between two optimizer steps, with and without zero_grad."""
    import modelparallel as smp

    model = smp.DistributedModel(make_tied(), backward_passes_per_step=2)
    optimizer = smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    step = step_of(loss_of)
    data = batches(8)
    for number, batch in enumerate(data[:6]):
        step(model, *batch)
        if number in (1, 5):
            optimizer.step()
            optimizer.zero_grad(set_to_none=not is_zeroed_in_place)
    return model.state_dict()


def accumulate_plainly() -> dict[str, Tensor]:
    model = make_tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number, (tokens,) in enumerate(batches(8)[:6]):
        for part in tokens.chunk(2):
            (loss_of(model, part) / 2).backward()
        if number in (1, 5):
            optimizer.step()
            optimizer.zero_grad()
    return dict(model.state_dict())


@pytest.mark.parametrize("is_zeroed_in_place", [False, True])
def test_gradients_of_several_steps_add_up_once(is_zeroed_in_place: bool) -> None:
    parameters = {"pipeline_parallel_degree": 2, "microbatches": 2, "tied_weights": "replicate", "memory_weight": 0.0}
    for state in run_ranks(accumulate, 2, is_zeroed_in_place, parameters=parameters):
        assert_parity(state, accumulate_plainly(), dtype=torch.float64)


def reload() -> None:
    import modelparallel as smp

    model = smp.DistributedModel(make_tied())
    step = step_of(loss_of)
    first = step(model, *batches(1)[0]).reduce_mean()
    state = model.state_dict()
    assert set(state) == set(make_tied().state_dict())
    for parameter in model.parameters():
        parameter.data.zero_()
    model.load_state_dict(state)
    assert float(step(model, *batches(1)[0]).reduce_mean()) == float(first)
    model.load_state_dict(model.local_state_dict())
    assert float(step(model, *batches(1)[0]).reduce_mean()) == float(first)


def test_state_dict_holds_a_replicated_parameter_once_and_loads_it_everywhere() -> None:
    parameters = {"pipeline_parallel_degree": 2, "microbatches": 2, "tied_weights": "replicate", "memory_weight": 0.0}
    run_ranks(reload, 2, parameters=parameters)


def holders_under(name: str) -> dict[str, tuple[int, ...]]:
    import modelparallel as smp

    entry = ZOO[name]
    torch.manual_seed(7)
    model = smp.DistributedModel(entry.make_model().double().train())
    step = step_of(entry.body)
    step(model, *entry.make_batch(0))
    return {row.name: row.holders for row in model.table.rows() if row.aliases}


@pytest.mark.parametrize("mode", ["colocate", "replicate", "auto"])
def test_partitioner_decides_about_copies(mode: str) -> None:
    parameters = {"pipeline_parallel_degree": 2, "microbatches": 2, "tied_weights": mode, "memory_weight": 0.0}
    found = run_ranks(holders_under, 2, "gpt2_tied", parameters=parameters)
    assert found[0] == found[1]
    holders = found[0]["transformer.wte.weight"]
    assert len(holders) == {"colocate": 1, "replicate": 2}.get(mode, len(holders))
