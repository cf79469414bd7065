"""The norms that LAMB and NovoGrad need, over parameters that are cut into slices and live on several stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from modelparallel.data_parallel.waits import wait_for

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group
    from modelparallel.plan.parameters import ParameterRow
    from modelparallel.runtime import Runtime


class DistributedNorms:
    """`modelparallel.optimizers.Norms` by the parameter tables of the session's models."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def whole(self, parameters: Sequence[torch.Tensor], values: torch.Tensor, is_maximum: bool) -> torch.Tensor:
        """The rows of sliced parameters, combined over the slices; collective over TP_GROUP."""
        tp = self._runtime.session.groups.tp
        rows = [self._row(parameter) for parameter in parameters]
        sliced = torch.tensor([row is not None and row.split is not None for row in rows], dtype=torch.bool)
        if tp.size == 1 or not bool(sliced.any()):
            return values
        sliced = sliced.to(values.device)
        operation = dist.ReduceOp.MAX if is_maximum else dist.ReduceOp.SUM
        combined = self._all_reduce(values[sliced], operation, tp)
        result = values.clone()
        result[sliced] = combined
        return result

    def total(self, parameters: Sequence[torch.Tensor], squares: torch.Tensor) -> torch.Tensor:
        """The sum over the model, each parameter once; collective over MP_GROUP."""
        groups, stage = self._runtime.session.groups, self._runtime.engine.stage
        own = []
        for parameter in parameters:
            row = self._row(parameter)
            is_first_holder = (row.home if row is not None and row.home is not None else 0) == stage
            is_sliced = row is not None and row.split is not None
            own.append(is_first_holder and (is_sliced or groups.tp.rank_in_group == 0))
        device = self._runtime.session.device
        mine = squares[torch.tensor(own, dtype=torch.bool, device=squares.device)].sum().to(device)
        return mine if groups.mp.size == 1 else self._all_reduce(mine, dist.ReduceOp.SUM, groups.mp)

    def _row(self, parameter: torch.Tensor) -> ParameterRow | None:
        for model in self._runtime.session.models:
            row = model.table.row_of(parameter)
            if row is not None:
                return row  # type: ignore[no-any-return]
        return None

    def _all_reduce(self, values: torch.Tensor, operation: dist.ReduceOp.RedOpType, group: Group) -> torch.Tensor:
        # In fp64, so that ranks which hold parameters of different dtypes, or none, send the same.
        message = values.double().contiguous()
        work = dist.all_reduce(message, operation, group=group.process_group, async_op=True)
        timeout = self._runtime.session.config.timeout_seconds
        wait_for(work, timeout, "the norms of parameters and gradients for the optimizer", group, message.device)
        return message.to(values.dtype)
