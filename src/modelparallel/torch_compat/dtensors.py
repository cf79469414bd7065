"""What torch's ``DTensor``, which shards of parameters and their gradients are, does without a word.

A number that is read from it (``.item()``, ``float``, a comparison) is that of the part which this rank holds; and
what is assigned to its ``data`` goes nowhere. Both are met by ordinary scripts as soon as parameters are sharded.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate

from modelparallel.errors import AbsentTensorError

_NUMBER = torch.ops.aten._local_scalar_dense.default


@functools.cache
def mend_dtensors() -> None:
    """Let a number of a part be an error, and an assignment to ``data`` write to the part; for the whole process."""
    handlers: Any = DTensor._op_dispatcher._custom_op_handlers
    handlers[_NUMBER] = _number_of
    plain: Any = torch.Tensor.data
    DTensor.data = property(plain.__get__, _assign_data)  # type: ignore[method-assign, assignment]


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
