"""Cut the arguments of a step function into microbatches (smp-api section 4)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from modelparallel import trees
from modelparallel.errors import StepUsageError
from modelparallel.pipeline.batch_lists import ListReader, SampleList, SlicedObject, place


class Microbatches(NamedTuple):
    """The arguments of each microbatch, and the weight of each: its share of the samples (they sum to 1)."""

    arguments: tuple[dict[str, Any], ...]
    weights: tuple[float, ...]
    #: What the user should hear once about the arguments, by what it is about.
    notices: Mapping[Hashable, str]


def slice_objects(
    arguments: Mapping[str, Any], num_microbatches: int, axes: Mapping[str, int], whole: set[str]
) -> dict[str, Any]:
    """Replace every object that has ``smp_slice`` by its slices."""

    def cut(name: str, value: Any) -> Any:
        if _has_slices(value):
            axis = axes.get(name, 0)
            return SlicedObject(
                tuple(value.smp_slice(num_microbatches, index, axis) for index in range(num_microbatches))
            )
        if trees.is_container(value):
            return trees.rebuild(value, {key: cut(name, child) for key, child in trees.children(value)})
        return value

    return {name: value if name in whole else cut(name, value) for name, value in arguments.items()}


def _has_slices(value: Any) -> bool:
    if isinstance(value, torch.nn.Module) and "smp_slice" not in vars(value):
        return hasattr(type(value), "smp_slice")  # not by __getattr__ of modules, which takes a microsecond
    return hasattr(value, "smp_slice") and not isinstance(value, type)


def _is_opaque(value: Any) -> bool:
    """Whether every microbatch gets it as it is."""
    return not isinstance(value, (torch.Tensor, SlicedObject)) and not trees.is_container(value)


def split(
    arguments: Mapping[str, Any],
    num_microbatches: int,
    axes: Mapping[str, int],
    whole: set[str],
    *,
    is_uneven_allowed: bool,
    reader: ListReader | None = None,
    variadic: str | None = None,
) -> Microbatches:
    """The microbatches of ``arguments`` (name -> value; objects already cut by :func:`slice_objects`).

    A batch that does not divide is cut into parts that differ by one sample; with fewer samples than microbatches only
    as many parts as samples are made. ``reader`` remembers how lists were read; ``variadic`` is the argument that holds
    ``*args``. Raises StepUsageError naming argument, length and the number of microbatches where that is not allowed or
    unclear.
    """
    reading = (reader or ListReader()).read(arguments, axes, whole, num_microbatches, variadic)
    sizes = _sizes(reading.lengths, num_microbatches, is_uneven_allowed=is_uneven_allowed)
    total = sum(sizes)
    num_parts = len(sizes)

    def cut(path: trees.Path, value: Any, index: int) -> Any:
        if path in reading.cut:
            return _rows(value, index, sizes)
        if not trees.is_container(value):
            return _part(value, axes.get(path[0], 0), index, sizes, path)
        pairs = trees.children(value)
        parts = {key: cut((*path, key), child, index) for key, child in pairs}
        return value if all(parts[key] is child for key, child in pairs) else trees.rebuild(value, parts)

    result: list[dict[str, Any]] = [{} for _ in sizes]
    for name, value in arguments.items():
        parts: Sequence[Any]
        if name in whole or (not reading.cut and _is_opaque(value)):
            parts = [value] * num_parts
        elif (quick := _equal_parts(value, axes.get(name, 0), num_parts)) is not None:
            parts = quick
        else:
            parts = [cut((name,), value, index) for index in range(num_parts)]
        for microbatch, part in zip(result, parts, strict=True):
            microbatch[name] = part
    weights = (1.0,) if num_parts == 1 else tuple([size / total for size in sizes])
    return Microbatches(tuple(result), weights, reading.notices)


def _sizes(lengths: Sequence[tuple[str, int]], num_microbatches: int, *, is_uneven_allowed: bool) -> list[int]:
    """The number of samples of each microbatch."""
    if not lengths:
        return [1] * num_microbatches
    for name, length in lengths:
        if length == 0:
            raise StepUsageError(f"smp.step: argument '{name}' has an empty batch (length 0); give at least one sample")
    uneven = [(name, length) for name, length in lengths if length % num_microbatches]
    if not uneven:
        return [lengths[0][1] // num_microbatches] * num_microbatches
    name, length = uneven[0]
    if not is_uneven_allowed:
        raise StepUsageError(
            f"smp.step: argument '{name}' has length {length}, which does not divide into "
            f"microbatches={num_microbatches}: use a batch size that "
            'is a multiple of it (drop_last=True for the last batch), or set uneven_microbatches to "exact"'
        )
    other = next(((other, size) for other, size in lengths if size != length), None)
    if other is not None:
        raise StepUsageError(
            f"smp.step: argument '{name}' has length {length} and argument '{other[0]}' has length {other[1]}; with "
            "microbatches="
            f"{num_microbatches}, which does not divide {length}, it is unclear which samples belong together: give "
            "equal batch lengths, lengths "
            "that divide, or name what is not a batch in non_split_inputs"
        )
    num_parts = min(num_microbatches, length)
    return [length // num_parts + (1 if index < length % num_parts else 0) for index in range(num_parts)]


def _range(length: int, index: int, sizes: Sequence[int]) -> tuple[int, int]:
    """(start, length) of the part of a microbatch."""
    if length % len(sizes) == 0:
        return index * (length // len(sizes)), length // len(sizes)
    return sum(sizes[:index]), sizes[index]


def _rows(value: Any, index: int, sizes: Sequence[int]) -> Any:
    """The elements of a list of samples, or the rows of an array."""
    start, length = _range(len(value), index, sizes)
    rows = value[start : start + length]
    return list(rows) if isinstance(value, SampleList) else rows


def _equal_parts(value: Any, axis: int, num_parts: int) -> Sequence[torch.Tensor] | None:
    """What :func:`_part` gives for a plain tensor that divides, by one call of torch; None for anything else."""
    if (
        type(value) is not torch.Tensor
        or value.ndim == 0
        or value.requires_grad
        or value.layout is not torch.strided
        or value.is_nested
        or value.shape[axis] % num_parts
    ):
        return None
    return [part.data for part in ((value,) if num_parts == 1 else value.chunk(num_parts, axis))]


def _part(leaf: Any, axis: int, index: int, sizes: Sequence[int], path: trees.Path) -> Any:
    if isinstance(leaf, SlicedObject):
        return leaf.parts[index]
    if not isinstance(leaf, torch.Tensor) or leaf.ndim == 0:
        return leaf
    start, length = _range(leaf.shape[axis], index, sizes)
    if leaf.is_nested or leaf.layout is not torch.strided:
        return _sparse_part(leaf, axis, start, length, path)
    part = leaf.narrow(axis, start, length)
    # With a version counter of its own: under a pipeline the body may write to its part before the backward of another
    # microbatch has run.
    return part if part.requires_grad else part.data


def _sparse_part(leaf: torch.Tensor, axis: int, start: int, length: int, path: trees.Path) -> torch.Tensor:
    if leaf.is_nested or leaf.layout not in (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc):
        kind = "nested" if leaf.is_nested else str(leaf.layout)
        raise StepUsageError(
            f"smp.step: {place(path)} is a {kind} tensor, which cannot be split into microbatches: pass a padded or "
            "dense tensor, or a list of one tensor per sample (smp.SampleList), or name it in non_split_inputs"
        )
    rows = torch.arange(start, start + length, device=leaf.device)
    if leaf.layout is torch.sparse_coo:
        return leaf.index_select(axis, rows)
    chosen: torch.Tensor = leaf.to_sparse_coo().index_select(axis, rows)
    return chosen.to_sparse(layout=leaf.layout)
