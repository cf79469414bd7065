"""The flat tensors of an optimizer's groups under sharded data parallelism, under the names that scripts of the
original read (data_parallel/own_parts.py).
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from modelparallel.data_parallel.own_parts import mark_own_part, own_part_of
from modelparallel.parameters.shards import local_part
from modelparallel.training.participants import ParameterHolder

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group
    from modelparallel.optimizer.targets import Targets
    from modelparallel.training.runtime import Runtime


class FlattenedOptimizer(ParameterHolder, Protocol):
    """A wrapped optimizer, with what its flat groups need."""

    _runtime: Runtime
    targets: Targets


class FlatGroups:
    """The flat tensors of the groups of one optimizer."""

    def __init__(self, optimizer: FlattenedOptimizer) -> None:
        # Not a circle: an optimizer that is done with must be gone on all ranks alike (a save counts those that live).
        self._optimizer: FlattenedOptimizer = weakref.proxy(optimizer)
        self._flat: list[torch.Tensor] | None = None

    @property
    def shard_group(self) -> Group | None:
        """The ranks among which the parameters are divided; None where they are not."""
        for model in self._optimizer.targets.models():
            if model.gradients.sharding is not None:
                return model.gradients.sharding.shard_group
        return None

    def mark_targets(self) -> None:
        """Give these attributes to the tensors in the groups of the optimizer, too, for scripts that look there.
        Local.
        """
        group = self.shard_group
        if group is None:
            return
        for target in self._optimizer.targets.all():
            value = local_part(target.tensor.detach())
            part = value.reshape(-1) if target.shard is not None else own_part_of(value, group)
            mark_own_part(target.tensor, target.parameter, part)

    def parameters(self) -> list[list[nn.Parameter]]:
        """The parameters of the models that are on this rank, by group."""
        runtime = self._optimizer._runtime
        return [
            [parameter for parameter in group if runtime.index.is_local(parameter, runtime.engine.stage)]
            for group in self._optimizer.all_groups()
        ]

    def flat(self) -> list[torch.Tensor]:
        """This rank's elements of each group, in fp32 at least: of the masters where there are some."""
        group = self.shard_group
        if group is None:
            raise AttributeError("fp32_partitioned_groups_flat is there with sharded_data_parallel_degree > 1 alone")
        values = [[self._values(parameter, group) for parameter in parameters] for parameters in self.parameters()]
        lengths = [sum(part.numel() for part in parts) for parts in values]
        if self._flat is None or [flat.numel() for flat in self._flat] != lengths:
            device = self._optimizer._runtime.session.device
            self._flat = [torch.cat(parts) if parts else torch.empty(0, device=device) for parts in values]
        else:
            for flat, parts in zip(self._flat, values, strict=True):
                if parts:
                    torch.cat(parts, out=flat)
        return self._flat

    def refresh(self) -> None:
        """The values have changed."""
        if self._flat is not None:
            self.flat()

    def _values(self, parameter: nn.Parameter, group: Group) -> torch.Tensor:
        targets = self._optimizer.targets.of_parameter(parameter)
        if targets and targets[0].shard is None:
            part = own_part_of(targets[0].tensor.detach(), group)
        else:
            parts = [local_part(target.tensor.detach()).reshape(-1) for target in targets]
            part = torch.cat(parts) if parts else torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        return part.to(torch.promote_types(part.dtype, torch.float32))
