"""What checkpoints are compared with: plain ``torch.distributed.checkpoint``, and one file of the first rank."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import modelparallel as smp
from modelparallel.checkpoints.partial.pieces import Piece


def plain_state(pieces: Sequence[Piece]) -> dict[str, Any]:
    """The state dict that a user of plain DCP would have, over the same memory: ``DTensor`` for what is split.
    Collective over the world.
    """
    group = [rank for rank in range(dist.get_world_size()) if _is_beside(rank)]
    state = {}
    for piece in pieces:
        if piece.key in state:
            raise RuntimeError(f"{piece.key} is in several pieces: no DTensor has that layout")
        tensor = piece.tensor
        split = [dim for dim, length in enumerate(piece.full_shape) if tensor.shape[dim] != length]
        if len(group) > 1 and tensor.ndim:
            placement = Shard(split[0]) if split else Replicate()
            stride = torch.empty(piece.full_shape, device="meta").stride()
            state[piece.key] = DTensor.from_local(
                tensor, _mesh(tuple(group)), [placement], shape=torch.Size(piece.full_shape), stride=stride
            )
        else:
            state[piece.key] = tensor
    return state


def _is_beside(rank: int) -> bool:
    """Whether ``rank`` holds other parts of what this one holds: the stage's tensor-parallel ranks, or all shards."""
    if smp.tp_size() > 1:
        return rank in smp.get_tp_group()
    return smp.pp_size() == 1


@cache
def _mesh(ranks: tuple[int, ...]) -> DeviceMesh:
    """Collective over the world: torch makes the group of every stage on all ranks."""
    world = dist.get_world_size()
    if len(ranks) == world:
        return DeviceMesh("cpu", list(range(world)))
    found: list[Any] = [None] * world
    dist.all_gather_object(found, ranks)
    groups = [dist.new_group(list(group)) for group in sorted(set(found))]
    return DeviceMesh.from_group(groups[sorted(set(found)).index(ranks)], "cpu")


# One file of the first rank


def save_gathered(pieces: Sequence[Piece], path: str) -> None:
    """Send every piece to the first rank, which puts the tensors together and writes them with ``torch.save``. The file
    is brought to the disk, as those of the others are. Collective over the world.
    """
    whole: dict[str, torch.Tensor] = {}
    for rank, number, key, full_shape, place, dtype in _all_pieces(pieces, each_once=True):
        if dist.get_rank() == 0:
            if key not in whole:
                whole[key] = torch.empty(full_shape, dtype=dtype)
            part = whole[key][place]
            if rank == 0:
                part.copy_(pieces[number].tensor)
            else:
                received = torch.empty(part.shape, dtype=dtype)
                dist.recv(received, rank)
                part.copy_(received)
        elif rank == dist.get_rank():
            dist.send(pieces[number].tensor.contiguous(), 0)
    if dist.get_rank() == 0:
        with open(path, "wb") as file:
            torch.save(whole, file)
            file.flush()
            os.fsync(file.fileno())


def load_gathered(pieces: Sequence[Piece], path: str) -> None:
    """The first rank reads the file and sends each rank its pieces. Collective over the world."""
    whole = torch.load(path, weights_only=True) if dist.get_rank() == 0 else {}
    for rank, number, key, _, place, _ in _all_pieces(pieces, each_once=False):
        if dist.get_rank() == 0:
            part = whole[key][place]
            if rank == 0:
                pieces[number].tensor.copy_(part)
            else:
                dist.send(part.contiguous(), rank)
        elif rank == dist.get_rank():
            received = torch.empty(pieces[number].sizes, dtype=pieces[number].tensor.dtype)
            dist.recv(received, 0)
            pieces[number].tensor.copy_(received)


def _all_pieces(pieces: Sequence[Piece], *, each_once: bool) -> Iterator[tuple[int, int, str, Any, Any, torch.dtype]]:
    """(rank, number there, key, full shape, slices, dtype) of the pieces of all ranks. Collective over the world."""
    own = [(piece.key, piece.full_shape, piece.offsets, piece.sizes, piece.tensor.dtype) for piece in pieces]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    seen = set()
    for rank, theirs in enumerate(everyone):
        for number, (key, full_shape, offsets, sizes, dtype) in enumerate(theirs):
            if each_once and (key, offsets) in seen:
                continue
            seen.add((key, offsets))
            place = tuple(slice(start, start + length) for start, length in zip(offsets, sizes, strict=True))
            yield rank, number, key, full_shape, place, dtype
