"""Language models of the transformer family, wrapped and trained on several ranks, against one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modelparallel as smp
from modelparallel.tensor_parallel.distributed_module import using_tp_group
from parity import assert_ranks_train_as_one, reference_run
from pool import run_ranks
from split_layers import F64, imaginary, settings
from training import sgd, step_of

V, LENGTH = 13, 6
MODELS: dict[str, dict[str, Any]] = {
    "gpt": {"causal_mask_size": LENGTH, "pre_layernorm": True, "post_layernorm": False, "output_layernorm": True},
    "bert": {"num_token_types": 2, "activation": "relu"},
    "crossed": {"add_cross_attention": True, "tie_word_embeddings": False, "lm_head_bias": True},
    "gptj": {
        "causal_mask_size": LENGTH, "pre_layernorm": True, "post_layernorm": False, "output_layernorm": True,
        "num_positions": 0, "rotary_dim": 2, "parallel_attn_output": True, "tie_word_embeddings": False,
        "lm_head_bias": True, "qkv_bias": False, "attention_dense_bias": False, "activation": "gelu_new",
    },
}  # fmt: skip


def make_model(kind: str, **more: Any) -> nn.Module:
    torch.manual_seed(31)
    torch.set_default_dtype(F64)
    try:
        sizes = {"num_layers": 2, "num_attention_heads": 4, "attention_head_size": 4, "hidden_size": 16}
        rest = {"intermediate_size": 32, "vocab_size": V, "num_positions": LENGTH}
        dropout = {"attention_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
        return smp.nn.DistributedTransformerLMHead(**{**sizes, **rest, **dropout, **MODELS[kind], **more})
    finally:
        torch.set_default_dtype(torch.float32)


def make_whole(kind: str) -> nn.Module:
    with using_tp_group(imaginary(1)):
        return make_model(kind)


def batches(kind: str, num_samples: int) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(41)
    result: list[tuple[Tensor, ...]] = []
    for _ in range(3):
        ids, labels = torch.randint(V, (2, num_samples, LENGTH), generator=generator)
        masked = (torch.rand(num_samples, LENGTH, generator=generator) < 0.2).long()
        masked[:, 0] = 0
        labels[:, 3] = -100
        last = (
            torch.randn(num_samples, 3, 16, dtype=F64, generator=generator)
            if kind == "crossed"
            else torch.randint(2, (num_samples, LENGTH), generator=generator)
        )
        result.append((ids, masked, labels, last))
    return result


def loss_of(model: nn.Module, ids: Tensor, masked: Tensor, labels: Tensor, last: Tensor) -> Tensor:
    if last.dim() == 3:
        return model((ids, masked, None, None, last, None, labels))
    return model((ids, masked, last, None, labels))


def gradients_of(model: Any) -> dict[str, Tensor]:
    """Of all stages and slices."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.local_named_parameters():
        row = model.table.row_named(name)
        parts = smp.allgather(parameter.grad, smp.TP_GROUP)
        if row.split is not None:
            found[name] = row.split.join(parts)
        else:
            found[name] = parts[0]
            assert all(torch.allclose(part, parts[0], rtol=1e-12, atol=1e-14) for part in parts), name
    for stage in smp.allgather(found, smp.PP_GROUP):
        found.update(stage)
    return found


def train(kind: str, num_samples: int) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    is_prescaled = smp.state.cfg.prescaled_batch
    size, rank = (smp.rdp_size(), smp.rdp_rank()) if is_prescaled else (smp.dp_size(), smp.dp_rank())
    model = smp.DistributedModel(make_model(kind))
    optimizer = smp.DistributedOptimizer(sgd(model.parameters()))
    train_step = step_of(loss_of)
    losses, gradients = [], {}
    for inputs in batches(kind, num_samples * size):
        own = slice(rank * num_samples, (rank + 1) * num_samples)
        optimizer.zero_grad()
        losses.append(float(train_step(model, *(tensor[own] for tensor in inputs)).reduce_mean()))
        gradients = gradients or gradients_of(model)
        optimizer.step()
    return losses, gradients, model.state_dict()


CASES = [
    ("gpt", 2, settings(2)),
    ("bert", 4, settings(2, microbatches=2, optimize="memory")),
    ("gpt", 4, settings(2, prescaled_batch=True, microbatches=2)),
    ("bert", 4, settings(4, prescaled_batch=True, optimize="memory")),
    ("gpt", 4, settings(2, pp=2, microbatches=2)),
    ("crossed", 4, settings(2, pp=2, microbatches=2, optimize="memory")),
    ("gptj", 4, settings(2, pp=2, microbatches=3, prescaled_batch=True)),
    ("gptj", 2, settings(2, optimize="memory", microbatches=2)),
    ("bert", 2, settings(1, pp=2, microbatches=2)),
    ("gpt", 4, settings(2, pp=2, microbatches=4, pipeline="zero_bubble", tied_weights="replicate")),
]


@pytest.mark.parametrize(("kind", "num_ranks", "parameters"), CASES, ids=lambda value: str(value))
def test_c074_training_equals_one_process(kind: str, num_ranks: int, parameters: dict[str, Any]) -> None:
    num_samples = 3 if parameters["microbatches"] == 3 else 4
    found = run_ranks(train, num_ranks, kind, num_samples, parameters=parameters)
    num_copies = num_ranks // parameters["pipeline_parallel_degree"]
    if parameters.get("prescaled_batch"):
        num_copies //= parameters["tensor_parallel_degree"]
    expected = reference_run(
        lambda: make_whole(kind),
        batches(kind, num_samples * num_copies),
        loss_of,
        num_microbatches=parameters["microbatches"],
        make_optimizer=sgd,
        num_copies=num_copies,
    )
    assert_ranks_train_as_one(found, expected, dtype=F64)
