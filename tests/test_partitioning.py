"""The partitioner: units, split, placement by hand, plan. One process; plans are data."""

import logging
import math
import pickle

import pytest
import torch
from torch import nn

from modelparallel.errors import PartitionError
from modelparallel.job.registry import partition_context, partition_mark
from modelparallel.partitioning import find_units, log_plan, make_plan, sizes_only, solve, trace_step
from modelparallel.partitioning.costs import TensorCosts, Trace
from modelparallel.partitioning.units import direct_tensors
from modelparallel.plan.partition import PartitionPlan
from partition_models import Attention, Block, Decoder, Eventful, Projections, chain, hugging_face_model, layers

# Units


def test_units_of_the_seed_network_and_of_plain_layers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 4, 3)
            self.drop = nn.Dropout()
            self.fc1, self.fc2 = nn.Linear(4, 3), nn.Linear(3, 2)

    assert find_units(Net()) == ("conv1", "conv2", "fc1", "fc2")
    assert find_units(nn.Linear(2, 2)) == ("",)
    assert find_units(nn.ReLU()) == ()
    assert find_units(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))) == ("0", "1.1")


def test_a_norm_without_weights_is_a_unit_only_if_it_keeps_statistics():
    model = nn.Sequential(
        nn.BatchNorm1d(3, affine=False),
        nn.BatchNorm1d(3, affine=False, track_running_stats=False),
        nn.LayerNorm(3, elementwise_affine=False),
        nn.InstanceNorm1d(3, track_running_stats=True),
    )
    assert find_units(model) == ("0", "3")


def test_blocks_are_units_and_keep_their_inner_lists():
    model = nn.ModuleDict({"blocks": nn.ModuleList(Block() for _ in range(3)), "single": Block()})
    # An attribute-like block is no list element of its like: its layers are placed one by one.
    assert find_units(model["blocks"]) == ("0", "1", "2")
    assert find_units(nn.Sequential(Block(), nn.Linear(4, 4)))[-1] == "1"
    stages = nn.ModuleList(nn.ModuleDict({"blocks": nn.ModuleList([Attention(1), Attention(1)])}) for _ in range(2))
    assert find_units(stages) == ("0.blocks.0", "0.blocks.1", "1.blocks.0", "1.blocks.1")


def test_blocks_that_are_attributes_are_units_if_there_are_three_of_a_class():
    class Net(nn.Module):
        def __init__(self, num_levels):
            super().__init__()
            self.stem = Projections()
            for level in range(num_levels):
                self.add_module(f"down{level}", Block())

    assert find_units(Net(3)) == ("stem.key", "stem.query", "down0", "down1", "down2")
    # Two may be the towers of a model, each half of it.
    inside = ("attention.heads.0", "attention.heads.1", "attention.proj", "mlp.0", "mlp.2")
    expected = [f"down{level}.{name}" for level in range(2) for name in inside]
    assert find_units(Net(2)) == ("stem.key", "stem.query", *expected)
    # Stacks stay stacks: each of these has blocks of its own.
    stack = lambda: nn.ModuleDict({"layers": nn.ModuleList(Projections() for _ in range(2))})  # noqa: E731
    model = nn.Module()
    for name in ("encoder", "decoder", "reviser"):
        model.add_module(name, nn.Sequential(stack(), nn.ReLU()))
    assert find_units(model)[:2] == ("encoder.0.layers.0", "encoder.0.layers.1")


def test_a_single_giant_block_is_opened_where_there_are_few_units():
    class Giant(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.mlp = nn.MultiheadAttention(4, 2), nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))

    model = nn.Sequential(nn.Embedding(5, 4), nn.ModuleList([Giant()]), nn.Linear(4, 5))
    assert find_units(model) == ("0", "1.0.attention", "1.0.mlp.0", "1.0.mlp.1", "2")
    assert make_plan(model, 4).num_stages == 4
    model = nn.Sequential(nn.Embedding(5, 4), nn.ModuleList([Giant(), Giant()]), nn.Linear(4, 5))
    assert find_units(model) == ("0", "1.0", "1.1", "2")
    model = nn.Sequential(*layers(7), nn.ModuleList([Giant()]))
    assert find_units(model)[-1] == "7.0"


