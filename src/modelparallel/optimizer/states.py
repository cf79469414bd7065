"""State dicts of a distributed optimizer: local ones, whole ones, and loading both (smp-api section 7).

State is kept by the index of the parameter in the whole model's optimizer, in the shape of the parameter, whatever the
optimizer updates in its place: shards are put together, tensor-parallel slices joined, and taken apart again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from modelparallel.config.topology import CommGroup
from modelparallel.errors import SMPConfigError
from modelparallel.job.messages import allgather
from modelparallel.parameters.shards import local_part
from modelparallel.parameters.table import PARTIAL_KEY
from modelparallel.torch_compat.private_parts import version_of
from modelparallel.training.participants import ParameterHolder

if TYPE_CHECKING:
    from modelparallel.optimizer.flat_groups import FlatGroups
    from modelparallel.optimizer.targets import Targets
    from modelparallel.precision import LossScaler
    from modelparallel.training.participants import Target
    from modelparallel.training.runtime import Runtime


class StatefulOptimizer(ParameterHolder, Protocol):
    """A wrapped optimizer, with what its states need."""

    _runtime: Runtime
    loss_scaler: LossScaler
    own_parts: FlatGroups
    targets: Targets

    def has_unpartitioned_parameters(self) -> bool:
        """Whether some of the parameters belong to a model whose partition is still to come."""

    def note_state_for_later(self, state_dict: Mapping[str, Any], gather_if_shard: bool) -> None:
        """Load it when the model is partitioned."""

    def load_state_dict(self, state_dict: Mapping[str, Any], gather_if_shard: bool = True) -> None:
        """Load a whole state, a partial one, or shards."""


#: Beside the optimizer's own entries of a parameter: its fp32 master.
MASTER_KEY = "fp32_master"
#: In a state that holds shards alone: the range of elements.
RANGE_KEY = "shard_range"
SCALER_KEY = "loss_scaler"


def local_state_dict(optimizer: StatefulOptimizer, gather_if_shard: bool) -> dict[str, Any]:
    """See ``DistributedOptimizer.local_state_dict``."""
    result: dict[str, Any] = {
        "state": _local_state(optimizer, gather_if_shard),
        "param_groups": _whole_groups(optimizer),
        PARTIAL_KEY: True,
    }
    return _with_scaler(optimizer, result)


def full_state_dict(optimizer: StatefulOptimizer) -> dict[str, Any]:
    """See ``DistributedOptimizer.state_dict``."""
    state = _local_state(optimizer, gather_if_shard=True)
    if optimizer._runtime.session.groups.mp.size > 1:
        on_cpu = {index: {key: _cpu(value) for key, value in values.items()} for index, values in state.items()}
        state = _merged(optimizer, on_cpu)
    return _with_scaler(optimizer, {"state": state, "param_groups": _whole_groups(optimizer)})


def _with_scaler(optimizer: StatefulOptimizer, result: dict[str, Any]) -> dict[str, Any]:
    if optimizer._runtime.decisions.has_loss_scale:
        result[SCALER_KEY] = optimizer.loss_scaler.state_dict()
    return result


def load_state_dict(optimizer: StatefulOptimizer, state_dict: Mapping[str, Any], gather_if_shard: bool) -> None:
    """See ``DistributedOptimizer.load_state_dict``."""
    _check_groups(optimizer, state_dict["param_groups"])
    if optimizer.has_unpartitioned_parameters():
        for saved, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
            group.update((key, value) for key, value in saved.items() if key != "params")
        optimizer.note_state_for_later(state_dict, gather_if_shard)
        return
    if SCALER_KEY in state_dict:
        optimizer.loss_scaler.load_state_dict(state_dict[SCALER_KEY])
    state: Mapping[int, Mapping[str, Any]] = state_dict["state"]
    if state_dict.get(PARTIAL_KEY) and optimizer._runtime.session.groups.mp.size > 1 and gather_if_shard:
        # Hugging Face's Trainer saves with gather_if_shard=False and loads without; shards are nothing to be merged.
        is_of_shards = any(RANGE_KEY in values for values in state.values())
        if not any(allgather(is_of_shards, CommGroup.MP_GROUP)):
            state = _merged(optimizer, state)
    index_of = {id(parameter): index for index, parameter in enumerate(optimizer.all_parameters())}

    def own_values(parameter: nn.Parameter, target: Target | None) -> dict[str, Any] | None:
        values = state.get(index_of[id(parameter)])
        return None if values is None else _values_of_target(optimizer, parameter, target, values)

    take_state(optimizer, state_dict["param_groups"], own_values)


def take_state(
    optimizer: StatefulOptimizer,
    groups: Sequence[Mapping[str, Any]],
    own_values: Callable[[nn.Parameter, Target | None], dict[str, Any] | None],
) -> None:
    """Give the inner optimizer new settings of its groups and a new state. Local.

    ``own_values`` gives the state of a parameter's target (None: of the parameter itself), with the value of its master
    under ``MASTER_KEY`` if there is one; None where there is no state.
    """
    local_groups: list[dict[str, Any]] = []
    local_state: dict[int, dict[str, Any]] = {}
    masters: list[tuple[Target, torch.Tensor]] = []
    position = 0
    for saved, group in zip(groups, optimizer.param_groups, strict=True):
        positions = []
        for tensor in group["params"]:
            target = optimizer.targets.of_tensor(tensor)
            own = own_values(tensor if target is None else target.parameter, target)
            if own is not None:
                master = own.pop(MASTER_KEY, None)
                if master is not None and target is not None and target.has_master:
                    masters.append((target, master))
                if own:
                    local_state[position] = own
            positions.append(position)
            position += 1
        local_groups.append({**{key: value for key, value in saved.items() if key != "params"}, "params": positions})
    optimizer.optimizer.load_state_dict({"state": local_state, "param_groups": local_groups})
    with torch.no_grad():
        for target, master in masters:
            target.tensor.copy_(master)
            target.version = version_of(target.parameter)  # it is the truth, whatever was loaded into the parameter
    optimizer.own_parts.refresh()


def _check_groups(optimizer: StatefulOptimizer, saved: Sequence[Mapping[str, Any]]) -> None:
    lengths, own = [len(group["params"]) for group in saved], [len(group) for group in optimizer.all_groups()]
    if lengths != own:
        raise SMPConfigError(
            f"optimizer.load_state_dict: the state has {len(lengths)} groups of {lengths} parameters, the "
            f"optimizer {len(own)} of {own}: load a state of an optimizer over the same parameters in the same groups"
        )


def _whole_groups(optimizer: StatefulOptimizer) -> list[dict[str, Any]]:
    result, start = [], 0
    for group, everything in zip(optimizer.param_groups, optimizer.all_groups(), strict=True):
        entry = {key: value for key, value in group.items() if key != "params"}
        entry["params"] = list(range(start, start + len(everything)))
        start += len(everything)
        result.append(entry)
    return result


# Shards


def _local_state(optimizer: StatefulOptimizer, gather_if_shard: bool) -> dict[int, dict[str, Any]]:
    """By index, in the shape of the local parameter; ``gather_if_shard``: also of parameters that are shared out, of
    which this rank has a part or none. Collective over DP_GROUP then.
    """
    inner, targets = optimizer.optimizer.state, optimizer.targets
    state: dict[int, dict[str, Any]] = {}
    pieces: list[tuple[int, int, int, int, dict[str, Any]]] = []
    tp_rank = optimizer._runtime.session.groups.tp.rank_in_group
    for index, parameter in enumerate(optimizer.all_parameters()):
        for target in targets.of_parameter(parameter):
            values = dict(inner.get(target.tensor, {}))
            if target.has_master:
                values[MASTER_KEY] = target.tensor.detach()
            if not values:
                continue
            if target.shard is None:
                state[index] = values
                continue
            start, stop = target.shard.start, target.shard.stop
            if gather_if_shard:
                on_cpu = {key: _cpu(_flat(target, value)) for key, value in values.items()}
                pieces.append((index, tp_rank, start, stop, on_cpu))
            else:
                state[index] = {**values, RANGE_KEY: (start, stop)}
    if gather_if_shard and targets.shards():
        gathered = [piece for part in allgather(pieces, CommGroup.DP_GROUP) for piece in part]
        state.update(_put_together(optimizer, gathered))
    return state


def _flat(target: Target, value: Any) -> Any:
    """A value of the target's shape as one line of elements."""
    if isinstance(value, torch.Tensor) and value.shape == target.tensor.shape:
        return local_part(value).detach().reshape(-1)
    return value


