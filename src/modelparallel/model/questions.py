"""What a wrapped model tells of its parameters, buffers and modules (smp-api sections 5 and 18)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from modelparallel.errors import PartitionError
from modelparallel.model.pairings import PairedIterator, Place, place_with_zip
from modelparallel.tensor_parallel.distributed_module import DistributedModule

if TYPE_CHECKING:
    from modelparallel.model.gradients import ModelGradients
    from modelparallel.parameters.table import ParameterTable
    from modelparallel.plan.partition import PartitionPlan
    from modelparallel.training.runtime import Runtime

T = TypeVar("T")


class ModelParameters(nn.Module):
    """The iterators and questions of ``smp.DistributedModel`` that read its parameter table.

    Inside a step function every stage must run the same program, so ``parameters()``, ``buffers()`` and their named
    forms give everything there, wherever it lives.
    """

    module: nn.Module
    #: What happens to the gradients over the ranks.
    gradients: ModelGradients
    _table: ParameterTable
    _runtime: Runtime
    _plan: PartitionPlan | None
    _is_partitioned: bool
    _checked_pairings: set[Place]

    def is_local(self, tensor: torch.Tensor) -> bool:
        """Whether this rank holds the parameter or buffer; True before the partition, and of foreign tensors. Local."""
        row = self._table.row_of(tensor)
        return row is None or self._table.is_local(row, self._runtime.engine.stage)

    def get_module(self) -> nn.Module:
        """The user's module (with replaced layers), without any wrapper. Local. Source: smp-api section 18."""
        return self.module

    @property
    def table(self) -> ParameterTable:
        """The parameter table: names, shapes, homes and slices of all parameters and buffers."""
        return self._table

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """As ``named_parameters``, without the names. Local."""
        values = (parameter for _, parameter in self._held_parameters("", recurse, True))
        return self._paired(values, recurse)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Names as in the user's model; after the partition what this rank holds, inside a step function all. Local."""
        return self._paired(self._held_parameters(prefix, recurse, remove_duplicate), recurse and remove_duplicate)

    def _held_parameters(
        self, prefix: str, recurse: bool, remove_duplicate: bool
    ) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.module.named_parameters(prefix, recurse, remove_duplicate):
            if self._runtime.step is not None:
                yield name, parameter
            elif self.is_local(parameter):
                row = self._table.row_of(parameter)
                # A sharded parameter that is gathered at this moment is still the sharded one to those who ask.
                known = parameter if row is None else self._table.tensor(row.name)
                yield name, known  # type: ignore[misc]

    def _paired(self, values: Iterator[T], are_all: bool) -> Iterator[T]:
        """After the partition, in code that calls zip: look at what they are paired with."""
        if not are_all or not self._is_partitioned or not self._runtime.is_pipelined or self._runtime.step is not None:
            return values
        place = place_with_zip(3)
        if place is None or place in self._checked_pairings:
            return values
        here = [self.is_local(parameter) for parameter in self.module.parameters()]
        return PairedIterator(values, sum(here), len(here), self._checked_pairings, place)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Names as in the user's model; after the partition what this rank holds, inside a step function all. Local."""
        for name, buffer in self.module.named_buffers(prefix, recurse, remove_duplicate):
            if self._runtime.step is not None or self.is_local(buffer):
                yield name, buffer

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the parameters that this rank holds, reduced or not, or zero them. Local."""
        super().zero_grad(set_to_none)
        self.gradients.forget(set_to_none=set_to_none)

    def virtual_named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of all parameters in the order of the model, equal on all ranks. Local.

        Parameters of other stages are stand-ins: shape and dtype, but no storage. Source: smp-api section 18.
        """
        return self.module.named_parameters()

    def local_named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of the parameters that this rank holds. Local.

        Raises:
            PartitionError: before the partition.

        Source: smp-api section 5.
        """
        self._needs_partition("local_named_parameters")
        return self.named_parameters()

    def local_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that this rank holds. Local. The error is that of ``local_named_parameters``."""
        self._needs_partition("local_parameters")
        return (parameter for _, parameter in self.named_parameters())

    def local_named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, buffer) of what this rank holds. Local. The error is that of ``local_named_parameters``."""
        self._needs_partition("local_named_buffers")
        return self.named_buffers()

    def local_buffers(self) -> Iterator[torch.Tensor]:
        """The buffers that this rank holds. Local. The error is that of ``local_named_parameters``."""
        self._needs_partition("local_buffers")
        return (buffer for _, buffer in self.named_buffers())

    def local_named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """(name, module) of the modules that run on this rank: those at home here, and those without a home. Local.

        The error is that of ``local_named_parameters``.
        """
        self._needs_partition("local_named_modules")
        return self._modules_at_home()

    def local_modules(self) -> Iterator[nn.Module]:
        """The modules that run on this rank. Local. The error is that of ``local_named_parameters``."""
        self._needs_partition("local_modules")
        return (module for _, module in self._modules_at_home())

    def _modules_at_home(self) -> Iterator[tuple[str, nn.Module]]:
        for name, module in self.module.named_modules():
            home = self._plan.home_of_module(name) if self._plan is not None else None
            if home is None or home == self._runtime.engine.stage:
                yield name, module

    def distributed_modules(self) -> Iterator[nn.Module]:
        """The modules that are split by tensor parallelism. Local. Source: smp-api section 5."""
        return (module for module in self.module.modules() if isinstance(module, DistributedModule))

    def is_distributed_parameter(self, parameter: torch.Tensor) -> bool:
        """Whether the parameter is sliced over the tensor-parallel ranks. Local. Source: smp-api section 5."""
        row = self._table.row_of(parameter)
        return row is not None and row.split is not None

    def is_distributed_buffer(self, buffer: torch.Tensor) -> bool:
        """Whether the buffer is sliced over the tensor-parallel ranks. Local. Source: smp-api section 5."""
        return self.is_distributed_parameter(buffer)

    def is_scaled_batch_parameter(self, parameter: torch.Tensor) -> bool:
        """Whether the parameter works on the batch of the whole TP_GROUP. Local. Source: smp-api section 5."""
        row = self._table.row_of(parameter)
        return row is not None and row.reducer_axis == "rdp"

    def is_scaled_batch_buffer(self, buffer: torch.Tensor) -> bool:
        """Whether the buffer works on the batch of the whole TP_GROUP. Local. Source: smp-api section 5."""
        return self.is_scaled_batch_parameter(buffer)

    def default_reducer_named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of the local parameters whose gradients are averaged over the DP_GROUP. Local."""
        return (
            (name, parameter)
            for name, parameter in self.named_parameters()
            if not self.is_scaled_batch_parameter(parameter)
        )

    def scaled_batch_reducer_named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of the local parameters whose gradients are summed over the RDP_GROUP and divided by dp.
        Local.
        """
        return (
            (name, parameter)
            for name, parameter in self.named_parameters()
            if self.is_scaled_batch_parameter(parameter)
        )

    def _needs_partition(self, what: str) -> None:
        if not self._is_partitioned:
            raise PartitionError(
                f"model.{what}() needs the partition, which is made at the first call of a step function: call it "
                "after that, or in a "
                "hook given to model.register_post_partition_hook"
            )
