"""Training with several pieces of the model a stage, and within a memory limit: equal to one process."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch

from modelparallel.errors import PartitionError
from parity import assert_parity, reference_run
from pool import RankError, run_ranks
from training import gentle_sgd, step_of
from zoo_catalogue import ZOO, make_model

NAMES = ["llama", "unet", "containers"]
NUM_MICROBATCHES = 3


def train(names: list[str]) -> dict[str, Any]:
    """Losses, gradients of the first step, final weights and the plan of every model."""
    import modelparallel as smp

    results: dict[str, Any] = {}
    for name in names:
        entry = ZOO[name]
        model = smp.DistributedModel(make_model(name))
        optimizer = smp.DistributedOptimizer(gentle_sgd(model.parameters()))
        train_step = step_of(entry.body)
        losses, gradients = [], {}
        for step in range(2):
            optimizer.zero_grad()
            losses.append(float(train_step(model, *entry.make_batch(step)).reduce_mean()))
            if step == 0:
                gradients = {
                    key: torch.zeros_like(value) if value.grad is None else value.grad.clone()
                    for key, value in model.local_named_parameters()
                }
            optimizer.step()
        results[name] = (losses, gradients, model.state_dict(), model.partition_plan)
    return results


def train_and_compare(names: list[str], num_stages: int, **parameters: Any) -> dict[str, Any]:
    """Run on that many stages and assert that all is as in one process; returns the plans."""
    parameters |= {"pipeline_parallel_degree": num_stages, "microbatches": NUM_MICROBATCHES, "timeout_seconds": 60}
    ranks = run_ranks(train, num_stages, names, parameters=parameters)
    for name in names:
        entry = ZOO[name]
        expected = reference_run(
            lambda: make_model(name),  # noqa: B023
            [entry.make_batch(step) for step in range(2)],
            entry.body,
            num_microbatches=NUM_MICROBATCHES,
            make_optimizer=gentle_sgd,
        )
        gradients = {key: value for rank in ranks for key, value in rank[name][1].items()}
        assert_parity(gradients, expected.gradients, dtype=torch.float64)
        for losses, _, weights, plan in (rank[name] for rank in ranks):
            found = {"losses": torch.tensor(losses, dtype=torch.float64)}
            assert_parity(found, {"losses": torch.tensor(expected.losses, dtype=torch.float64)}, dtype=torch.float64)
            assert_parity(weights, expected.weights, dtype=torch.float64)
            assert plan == ranks[0][name][3]
    return {name: ranks[0][name][3] for name in names}


def test_two_pieces_a_stage_train_as_one_process() -> None:
    plans = train_and_compare(NAMES, 2, virtual_pipeline_degree=2)
    for name, plan in plans.items():
        stages = [stage for _, stage in plan.modules]
        changes = sum(first != second for first, second in itertools.pairwise(stages))
        assert plan.virtual_degree == 2, name
        assert changes >= 3, (name, plan.modules)
        assert all(len(figures.in_flight) == 2 for figures in plan.figures)
        assert {(source, target) for source, target, _ in plan.traffic} == {(0, 1), (1, 0)}
        assert sum(share for _, share in plan.costs) == pytest.approx(1.0)


def test_a_memory_limit_moves_modules_and_is_kept() -> None:
    free = train_and_compare(["llama"], 2)["llama"]
    assert [figures.in_flight for figures in free.figures] == [(2,), (1,)]
    limit = max(figures.memory_bytes for figures in free.figures) - 1
    limited = train_and_compare(["llama"], 2, memory_limit=limit)["llama"]
    assert limited != free
    assert max(figures.memory_bytes for figures in limited.figures) <= limit


def test_a_limit_that_cannot_be_kept_stops_every_rank_before_training() -> None:
    parameters = {"pipeline_parallel_degree": 2, "microbatches": 2, "memory_limit": 10_000, "timeout_seconds": 60}
    with pytest.raises(RankError, match=r"memory_limit=10000: no split over 2 stages") as caught:
        run_ranks(train, 2, ["llama"], parameters=parameters)
    assert all(isinstance(failure.exception, PartitionError) for failure in caught.value.failures)


def sent_activations(names: list[str]) -> dict[str, Any]:
    """What the forwards of a step really send from this rank, by (from, to), and what the plan says."""
    import modelparallel as smp
    from modelparallel.comm.stages.transport import MessageKind, StageTransport

    sent: Counter[tuple[int, int]] = Counter()
    send: Any = StageTransport.send

    def counting(self: Any, peer: int, name: Any, payload: Any, *args: Any, **kwargs: Any) -> None:
        if name.kind is MessageKind.ACTIVATIONS:
            sent[smp.pp_rank(), peer] += payload.nbytes
        send(self, peer, name, payload, *args, **kwargs)

    StageTransport.send = counting
    results = {}
    for name in names:
        entry = ZOO[name]
        model = smp.DistributedModel(make_model(name))
        train_step = step_of(entry.body)
        sent.clear()
        train_step(model, *entry.make_batch(0))
        results[name] = dict(sent), model.partition_plan.traffic
    return results


def test_the_predicted_traffic_is_what_is_sent() -> None:
    names = ["llama", "gpt2_tied", "t5", "unet", "called_twice"]
    parameters = {"pipeline_parallel_degree": 2, "microbatches": 2, "timeout_seconds": 60}
    ranks = run_ranks(sent_activations, 2, names, parameters=parameters)
    for name in names:
        sent = {**ranks[0][name][0], **ranks[1][name][0]}
        assert (
            tuple((source, target, count / 2) for (source, target), count in sorted(sent.items()))
            == (ranks[0][name][1])
        ), name
