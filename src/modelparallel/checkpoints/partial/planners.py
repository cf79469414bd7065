"""The planners of ``torch.distributed.checkpoint`` for pieces: who writes what, and who reads what.

DCP asks each rank what it would write or read, one rank (the coordinator) to make a plan of all answers, and then each
rank for the tensors. Its own planners take state dicts of ``DTensor``; these take pieces, since a tensor-parallel slice
of several blocks, or a range of a flat parameter, is no ``DTensor``.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, LoadPlan, Metadata, ReadItem, SavePlan
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from modelparallel.checkpoints.partial.pieces import Piece, rectangle_of
from modelparallel.errors import CheckpointCorruptError, CheckpointError


def entry_of(piece: Piece) -> str:
    """The name of a piece in the state dict that DCP is given."""
    return f"{piece.key}@{','.join(map(str, piece.offsets))}"


class PieceSavePlanner(DefaultSavePlanner):
    """Offers ``pieces``; the state dict holds their tensors (or copies of them) by :func:`entry_of`, and objects, as
    bytes, by key.
    """

    def __init__(self, pieces: Sequence[Piece], object_keys: Sequence[str]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        # Without the tensors, which a copy for saving in the background must not keep alive.
        self._layouts = [(entry_of(piece), piece.key, piece.full_shape, piece.offsets) for piece in pieces]
        self._object_keys = tuple(object_keys)
        self._entries: dict[tuple[str, tuple[int, ...] | None], str] = {}

    def create_local_plan(self) -> SavePlan:
        """What this rank offers. Local."""
        items = []
        for entry, key, full_shape, offsets in self._layouts:
            tensor = self.state_dict[entry]
            chunk = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=tensor.size())
            items.append(
                WriteItem(
                    index=MetadataIndex(key, torch.Size(offsets)),
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=chunk,
                        properties=TensorProperties.create_from_tensor(tensor),
                        size=torch.Size(full_shape),
                    ),
                )
            )
            self._entries[key, tuple(offsets)] = entry
        for key in self._object_keys:
            items.append(WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO))
            self._entries[key, None] = key
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """The tensor, or the bytes, of an item. Local."""
        offset = write_item.index.offset
        entry = self._entries[write_item.index.fqn, None if offset is None else tuple(offset)]
        value = self.state_dict[entry]
        return io.BytesIO(value) if isinstance(value, bytes) else value.detach()


class PieceLoadPlanner(DefaultLoadPlanner):
    """Fills ``pieces`` in place from the tensors of a checkpoint, converting dtypes, and gives the bytes of objects of
    ``object_keys`` to ``take_object``.
    """

    def __init__(
        self, pieces: Sequence[Piece], object_keys: Sequence[str], take_object: Callable[[str, io.BytesIO], None]
    ) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._pieces = list(pieces)
        self._object_keys = tuple(object_keys)
        self._take_object = take_object
        self._by_place: dict[tuple[str, int], torch.Tensor] = {}

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """The state dict has no part in it. Local."""
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        """What this rank reads. Local. Raises CheckpointError for tensors of another shape."""
        assert self.metadata is not None
        stored = self.metadata.state_dict_metadata
        items: list[ReadItem] = []
        by_key: dict[str, list[Piece]] = {}
        for piece in self._pieces:
            by_key.setdefault(piece.key, []).append(piece)
        for key, pieces in by_key.items():
            described = tensor_entry(key, stored[key], pieces[0].full_shape)
            chunks = [ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes)) for piece in pieces]
            items_of_key = create_read_items_for_chunk_list(key, described, chunks)
            _check_all_there(key, pieces, items_of_key)
            items.extend(items_of_key)
            self._by_place.update({(key, number): piece.tensor for number, piece in enumerate(pieces)})
        for key in self._object_keys:
            index = MetadataIndex(key)
            no_offset = torch.Size((0,))
            items.append(ReadItem(LoadItemType.BYTE_IO, index, no_offset, index, no_offset, no_offset))
        return LoadPlan(items)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """An object was read. Local."""
        self._take_object(read_item.dest_index.fqn, value)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """The memory that an item fills. Local."""
        index = read_item.dest_index
        assert index.index is not None
        return rectangle_of(self._by_place[index.fqn, index.index], read_item.dest_offsets, read_item.lengths)


def tensor_entry(key: str, described: Any, full_shape: tuple[int, ...]) -> TensorStorageMetadata:
    """What a checkpoint says of the tensor ``key``. Raises CheckpointError unless it is a tensor of that shape."""
    if not isinstance(described, TensorStorageMetadata):
        raise CheckpointError(f"'{key}' is a tensor in this job and an object in the checkpoint")
    if tuple(described.size) != tuple(full_shape):
        raise CheckpointError(
            f"'{key}' has shape {tuple(described.size)} in the checkpoint and {tuple(full_shape)} in this job: resume "
            "with the model that was saved"
        )
    return described


def _check_all_there(key: str, pieces: Sequence[Piece], items: Sequence[ReadItem]) -> None:
    """Raise CheckpointCorruptError unless the checkpoint has every element of the pieces; their memory may be new."""
    wanted = sum(piece.tensor.numel() for piece in pieces)
    there = sum(prod(item.lengths) for item in items)
    if there != wanted:
        raise CheckpointCorruptError(
            f"the checkpoint has {there} of the {wanted} elements of '{key}' that this rank needs: it was written by "
            "another program, or changed. Load another one"
        )


def is_object(described: Any) -> bool:
    """Whether an entry of a checkpoint is an object and no tensor."""
    return isinstance(described, BytesStorageMetadata)
