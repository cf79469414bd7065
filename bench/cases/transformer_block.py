"""tp=2: a transformer block of the family against the same block under torch's DTensor tensor parallelism."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import modelparallel as smp
from bench.cases.case import Case
from bench.harness import Result, measure_pairs, paired_result, plain_result
from bench.ranks import run_on_ranks

NUM_RANKS = 2
HEAD_SIZE = 64
SHAPES = [(512, 128), (512, 512), (1024, 128), (1024, 512)]
BATCH = 4  # samples; each rank computes on all of them
#: The dims of a hidden state [batch, sequence, hidden] that are cut outside the block, ours and DTensor's.
MEMORY_DIM, SEQUENCE_DIM = 2, 1


class Attention(nn.Module):
    """Causal self-attention in its plain form."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.dense = (nn.Linear(hidden, hidden) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, HEAD_SIZE)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        return self.dense(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Feedforward(nn.Module):
    """The MLP of a block."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.dense1, self.dense2 = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense2(F.gelu(self.dense1(x)))


class Block(nn.Module):
    """A block with LayerNorms in front, as GPT-2's."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attention, self.feedforward = Attention(hidden), Feedforward(hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feedforward(self.norm2(x))


def dtensor_block(hidden: int, *, is_sequence_parallel: bool) -> nn.Module:
    """The plan of torch's own tutorial for tensor parallelism."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    columns = ("attention.query", "attention.key", "attention.value", "feedforward.dense1")
    rows = ("attention.dense", "feedforward.dense2")
    plan: dict[str, Any] = {name: ColwiseParallel() for name in columns}
    if not is_sequence_parallel:
        plan.update({name: RowwiseParallel() for name in rows})
        return parallelize_module(Block(hidden), mesh, plan)
    plan.update({name: RowwiseParallel(output_layouts=Shard(SEQUENCE_DIM)) for name in rows})
    plan.update({name: SequenceParallel(use_local_output=True) for name in ("norm1", "norm2")})
    gathered = {"input_layouts": (Shard(SEQUENCE_DIM),), "desired_input_layouts": (Replicate(),)}
    plan.update({name: PrepareModuleInput(**gathered) for name in ("attention", "feedforward")})
    return parallelize_module(Block(hidden), mesh, plan)


def our_block(hidden: int) -> nn.Module:
    """With the weights of `Block` from the same seed; its layout is that of the session."""
    torch.manual_seed(0)
    plain = Block(hidden)
    layer = smp.nn.DistributedTransformerLayer(
        hidden // HEAD_SIZE, HEAD_SIZE, hidden, 4 * hidden, 0.0, 0.0, causal_mask_size=1 << 20, pre_layernorm=True,
        post_layernorm=False,
    )  # fmt: skip
    layer.is_inner = True
    maps = [plain.attention.query, plain.attention.key, plain.attention.value]
    whole = {
        "attention.qkv.weight": torch.cat([one.weight for one in maps]),
        "attention.qkv.bias": torch.cat([one.bias for one in maps]),
    }
    names = {
        "attention.dense": plain.attention.dense, "attention.pre_layernorm": plain.norm1,
        "output.pre_layernorm": plain.norm2, "output.dense1": plain.feedforward.dense1,
        "output.dense2": plain.feedforward.dense2,
    }  # fmt: skip
    whole.update({f"{name}.{part}": getattr(one, part) for name, one in names.items() for part in ("weight", "bias")})
    with torch.no_grad():
        for prefix, module in layer.named_modules():
            splits = module.split_tensors() if isinstance(module, smp.nn.DistributedModule) else {}
            for name, parameter in module.named_parameters(recurse=False):
                full = whole[f"{prefix}.{name}"]
                part = splits[name].slice_of(full, smp.tp_rank(), smp.tp_size()) if name in splits else full
                parameter.copy_(part)
    return layer


def local_part(x: Tensor, dim: int | None) -> Tensor:
    return x if dim is None else x.chunk(NUM_RANKS, dim)[smp.tp_rank()].contiguous()


def compare_on_rank(hidden: int, length: int, num_pairs: int) -> dict[str, Any]:
    """Forward and backward, and the bytes that are kept for backward."""
    is_memory = smp.state.cfg.optimize == "memory"
    ours, theirs = our_block(hidden), dtensor_block(hidden, is_sequence_parallel=is_memory)
    x = torch.randn(BATCH, length, hidden, generator=torch.Generator().manual_seed(1))
    our_x = local_part(x, MEMORY_DIM if is_memory else None).requires_grad_()
    their_x = local_part(x, SEQUENCE_DIM if is_memory else None).requires_grad_()

    def call_ours() -> Tensor:
        return ours((our_x, None))[0]

    def call_theirs() -> Tensor:
        return theirs(their_x)

    check_equal(call_ours(), call_theirs(), is_memory)

    def train(module: nn.Module, call: Callable[[], Tensor]) -> None:
        module.zero_grad()
        call().sum().backward()

    times = measure_pairs(partial(train, ours, call_ours), partial(train, theirs, call_theirs), num_pairs)
    return {"times": times, "saved": (saved_bytes(call_ours, ours), saved_bytes(call_theirs, theirs))}


def check_equal(ours: Tensor, theirs: Tensor, is_memory: bool) -> None:
    if is_memory:
        ours = torch.cat(smp.allgather(ours.detach(), smp.TP_GROUP), MEMORY_DIM)
        theirs = torch.cat(smp.allgather(theirs.detach(), smp.TP_GROUP), SEQUENCE_DIM)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def saved_bytes(call: Callable[[], Tensor], module: nn.Module) -> int:
    """Of the storages that autograd keeps for backward, parameters apart."""
    found: dict[int, int] = {}
    lock = threading.Lock()

    def note(tensor: Tensor) -> Tensor:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        storage = local.untyped_storage()
        with lock:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    own = set()
    for parameter in module.parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        own.add(local.untyped_storage().data_ptr())
    with saved_tensors_hooks(note, lambda tensor: tensor):
        output = call()
    del output
    return sum(size for pointer, size in found.items() if pointer not in own)


def measure(optimize: str, num_pairs: int) -> list[Result]:
    """Seconds per forward and backward."""
    name, target = ("speed", "ratio <= 0.95") if optimize == "speed" else ("memory", "ratio <= 1.00")
    parameters = {
        "tensor_parallel_degree": NUM_RANKS, "ddp": True, "prescaled_batch": True, "optimize": optimize,
    }  # fmt: skip
    results = []
    for hidden, length in SHAPES:
        found = run_on_ranks(compare_on_rank, NUM_RANKS, hidden, length, num_pairs, parameters=parameters)[0]
        results.append(paired_result(f"block_{name}_{hidden}_{length}", "s/step", *found["times"], target))
        saved = [size / 2**20 for size in found["saved"]]
        results.append(plain_result(f"block_{name}_{hidden}_{length}_saved", "MiB", saved[0], 1, "reported", saved[1]))
    return results


CASES = [
    Case(
        "block_speed",
        "tp=2, a transformer block (h x s; 4 samples, fp32), forward and backward, hidden states whole on each rank: "
        '`optimize="speed"` against DTensor\'s column- and row-wise plan. `_saved`: what autograd keeps for backward.',
        partial(measure, "speed"),
    ),
    Case(
        "block_memory",
        'The same with the hidden states cut: `optimize="memory"` (features) against DTensor with SequenceParallel.',
        partial(measure, "memory"),
    ),
]