def test_torch_modules_with_inner_weights_stay_whole():
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(4, 2),
            "rnn": nn.LSTM(4, 4, 2),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            "encoder": nn.TransformerEncoder(
                nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2, enable_nested_tensor=False
            ),
        }
    )
    assert find_units(model) == ("attention", "rnn", "normed", "encoder.layers.0", "encoder.layers.1")


def test_a_distributed_layer_is_one_unit():
    class Distributed(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.dense = nn.Linear(2, 2), nn.Linear(2, 2)

        def split_tensors(self):
            return {}

    assert find_units(nn.ModuleDict({"layer": Distributed(), "head": nn.Linear(2, 2)})) == ("layer", "head")


def test_a_shared_module_is_one_unit_under_its_first_name():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": shared, "second": nn.ModuleList([shared, nn.Linear(4, 4)])})
    assert find_units(model) == ("first", "second.1")
    # A block that holds a unit met before is no unit itself: units do not nest.
    block = Block()
    model = nn.ModuleDict({"proj": block.attention.proj, "blocks": nn.ModuleList([block])})
    units = find_units(model)
    assert units[0] == "proj"
    assert "blocks.0" not in units
    assert not [unit for unit in units if unit.endswith("attention.proj")]


def test_blocks_that_share_an_activation_are_units():
    class Activated(nn.Module):
        def __init__(self, activation):
            super().__init__()
            self.inner, self.activation, self.outer = nn.Linear(4, 8), activation, nn.Linear(8, 4)

        def forward(self, x):
            return self.outer(self.activation(self.inner(x)))

    activation = nn.ReLU()
    model = nn.ModuleDict({"blocks": nn.ModuleList(Activated(activation) for _ in range(3))})
    units = find_units(model)
    assert units == ("blocks.0", "blocks.1", "blocks.2")
    trace = trace_step(model, units, lambda: nn.Sequential(*model["blocks"])(torch.ones(2, 4)).sum())
    assert trace.order == units
    assert [unit.num_calls for unit in trace.units] == [1, 1, 1]


def test_tensors_above_the_units_are_listed_once():
    model = Decoder()
    units = find_units(model)
    assert units == ("table", "blocks.0.0", "blocks.1.0", "blocks.2.0", "norm", "unused")
    assert [(direct.name, direct.is_parameter) for direct in direct_tensors(model, units)] == [
        ("positions", True),
        ("scale", True),
        ("mask", False),
    ]
    lists = nn.ModuleDict({"layer": nn.Linear(2, 2), "gains": nn.ParameterList([nn.Parameter(torch.ones(2))])})
    assert find_units(lists) == ("layer",)
    assert [direct.name for direct in direct_tensors(lists, ("layer",))] == ["gains.0"]


HUGGING_FACE_UNITS = {
    "LlamaForCausalLM": "model.embed_tokens model.layers.0 model.layers.1 model.norm lm_head",
    "BertForPreTraining": "bert.embeddings.word_embeddings bert.embeddings.position_embeddings "
    "bert.embeddings.token_type_embeddings bert.embeddings.LayerNorm bert.encoder.layer.0 bert.encoder.layer.1 "
    "bert.pooler.dense cls.predictions.transform.dense cls.predictions.transform.LayerNorm cls.predictions.decoder "
    "cls.seq_relationship",
    "GPT2LMHeadModel": "transformer.wte transformer.wpe transformer.h.0 transformer.h.1 transformer.ln_f lm_head",
    "T5ForConditionalGeneration": "shared encoder.embed_tokens encoder.block.0 encoder.block.1 "
    "encoder.final_layer_norm decoder.embed_tokens decoder.block.0 decoder.block.1 decoder.final_layer_norm lm_head",
    "ViTForImageClassification": "vit.embeddings.patch_embeddings.projection vit.layers.0 vit.layers.1 "
    "vit.layernorm classifier",
    "MixtralForCausalLM": "model.embed_tokens model.layers.0 model.layers.1 model.norm lm_head",
    "ConvNextForImageClassification": "convnext.embeddings.patch_embeddings convnext.embeddings.layernorm "
    "convnext.encoder.stages.0.layers.0 convnext.encoder.stages.0.layers.1 "
    "convnext.encoder.stages.1.downsampling_layer.0 convnext.encoder.stages.1.downsampling_layer.1 "
    "convnext.encoder.stages.1.layers.0 convnext.encoder.stages.1.layers.1 convnext.layernorm classifier",
    "SwinForImageClassification": "swin.embeddings.patch_embeddings.projection swin.embeddings.norm "
    "swin.encoder.layers.0.blocks.0 swin.encoder.layers.0.blocks.1 swin.encoder.layers.0.downsample.reduction "
    "swin.encoder.layers.0.downsample.norm swin.encoder.layers.1.blocks.0 swin.encoder.layers.1.blocks.1 "
    "swin.layernorm classifier",
}


@pytest.mark.parametrize("name", HUGGING_FACE_UNITS)
def test_units_of_hugging_face_models(name):
    model = hugging_face_model(name)
    units = find_units(model)
    assert " ".join(units) == HUGGING_FACE_UNITS[name]
    plan = make_plan(model, 2)  # checks that every parameter has one home
    assert {stage for _, stage in plan.modules} == {0, 1}


# Split


@pytest.mark.parametrize("num_layers", [2, 3, 8, 13, 24])
@pytest.mark.parametrize("num_rows", [1, 512])
def test_c054_equal_layers_are_split_in_half_and_the_plan_is_logged(num_layers, num_rows, caplog):
    model = layers(num_layers)
    run = lambda: model(torch.zeros(num_rows, 8))  # noqa: E731
    for trace in (trace_step(model, find_units(model), run), None):
        plan = make_plan(model, 2, trace=trace, memory_weight=1.0, num_microbatches=4)
        assert abs(len(plan.modules_on(0)) - num_layers / 2) <= 1
        assert len(plan.modules_on(0)) + len(plan.modules_on(1)) == num_layers
    with caplog.at_level(logging.INFO, "modelparallel.partitioning"):
        log_plan(plan)
    lines = caplog.messages[-1].splitlines()
    assert lines[0].startswith("Partition assignments:")
    assert lines[1].split() == "stage parameters bytes FLOPs compute activations memory modules".split()
    assert [line.split()[0] for line in lines[2:4]] == ["0", "1"]


def test_a_big_vocabulary_head_leaves_its_stage_fewer_layers():
    model = nn.Sequential(*layers(12, 16), nn.Linear(16, 200))
    trace = trace_step(model, find_units(model), lambda: model(torch.zeros(8, 16)).sum())
    for weight in (0.0, 0.2, 0.8):
        plan = make_plan(model, 2, trace=trace, memory_weight=weight)
        assert len(plan.modules_on(1)) < len(plan.modules_on(0)), weight
    figures = plan.figures
    assert sum(stage.num_parameters for stage in figures) == sum(p.numel() for p in model.parameters())
    assert math.isclose(sum(stage.compute_share for stage in figures), 1)
    assert max(stage.memory_share for stage in figures) < 0.6


def test_compute_only_without_a_trace_falls_back_to_sizes():
    assert [stage for _, stage in make_plan(layers(6), 3, memory_weight=0.0).modules] == [0, 0, 1, 1, 2, 2]


def test_tied_and_uncalled_modules_and_tensors_above_units_have_a_home():
    model = Decoder(num_blocks=6)
    model.head = nn.Linear(4, 11, bias=False)
    model.head.weight = model.table.weight
    ids = torch.zeros(2, 5, dtype=torch.long)
    trace = trace_step(model, find_units(model), lambda: model.head(model(ids)[..., :4]).sum())
    assert trace.ties == (("table", "head"),)
    plan = make_plan(model, 3, trace=trace, memory_weight=0.2)
    assert plan.origin == "traced"
    # With the first of the two or with the last, whichever is more even; what follows the table goes with it.
    assert plan.home_of_module("head") == plan.home_of_module("table")
    assert plan.home_of_module("table") in (0, 2)
    assert plan.home_of_tensor("positions") == plan.home_of_module("table")
    assert plan.home_of_module("unused") == plan.home_of_module("norm") == 2
    assert plan.home_of_tensor("mask") is None
    assert plan.home_of_tensor("blocks.3.0.weight") == plan.home_of_module("blocks.3.0")
    stages = [stage for name, stage in plan.modules if name.startswith("blocks")]
    assert stages == sorted(stages)
    assert sizes_only(model, find_units(model)).ties == trace.ties


def test_ties_that_meet_form_one_group_and_may_lie_above_the_units():
    a, b, c, d = (nn.Linear(4, 4) for _ in range(4))
    b.weight, b.bias = a.weight, c.bias
    model = nn.ModuleDict({"a": a, "b": b, "c": c, "d": d, "e": nn.Linear(4, 4)})
    model.register_parameter("own", d.bias)
    trace = sizes_only(model, find_units(model))
    assert sorted(sorted(group) for group in trace.ties) == [["a", "b", "c"], ["d", "own"]]
    plan = make_plan(model, 3)
    assert len({plan.home_of_module(name) for name in "abc"}) == 1
    assert plan.home_of_tensor("own") == plan.home_of_tensor("d.bias")
    assert {stage for _, stage in plan.modules} == {0, 1, 2}
    total = sum(figures.num_parameters for figures in plan.figures)
    assert total == sum(parameter.numel() for parameter in model.parameters())


def test_fewer_pieces_than_stages_is_an_error_with_both_numbers():
    with pytest.raises(PartitionError, match=r"2 pieces .* pipeline_parallel_degree is 3"):
        make_plan(layers(2), 3)
    model = layers(3)
    model[2].weight = model[0].weight
    with pytest.raises(PartitionError, match=r"share parameters count as one piece: '0'\+'2'"):
        make_plan(model, 3)
    with pytest.raises(PartitionError, match="the model has 0 pieces"):
        make_plan(nn.ReLU(), 2)
    assert make_plan(layers(3), 3).modules == (("0", 0), ("1", 1), ("2", 2))


def test_a_tensor_without_any_module_next_to_it_is_an_error():
    trace = Trace((), (TensorCosts("weight", 1, 4, 4, 0),))
    with pytest.raises(PartitionError, match="'weight' cannot be placed"):
        solve(trace, 1, 0.5)


def test_many_units_are_split_quickly():
    trace = chain([(100 + i % 7, 10, 100 + i % 5, 1) for i in range(320)])
    plan = solve(trace, 16, 0.5, 8)
    sizes = [len(plan.modules_on(stage)) for stage in range(16)]
    assert min(sizes) >= 19
    assert max(sizes) <= 21


# By hand


class Marked(nn.Module):
    def __init__(self):
        super().__init__()
        with partition_context(1):
            self.before = nn.Linear(2, 2)
            with partition_context(2):
                self.inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
            self.after = nn.Linear(2, 2)
        self.outside = nn.Linear(2, 2)


def by_hand(model, num_stages=3, **arguments):
    return make_plan(model, num_stages, is_automatic=False, marks=partition_mark, **arguments)


def test_c051_the_innermost_context_decides_the_stage():
    plan = by_hand(Marked(), default_partition=0)
    assert dict(plan.modules) == {"before": 1, "inner.0": 2, "after": 1, "outside": 0}
    assert plan.origin == "manual"
    assert by_hand(Marked(), default_partition=2).home_of_module("outside") == 2
    assert plan.figures[2].num_parameters == 6


def test_c052_a_partition_outside_the_pipeline_is_an_error_and_auto_ignores_contexts():
    with pytest.raises(PartitionError, match=r"smp.partition\(2\).*'inner.*pipeline_parallel_degree=2.*use 0 to 1"):
        by_hand(Marked(), 2)
    with pytest.raises(PartitionError, match=r"default_partition=3: partition 3 does not exist"):
        by_hand(layers(3), 3, default_partition=3)
    assert make_plan(Marked(), 2, marks=partition_mark).modules == make_plan(Marked(), 2).modules


def test_c055_set_partition_moves_a_subtree():
    model = Marked()
    plan = by_hand(model, overrides=[(model.inner, 0)])
    assert plan.home_of_module("inner.0") == 0
    plan = by_hand(model, overrides=[(model.inner[0], 1), (model, 2), (model.after, 0)])
    assert dict(plan.modules) == {"before": 2, "inner.0": 2, "after": 0, "outside": 2}
    with pytest.raises(PartitionError, match=r"smp.set_partition\('after', 5\).*0 to 2"):
        by_hand(model, overrides=[(model.after, 5)])
    with pytest.raises(PartitionError, match="not part of the model"):
        by_hand(model, overrides=[(nn.Linear(2, 2), 1)])


def test_a_mark_finer_than_a_unit_splits_it():
    model = nn.ModuleList([Block(), Block()])
    model[1].register_parameter("gain", nn.Parameter(torch.ones(1)))
    plan = by_hand(model, 2, overrides=[(model[1], 1), (model[1].attention.heads[0], 0)])
    assert dict(plan.modules) == {
        "0": 0,
        "1.attention.heads.0": 0,
        "1.attention.heads.1": 1,
        "1.attention.proj": 1,
        "1.mlp": 1,
    }
    assert plan.tensors == (("1.gain", 1),)
    assert plan.home_of_module("1") is None
    attention = nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(4, 4))
    with pytest.raises(PartitionError, match=r"'0' \(MultiheadAttention\) cannot be split"):
        by_hand(attention, 2, overrides=[(attention[0].out_proj, 1)])


