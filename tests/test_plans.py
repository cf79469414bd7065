"""Any model by a tensor-parallel plan: the user's own, or the one that the model carries (docs/plans.md)."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modelparallel as smp
from communication_bytes import CountSentBytes
from modelparallel.errors import TensorParallelError
from modelparallel.parameters import ParameterTable
from modelparallel.plan.parameters import SplitSpec
from modelparallel.tensor_parallel.plans import carried_plan, user_plan
from modelparallel.tensor_parallel.replace import replace_marked_modules
from modelparallel.utils import get_distribution_axis
from parity import assert_parity, reference_run
from plan_models import (
    ATTENTION,
    EXPERTS,
    F64,
    MLP,
    OUT,
    TOWERS,
    Expert,
    GatedMlp,
    Tower,
    make_tower,
    tower_batch,
    tower_loss,
)
from pool import preload, run_ranks
from rank_tests import RankTests, on
from test_tensor_parallel import imaginary

TP2 = RankTests(2, {"tensor_parallel_degree": 2})
TP4 = RankTests(4, {"tensor_parallel_degree": 4})
NUM_SAMPLES = 4
# Its router computes in float32, whatever the dtype of the model.
SINGLE_PRECISION = {"mixtral"}


def settings(tp: int, **more) -> dict:
    return {"tensor_parallel_degree": tp, "ddp": True, "timeout_seconds": 20, **more}


def make_optimizer(kind: str):
    def make(parameters):
        if kind == "adam":
            return torch.optim.Adam(parameters, lr=0.01)
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)

    return make


def setup_of(name: str):
    """(make the model, the plan or None, a batch of a step, the loss) of a tower or a family."""
    if name in TOWERS:
        return lambda: make_tower(name), TOWERS[name][1], tower_batch, tower_loss
    from plan_families import family_batch, family_loss, make_family

    return lambda: make_family(name), None, family_batch, family_loss


def train(name: str, kind: str):
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

    @smp.step
    def train_step(model, *batch):
        loss = loss_of(model, *batch)
        model.backward(loss)
        return loss

    @smp.step
    def evaluate(model, *batch):
        return loss_of(model, *batch)

    losses, gradients = [], {}
    is_prescaled = smp.session.current().config.prescaled_batch
    replica, num_replicas = (smp.rdp_rank(), smp.rdp_size()) if is_prescaled else (smp.dp_rank(), smp.dp_size())
    own = slice(replica * NUM_SAMPLES, (replica + 1) * NUM_SAMPLES)
    for step in range(3):
        batch = batch_of(step, NUM_SAMPLES * num_replicas)
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


def check_states(make, model, weights, evaluate, loss_of):
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


def train_all(names, kind):
    return {name: train(name, kind) for name in names}


def check_training(names, num_ranks, parameters, kind):
    ranks = run_ranks(train_all, num_ranks, names, kind, parameters=parameters, timeout=170)
    num_replicas = num_ranks // parameters.get("pipeline_parallel_degree", 1)
    if parameters.get("prescaled_batch"):
        num_replicas //= parameters["tensor_parallel_degree"]
    for name in names:
        make, _, batch_of, loss_of = setup_of(name)
        expected = reference_run(
            make,
            [batch_of(step, NUM_SAMPLES * num_replicas) for step in range(3)],
            loss_of,
            num_microbatches=parameters.get("microbatches", 1),
            make_optimizer=make_optimizer(kind),
            num_replicas=num_replicas,
        )
        for results in ranks:
            _, gradients, weights = results[name]
            dtype = torch.float32 if name in SINGLE_PRECISION else F64
            assert_parity(gradients, {key: expected.gradients[key] for key in gradients}, dtype=dtype)
            assert set(weights) == set(expected.weights)
            assert_parity(weights, expected.weights, dtype=dtype)
        losses = torch.tensor([results[name][0] for results in ranks]).mean(0)
        torch.testing.assert_close(losses, torch.tensor(expected.losses))


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


FAST_FAMILIES = ["llama", "mixtral"]
FAMILY_NAMES = [
    "llama", "llama-tied", "llama-eager", "llama-single", "mistral", "qwen2", "qwen3", "gemma", "mixtral", "gpt_neox",
    "phi3",
]  # fmt: skip


def import_families():
    pytest.importorskip("transformers")
    import plan_families

    assert set(FAMILY_NAMES) == set(plan_families.FAMILIES)
    for name in FAMILY_NAMES:
        plan_families.make_family(name)  # imports the family, for the ranks too
    preload()


def test_hugging_face_models_train_as_in_one_process():
    import_families()
    check_training(FAST_FAMILIES, 2, settings(2, microbatches=2), "sgd")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "parameters", "kind"),
    [
        (2, settings(2), "adam"),
        (4, settings(4), "sgd"),
        (4, settings(2, pipeline_parallel_degree=2, microbatches=2), "adam"),
    ],
    ids=["tp2", "tp4", "tp2 pp2"],
)
def test_all_families_train_as_in_one_process(num_ranks, parameters, kind):
    import_families()
    check_training(FAMILY_NAMES, num_ranks, parameters, kind)


def call_family(what):
    """What users do with a Hugging Face model beside training, on each rank with its own rows."""
    from plan_families import family_batch, family_loss, make_family

    name = {"attentions": "llama-eager", "checkpoint": "qwen3"}.get(what, "llama")
    model, plain = make_family(name), make_family(name)
    smp.set_tensor_parallelism(model)
    model = smp.DistributedModel(model)
    own, _ = own_rows((2, 2))
    ids, mask = family_batch(0, 4)
    if what == "padding of one rank":  # the other one gets no mask at all
        mask[:2] = 1
    if what == "attentions":
        output = model(input_ids=ids[own], output_attentions=True, output_hidden_states=True)
        expected = plain(input_ids=ids, output_hidden_states=True).hidden_states
        torch.testing.assert_close(output.hidden_states[1], expected[1][own])
        with pytest.raises(TensorParallelError, match=r"output 1 of 'model.layers.0.self_attn' is this rank's slice"):
            output.attentions[0].sum()
    elif what == "generation":
        more = {"max_new_tokens": 4, "do_sample": False, "use_cache": True}
        mine = model.module.eval().generate(ids[own], attention_mask=torch.ones_like(ids[own]), **more)
        expected = plain.eval().generate(ids, attention_mask=torch.ones_like(ids), **more)
        assert torch.equal(mine, expected[own])
    elif what == "positions":
        positions = torch.arange(6) + 3 * torch.arange(4)[:, None]
        for rows in (1, 2):
            own = slice(rows * smp.tp_rank(), rows * (smp.tp_rank() + 1))
            mine = model(input_ids=ids[own], position_ids=positions[own]).logits
            torch.testing.assert_close(mine, plain(input_ids=ids, position_ids=positions).logits[own])
        mine = model(input_ids=ids[own], position_ids=positions[smp.tp_rank()][None]).logits
        torch.testing.assert_close(mine, plain(input_ids=ids, position_ids=positions[[0, 0, 1, 1]]).logits[own])
    else:
        for reentrant in (True, False) if what == "checkpoint" else (None, None):
            if reentrant is not None:
                model.module.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.zero_grad()
            plain.zero_grad()
            family_loss(model, ids[own], mask[own]).backward()
            family_loss(plain, ids, mask).backward()
            for (at, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
                split, expected = model.table.row_of(parameter).split, other.grad
                if split is not None:
                    expected = split.slice_of(expected, smp.tp_rank(), smp.tp_size())
                torch.testing.assert_close(parameter.grad, expected, msg=lambda text, at=at: f"{at}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "what", ["padding of one rank", "no padding", "attentions", "generation", "positions", "checkpoint"]
)
def test_what_users_do_with_hugging_face_models(what):
    import_families()
    run_ranks(call_family, 2, what, parameters=settings(2))


# Calls with batches of different length, and what else is seen without training


def own_rows(counts):
    counts = counts[: smp.tp_size()]
    start = sum(counts[: smp.tp_rank()])
    return slice(start, start + counts[smp.tp_rank()]), sum(counts)


def check_uneven(name, counts):
    """Outputs and gradients of calls with ``counts`` samples on the ranks; the second call takes the cheap layout."""
    make, plan, batch_of, loss_of = setup_of(name)
    model, plain = make(), make()
    smp.set_tensor_parallelism(model, plan=plan)
    model = smp.DistributedModel(model)
    own, total = own_rows(counts)
    for step in range(2):
        batch = batch_of(step, total)
        model.zero_grad()
        plain.zero_grad()
        if own.start < own.stop:
            loss = loss_of(model, *[part[own] for part in batch]) * (own.stop - own.start)
        else:
            loss = model(batch[0][own]).sum()  # takes part with no sample
        loss.backward()
        (loss_of(plain, *batch) * total).backward()
        for parameter_name, parameter in model.named_parameters():
            row = model.table.row_of(parameter)
            expected = dict(plain.named_parameters())[parameter_name].grad
            if expected is None:
                assert parameter.grad is None or not parameter.grad.any()
                continue
            if row.split is not None:
                expected = row.split.slice_of(expected, smp.tp_rank(), smp.tp_size())
            torch.testing.assert_close(parameter.grad, expected / smp.tp_size())


@on(TP2, TP4)
def test_the_ranks_may_have_batches_of_different_length():
    check_uneven("separate", (1, 3, 2, 2))
    check_uneven("fused", (3, 1, 1, 2))
    check_uneven("mixture", (1, 1, 4, 1))
    check_uneven("tied", (2, 1, 1, 1))


@on(TP2)
def test_a_rank_may_have_no_samples():
    check_uneven("separate", (0, 3))


def planned(module, plan, **more):
    smp.set_tensor_parallelism(module, plan=plan)
    return smp.DistributedModel(module, **more)


@on(TP2)
def test_other_modules_and_hooks_see_the_own_batch_and_classes_stay():
    model = make_tower("separate")
    attention_class, mlp_class = type(model.layers[0].attn), type(model.layers[0].mlp)
    parameter = model.layers[0].attn.q.weight
    wrapped = planned(model, TOWERS["separate"][1])
    assert wrapped.module is model and model.layers[0].attn.q.weight is parameter and parameter.shape == (16, 16)
    assert isinstance(model.layers[0].attn, attention_class) and isinstance(model.layers[0].mlp, mlp_class)
    assert isinstance(model.layers[0].attn.q, nn.Linear) and type(model.layers[0].attn).__name__ == "Attention"
    seen = []
    for name in ("layers.0.attn", "layers.0.norm2", "layers.0", "norm"):
        part = model.get_submodule(name)
        part.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
        part.register_forward_hook(lambda module, args, output: seen.append(output.shape[0]))
    rows = 2 + smp.tp_rank()
    for _ in range(2):
        wrapped(tower_batch(0, rows)[0])
    assert set(seen) == {rows}
    assert [name for name, _ in wrapped.named_parameters()] == [
        name for name, _ in make_tower("separate").named_parameters()
    ]
    assert wrapped.is_distributed_parameter(parameter) and wrapped.is_scaled_batch_parameter(parameter)
    assert not wrapped.is_distributed_parameter(model.layers[0].attn.q_norm.weight)
    assert get_distribution_axis(parameter) == 0


class Pair(nn.Module):
    def __init__(self, is_scaled: bool):
        super().__init__()
        self.is_scaled = is_scaled
        self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x, mask=None):
        y = self.down(self.up(x).tanh())
        return y * 2 if self.is_scaled else y


@on(TP2, TP4)
def test_a_region_sends_the_bytes_that_the_documents_say():
    size, rows = smp.tp_size(), 8 * 5
    others, own = size - 1, rows * 32 * 8

    def bytes_of(module, *inputs):
        """(forward, backward) of the second call, without the headers."""
        for _ in range(2):
            with CountSentBytes(ignored_bytes=600) as forward:
                output = module(*inputs)
            with CountSentBytes(ignored_bytes=600) as backward:
                torch.autograd.grad(output.sum(), module.parameters(), allow_unused=True)
        return forward.total, backward.total

    x = torch.randn(8, 5, 32, dtype=F64, requires_grad=True)
    plan = {"up": "colwise", "down": "rowwise"}
    group = smp.session.current().groups.tp

    def split(module, plan, prescaled_batch=False):
        smp.set_tensor_parallelism(module, plan=plan)
        replace_marked_modules(module, group, prescaled_batch=prescaled_batch)
        return module

    # The gradient of the input is not asked for below; its message is part of the backward of a model, so it is here.
    def with_input(module):
        return nn.Sequential(nn.Linear(32, 32).double(), module)

    assert bytes_of(with_input(split(Pair(False).double(), plan)), x) == (2 * others * own, 2 * others * own)
    all_reduce = 2 * others * own  # of the rows of all ranks, 40 KiB or more
    assert bytes_of(with_input(split(Pair(True).double(), plan)), x) == (others * own + all_reduce,) * 2
    own_all_reduce = others * own  # of 10 KiB: everybody sends all
    assert bytes_of(with_input(split(Pair(False).double(), plan, True)), x) == (own_all_reduce, own_all_reduce)
    head = split(nn.ModuleDict({"head": nn.Linear(32, 64)}).double(), {"head": "vocab"})
    logits = rows * 64 * 8 // size
    assert bytes_of(with_input(head["head"]), x) == (others * (own + logits),) * 2
    table = split(nn.ModuleDict({"table": nn.Embedding(64, 32)}).double(), {"table": "vocab"})
    ids = torch.randint(0, 64, (8, 20))
    looked_up = 8 * 20 * 32 * 8
    assert bytes_of(table["table"], ids) == (others * (ids.numel() * 8 + looked_up), others * looked_up)


@on(TP2)
def test_copies_and_pickles_compute_the_same():
    for name in ("separate", "mixture", "fused"):
        model = planned(make_tower(name), TOWERS[name][1])
        ids = tower_batch(smp.tp_rank(), 2)[0]
        expected = model(ids)
        stored = io.BytesIO()
        torch.save(model.module, stored)
        stored.seek(0)
        clones = [
            copy.deepcopy(model.module),
            pickle.loads(pickle.dumps(model.module)),
            torch.load(stored, weights_only=False),
        ]
        for clone in clones:
            assert [type(part) for part in clone.modules()] == [type(part) for part in model.module.modules()]
            assert torch.equal(clone(ids), expected) and torch.equal(clone(ids), model(ids))


@on(TP2)
def test_half_precision_and_autocast_come_close():
    plain = make_tower("separate").float()
    ids, _ = tower_batch(0, 4)
    own, _ = own_rows((2, 2))
    expected = plain(ids)[own].detach()
    for dtype in (torch.bfloat16, torch.float16):
        model = planned(make_tower("separate").to(dtype), TOWERS["separate"][1])
        for _ in range(2):
            output = model(ids[own])
            output.float().sum().backward()
            assert output.dtype == dtype
            torch.testing.assert_close(output.float(), expected, atol=0.1, rtol=0.1)
    model = planned(make_tower("separate").float(), TOWERS["separate"][1])
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            output = model(ids[own])
            output.float().sum().backward()
            torch.testing.assert_close(output.float(), expected, atol=0.1, rtol=0.1)


@on(TP2)
def test_replicated_values_drop_alike_and_the_stream_outside_goes_its_own_way():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = F.dropout(x, 0.5, self.training)  # replicated: the ranks must agree
            self.seen = x.detach()
            return self.down(self.up(x))

    torch.manual_seed(3)
    model = planned(nn.Sequential(Dropping(), nn.Dropout(0.5)).double(), {"0.up": "colwise", "0.down": "rowwise"})
    torch.manual_seed(100 + smp.tp_rank())
    model(torch.ones(2, 8, dtype=F64))
    first, second = smp.allgather(model.module[0].seen, smp.TP_GROUP)
    assert torch.equal(first, second) and 0 < int((first == 0).sum()) < first.numel()
    draws = smp.allgather(float(torch.rand(())), smp.TP_GROUP)
    assert draws[0] != draws[1]


@on(TP2)
def test_prescaled_batches_are_neither_gathered_nor_sliced():
    for name in ("separate", "fused", "mixture", "tied", "vocabulary"):
        model, plain = make_tower(name), make_tower(name)
        smp.set_tensor_parallelism(model, plan=TOWERS[name][1])
        group = smp.session.current().groups.tp
        replace_marked_modules(model, group, prescaled_batch=True)
        splits = ParameterTable(model)
        for step in range(2):
            batch = tower_batch(step, 3)
            model.zero_grad()
            plain.zero_grad()
            torch.testing.assert_close(model(batch[0]), plain(batch[0]))
            tower_loss(model, *batch).backward()
            tower_loss(plain, *batch).backward()
            for (parameter_name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
                if other.grad is None:
                    continue
                split = splits.row_of(parameter).split
                if split is not None:  # the batch counts once for each rank
                    expected = split.slice_of(other.grad, group.rank_in_group, 2) * 2
                    torch.testing.assert_close(parameter.grad, expected)
                else:  # the mean over the ranks
                    mean = sum(smp.allgather(parameter.grad, smp.TP_GROUP)) / 2
                    torch.testing.assert_close(mean, other.grad, msg=lambda text, at=parameter_name: f"{at}: {text}")


@on(TP2)
def test_arguments_that_are_no_batches():
    class Region(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)
            self.shapes = []

        def forward(self, x, *others, **more):
            self.shapes.append([tuple(other.shape) for other in [*others, *more.values()]])
            self.values = others
            return self.down(self.up(x))

    model = planned(nn.Sequential(Region()).double(), {"*.up": "colwise", "*.down": "rowwise"})
    region, rank = model.module[0], smp.tp_rank()
    x = torch.randn(2, 3, 4, dtype=F64)
    table, own_table = torch.zeros(1, 3), torch.full((1, 3), float(rank))
    for _ in range(2):
        region(x, torch.zeros(3), torch.zeros(()), table, own_table, mask=torch.zeros(2, 1))
        assert region.shapes[-1] == [(3,), (), (1, 3), (4, 3), (4, 1)]
        assert region.values[3][:, 0].tolist() == [0, 0, 1, 1], "each rank's rows have that rank's table"
    uneven = torch.randn(1 + rank, 3, 4, dtype=F64)
    region(uneven, torch.full((1, 3), float(rank)))
    assert region.values[0].shape == (3, 3) and region.values[0][:, 0].tolist() == [0, 1, 1]
    positions = torch.arange(3)
    region(torch.randn(3, 3, 4, dtype=F64), positions, torch.full((3,), rank))
    assert region.shapes[-1] == [(3,), (6,)], "as many positions as rows: equal on all ranks, they are positions"
    with pytest.raises(TensorParallelError, match=r"region '0': argument 1 has shape \(3,\) .* must be equal on all"):
        region(x, torch.full((3,), float(rank)))
    with pytest.raises(TensorParallelError, match="called it with different arguments") as caught:
        region(x, **({"mask": None} if rank else {"scale": None}))
    assert "tp_rank 1" in str(caught.value) and "mask" in str(caught.value)
    with pytest.raises(TensorParallelError, match="called it with different arguments"):
        region(x, torch.ones(2) if rank else 1j)
    with pytest.raises(TensorParallelError, match="no argument is a tensor with a batch dim"):
        region(None)
    with pytest.raises(TensorParallelError, match=r"'0.up' holds a slice .* called outside its region"):
        region.up(x)
    region(x)


class Mixer(nn.Module):
    """What a call gets decides what it computes, for each row by itself."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(4, 8), nn.Linear(8, 4), nn.LayerNorm(4)

    def forward(self, x, mask=None, *, is_double=False, bias=None, scale=None):
        hidden = self.up(self.norm(x)).tanh()
        if mask is not None:
            hidden = hidden * mask + hidden.mean(1, keepdim=True)
        if bias is not None:
            hidden = hidden + bias.sum()
        if scale is not None:
            hidden = hidden * scale
        hidden = self.down(hidden)
        return hidden * 2 if is_double else hidden


