"""State dicts of a distributed model: local parts, whole ones, and loading both (smp-api section 5)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.distributed.tensor import DTensor

from modelparallel.config.topology import CommGroup, RankType
from modelparallel.errors import SMPError, UnsupportedError
from modelparallel.job.messages import allgather, recv_from, send
from modelparallel.model.absent_tensors import make_present
from modelparallel.nn.huggingface import translations_of
from modelparallel.parameters.table import PARTIAL_KEY
from modelparallel.plan.rows import ParameterRow
from modelparallel.training.participants import Participant

if TYPE_CHECKING:
    from modelparallel.training.runtime import Runtime


class StatefulModel(Participant, Protocol):
    """A wrapped model, with what its states need."""

    _runtime: Runtime


class StateDictError(SMPError, RuntimeError):
    """A state dict does not fit the model."""


def local_state_dict(model: StatefulModel, gather_if_shard: bool) -> dict[str, Any]:
    """The entries that this rank holds, detached, and the partial mark.

    A parameter that is sharded by sharded data parallelism is a ``DTensor`` with this rank's rows, or gathered:
    collective over the sharding group then.
    """
    result: dict[str, Any] = {}
    sharding = model.gradients.sharding
    gathered: dict[int, torch.Tensor] = {}  # a tied parameter has several names
    for name, value in _local_entries(model):
        if isinstance(value, DTensor) and gather_if_shard:
            if id(value) not in gathered:
                gathered[id(value)] = value.full_tensor().detach() if sharding is None else sharding.whole(value)
            value = gathered[id(value)]
        elif isinstance(value, torch.Tensor):
            value = value.detach()
        result[name] = value
    result[PARTIAL_KEY] = True
    return result


def _local_entries(model: StatefulModel) -> Iterator[tuple[str, Any]]:
    """(name, value) of what this rank holds, or holds a shard of. Local."""
    stage = model._runtime.engine.stage
    for name, value in model.module.state_dict(keep_vars=True).items():
        row = model.table.row_named(name) if isinstance(value, torch.Tensor) else None
        if row is None or model.table.is_local(row, stage):
            yield name, value


def full_state_dict(model: StatefulModel, gather_to_rank0: bool) -> dict[str, Any]:
    """The merged entries of the caller's MP_GROUP, on the CPU, in the order of the module."""
    groups = model._runtime.session.groups
    local = local_state_dict(model, gather_if_shard=True)
    local.pop(PARTIAL_KEY)
    on_cpu = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in local.items()}
    own = (groups.pp.rank_in_group, groups.tp.rank_in_group, on_cpu)
    if gather_to_rank0 and groups.world.rank_in_group != 0:
        if 0 in groups.mp.ranks:
            send(own, 0, RankType.MP_RANK)
        return {}
    if groups.mp.size == 1:
        return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in on_cpu.items()}
    if gather_to_rank0:
        return merge(model, [own, *(recv_from(mp_rank, RankType.MP_RANK) for mp_rank in range(1, groups.mp.size))])
    return merge(model, allgather(own, CommGroup.MP_GROUP))


def merge(model: StatefulModel, parts: Sequence[tuple[int, int, Mapping[str, Any]]]) -> dict[str, Any]:
    """One whole dict from the parts ``(pp_rank, tp_rank, entries)`` of an MP_GROUP."""
    values: dict[str, dict[int, Any]] = {}
    for _, tp_rank, entries in sorted(parts, key=lambda part: part[:2]):
        for name, value in entries.items():
            values.setdefault(name, {}).setdefault(tp_rank, value)
    names = [name for name in model.module.state_dict(keep_vars=True) if name in values]
    names.extend(name for name in values if name not in set(names))
    return {name: _joined(model.table.row_named(name), values[name]) for name in names}


def _joined(row: ParameterRow | None, by_tp_rank: Mapping[int, Any]) -> Any:
    values = [by_tp_rank[tp_rank] for tp_rank in sorted(by_tp_rank)]
    if row is None or row.split is None or not isinstance(values[0], torch.Tensor):
        return values[0]
    if values[0].shape == torch.Size(row.full_shape):
        return values[0]
    return row.split.join(values)


def load_state_dict(
    model: StatefulModel, state: Mapping[str, Any], strict: bool, same_partition_load: bool
) -> torch.nn.modules.module._IncompatibleKeys:
    """Load a full dict, or a partial one of this partition; returns torch's record of missing and unexpected names."""
    entries = dict(state) if PARTIAL_KEY in state else translated(model, state)
    is_partial = bool(entries.pop(PARTIAL_KEY, False))
    groups = model._runtime.session.groups
    # Shards are this rank's own, and nothing to be merged.
    same_partition_load = same_partition_load or any(isinstance(value, DTensor) for value in entries.values())
    if is_partial and not same_partition_load and groups.mp.size > 1:
        parts = allgather((groups.pp.rank_in_group, groups.tp.rank_in_group, entries), CommGroup.MP_GROUP)
        entries = merge(model, parts)
    expected = model.module.state_dict(keep_vars=True)
    local_names = {name for name, _ in _local_entries(model)}
    # Before the partition every name is local, and which of them a part must hold is checked when it is made.
    is_early = same_partition_load and model._runtime.is_pipelined and not model.partitioned
    required: Iterable[str] = local_names if same_partition_load else expected
    missing = [] if is_early else [name for name in required if name not in entries]
    unexpected = [name for name in entries if name not in expected]
    if strict and (missing or unexpected):
        raise StateDictError(
            f"load_state_dict(strict=True): missing {sorted(missing) or 'none'}; unexpected "
            f"{sorted(unexpected) or 'none'}: load a state dict of the same model, or pass strict=False"
        )
    _check_shapes(model, entries)
    sliced = {name: local_entry(model, name, entries[name]) for name in entries if name in local_names}
    # strict=False: what lives on other stages is missing here by design; names were checked above.
    model.module.load_state_dict(sliced, strict=False)
    model.has_own_part = model.has_own_part or (is_early and is_partial)
    model.early_names = set(sliced) if is_early and strict else None
    return torch.nn.modules.module._IncompatibleKeys(missing, unexpected)


