"""Whole language models: against transformers without tensor parallelism, and against other ways to split them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)

import modelparallel as smp
from bench.cases.case import Case
from bench.cases.memory import MEBIBYTE, reset_peak, status_bytes
from bench.cases.transformer_block import Block
from bench.harness import Result, measure_pairs, paired_result, plain_result
from bench.ranks import run_on_ranks

NUM_RANKS = 2
SAMPLES, LENGTH, HIDDEN, NUM_LAYERS, NUM_HEADS = 2, 256, 512, 4, 8
VOCABULARY = 50257  # GPT-2's, so that the head has its true share
LLAMA_VOCABULARY = 32000
Train = Callable[[], None]


def gpt2_config() -> Any:
    """GPT-2's shape with narrower and fewer layers, without dropout."""
    from transformers import GPT2Config

    return GPT2Config(
        n_embd=HIDDEN, n_layer=NUM_LAYERS, n_head=NUM_HEADS, vocab_size=VOCABULARY, n_positions=LENGTH, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip


def allow_transformers() -> None:
    """Let transformers be imported beside a torchvision that was built for another torch."""
    from modelparallel.launch.rehearsal import declare_torchvision_operators

    declare_torchvision_operators()


def make_gpt2() -> nn.Module:
    """transformers' GPT-2, from one seed."""
    allow_transformers()
    from transformers import GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(gpt2_config())


def token_ids(vocabulary: int) -> Tensor:
    """The same on all ranks."""
    return torch.randint(vocabulary, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(2))


def trainer(model: nn.Module, loss_of: Callable[[], Tensor]) -> Train:
    """Forward and backward."""

    def train() -> None:
        model.zero_grad()
        loss_of().backward()

    return train


def ours_from(model: nn.Module) -> nn.Module:
    """The model split by the library, with its weights; without its gradient reduction, which no peer has."""
    smp.set_tensor_parallelism(model)
    return smp.DistributedModel(model).get_module()


# tp=1, against transformers


def train_one(kind: str) -> tuple[Train, Callable[[], float]]:
    """A step of ours or of transformers' GPT-2, and its loss."""
    ids = token_ids(VOCABULARY)
    model = ours_from(make_gpt2()) if kind == "ours" else make_gpt2()

    def loss_of() -> Tensor:
        return model(ids, labels=ids)["loss"]

    return trainer(model, loss_of), lambda: float(loss_of().detach())


def compare_alone(num_pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of each, in one process."""
    (ours, our_loss), (theirs, their_loss) = train_one("ours"), train_one("transformers")
    check_losses(our_loss(), their_loss())
    return measure_pairs(ours, theirs, num_pairs)


def peak_alone(kind: str) -> float:
    """MiB at most during three steps, of a process of its own."""
    train, _ = train_one(kind)
    train()
    reset_peak()
    for _ in range(3):
        train()
    return status_bytes("VmHWM") / MEBIBYTE


def check_losses(ours: float, theirs: float) -> None:
    if abs(ours - theirs) > 1e-3 * abs(theirs):
        raise AssertionError(f"the losses differ: {ours} and {theirs}")


def measure_alone(num_pairs: int) -> list[Result]:
    """Time and memory at tp=1."""
    parameters = {"ddp": True, "_match_weights": True}
    ours, theirs = run_on_ranks(compare_alone, 1, num_pairs, parameters=parameters)[0]
    peaks = [run_on_ranks(peak_alone, 1, kind, parameters=parameters)[0] for kind in ("ours", "transformers")]
    return [
        paired_result("lm_head_tp1", "s/step", ours, theirs, "ratio <= 0.95"),
        plain_result("lm_head_tp1_peak", "MiB", peaks[0], 1, "ratio <= 1.00", peaks[1]),
    ]


# tp=2, GPT-2 against a plan written by hand


class PlainGPT2(nn.Module):
    """GPT-2 with a linear layer for each of queries, keys and values, so that DTensor can split it."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, HIDDEN), nn.Embedding(LENGTH, HIDDEN)
        self.blocks = nn.ModuleList(Block(HIDDEN) for _ in range(NUM_LAYERS))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        body = source.transformer
        self.tokens.weight, self.positions.weight = body.wte.weight, body.wpe.weight
        self.head.weight = self.tokens.weight
        self.norm.load_state_dict(body.ln_f.state_dict())
        with torch.no_grad():
            for block, theirs in zip(self.blocks, body.h, strict=True):
                copy_block(block, theirs)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def copy_block(block: Any, theirs: Any) -> None:
    """The weights of one of transformers' blocks."""
    block.norm1.load_state_dict(theirs.ln_1.state_dict())
    block.norm2.load_state_dict(theirs.ln_2.state_dict())
    attention = block.attention
    weights, biases = theirs.attn.c_attn.weight.t().chunk(3), theirs.attn.c_attn.bias.chunk(3)
    for layer, weight, bias in zip((attention.query, attention.key, attention.value), weights, biases, strict=True):
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    for layer, source in (
        (attention.dense, theirs.attn.c_proj),
        (block.feedforward.dense1, theirs.mlp.c_fc),
        (block.feedforward.dense2, theirs.mlp.c_proj),
    ):
        layer.weight.copy_(source.weight.t())
        layer.bias.copy_(source.bias)


def dtensor_gpt2() -> nn.Module:
    """Column- and row-wise blocks, embedding and head split over the vocabulary."""
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    model = PlainGPT2(make_gpt2())
    plan: dict[str, Any] = {
        "tokens": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    for index in range(NUM_LAYERS):
        start = f"blocks.{index}."
        for name in ("query", "key", "value"):
            plan[f"{start}attention.{name}"] = ColwiseParallel()
        plan[f"{start}attention.dense"] = RowwiseParallel()
        plan[f"{start}feedforward.dense1"] = ColwiseParallel()
        plan[f"{start}feedforward.dense2"] = RowwiseParallel()
        # One exchange of the gradients of queries, keys and values together.
        replicated = {"input_layouts": (Replicate(),), "desired_input_layouts": (Replicate(),)}
        plan[f"{start}attention"] = PrepareModuleInput(**replicated)
    return parallelize_module(model, mesh, plan)


def compare_gpt2(num_pairs: int) -> tuple[list[float], list[float]]:
    """Forward, loss and backward of the same batch on both ranks."""
    ids = token_ids(VOCABULARY)
    ours, theirs = ours_from(make_gpt2()), dtensor_gpt2()

    def our_loss() -> Tensor:
        return ours(ids, labels=ids)["loss"]

    def their_train() -> float:
        theirs.zero_grad()
        with loss_parallel():
            logits = theirs(ids)[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
        whole: Any = loss.detach()
        return float(whole.full_tensor() if hasattr(whole, "full_tensor") else whole)

    check_losses(float(our_loss().detach()), their_train())
    return measure_pairs(trainer(ours, our_loss), their_train, num_pairs)


# tp=2, Llama by its plan against transformers' own tensor parallelism


def llama_config() -> Any:
    """Grouped key/value heads and gated MLPs, as Llama 3 has."""
    allow_transformers()
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_hidden_layers=NUM_LAYERS, num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS // 2, vocab_size=LLAMA_VOCABULARY, max_position_embeddings=LENGTH,
        use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip


def compare_llama(folder: str, num_pairs: int) -> tuple[list[float], list[float]]:
    """Forward, loss and backward of the same batch on both ranks."""
    allow_transformers()
    from transformers import LlamaForCausalLM

    ids = token_ids(LLAMA_VOCABULARY)
    ours = ours_from(LlamaForCausalLM.from_pretrained(folder))
    theirs = LlamaForCausalLM.from_pretrained(folder, tp_plan="auto")

    def loss_of(model: nn.Module) -> Tensor:
        loss = model(ids, labels=ids).loss
        return loss.full_tensor() if hasattr(loss, "full_tensor") else loss

    check_losses(float(loss_of(ours).detach()), float(loss_of(theirs).detach()))
    trains = [trainer(model, partial(loss_of, model)) for model in (ours, theirs)]
    return measure_pairs(trains[0], trains[1], num_pairs)


PARAMETERS = {"tensor_parallel_degree": NUM_RANKS, "ddp": True, "prescaled_batch": True, "_match_weights": True}


def measure_gpt2(num_pairs: int) -> list[Result]:
    """GPT-2 at tp=2."""
    ours, theirs = run_on_ranks(compare_gpt2, NUM_RANKS, num_pairs, parameters=PARAMETERS)[0]
    return [paired_result("gpt2_tp2", "s/step", ours, theirs, "ratio <= 1.00")]


def measure_llama(num_pairs: int) -> list[Result]:
    """Llama at tp=2."""
    allow_transformers()
    from transformers import LlamaForCausalLM

    with tempfile.TemporaryDirectory(prefix="bench-llama-") as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(llama_config()).save_pretrained(folder)
        ours, theirs = run_on_ranks(compare_llama, NUM_RANKS, folder, num_pairs, parameters=PARAMETERS)[0]
    return [paired_result("llama_tp2", "s/step", ours, theirs, "ratio <= 1.00")]


SHAPE = f"{NUM_LAYERS} layers of {HIDDEN}, {SAMPLES} samples of {LENGTH} tokens, fp32, forward and backward"
CASES = [
    Case(
        "lm_head_tp1",
        f"One process: GPT-2 ({SHAPE}, 50257 words) as `DistributedTransformerLMHead` against transformers' "
        "`GPT2LMHeadModel` with SDPA. `_peak`: resident memory at most, each in a process of its own.",
        measure_alone,
    ),
    Case(
        "gpt2_tp2",
        f"tp=2: GPT-2 ({SHAPE}) of transformers under `smp.tensor_parallelism()` against the same model under a "
        "DTensor plan written by hand, with `loss_parallel`.",
        measure_gpt2,
    ),
    Case(
        "llama_tp2",
        f"tp=2: Llama ({SHAPE}, grouped key/value heads, 32000 words) by its plan against transformers' own tensor "
        'parallelism (`tp_plan="auto"`).',
        measure_llama,
    ),
]