@on(TP2, TP4)
def test_ranks_with_other_kinds_of_arguments_share_the_work_in_passes():
    torch.manual_seed(9)
    plain = nn.Sequential(Mixer(), Mixer()).double()
    model = planned(copy.deepcopy(plain), {"*.up": "colwise", "*.down": "rowwise"})
    sizes = [(2, 3), (1, 5), (2, 3), (3, 2)]
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(rows, width, 4, dtype=F64, generator=generator) for rows, width in sizes]
    bias = nn.Parameter(torch.randn(7, dtype=F64, generator=generator))

    def arguments(rank):
        rows, width = sizes[rank]
        return {
            "mask": None if rank % 2 else torch.linspace(0, 1, rows * width, dtype=F64).view(rows, width, 1),
            "is_double": rank == 3,
            "bias": bias if rank != 1 else None,
            "scale": torch.tensor(1.5 + rank, dtype=F64) if rank in (0, 3) else 0.5,
        }

    def run(net, rank):
        return net[1](net[0](inputs[rank], **arguments(rank)), **arguments(rank))

    for _ in range(3):  # what is found out of each kind is used from the second call on
        expected = [run(plain, rank) for rank in range(smp.tp_size())]
        own = run(model.module, smp.tp_rank())
        torch.testing.assert_close(own, expected[smp.tp_rank()])
        for net in (plain, model.module):
            net.zero_grad()
        bias.grad = None
        sum(output.square().sum() for output in expected).backward()
        expected_bias = bias.grad
        bias.grad = None
        own.square().sum().backward()
        sums = smp.allgather(torch.zeros_like(bias) if bias.grad is None else bias.grad, smp.TP_GROUP)
        torch.testing.assert_close(sum(sums), expected_bias)
        for (name, parameter), other in zip(model.module.named_parameters(), plain.parameters(), strict=True):
            split, wanted = model.table.row_of(parameter).split, other.grad / smp.tp_size()
            if split is not None:
                wanted = split.slice_of(wanted, smp.tp_rank(), smp.tp_size())
            torch.testing.assert_close(parameter.grad, wanted, msg=lambda text, at=name: f"{at}: {text}")


