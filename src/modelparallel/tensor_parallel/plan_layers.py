"""The classes that modules become when a plan splits them: the module's own class, with one of these in front.

A module is adopted in place: it is the same object, its parameters are the same objects, now slices, and its class is
a subclass of what it was, so that ``isinstance`` and the model's own code go on working. The class keeps its name.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from modelparallel.comm.collectives.replicated import gather_whole_features, scale_gradient
from modelparallel.comm.collectives.split import (
    all_gather,
    all_reduce,
    average_gradient,
    gather_counts,
    gather_features,
    merge_features,
    reduce_scatter,
    split_features,
)
from modelparallel.errors import TensorParallelError
from modelparallel.job import session
from modelparallel.plan.rows import SplitSpec
from modelparallel.tensor_parallel.distributed_module import DistributedModule
from modelparallel.tensor_parallel.region_arguments import GatherMemo
from modelparallel.tensor_parallel.regions import active_call, run_region

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group

_STATE = "_smp_planned"


@dataclass
class Planned:
    """What a planned module knows of itself. ``known``: what a region found out about its outputs."""

    name: str
    splits: dict[str, SplitSpec]
    memo: GatherMemo
    is_prescaled: bool
    known: dict[Any, Any] = field(default_factory=dict)


def adopt(module: nn.Module, layer_class: type[PlannedModule], planned: Planned, tp_group: Group) -> None:
    """Put ``layer_class`` in front of the class of ``module``."""
    module.__dict__[_STATE] = planned
    made: Any = adopted_class(layer_class, type(module))  # type: ignore[arg-type]  # mypy: a class is Hashable
    made._adopt(module, tp_group)


@functools.cache
def adopted_class(layer_class: Any, own_class: Any) -> Any:
    """``own_class`` with ``layer_class`` in front. One class for each pair: modules of one class stay of one class."""
    members = {"__module__": own_class.__module__, "__qualname__": own_class.__qualname__, "_smp_own_class": own_class}
    return type(own_class.__name__, (layer_class, own_class), members)


def _rebuilt(layer_class: type[PlannedModule], own_class: type[nn.Module]) -> nn.Module:
    made: Any = adopted_class(layer_class, own_class)  # type: ignore[arg-type]
    module: nn.Module = made.__new__(made)
    return module


class PlannedModule(DistributedModule):
    """A module that owns cut parameters, or takes part in a split otherwise; by itself it computes as before."""

    # Placed as one piece by the partitioner: the code inside works on slices, which only fit together on one stage.
    is_indivisible = True
    _smp_own_class: type[nn.Module]

    @property
    def planned(self) -> Planned:
        """What the module knows of itself."""
        state: Planned = self.__dict__[_STATE]
        return state

    def split_tensors(self) -> dict[str, SplitSpec]:
        """The directly owned parameters that are slices, by name."""
        return dict(self.planned.splits)

    def __reduce_ex__(self, protocol: Any) -> Any:
        own_class = type(self)._smp_own_class
        layer_class = next(
            base for base in type(self).__mro__ if base.__module__ == __name__ and base is not type(self)
        )
        own_state: Any = self.__getstate__
        return _rebuilt, (layer_class, own_class), own_state()

    def _own_forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self)._smp_own_class.forward(self, *args, **kwargs)


class JointRun(PlannedModule):
    """A region of a plan: the ranks run the module's own forward together, each with its slices, for the rows of all.
    See regions.py.
    """

    _returns_partial_sum = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own forward, for the caller's own batch."""
        call = active_call()
        if call is not None:  # inside another region: the rows of all ranks are here already
            result = self._own_forward(*args, **kwargs)
            return call.note(call.reduce(result)) if self._returns_partial_sum else result
        planned = self.planned
        return run_region(
            planned.name, self.tp_group, self._own_forward, args, kwargs,
            memo=planned.memo, known=planned.known, is_prescaled=planned.is_prescaled, is_training=self.training,
            is_pipelined=session.is_initialized() and session.current().config.pipeline_parallel_degree > 1,
            is_partial=self._returns_partial_sum,
        )  # fmt: skip


class PartialSum(JointRun):
    """A region whose own forward returns a partial sum, with no row-wise layer inside: fused experts."""

    _returns_partial_sum = True


class DividedShare(PlannedModule):
    """What every rank has whole, and adds to a partial sum: each rank adds 1/t of it."""

    def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the module's own forward, of 1/t of the input."""
        return self._own_forward(input / self.tp_group.size, *args, **kwargs)


class ColumnLinear(PlannedModule):
    """``nn.Linear`` inside a region, with own output features: [rows of all ranks, in] -> [.., out / t]."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The own features, for the rows of all ranks."""
        call = active_call(f"'{self.planned.name}'")
        assert call is not None
        return call.enter_slices(self._own_forward(input))


