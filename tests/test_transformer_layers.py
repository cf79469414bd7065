"""The split transformer layers against the plain ones, at every tensor parallel degree and in both layouts."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plain_transformer as plain
from modelparallel.nn import (
    DistributedAttentionLayer,
    DistributedLayerNorm,
    DistributedTransformer,
    DistributedTransformerLayer,
    DistributedTransformerLMHead,
    DistributedTransformerOutputLayer,
    FlashAttentionLayer,
)
from modelparallel.tensor_parallel.distributed_module import using_tp_group
from parity import assert_parity
from pool import run_ranks
from split_layers import F64, everybody, gradients, imaginary, make, make_whole, values

H, HEADS, INNER, LENGTH = 16, 4, 32, 5
NO_DROPOUT = {"attention_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
SIZES = {"num_attention_heads": HEADS, "attention_head_size": H // HEADS, "hidden_size": H}
HOW = {"heads": HEADS, "head_size": H // HEADS}
NORMS = [(True, False), (False, True), (True, True)]
LAYOUTS = [{"is_memory": memory, "is_prescaled": prescaled} for memory in (False, True) for prescaled in (False, True)]


def batch(rank: int, *shape: int) -> Tensor:
    """What a rank feeds; every rank can compute that of any other."""
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(1000 + rank))


def some_mask(rank: int, num_samples: int, length: int = LENGTH) -> Tensor:
    """Added to the scores; never all of a row."""
    hidden = torch.rand(num_samples, 1, 1, length, generator=torch.Generator().manual_seed(2000 + rank)) < 0.3
    hidden[..., 0] = False
    return torch.zeros(num_samples, 1, 1, length, dtype=F64).masked_fill(hidden, torch.finfo(F64).min)


def differentiable(tensors: list[Tensor]) -> list[Tensor]:
    """The hidden states among ``tensors`` (masks have 4 dims)."""
    return [tensor.requires_grad_() for tensor in tensors if tensor.is_floating_point() and tensor.dim() == 3]


def compare(build, call, expect, inputs, **settings: Any) -> None:
    """Outputs and all gradients of ``build()`` against the plain maths on the whole parameters.

    ``call(module, *inputs of this rank)`` and ``expect(params, *inputs)`` give a tensor; ``inputs(rank)`` the tensors.
    """
    group = everybody()
    rank, size = group.rank_in_group, group.size
    whole = make_whole(build)
    module = make(build, **settings)
    assert_parity(values(module), whole, dtype=F64)
    is_prescaled = settings.get("is_prescaled", False)
    own = [tensor.clone() for tensor in inputs(0 if is_prescaled else rank)]
    floating = differentiable(own)
    result = call(module, *own)
    result.sin().sum().backward()
    found = {"output": result.detach()}
    found.update({f"input {index}": tensor.grad for index, tensor in enumerate(floating) if tensor.grad is not None})

    params = {name: tensor.clone().requires_grad_() for name, tensor in whole.items()}
    expected: dict[str, Tensor] = {}
    # With a prescaled batch the ranks' losses are equal, and gradients are those of their sum.
    for other in range(size):
        theirs = [tensor.clone() for tensor in inputs(0 if is_prescaled else other)]
        their_floating = differentiable(theirs)
        their_result = expect(params, *theirs)
        their_result.sin().sum().backward()
        if other == rank:
            expected = {"output": their_result.detach()}
            expected.update(
                {f"input {i}": tensor.grad for i, tensor in enumerate(their_floating) if tensor.grad is not None}
            )
    assert_parity(found, expected, dtype=F64)
    assert_parity(gradients(module), {name: tensor.grad for name, tensor in params.items()}, dtype=F64)


def check_attention(settings: dict[str, Any]) -> None:
    for pre, post in NORMS:
        options = {**SIZES, **NO_DROPOUT, "pre_layernorm": pre, "post_layernorm": post}
        for num_samples in ((2, 2, 2, 2), (1, 3, 2, 1)):

            def inputs(rank, num_samples=num_samples):
                return [batch(rank, num_samples[rank], LENGTH, H), some_mask(rank, num_samples[rank])]

            for causal in (False, True):
                compare(
                    lambda causal=causal, options=options: DistributedAttentionLayer(
                        causal_mask_size=8 if causal else None, **options
                    ),
                    lambda module, x, mask: module((x, mask)),
                    lambda params, x, mask, causal=causal: plain.attention(params, "", x, mask, causal=causal, **HOW),
                    inputs,
                    **settings,
                )
    compare(  # without a mask, and with a head size that is not hidden_size / heads
        lambda: DistributedAttentionLayer(
            HEADS, 6, H, 0.0, 0.0, causal_mask_size=LENGTH, use_normal_initialization=True, initializer_range=0.3
        ),
        lambda module, x: module((x, None)),
        lambda params, x: plain.attention(params, "", x, causal=True, heads=HEADS, head_size=6),
        lambda rank: [batch(rank, 2, LENGTH, H)],
        **settings,
    )
    compare(
        lambda: DistributedAttentionLayer(cross_attention=True, pre_layernorm=True, **SIZES, **NO_DROPOUT),
        lambda module, x, states, mask: module((x, states, mask)),
        lambda params, x, states, mask: plain.attention(params, "", x, mask, states=states, **HOW),
        lambda rank: [batch(rank, 2, LENGTH, H), batch(50 + rank, 2, 3, H), some_mask(rank, 2, 3)],
        **settings,
    )
    for extra, how in [
        ({"use_alibi": True}, {"alibi": True}),
        ({"window_size": 2}, {"window": 2}),
        ({"scale_attention_scores": False}, {"scale": 1.0}),
        ({"scale_attn_by_layer_idx": True, "layer_idx": 2}, {"scale": 1 / (H // HEADS) ** 0.5 / 3}),
        ({"qkv_bias": False, "attention_dense_bias": False}, {}),
        ({"attention_in_fp32": True, "query_key_layer_scaling": True, "fused_softmax": False}, {}),
    ]:
        compare(
            lambda extra=extra: DistributedAttentionLayer(causal_mask_size=9, **SIZES, **NO_DROPOUT, **extra),
            lambda module, x, mask, how=how: module((x, None if "window" in how else mask)),
            # A window may hold masked keys alone, and a softmax of nothing means nothing.
            lambda params, x, mask, how=how: plain.attention(
                params, "", x, None if "window" in how else mask, causal=True, **HOW, **how
            ),
            lambda rank: [batch(rank, 2, LENGTH, H), some_mask(rank, 2)],
            **settings,
        )


def check_output_and_norm(settings: dict[str, Any]) -> None:
    for pre, post in NORMS:
        for name, activation in (("gelu", F.gelu), ("relu", F.relu)):
            compare(
                lambda pre=pre, post=post, name=name: DistributedTransformerOutputLayer(
                    H, INNER, 0.0, name, pre_layernorm=pre, post_layernorm=post, fp32_residual_addition=pre
                ),
                lambda module, x: module(x),
                lambda params, x, activation=activation: plain.output_layer(params, "", x, activation=activation),
                lambda rank: [batch(rank, 1 + rank % 2, LENGTH, H)],
                **settings,
            )
    compare(
        lambda: DistributedLayerNorm(H, 1e-3),
        lambda module, x: module(x),
        lambda params, x: plain.layer_norm({f"n.{name}": value for name, value in params.items()}, "n", x, 1e-3),
        lambda rank: [batch(rank, 2, LENGTH, H) * 3 + 7],
        **settings,
    )


def check_layer_and_stack(settings: dict[str, Any]) -> None:
    for pre, post in NORMS:
        options = {**SIZES, **NO_DROPOUT, "intermediate_size": INNER, "pre_layernorm": pre, "post_layernorm": post}
        compare(
            lambda options=options: DistributedTransformerLayer(causal_mask_size=LENGTH, **options),
            lambda module, x, mask: module((x, mask))[0],
            lambda params, x, mask: plain.layer(params, "", x, mask, causal=True, **HOW),
            lambda rank: [batch(rank, 1 + rank % 2, LENGTH, H), some_mask(rank, 1 + rank % 2)],
            **settings,
        )
        compare(
            lambda options=options: DistributedTransformerLayer(add_cross_attention=True, activation="relu", **options),
            lambda module, x, states, mask, cross_mask: module((x, states, mask, cross_mask))[0],
            lambda params, x, states, mask, cross_mask: plain.layer(
                params, "", x, mask, cross=(states, cross_mask), activation=F.relu, **HOW
            ),
            lambda rank: [
                batch(rank, 2, LENGTH, H),
                batch(50 + rank, 2, 3, H),
                some_mask(rank, 2),
                some_mask(90 + rank, 2, 3),
            ],
            **settings,
        )
        compare(
            lambda options=options: DistributedTransformer(num_layers=2, window_size=[None, 2], **options),
            lambda module, x: module((x, None))[0],
            lambda params, x: plain.stack(params, "", x, windows=[None, 2], **HOW),
            lambda rank: [batch(rank, 2, LENGTH, H)],
            **settings,
        )
    compare(
        lambda: DistributedTransformer(
            2, HEADS, H // HEADS, H, INNER, 0.0, 0.0, parallel_attn_output=True, scale_attn_by_layer_idx=True,
            pre_layernorm=True, post_layernorm=False, output_layernorm=True,
        ),
        lambda module, x: module((x,))[0],
        lambda params, x: plain.stack(params, "", x, parallel=True, scale_by_index=True, **HOW),
        lambda rank: [batch(rank, 2, LENGTH, H)],
        **settings,
    )  # fmt: skip


V, POSITIONS = 11, 7


def tokens(rank: int, num_samples: int, high: int = V, length: int = LENGTH) -> Tensor:
    return torch.randint(high, (num_samples, length), generator=torch.Generator().manual_seed(3000 + rank))


def lm_inputs(rank: int, num_samples: int) -> tuple[Tensor, ...]:
    """(ids, masked, token types, positions, labels)."""
    generator = torch.Generator().manual_seed(4000 + rank)
    masked = (torch.rand(num_samples, LENGTH, generator=generator) < 0.3).long()
    masked[:, 0] = 0
    positions = torch.randint(POSITIONS, (num_samples, LENGTH), generator=generator)
    labels = tokens(100 + rank, num_samples)
    labels[0, 2:4] = -100
    return tokens(rank, num_samples), masked, tokens(50 + rank, num_samples, 2), positions, labels


LM = {
    "num_layers": 2, **SIZES, "intermediate_size": INNER, "vocab_size": V, "num_positions": POSITIONS, **NO_DROPOUT,
}  # fmt: skip


def check_lm_head(settings: dict[str, Any]) -> None:
    variants: list[tuple[dict[str, Any], bool]] = [
        ({"causal_mask_size": POSITIONS, "pre_layernorm": True, "post_layernorm": False}, True),
        ({"num_token_types": 2}, False),
        ({"tie_word_embeddings": False, "lm_head_bias": True, "output_layernorm": True}, False),
        ({"distribute_embedding": False, "num_token_types": 2}, False),
    ]
    for options, shifted in variants:
        for needs_logits in (False, True, None):
            counts = (2, 1, 2, 3)

            def split(module, ids, masked, types, positions, labels, needs_logits=needs_logits):
                types = types if module.num_token_types else None
                if needs_logits is None:
                    return module((ids, masked, types, positions))
                result = module((ids, masked, types, positions, labels), return_logits=needs_logits)
                return torch.cat([result[0].view(1), result[1].flatten()]) if needs_logits else result

            def whole(
                params, ids, masked, types, positions, labels, needs_logits=needs_logits, options=options,
                shifted=shifted,
            ):  # fmt: skip
                types = types if options.get("num_token_types") else None
                logits = plain.lm_head(params, (ids, masked, types, positions), causal=shifted, **HOW)
                if needs_logits is None:
                    return logits
                loss = plain.lm_loss(logits, labels, shifted=shifted)
                return torch.cat([loss.view(1), logits.flatten()]) if needs_logits else loss

            compare(
                lambda options=options: DistributedTransformerLMHead(**LM, **options),
                split,
                whole,
                lambda rank, counts=counts: lm_inputs(rank, counts[rank]),
                **settings,
            )


def check_all(settings: dict[str, Any], part: str) -> None:
    checks = {"attention": [check_attention], "layers": [check_output_and_norm, check_layer_and_stack]}
    for check in checks.get(part, [check_lm_head]):
        check(settings)


@pytest.mark.parametrize("settings", LAYOUTS, ids=lambda s: f"{'memory' if s['is_memory'] else 'speed'}-{'prescaled' if s['is_prescaled'] else 'own'}")  # fmt: skip  # noqa: E501
@pytest.mark.parametrize("part", ["attention", "layers", "lm_head"])
@pytest.mark.parametrize("tp", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_c077_each_class_equals_its_reference(tp, part, settings):
    run_ranks(check_all, tp, settings, part)


def check_hidden_shapes() -> None:
    size = everybody().size
    for is_memory in (False, True):
        width = H // size if is_memory else H
        module = make(lambda: DistributedTransformer(2, HEADS, 4, H, INNER, 0.0, 0.0), is_memory=is_memory)
        seen: list[tuple[int, ...]] = []
        for layer in module.seq_layers:
            layer.register_forward_hook(lambda module, args, output, seen=seen: seen.append(tuple(output[0].shape)))
        result = module((batch(0, 3, LENGTH, H), None))
        assert tuple(result[0].shape) == (3, LENGTH, H) and result[1] is None
        assert seen == [(3 * size, LENGTH, width)] * 2
        norms = [part for part in module.modules() if isinstance(part, DistributedLayerNorm)]
        assert norms and all(tuple(norm.weight.shape) == (width,) for norm in norms)
        assert all(bool(norm.split_tensors()) == is_memory for norm in norms)
        assert all(norm.scaled_batch_tensors() == {"weight", "bias"} for norm in norms)


def test_c078_layouts_between_the_layers():
    run_ranks(check_hidden_shapes, 2)


def test_c077_without_any_layernorm_it_is_refused():
    with using_tp_group(imaginary(1)):
        for cls in (
            DistributedAttentionLayer,
            DistributedTransformerOutputLayer,
            DistributedTransformerLayer,
            DistributedTransformer,
            DistributedTransformerLMHead,
        ):
            with pytest.raises(ValueError, match="pre_layernorm and post_layernorm are both False"):
                cls(pre_layernorm=False, post_layernorm=False, hidden_size=32)


def signature_of(cls: type) -> list[tuple[str, Any]]:
    return [
        (one.name, one.default)
        for one in inspect.signature(cls).parameters.values()
        if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]


def test_signatures_are_the_documented_ones():
    layer = [
        ("num_attention_heads", 32), ("attention_head_size", 32), ("hidden_size", 1024), ("intermediate_size", 4096),
        ("attention_dropout_prob", 0.1), ("hidden_dropout_prob", 0.1), ("activation", "gelu"),
        ("layernorm_epsilon", 1e-5), ("initializer_range", 0.02), ("use_normal_initialization", False),
        ("causal_mask_size", None), ("add_cross_attention", False), ("pre_layernorm", False), ("post_layernorm", True),
    ]  # fmt: skip
    assert signature_of(DistributedTransformerLayer) == layer
    assert signature_of(DistributedTransformer) == [("num_layers", 12), *layer]
    assert signature_of(DistributedTransformerLMHead) == [
        ("num_layers", 12), *layer[:4], ("vocab_size", 30522), ("num_positions", 1024), *layer[4:8],
        ("num_token_types", 0), ("causal_mask_size", None), ("add_cross_attention", False), ("add_lm_head", True),
        *layer[8:10], *layer[12:],
    ]  # fmt: skip
    assert signature_of(DistributedAttentionLayer) == [
        *layer[:3], *layer[4:6], *layer[7:10], ("cross_attention", False), ("causal_mask_size", None), *layer[12:],
    ]  # fmt: skip
    assert signature_of(DistributedTransformerOutputLayer) == [
        *layer[2:4], *layer[5:10], *layer[12:], ("fp32_residual_addition", False),
    ]  # fmt: skip
    assert signature_of(FlashAttentionLayer) == [
        ("attention_dropout_prob", 0.1), ("attention_head_size", None), ("scale_attention_scores", True),
        ("scale_attn_by_layer_idx", False), ("layer_idx", None), ("scale", None), ("triton_flash_attention", False),
        ("use_alibi", False),
    ]  # fmt: skip
    for name in (
        "attention_in_fp32 query_key_layer_scaling fused_softmax fused_bias_gelu fused_dropout flash_attention "
        "fp32_residual_addition use_alibi distribute_embedding zero_init scale_attention_scores alibi_bias_max"
    ).split():
        assert name in inspect.signature(DistributedTransformerLMHead).parameters, name
        assert name in inspect.signature(DistributedTransformer).parameters, name


def test_c081_flash_attention_layer():
    qkv = torch.randn(2, 5, 3, 4, 6, dtype=F64)
    query, key, value = (qkv[:, :, index].transpose(1, 2) for index in range(3))
    layer = FlashAttentionLayer(0.0, 6, scale_attn_by_layer_idx=True, layer_idx=2)
    assert layer.scale == pytest.approx(1 / (6**0.5 * 3))
    assert FlashAttentionLayer(0.0, 6, scale_attn_by_layer_idx=True, layer_idx=2, scale=0.7).scale == 0.7
    assert FlashAttentionLayer(0.0, scale_attention_scores=False).scale == 1.0
    with pytest.raises(ValueError, match="needs attention_head_size"):
        FlashAttentionLayer(0.0)
    with pytest.raises(ValueError, match="needs layer_idx"):
        FlashAttentionLayer(0.0, 6, scale_attn_by_layer_idx=True)
    with pytest.raises(ValueError, match=r"shape \(2, 5, 4, 6\), expected \[N, S, 3"):
        layer(qkv[:, :, 0])
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    mask = torch.randn(2, 1, 1, 5, dtype=F64)
    for causal in (False, True):
        for added in (None, mask):
            scores = query @ key.transpose(-1, -2) * layer.scale
            scores = scores if added is None else scores + added
            scores = scores.masked_fill(later, float("-inf")) if causal else scores
            result = layer(qkv, added, causal)
            assert result.shape == (2, 4, 5, 6)
            torch.testing.assert_close(result, scores.softmax(-1) @ value, rtol=1e-10, atol=1e-12)
    assert isinstance(layer, nn.Module) and not list(layer.parameters())
    dropping = FlashAttentionLayer(0.5, 6)
    assert not torch.equal(dropping(qkv), dropping(qkv)) and torch.equal(dropping.eval()(qkv), dropping(qkv))