class FusedExperts(nn.Module):
    """All weights of an expert in one tensor; ``is_by_expert``: the rows come in the order of the experts."""

    def __init__(self, is_by_expert: bool):
        super().__init__()
        self.is_by_expert = is_by_expert
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 4)), nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, rows, chosen=None):
        if self.is_by_expert:
            rows = rows.view(3, -1, 4)
            gate, up = (rows @ self.up.transpose(1, 2)).chunk(2, -1)
            return ((gate.tanh() * up) @ self.down.transpose(1, 2)).view(-1, 4)
        gate, up = torch.einsum("ni,noi->no", rows, self.up[chosen]).chunk(2, -1)
        return torch.einsum("ni,noi->no", gate.tanh() * up, self.down[chosen])


class FusedMixture(nn.Module):
    _tp_plan = {"experts.up": "packed_colwise", "experts.down": "rowwise", "experts": "moe_tp_experts"}

    def __init__(self, is_by_expert: bool):
        super().__init__()
        self.router, self.experts = nn.Linear(4, 3), FusedExperts(is_by_expert)

    def forward(self, x):
        rows, weights = x.flatten(0, 1), self.router(x.flatten(0, 1)).softmax(-1)
        if self.experts.is_by_expert:
            outputs = self.experts(rows.repeat(3, 1)).view(3, -1, 4)
            return torch.einsum("end,ne->nd", outputs, weights).view_as(x)
        best = weights.argmax(-1)
        return (self.experts(rows, best) * weights.gather(1, best[:, None])).view_as(x)


