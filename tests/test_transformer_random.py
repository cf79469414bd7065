"""Dropout and initial weights of the split layers: what agrees over the ranks, what differs, and what does not depend
on the tensor parallel degree; inputs that do not fit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modelparallel.errors import DivergenceError, TensorParallelError
from modelparallel.nn import (
    DistributedAttentionLayer,
    DistributedTransformer,
    DistributedTransformerLayer,
    DistributedTransformerLMHead,
)
from modelparallel.tensor_parallel.distributed_module import using_tp_group
from modelparallel.tensor_parallel.placements import NotSplittableError
from parity import assert_parity
from pool import run_ranks
from split_layers import F64, everybody, gradients, imaginary, make, make_whole, specs_of

H, HEADS, LENGTH, V = 16, 4, 5, 11
SIZES = {"num_attention_heads": HEADS, "attention_head_size": H // HEADS, "hidden_size": H}


def make_stack(attention_dropout: float, deterministic: bool = False) -> nn.Module:
    return DistributedTransformer(
        2, HEADS, 4, H, 2 * H, attention_dropout, 0.3, causal_mask_size=LENGTH, deterministic_dropout=deterministic
    )


def whole_batch() -> Tensor:
    return torch.randn(4, LENGTH, H, dtype=F64, generator=torch.Generator().manual_seed(3))


def run_stack(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    torch.manual_seed(77)
    output = module((x, None))[0]
    output.sin().sum().backward()
    assert x.grad is not None
    return output.detach(), x.grad


def check_dropout_does_not_depend_on_the_degree() -> None:
    group = everybody()
    x = whole_batch()
    own = slice(group.rank_in_group * 4 // group.size, (group.rank_in_group + 1) * 4 // group.size)
    for attention_dropout, deterministic in ((0.0, False), (0.4, True)):
        with using_tp_group(imaginary(1)):
            torch.manual_seed(0)
            unsplit = make_stack(attention_dropout, deterministic).double()
        expected, expected_grad = run_stack(unsplit, x)
        assert (expected - run_stack(unsplit.eval(), x)[0]).abs().max() > 0.1  # it drops something
        for is_memory in (False, True):
            for is_prescaled in (False, True):
                with using_tp_group(group, is_memory=is_memory, is_prescaled=is_prescaled):
                    torch.manual_seed(0)
                    module = make_stack(attention_dropout, deterministic).double()
                part = slice(None) if is_prescaled else own
                output, grad = run_stack(module, x[part])
                torch.testing.assert_close(output, expected[part], rtol=1e-9, atol=1e-11)
                torch.testing.assert_close(grad, expected_grad[part], rtol=1e-9, atol=1e-11)


def check_attention_masks_differ_over_the_ranks() -> None:
    group = everybody()
    layer = make(lambda: DistributedAttentionLayer(**SIZES, attention_dropout_prob=0.5, hidden_dropout_prob=0.5))
    with torch.no_grad():  # all heads compute the same, but for dropout
        width = H // HEADS
        maps = layer.qkv.weight.unflatten(0, (3, -1))
        head = maps[:, :width].clone()
        dist.broadcast(head, 0)
        maps.copy_(head.repeat(1, maps.shape[1] // width, 1))
        layer.qkv.bias.zero_()
    seen: list[Tensor] = []
    layer.dense.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    layer.is_inner = True
    torch.manual_seed(5 + group.rank_in_group)  # the ranks' own generators stand at different places
    x = whole_batch()
    output = layer((x, None))
    contexts: list[Any] = [None] * group.size
    outputs: list[Any] = [None] * group.size
    dist.all_gather_object(contexts, seen[0])
    dist.all_gather_object(outputs, output.detach())
    assert all(torch.equal(outputs[0], other) for other in outputs)  # the replicated mask is the same
    for rank in range(1, group.size):
        assert not torch.allclose(contexts[0], contexts[rank])
    layer.eval()
    layer((x, None))
    dist.all_gather_object(contexts, seen[1])
    assert all(torch.allclose(contexts[0], other) for other in contexts)


def check_recomputation() -> None:
    """A layer in torch.utils.checkpoint draws the same masks again."""
    x = whole_batch()
    found = []
    for recompute in (False, True):
        layer = make(lambda: DistributedTransformerLayer(**SIZES, intermediate_size=2 * H), is_memory=True)
        own = x.clone().requires_grad_()
        torch.manual_seed(9)
        output = checkpoint(layer, (own, None), use_reentrant=False)[0] if recompute else layer((own, None))[0]
        output.sin().sum().backward()
        found.append({"output": output.detach(), "input": own.grad, **gradients(layer)})
    assert_parity(found[1], found[0], dtype=F64)


def check_random() -> None:
    check_dropout_does_not_depend_on_the_degree()
    check_attention_masks_differ_over_the_ranks()
    check_recomputation()


@pytest.mark.parametrize("tp", [2, 4])
def test_dropout_masks(tp: int) -> None:
    run_ranks(check_random, tp)


@pytest.mark.parametrize("normal", [False, True])
def test_c080_initial_weights_do_not_depend_on_the_degree(normal: bool) -> None:
    def build() -> nn.Module:
        return DistributedTransformerLMHead(
            2, HEADS, 4, H, 2 * H, V, 7, num_token_types=2, use_normal_initialization=normal, add_cross_attention=True,
            tie_word_embeddings=False, lm_head_bias=True,
        )  # fmt: skip

    whole = make_whole(build, seed=4)
    for size in (2, 4):
        for is_memory in (False, True):
            parts = []
            for rank in range(size):
                torch.manual_seed(4)
                torch.set_default_dtype(F64)
                with using_tp_group(imaginary(size, rank), is_memory=is_memory):
                    parts.append(build())
                torch.set_default_dtype(torch.float32)
            specs = specs_of(parts[0])
            for name, full in whole.items():
                slices = [dict(part.named_parameters())[name].detach() for part in parts]
                assert torch.equal(specs[name].join(slices) if name in specs else slices[0], full), name
    weight = whole["transformer.seq_layers.0.output.dense1.weight"]
    assert abs(float(weight.std()) - (0.02 if normal else 1 / (3 * H) ** 0.5)) < 0.01
    assert float(whole["transformer.seq_layers.0.output.dense1.bias"].abs().max() > 0) == float(not normal)


# What does not fit


def build_with(tp: int, cls: Any, **arguments: Any) -> nn.Module:
    with using_tp_group(imaginary(tp)):
        return cls(**arguments)


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (
            DistributedTransformerLayer,
            {"num_attention_heads": 6},
            "num_attention_heads of a DistributedAttentionLayer is 6, not divisible by tensor_parallel_degree=4: use "
            "one of the degrees 1, 2, 3, 6",
        ),
        (DistributedTransformerLayer, {"hidden_size": 30}, "hidden_size of a .* is 30, not divisible"),
        (DistributedTransformerLayer, {"intermediate_size": 10}, "intermediate_size of a .* is 10, not divisible"),
        (DistributedTransformerLayer, {"activation": "swish2"}, "activation='swish2' is not one of gelu"),
        (
            DistributedTransformerLayer,
            {"atention_in_fp32": True},
            "unknown argument atention_in_fp32; besides the documented ones there are .*attention_in_fp32",
        ),
        (DistributedTransformer, {"num_layers": 2, "window_size": [1]}, "window_size has 1 entries for 2 layers"),
        (DistributedTransformerLayer, {"parallel_attn_output": True}, "parallel_attn_output=True needs pre_layernorm="),
        (DistributedTransformerLMHead, {"vocab_size": 0}, "vocab_size=0 must be at least 1"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_arguments_that_do_not_fit(cls: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TensorParallelError, match=message):
        build_with(4, cls, **arguments)


def test_sizes_that_do_not_divide_leave_a_marked_module_as_it_is() -> None:
    with pytest.raises(NotSplittableError):
        build_with(4, DistributedTransformerLayer, num_attention_heads=6)


def test_inputs_that_do_not_fit() -> None:
    lm = build_with(1, DistributedTransformerLMHead, num_layers=1, **SIZES, intermediate_size=H, vocab_size=V,
                    num_positions=LENGTH, causal_mask_size=LENGTH)  # fmt: skip
    ids = torch.zeros(2, LENGTH, dtype=torch.long)
    cases: list[tuple[Any, Any, str]] = [
        (lm, (torch.zeros(2, LENGTH + 1, dtype=torch.long),), "6 positions, more than num_positions=5"),
        (lm, (ids, ids[:, :3]), r"attention_mask has shape \(2, 3\), input_ids \(2, 5\)"),
        (lm, (ids, None, None, None, ids[:1, :2]), r"labels has shape \(1, 2\)"),
        (lm, (ids, None, None, None, None, None), r"got 6 entries, expected one tuple \(input_ids, attention_mask"),
    ]
    layer = build_with(1, DistributedTransformerLayer, **SIZES, intermediate_size=H, causal_mask_size=LENGTH)
    x = torch.zeros(2, LENGTH, H)
    cases += [
        (layer, (x, torch.zeros(2, LENGTH)), r"attention_mask has shape \(2, 5\), expected \[N, 1, 1, S\]"),
        (layer, (torch.zeros(2, LENGTH + 1, H), None), "6 positions, more than causal_mask_size=5"),
        (layer, (x, None, None, None), r"got 4 entries, expected one tuple \(hidden_states, attention_mask\)"),
    ]
    crossed = build_with(1, DistributedTransformerLayer, **SIZES, intermediate_size=H, add_cross_attention=True)
    cases += [(crossed, (x,), "cross_states are missing")]
    for module, inputs, message in cases:
        with pytest.raises(TensorParallelError, match=message):
            module(inputs)


def check_ranks_that_disagree() -> None:
    rank = everybody().rank_in_group
    lm = make(lambda: DistributedTransformerLMHead(1, **SIZES, intermediate_size=H, vocab_size=V, num_positions=9))
    with pytest.raises(TensorParallelError, match=r"must agree in number, and in all dims.*ranks 0 and 1 of the group"):
        lm((torch.zeros(2, 5 + rank, dtype=torch.long),))
    with pytest.raises(TensorParallelError, match="must agree in number"):
        lm((torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 5, dtype=torch.long) if rank else None))
    stack = make(lambda: make_stack(0.0))
    with pytest.raises(TensorParallelError, match="must agree in number"):
        stack((torch.zeros(2, 3 + rank, H, dtype=F64), None))
    checked = make(
        lambda: DistributedTransformerLMHead(1, **SIZES, intermediate_size=H, vocab_size=V, num_positions=9),
        is_prescaled=True,
        is_debug=True,
    )
    checked((torch.ones(2, 5, dtype=torch.long),))
    with pytest.raises(DivergenceError, match=r"must feed the same batch, but input 0 .* of rank"):
        checked((torch.full((2, 5), rank),))


def test_ranks_that_disagree_are_told() -> None:
    run_ranks(check_ranks_that_disagree, 2)
