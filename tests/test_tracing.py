"""Tracing a step body: what is counted for which unit, and that nothing is left behind. One process."""

import logging
import pickle
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from modelparallel.partitioning import find_units, make_plan, trace_step
from modelparallel.partitioning.costs import ACCUMULATION_PASSES, OPERATIONS_PER_BYTE, Flow
from modelparallel.partitioning.operations import Traffic
from partition_models import Block, Decoder, Eventful, layers


def test_flops_and_activations_equal_hand_counts():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Conv1d(1, 3, 3), nn.Flatten(), nn.Linear(18, 2))

    def run():
        hidden = model[1](model[0](torch.zeros(5, 4)))
        return model[4](model[3](model[2](hidden.unsqueeze(1)))).sum()

    trace = trace_step(model, find_units(model), run)
    first, conv, last = trace.units
    assert (first.name, first.first_call, first.num_calls) == ("0", 0, 1)
    assert first.flops == 2 * 5 * 4 * 8
    assert conv.flops == 2 * 5 * 6 * (1 * 3 * 3)
    assert last.flops == 2 * 5 * 18 * 2
    assert first.parameter_bytes == first.trainable_bytes == 4 * (4 * 8 + 8)
    # Saved: the input and, in the glue that follows, the output of the ReLU, which the convolution saves again.
    assert first.activation_bytes == 4 * (5 * 4 + 5 * 8)
    assert conv.activation_bytes == 0
    assert last.activation_bytes == 4 * 5 * 18
    assert (first.output_bytes, conv.output_bytes, last.output_bytes) == (4 * 5 * 8, 4 * 5 * 3 * 6, 4 * 5 * 2)
    assert (first.needs_weight_gradient, first.needs_input_gradient) == (True, False)
    # The ReLU runs next to the first layer: it reads and writes 5 * 8 numbers. Looking at them otherwise moves nothing.
    assert [unit.moved_bytes for unit in trace.units] == [4 * 2 * 5 * 8, 0, 4 * (5 * 2 + 1)]
    summing = lambda unit: OPERATIONS_PER_BYTE * ACCUMULATION_PASSES * unit.trainable_bytes  # noqa: E731
    assert conv.forward == conv.input_gradient == conv.flops
    assert conv.weight_gradient == conv.flops + summing(conv)
    assert first.forward == first.flops + OPERATIONS_PER_BYTE * first.moved_bytes
    assert (first.input_gradient, first.weight_gradient) == (0, first.forward + summing(first))
    assert last.forward == last.input_gradient == last.flops + OPERATIONS_PER_BYTE * last.moved_bytes
    assert last.weight_gradient == last.flops + summing(last)
    assert last.compute == last.forward + last.input_gradient + last.weight_gradient
    assert trace.flows == (Flow("0", ("2",), 4 * 5 * 8), Flow("2", ("4",), 4 * 5 * 18))


def test_a_microbatch_counts_as_itself_not_as_the_batch_it_is_a_view_of():
    model = layers(1)
    batch = torch.zeros(64, 8)
    (unit,) = trace_step(model, ("0",), lambda: model(batch[:4])).units
    assert unit.activation_bytes == 4 * 4 * 8


def test_attention_and_recurrence_are_counted():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    rows = 2 * 3
    expected = 2 * rows * 8 * (24 + 8 + 32) + 2 * 2 * 2 * 3 * 3 * (4 + 4)
    x = torch.randn(2, 3, 8)
    for is_training in (True, False):
        encoder.train(is_training)
        assert trace_step(encoder, ("",), lambda: encoder(x)).units[0].flops == expected
    with torch.inference_mode():
        assert trace_step(encoder, ("",), lambda: encoder(x)).units[0].flops == expected
    lstm = nn.LSTM(8, 4)
    assert trace_step(lstm, ("",), lambda: lstm(x)).units[0].flops == 2 * rows * (16 * 8 + 16 * 4)


