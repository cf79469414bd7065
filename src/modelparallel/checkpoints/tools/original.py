"""Partial checkpoints of the original library: one pickle per rank, no index (smp-api section 14).

    <path>/<tag>_partial/model_<R>.pt          model.local_state_dict() of the ranks R
    <path>/<tag>_partial/optimizer_<R>.pt      optimizer.local_state_dict()
    <path>/<tag>_partial/user_content.pt

R is <pp_rank>_<tp_rank>, with <_rdp_rank> behind where the ranks of an RDP_GROUP have different parts, or <mp_rank>
alone. What a rank has is read back by the rank of the same place, so that the job must have the same shape. Without a
completion record nobody can tell whether the files are those that were written.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelparallel.checkpoints.partial.agreement import agreed
from modelparallel.checkpoints.partial.job_state import coordinates, sizes
from modelparallel.checkpoints.partial.user_content import Allowed, Loading, read_restricted, read_user_content
from modelparallel.checkpoints.partial.writing import USER_CONTENT_NAME
from modelparallel.checkpoints.stores.completion import PARTIAL_ENDING, read_newest
from modelparallel.checkpoints.stores.file_streams import shown
from modelparallel.checkpoints.stores.local import Store
from modelparallel.checkpoints.tools.catalogue import kind_of_folder, rank_file
from modelparallel.config.topology import CommGroup
from modelparallel.errors import CheckpointError
from modelparallel.job.messages import allgather
from modelparallel.optimizer.states import MASTER_KEY, RANGE_KEY
from modelparallel.parameters.table import PARTIAL_KEY

if TYPE_CHECKING:
    from modelparallel.model.wrapper import DistributedModel
    from modelparallel.optimizer.wrapper import DistributedOptimizer
    from modelparallel.training.runtime import Runtime

logger = logging.getLogger("modelparallel")

#: How the names of parameters begin in some of its files, beside the names in the user's model.
MODULE_PREFIX = "module."
_SHARDED_KEYS = ("fp32_flat_groups", "partition_count")


def find_original(runtime: Runtime, store: Store, tag: str | None) -> str | None:
    """The folder of a checkpoint with this layout below the path; None if the tag is no such one. Collective over the
    world.
    """
    folder: str | None = None
    with agreed():
        if runtime.session.groups.world.rank_in_group == 0:
            name = read_newest(store) if tag is None else tag + PARTIAL_ENDING
            if name is not None:
                name = name if name.endswith(PARTIAL_ENDING) else name + PARTIAL_ENDING
                is_one = store.is_folder(name) and kind_of_folder(store.child(name)) == "original"
                folder = name if is_one else None
    answers: list[str | None] = allgather(folder, CommGroup.WORLD)
    return answers[0]


def load_original(
    runtime: Runtime,
    folder: Store,
    model: DistributedModel,
    optimizer: DistributedOptimizer | None,
    data_loader: Any,
    how: Loading,
) -> Any:
    """Load a checkpoint of this layout; returns its user content. Collective over the world.

    Args:
        folder: the store of the checkpoint's folder.
        optimizer: gets its state, if there are files of one.
        data_loader: must be None: there is no place in the data in it.
        how: as the script has asked for.

    Raises CheckpointError on all ranks for a job of another shape, for classes that are not allowed, and for the layout
    of sharded data parallelism.
    """
    if data_loader is not None:
        raise CheckpointError(
            f"{shown(folder.path_of())!r} is of the original library, which keeps no place in the data: resume without "
            "data_loader"
        )
    state: dict[str, Any] | None = None
    trust = (how.allowed_types, how.trust_pickles)
    with agreed():
        files = _files_of_job(runtime, folder)
        entries = _model_entries(runtime, folder, files["model"], model, trust)
        name = None if optimizer is None else _own_file(runtime, "optimizer", files.get("optimizer", set()))
        if name is not None:
            state = _checked_state(folder, name, read_restricted(folder, name, name, *trust))
            if how.masters_only:
                masters = {index: _masters(values) for index, values in state["state"].items()}
                state["state"] = {index: values for index, values in masters.items() if values}
        content = read_user_content(folder, USER_CONTENT_NAME, *trust)
        model.load_state_dict(entries, strict=how.strict, same_partition_load=True)
    if optimizer is not None and state is not None:
        is_sharded = any(RANGE_KEY in values for values in state["state"].values())
        optimizer.load_state_dict(state, gather_if_shard=not is_sharded)
    if runtime.session.groups.world.rank_in_group == 0:
        _warn(folder, files, optimizer, state)
    return content


def _files_of_job(runtime: Runtime, folder: Store) -> dict[str, set[tuple[int, ...]]]:
    """The ranks by noun. Raises CheckpointError unless the models are those of a job of this shape."""
    files: dict[str, set[tuple[int, ...]]] = {}
    for name in folder.names():
        noun_and_ranks = rank_file(name)
        if noun_and_ranks is not None:
            files.setdefault(noun_and_ranks[0], set()).add(noun_and_ranks[1])
    pp_size, tp_size, _ = sizes(runtime.session.groups)
    ranks = files["model"]
    pairs: set[tuple[int, ...]] = {rank[:2] for rank in ranks}
    if len({len(rank) for rank in ranks}) > 1:
        raise CheckpointError(
            f"{shown(folder.path_of())!r} holds parts of models under two sorts of names ({_names(ranks)}): they are "
            "of several checkpoints; remove those that are not of this one"
        )
    if len(next(iter(ranks))) == 1:
        expected: set[tuple[int, ...]] = {(mp_rank,) for mp_rank in range(pp_size * tp_size)}
        saved = f"{len(pairs)} ranks of an MP_GROUP"
    else:
        expected = {(pp, tp) for pp in range(pp_size) for tp in range(tp_size)}
        pp, tp = (max(pair[axis] for pair in pairs) + 1 for axis in (0, 1))
        saved = f"pipeline_parallel_degree={pp} and tensor_parallel_degree={tp}"
    if pairs != expected:
        raise CheckpointError(
            f"{shown(folder.path_of())!r} has one file per rank, without an index, and is loaded by a job of the shape "
            f"that saved it: it was saved with {saved} ({_names(ranks)}), and this job has pipeline_parallel_degree="
            f"{pp_size} and tensor_parallel_degree={tp_size}. Resume with those degrees, or copy the files that are "
            "missing; a checkpoint that this library saves then is read on any shape"
        )
    return files


def _names(ranks: set[tuple[int, ...]]) -> str:
    names = [f"model_{'_'.join(map(str, rank))}.pt" for rank in sorted(ranks)]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _own_file(runtime: Runtime, noun: str, ranks: set[tuple[int, ...]], pp_rank: int | None = None) -> str | None:
    """The file of this rank, or of the rank at its place on another stage; None if there is none."""
    groups = runtime.session.groups
    own_pp, tp, rdp = coordinates(groups)
    pp = own_pp if pp_rank is None else pp_rank
    mp_rank = groups.mp.rank_in_group if pp_rank is None or groups.tp.size > 1 else pp_rank
    for rank in ((pp, tp, rdp), (pp, tp), (pp, tp, 0), (mp_rank,)):
        if rank in ranks:
            return f"{noun}_{'_'.join(map(str, rank))}.pt"
    return None


def _model_entries(
    runtime: Runtime,
    folder: Store,
    ranks: set[tuple[int, ...]],
    model: DistributedModel,
    trust: tuple[Sequence[Allowed], bool],
) -> dict[str, Any]:
    """What the ranks of all stages have at this rank's place: the partition of this job may be another one."""
    entries: dict[str, Any] = {}
    own = runtime.session.groups.pp.rank_in_group
    stages = sorted(range(runtime.session.groups.pp.size), key=lambda stage: stage != own)
    for name in dict.fromkeys(_own_file(runtime, "model", ranks, stage) for stage in stages):
        if name is None:
            continue
        value = read_restricted(folder, name, name, *trust, mmap=True)
        if isinstance(value, Mapping) and isinstance(value.get("module"), Mapping):
            value = value["module"]
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise CheckpointError(
                f"{shown(folder.path_of(name))!r} holds a {type(value).__name__} and not the state dict of a model: it "
                "is of another layout; read it with torch.load"
            )
        for key, entry in value.items():
            entries.setdefault(key, entry)
    entries.pop(PARTIAL_KEY, None)
    known = set(model.module.state_dict(keep_vars=True))
    if entries and not known & entries.keys() and all(key.startswith(MODULE_PREFIX) for key in entries):
        entries = {key.removeprefix(MODULE_PREFIX): entry for key, entry in entries.items()}
    return {**entries, PARTIAL_KEY: True}


