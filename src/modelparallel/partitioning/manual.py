"""Placement by hand: ``smp.partition`` contexts, ``smp.set_partition`` and ``default_partition``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from torch import nn

from modelparallel.errors import PartitionError
from modelparallel.partitioning.costs import Trace, sizes_only
from modelparallel.partitioning.solve import described
from modelparallel.partitioning.units import direct_tensors, has_weights, is_whole
from modelparallel.plan.partition import PartitionPlan

Mark = Callable[[nn.Module], "int | None"]


def manual_plan(
    root: nn.Module,
    units: Sequence[str],
    marks: Mark,
    overrides: Sequence[tuple[nn.Module, int]],
    default_partition: int,
    num_stages: int,
    *,
    trace: Trace | None = None,
    in_flight: Sequence[int] = (),
    may_replicate: bool = False,
) -> PartitionPlan:
    """The plan that the marks ask for (smp-api section 6).

    Args:
        marks: the partition of the innermost ``smp.partition`` context that a module was created in, or None.
        overrides: (module, partition) of the ``smp.set_partition`` calls in their order; each covers the module's
            subtree, a later one wins where they overlap.
        default_partition: for modules in no context.
        trace: its order and figures are used where it is given; module order otherwise.
        in_flight: for every stage, how many microbatches' activations it holds, for the figures; empty: one each.
        may_replicate: modules that share a parameter may be on different partitions, each with a copy.

    Raises:
        PartitionError: a partition outside 0..num_stages-1; modules that share a parameter on different partitions.
    """
    stateful = () if trace is None else trace.stateful_buffers
    builder = _Builder(root, marks, overrides, default_partition, num_stages, stateful)
    modules = dict(root.named_modules())
    order = list(units)
    if trace is not None:
        order = [*trace.order, *(unit for unit in units if unit not in set(trace.order))]
    for unit in order:
        builder.place(unit, modules[unit])
    for direct in direct_tensors(root, tuple(units)):
        if direct.is_parameter or direct.name in stateful:
            builder.tensors[direct.name] = builder.partition_of(modules[direct.owner])
    plan = PartitionPlan(
        num_stages=num_stages,
        modules=tuple(builder.modules.items()),
        tensors=tuple(builder.tensors.items()),
        origin="manual",
    )
    if not may_replicate:
        check_sharing(root, plan)
    costs = sizes_only(root, tuple(builder.modules), stateful)
    homes = {**builder.modules, **builder.tensors}
    if trace is not None and set(homes) == {
        *(unit.name for unit in trace.units),
        *(tensor.name for tensor in trace.tensors),
    }:
        costs = trace
    return described(plan, costs, homes, in_flight or (1,) * num_stages)


class _Builder:
    def __init__(
        self,
        root: nn.Module,
        marks: Mark,
        overrides: Sequence[tuple[nn.Module, int]],
        default_partition: int,
        num_stages: int,
        stateful: Sequence[str],
    ) -> None:
        self.modules: dict[str, int] = {}
        self.tensors: dict[str, int] = {}
        self._names = {id(module): name for name, module in root.named_modules()}
        self._num_stages = num_stages
        self._stateful = frozenset(stateful)
        self._partitions: dict[int, int] = {}
        for name, module in root.named_modules():
            mark = marks(module)
            where = f"smp.partition({mark}) around the creation of module {name!r}"
            self._partitions[id(module)] = default_partition if mark is None else self._checked(mark, where)
        self._checked(default_partition, f"default_partition={default_partition}")
        for module, partition in overrides:
            if id(module) not in self._names:
                raise PartitionError(
                    f"smp.set_partition was called for a {type(module).__name__} that is not part of the model. "
                    "Call it after smp.DistributedModel(...), with a module of the wrapped model (model.module...)"
                )
            self._checked(partition, f"smp.set_partition({self._names[id(module)]!r}, {partition})")
            for inner in module.modules():
                self._partitions[id(inner)] = partition

    def _checked(self, partition: int, where: str) -> int:
        if isinstance(partition, bool) or not isinstance(partition, int) or not 0 <= partition < self._num_stages:
            raise PartitionError(
                f"{where}: partition {partition!r} does not exist with pipeline_parallel_degree={self._num_stages}; "
                f"use 0 to {self._num_stages - 1}"
            )
        return partition

    def partition_of(self, module: nn.Module) -> int:
        return self._partitions[id(module)]

    def place(self, name: str, module: nn.Module) -> None:
        """Make ``module`` an entry of the plan, or, if marks inside it differ, its parts."""
        owners = [inner for inner in module.modules() if _owns_weights(inner)]
        partitions = {self.partition_of(owner) for owner in owners}
        if len(partitions) == 1:
            self.modules[name] = partitions.pop()
            return
        if is_whole(module):
            raise PartitionError(
                f"module {name!r} ({type(module).__name__}) cannot be split over the partitions {sorted(partitions)}: "
                "its forward uses the weights of its inner modules directly. Give the whole module one partition"
            )
        own_names = [own_name for own_name, _ in module.named_parameters(recurse=False)]
        own_names += [own_name for own_name, _ in module.named_buffers(recurse=False)]
        for own_name in own_names:
            full_name = f"{name}.{own_name}" if name else own_name
            if own_name in module._parameters or full_name in self._stateful:
                self.tensors[full_name] = self.partition_of(module)
        for child_name, child in module.named_children():
            full_name = f"{name}.{child_name}" if name else child_name
            if has_weights(child) and self._names[id(child)] == full_name and full_name not in self.modules:
                self.place(full_name, child)


def _owns_weights(module: nn.Module) -> bool:
    if any(parameter is not None for parameter in module._parameters.values()):
        return True
    return has_weights(module) and not any(has_weights(child) for child in module.children())


def check_sharing(root: nn.Module, plan: PartitionPlan) -> None:
    """Modules that share a parameter must have one home, or :class:`PartitionError` naming both."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in root.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    for aliases in names.values():
        homes = {name: plan.home_of_tensor(name) for name in aliases}
        placed = {name: home for name, home in homes.items() if home is not None}
        if len(set(placed.values())) > 1:
            first = next(iter(placed))
            other = next(name for name in placed if placed[name] != placed[first])
            raise PartitionError(
                f"the modules {first.rpartition('.')[0]!r} (partition {placed[first]}) and "
                f"{other.rpartition('.')[0]!r} (partition {placed[other]}) share the parameter {first!r} "
                f"(also {other!r}): modules that share a parameter must be on one partition, unless each "
                "has a copy (tied_weights: replicate)"
            )
