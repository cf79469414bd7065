"""Whether each rank is fed the right data: said once in the first steps, and the sampler that gives it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

import modelparallel as smp
from logs import logged_lines
from modelparallel.errors import SMPConfigError
from modelparallel.training import runtime
from modelparallel.training.data_of_ranks import InputChecks
from rank_tests import RankTests, on

PP2 = RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 2})
DP2 = RankTests(2, {"microbatches": 2})
TP2 = RankTests(2, {"tensor_parallel_degree": 2, "microbatches": 2})
PRESCALED = RankTests(2, {"tensor_parallel_degree": 2, "microbatches": 2, "prescaled_batch": True})
PP2_DP2 = RankTests(4, {"pipeline_parallel_degree": 2, "microbatches": 2})


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    """The lines about inputs; in the first steps of a process, once more."""
    runtime.current().input_checks = InputChecks()
    with logged_lines() as lines:
        yield lines
    lines[:] = [line for line in lines if "DistributedSampler" in line]


def make_step():
    model = smp.DistributedModel(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))

    @smp.step
    def step(model, x):
        loss = model(x).pow(2).mean()
        model.backward(loss)
        return loss

    return lambda x: step(model, x)


def samples(seed: int) -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))


@on(PP2, PP2_DP2)
def test_stages_that_are_fed_other_data_say_so_once():
    step = make_step()
    with listening() as lines:
        for index in range(3):
            step(samples(10 * smp.rank() + index))
    assert len(lines) == (smp.pp_rank() > 0)
    if lines:
        assert "argument 'x' of pp_rank 1" in lines[0]
        assert "num_replicas=smp.dp_size(), rank=smp.dp_rank()" in lines[0]


@on(PP2)
def test_placeholders_and_equal_data_are_fine():
    step = make_step()
    own = [samples(0), None, torch.empty(4, 0), torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.long)]
    for placeholder in own:
        with listening() as lines:
            step(samples(0) if smp.pp_rank() == 0 else placeholder)
        assert not lines


@on(DP2, TP2, PP2_DP2)
def test_copies_that_are_fed_equal_data_are_told_the_words():
    step = make_step()
    with listening() as lines:
        for index in range(3):
            step(samples(index))
    assert len(lines) == (smp.rank() == 0)
    if lines:
        assert "ranks 0, 1 were fed equal batches" in lines[0]
        assert "num_replicas=smp.dp_size(), rank=smp.dp_rank()" in lines[0]
    with listening() as lines:
        for index in range(3):
            step(samples(10 * smp.dp_rank() + index))
    assert not lines


@on(PRESCALED)
def test_prescaled_ranks_must_be_fed_alike():
    step = make_step()
    with listening() as lines:
        step(samples(0))
    assert not lines
    with listening() as lines:
        step(samples(smp.tp_rank()))
    assert len(lines) == (smp.rank() == 0)
    if lines:
        assert "must feed the same" in lines[0]
        assert "num_replicas=smp.rdp_size(), rank=smp.rdp_rank()" in lines[0]


@on(DP2)
def test_only_the_first_steps_are_compared():
    step = make_step()
    with listening() as lines:
        for index in range(3):
            step(samples(10 * smp.dp_rank() + index))
        step(samples(99))
    assert not lines


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


@on(PP2_DP2, PRESCALED)
def test_the_sampler_is_of_this_rank():
    data = TensorDataset(torch.arange(8))
    found = list(smp.data_sampler(data, shuffle=False))
    rank, size = (smp.rdp_rank(), smp.rdp_size()) if smp.tp_size() > 1 else (smp.dp_rank(), smp.dp_size())
    assert found == list(range(8))[rank::size]
    assert sorted(smp.data_sampler(data, seed=3)) == sorted(smp.data_sampler(data, seed=3))
    with pytest.raises(SMPConfigError, match="no length"):
        smp.data_sampler(Stream())
    with pytest.raises(SMPConfigError, match="rank follows from"):
        smp.data_sampler(data, rank=0)
