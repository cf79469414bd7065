"""The split layers in half precision and under autocast, against the same in float64."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from communication_bytes import CountSentBytes
from modelparallel.nn import DistributedTransformerLayer, DistributedTransformerLMHead
from pool import run_ranks
from split_layers import F64, everybody, gradients, make

H, HEADS, LENGTH, V = 32, 4, 6, 20


def make_lm() -> nn.Module:
    return DistributedTransformerLMHead(
        2, HEADS, H // HEADS, H, 4 * H, V, LENGTH, 0.0, 0.0, causal_mask_size=LENGTH, pre_layernorm=True,
        post_layernorm=False, output_layernorm=True, fp32_residual_addition=True, attention_in_fp32=True,
    )  # fmt: skip


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of all tensors together."""
    difference = sum(float((found[name].double() - tensor).square().sum()) for name, tensor in expected.items())
    return (difference / sum(float(tensor.square().sum()) for tensor in expected.values())) ** 0.5


def run(dtype: torch.dtype, is_memory: bool, autocast: torch.dtype | None) -> tuple[dict[str, Tensor], set[Any], int]:
    model = make(make_lm, dtype=F64, is_memory=is_memory).to(dtype)
    ids = torch.randint(V, (2, LENGTH), generator=torch.Generator().manual_seed(everybody().rank_in_group))
    context = torch.autocast("cpu", dtype=autocast) if autocast is not None else contextlib.nullcontext()
    with CountSentBytes() as counted, context:
        loss = model((ids, None, None, None, ids))
        logits = model((ids,))
    assert loss.dtype in (torch.float32, F64)
    (loss + logits.float().square().mean()).backward()
    found = gradients_of(model)
    found["loss"], found["logits"] = loss.detach(), logits.detach()
    return found, {parameter.grad.dtype for parameter in model.parameters()} | {logits.dtype}, counted.total


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """In float64, so that the comparison over the ranks is one of equal numbers."""
    return {name: tensor.double() for name, tensor in gradients(model).items()}


def check_dtypes() -> None:
    for is_memory in (False, True):
        expected, _, _ = run(F64, is_memory, None)
        single, _, single_bytes = run(torch.float32, is_memory, None)
        assert relative_error(single, expected) < 1e-5
        for dtype in (torch.bfloat16, torch.float16):
            found, dtypes, _ = run(dtype, is_memory, None)
            assert dtypes == {dtype}
            limit = 0.03 if dtype == torch.bfloat16 else 0.005
            assert relative_error(found, expected) < limit, (dtype, is_memory, relative_error(found, expected))
        found, dtypes, cast_bytes = run(torch.float32, is_memory, torch.bfloat16)
        assert dtypes == {torch.float32, torch.bfloat16}  # gradients and logits
        assert relative_error(found, expected) < 0.03
        assert cast_bytes < 0.75 * single_bytes  # what the linear maps exchange is half as long


def test_half_precision_and_autocast() -> None:
    run_ranks(check_dtypes, 2)


def check_frozen() -> None:
    """Parts without gradients: a frozen weight, a frozen input, no gradients at all."""
    for is_memory in (False, True):
        layer = make(lambda: DistributedTransformerLayer(HEADS, H // HEADS, H, 4 * H, 0.0, 0.0), is_memory=is_memory)
        x = torch.randn(2, LENGTH, H, dtype=F64)
        with torch.no_grad():
            assert not layer((x, None))[0].requires_grad
        layer((x, None))[0].sin().sum().backward()
        whole = gradients(layer)
        layer.zero_grad()
        layer.attention.qkv.weight.requires_grad_(False)
        layer.output.dense2.weight.requires_grad_(False)
        layer((x, None))[0].sin().sum().backward()
        for name, grad in gradients(layer).items():
            frozen = name in ("attention.qkv.weight", "output.dense2.weight")
            torch.testing.assert_close(grad, torch.zeros_like(grad) if frozen else whole[name])
        layer.requires_grad_(False)
        x.requires_grad_()
        layer((x, None))[0].sin().sum().backward()
        assert x.grad is not None and float(x.grad.abs().sum()) > 0


def test_frozen_parameters() -> None:
    run_ranks(check_frozen, 2)


def check_second_backward() -> None:
    model = make(make_lm, is_memory=True)
    ids = torch.arange(LENGTH).unsqueeze(0)
    loss = model((ids, None, None, None, ids))
    loss.backward(retain_graph=True)
    first = gradients(model)
    loss.backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, 2 * first[name], rtol=1e-9, atol=1e-12)
    layer = make(lambda: DistributedTransformerLayer(HEADS, H // HEADS, H, 4 * H, 0.0, 0.0))
    x = torch.randn(1, LENGTH, H, dtype=F64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer((x, None))[0].sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_graph_may_be_walked_twice_and_says_that_it_has_no_second_derivative() -> None:
    run_ranks(check_second_backward, 2)
