"""Which tensors and objects of models and optimizers go into a checkpoint, under which keys; and where a checkpoint's
tensors go.

[Note: keys] ``model.<name>`` is a parameter or buffer under its name in the user's model,
``optimizer.state.<name>.<key>`` an entry of the optimizer's state of it, in the shape of the whole parameter where it
has the parameter's shape. The fp32 master is the entry ``fp32_master``. A second model of the process is ``model_1``, a
second optimizer ``optimizer_1``. All that is not a tensor is an object under a key of its own.

[Note: who writes] Tensors that several ranks hold are offered by all of them, as equal pieces, and DCP lets one of them
write, so that each writes about equally much. Copies of a shared parameter on further stages are cut differently there,
and only its home offers it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modelparallel.checkpoints.partial.pieces import Piece, pieces_of_range, pieces_of_slice, whole_piece
from modelparallel.errors import CheckpointError
from modelparallel.nn.huggingface import families_of
from modelparallel.optimizer import states as optimizer_states
from modelparallel.plan.rows import ParameterRow

if TYPE_CHECKING:
    from modelparallel.model.wrapper import DistributedModel
    from modelparallel.optimizer.wrapper import DistributedOptimizer
    from modelparallel.training.participants import Target

MASTER_KEY = optimizer_states.MASTER_KEY


@dataclass
class Contents:
    """``pieces`` of tensors in this process's memory, ``objects`` by key: anything that ``torch.save`` takes."""

    pieces: list[Piece] = field(default_factory=list)
    objects: dict[str, Any] = field(default_factory=dict)

    def add(self, other: Contents) -> None:
        """Take in what is in ``other``."""
        self.pieces.extend(other.pieces)
        self.objects.update(other.objects)


def numbered(noun: str, index: int) -> str:
    """``model``, ``model_1``, ...: the first part of the keys of the ``index``-th of a process."""
    return noun if index == 0 else f"{noun}_{index}"


# Models


def model_contents(model: DistributedModel, prefix: str) -> Contents:
    """What this rank should offer to write of ``model``. Local."""
    result = Contents()
    stage = model._runtime.engine.stage
    for row, tensor in rows_of(model):
        if row.home in (None, stage):
            result.pieces.extend(model_pieces(model, row, tensor, f"{prefix}.{row.name}"))
    result.objects.update({f"{prefix}.{name}": value for name, value in _other_entries(model)})
    return result


def rows_of(model: DistributedModel) -> Iterator[tuple[ParameterRow, torch.Tensor]]:
    """The parameters and persistent buffers of the whole model. Local."""
    yield from model.table.parameters()
    for row, buffer in model.table.buffers():
        if row.is_persistent:
            yield row, buffer


def model_pieces(model: DistributedModel, row: ParameterRow, tensor: torch.Tensor, key: str) -> list[Piece]:
    """The pieces of one tensor that this rank holds, or holds a shard of. Local."""
    tp, sharding = model._runtime.session.groups.tp, model.gradients.sharding
    if sharding is not None and isinstance(tensor, nn.Parameter) and sharding.has(tensor):
        return [
            piece
            for shard in sharding.shards_of(tensor)
            for piece in pieces_of_range(
                key, shard.tensor.detach(), shard.start, tensor.shape, row.split, tp.rank_in_group, tp.size
            )
        ]
    return pieces_of_slice(key, tensor.detach(), row.split, tp.rank_in_group, tp.size)


def model_facts(model: DistributedModel) -> dict[str, Any]:
    """What the keys of a model do not say, as values of JSON, for tools that have no model: other names of tied
    tensors, tensors without elements, which are in no file, and where families of transformers were replaced. Local.
    """
    rows = list(rows_of(model))
    return {
        "tied": {row.name: list(row.aliases) for row, _ in rows if row.aliases},
        "empty": {row.name: [list(row.full_shape), str(t.dtype)] for row, t in rows if 0 in row.full_shape},
        "families": [list(family) for family in families_of(model.module)],
    }


def _other_entries(model: DistributedModel) -> Iterator[tuple[str, Any]]:
    """(name, value) of the entries of the module's state dict that are no tensors of the parameter table
    (``get_extra_state``).
    """
    stage, plan = model._runtime.engine.stage, model.partition_plan
    for name, value in model.module.state_dict(keep_vars=True).items():
        if isinstance(value, torch.Tensor) and model.table.row_named(name) is not None:
            continue
        home = None if plan is None else plan.home_of_module(name.rpartition(".")[0])
        if home in (None, stage):
            yield name, value


# Optimizers


