"""Ranks that begin with other weights than their first one: seeds by rank, or ``if rank == 0: load``.

Data-parallel ranks take the values of the first, by a broadcast; what was loaded or drawn by one of them since then is
found in the first step that trains. Before a model is sliced or split up over stages each
rank holds the whole of it, and must hold the same: a slice or a share of another model makes a mixture of both. So
checksums are compared first, and what differs is taken from the first rank, with a warning.
"""

from __future__ import annotations

import array
import logging
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from modelparallel.comm.collectives.started import exchange_integers
from modelparallel.config.topology import CommGroup
from modelparallel.data_parallel import BroadcastTensor, broadcast_parameters
from modelparallel.deferred.deferred import is_deferred, recording, stream_of
from modelparallel.errors import DivergenceError
from modelparallel.job.messages import allgather
from modelparallel.tensor_parallel.distributed_module import DistributedModule

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group
    from modelparallel.job.session import Session

logger = logging.getLogger("modelparallel")

_CHUNK = 1 << 22  # words that are added up at a time
_MASK = (1 << 61) - 1


def agree_before_slicing(module: nn.Module, active: Session) -> None:
    """The ranks of a TP_GROUP are about to keep their slices of ``module``. Collective over it."""
    if active.groups.tp.size > 1:
        sliced = {
            id(tensor)
            for part in module.modules()
            if isinstance(part, DistributedModule)
            for name in part.split_tensors()
            if (tensor := getattr(part, name, None)) is not None
        }
        _agree([(name, tensor) for name, tensor in _tensors(module) if id(tensor) not in sliced], active, "tp")


def agree_before_partition(module: nn.Module, title: str, active: Session, *, has_own_part: bool) -> None:
    """The stages are about to keep their shares of ``module``, of the wrapped model ``title``, unless each has
    loaded its own part. Collective over PP_GROUP.
    """
    entries = None if has_own_part else list(_tensors(module))
    _agree(entries, active, "pp", title)


def agree_between_copies(entries: Sequence[BroadcastTensor], timeout_seconds: float) -> None:
    """The first step that trains begins: each tensor must be equal on its group. Collective over the groups."""
    by_group: dict[int, list[BroadcastTensor]] = {}
    for entry in entries:
        if entry.group.size > 1:
            by_group.setdefault(id(entry.group), []).append(entry)
    for members in by_group.values():
        group = members[0].group
        sums = exchange_integers(
            [_checksum(entry.tensor) for entry in members], group, "the comparison of weights of data-parallel ranks"
        )
        different = _first_different(sums)
        if not different:
            continue
        named = [(entry.name, entry.tensor) for entry in members]
        _warn(named, different, group.kind.value, "", are_taken=True, is_first=group.rank_in_group == 0)
        taken = [members[index] for index in sorted(different)]
        broadcast_parameters(taken, is_checked=False, timeout_seconds=timeout_seconds)


def check_drawn_slices(module: nn.Module, active: Session) -> None:
    """Slices are cut from weights that each rank of a TP_GROUP has drawn whole: warn if the draws were different ones.
    Collective over the TP_GROUP.
    """
    group = active.groups.tp
    if group.size == 1:
        return
    own = [(name, part.drawn_from) for name, part in module.named_modules() if isinstance(part, DistributedModule)]
    with recording(is_enabled=False):
        first = allgather(own, CommGroup.TP_GROUP)
    for rank, other in enumerate(first):
        wrong = next((name for (name, crc), (_, its) in zip(first[0], other, strict=False) if crc != its), None)
        if wrong is not None and active.groups.world.rank_in_group == 0:
            logger.warning(
                "the weights of '%s' were drawn from other random numbers on tp_rank %d than on tp_rank 0, so its "
                "slices are not those of one matrix: use one seed (torch.manual_seed) on all ranks while the model is "
                "built, or load weights",
                wrong, rank,
            )  # fmt: skip
            return


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _agree(entries: Sequence[tuple[str, torch.Tensor]] | None, active: Session, axis: str, title: str = "") -> None:
    """Compare the tensors, by name, and take those of the first rank. None: this rank has its own on purpose."""
    group: Group = active.groups.tp if axis == "tp" else active.groups.pp
    kind = CommGroup.TP_GROUP if axis == "tp" else CommGroup.PP_GROUP
    own = None
    if entries is not None:
        listing = "\n".join(f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in entries)
        own = zlib.crc32(listing.encode()), array.array("q", [_checksum(tensor) for _, tensor in entries]).tobytes()
    with recording(is_enabled=False):  # a message is no tensor of the model, where its construction is delayed
        answers = allgather(own, kind)
    if entries is None or any(answer is None for answer in answers):
        return
    names = {answer[0] for answer in answers}
    if len(names) > 1:
        rank = next(rank for rank, answer in enumerate(answers) if answer[0] != answers[0][0])
        raise DivergenceError(
            f"{axis}_rank {rank} has built another model than {axis}_rank 0: the names, shapes or dtypes of their "
            "parameters and buffers differ. Build the model alike on all ranks"
        )
    sums = [array.array("q", answer[1]) for answer in answers]
    different = _first_different(sums)
    if not different:
        return
    late = [index for index in different if is_deferred(entries[index][1])]
    _warn(entries, different, axis, title, are_taken=not late, is_first=active.groups.world.rank_in_group == 0)
    taken = [BroadcastTensor(*entries[index], group) for index in sorted(different) if index not in late]
    with recording(is_enabled=False):
        broadcast_parameters(taken, is_checked=False, timeout_seconds=active.config.timeout_seconds)


def _first_different(sums: Sequence[Sequence[int]]) -> dict[int, int]:
    """The first rank, if any, that has another checksum than rank 0; by index."""
    return {
        index: rank
        for rank, theirs in reversed(list(enumerate(sums)))
        for index, value in enumerate(theirs)
        if value != sums[0][index]
    }


def _warn(
    entries: Sequence[tuple[str, torch.Tensor]],
    different: dict[int, int],
    axis: str,
    title: str,
    *,
    are_taken: bool,
    is_first: bool,
) -> None:
    if not is_first:
        return
    index = min(different)
    logger.warning(
        "the ranks began with different weights: %d of %d parameters and buffers%s, '%s' first, have other values on "
        "%s_rank %d than on %s_rank 0. %s. Use one seed on all ranks while the model is built, and load weights on all "
        "of them",
        len(different), len(entries), title and f" of {title}", entries[index][0], axis, different[index], axis,
        f"Those of {axis}_rank 0 are taken" if are_taken else "Each keeps its own, since their initialisation is "
        "delayed, so that the model is a mixture",
    )  # fmt: skip


@torch.no_grad()
def _checksum(tensor: torch.Tensor) -> int:
    """A number made from the bytes at the speed of the memory, which tells apart weights that were drawn or loaded
    differently.
    """
    if is_deferred(tensor):
        return stream_of(tensor)
    if tensor.device.type == "meta" or tensor.layout is not torch.strided or not tensor.numel():
        return 0
    flat = tensor.detach().contiguous().reshape(-1)
    size = flat.element_size()
    if size not in (4, 8, 16) or flat.storage_offset() * size % 4:
        flat = flat.clone().view(torch.uint8)
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 4))
    words = flat.view(torch.int32)
    parts = [
        torch.stack([chunk.sum(dtype=torch.int64), chunk[::3].sum(dtype=torch.int64)]) for chunk in words.split(_CHUNK)
    ]
    result = 0
    for value in torch.cat(parts).tolist():
        result = (result * 1_000_003 + value) & _MASK
    return result
