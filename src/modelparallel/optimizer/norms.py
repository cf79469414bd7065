"""The norms that LAMB and NovoGrad need, over parameters that are cut into slices and live on several stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from modelparallel.training import gradient_norm

if TYPE_CHECKING:
    from modelparallel.optimizer.targets import Targets
    from modelparallel.training.runtime import Runtime


class DistributedNorms:
    """`modelparallel.optimizers.Norms` by the parameter tables of the session's models."""

    def __init__(self, runtime: Runtime, targets: Targets) -> None:
        self._runtime, self._targets = runtime, targets

    def whole(self, parameters: Sequence[torch.Tensor], values: torch.Tensor, is_maximum: bool) -> torch.Tensor:
        """The rows of sliced parameters, combined over the slices; collective over TP_GROUP."""
        tp = self._runtime.session.groups.tp
        rows = [self._targets.row_of(parameter) for parameter in parameters]
        sliced = torch.tensor([row is not None and row.split is not None for row in rows], dtype=torch.bool)
        if tp.size == 1 or not bool(sliced.any()):
            return values
        sliced = sliced.to(values.device)
        # In float64, so that ranks that hold parameters of different dtypes, or gradients of none, send the same.
        message = values[sliced].double().contiguous()
        operation = dist.ReduceOp.MAX if is_maximum else dist.ReduceOp.SUM
        gradient_norm.reduce(message, tp, operation, self._runtime, "norms of slices")
        result = values.clone()
        result[sliced] = message.to(values.dtype)
        return result

    def gradient_norm(self, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        """The one norm; collective as `smp.clip_grad_norm_` is."""
        return gradient_norm.total_norm(self._runtime, gradient_norm.parts_of(self._runtime, parameters), 2.0)
