"""What a plan tells: costs for simulations, traffic, the report; files of older versions. One process."""

import json
import math

import pytest
import torch
from torch import nn

from modelparallel.partitioning import find_units, make_plan, solve, trace_step
from modelparallel.partitioning.costs import Flow, Trace
from modelparallel.plan.partition import PartitionPlan, StageFigures, readable_bytes
from partition_models import chain, layers


class Skipping(nn.Module):
    """A value of the first layer is used by the last one too."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, x):
        early = self.first(x)
        return self.third(self.second(early) + early)


def traced(model, *inputs):
    return trace_step(model, find_units(model), lambda: model(*inputs).sum())


def test_costs_are_shares_of_the_forward_and_know_what_the_backward_needs():
    model = layers(3)
    model[0].requires_grad_(False)
    trace = traced(model, torch.zeros(4, 8))
    plan = make_plan(model, 2, trace=trace)
    costs = dict(plan.costs)
    assert list(costs) == ["0", "1", "2"]
    assert math.isclose(sum(costs.values()), 1)
    assert math.isclose(costs["0"], costs["1"])
    assert costs["2"] > costs["1"]  # with the loss
    backward = {name: (inputs, weights) for name, inputs, weights in plan.backward_costs}
    assert backward["0"] == (0, 0)
    assert backward["1"][0] == 0 < backward["1"][1]
    assert math.isclose(backward["2"][0], costs["2"])
    # The same model gives the same figures; the model without a trace gives none.
    assert make_plan(model, 2, trace=traced(model, torch.zeros(4, 8))).to_json() == plan.to_json()
    assert (make_plan(model, 2).costs, make_plan(model, 2).backward_costs) == ((), ())
    assert make_plan(model, 2).figures[0].compute_share is None


def test_traffic_goes_from_where_a_tensor_is_made_to_every_stage_that_uses_it():
    model = Skipping()
    trace = traced(model, torch.zeros(4, 8))
    hidden = 4 * 4 * 8
    plan = make_plan(model, 3, trace=trace)
    # The sum runs with the second layer, which holds the other addend: only it travels on.
    assert plan.traffic == ((0, 1, hidden), (1, 2, hidden))
    assert plan.bytes_over_cuts() == (hidden, hidden)
    by_hand = make_plan(model, 2, trace=trace, is_automatic=False, overrides=[(model.second, 1)])
    assert by_hand.traffic == ((0, 1, hidden), (1, 0, hidden))
    assert by_hand.bytes_over_cuts() == (2 * hidden,)
    homes = {"a": 0, "b": 2, "c": 2, "d": 1}
    spread = Trace((), (), flows=(Flow("a", ("b", "c", "d"), 10), Flow("d", ("a",), 5), Flow("b", ("c",), 7)))
    assert spread.traffic(homes) == ((0, 1, 10), (0, 2, 10), (1, 0, 5))
    assert PartitionPlan(3, (("a", 0), ("b", 1), ("c", 2)), traffic=spread.traffic(homes)).bytes_over_cuts() == (25, 10)


def test_predicted_traffic_is_what_the_units_hand_over():
    """A conv net with other sizes at every cut."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(50, 3))
    plan = make_plan(model, 3, trace=traced(model, torch.zeros(2, 1, 16, 16)))
    assert plan.traffic == ((0, 1, 4 * 2 * 4 * 7 * 7), (1, 2, 4 * 2 * 2 * 5 * 5))


def test_the_report_has_all_figures():
    plan = solve(chain([(4000, 2048, 1000, 512)] * 4), 2, 0.5, 8)
    lines = plan.report(predicted_bubble=0.125).splitlines()
    assert lines[0].split() == "stage parameters bytes FLOPs compute activations memory modules".split()
    assert lines[1].split("  ")[-1] == "u0, u1"
    cells = [cell.strip() for cell in lines[1].split("  ") if cell.strip()]
    assert cells == ["0", "2,000", "7.8 KiB", "2.0 k", "50.0%", "2 x 4.0 KiB", "15.8 KiB (57.2%)", "u0, u1"]
    assert "1 x 4.0 KiB" in lines[2]
    assert lines[3] == "balance: stage 0 has the most compute, 50.0%; beside it the stages idle 0.0% of their time"
    assert lines[4] == "traffic of a microbatch's forward: 0 -> 1 512 B; over the cuts: 0|1 512 B"
    assert lines[5] == "predicted bubble: 12.5% of the time of the stages"
    assert "predicted bubble" not in plan.report()
    uneven = solve(chain([(1, 0, 100, 0), (1, 0, 300, 0)]), 2, 0.5)
    assert "stage 1 has the most compute, 75.0%; beside it the stages idle 33.3% of their time" in uneven.report()


def test_the_report_of_several_pieces_and_of_plans_without_figures():
    plan = solve(chain([(400, 1024, 10, 8)] * 4), 2, 0.5, 8, virtual_degree=2)
    lines = plan.report().splitlines()
    assert lines[1].endswith("u0 | u2")
    assert "6.0 KiB (4+2 in flight)" in lines[1]
    assert "0 -> 1 16 B, 1 -> 0 8 B" in lines[-1]
    untraced = make_plan(layers(2), 2).report().splitlines()
    assert len(untraced) == 3  # nothing to say about balance and traffic
    assert untraced[1].split() == "0 72 288 B - - - 1.1 KiB (50.0%) 0".split()
    bare = PartitionPlan(2, (("a", 0), ("b", 1)))
    assert bare.report() == bare.table()
    assert [readable_bytes(count) for count in (0, 1023, 1536, 3 << 30)] == ["0 B", "1023 B", "1.5 KiB", "3.0 GiB"]


def test_everything_survives_a_file_and_files_of_older_versions_are_read():
    model = Skipping()
    plan = make_plan(model, 2, trace=traced(model, torch.zeros(2, 8)), virtual_degree=1, num_microbatches=4)
    again = PartitionPlan.from_json(plan.to_json())
    for name in ("figures", "costs", "backward_costs", "traffic", "virtual_degree", "origin"):
        assert getattr(again, name) == getattr(plan, name), name
    content = json.loads(plan.to_json())
    for key in ("costs", "backward_costs", "traffic", "virtual_degree"):
        del content[key]
    old_keys = ("num_parameters", "parameter_bytes", "memory_share", "compute_share")
    content["figures"] = [{key: figures[key] for key in old_keys} for figures in content["figures"]]
    old = PartitionPlan.from_json(json.dumps(content))
    assert old == plan
    assert (old.costs, old.traffic, old.virtual_degree) == ((), (), 1)
    assert old.figures[0] == StageFigures(*(getattr(plan.figures[0], key) for key in old_keys))
    assert old.table() == plan.table()
    assert old.report().startswith(old.table() + "\nbalance: ")
    assert "traffic" not in old.report()


@pytest.mark.parametrize("num_stages", [2, 3])
def test_memory_of_the_stages_adds_up(num_stages):
    model = layers(6)
    trace = traced(model, torch.zeros(4, 8))
    figures = make_plan(model, num_stages, trace=trace, num_microbatches=8).figures
    assert [stage.in_flight for stage in figures] == [(num_stages - stage,) for stage in range(num_stages)]
    for stage in figures:
        assert stage.state_bytes == 4 * stage.parameter_bytes
        assert stage.memory_bytes == stage.state_bytes + stage.in_flight[0] * stage.activation_bytes
    assert sum(stage.activation_bytes for stage in figures) == sum(unit.activation_bytes for unit in trace.units)
    assert sum(stage.flops for stage in figures) == 6 * 2 * 4 * 8 * 8