def optimizer_contents(optimizer: DistributedOptimizer, prefix: str) -> Contents:
    """What this rank should offer to write of ``optimizer``. Local."""
    result = Contents(objects={f"{prefix}.param_groups": group_settings(optimizer)})
    if optimizer._runtime.decisions.has_loss_scale:
        result.objects[f"{prefix}.{optimizer_states.SCALER_KEY}"] = optimizer.loss_scaler.state_dict()
    stage, inner = optimizer._runtime.engine.stage, optimizer.optimizer.state
    for parameter, row in named_parameters(optimizer):
        if row.home not in (None, stage):
            continue
        for target in optimizer.targets.of_parameter(parameter):
            start = f"{prefix}.state.{row.name}"
            if target.has_master:
                master = target.tensor.detach()
                result.pieces.extend(target_pieces(optimizer, f"{start}.{MASTER_KEY}", row, target, master))
            for key, value in inner.get(target.tensor, {}).items():
                _add_value(result, optimizer, start, str(key), row, target, value)
    return result


def named_parameters(optimizer: DistributedOptimizer) -> Iterator[tuple[nn.Parameter, ParameterRow]]:
    """The parameters of the whole model's optimizer that belong to a wrapped model, each once. Local."""
    for parameter in optimizer.all_parameters():
        row = optimizer._runtime.index.row_of(parameter)
        if row is not None:
            yield parameter, row


def group_settings(optimizer: DistributedOptimizer) -> list[dict[str, Any]]:
    """The groups with the names of their parameters, of the whole model. Local."""
    result = []
    for group, everything in zip(optimizer.param_groups, optimizer.all_groups(), strict=True):
        settings = {key: value for key, value in group.items() if key != "params"}
        result.append({**settings, "params": optimizer._runtime.index.names_of(everything)})
    return result


def has_shape_of_target(value: Any, target: Target) -> bool:
    """Whether a value of the optimizer's state has an element for each that the target has."""
    return isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape == target.tensor.shape


def target_pieces(
    optimizer: DistributedOptimizer, key: str, row: ParameterRow, target: Target, value: torch.Tensor
) -> list[Piece]:
    """The pieces of a tensor that has the shape of the target. Local."""
    tp = optimizer._runtime.session.groups.tp
    if target.shard is None:
        return pieces_of_slice(key, value, row.split, tp.rank_in_group, tp.size)
    shape = target.parameter.shape
    return pieces_of_range(key, value, target.shard.start, shape, row.split, tp.rank_in_group, tp.size)


def own_key(optimizer: DistributedOptimizer, row: ParameterRow, target: Target, key: str) -> str:
    """The name of a tensor of another shape than its parameter's: of a part of a parameter it cannot be cut or joined
    (a norm, a factored moment), so that its key says of which part it is.
    """
    tp = optimizer._runtime.session.groups.tp
    if row.split is not None:
        key += f"@tp_{tp.rank_in_group}_of_{tp.size}"
    if target.shard is not None and target.shard.stop - target.shard.start < target.parameter.numel():
        key += f"@{target.shard.start}_to_{target.shard.stop}"
    return key


def _add_value(
    result: Contents,
    optimizer: DistributedOptimizer,
    start: str,
    key: str,
    row: ParameterRow,
    target: Target,
    value: Any,
) -> None:
    if "." in key or "@" in key:
        raise CheckpointError(
            f"{type(optimizer.optimizer).__name__} keeps {key!r} in its state of '{row.name}': names with '.' or '@' "
            "cannot be told from names of parameters in a checkpoint; rename it"
        )
    if has_shape_of_target(value, target):
        result.pieces.extend(target_pieces(optimizer, f"{start}.{key}", row, target, value.detach()))
    elif isinstance(value, torch.Tensor) and value.ndim == 0:
        result.pieces.append(whole_piece(f"{start}.{key}", value.detach()))
    elif isinstance(value, torch.Tensor):
        if value.numel():
            result.pieces.append(whole_piece(f"{start}.{own_key(optimizer, row, target, key)}", value.detach()))
    else:
        result.objects[f"{start}.{key}"] = value


def state_keys(keys: Mapping[str, Any], prefix: str) -> dict[str, dict[str, str]]:
    """The keys of the optimizer's state in a checkpoint: by the name of the parameter, then by the name in its state
    (with the part that it is of, see :func:`own_key`).
    """
    start = f"{prefix}.state."
    result: dict[str, dict[str, str]] = {}
    for key in keys:
        if key.startswith(start):
            name, _, entry = key.removeprefix(start).rpartition(".")
            result.setdefault(name, {})[entry] = key
    return result