def test_order_calls_and_glue_belong_to_the_right_units():
    model = Decoder()
    ids = torch.zeros(2, 5, dtype=torch.long)
    model.table.weight.grad = None
    trace = trace_step(model, find_units(model), lambda: model(ids).sum())
    assert trace.order == ("table", "blocks.0.0", "blocks.1.0", "blocks.2.0", "norm")
    costs = {unit.name: unit for unit in trace.units}
    assert costs["unused"].first_call is None
    # The product with the table's weight in glue runs at the table's home.
    assert costs["table"].flops == 2 * 2 * 5 * 4 * 11
    assert costs["norm"].flops == 0
    near = {tensor.name: tensor.near_unit for tensor in trace.tensors}
    assert near == {"positions": "table", "scale": "table"}
    assert trace.stateful_buffers == ()
    # Residuals cross too: between two blocks travels the running sum, and `norm`'s output goes back to the table.
    hidden = 4 * 2 * 5 * 4
    position = {name: index for index, name in enumerate(trace.order)}
    assert trace.crossing_bytes(position, 5) == [hidden * 2] * 4 + [0]
    assert pickle.loads(pickle.dumps(trace)) == trace


def test_the_loss_counts_for_the_unit_whose_output_it_reads():
    """Also over a large vocabulary, where it moves many bytes, and with a tied table, whose home is another."""
    table, body, head = nn.Embedding(500, 8), nn.Linear(8, 8), nn.Linear(8, 500, bias=False)
    model = nn.ModuleDict({"table": table, "body": body, "head": head})
    ids = torch.zeros(2, 5, dtype=torch.long)

    def run():
        logits = head(body(table(ids)))
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten())

    logits = 4 * 2 * 5 * 500
    costs = {unit.name: unit for unit in trace_step(model, find_units(model), run).units}
    # log_softmax reads and writes them, the choice of the targets reads them once more.
    assert 3 * logits <= costs["head"].moved_bytes < 3.1 * logits
    assert costs["table"].moved_bytes == 2 * 4 * 2 * 5 * 8
    assert costs["head"].forward > 3 * costs["body"].forward
    # The gradient of the table is as large as the table.
    assert costs["table"].weight_gradient > 4 * costs["table"].parameter_bytes
    head.weight = table.weight
    costs = {unit.name: unit for unit in trace_step(model, find_units(model), run).units}
    assert costs["table"].moved_bytes + costs["head"].moved_bytes > 3 * logits
    assert costs["body"].moved_bytes == 0
    figures = make_plan(model, 2, trace=trace_step(model, find_units(model), run), memory_weight=0.0).figures
    assert figures[0].compute_share > 0.8


def test_a_module_called_twice_counts_twice_and_inner_calls_count_for_their_unit():
    block = Block()
    model = nn.ModuleDict({"blocks": nn.ModuleList([block, Block()]), "head": nn.Linear(4, 4)})
    x = torch.zeros(2, 4)

    def run():
        hidden = model["blocks"][1].mlp(model["head"](model["head"](x)))
        return block.mlp(hidden)

    trace = trace_step(model, find_units(model), run)
    assert trace.order == ("head", "blocks.1", "blocks.0")
    costs = {unit.name: unit for unit in trace.units}
    assert (costs["head"].num_calls, costs["head"].flops) == (2, 2 * 2 * 2 * 4 * 4)
    assert (costs["blocks.0"].num_calls, costs["blocks.0"].flops) == (1, 2 * 2 * (4 * 8 + 8 * 4))


def test_frozen_weights_need_no_gradient_and_no_state():
    model = layers(2)
    model[0].requires_grad_(False)
    first, second = trace_step(model, ("0", "1"), lambda: model(torch.zeros(3, 8))).units
    assert first.compute == first.forward
    assert first.state_bytes == first.parameter_bytes
    assert second.compute == second.forward + second.weight_gradient
    assert (second.input_gradient, second.weight_gradient > second.forward) == (0, True)
    assert second.state_bytes == 4 * second.parameter_bytes


