"""What torch's ``DTensor``, which shards of parameters and their gradients are, does without a word.

A number that is read from it (``.item()``, ``float``, a comparison) is that of the part which this rank holds; what
is assigned to its ``data`` goes nowhere; and on CPUs each rank draws random numbers for its part alone, the same as the
others. All are met by ordinary scripts as soon as parameters are sharded.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate

from modelparallel.errors import AbsentTensorError

_aten = torch.ops.aten
_NUMBER = _aten._local_scalar_dense.default
_RANDOM = (
    _aten.normal_.default, _aten.uniform_.default, _aten.exponential_.default, _aten.log_normal_.default,
    _aten.cauchy_.default, _aten.geometric_.default, _aten.bernoulli_.float, _aten.bernoulli.default,
    _aten.random_.default, _aten.random_.to, getattr(_aten.random_, "from"),
    _aten.rand_like.default, _aten.randn_like.default, _aten.randint_like.default, _aten.randint_like.low_dtype,
)  # fmt: skip


@functools.cache
def mend_dtensors() -> None:
    """Let a number of a part be an error, an assignment to ``data`` write to the part, and random numbers be drawn for
    the whole; for the whole process.
    """
    handlers: Any = DTensor._op_dispatcher._custom_op_handlers
    handlers[_NUMBER] = _number_of
    handlers.update(dict.fromkeys(_RANDOM, _draw))
    handlers[_aten.eye.m_out] = _make_into  # of torch.nn.init.eye_
    plain: Any = torch.Tensor.data
    DTensor.data = property(plain.__get__, _assign_data)  # type: ignore[assignment]


def _number_of(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor = args[0]
    if not all(isinstance(placement, Replicate) for placement in tensor.placements):
        raise AbsentTensorError(
            "a number (.item(), float, a comparison) is read from a tensor whose value is in parts on several ranks: "
            f"DTensor with placements {tensor.placements}, as sharded_data_parallel_degree makes parameters and their "
            "gradients; here is only this rank's part\n"
            "  wrong: parameter.norm().item()\n"
            "  right: parameter.norm().full_tensor().item()  # on all ranks\n"
            "The norm of all gradients: optimizer.clip_master_grads(...) or torch.nn.utils.clip_grad_norm_(...)"
        )
    return _NUMBER(tensor.to_local())


def _assign_data(self: DTensor, value: torch.Tensor) -> None:
    if not isinstance(value, DTensor) or (value.shape, value.dtype) != (self.shape, self.dtype):
        raise AbsentTensorError(
            f"data of a sharded tensor of shape {tuple(self.shape)}, {self.dtype} is assigned a {type(value).__name__} "
            f"of shape {tuple(value.shape)}, {value.dtype}: give values with torch.no_grad(): tensor.copy_(...), or "
            "model.load_state_dict"
        )
    with torch.no_grad():
        self.copy_(value)


def _draw(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """All numbers are drawn on every rank, as in one process, and each keeps those of its part."""
    tensor = args[0]
    own = tensor.to_local()
    whole = torch.zeros(tensor.shape, dtype=own.dtype, device=own.device)
    _part_of(whole, tensor).copy_(own)
    drawn = operation(whole, *args[1:], **kwargs)
    part = _part_of(drawn, tensor)
    if operation._schema.is_mutable:
        own.copy_(part)
        return tensor
    return DTensor.from_local(
        part.contiguous(), tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape,
        stride=tensor.stride(),
    )  # fmt: skip


def _make_into(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor = kwargs["out"]
    own = tensor.to_local()
    whole = operation(*args, out=torch.empty(tensor.shape, dtype=own.dtype, device=own.device))
    own.copy_(_part_of(whole, tensor))
    return tensor


def _part_of(whole: torch.Tensor, tensor: Any) -> torch.Tensor:
    """The part that this rank holds of ``tensor``, of something of its shape; a view."""
    for axis, placement in enumerate(tensor.placements):
        if placement.is_shard():
            parts = whole.chunk(tensor.device_mesh.size(axis), placement.dim)
            rank = tensor.device_mesh.get_local_rank(axis)
            whole = parts[rank] if rank < len(parts) else whole.narrow(placement.dim, 0, 0)
    return whole
