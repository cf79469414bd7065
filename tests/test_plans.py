"""Any model by a tensor-parallel plan: the user's own, or the one that the model carries (docs/plans.md)."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import modelparallel as smp
from modelparallel.errors import TensorParallelError
from modelparallel.plan.rows import SplitSpec
from modelparallel.tensor_parallel.plans import carried_plan, user_plan
from modelparallel.tensor_parallel.replace import replace_marked_modules
from plan_models import (
    ATTENTION,
    EXPERTS,
    MLP,
    OUT,
    TOWERS,
    Expert,
    GatedMlp,
    Tower,
    make_tower,
)
from plan_training import check_training, settings
from split_layers import imaginary


def test_models_with_a_users_plan_train_as_in_one_process():
    check_training(list(TOWERS), 2, settings(2, microbatches=2), "sgd")


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"pipeline_parallel_degree": 2, "microbatches": 2}], ids=["rdp2", "pp2"])
def test_prescaled_batches_train_as_in_one_process(more):
    check_training(list(TOWERS), 4, settings(2, prescaled_batch=True, **more), "adam")


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


# Without processes: reading, checking and converting


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        ({"layers.*.attn.query": "colwise"}, "matches nothing in Tower; 'layers.0.attn' has q, k, v, q_norm, out"),
        ({"layer.*.attn.q": "colwise"}, "matches nothing in Tower; the module has table, layers, norm, head"),
        ({"layers.0*.attn": "colwise"}, "'*' stands for one whole component"),
        ({"layers.*.attn.q": "columnwise"}, "is not a style; the styles are colwise, rowwise, vocab"),
        ({"layers.*.attn.q": None}, "is not a style"),
        ({"norm": "colwise"}, "'norm', matched by 'norm', is a LayerNorm: this style is for an nn.Linear"),
        ({"layers.*": "rowwise"}, "'layers.0', matched by 'layers.*', is a Block: this style is for an nn.Linear"),
        ({"norm": "vocab"}, "is a LayerNorm"),
        ({"head": "rowwise"}, "'': each group of colwise layers needs a rowwise layer"),
        (ATTENTION, "'layers.0.attn', 'layers.1.attn': each group of colwise layers needs a rowwise layer"),
        ({"layers.*.attn.q": ("colwise", {"parts": 3})}, "has 32 features, which are not the parts 3"),
        ({"layers.*.attn.q": ("colwise", {"parts": (8, 8)})}, "has 32 features, which are not the parts (8, 8)"),
        ({"layers.*.attn.q": ("colwise", {"part": 2})}, "only colwise takes options"),
        ({"layers.*.attn.q": ("rowwise", {"parts": 2})}, "only colwise takes options"),
        ({"layers.*.attn.q": ("colwise", {"parts": 0})}, "parts and head_dim must be positive ints"),
        ({"layers.*.attn.sizes": "divide"}, "only an int is divided"),
        ({"layers.*.attn.heads": "divide"}, "matches nothing"),
        ({"layers.*.attn.q": "colwise", "layers.0.attn.q": "rowwise"}, "is matched by 'layers.*.attn.q' and by"),
        ({}, "plan must be a dict of name patterns"),
        ("colwise", "plan must be a dict of name patterns"),
    ],
)
def test_what_is_wrong_with_a_plan_is_said_before_wrapping(plan, text):
    with pytest.raises(TensorParallelError) as caught:
        smp.set_tensor_parallelism(Tower(), plan=plan)
    assert text in str(caught.value)


def test_a_plan_with_enabled_false_and_a_table_that_cannot_be_cut_are_refused():
    with pytest.raises(TensorParallelError, match="says nothing"):
        smp.set_tensor_parallelism(Tower(), False, plan=MLP)
    net = nn.ModuleDict({"table": nn.Embedding(8, 4, max_norm=1.0)})
    with pytest.raises(TensorParallelError, match="max_norm is not supported"):
        smp.set_tensor_parallelism(net, plan={"table": "vocab"})


def test_regions_are_found():
    assert user_plan(Tower(), {**ATTENTION, **OUT, **MLP}).regions == (
        "layers.0.attn", "layers.0.mlp", "layers.1.attn", "layers.1.mlp",
    )  # fmt: skip
    assert user_plan(Tower(is_mixture=True), EXPERTS).regions == ("layers.0.mlp", "layers.1.mlp")
    mixture = Tower(is_mixture=True).layers[0].mlp
    assert user_plan(mixture, {"experts.*.up": "colwise", "experts.*.down": "rowwise"}).regions == ("",)
    stack = nn.Sequential(Expert(4, 8), Expert(4, 8))
    assert user_plan(stack, {"*.up": "colwise", "*.down": "rowwise"}).regions == ("0", "1")
    assert user_plan(stack, {"*.up": "colwise", "1.down": "rowwise"}).regions == ("",)
    assert user_plan(Tower(), {**ATTENTION, **OUT, "layers.*": "region"}).regions == ("layers.0", "layers.1")
    assert user_plan(Tower(), {"layers.*.attn.q": "colwise", "layers.*.mlp.down": "rowwise"}).regions == (
        "layers.0", "layers.1",
    )  # fmt: skip


def test_without_the_mark_and_with_one_rank_nothing_is_split():
    for size in (1, 2):
        model = make_tower("separate")
        smp.set_tensor_parallelism(model, plan=TOWERS["separate"][1])
        if size == 2:
            smp.set_tensor_parallelism(model, False)
        replace_marked_modules(model, imaginary(size))
        assert model.layers[0].attn.q.weight.shape == (32, 16)
        assert not any(hasattr(part, "split_tensors") for part in model.modules())


def test_the_plan_alone_decides_but_for_registered_modules_and_inner_plans():
    model = make_tower("separate")
    smp.set_tensor_parallelism(model, plan={**ATTENTION, **OUT, **MLP})
    smp.set_tensor_parallelism(model.layers[0].attn, False)
    smp.set_tensor_parallelism(model.layers[1].mlp, plan={"gate": "vocab", "up": "vocab"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace_marked_modules(model, imaginary(2, 1))
    split = {f"{name}.{own}" for name, part in model.named_modules() if hasattr(part, "split_tensors")
             for own in part.split_tensors()}  # fmt: skip
    names = ("gate", "up")
    assert split == {
        *(f"layers.1.attn.{part}.{own}" for part in ("q", "k", "v") for own in ("weight", "bias")),
        "layers.1.attn.out.weight",
        *(f"layers.{index}.mlp.{part}.{own}" for index in (0, 1) for part in names for own in ("weight", "bias")),
        "layers.0.mlp.down.weight",
    }


def test_a_registered_class_inside_is_replaced_and_not_split():
    class Own(smp.nn.DistributedModule):
        def __init__(self, *args):
            super().__init__()

    class OwnMlp(GatedMlp):
        pass

    smp.tp_register_with_module(OwnMlp, Own)
    model = make_tower("separate")
    model.layers[0].mlp = OwnMlp(16, 8, False)
    smp.set_tensor_parallelism(model, plan={**ATTENTION, **OUT, **MLP})
    replace_marked_modules(model, imaginary(2))
    assert type(model.layers[0].mlp) is Own and model.layers[1].mlp.down.weight.shape == (16, 4)
    assert model.layers[0].attn.q.weight.shape == (16, 16)


def test_packed_and_uneven_layouts_are_declared_and_identity_is_kept():
    model = make_tower("fused")
    weight, table = model.layers[0].attn.qkv.weight, model.table.weight
    full, full_table = weight.detach().clone(), table.detach().clone()
    smp.set_tensor_parallelism(model, plan=TOWERS["fused"][1])
    replace_marked_modules(model, imaginary(2, 1))
    attention = model.layers[0].attn
    assert attention.qkv.weight is weight and (attention.num_heads, attention.num_kv_heads) == (4, 2)
    assert attention.qkv.split_tensors() == {
        "weight": SplitSpec(0, (64, 16), (32, 16, 16)), "bias": SplitSpec(0, (64,), (32, 16, 16)),
    }  # fmt: skip
    assert torch.equal(weight, torch.cat([full[16:32], full[40:48], full[56:64]]))
    assert model.table.weight is table and table.shape == (6, 16) and torch.equal(table, full_table[7:])
    assert model.table.padding_idx is None and model.head.weight.shape == (6, 16)


def test_a_tie_that_is_not_cut_alike_is_refused_in_a_users_plan():
    model = make_tower("tied")
    smp.set_tensor_parallelism(model, plan={"head": "vocab"})
    with pytest.raises(TensorParallelError, match=r"'head.weight' is shared with 'table.weight', which is whole"):
        replace_marked_modules(model, imaginary(2))


def carrying(plan, **more):
    model = Tower(**more)
    model._tp_plan = plan
    smp.set_tensor_parallelism(model)
    return model


def test_a_carried_plan_is_used_without_registration_and_says_what_stays_whole():
    hf = {"layers.*.attn.q": "colwise", "layers.*.attn.k": "colwise", "layers.*.attn.v": "colwise",
          "layers.*.attn.out": "rowwise", "layers.*.attn.q_norm": "replicated_with_grad_allreduce",
          "layers.*.mlp.gate": "local_colwise", "layers.*.mlp.up": "local_colwise",
          "layers.*.mlp.down": "local_rowwise", "layers.*.mlp": "gather", "norm.weight": "sequence_parallel",
          "head": "colwise_rep", "not.there": "colwise"}  # fmt: skip
    model = carrying(hf)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace_marked_modules(model, imaginary(2))
    assert model.layers[1].mlp.down.weight.shape == (16, 4) and model.head.weight.shape == (7, 16)
    assert type(model.table) is nn.Embedding and type(model.norm) is nn.LayerNorm
    model = carrying(hf)
    with pytest.warns(UserWarning, match=r"region 'layers.\d.attn' stays whole: the number of heads") as caught:
        replace_marked_modules(model, imaginary(8))
    assert len(caught) == 2 and model.layers[0].mlp.down.weight.shape == (16, 1)
    with pytest.warns(UserWarning, match="'layers.0.attn', 'layers.1.attn' stay whole"):
        replace_marked_modules(carrying(ATTENTION), imaginary(2))
    with pytest.raises(TensorParallelError, match="carries a tensor-parallel plan with the style 'diagonal'"):
        replace_marked_modules(carrying({"layers.*.attn.q": "diagonal"}), imaginary(2))
    replace_marked_modules(carrying({"layers.*.attn.q": "diagonal"}), imaginary(1))
    assert carried_plan(Tower()) is None


def test_a_registration_of_the_class_goes_before_a_carried_plan():
    class Registered(smp.nn.DistributedModule):
        def __init__(self, *args, **kwargs):
            super().__init__()

    class Carrying(Tower):
        _tp_plan = {"head": "colwise_rep"}

    smp.tp_register_with_module(Carrying, Registered)
    with smp.tensor_parallelism():
        model = Carrying()
    assert type(replace_marked_modules(model, imaginary(2))) is Registered
