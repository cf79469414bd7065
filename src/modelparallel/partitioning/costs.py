"""What the units of a model cost: the trace as plain data, and what is known without running (sizes, sharing).

A :class:`Trace` holds no tensors and no modules, so it can be sent to the other ranks; the partition plan is a pure
function of it.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from modelparallel.partitioning.units import direct_tensors
from modelparallel.plan.schedule import BACKWARD_FIRST

# Parameter, gradient and two optimizer moments of the parameter's size (Adam). The optimizer is not known when the
# plan is made.
STATE_COPIES = 4

# What moving a byte costs, in floating-point operations: the ratio of the two rates of a CPU core (some 100 GFLOP/s and
# 10 GB/s). On a GPU it is more for low precisions. It decides where many bytes are moved for few operations: the loss
# over a large vocabulary, the gradient of an embedding.
OPERATIONS_PER_BYTE = 10
# The same for a byte that is sent to another stage, at 1 GB/s.
OPERATIONS_PER_SENT_BYTE = 100
SECONDS_PER_SENT_BYTE = 1e-9
# The gradient of a microbatch is written, it and the sum so far are read, the new sum is written.
ACCUMULATION_PASSES = 4

# What a call costs by itself, apart from what it computes: 10 us.
OPERATIONS_PER_CALL = 1_000_000


@dataclass(frozen=True)
class UnitCosts:
    """What one unit holds and what one microbatch did in it. Sizes are in bytes; all calls are summed.

    Attributes:
        first_call: position of the unit in the order of first calls; None if it was never called.
        flops: floating-point operations of the forward: matrix products, convolutions, attention.
        moved_bytes: what all other operations of the forward read and wrote.
        needs_weight_gradient: an output asked for a gradient and the unit has trainable parameters.
        needs_input_gradient: an input asked for a gradient.
        output_bytes: what the calls returned.
        activation_bytes: tensors saved for the backward, parameters left out, shared storages counted once.
        seconds: measured time of the forward; None if it was not measured.
    """

    name: str
    num_parameters: int
    parameter_bytes: int
    trainable_bytes: int
    buffer_bytes: int
    first_call: int | None = None
    num_calls: int = 0
    output_bytes: int = 0
    activation_bytes: int = 0
    flops: int = 0
    moved_bytes: int = 0
    needs_weight_gradient: bool = False
    needs_input_gradient: bool = False
    seconds: float | None = None

    @property
    def state_bytes(self) -> int:
        """Parameters, their gradients and optimizer state, and buffers."""
        return self.parameter_bytes + (STATE_COPIES - 1) * self.trainable_bytes + self.buffer_bytes

    @property
    def forward(self) -> float:
        """The work of the forward: seconds if measured, else floating-point operations and bytes moved."""
        return float(self.flops + OPERATIONS_PER_BYTE * self.moved_bytes) if self.seconds is None else self.seconds

    @property
    def input_gradient(self) -> float:
        """The work of the part of the backward that makes the gradients of the inputs."""
        return self.forward * self.needs_input_gradient

    @property
    def weight_gradient(self) -> float:
        """The work of the part of the backward that makes the gradients of the weights and adds them up."""
        if not self.needs_weight_gradient:
            return 0.0
        if self.seconds is not None:
            return self.seconds
        # What moved bytes in the forward does so once more in the backward, in this part if there is no other.
        first = self.flops if self.needs_input_gradient else self.forward
        return float(first + OPERATIONS_PER_BYTE * ACCUMULATION_PASSES * self.trainable_bytes)

    @property
    def compute(self) -> float:
        """The work of forward and backward."""
        return self.forward + self.input_gradient + self.weight_gradient


@dataclass(frozen=True)
class Flow:
    """A tensor made from weights in (or next to) one unit and used in others: what travels if they are apart.

    Attributes:
        maker: the unit where it is made.
        users: the other units that use it, in the order of their first use.
        num_bytes: of one microbatch.
    """

    maker: str
    users: tuple[str, ...]
    num_bytes: int


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
        flows: what travels between units that are placed apart, equal ones summed; empty if nothing ran.
        guests: (unit or tensor, the units inside whose calls it was called or read); see guests.py.
    """

    units: tuple[UnitCosts, ...]
    tensors: tuple[TensorCosts, ...]
    ties: tuple[tuple[str, ...], ...] = ()
    stateful_buffers: tuple[str, ...] = ()
    source: str = "sizes"
    has_gradients: bool = False
    flows: tuple[Flow, ...] = ()
    guests: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def order(self) -> tuple[str, ...]:
        """The names of the called units in the order of their first calls (module order if nothing ran)."""
        called = [unit for unit in self.units if unit.first_call is not None]
        if not called:
            return tuple(unit.name for unit in self.units)
        return tuple(unit.name for unit in sorted(called, key=lambda unit: unit.first_call or 0))

    @property
    def sent_byte_cost(self) -> float:
        """What sending a byte to another stage costs, in the unit of the work of the units."""
        is_measured = any(unit.seconds is not None for unit in self.units)
        return SECONDS_PER_SENT_BYTE if is_measured else OPERATIONS_PER_SENT_BYTE

    def activation_bytes(self, unit: UnitCosts) -> int:
        """What the unit keeps of one microbatch: what it saves for the backward; its outputs if nothing was saved."""
        return unit.activation_bytes if self.has_gradients else unit.output_bytes

    def crossing_bytes(self, position: Mapping[str, int], num_positions: int) -> list[int]:
        """The bytes over a cut after each of ``num_positions`` positions, for units at these positions.

        A tensor that crosses a cut counts once, also when several units beyond use it.
        """
        changes = [0] * (num_positions + 1)
        for flow in self.flows:
            places = [position[name] for name in (flow.maker, *flow.users)]
            changes[min(places)] += flow.num_bytes
            changes[max(places)] -= flow.num_bytes
        return list(itertools.accumulate(changes))[:num_positions]

    def traffic(self, homes: Mapping[str, int]) -> tuple[tuple[int, int, int], ...]:
        """(from stage, to stage, bytes) of one microbatch's forward, with the units on these stages.

        A stage that uses a tensor several times receives it once, from where it was made.
        """
        sums: Counter[tuple[int, int]] = Counter()
        for flow in self.flows:
            source = homes[flow.maker]
            for target in {homes[user] for user in flow.users} - {source}:
                sums[source, target] += flow.num_bytes
        return tuple((source, target, count) for (source, target), count in sorted(sums.items()) if count)


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
    return Trace(tuple(unit_costs), tuple(tensor_costs), merged_groups(sharing.values()), tuple(stateful_buffers))