def _put_together(
    optimizer: StatefulOptimizer, pieces: Iterable[tuple[int, int, int, int, dict[str, Any]]]
) -> dict[int, dict[str, Any]]:
    parameters = list(optimizer.all_parameters())
    own_tp_rank = optimizer._runtime.session.groups.tp.rank_in_group
    by_index: dict[int, dict[int, tuple[int, dict[str, Any]]]] = {}
    for index, tp_rank, start, stop, values in pieces:
        row = optimizer._runtime.index.row_of(parameters[index])
        is_split = row is not None and row.split is not None
        if not is_split or tp_rank == own_tp_rank:
            by_index.setdefault(index, {}).setdefault(start, (stop, values))
    state: dict[int, dict[str, Any]] = {}
    for index, by_start in sorted(by_index.items()):
        parameter = parameters[index]
        ranges = [(start, *by_start[start]) for start in sorted(by_start) if by_start[start][0] > start]
        if not ranges:
            continue
        first_start, first_stop, first = ranges[0]
        merged = dict(first)
        for key, value in first.items():
            if isinstance(value, torch.Tensor) and value.ndim and value.numel() == first_stop - first_start:
                whole = torch.cat([values[key].reshape(-1) for _, _, values in ranges])
                if whole.numel() == parameter.numel():
                    merged[key] = whole.view(parameter.shape)
        state[index] = merged
    return state


