"""Split a module in place by its plan: check every region first, then cut the weights and adopt the modules."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from modelparallel.plan.rows import SplitSpec
from modelparallel.tensor_parallel.placements import (
    NotSplittableError,
    is_plain_parameter,
    shrink_to_slice,
    slice_length,
)
from modelparallel.tensor_parallel.plan_layers import (
    ColumnLinear,
    DividedShare,
    GatheredColumnLinear,
    JointRun,
    PartialSum,
    Planned,
    PlannedModule,
    RowEmbedding,
    RowLinear,
    ScatteredRowLinear,
    adopt,
)
from modelparallel.tensor_parallel.plans import (
    PlanEntry,
    SplitPlan,
    SplitStyle,
    blocks,
    head_size,
    is_plain_linear,
    reason_against_table,
)
from modelparallel.tensor_parallel.region_arguments import GatherMemo

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group

logger = logging.getLogger("modelparallel.tensor_parallel")

_CLASSES: Mapping[SplitStyle, type[PlannedModule]] = {
    SplitStyle.COLUMNS: ColumnLinear,
    SplitStyle.ROWS: RowLinear,
    SplitStyle.GATHERED: GatheredColumnLinear,
    SplitStyle.SCATTERED: ScatteredRowLinear,
    SplitStyle.VOCABULARY: RowEmbedding,
    SplitStyle.PARTIAL: PartialSum,
    SplitStyle.DIVIDED: DividedShare,
}
Specs = dict[str, SplitSpec]  # by the name of a parameter, from the module that the plan is for


@dataclass(frozen=True)
class _Cut:
    """An entry whose weights can be cut: how."""

    entry: PlanEntry
    specs: Specs


def split_by_plan(
    root: nn.Module,
    name: str,
    plan: SplitPlan,
    tp_group: Group,
    names_of_parameter: Callable[[nn.Parameter], Iterable[str]],
    *,
    is_users: bool,
    is_prescaled: bool,
) -> None:
    """Split ``root``, called ``name`` in the whole model, by ``plan``, in place; every rank of the group alike.

    ``names_of_parameter``: all names of a parameter in the whole model. ``is_users``: the plan is the user's, and what
    it says and cannot be done is a NotSplittableError. Of a plan that the model carries, a region that cannot be split
    stays whole with a warning, and a layer outside regions with a line in the log.
    """
    prefix = f"{name}." if name else ""
    cuts, failed = _possible_cuts(root, prefix, plan, tp_group.size)
    failed |= _failed_ties(root, prefix, cuts, failed, names_of_parameter)
    for key, reason in failed.items():
        if is_users:
            raise NotSplittableError(reason)
        if key[0] == "region":
            warnings.warn(f"tensor parallelism: region '{prefix}{key[1]}' stays whole: {reason}", stacklevel=5)
        else:
            logger.info("tensor parallelism: '%s%s' stays whole: %s", prefix, key[1], reason)
    if plan.unbalanced:
        names = ", ".join(repr(prefix + part) for part in plan.unbalanced)
        warnings.warn(
            f"tensor parallelism: {names} stay whole: the plan of {type(root).__name__} cuts layers there whose "
            "features no row-wise layer takes, or the reverse",
            stacklevel=5,
        )
    _apply(root, prefix, plan, [cut for cut in cuts if _key(cut.entry) not in failed], tp_group, is_prescaled)


def _key(entry: PlanEntry) -> tuple[str, str]:
    """What stays whole together: the region, or a layer that takes and gives all features."""
    is_by_itself = entry.style in (SplitStyle.GATHERED, SplitStyle.SCATTERED, SplitStyle.VOCABULARY)
    return ("layer", entry.module) if entry.region is None or is_by_itself else ("region", entry.region)


def _possible_cuts(
    root: nn.Module, prefix: str, plan: SplitPlan, tp_size: int
) -> tuple[list[_Cut], dict[tuple[str, str], str]]:
    cuts: list[_Cut] = []
    failed: dict[tuple[str, str], str] = {}
    for region in plan.regions:
        if "forward" in root.get_submodule(region).__dict__:
            failed["region", region] = f"'{prefix}{region}' has a forward of its own instance"
    for entry in plan.entries:
        try:
            cuts.append(_Cut(entry, _specs_of(root, prefix, entry, tp_size)))
        except NotSplittableError as error:
            failed.setdefault(_key(entry), str(error))
    return cuts, failed


def _specs_of(root: nn.Module, prefix: str, entry: PlanEntry, tp_size: int) -> Specs:
    module = root.get_submodule(entry.module)
    what = f"module '{prefix}{entry.module}' ({type(module).__name__})"
    style = entry.style
    if style is SplitStyle.NUMBER:
        slice_length(module.__dict__[entry.parameter], tp_size, f"{entry.parameter} of {what}")
    if style in (SplitStyle.NUMBER, SplitStyle.REGION, SplitStyle.WHOLE, SplitStyle.DIVIDED, SplitStyle.PARTIAL):
        return {}
    if entry.parameter:
        return _parameter_spec(module, what, entry, tp_size)
    if style is SplitStyle.VOCABULARY:
        reason = reason_against_table(module)
        if reason is not None or not isinstance(module, nn.Embedding):
            raise NotSplittableError(f"{what}: {reason}")
        spec = SplitSpec(0, tuple(module.weight.shape))
        _needs_no_empty_slice(spec, tp_size, f"num_embeddings of {what}")
        return {f"{entry.module}.weight".lstrip("."): spec}
    if not is_plain_linear(module) or not isinstance(module, nn.Linear):
        raise NotSplittableError(f"{what} is not a plain nn.Linear (its forward is another, or its weight is wrapped)")
    shape = tuple(module.weight.shape)
    if style in (SplitStyle.ROWS, SplitStyle.SCATTERED):
        _check_lengths(root, entry, (shape[1],), tp_size, f"in_features of {what}")
        return {f"{entry.module}.weight": SplitSpec(1, shape)}
    parts = blocks(entry, shape[0])
    if style is SplitStyle.GATHERED:
        _needs_no_empty_slice(SplitSpec(0, shape), tp_size, f"out_features of {what}")
    else:
        _check_lengths(root, entry, parts or (shape[0],), tp_size, f"out_features of {what}")
    specs = {f"{entry.module}.weight": SplitSpec(0, shape, parts)}
    if module.bias is not None:
        specs[f"{entry.module}.bias"] = SplitSpec(0, shape[:1], parts)
    return specs


def _parameter_spec(module: nn.Module, what: str, entry: PlanEntry, tp_size: int) -> Specs:
    parameter = module._parameters[entry.parameter]
    if parameter is None:
        return {}
    if entry.region is None or not is_plain_parameter(parameter):
        raise NotSplittableError(f"parameter {entry.parameter} of {what} is in no region, or not a plain parameter")
    is_columns = entry.style is SplitStyle.COLUMNS
    dim = max(parameter.ndim - (2 if is_columns else 1), 0)
    parts = blocks(entry, parameter.shape[dim])
    for length in parts or (parameter.shape[dim],):
        slice_length(length, tp_size, f"dim {dim} of parameter {entry.parameter} of {what}")
    return {f"{entry.module}.{entry.parameter}".lstrip("."): SplitSpec(dim, tuple(parameter.shape), parts)}


def _check_lengths(root: nn.Module, entry: PlanEntry, lengths: tuple[int, ...], tp_size: int, what: str) -> None:
    """Features are cut in whole heads, where it is known what a head is."""
    size = entry.head_dim or head_size(root.get_submodule(entry.module.rpartition(".")[0]))
    for length in lengths:
        if size is not None and length % size == 0:
            slice_length(length // size, tp_size, f"the number of heads (of {size} features) in {what}")
        else:
            slice_length(length, tp_size, what)


def _needs_no_empty_slice(spec: SplitSpec, tp_size: int, what: str) -> None:
    length = spec.full_shape[spec.dim]
    if spec.local_length(tp_size - 1, tp_size) == 0:
        raise NotSplittableError(
            f"{what} is {length}: with tensor_parallel_degree={tp_size} the last rank would have none of it"
        )


def _failed_ties(
    root: nn.Module,
    prefix: str,
    cuts: list[_Cut],
    failed: dict[tuple[str, str], str],
    names_of_parameter: Callable[[nn.Parameter], Iterable[str]],
) -> dict[tuple[str, str], str]:
    """Entries of which a parameter is shared with something that is not cut alike: then it stays whole."""
    more_failed: dict[tuple[str, str], str] = {}
    while True:
        wanted = {
            prefix + name: spec
            for cut in cuts
            if _key(cut.entry) not in failed and _key(cut.entry) not in more_failed
            for name, spec in cut.specs.items()
        }
        more: dict[tuple[str, str], str] = {}
        for cut in cuts:
            for name, spec in cut.specs.items():
                if prefix + name not in wanted or _key(cut.entry) in more_failed:
                    continue
                for other in names_of_parameter(root.get_parameter(name)):
                    if wanted.get(other) != spec:
                        more[_key(cut.entry)] = (
                            f"its parameter '{prefix}{name}' is shared with '{other}', which is whole"
                        )
        if not more:
            return more_failed
        more_failed |= more


def _apply(
    root: nn.Module, prefix: str, plan: SplitPlan, cuts: list[_Cut], tp_group: Group, is_prescaled: bool
) -> None:
    memo = GatherMemo()
    splits: dict[str, Specs] = {}
    classes: dict[str, type[PlannedModule]] = {}
    slices: dict[int, nn.Parameter] = {}
    numbers: set[tuple[int, str]] = set()
    for cut in cuts:
        module, entry = root.get_submodule(cut.entry.module), cut.entry
        for name, spec in cut.specs.items():
            owner, _, own_name = name.rpartition(".")
            parameter = module._parameters[own_name]
            assert parameter is not None
            if id(parameter) not in slices:
                before = parameter
                slices[id(before)] = shrink_to_slice(before, spec, tp_group.rank_in_group, tp_group.size)
            module._parameters[own_name] = slices[id(parameter)]
            splits.setdefault(owner, {})[own_name] = spec
        if entry.style is SplitStyle.NUMBER:
            if (id(module), entry.parameter) not in numbers:
                module.__dict__[entry.parameter] //= tp_group.size
                numbers.add((id(module), entry.parameter))
        elif not entry.parameter and entry.style in _CLASSES:
            classes[entry.module] = _CLASSES[entry.style]
        elif entry.parameter:
            classes.setdefault(entry.module, PlannedModule)
    regions = {entry.region for cut in cuts if (entry := cut.entry).region in plan.regions}
    for region in plan.regions:
        if region in regions and classes.get(region) in (None, PlannedModule):
            classes[region] = JointRun
    for name, layer_class in classes.items():
        module = root.get_submodule(name)
        if isinstance(module, PlannedModule):
            continue  # one module with two names
        if layer_class is RowEmbedding:
            _localise_padding(module, splits[name]["weight"], tp_group)
        full_name = (prefix + name).rstrip(".") or "the root module"
        adopt(module, layer_class, Planned(full_name, splits.get(name, {}), memo, is_prescaled), tp_group)


def _localise_padding(module: nn.Module, spec: SplitSpec, tp_group: Group) -> None:
    """The row that takes no gradient is one of this rank's, or none."""
    assert isinstance(module, nn.Embedding)
    padding = module.padding_idx
    if padding is not None:
        (own,) = spec.ranges(tp_group.rank_in_group, tp_group.size)
        module.padding_idx = padding - own.start if own.start <= padding < own.stop else None