@pytest.mark.parametrize("is_failing", [False, True])
def test_tracing_leaves_no_mark(is_failing):
    import numpy

    torch.manual_seed(3)
    model = Eventful()
    model.norm.eval()
    model.layer.weight.grad = torch.ones(4, 4)
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    gradient = model.layer.weight.grad
    modes = {name: module.training for name, module in model.named_modules()}
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()

    def run():
        loss = model(torch.randn(5, 4) + numpy.random.rand())
        loss.backward()
        model.eval()
        if is_failing:
            raise ValueError("a body may fail")

    if is_failing:
        with pytest.raises(ValueError, match="a body may fail"):
            trace_step(model, find_units(model), run)
    else:
        trace = trace_step(model, find_units(model), run)
        assert trace.stateful_buffers == ("count", "replaced", "grown")
        assert {tensor.name for tensor in trace.tensors} == {"count", "replaced", "grown"}
    assert {name: buffer for name, (buffer, _) in before.items()}.keys() == dict(model.named_buffers()).keys()
    for name, buffer in model.named_buffers():
        assert buffer is before[name][0], name
        assert torch.equal(torch.nan_to_num(buffer), torch.nan_to_num(before[name][1])), name
    assert model.layer.weight.grad is gradient
    assert torch.equal(gradient, torch.ones(4, 4))
    assert model.layer.bias.grad is None
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert numpy.random.get_state()[1].tolist() == states[2]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.is_grad_enabled()


def test_running_statistics_change_and_come_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False))
    trace = trace_step(model, find_units(model), lambda: model(torch.randn(5, 4)).sum())
    assert trace.stateful_buffers == ("1.running_mean", "1.running_var", "1.num_batches_tracked")
    assert trace.tensors == ()  # they live in a unit
    assert int(model[1].num_batches_tracked) == 0
    assert torch.equal(model[1].running_mean, torch.zeros(4))


def test_a_parameter_changed_by_the_body_is_reported(caplog):
    model = layers(1)

    def run():
        with torch.no_grad():
            model[0].weight.mul_(2)

    with caplog.at_level(logging.WARNING, "modelparallel.partitioning"):
        trace_step(model, ("0",), run)
    assert "changes the parameter '0.weight' in place" in caplog.text


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bodies_with_vmap_and_functional_gradients_are_traced():
    model = layers(2, 4)
    rows = torch.ones(3, 4)
    trace = trace_step(
        model, ("0", "1"), lambda: torch.vmap(lambda row: torch.vmap(torch.sin)(row))(rows) + model(rows)
    )
    assert trace.has_gradients
    trace = trace_step(model, ("0", "1"), lambda: torch.func.grad(lambda x: model(x).sum())(rows))
    assert sum(unit.flops for unit in trace.units) == 4 * 2 * 3 * 4 * 4  # two layers, forward and backward
    assert not trace.has_gradients
    assert len(make_plan(model, 2, trace=trace).modules) == 2
    assert not model[0]._forward_hooks


def test_times_are_measured_in_a_second_run():
    model = layers(2)
    runs = []
    trace = trace_step(model, ("0", "1"), lambda: runs.append(model(torch.zeros(2, 8))), measure_times=True)
    assert len(runs) == 2
    assert all(unit.seconds is not None and 0 < unit.seconds < 1 for unit in trace.units)

    def slow_glue():
        torch.zeros(2000, 2000).add_(model(torch.zeros(2, 8)).sum()).exp()

    (first, last) = trace_step(model, ("0", "1"), slow_glue, measure_times=True).units
    assert last.seconds > 5 * first.seconds
    assert (last.forward, last.compute) == (last.seconds, 3 * last.seconds)
    assert trace.units[0].compute == 2 * trace.units[0].seconds
    assert trace.units[0].num_calls == 1


def test_traffic_counts_what_lives_across_a_cut():
    traffic = Traffic()
    tensor = torch.zeros(10)
    assert not traffic.used(tensor, 1)  # made from the inputs alone: every stage has it
    traffic.made(tensor, 1)
    assert traffic.used(tensor, 3)
    assert traffic.used(tensor.view(5, 2), 2)  # already there on its way
    traffic.used(tensor, 0)  # back
    assert traffic.flows() == {(1, 3, 2, 0): 40}
    other, small = torch.zeros(100), torch.zeros(1)
    traffic.made(other, 5)
    traffic.made(small, 6)
    assert traffic.cheapest_place([tensor, small]) == 3
    assert traffic.cheapest_place([tensor, other, small]) == 5
    assert traffic.cheapest_place([small, torch.zeros(1)]) == 6
    assert traffic.cheapest_place([torch.zeros(1)]) is None
