"""What the units of a model cost: the trace as plain data, and what is known without running (sizes, sharing).

A :class:`Trace` holds no tensors and no modules, so it can be sent to the other ranks; the partition plan is a pure
function of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from modelparallel.partitioning.units import direct_tensors

# Parameter, gradient and two optimizer moments of the parameter's size (Adam). The optimizer is not known when the
# plan is made.
STATE_COPIES = 4


@dataclass(frozen=True)
class UnitCosts:
    """What one unit holds and what one microbatch did in it. Sizes are in bytes; all calls are summed.

    Attributes:
        first_call: position of the unit in the order of first calls; None if it was never called.
        flops: floating-point operations of the forward.
        needs_weight_gradient: an output asked for a gradient and the unit has trainable parameters.
        needs_input_gradient: an input asked for a gradient.
        output_bytes: what the calls returned.
        crossing_bytes: what would travel over a cut right after this unit in the order of first calls: tensors made
            from weights on one side of it and used on the other.
        activation_bytes: tensors saved for the backward, parameters left out, shared storages counted once.
        seconds: measured forward time; None if it was not measured.
    """

    name: str
    num_parameters: int
    parameter_bytes: int
    trainable_bytes: int
    buffer_bytes: int
    first_call: int | None = None
    num_calls: int = 0
    output_bytes: int = 0
    crossing_bytes: int = 0
    activation_bytes: int = 0
    flops: int = 0
    needs_weight_gradient: bool = False
    needs_input_gradient: bool = False
    seconds: float | None = None

    @property
    def state_bytes(self) -> int:
        """Parameters, their gradients and optimizer state, and buffers."""
        return self.parameter_bytes + (STATE_COPIES - 1) * self.trainable_bytes + self.buffer_bytes

    @property
    def compute(self) -> float:
        """Forward and backward work: seconds if measured, else floating-point operations."""
        forward = float(self.flops) if self.seconds is None else self.seconds
        return forward * (1 + self.needs_weight_gradient + self.needs_input_gradient)


@dataclass(frozen=True)
class TensorCosts:
    """A parameter, or a buffer that running changed, owned by a module above all units.

    Attributes:
        near_unit: the unit it should live with: the one that ran before its first use; None if no unit ran.
    """

    name: str
    num_parameters: int
    parameter_bytes: int
    trainable_bytes: int
    buffer_bytes: int
    near_unit: str | None = None

    @property
    def state_bytes(self) -> int:
        return self.parameter_bytes + (STATE_COPIES - 1) * self.trainable_bytes + self.buffer_bytes


@dataclass(frozen=True)
class Trace:
    """What the partitioner knows of a model.

    Attributes:
        units: in module order.
        tensors: in module order.
        ties: groups of units and tensors (by name) that share a parameter and so need one home.
        stateful_buffers: full names of the buffers that running the step changed.
        source: ``"run"`` (a microbatch ran for real) or ``"sizes"``.
        has_gradients: whether the run recorded anything for a backward.
    """

    units: tuple[UnitCosts, ...]
    tensors: tuple[TensorCosts, ...]
    ties: tuple[tuple[str, ...], ...] = ()
    stateful_buffers: tuple[str, ...] = ()
    source: str = "sizes"
    has_gradients: bool = False

    @property
    def order(self) -> tuple[str, ...]:
        """The names of the called units in the order of their first calls (module order if nothing ran)."""
        called = [unit for unit in self.units if unit.first_call is not None]
        if not called:
            return tuple(unit.name for unit in self.units)
        return tuple(unit.name for unit in sorted(called, key=lambda unit: unit.first_call or 0))


def sizes_only(root: nn.Module, units: Sequence[str], stateful_buffers: Sequence[str] = ()) -> Trace:
    """What is known without running: module order, sizes, and which units share parameters."""
    modules = dict(root.named_modules())
    unit_costs = []
    owners: dict[int, str] = {}
    sharing: dict[int, list[str]] = defaultdict(list)
    for name in units:
        own: list[torch.Tensor] = []
        for parameter in modules[name].parameters():
            sharing[id(parameter)].append(name)
            if owners.setdefault(id(parameter), name) == name:
                own.append(parameter)
        sizes = _sizes(own, modules[name].buffers())
        unit_costs.append(UnitCosts(name, *sizes))
    tensor_costs = []
    for direct in direct_tensors(root, tuple(units)):
        if direct.is_parameter:
            sharing[id(direct.tensor)].append(direct.name)
            counted = [] if id(direct.tensor) in owners else [direct.tensor]
            tensor_costs.append(TensorCosts(direct.name, *_sizes(counted, ())))
        elif direct.name in stateful_buffers:
            tensor_costs.append(TensorCosts(direct.name, *_sizes((), [direct.tensor])))
    # `direct_tensors` lists a tensor under its first name only. A parameter whose first name lies in a unit may have
    # another one above the units: it has a home already.
    return Trace(tuple(unit_costs), tuple(tensor_costs), _groups(sharing.values()), tuple(stateful_buffers))


def microbatches_in_flight(
    num_stages: int, num_microbatches: int, active_microbatches: int, is_backward_first: bool = False
) -> tuple[int, ...]:
    """How many microbatches' activations each stage holds at most.

    In discovery order, and when all forwards run before all backwards, every stage holds as many as may be active. With
    ``is_backward_first`` (1F1B) stage s holds at most ``num_stages - s``.
    """
    most = max(1, min(num_microbatches, active_microbatches))
    if not is_backward_first:
        return (most,) * num_stages
    return tuple(min(most, num_stages - stage) for stage in range(num_stages))


def tensor_bytes(tensor: torch.Tensor) -> int:
    """The bytes of a tensor's elements; 0 for a parameter whose shape is not known yet (a lazy module)."""
    if torch.nn.parameter.is_lazy(tensor):
        return 0
    return tensor.numel() * tensor.element_size()


def _sizes(parameters: Sequence[torch.Tensor], buffers: Iterable[torch.Tensor]) -> tuple[int, int, int, int]:
    return (
        sum(0 if tensor_bytes(parameter) == 0 else parameter.numel() for parameter in parameters),
        sum(tensor_bytes(parameter) for parameter in parameters),
        sum(tensor_bytes(parameter) for parameter in parameters if parameter.requires_grad),
        sum(tensor_bytes(buffer) for buffer in buffers),
    )


def _groups(shared: Iterable[list[str]]) -> tuple[tuple[str, ...], ...]:
    """Merge lists of names that overlap (a unit may share one parameter with one unit and another with another)."""
    groups: list[list[str]] = []
    for names in shared:
        members = list(dict.fromkeys(names))
        if len(members) < 2:
            continue
        joined = [group for group in groups if set(group) & set(members)]
        groups = [group for group in groups if group not in joined]
        groups.append(list(dict.fromkeys([*(name for group in joined for name in group), *members])))
    return tuple(tuple(group) for group in groups)
