"""The layers split over tensor-parallel ranks, and their collectives, against the plain layers."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn

from modelparallel.comm.collectives import split as collectives
from modelparallel.errors import TensorParallelError, UnsupportedError
from modelparallel.nn import DistributedEmbedding, DistributedLinear, FusedLayerNorm
from modelparallel.plan.rows import SplitSpec
from modelparallel.tensor_parallel.distributed_module import using_tp_group
from parity import assert_parity
from pool import run_ranks
from split_layers import F64, batch_of, everybody, imaginary


def merged(slices: torch.Tensor, dim: int) -> torch.Tensor:
    """The full tensor of which each rank holds a slice along ``dim``."""
    return collectives.all_gather(slices.detach(), everybody(), dim)


# The collectives


def check_collectives(counts):
    group = everybody()
    rank, size = group.rank_in_group, group.size
    assert collectives.gather_counts(counts[rank], group) == counts
    own = [batch_of(i, n, 2 * size) for i, n in enumerate(counts)]
    rows = torch.cat(own)
    x = own[rank].clone().requires_grad_()
    even = None if len(set(counts)) == 1 else counts

    gathered = collectives.all_gather(x, group, counts=even)
    assert torch.equal(gathered, rows)
    weights = [batch_of(50 + i, *rows.shape) for i in range(size)]
    (grad,) = torch.autograd.grad((gathered * weights[rank]).sum(), x)
    torch.testing.assert_close(grad, sum(weights).split(counts)[rank])

    slices = collectives.split_features(x, group, even)
    assert torch.equal(slices, rows.chunk(size, 1)[rank])
    assert torch.equal(collectives.merge_features(slices, group, even), own[rank])
    weight = batch_of(60, *rows.shape)
    (grad,) = torch.autograd.grad((slices * weight.chunk(size, 1)[rank]).sum(), x)
    torch.testing.assert_close(grad, weight.split(counts)[rank])

    parts = [batch_of(70 + i, *rows.shape) for i in range(size)]
    part = parts[rank].clone().requires_grad_()
    reduced = collectives.reduce_scatter(part, group, counts=even)
    torch.testing.assert_close(reduced, sum(parts).split(counts)[rank])
    (grad,) = torch.autograd.grad((reduced * reduced).sum() / 2, part, create_graph=True)
    torch.testing.assert_close(grad, sum(parts))
    (second,) = torch.autograd.grad(grad.sum(), part)
    torch.testing.assert_close(second, torch.full_like(part, float(size)))


@pytest.mark.parametrize("counts", [(3, 3), (4, 1), (0, 2), (0, 0), (1, 2, 3, 4), (2, 2, 2, 2)])
def test_collectives_are_exact_in_both_directions(counts):
    run_ranks(check_collectives, len(counts), counts)


def check_dims_and_dtypes():
    group = everybody()
    rank, size = group.rank_in_group, group.size
    x = batch_of(rank, 2, 3)
    assert torch.equal(collectives.all_gather(x, group, dim=1), torch.cat([batch_of(i, 2, 3) for i in range(size)], 1))
    wide = torch.cat([batch_of(rank, 2, 3), batch_of(10 + rank, 2, 3)], 1)
    expected = sum(batch_of(10 * rank + i, 2, 3) for i in range(size))
    torch.testing.assert_close(collectives.reduce_scatter(wide, group, dim=1), expected)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64, torch.bool, torch.complex64):
        block = torch.full((2, 4), rank + 1).to(dtype)
        gathered = collectives.all_gather(block, group)
        assert gathered.dtype == dtype
        assert torch.equal(gathered, torch.cat([torch.full((2, 4), i + 1).to(dtype) for i in range(size)]))
    with pytest.raises(TensorParallelError, match=r"shape \(2, 3\).*2 equal slices"):
        collectives.split_features(x, group)
    with pytest.raises(TensorParallelError, match=r"shape \(3, 2\) has no 2 equal parts"):
        collectives.reduce_scatter(x.t(), group)
    with pytest.raises(TensorParallelError, match=r"counts \(7, 7\)"):
        collectives.all_gather(x, group, counts=(7, 7))


def test_collectives_along_any_dim_and_of_any_dtype():
    run_ranks(check_dims_and_dtypes, 2)


# DistributedLinear


def check_linear(shapes, bias):
    """Outputs and gradients of a converted layer against the plain layer, each rank with a batch of its own."""
    group = everybody()
    rank, size = group.rank_in_group, group.size
    torch.manual_seed(0)
    plain = nn.Linear(8, 3, bias=bias, dtype=F64)
    layer = copy.deepcopy(plain)
    weight = layer.weight
    DistributedLinear.convert(layer, group)
    assert layer.weight is weight and weight.shape == (3, 8 // size) and weight.requires_grad
    torch.testing.assert_close(merged(layer.weight, 1), plain.weight)
    batches = [batch_of(i, *shape) for i, shape in enumerate(shapes)]
    x = batches[rank].clone().requires_grad_()
    out = layer(x)
    out.sin().sum().backward()
    found = {"out": out.detach(), "x.grad": x.grad, "weight.grad": merged(layer.weight.grad, 1)}
    if bias:
        found["bias.grad"] = layer.bias.grad

    own = batches[rank].clone().requires_grad_()
    expected_out = plain(own)
    expected_out.sin().sum().backward()
    expected = {"out": expected_out.detach(), "x.grad": own.grad}
    if bias:
        expected["bias.grad"] = plain.bias.grad
    plain.zero_grad()
    for batch in batches:  # the slice's gradient is the sum over the batches of the group
        plain(batch).sin().sum().backward()
    expected["weight.grad"] = plain.weight.grad
    assert_parity(found, expected, dtype=F64)


@pytest.mark.parametrize(
    "shapes",
    [
        [(4, 8)] * 2,
        [(8,)] * 2,
        [(2, 3, 8)] * 4,
        [(5, 8), (2, 8)],
        [(0, 8), (3, 8)],
        [(0, 8), (0, 8)],
        [(2, 3, 8), (8,), (4, 8), (1, 1, 1, 8)],
    ],
    ids=str,
)
def test_c068_c069_distributed_linear_equals_linear_for_each_ranks_own_batch(shapes):
    run_ranks(check_linear, len(shapes), shapes, True)


def check_linear_details():
    group = everybody()
    rank = group.rank_in_group
    check_linear([(4, 8)] * group.size, False)
    with using_tp_group(group):
        layer = DistributedLinear(8, 3, dtype=F64)
    with torch.no_grad():
        out = layer(batch_of(rank, 4, 8).t().contiguous().t())  # any memory layout
    assert not out.requires_grad and out.shape == (4, 3)
    with pytest.raises(TensorParallelError, match=r"shape \(4, 7\), its last dim must be in_features=8"):
        layer(batch_of(rank, 4, 7))
    with pytest.raises(TensorParallelError, match=r"input is torch\.float32, the weight torch\.float64"):
        layer(batch_of(rank, 4, 8).float())
    layer.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = batch_of(rank, 4, 8).float().requires_grad_()
        half = layer(x)
    assert half.dtype == torch.bfloat16
    half.float().sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32
    # Frozen parameters, and inputs that need no gradient.
    layer.requires_grad_(False)
    x = batch_of(rank, 4, 8).float().requires_grad_()
    layer(x).sum().backward()
    full = merged(layer.weight, 1)
    torch.testing.assert_close(x.grad, full.sum(0).expand(4, 8))
    layer.weight.requires_grad_(True).grad = None
    layer(batch_of(rank, 4, 8).float()).sum().backward()
    assert layer.weight.grad.shape == (3, 4)


def test_distributed_linear_without_bias_under_autocast_frozen_and_with_wrong_inputs():
    run_ranks(check_linear_details, 2)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_c080_initial_full_weights_do_not_depend_on_the_degree(size):
    torch.manual_seed(3)
    plain = nn.Linear(8, 3)
    after = torch.rand(1)
    slices = []
    for rank in range(size):
        torch.manual_seed(3)
        with using_tp_group(imaginary(size, rank)):
            layer = DistributedLinear(8, 3)
        assert torch.equal(torch.rand(1), after), "as many random numbers as nn.Linear"
        assert torch.equal(layer.bias, plain.bias)
        slices.append(layer.weight.detach().clone())
        torch.manual_seed(3)
        layer.reset_parameters()
        assert torch.equal(layer.weight, slices[-1])
    assert torch.equal(torch.cat(slices, 1), plain.weight)


def test_sizes_that_do_not_divide_are_refused_with_the_degrees_that_work():
    with using_tp_group(imaginary(4)):
        with pytest.raises(TensorParallelError, match=r"in_features of a DistributedLinear is 6.*degrees 1, 2, 3, 6$"):
            DistributedLinear(6, 8)
        with pytest.raises(TensorParallelError, match="embedding_dim of a DistributedEmbedding is 6"):
            DistributedEmbedding(8, 6)
        layer = DistributedLinear(8, 6, False, "meta", torch.bfloat16)
    assert layer.weight.device.type == "meta" and layer.weight.dtype == torch.bfloat16 and layer.bias is None
    assert layer.split_tensors() == {"weight": SplitSpec(1, (6, 8))}
    assert layer.scaled_batch_tensors() == {"weight"}


def test_shapes_can_be_propagated_on_the_meta_device_without_communication():
    with using_tp_group(imaginary(4)):
        layers = nn.Sequential(DistributedEmbedding(7, 8), DistributedLinear(8, 4)).to("meta")
    out = layers(torch.zeros(2, 3, dtype=torch.int64, device="meta"))
    assert out.is_meta and out.shape == (2, 3, 4)
    out.sum().backward()
    assert layers[0].weight.grad.shape == (7, 2) and layers[1].weight.grad.shape == (4, 2)


def test_signatures_are_the_documented_ones():
    assert list(inspect.signature(DistributedLinear).parameters) == [
        "in_features",
        "out_features",
        "bias",
        "device",
        "dtype",
    ]
    names = (
        "num_embeddings embedding_dim padding_idx max_norm norm_type scale_grad_by_freq sparse _weight "
        "initializer_range _skip_allgather _skip_scatter_and_merge"
    )
    assert list(inspect.signature(DistributedEmbedding).parameters) == names.split()
    norm = FusedLayerNorm(4, eps=1e-12)
    assert isinstance(norm, nn.LayerNorm) and norm.normalized_shape == (4,) and norm.eps == 1e-12
    assert dict(norm.named_parameters()).keys() == {"weight", "bias"}


# DistributedEmbedding


def ids_of(rank: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 7, shape, generator=torch.Generator().manual_seed(200 + rank))


def check_embedding(shapes, options):
    group = everybody()
    rank, size = group.rank_in_group, group.size
    torch.manual_seed(0)
    plain = nn.Embedding(7, 8, dtype=F64, **options)
    layer = copy.deepcopy(plain)
    weight = layer.weight
    DistributedEmbedding.convert(layer, group)
    assert layer.weight is weight and weight.shape == (7, 8 // size)
    batches = [ids_of(i, *shape) for i, shape in enumerate(shapes)]
    out = layer(batches[rank])
    out.sin().sum().backward()
    if options.get("max_norm"):
        plain(torch.cat([batch.flatten() for batch in batches]))  # any rank's lookup rescales a row
    expected = plain(batches[rank])
    assert_parity({"out": out}, {"out": expected}, dtype=F64)
    for batch in batches:
        plain(batch).sin().sum().backward()
    assert_parity(
        {"weight": merged(layer.weight, 1), "weight.grad": merged(layer.weight.grad, 1)},
        {"weight": plain.weight, "weight.grad": plain.weight.grad},
        dtype=F64,
    )
    if layer.padding_idx is not None:
        assert not layer.weight.grad[layer.padding_idx].any()


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        ([(3, 5)] * 2, {}),
        ([(3, 5)] * 4, {"padding_idx": -2}),
        ([(4,), (2, 3)], {"padding_idx": 0, "scale_grad_by_freq": True}),
        ([(), (2,)], {"max_norm": 1.5}),
        ([(3, 2)] * 2, {"max_norm": 0.5, "norm_type": float("inf")}),
        ([(0,), (6, 2)], {"max_norm": 1.0, "norm_type": 1.0}),
    ],
    ids=str,
)
def test_c079_distributed_embedding_equals_embedding(shapes, options):
    run_ranks(check_embedding, len(shapes), shapes, options)


def check_embedding_switches():
    group = everybody()
    rank, size = group.rank_in_group, group.size
    table = batch_of(9, 7, 8)
    with using_tp_group(group):
        inside = DistributedEmbedding(7, 8, _weight=table, _skip_scatter_and_merge=True)
        scaled = DistributedEmbedding(7, 8, _weight=table, _skip_allgather=True)
        both = DistributedEmbedding(7, 8, _weight=table, _skip_allgather=True, _skip_scatter_and_merge=True)
    everyone = torch.cat([ids_of(i, 2, 3) for i in range(size)])
    width = slice(rank * 8 // size, (rank + 1) * 8 // size)
    assert torch.equal(inside(ids_of(rank, 2, 3)), table[everyone][..., width])
    assert torch.equal(both(everyone), table[everyone][..., width])
    assert torch.equal(scaled(everyone), table[ids_of(rank, 2, 3)])
    scaled(everyone).sum().backward()
    counts = torch.bincount(everyone.flatten(), minlength=7).to(F64)
    assert torch.equal(scaled.weight.grad, counts[:, None].expand(7, 8 // size))
    with pytest.raises(TensorParallelError, match=r"shape \(3, 3\) is not divisible"):
        scaled(everyone[:3])
    with pytest.raises(TensorParallelError, match=r"ids must be int64 or int32, got torch.float64"):
        inside(table)


def test_c079_the_switches_of_distributed_embedding():
    run_ranks(check_embedding_switches, 2)


def test_distributed_embedding_construction():
    torch.manual_seed(5)
    table = torch.empty(7, 8).normal_(std=0.02)
    table[6] = 0
    for rank in range(2):
        torch.manual_seed(5)
        with using_tp_group(imaginary(2, rank)):
            layer = DistributedEmbedding(7, 8, padding_idx=-1)
        assert layer.padding_idx == 6
        assert torch.equal(layer.weight, table.chunk(2, 1)[rank])
        torch.manual_seed(5)
        layer.reset_parameters()
        assert torch.equal(layer.weight, table.chunk(2, 1)[rank])
    with using_tp_group(imaginary(2)):
        with pytest.raises(UnsupportedError, match="sparse=True"):
            DistributedEmbedding(7, 8, sparse=True)
        with pytest.raises(TensorParallelError, match="padding_idx=7 is not one of the 7 rows"):
            DistributedEmbedding(7, 8, padding_idx=7)
        with pytest.raises(TensorParallelError, match=r"_weight has shape \(7, 4\), expected the full table \(7, 8\)"):
            DistributedEmbedding(7, 8, _weight=torch.zeros(7, 4))
