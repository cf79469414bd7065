"""The pieces that can be placed separately: units with what must live with them, in the order of execution.

Modules that share a parameter form one item with the costs of all of them. Its place in the order is that of one of
them: which one is for the solver to try. A unit that was not called goes with its neighbour in module order, a tensor
above the units with the unit that ran before its first use.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from modelparallel.errors import PartitionError
from modelparallel.partitioning.costs import Trace

# Combinations of places of tied modules that are tried: one group of tied modules has two or three places.
_MOST_PLACES = 64


@dataclass
class Item:
    """What is placed together. Bytes and work are of all members; activations of one microbatch.

    ``work`` is that of the forward, of the input gradients, and of the weight gradients.
    ``crossing_bytes`` would be sent over a cut after the item, which costs as much as the work ``crossing_cost``.
    """

    members: list[str]
    state_bytes: float = 0.0
    activation_bytes: float = 0.0
    work: tuple[float, float, float] = (0.0, 0.0, 0.0)
    crossing_bytes: int = 0
    crossing_cost: float = 0.0

    @property
    def compute(self) -> float:
        """All of the work."""
        return sum(self.work)

    @property
    def name(self) -> str:
        """The unit whose place in the order the item has, and how many more there are."""
        rest = len(self.members) - 1
        return repr(self.members[0]) + (f" (and {rest} with it)" if rest else "")


def arrangements(trace: Trace) -> Iterator[list[Item]]:
    """The items in the order of execution, once for every choice of places for the modules that share parameters.

    First with each group at the place of the first of it that was called.
    """
    order = trace.order
    position = {name: index for index, name in enumerate(order)}
    groups = [[name for name in group if name in position] for group in trace.ties]
    choices: list[Sequence[str | None]] = [[*sorted(group, key=position.__getitem__)] or [None] for group in groups]
    for places in itertools.islice(itertools.product(*choices), _MOST_PLACES):
        yield _items(trace, order, position, places)


def _items(trace: Trace, order: Sequence[str], position: Mapping[str, int], places: Sequence[str | None]) -> list[Item]:
    leader = _leaders(trace, order, position, places)
    items = {name: Item([name]) for name in order if leader[name] == name}
    for unit in trace.units:
        item = items[leader[unit.name]]
        if unit.name != leader[unit.name]:
            item.members.append(unit.name)
        item.state_bytes += unit.state_bytes
        item.activation_bytes += trace.activation_bytes(unit)
        forward, inputs, weights = item.work
        item.work = forward + unit.forward, inputs + unit.input_gradient, weights + unit.weight_gradient
    for tensor in trace.tensors:
        items[leader[tensor.name]].members.append(tensor.name)
        items[leader[tensor.name]].state_bytes += tensor.state_bytes
    index = {name: place for place, name in enumerate(items)}
    crossing = trace.crossing_bytes({name: index[leader[name]] for name in order}, len(items))
    for item, num_bytes in zip(items.values(), crossing, strict=True):
        item.crossing_bytes = num_bytes
        item.crossing_cost = num_bytes * trace.sent_byte_cost
    return list(items.values())


def _leaders(
    trace: Trace, order: Sequence[str], position: Mapping[str, int], places: Sequence[str | None]
) -> dict[str, str]:
    """For every unit and tensor, the called unit whose place it takes."""
    leader: dict[str, str] = {name: name for name in order}
    followers = _neighbours(trace, position)
    for group, place in zip(trace.ties, places, strict=True):
        # A group without any called unit goes where its first member would go.
        first = place or min((followers[name] for name in group), key=position.__getitem__)
        for name in group:
            leader[name] = first
    for name, neighbour in followers.items():
        leader.setdefault(name, neighbour)
    for name in leader:
        while leader[leader[name]] != leader[name]:
            leader[name] = leader[leader[name]]
    return leader


def _neighbours(trace: Trace, position: Mapping[str, int]) -> dict[str, str]:
    """For every unit that was not called and every tensor above the units, the called unit next to it."""
    neighbours = {}
    previous: str | None = None
    first = next((unit.name for unit in trace.units if unit.name in position), None)
    for unit in trace.units:
        if unit.name in position:
            previous = unit.name
        else:
            neighbours[unit.name] = previous or first or unit.name
    for tensor in trace.tensors:
        if tensor.near_unit in position:
            neighbours[tensor.name] = str(tensor.near_unit)
            continue
        owner = tensor.name.rpartition(".")[0]
        inside = [name for name in position if not owner or name.startswith(f"{owner}.")]
        candidates = inside or list(position)
        if not candidates:
            raise PartitionError(
                f"{tensor.name!r} cannot be placed: the model has no module with weights of its own next to it. "
                "Put the parameter into a module with a forward, or use pipeline_parallel_degree 1"
            )
        neighbours[tensor.name] = min(candidates, key=position.__getitem__)
    return neighbours
