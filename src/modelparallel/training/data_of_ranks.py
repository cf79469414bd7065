"""Which data each rank is fed: the sampler that gives it, and a look, in the first steps, whether it is the right one.

[Note: who is fed what] Data-parallel ranks feed samples of their own, also those of a TP_GROUP; with
``prescaled_batch`` the ranks of a TP_GROUP feed the same. All stages of a pipeline read the same data, of which that of
pp_rank 0 counts; placeholders elsewhere are welcome: None, tensors of another shape, or of one value. A sampler by
torch's own rank and world size gives each stage other samples, and one without ranks gives all copies of the model the
same: nothing fails, and the model is trained on a part of the data. So the first steps compare, and say so once.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from modelparallel import trees
from modelparallel.comm.collectives.started import exchange_integers
from modelparallel.errors import SMPConfigError
from modelparallel.job import session
from modelparallel.training.decisions import Decisions

if TYPE_CHECKING:
    from modelparallel.comm.groups import Groups

#: Steps in which inputs are compared.
_NUM_STEPS = 3
#: Elements of a tensor that count in its checksum.
_NUM_ELEMENTS = 4096


def data_sampler(dataset: Dataset[Any], **options: Any) -> DistributedSampler[Any]:
    """A ``torch.utils.data.DistributedSampler`` of this rank's samples, at any degrees: equal on the stages of a
    pipeline, another part on each data-parallel rank, or on each ``rdp_rank`` with ``prescaled_batch``. Local. Ours,
    not the original's.

    Args:
        dataset: any dataset with a length.
        options: ``shuffle``, ``seed``, ``drop_last`` of DistributedSampler; call ``set_epoch`` on it as usual.

    Raises:
        SMPConfigError: a dataset without a length, or ``num_replicas`` or ``rank`` given.
    """
    active = session.current()
    given = sorted({"num_replicas", "rank"} & set(options))
    if given:
        raise SMPConfigError(f"smp.data_sampler: {given[0]} follows from smp.init(): leave it out")
    if not hasattr(dataset, "__len__"):
        raise SMPConfigError(
            f"smp.data_sampler: a dataset of type {type(dataset).__name__} has no length: let its __iter__ skip the "
            "samples of others, by smp.dp_rank() of smp.dp_size()"
        )
    group = Decisions.of(active.config, active.groups).samples
    return DistributedSampler(dataset, num_replicas=group.size, rank=group.rank_in_group, **options)


class InputChecks:
    """The comparisons of the first steps of this process."""

    def __init__(self) -> None:
        self._num_left_of_stages = _NUM_STEPS
        self._num_left_of_copies = _NUM_STEPS
        self._checksum: int | None = None

    def difference_of_stages(self, own: Mapping[str, Any], shared: Mapping[str, Any], stage: int) -> str:
        """What to say about the arguments that a later stage was called with, beside those of pp_rank 0."""
        if not self._num_left_of_stages:
            return ""
        self._num_left_of_stages -= 1
        for path, theirs in _tensors_in(shared):
            mine = _at(own, path)
            if isinstance(mine, torch.Tensor) and mine is not theirs and _is_other_data(mine, theirs):
                self._num_left_of_stages = 0
                return (
                    f"smp.step: argument '{path[0]}' of pp_rank {stage} holds other data than that of pp_rank 0, which "
                    f"is what all stages use: what this rank was fed is never trained. All stages of a pipeline read "
                    f"the same samples: {_words(is_prescaled=session.current().config.prescaled_batch)} and seeds "
                    "that do not depend on the stage; or pass None on the other stages"
                )
        return ""

    def note(self, arguments: Mapping[str, Any], whole: Iterable[str]) -> None:
        """The arguments of a step, before it runs."""
        self._checksum = None
        if self._num_left_of_copies:
            chosen = {name: value for name, value in arguments.items() if name not in set(whole)}
            tensors = [tensor for _, tensor in _tensors_in(chosen) if tensor.ndim and tensor.numel()]
            checksum = 0
            for tensor in tensors:
                checksum = zlib.crc32(_sample(tensor), checksum)
            # Distinct from no tensors at all.
            self._checksum = checksum + 1 if tensors else 0

    def compare_copies(self, groups: Groups, *, is_prescaled: bool) -> str:
        """What to say about the noted arguments; after a reduction of gradients. Collective over DP_GROUP."""
        checksum, self._checksum = self._checksum, None
        if checksum is None or not self._num_left_of_copies:
            return ""
        self._num_left_of_copies -= 1
        rows = exchange_integers((checksum, groups.rdp.rank_in_group), groups.dp, "the comparison of inputs")
        place_of: dict[int, list[tuple[int, int]]] = {}
        for dp_rank, (fed, rdp_rank) in enumerate(rows):
            if fed:
                place_of.setdefault(fed, []).append((dp_rank, rdp_rank))
        text = ""
        for members in place_of.values():
            distinct = {rdp_rank: dp_rank for dp_rank, rdp_rank in members} if is_prescaled else dict(members)
            if len(distinct) > 1:
                ranks = ", ".join(str(rank) for rank in sorted(distinct.values() if is_prescaled else distinct))
                text = f"data-parallel ranks {ranks} were fed equal batches, so that they train on the same samples"
        if is_prescaled and not text and len(place_of) > groups.rdp.size:
            text = "prescaled_batch: the ranks of a TP_GROUP were fed different batches, but they must feed the same"
        if text:
            self._num_left_of_copies = 0
            return f"smp.step: {text}. Give each its own: {_words(is_prescaled=is_prescaled)}"
        return ""


def _words(*, is_prescaled: bool) -> str:
    axis = "rdp" if is_prescaled else "dp"
    return (
        f"DistributedSampler(data, num_replicas=smp.{axis}_size(), rank=smp.{axis}_rank()), or smp.data_sampler(data),"
    )


def _tensors_in(arguments: Mapping[str, Any]) -> list[tuple[trees.Path, torch.Tensor]]:
    tensors: list[tuple[trees.Path, torch.Tensor]] = []

    def note(path: trees.Path, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and not leaf.is_nested:
            tensors.append((path, leaf))
        return leaf

    trees.map_leaves_with_path(note, dict(arguments))
    return tensors


def _at(arguments: Any, path: trees.Path) -> Any:
    value = arguments
    for key in path:
        if value is not arguments and not trees.is_container(value):
            return None
        value = dict(trees.children(value)).get(key)
    return value


def _is_other_data(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether this is no placeholder, and not the same."""
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype or mine.numel() < 2 or mine.layout != theirs.layout:
        return False
    mine, theirs = mine.detach().to(theirs.device), theirs.detach()
    if bool((mine == mine.flatten()[0]).all()):
        return False
    return not bool(((mine == theirs) | ((mine != mine) & (theirs != theirs))).all())


def _sample(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    flat = flat[:: max(1, flat.numel() // _NUM_ELEMENTS)].contiguous().cpu()
    return bytes(flat.view(torch.uint8).numpy()) + repr((tuple(tensor.shape), tensor.dtype)).encode()
