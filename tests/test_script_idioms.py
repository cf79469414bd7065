"""Idioms of scripts, each on plain torch and on the library, at many degrees; what differs is an error by name."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

import modelparallel as smp
from logs import logged_lines
from modelparallel.errors import UnsupportedError
from rank_tests import RankTests, on
from script_idioms import EQUAL
from side_door_programs import Layout
from side_door_runs import verdicts
from training import square_loss, step_of

PP2 = Layout(2, num_microbatches=2)
LAYOUTS = {
    "pp2": PP2,
    "pp3": Layout(3, num_microbatches=3, schedule="simple"),
    "dp2": Layout(1, copies=2, num_microbatches=2),
    "optimizer shards": Layout(1, copies=2, sharding="optimizer", num_microbatches=2),
    "sharded": Layout(1, copies=2, sharding="parameters", num_microbatches=2),
    "pp2, sharded": Layout(2, copies=2, sharding="parameters", num_microbatches=2),
    "pp2, optimizer shards": Layout(2, copies=2, sharding="optimizer", num_microbatches=2, schedule="zero_bubble"),
}
# One list of DTensors and plain tensors, since what is read between the modules of a pipeline stays whole.
TORCH_REFUSES = {("pp2, sharded", "clear: foreach")}
SHARDED = {"sharded_data_parallel_degree": 2, "sdp_param_persistence_threshold": 0, "microbatches": 2}
DP2, BY_VISIT, BY_STEP = (RankTests(2, options) for options in ({}, SHARDED, {**SHARDED, "sdp_gather": "step"}))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_idioms_are_as_in_one_process(layout):
    idioms = {name: text for name, text in EQUAL.items() if (layout, name) not in TORCH_REFUSES}
    found = dict(zip(idioms, verdicts(LAYOUTS[layout], list(idioms.values())), strict=True))
    wrong = {name: f"{verdict.kind} {verdict.text}" for name, verdict in found.items() if verdict.kind != "equal"}
    assert not wrong, "\n".join(f"{name}: {text}" for name, text in wrong.items())


@pytest.mark.slow
@on(DP2)
def test_what_one_copy_has_loaded_after_wrapping_counts_everywhere_or_nowhere():
    torch.manual_seed(0)
    model = smp.DistributedModel(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double())
    optimizer = smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    with torch.no_grad():
        model.get_module()[2].weight.fill_(1.0 + smp.rank())
    step = step_of(square_loss)
    with logged_lines() as lines:
        for index in range(2):
            optimizer.zero_grad()
            step(model, torch.randn(4, 3, dtype=torch.float64))
            optimizer.step()
            if index == 0 and smp.rank() == 0:
                assert any("'2.weight' first" in line and "dp_rank 0 are taken" in line for line in lines), lines
    found = [tensor.numpy() for tensor in model.state_dict().values()]
    for others in smp.allgather(found, smp.WORLD):
        for own, other in zip(found, others, strict=True):
            assert (own == other).all()


class Scaled(nn.Module):
    """Calls its layers with weights that it computes."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])

    def forward(self, x):
        for layer in self.layers:
            weights = {name: value * 1.5 for name, value in layer.named_parameters()}
            x = torch.tanh(functional_call(layer, weights, (x,)))
        return x


@pytest.mark.slow
@on(BY_VISIT, BY_STEP)
def test_other_weights_for_a_call_count_or_are_refused():
    torch.manual_seed(1)
    module = Scaled().double()
    expected = copy.deepcopy(module)
    model = smp.DistributedModel(module)
    step = step_of(square_loss)
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(smp.rank()))
    if smp.state.cfg.sdp_gather == "step":
        found = step(model, x).reduce_mean()
        torch.testing.assert_close(found, expected(x).square().mean().detach(), rtol=1e-9, atol=0)
    else:
        with pytest.raises(UnsupportedError, match=r"in place of its parameter 'layers\.0\.weight'.*sdp_gather: step"):
            step(model, x)