def untied(root: nn.Module, trace: Trace) -> Trace:
    """The trace as if no two units shared a parameter: each holds all of its own."""
    modules = dict(root.named_modules())
    units = []
    for unit in trace.units:
        sizes = _sizes(list(modules[unit.name].parameters()), modules[unit.name].buffers())
        num_parameters, parameter_bytes, trainable_bytes, buffer_bytes = sizes
        units.append(
            replace(
                unit,
                num_parameters=num_parameters,
                parameter_bytes=parameter_bytes,
                trainable_bytes=trainable_bytes,
                buffer_bytes=buffer_bytes,
            )
        )
    return replace(trace, units=tuple(units), ties=())


def microbatches_in_flight(
    num_stages: int,
    num_microbatches: int,
    active_microbatches: int,
    schedule: str = "interleaved",
    virtual_degree: int = 1,
) -> tuple[int, ...]:
    """How many microbatches' activations each piece of the model holds at most.

    There are ``num_stages * virtual_degree`` pieces in the order of execution; piece c is on stage ``c % num_stages``.

    Args:
        schedule: the configuration's ``pipeline``. With ``"interleaved"`` and ``"zero_bubble"`` the backward of a
            microbatch runs as soon as it can, so that piece c of n holds no more than the n - c that a chain needs to
            keep all stages busy. With the others every piece holds as many as may be active.
    """
    most = max(1, min(num_microbatches, active_microbatches))
    num_pieces = num_stages * virtual_degree
    if schedule not in BACKWARD_FIRST:
        return (most,) * num_pieces
    return tuple(min(most, num_pieces - piece) for piece in range(num_pieces))


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


def merged_groups(shared: Iterable[list[str]]) -> tuple[tuple[str, ...], ...]:
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
