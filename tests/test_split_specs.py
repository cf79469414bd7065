"""How a tensor is cut over the tensor-parallel ranks: the arithmetic of SplitSpec, without processes."""

from __future__ import annotations

import pytest
import torch

from modelparallel.plan.rows import SplitSpec


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("length", [1, 2, 5, 8])
@pytest.mark.parametrize("tp_size", [1, 2, 3, 4])
def test_one_block_is_cut_as_torch_chunk_does_it(dim, length, tp_size):
    shape = [2, 3, 2]
    shape[dim] = length
    full = torch.arange(2 * 3 * 2 * length).view(-1)[: torch.Size(shape).numel()].view(shape)
    spec = SplitSpec(dim, tuple(shape))
    slices = [spec.slice_of(full, tp_rank, tp_size) for tp_rank in range(tp_size)]
    chunks = full.chunk(tp_size, dim)
    for tp_rank, part in enumerate(slices):
        assert tuple(part.shape) == spec.local_shape(tp_rank, tp_size)
        assert torch.equal(part, chunks[tp_rank]) if tp_rank < len(chunks) else part.numel() == 0
    assert torch.equal(spec.join(slices), full)


@pytest.mark.parametrize("parts", [(8, 4, 4), (4, 4), (6, 2, 2, 6), (5, 3)])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_each_block_of_a_packed_layout_is_cut_for_itself(parts, tp_size):
    full = torch.randn(3, sum(parts))
    spec = SplitSpec(1, tuple(full.shape), parts)
    slices = [spec.slice_of(full, tp_rank, tp_size) for tp_rank in range(tp_size)]
    for tp_rank, own in enumerate(slices):
        blocks = [block.chunk(tp_size, 1) for block in full.split(list(parts), 1)]
        expected = [block[tp_rank] for block in blocks if tp_rank < len(block)]
        assert torch.equal(own, torch.cat([full[:, :0], *expected], 1))
        assert own.shape[1] == spec.local_length(tp_rank, tp_size)
    assert torch.equal(spec.join(slices), full)