def translated(model: StatefulModel, state: Mapping[str, Any]) -> dict[str, Any]:
    """A plain dict, with the names of transformers of the families that were replaced in the model translated, and tied
    names completed. Local.

    A dict that is under the model's own names already comes back as it is.
    """
    entries = dict(state)
    for _, to_smp in translations_of(model.module):
        entries = to_smp(entries)
    return entries if entries.keys() == state.keys() else with_tied_names(model, entries)


def with_tied_names(model: StatefulModel, entries: Mapping[str, Any]) -> dict[str, Any]:
    """The dict with all names of each tied tensor of which it has one: files of transformers hold one. Local."""
    result = dict(entries)
    for source in (model.table.parameters(), model.table.buffers()):
        for row, _ in source:
            names = (row.name, *row.aliases)
            held = [name for name in names if name in result]
            if held:
                result.update({name: result[held[0]] for name in names if name not in result})
    return result


def check_early_part(model: StatefulModel) -> None:
    """At the partition: the part that was loaded before it must be what this stage now holds."""
    if model.early_names is None:
        return
    missing = sorted({name for name, _ in _local_entries(model)} - model.early_names)
    if missing:
        raise StateDictError(
            f"pp_rank {model._runtime.engine.stage} was given a partial state dict with same_partition_load=True that "
            f"lacks {', '.join(missing)}, which it now holds: the partition has changed. Load it with "
            "same_partition_load=False, or keep the plan (partition_file, load_partition)"
        )


def _check_shapes(model: StatefulModel, entries: Mapping[str, Any]) -> None:
    """Raise StateDictError for a wrong shape of any name, also of other stages, so that every rank comes to the same
    end.
    """
    sharding = model.gradients.sharding
    for name, value in entries.items():
        row = model.table.row_named(name)
        if row is None or not isinstance(value, torch.Tensor):
            continue
        own: Any = model.table.tensor(row.name)
        if isinstance(value, DTensor) and (sharding is None or not _are_shards_alike(value, own)):
            raise StateDictError(
                f"load_state_dict: '{name}' is a shard of one rank (local_state_dict of a model under sharded data "
                "parallelism), and this rank holds another part: load a state_dict(), or "
                "local_state_dict(gather_if_shard=True)"
            )
        local_shape = model.table.tensor(row.name).shape
        if value.shape not in (torch.Size(row.full_shape), local_shape):
            shape, local = tuple(value.shape), f" (local slice {tuple(local_shape)})" if row.split is not None else ""
            raise StateDictError(f"load_state_dict: '{name}' has shape {shape}, the model has {row.full_shape}{local}")


def _are_shards_alike(value: DTensor, own: Any) -> bool:
    return isinstance(own, DTensor) and value.placements == own.placements and value.device_mesh == own.device_mesh


def local_entry(model: StatefulModel, name: str, value: Any) -> Any:
    """What this rank's module takes: the tensor-parallel slice, and of a sharded parameter this rank's shard."""
    value = _local_slice(model, name, value)
    row, sharding = model.table.row_named(name), model.gradients.sharding
    if row is None or sharding is None or not isinstance(value, torch.Tensor):
        return value
    parameter = model.table.tensor(row.name)
    if not sharding.has(parameter):
        return value
    return value if isinstance(value, DTensor) else sharding.placed(parameter, value)


def _local_slice(model: StatefulModel, name: str, value: Any) -> Any:
    row = model.table.row_named(name)
    if row is None or row.split is None or not isinstance(value, torch.Tensor):
        return value
    if value.shape == model.table.tensor(row.name).shape != torch.Size(row.full_shape):
        return value  # already the local slice
    tp = model._runtime.session.groups.tp
    return row.split.slice_of(value, tp.rank_in_group, tp.size)


def gather_whole(model: StatefulModel) -> None:
    """Give every stage all parameters and buffers, as before the partition; collective over MP_GROUP."""
    if model.gradients.sharding is not None:
        raise UnsupportedError(
            "model.cpu() of a model in a pipeline with sharded_data_parallel_degree > 1: its parameters are sharded, "
            "and stay so. model.state_dict() gives the whole model on the CPU"
        )
    groups = model._runtime.session.groups
    held = {
        row.name: tensor.detach().cpu()
        for source in (model.table.parameters(), model.table.buffers())
        for row, tensor in source
        if model.table.is_local(row, model._runtime.engine.stage)
    }
    parts = allgather((groups.pp.rank_in_group, groups.tp.rank_in_group, held), CommGroup.MP_GROUP)
    values: dict[str, torch.Tensor] = {}
    for _, tp_rank, entries in parts:
        if tp_rank == groups.tp.rank_in_group:
            values.update(entries)
    for source in (model.table.parameters(), model.table.buffers()):
        for row, tensor in source:
            if not model.table.is_local(row, model._runtime.engine.stage):
                make_present(tensor, values[row.name].clone())
