"""Which parameters are sharded, and which modules gather theirs together. Pure: the same on all ranks of a stage.

[Note: what stays whole] A parameter stays whole, and is left to the reducer, if it is small
(``sdp_param_persistence_threshold``), if it is no ordinary dense floating-point parameter of the model's main dtype,
if copies of it are on several stages (``tied_weights: replicate``), and with a pipeline if a module above the units
holds it (it is read in glue). If parameters are gathered by visit in a pipeline, also one that several units hold.

[Note: groups] With a pipeline a group is a unit, and units that share a parameter are one group. Without, a group is a
unit that is a block (it has children with weights), which is how FSDP2 is used by hand: blocks, and the root around
them with the rest (embeddings, heads, last norms). A model without blocks has its layers as groups. Units that hold
next to nothing are left to the root.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from modelparallel.data_parallel.sharding import ShardedParameter
from modelparallel.parameters.table import ParameterTable
from modelparallel.plan.rows import ParameterRow

# A unit with a smaller share of the sharded elements is no group of its own: each group costs collectives.
_SMALLEST_SHARE = 1 / 2000


@dataclass(frozen=True)
class ShardingPlan:
    """``groups``: the modules that gather together, by title, in module order. ``parameters``: all that are sharded;
    those in no group are the root's.
    """

    groups: dict[str, list[nn.Module]]
    parameters: list[ShardedParameter]


def plan_sharding(
    module: nn.Module,
    units: Sequence[str],
    table: ParameterTable,
    *,
    stage: int,
    tp_size: int,
    threshold: int,
    is_pipelined: bool,
    gathers_by_visit: bool,
) -> ShardingPlan:
    """The plan of one model. ``units``: the names of the modules that are at home on ``stage``."""
    candidates = _candidates(table, stage, tp_size, threshold)
    units_of = _units_of_parameters(module, units)
    if is_pipelined:
        return _pipelined(module, units, candidates, units_of, gathers_by_visit)
    parameters = [item for item, _ in candidates]
    sizes: Counter[str] = Counter()
    for item, size in candidates:
        holders = units_of.get(id(item.parameter), {None})
        holder = next(iter(holders))
        if len(holders) == 1 and holder:  # neither shared, nor outside, nor the root itself
            sizes[holder] += size
    smallest = sum(size for _, size in candidates) * _SMALLEST_SHARE
    large = [unit for unit in units if unit in sizes and sizes[unit] >= smallest]
    blocks = [unit for unit in large if _is_block(module.get_submodule(unit))]
    if len(blocks) < 2:
        blocks = [unit for unit in large if "Embedding" not in type(module.get_submodule(unit)).__name__]
    shared = _modules_of_shared(module, candidates, units_of)
    return ShardingPlan({unit: [module.get_submodule(unit)] for unit in blocks if unit not in shared}, parameters)


def _pipelined(
    module: nn.Module,
    units: Sequence[str],
    candidates: Sequence[tuple[ShardedParameter, int]],
    units_of: dict[int, set[str | None]],
    gathers_by_visit: bool,
) -> ShardingPlan:
    chosen = []
    joined = {unit: unit for unit in units}  # each unit, to the first unit of its group

    def first_of(unit: str) -> str:
        while joined[unit] != unit:
            unit = joined[unit]
        return unit

    order = {unit: index for index, unit in enumerate(units)}
    used = set()
    for item, _ in candidates:
        holders = units_of.get(id(item.parameter), {None})
        if None in holders or (len(holders) > 1 and gathers_by_visit):
            continue
        chosen.append(item)
        names = sorted((unit for unit in holders if unit is not None), key=order.__getitem__)
        used.update(names)
        for other in names[1:]:
            one, two = sorted((first_of(names[0]), first_of(other)), key=order.__getitem__)
            joined[two] = one
    groups: dict[str, list[nn.Module]] = {}
    for unit in units:
        if unit in used:
            groups.setdefault(first_of(unit), []).append(module.get_submodule(unit))
    return ShardingPlan(groups, chosen)


def _candidates(table: ParameterTable, stage: int, tp_size: int, threshold: int) -> list[tuple[ShardedParameter, int]]:
    """(parameter, the size of its smallest slice) of the parameters that are worth sharding and that FSDP takes."""
    local = [(row, parameter) for row, parameter in table.parameters() if table.is_local(row, stage)]
    elements: Counter[torch.dtype] = Counter()
    for _, parameter in local:
        if parameter.is_floating_point():
            elements[parameter.dtype] += parameter.numel()
    main_dtype = elements.most_common(1)[0][0] if elements else None
    result = []
    for row, parameter in local:
        size = _smallest_slice(row, parameter, tp_size)
        if (
            size >= max(threshold, 1)
            and not row.tied_copies
            and (type(parameter) is nn.Parameter or hasattr(parameter, "waits_for_storage"))
            and parameter.ndim > 0
            and parameter.dtype == main_dtype
            and parameter.layout == torch.strided
            and parameter.is_contiguous()
        ):
            needs_sum = tp_size > 1 and row.reducer_axis == "dp"
            result.append((ShardedParameter(row.name, parameter, row.split is not None, needs_sum), size))
    return result


def _smallest_slice(row: ParameterRow, parameter: nn.Parameter, tp_size: int) -> int:
    """The elements of the smallest slice on any tensor-parallel rank, since all ranks must come to the same plan."""
    if row.split is None:
        return parameter.numel()
    return min(torch.Size(row.split.local_shape(rank, tp_size)).numel() for rank in range(tp_size))


def _units_of_parameters(module: nn.Module, units: Sequence[str]) -> dict[int, set[str | None]]:
    """By identity: the units that hold a parameter; None among them stands for the modules outside of all units."""
    unit_of: dict[int, str] = {}
    for unit in units:
        for inner in module.get_submodule(unit).modules():
            unit_of.setdefault(id(inner), unit)
    result: dict[int, set[str | None]] = {}
    for owner in module.modules():
        for parameter in owner._parameters.values():
            if parameter is not None:
                result.setdefault(id(parameter), set()).add(unit_of.get(id(owner)))
    return result


def _modules_of_shared(
    module: nn.Module, candidates: Sequence[tuple[ShardedParameter, int]], units_of: dict[int, set[str | None]]
) -> set[str]:
    """The units with a sharded parameter that others hold too: FSDP wants it in one group, which is the root's."""
    result: set[str] = set()
    for item, _ in candidates:
        holders = units_of.get(id(item.parameter), set())
        if len(holders) > 1:
            result.update(unit for unit in holders if unit is not None)
    return result


def _is_block(module: nn.Module) -> bool:
    return any(next(child.parameters(), None) is not None for child in module.children())