def _checked_state(folder: Store, name: str, value: Any) -> dict[str, Any]:
    where = repr(shown(folder.path_of(name)))
    if isinstance(value, Mapping) and any(key in value for key in _SHARDED_KEYS):
        raise CheckpointError(
            f"{where} is of sharded data parallelism in the original library: merge it with "
            "get_full_state_dict_from_sharded_data_parallel_checkpoint, and load the result with partial=False"
        )
    is_state = (
        isinstance(value, Mapping)
        and isinstance(value.get("state"), Mapping)
        and isinstance(value.get("param_groups"), Sequence)
        and all(isinstance(values, Mapping) for values in value["state"].values())
    )
    if not is_state:
        raise CheckpointError(
            f"{where} is not what optimizer.local_state_dict() gives: resume with load_optimizer=False, or read the "
            "file with torch.load"
        )
    return {**value, "state": dict(value["state"]), PARTIAL_KEY: True}


def _masters(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key in (MASTER_KEY, RANGE_KEY) and MASTER_KEY in values}


def _warn(folder: Store, files: Mapping[str, Any], optimizer: Any, state: Mapping[str, Any] | None) -> None:
    logger.warning(
        "%s has no completion record: whether its files are those that were written cannot be told",
        shown(folder.path_of()),
    )
    has_masters = state is not None and any(MASTER_KEY in values for values in state["state"].values())
    if optimizer is not None and "fp16_states" in files and not has_masters:
        logger.warning(
            "the files fp16_states_*.pt are not read: fp32 masters are made from the parameters, and the loss scale "
            "begins anew"
        )