def test_modules_that_share_a_parameter_must_be_on_one_partition():
    model = layers(3)
    model[2].weight = model[0].weight
    with pytest.raises(PartitionError, match=r"'0' \(partition 0\) and '2' \(partition 1\) share .*'0.weight'"):
        by_hand(model, 2, overrides=[(model[2], 1)])
    assert by_hand(model, 2, overrides=[(model[1], 1)]).home_of_module("2") == 0


def test_manual_order_and_changing_buffers_follow_the_trace():
    model = Eventful()
    model.moved_block = nn.Linear(4, 4)
    trace = trace_step(model, find_units(model), lambda: model(model.moved_block(torch.randn(3, 4))))
    plan = by_hand(model, 2, trace=trace, overrides=[(model, 1), (model.layer, 0)])
    assert plan.modules == (("moved_block", 1), ("layer", 0), ("norm", 1))
    assert plan.tensors == (("count", 1), ("replaced", 1), ("grown", 1))
    assert plan.figures[0].compute_share is not None


# Plan


def test_a_plan_answers_who_lives_where():
    plan = PartitionPlan(2, (("stem", 0), ("blocks.1", 1), ("blocks.10", 0)), (("scale", 1), ("blocks.mask", 0)))
    assert plan.unit_of("blocks.1.attention.query") == "blocks.1"
    assert plan.home_of_module("blocks.10") == 0
    assert plan.home_of_module("blocks") is None
    assert plan.home_of_module("") is None
    assert plan.home_of_tensor("blocks.1.attention.query.weight") == 1
    assert plan.home_of_tensor("blocks.mask") == 0
    assert plan.home_of_tensor("other") is None
    whole = PartitionPlan(1, (("", 0),))
    assert whole.home_of_module("any.thing") == whole.home_of_tensor("weight") == 0