class RowLinear(PlannedModule):
    """``nn.Linear`` inside a region, with own input features: [rows of all ranks, in / t] -> [.., out].

    The bias is whole on each rank and added once, after the partial outputs are summed.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """All features: of the rows of all ranks, or of the own rows where the region returns them as they are."""
        call = active_call(f"'{self.planned.name}'")
        assert call is not None
        return call.note(_with_bias(call.reduce(F.linear(input, self.weight)), self.bias))


class ScatteredRowLinear(PlannedModule):
    """``nn.Linear`` whose input features are cut here: [.., in] -> [.., out], in a region or by itself.

    By itself it is what DistributedLinear computes: each rank takes its slice of the features of all rows.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """All features; of the own rows if the layer stands by itself."""
        group, call, weight = self.tp_group, active_call(), self.weight
        if call is not None:
            return call.note(_with_bias(call.reduce(F.linear(self._own_features(input), weight)), self.bias))
        if self.planned.is_prescaled:
            partial = F.linear(self._own_features(average_gradient(input, group)), weight)
            return _with_bias(all_reduce(partial, group, has_equal_gradients=True), self.bias)
        rows = input.reshape(-1, input.shape[-1])
        counts = gather_counts(rows.shape[0], group, rows, self.planned.name)
        output = reduce_scatter(F.linear(split_features(rows, group, counts), weight), group, counts=counts)
        return _with_bias(output, self.bias).view(*input.shape[:-1], weight.shape[0])

    def _own_features(self, input: torch.Tensor) -> torch.Tensor:
        group = self.tp_group
        return self.planned.splits["weight"].slice_of(input, group.rank_in_group, group.size, dim=-1)


class GatheredColumnLinear(PlannedModule):
    """``nn.Linear`` with own output features that are merged again: [.., in] -> [.., out], in a region or by itself."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """All features; of the own rows if the layer stands by itself."""
        group, call = self.tp_group, active_call()
        num_features = self.planned.splits["weight"].full_shape[0]
        if call is not None:
            return gather_features(self._padded(input), group)[..., :num_features]
        if self.planned.is_prescaled:  # the gradients of all features are equal, and count once for each rank
            merged = gather_whole_features(self._padded(average_gradient(input, group)), group)
            return scale_gradient(merged, float(group.size))[..., :num_features]
        rows = input.reshape(-1, input.shape[-1])
        counts = gather_counts(rows.shape[0], group, rows, self.planned.name)
        merged = merge_features(self._padded(all_gather(rows, group, counts=counts)), group, counts)
        return merged[:, :num_features].view(*input.shape[:-1], num_features)

    def _padded(self, input: torch.Tensor) -> torch.Tensor:
        """The own features, as many as the first rank has: a shorter slice is one of the last, so that what fills it up
        stands behind all features.
        """
        output: torch.Tensor = self._own_forward(input)
        width = self.planned.splits["weight"].local_length(0, self.tp_group.size)
        return F.pad(output, (0, width - output.shape[-1])) if output.shape[-1] != width else output


class RowEmbedding(PlannedModule):
    """``nn.Embedding`` with own rows of the table: each rank looks up what it has, and the partial results are summed.

    The ids of a call are checked on the CPU; on a GPU one outside the table gives zeros.
    """

    weight: nn.Parameter

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """ids of any shape -> [*shape, embedding_dim], for the caller's own batch."""
        group, call = self.tp_group, active_call()
        if input.dtype not in (torch.int64, torch.int32):
            raise TensorParallelError(f"'{self.planned.name}': ids must be int64 or int32, got {input.dtype}")
        if call is not None:
            return call.note(call.reduce(self._look_up(input)))
        if self.planned.is_prescaled:
            return all_reduce(self._look_up(input), group, has_equal_gradients=True)
        ids = input.reshape(-1)
        counts = gather_counts(ids.numel(), group, input, self.planned.name)
        rows = reduce_scatter(self._look_up(all_gather(ids, group, counts=counts)), group, counts=counts)
        return rows.view(*input.shape, rows.shape[-1])

    def _look_up(self, ids: torch.Tensor) -> torch.Tensor:
        group, spec = self.tp_group, self.planned.splits["weight"]
        (own,) = spec.ranges(group.rank_in_group, group.size)
        if not ids.is_meta and ids.numel() and not ids.is_cuda:
            # On a GPU the check would wait for the device, as it would in nn.Embedding, where the kernel checks.
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= spec.full_shape[0]:
                raise IndexError(f"'{self.planned.name}': ids {low} to {high}, the table has {spec.full_shape[0]} rows")
        is_elsewhere = (ids < own.start) | (ids >= own.stop)
        rows: torch.Tensor = self._own_forward((ids - own.start).masked_fill(is_elsewhere, 0))
        return rows.masked_fill(is_elsewhere.unsqueeze(-1), 0)


def _with_bias(output: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return output if bias is None else output + bias.to(output.dtype)
