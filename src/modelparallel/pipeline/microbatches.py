"""Cut the arguments of a step function into microbatches (smp-api section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modelparallel import trees
from modelparallel.errors import StepUsageError


class SlicedObject:
    """The results of an object's own ``smp_slice``, one per microbatch; made where the object is, before it travels.

    No dataclass: those are containers.
    """

    def __init__(self, parts: tuple[Any, ...]) -> None:
        self.parts = parts


@dataclass(frozen=True)
class Microbatches:
    """The arguments of each microbatch, and the weight of each: its share of the samples (they sum to 1)."""

    arguments: tuple[dict[str, Any], ...]
    weights: tuple[float, ...]


def slice_objects(
    arguments: Mapping[str, Any], num_microbatches: int, axes: Mapping[str, int], whole: set[str]
) -> dict[str, Any]:
    """Replace every object that has ``smp_slice`` by its slices."""

    def cut(name: str, value: Any) -> Any:
        if hasattr(value, "smp_slice") and not isinstance(value, type):
            axis = axes.get(name, 0)
            return SlicedObject(
                tuple(value.smp_slice(num_microbatches, index, axis) for index in range(num_microbatches))
            )
        if trees.is_container(value):
            return trees.rebuild(value, {key: cut(name, child) for key, child in trees.children(value)})
        return value

    return {name: value if name in whole else cut(name, value) for name, value in arguments.items()}


def split(
    arguments: Mapping[str, Any],
    num_microbatches: int,
    axes: Mapping[str, int],
    whole: set[str],
    *,
    is_uneven_allowed: bool,
) -> Microbatches:
    """The microbatches of ``arguments`` (name -> value; objects already cut by :func:`slice_objects`).

    A batch that does not divide is cut into parts that differ by one sample; with fewer samples than microbatches only
    as many parts as samples are made. Raises StepUsageError naming argument, length and the number of microbatches
    where that is not allowed or unclear.
    """
    lengths = _lengths(arguments, axes, whole)
    sizes = _sizes(lengths, num_microbatches, is_uneven_allowed=is_uneven_allowed)
    total = sum(sizes)

    def part(index: int) -> dict[str, Any]:
        def cut(name: str, value: Any) -> Any:
            axis = axes.get(name, 0)
            return trees.map_leaves(lambda leaf: _part(leaf, axis, index, sizes), value)

        return {name: value if name in whole else cut(name, value) for name, value in arguments.items()}

    result = [part(index) for index in range(len(sizes))]
    return Microbatches(tuple(result), tuple(size / total for size in sizes))


def _lengths(arguments: Mapping[str, Any], axes: Mapping[str, int], whole: set[str]) -> list[tuple[str, int]]:
    lengths = []
    for name, value in arguments.items():
        if name in whole:
            continue
        for leaf in trees.leaves(value):
            if isinstance(leaf, torch.Tensor) and leaf.ndim > 0:
                axis = axes.get(name, 0)
                if not -leaf.ndim <= axis < leaf.ndim:
                    raise StepUsageError(
                        f"smp.step: argument '{name}' has a tensor of shape {tuple(leaf.shape)}, which has no axis "
                        f"{axis} to split along: "
                        f"correct input_split_axes, or name it in non_split_inputs"
                    )
                lengths.append((name, leaf.shape[axis]))
    return lengths


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


def _part(leaf: Any, axis: int, index: int, sizes: Sequence[int]) -> Any:
    if isinstance(leaf, SlicedObject):
        return leaf.parts[index]
    if not isinstance(leaf, torch.Tensor) or leaf.ndim == 0:
        return leaf
    length = leaf.shape[axis]
    if length % len(sizes) == 0:
        part = leaf.narrow(axis, index * (length // len(sizes)), length // len(sizes))
    else:
        part = leaf.narrow(axis, sum(sizes[:index]), sizes[index])
    # With a version counter of its own: under a pipeline the body may write to its part before the backward of another
    # microbatch has run.
    return part if part.requires_grad else part.data
