"""Copies and averages of whole models: target networks, momentum teachers, exponential moving averages.

Two wrapped models of one structure hold the same share on every rank (see the note on twins in model/placing.py), so
that each rank updates its own tensors and nothing is sent. Anything else (a module that is not wrapped, models with
different partitions) goes through whole values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from modelparallel.errors import PartitionError, SMPConfigError, StepUsageError
from modelparallel.model import states as model_states
from modelparallel.model.planning import difference_of
from modelparallel.model.wrapper import DistributedModel
from modelparallel.precision import update_masters, write_back

_HALF = (torch.float16, torch.bfloat16)
#: Writes a value of the source to the tensor of the target with this name; whether it is a buffer.
_Write = Callable[[str, torch.Tensor, torch.Tensor, bool], None]


def copy_weights(target: nn.Module, source: nn.Module) -> None:
    """Give ``target`` the parameters and buffers of ``source``; outside a step function, on every rank. Ours, not the
    original's.

    Local where both are wrapped and of one structure (which are partitioned alike), collective over MP_GROUP where one
    of them is not wrapped (it then has, or gets, the whole values) or the partitions differ. Works before and after the
    partition; masters of half-precision weights follow at the next ``optimizer.step()``.

    Raises:
        PartitionError: the models do not correspond.
        SMPConfigError: an argument is no model.
        StepUsageError: inside a step function.
    """
    _update(target, source, _copy, "smp.copy_weights")


def average_weights(average: nn.Module, model: nn.Module, decay: float, *, averages_buffers: bool = False) -> None:
    """Move the parameters of ``average`` towards those of ``model``: ``decay * average + (1 - decay) * model``. Ours,
    not the original's.

    The average of half-precision weights is kept in fp32 beside them. Where, when, over which group and with which
    error: as :func:`copy_weights`; a ``decay`` outside 0 to 1 is a SMPConfigError.

    Args:
        average: the model that is changed.
        model: the model that is followed.
        decay: the share of the old average, 0 to 1.
        averages_buffers: average floating-point buffers, too; else buffers are copied.
    """
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay <= 1:
        raise SMPConfigError(f"smp.average_weights: decay must be a number from 0 to 1, got {decay!r}")
    masters = average.averages if isinstance(average, DistributedModel) else {}

    def write(name: str, own: torch.Tensor, value: torch.Tensor, is_buffer: bool) -> None:
        if is_buffer and not (averages_buffers and (own.is_floating_point() or own.is_complex())):
            own.copy_(value)
        elif own.dtype in _HALF:
            _average_in_full(masters, name, own, value, decay)
        else:
            own.lerp_(value.to(own.dtype), 1 - decay)

    _update(average, model, write, "smp.average_weights")


def _copy(name: str, own: torch.Tensor, value: torch.Tensor, is_buffer: bool) -> None:
    own.copy_(value)


def _average_in_full(
    masters: dict[str, torch.Tensor], name: str, own: torch.Tensor, value: torch.Tensor, decay: float
) -> None:
    """In half precision a small step would be rounded away."""
    master = masters.get(name)
    if master is None:
        master = masters[name] = own.float()
    update_masters([own], [master])  # type: ignore[list-item]  # what was written to the average since
    master.lerp_(value.float(), 1 - decay)
    write_back([own], [master])  # type: ignore[list-item]


@torch.no_grad()
def _update(target: nn.Module, source: nn.Module, write: _Write, what: str) -> None:
    for model in (target, source):
        if not isinstance(model, nn.Module):
            raise SMPConfigError(f"{what}: expected two models, got a {type(model).__name__}")
        if isinstance(model, DistributedModel) and model._runtime.step is not None:
            raise StepUsageError(f"{what} inside a step function: call it outside, between the steps")
    if isinstance(target, DistributedModel) and isinstance(source, DistributedModel):
        if difference := difference_of(target, source):
            raise PartitionError(f"{what}: the two models are not of one structure: {difference}")
        if (source.partitioned, source.partition_plan) == (target.partitioned, target.partition_plan):
            values = dict(_local(source))
            for name, tensor, is_buffer in _held(target):
                write(name, tensor, values[name], is_buffer)
            return
    _update_whole(target, source, write, what)


def _held(model: DistributedModel) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """(name, tensor or this rank's shard of it, whether it is a buffer) of what this rank holds."""
    for rows in (model.table.parameters(), model.table.buffers()):
        for row, tensor in rows:
            if model.is_local(tensor):
                yield row.name, tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach(), row.is_buffer


def _local(model: DistributedModel) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, tensor) for name, tensor, _ in _held(model))


def _update_whole(target: nn.Module, source: nn.Module, write: _Write, what: str) -> None:
    if isinstance(source, DistributedModel):
        values = model_states.full_state_dict(source, gather_to_rank0=False)
    else:
        values = dict(source.state_dict())
    if isinstance(target, DistributedModel):
        values = model_states.translated(target, values)
    inner = target.module if isinstance(target, DistributedModel) else target
    expected = inner.state_dict(keep_vars=True)
    missing = sorted(expected.keys() ^ values.keys())
    if missing:
        raise PartitionError(
            f"{what}: the two models do not correspond: '{missing[0]}' is in one of them only (of a torch "
            "AveragedModel give the module inside, average.module)"
        )
    buffers = {name for name, _ in inner.named_buffers(remove_duplicate=False)}
    done: set[int] = set()  # a tied tensor has several names
    for name, tensor in expected.items():
        if not isinstance(tensor, torch.Tensor) or id(tensor) in done:
            continue
        done.add(id(tensor))
        value = values[name]
        if isinstance(target, DistributedModel):
            if not target.is_local(tensor):
                continue
            value = model_states.local_entry(target, name, value)
        own = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
        value = value.to_local() if isinstance(value, DTensor) else value
        if own.shape != value.shape:
            raise PartitionError(f"{what}: '{name}' has shape {tuple(own.shape)} and {tuple(value.shape)}")
        write(name, own, value.to(own.device), name in buffers)