def _values_of_target(
    optimizer: StatefulOptimizer, parameter: nn.Parameter, target: Target | None, values: Mapping[str, Any]
) -> dict[str, Any]:
    """What belongs to the target of the state of a whole parameter."""
    if RANGE_KEY in values:
        return _values_of_same_shard(optimizer, parameter, target, values)
    # Copies: optimizers change their state in place, and torch's do not copy what they load.
    own = {key: _copied(_local_part(optimizer, parameter, value)) for key, value in values.items()}
    if target is None or target.shard is None:
        return own
    start, stop = target.shard.start, target.shard.stop
    return {
        key: value.reshape(-1)[start:stop].reshape(local_part(target.tensor).shape).clone()
        if isinstance(value, torch.Tensor) and value.ndim and value.shape == parameter.shape
        else value
        for key, value in own.items()
    }


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _values_of_same_shard(
    optimizer: StatefulOptimizer, parameter: nn.Parameter, target: Target | None, values: Mapping[str, Any]
) -> dict[str, Any]:
    held = tuple(values[RANGE_KEY])
    own = None if target is None or target.shard is None else (target.shard.start, target.shard.stop)
    if own != held:
        name = optimizer._runtime.index.names_of([parameter])[0]
        raise SMPConfigError(
            f"optimizer.load_state_dict: the state holds shards (it was saved with gather_if_shard=False), elements "
            f"{held[0]} to {held[1]} of '{name}', and this rank updates {own}: load the shards on the ranks that saved "
            "them, with the same configuration, or save with gather_if_shard=True"
        )
    return {key: _copied(value) for key, value in values.items() if key != RANGE_KEY}


# Slices and stages


def _merged(optimizer: StatefulOptimizer, local: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """The whole state from the ``local`` ones of an MP_GROUP; collective over it."""
    groups = optimizer._runtime.session.groups
    own = (
        groups.pp.rank_in_group,
        groups.tp.rank_in_group,
        optimizer._runtime.index.names_of(optimizer.all_parameters()),
        dict(local),
    )
    parts = allgather(own, CommGroup.MP_GROUP)
    for pp_rank, tp_rank, names, _ in parts:
        if names != own[2]:
            raise SMPConfigError(
                f"the optimizers of pp_rank {pp_rank}, tp_rank {tp_rank} and of pp_rank {own[0]}, tp_rank {own[1]} "
                f"were not built over the same parameters ({len(names)} and {len(own[2])}), so that their states "
                "cannot be merged: build the optimizer before the first step, or from the parameters of "
                "model.virtual_named_parameters()"
            )
    parameters = list(optimizer.all_parameters())
    slices: dict[int, dict[int, Mapping[str, Any]]] = {}
    for _, tp_rank, _, entries in sorted(parts, key=lambda part: part[:2]):
        for index, values in entries.items():
            slices.setdefault(index, {}).setdefault(tp_rank, values)
    result = {}
    for index in sorted(slices):
        by_rank = [slices[index][tp_rank] for tp_rank in sorted(slices[index])]
        row = optimizer._runtime.index.row_of(parameters[index])
        split = row.split if row is not None else None
        merged = dict(by_rank[0])
        if split is not None:
            shape = torch.Size(split.local_shape(0, groups.tp.size))  # of rank 0, whose values these are
            for key, value in merged.items():
                if isinstance(value, torch.Tensor) and value.shape == shape:
                    merged[key] = split.join([values[key] for values in by_rank])
        result[index] = merged
    return result


def _local_part(optimizer: StatefulOptimizer, parameter: nn.Parameter, value: Any) -> Any:
    row = optimizer._runtime.index.row_of(parameter)
    if row is None or row.split is None or not isinstance(value, torch.Tensor):
        return value
    split = row.split
    if value.shape != torch.Size(split.full_shape) or value.shape == parameter.shape:
        return value
    tp = optimizer._runtime.session.groups.tp
    return split.slice_of(value, tp.rank_in_group, tp.size)


def _cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, torch.Tensor) else value
