"""Sharded data parallelism against FSDP2 used by hand: blocks, and the root around them."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import modelparallel as smp
from bench.cases.case import Case
from bench.cases.memory import MEBIBYTE, reset_peak, status_bytes
from bench.harness import Result, measure_pairs, paired_result, plain_result
from bench.models import GPT, GPTSize, language_loss, token_batch
from bench.ranks import pairs_of_launches, run_on_ranks

SIZE = GPTSize()
BATCH = 4
DEGREE = 2
NUM_STEPS = 3
# Everything is sharded, as by the peer.
PARAMETERS = {"ddp": True, "sharded_data_parallel_degree": DEGREE, "sdp_param_persistence_threshold": 0}


def make_peer(mesh: DeviceMesh | None = None) -> nn.Module:
    """FSDP2 on each block and on the root; hybrid if there are more ranks than a sharding group has."""
    torch.manual_seed(0)
    model = GPT(SIZE)
    copies = dist.get_world_size() // DEGREE
    if mesh is None and copies > 1:
        mesh = init_device_mesh("cpu", (copies, DEGREE), mesh_dim_names=("replicate", "shard"))
    elif mesh is None:
        mesh = init_device_mesh("cpu", (DEGREE,), mesh_dim_names=("shard",))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def make_ours() -> Any:
    """The same model, wrapped."""
    torch.manual_seed(0)
    return smp.DistributedModel(GPT(SIZE))


def trained(module: nn.Module) -> Callable[[], None]:
    """A forward and a backward with reduced gradients, by a plain ``loss.backward()``."""
    ids, targets = token_batch(SIZE, BATCH)

    def train() -> None:
        module.zero_grad()
        language_loss(module(ids), targets).backward()

    return train


def compare_on_rank(num_pairs: int, is_ours_first: bool) -> tuple[list[float], list[float]]:
    """Seconds of each over the same process groups, after a comparison of all gradients."""
    ours = make_ours()
    mesh = next(ours.parameters()).device_mesh
    peer = make_peer(mesh)
    if not is_ours_first:
        ours = make_ours()
    train_ours, train_peer = trained(ours), trained(peer)
    train_ours()
    train_peer()
    for mine, other in zip(ours.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.to_local(), other.grad.to_local())
    return measure_pairs(train_ours, train_peer, num_pairs)


def peak_on_rank(is_ours: bool) -> int:
    """The most resident memory during steps, above what the process had before the model. In a process of its own."""
    base = status_bytes("VmRSS")
    model = make_ours() if is_ours else make_peer()
    train = trained(model)
    optimizer = torch.optim.Adam(model.parameters(), foreach=False)
    train()
    optimizer.step()
    gc.collect()
    reset_peak()
    for _ in range(NUM_STEPS):
        train()
        optimizer.step()
    return status_bytes("VmHWM") - base


def measure(num_pairs: int, num_ranks: int, name: str) -> list[Result]:
    """Time and peak memory."""
    ours, peer = pairs_of_launches(compare_on_rank, num_ranks, num_pairs, PARAMETERS)
    results = [paired_result(name, "s/step", ours, peer, "ratio <= 1.03")]
    peaks: dict[bool, list[int]] = {True: [], False: []}
    # Freed tensors go back to the system at once. Otherwise the allocator keeps some, and which ones varies by 15%.
    with mock.patch.dict(os.environ, {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}):
        for _ in range(3):
            for is_ours, found in peaks.items():
                ranks = run_on_ranks(peak_on_rank, num_ranks, is_ours, parameters=PARAMETERS)
                found.append(max(ranks))
    mine, other = (sorted(peaks[is_ours])[1] / MEBIBYTE for is_ours in (True, False))
    results.append(plain_result(f"{name}_peak", "MiB", mine, 3, "ratio <= 1.03", other))
    return results


CASES = [
    Case(
        "sharded_gpt",
        "Sharded dp=2, GPT of 8 layers x 512: forward and `loss.backward()` of `smp.DistributedModel` with everything "
        "sharded against FSDP2 used directly (each block, and the root), both over the same process groups; peak "
        "resident memory with Adam above what the process had before (`MALLOC_MMAP_THRESHOLD_=131072`), the median of "
        "three.",
        lambda num_pairs: measure(num_pairs, DEGREE, "sharded_gpt"),
    ),
    Case(
        "sharded_hybrid_gpt",
        "The same with 4 processes, two copies of the model, each sharded over two (FSDP2: a mesh of replicate x "
        "shard).",
        lambda num_pairs: measure(num_pairs, 2 * DEGREE, "sharded_hybrid_gpt"),
    ),
]
