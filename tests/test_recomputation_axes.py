"""Activation checkpointing together with tensor and data parallelism, virtual stages, and Hugging Face models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modelparallel as smp
from parity import assert_parity
from pool import run_ranks
from recomputation_models import Block, num_runs, same_random_numbers
from training import square_loss, step_of

F64 = torch.float64
V, LENGTH = 19, 6


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=V, max_position_embeddings=LENGTH, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=4, n_head=2, n_positions=LENGTH))


class Stack(nn.Module):
    """Embedding, blocks with dropout, head; called as a language model."""

    def __init__(self, num_blocks: int = 8) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, 16), nn.Linear(16, V)
        self.blocks = nn.Sequential(*(Block(16) for _ in range(num_blocks)))

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.blocks(self.embed(input_ids)))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


MODELS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "gpt2": gpt2, "stack": Stack}


def mark_all(model: Any) -> None:
    smp.set_activation_checkpointing(model)


def mark_layers(model: Any) -> None:
    root = model.get_module()
    for part in (root.model.layers, root.model.layers[0].mlp) if hasattr(root, "model") else (root.transformer.h,):
        smp.set_activation_checkpointing(part)


def mark_blocks(model: Any) -> None:
    smp.set_activation_checkpointing(model.get_module().blocks, strategy="group_2")


MARKS: dict[str, Callable[[Any], None]] = {"all": mark_all, "layers": mark_layers, "blocks": mark_blocks}


def losses_and_weights(kind: str, how: str, *, is_split: bool) -> tuple[list[float], dict[str, Tensor], list[int], Any]:
    """Three steps of SGD; every data-parallel rank has a batch of its own."""
    torch.manual_seed(5)
    made = MODELS[kind]().to(F64).train()
    if how.startswith("enable"):
        made.gradient_checkpointing_enable({"use_reentrant": how == "enable reentrant"})
    if is_split:
        smp.set_tensor_parallelism(made)
    model = smp.DistributedModel(made)
    if how in MARKS:
        MARKS[how](model)
    optimizer = smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))

    @smp.step
    def train_step(model: Any, ids: Tensor) -> Tensor:
        loss = model(input_ids=ids, labels=ids)["loss"]
        model.backward(loss)
        return loss

    losses = []
    with same_random_numbers():
        for step in range(3):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(10 * step + smp.dp_rank())
            losses.append(float(train_step(model, torch.randint(V, (8, LENGTH), generator=generator)).reduce_mean()))
            optimizer.step()
    return losses, model.state_dict(), num_runs(model.module), model._runtime.engine.plans.counts


def run_all(kind: str, hows: list[str], is_split: bool) -> list[Any]:
    return [losses_and_weights(kind, how, is_split=is_split) for how in ["plain", *hows]]


SETTINGS = [
    # (model, ways, processes, parameters)
    ("gpt2", ["enable", "enable reentrant", "all", "layers"], 2, {"pipeline_parallel_degree": 2}),
    pytest.param("gpt2", ["enable", "enable reentrant", "all", "layers"], 1, {}, marks=pytest.mark.slow),
    pytest.param("llama", ["enable", "enable reentrant", "all", "layers"], 3,
     {"pipeline_parallel_degree": 3, "pipeline": "zero_bubble"}, marks=pytest.mark.slow),
    pytest.param("llama", ["enable", "enable reentrant", "all", "layers"], 4,
     {"pipeline_parallel_degree": 2, "tensor_parallel_degree": 2}, marks=pytest.mark.slow),
    ("llama", ["all"], 4, {"pipeline_parallel_degree": 2, "tensor_parallel_degree": 2}),
    pytest.param("llama", ["enable", "all", "layers"], 2, {"tensor_parallel_degree": 2}, marks=pytest.mark.slow),
    ("stack", ["all", "blocks"], 4, {"pipeline_parallel_degree": 2}),
    ("stack", ["all", "blocks"], 2, {"pipeline_parallel_degree": 2, "virtual_pipeline_degree": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "hows", "num_ranks", "more"), SETTINGS)
def test_c083_same_training_with_every_axis(kind: str, hows: list[str], num_ranks: int, more: dict[str, Any]) -> None:
    is_split = "tensor_parallel_degree" in more
    parameters = {"microbatches": 4, "ddp": True, "timeout_seconds": 20, **more}
    found = run_ranks(run_all, num_ranks, kind, hows, is_split, parameters=parameters)
    for results in found:
        expected = results[0]
        for how, result in zip(hows, results[1:], strict=True):
            assert result[0] == pytest.approx(expected[0], rel=1e-12), how
            assert_parity(result[1], expected[1], dtype=F64)
            # A region must not change the way in which a step runs.
            assert result[3].planned >= expected[3].planned, how
    if kind == "stack":
        ranks = [sum(column) for column in zip(*(results[1][2] for results in found), strict=True)]
        plain = [sum(column) for column in zip(*(results[0][2] for results in found), strict=True)]
        num_traces = min(plain) % 12
        assert ranks == [2 * number - num_traces for number in plain]


class Quiet(nn.Module):
    """A block without a counter, which compiled code would have to be made anew for."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.drop = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(torch.tanh(self.up(self.norm(x)))))


def run_compiled() -> dict[tuple[str, str], tuple[list[float], dict[str, Tensor | None]]]:
    train_step = step_of(square_loss)
    found = {}
    for backend in ("none", "aot_eager", "eager"):
        for strategy in ("none", "each", "contiguous"):
            torch.manual_seed(1)
            made = nn.Sequential(*(Quiet() for _ in range(4))).to(F64).train()
            model = smp.DistributedModel(made, compile=False if backend == "none" else {"backend": backend})
            for block in list(made)[2:]:
                smp.set_partition(block, smp.pp_size() - 1)
            if strategy != "none":
                smp.set_activation_checkpointing(model.get_module(), strategy=strategy)
            losses = []
            with same_random_numbers():
                for step in range(3):
                    x = torch.randn(8, 8, dtype=F64, generator=torch.Generator().manual_seed(step))
                    losses.append(float(train_step(model, x).reduce_mean()))
            found[backend, strategy] = losses, {name: p.grad for name, p in model.local_named_parameters()}
    return found


@pytest.mark.parametrize(("num_stages", "schedule"), [(1, "simple"), (2, "zero_bubble")])
def test_compiled_modules_are_recomputed(num_stages: int, schedule: str) -> None:
    parameters = {
        "pipeline_parallel_degree": num_stages, "microbatches": 4, "pipeline": schedule, "timeout_seconds": 60,
        **({"auto_partition": False, "default_partition": 0} if num_stages > 1 else {}),
    }  # fmt: skip
    for found in run_ranks(run_compiled, num_stages, parameters=parameters):
        expected = found["none", "none"]
        for how, (losses, gradients) in found.items():
            assert losses == pytest.approx(expected[0], rel=1e-12), how
            assert_parity(gradients, expected[1], dtype=F64)
