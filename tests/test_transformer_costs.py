"""What the split layers send and keep: bytes by the formulas of the documents, memory by the degree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from communication_bytes import CountSentBytes
from modelparallel.nn import DistributedTransformer, DistributedTransformerLayer, DistributedTransformerLMHead
from modelparallel.tensor_parallel.distributed_module import using_tp_group
from pool import run_ranks
from split_layers import F64, everybody, imaginary, make

H, HEADS, LENGTH, SAMPLES, V = 32, 4, 8, 3, 24
ITEM = 8  # bytes of a float64
NORMS = {"pre_layernorm": True, "post_layernorm": False}


def make_layer() -> nn.Module:
    return DistributedTransformerLayer(HEADS, H // HEADS, H, 4 * H, 0.0, 0.0, **NORMS)


def count(module: nn.Module, call: Any, *inputs: Tensor) -> tuple[int, int]:
    """Bytes sent forward and backward."""
    with CountSentBytes() as forward:
        output = call(module, *inputs)
    with CountSentBytes() as backward:
        output.sum().backward()
    return forward.total, backward.total


def check_layer_bytes(is_memory: bool, is_prescaled: bool) -> None:
    size = everybody().size
    layer = make(make_layer, is_memory=is_memory, is_prescaled=is_prescaled)
    layer.is_inner = True
    rows = size * SAMPLES * LENGTH
    whole = rows * H * ITEM
    width = H // size if is_memory else H
    x = torch.randn(size * SAMPLES, LENGTH, width, dtype=F64, requires_grad=True)
    found = count(layer, lambda layer, x: layer((x, None))[0], x)
    fraction = (size - 1) / size
    # Two pairs of a column- and a row-parallel map.
    all_reduce = (size - 1) * whole if size == 2 or whole <= 32768 else 2 * fraction * whole
    if not is_memory:
        assert found == (2 * all_reduce, 2 * all_reduce)
        return
    statistics = 2 * (size - 1) * 2 * rows * ITEM  # of two LayerNorms, to every other rank
    assert found[0] == 4 * fraction * whole + statistics
    assert found[1] == 6 * fraction * whole + statistics


def check_edges() -> None:
    """Entering and leaving a stack, whose layers cost what they cost above."""
    size = everybody().size
    fraction = (size - 1) / size
    own = SAMPLES * LENGTH * H * ITEM
    for is_memory in (False, True):
        stack = make(
            lambda: DistributedTransformer(1, HEADS, H // HEADS, H, 4 * H, 0.0, 0.0, **NORMS), is_memory=is_memory
        )
        x = torch.randn(SAMPLES, LENGTH, H, dtype=F64, requires_grad=True)
        whole = count(stack, lambda stack, x: stack((x, None))[0], x)
        stack.is_inner = True
        width = H // size if is_memory else H
        inner = torch.randn(size * SAMPLES, LENGTH, width, dtype=F64, requires_grad=True)
        inside = count(stack, lambda stack, x: stack((x, None))[0], inner)
        edges = [total - part for total, part in zip(whole, inside, strict=True)]
        # speed: rows are gathered on the way in, their gradients on the way out; memory: an all-to-all each time.
        expected = [2 * fraction * own] * 2 if is_memory else [(size - 1) * own] * 2
        assert edges == expected, (is_memory, edges, expected)


def check_logits_are_never_gathered() -> None:
    size = everybody().size
    ids = torch.randint(V, (SAMPLES, LENGTH))
    for is_memory in (False, True):
        sent = {}
        for vocab_size in (V, 10 * V):
            model = make(
                lambda vocab_size=vocab_size: DistributedTransformerLMHead(
                    1, HEADS, H // HEADS, H, 4 * H, vocab_size, LENGTH, 0.0, 0.0, causal_mask_size=LENGTH, **NORMS
                ),
                is_memory=is_memory,
            )
            sent[vocab_size] = count(model, lambda model, ids: model((ids, None, None, None, ids)), ids)
        assert sent[V] == sent[10 * V]  # nothing that is sent grows with the vocabulary
        with CountSentBytes() as counted:
            logits = model((ids,))
        assert logits.shape == (SAMPLES, LENGTH, 10 * V)
        own_logits = SAMPLES * LENGTH * 10 * V * ITEM
        assert counted.total >= (size - 1) / size * own_logits  # the counter sees it where it happens


@pytest.mark.parametrize("tp", [2, 4])
def test_bytes_are_those_of_the_documents(tp: int) -> None:
    run_ranks(check_all_bytes, tp)


def check_all_bytes() -> None:
    for is_memory in (False, True):
        for is_prescaled in (False, True):
            check_layer_bytes(is_memory, is_prescaled)
    check_edges()
    check_logits_are_never_gathered()


def saved_bytes(module: nn.Module, call: Any) -> int:
    """What autograd keeps for backward, parameters apart, each storage once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        output = call()
    del output
    return sum(size for pointer, size in found.items() if pointer not in own)


def check_saved_activations() -> None:
    size = everybody().size
    hidden, samples = 128, 2
    x = torch.randn(samples * size, 64, hidden)

    def make_wide() -> nn.Module:
        return DistributedTransformerLayer(HEADS, hidden // HEADS, hidden, 4 * hidden, 0.0, 0.0, **NORMS)

    with using_tp_group(imaginary(1)):
        unsplit = make_wide()
    reference = saved_bytes(unsplit, lambda: unsplit((x.clone().requires_grad_(), None))[0])
    layer = make(make_wide, dtype=torch.float32, is_memory=True)
    layer.is_inner = True
    part = x.chunk(size, -1)[everybody().rank_in_group].contiguous()
    kept = saved_bytes(layer, lambda: layer((part.clone().requires_grad_(), None))[0])
    assert kept <= (1 / size + 0.05) * reference, (kept, reference, kept / reference)


@pytest.mark.parametrize("tp", [2, 4])
def test_saved_activations_of_the_memory_layout(tp: int) -> None:
    run_ranks(check_saved_activations, tp)
