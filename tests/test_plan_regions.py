"""What a region does with arguments, batches and outputs (docs/plans.md)."""

from __future__ import annotations

import copy
import io
import pickle
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modelparallel as smp
from communication_bytes import CountSentBytes
from modelparallel.comm.collectives.split import all_gather
from modelparallel.errors import TensorParallelError
from modelparallel.parameters.table import ParameterTable
from modelparallel.tensor_parallel.replace import replace_marked_modules
from modelparallel.utils import get_distribution_axis
from plan_models import (
    ATTENTION,
    F64,
    OUT,
    TOWERS,
    Tower,
    make_tower,
    tower_batch,
    tower_loss,
)
from plan_training import own_rows, setup_of
from rank_tests import RankTests, on

TP2 = RankTests(2, {"tensor_parallel_degree": 2})
TP4 = RankTests(4, {"tensor_parallel_degree": 4}, is_slow=True)


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
            with CountSentBytes() as forward:
                output = module(*inputs)
            with CountSentBytes() as backward:
                torch.autograd.grad(output.sum(), module.parameters(), allow_unused=True)
        return forward.total, backward.total

    x = torch.randn(8, 5, 32, dtype=F64, requires_grad=True)
    plan = {"up": "colwise", "down": "rowwise"}
    group = smp.job.session.current().groups.tp

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
def test_replicated_values_drop_alike_slices_do_not_and_the_stream_outside_goes_its_own_way():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = F.dropout(x, 0.5, self.training)  # replicated: the ranks must agree
            inner = F.dropout(torch.ones_like(self.up(x)), 0.5, self.training)  # a slice: each rank for itself
            after = F.dropout(self.down(inner), 0.5, self.training)
            self.seen = x.detach(), inner.detach(), after.detach()
            return after

    torch.manual_seed(3)
    model = planned(nn.Sequential(Dropping(), nn.Dropout(0.5)).double(), {"0.up": "colwise", "0.down": "rowwise"})
    torch.manual_seed(100 + smp.tp_rank())
    model(torch.ones(2, 8, dtype=F64))
    (first, inner, after), (second, other_inner, other_after) = smp.allgather(model.module[0].seen, smp.TP_GROUP)
    assert torch.equal(first, second) and 0 < int((first == 0).sum()) < first.numel()
    assert inner.shape == other_inner.shape and not torch.equal(inner, other_inner)
    assert torch.equal(after == 0, other_after == 0) and 0 < int((after == 0).sum()) < after.numel()
    draws = smp.allgather(float(torch.rand(())), smp.TP_GROUP)
    assert draws[0] != draws[1]


@on(TP2)
def test_prescaled_batches_are_neither_gathered_nor_sliced():
    for name in ("separate", "fused", "mixture", "tied", "vocabulary"):
        model, plain = make_tower(name), make_tower(name)
        smp.set_tensor_parallelism(model, plan=TOWERS[name][1])
        group = smp.job.session.current().groups.tp
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
def test_prescaled_batches_of_different_length_are_an_error():
    model = nn.Sequential(Pair(False)).double()
    smp.set_tensor_parallelism(model, plan={"*.up": "colwise", "*.down": "rowwise"})
    replace_marked_modules(model, smp.job.session.current().groups.tp, prescaled_batch=True)
    with pytest.raises(TensorParallelError, match=r"have batches of \[1, 2\] rows"):
        model(torch.randn(1 + smp.tp_rank(), 32, dtype=F64))


@on(TP2)
def test_a_loss_inside_a_region_is_an_error():
    class Lossy(Pair):
        def forward(self, x):
            y = super().forward(x)
            return y, y.mean()

    model = planned(nn.Sequential(Lossy(False)).double(), {"*.up": "colwise", "*.down": "rowwise"})
    with pytest.raises(TensorParallelError, match=r"region '0': output 1 has shape .* losses belong outside"):
        model(torch.randn(2, 32, dtype=F64))


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

    def noted(tensor, *args, **more):
        sent.append(tensor.dtype)
        return all_gather(tensor, *args, **more)

    with mock.patch.object(region_arguments, "all_gather", noted):
        model(ids)
        model(ids)
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


class Added(nn.Module):
    """Writes into what its row-wise layer returns."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.down(self.up(x)).add_(x)


@on(TP2)
def test_code_of_the_model_may_write_to_the_sum_of_a_row_wise_layer():
    torch.manual_seed(0)
    plain = Added().double()
    model = planned(nn.Sequential(copy.deepcopy(plain)), {"*.up": "colwise", "*.down": "rowwise"})
    for step in range(3):
        x = (torch.randn(3, 4, dtype=F64) + smp.tp_rank()).requires_grad_()
        own = x.detach().clone().requires_grad_()
        output, expected = model(x), plain(own)
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12, msg=f"call {step}")
        output.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(x.grad, own.grad, rtol=1e-12, atol=1e-12)