@on(TP2)
def test_fused_experts_keep_their_rows_apart_where_these_have_an_order():
    for is_by_expert in (False, True):
        torch.manual_seed(4)
        plain = FusedMixture(is_by_expert).double()
        model = copy.deepcopy(plain)
        smp.set_tensor_parallelism(model)
        model = smp.DistributedModel(model)
        assert model.module.experts.up.shape == (3, 4, 4) and model.module.experts.down.shape == (3, 4, 2)
        own, total = own_rows((1, 2))
        for step in range(3):
            x = torch.randn(total, 5, 4, dtype=F64, generator=torch.Generator().manual_seed(step))
            model.zero_grad()
            plain.zero_grad()
            output, expected = model(x[own]), plain(x)
            torch.testing.assert_close(output, expected[own])
            output.square().sum().backward()
            expected.square().sum().backward()
            for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
                split, wanted = model.table.row_of(parameter).split, other.grad / 2
                wanted = wanted if split is None else split.slice_of(wanted, smp.tp_rank(), 2)
                torch.testing.assert_close(parameter.grad, wanted)
        (outputs,) = model.module.experts.planned.known.values()
        assert outputs.is_separate == is_by_expert


@on(TP2)
def test_a_mask_is_gathered_once_for_all_layers():
    from modelparallel.tensor_parallel import region_arguments

    model = planned(make_tower("separate"), TOWERS["separate"][1])
    ids = tower_batch(0, 2)[0]
    sent = []
    original = region_arguments.all_gather
    region_arguments.all_gather = lambda tensor, *args, **more: (
        sent.append(tensor.dtype) or original(tensor, *args, **more)
    )
    try:
        model(ids)
        model(ids)
    finally:
        region_arguments.all_gather = original
    assert sent.count(torch.bool) == 2, "one mask for each call"
    memo = model.module.layers[0].attn.planned.memo
    assert not len(memo), "the masks are gone, and what was gathered of them too"