def test_a_plan_survives_json_files_and_pickles(tmp_path):
    model = Decoder()
    plan = make_plan(model, 3, memory_weight=0.8)
    again = PartitionPlan.from_json(plan.to_json())
    assert again == plan
    assert (again.figures, again.origin, again.to_json()) == (plan.figures, plan.origin, plan.to_json())
    assert hash(again) == hash(plan)
    assert pickle.loads(pickle.dumps(plan)) == plan
    path = tmp_path / "made" / "plan.json"
    plan.save(path)
    loaded = make_plan(model, 3, load_from=path)
    assert loaded == plan
    assert loaded.origin == "loaded"


def test_c092_a_stored_plan_is_used_whatever_the_weights_say(tmp_path):
    model = nn.Sequential(*layers(6, 16), nn.Linear(16, 400))
    path = tmp_path / "plan.json"
    trace = trace_step(model, find_units(model), lambda: model(torch.zeros(2, 16)))
    stored = PartitionPlan(2, tuple((name, int(name > "4")) for name in find_units(model)))
    stored.save(path)
    for weight in (0.0, 1.0):
        assert make_plan(model, 2, trace=trace, memory_weight=weight) != stored
        assert make_plan(model, 2, trace=trace, memory_weight=weight, load_from=path) == stored


def test_a_stored_plan_that_does_not_fit_names_the_differences(tmp_path):
    path = tmp_path / "plan.json"
    make_plan(nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}), 2).save(path)
    other = nn.ModuleDict({"a": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    with pytest.raises(
        PartitionError, match=r"no stage for parameters 'c.weight', 'c.bias'; the model has no module 'b'"
    ):
        make_plan(other, 2, load_from=path)
    with pytest.raises(PartitionError, match=r"is for 2 stages, but pipeline_parallel_degree is 4"):
        make_plan(other, 4, load_from=path)
    with pytest.raises(PartitionError, match=r"cannot read the partition plan .*missing"):
        make_plan(other, 2, load_from=tmp_path / "missing")
    path.write_text("[1]")
    with pytest.raises(PartitionError, match="not a partition plan"):
        make_plan(other, 2, load_from=path)
    tied = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    make_plan(tied, 2).save(path)
    tied["b"].weight = tied["a"].weight
    with pytest.raises(PartitionError, match="share the parameter"):
        make_plan(tied, 2, load_from=path)


def test_c037_every_parameter_is_placed_exactly_once():
    names = ["a.weight", "b.inner.weight", "own"]
    with pytest.raises(PartitionError, match="no stage for parameter 'own'"):
        PartitionPlan(2, (("a", 0), ("b", 1))).check(names)
    with pytest.raises(PartitionError, match=r"more than one entry for parameter 'b.inner.weight'"):
        PartitionPlan(2, (("a", 0), ("b", 1), ("b.inner", 0)), (("own", 0),)).check(names)
    with pytest.raises(PartitionError, match=r"'a' is placed 2 times"):
        PartitionPlan(2, (("a", 0), ("a", 1)))
    with pytest.raises(PartitionError, match=r"'a' is placed on stage 2, but the plan has stages 0 to 1"):
        PartitionPlan(2, (("a", 2),))
    model = Decoder()
    for num_stages in (1, 2, 3):
        plan = make_plan(model, num_stages)
        homes = [plan.home_of_tensor(name) for name, _ in model.named_parameters()]
        assert None not in homes
        assert set(homes) == set(range(num_stages))


def test_the_table_folds_runs_of_layers():
    plan = PartitionPlan(2, (("emb", 0), ("h.0", 0), ("h.1", 0), ("h.2", 0), ("h.3", 1), ("head", 1)), (("pos", 0),))
    lines = plan.table().splitlines()
    assert lines[1].endswith("emb, h.0..2, pos")
    assert lines[2].endswith("h.3, head")
    assert "1.0 KiB" in make_plan(nn.Linear(16, 15), 1).table() or "1020 B" in make_plan(nn.Linear(16, 15), 1).table()
