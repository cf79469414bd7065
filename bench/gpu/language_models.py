"""One GPU, bf16: our language-model head and a large block against transformers, eager and compiled.

    python -m bench.gpu.language_models [--small] [--pairs 10]

Checks that all compute the same loss, then times forward and backward in turn, and prints tokens/s and the share of the
GPU's peak. ``--small`` takes small shapes, and runs on a CPU too: it shows that the script works, not how fast.
Dropout is off, so that the losses can be compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import modelparallel as smp
from bench.cases.language_models import allow_transformers

#: Dense bf16 TFLOP/s without sparsity, by a part of the device's name.
PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}


@dataclass(frozen=True)
class Shape:
    """A language model (GPT-2's architecture), or with ``num_layers=1`` and a small vocabulary nearly a block alone."""

    name: str
    num_layers: int
    hidden: int
    num_heads: int
    vocabulary: int
    samples: int
    length: int

    @property
    def num_tokens(self) -> int:
        return self.samples * self.length

    @property
    def flops(self) -> float:
        """Of forward and backward: three times the matrix products of forward."""
        block = 2 * 12 * self.hidden**2 + 2 * self.length * self.hidden  # causal: half of the scores
        return 3.0 * self.num_tokens * (self.num_layers * block + 2 * self.hidden * self.vocabulary)


SHAPES = [
    Shape("7B block", 1, 4096, 32, 1024, 4, 2048),
    Shape("GPT-2 XL", 48, 1600, 25, 50257, 8, 1024),
]
SMALL = [Shape("small", 2, 64, 4, 257, 2, 32)]


def theirs(shape: Shape, device: torch.device) -> nn.Module:
    """GPT-2 of transformers, with SDPA."""
    allow_transformers()
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=shape.hidden, n_layer=shape.num_layers, n_head=shape.num_heads, vocab_size=shape.vocabulary,
        n_positions=shape.length, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        attn_implementation="sdpa",
    )  # fmt: skip
    with device:
        return GPT2LMHeadModel(config).to(dtype=torch.bfloat16)


def candidates(shape: Shape, device: torch.device, *, with_compiled: bool) -> dict[str, nn.Module]:
    """The same weights in each."""
    plain = theirs(shape, device)
    marked = theirs(shape, device)
    smp.set_tensor_parallelism(marked)
    models = {"ours": smp.DistributedModel(marked).get_module(), "transformers": plain}
    if with_compiled:
        compiled: Any = theirs(shape, device)
        for block in compiled.transformer.h:  # one compilation serves all of them
            block.compile()
        models["transformers, blocks compiled"] = compiled
    return models


def trainer(model: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    """Forward and backward; gives the loss."""

    def train() -> Tensor:
        model.zero_grad()
        loss = model(ids, labels=ids)["loss"]
        loss.backward()
        return loss.detach()

    return train


def seconds(train: Callable[[], Tensor], device: torch.device) -> float:
    """Of one call, with all that it starts on the device."""
    synchronize(device)
    start = time.perf_counter()
    train()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(train: Callable[[], Tensor], device: torch.device) -> float:
    """MiB at most during a step, beyond the weights of all models; nan without a GPU."""
    if device.type != "cuda":
        return float("nan")
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    train()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def compare(shape: Shape, device: torch.device, num_pairs: int, *, with_compiled: bool) -> None:
    """Check and time one shape, and print a line for each candidate."""
    ids = torch.randint(shape.vocabulary, (shape.samples, shape.length), device=device)
    trains = {
        name: trainer(model, ids) for name, model in candidates(shape, device, with_compiled=with_compiled).items()
    }
    losses = {name: float(train()) for name, train in trains.items()}
    reference = losses["transformers"]
    if any(abs(loss - reference) > 0.02 * abs(reference) for loss in losses.values()):
        raise AssertionError(f"{shape.name}: the losses differ: {losses}")
    times: dict[str, list[float]] = {name: [] for name in trains}
    for number in range(num_pairs + 2):
        for name, train in trains.items():
            spent = seconds(train, device)
            if number >= 2:
                times[name].append(spent)
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = next((value for part, value in PEAKS.items() if part in device_name), float("nan"))
    print(f"{shape.name} on {device_name}, bf16, {shape.samples} x {shape.length} tokens, {num_pairs} rounds")
    for name, train in trains.items():
        median = statistics.median(times[name])
        ratio = statistics.median([own / other for own, other in zip(times[name], times["transformers"], strict=True)])
        share = shape.flops / median / 1e12 / peak
        print(
            f"  {name}: {shape.num_tokens / median:,.0f} tokens/s, {share:.1%} of peak, {ratio:.3f} of the time of "
            f"transformers, {peak_memory(train, device):,.0f} MiB",
            flush=True,
        )


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--pairs", type=int, default=10)
    chosen = parser.parse_args()
    smp.init({"_match_weights": True, "ddp": True})
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    for shape in SMALL if chosen.small else SHAPES:
        compare(shape, device, chosen.pairs, with_compiled=device.type == "cuda")


if __name__ == "__main__":
    main()