@on(TP2)
def test_attention_weights_of_own_heads_are_refused_when_used_and_a_wrong_plan_when_called():
    class Weights(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            inner = self.up(x)
            return self.down(inner), inner

    torch.manual_seed(0)
    model = planned(nn.Sequential(Weights()).double(), {"*.up": "colwise", "*.down": "rowwise"})
    x = torch.randn(2, 4, dtype=F64)
    for _ in range(2):
        output, weights = model(x)
        assert output.shape == (2, 4) and weights.shape == (2, 2)
        with pytest.raises(TensorParallelError, match="output 1 of '0' is this rank's slice"):
            weights.sum()

    class Wrong(Weights):
        def forward(self, x):
            return self.up(x), self.down(self.up(x))

    model = planned(nn.Sequential(Wrong()).double(), {"*.up": "colwise", "*.down": "rowwise"})
    with pytest.raises(TensorParallelError, match="region '0': its first output is not equal on the tensor-parallel"):
        model(x)


@on(TP2)
def test_a_region_that_ends_otherwise_than_in_its_first_call_is_an_error():
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)
            self.factor = None

        def forward(self, x):
            y = self.down(self.up(x))
            return y if self.factor is None else y * self.factor

    model = planned(nn.Sequential(Changing()).double(), {"*.up": "colwise", "*.down": "rowwise"})
    x = torch.randn(2, 4, dtype=F64)
    model(x)
    model.module[0].factor = 2.0
    with pytest.raises(TensorParallelError, match="made what it returned in its first call"):
        model(x)


@on(TP4)
def test_heads_that_do_not_divide_are_refused_by_name():
    model = Tower()
    for layer in model.layers:
        layer.attn = type(layer.attn)(16, 4, 2, 8, False)
    smp.set_tensor_parallelism(model, plan={**ATTENTION, **OUT})
    with pytest.raises(TensorParallelError) as caught:
        smp.DistributedModel(model)
    assert "the number of heads (of 8 features) in out_features of module 'layers.0.attn.k' (Linear) is 2" in str(
        caught.value
    )
    assert "use one of the degrees 1, 2" in str(caught.value)
    assert model.layers[0].attn.q.weight.shape == (32, 16), "nothing has been cut"
    fused = Tower(is_fused=True)
    fused.layers = nn.ModuleList([type(layer)(16, True, False) for layer in fused.layers])
    smp.set_tensor_parallelism(fused, plan={"layers.*.mlp.gate_up": ("colwise", {"parts": (6, 10)}), **{
        "layers.*.mlp.down": "rowwise"}})  # fmt: skip
    with pytest.raises(
        TensorParallelError, match=r"out_features of module 'layers.0.mlp.gate_up' .* is 6, not divisible"
    ):
        smp.DistributedModel(fused)


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
