"""The arguments of a call of glue or of a placed module, taken apart into leaves, and their part of its signature.

Nearly all calls are flat (tensors and numbers, no containers): they are handled without walking trees.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from modelparallel import trees
from modelparallel.pipeline.values.stage_tensor import StageTensor, TensorOwner

# Their value and type go into a signature, and they are no containers.
_VALUES = (
    int, bool, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.memory_format, torch.layout
)  # fmt: skip
_VALUE_KINDS = frozenset(_VALUES)
_BOUNDS = frozenset((int, type(None)))
_LEAF_KINDS = _VALUE_KINDS | {float, complex, slice}
_PRIMITIVES = (*_VALUES, float, complex, nn.Module)


class Arguments:
    """``values`` are the leaves as the engine sees them (see TensorOwner.resolve), ``given`` as the caller gave them;
    ``tensors`` are the values that are tensors, ``inputs`` the ones that are StageTensors, in order.
    """

    __slots__ = (
        "_keywords", "_num_positional", "_outer", "given", "holds_containers", "inputs", "skeleton", "tensors", "values"
    )  # fmt: skip

    given: list[Any]
    values: list[Any]
    tensors: Sequence[torch.Tensor]
    inputs: list[StageTensor]

    def __init__(self, program: TensorOwner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._num_positional = len(args)
        self._keywords = kwargs
        self._outer = leaves = [*args, *kwargs.values()] if kwargs else list(args)
        self.skeleton: Hashable = (len(args), *kwargs) if kwargs else len(args)
        self.holds_containers = False
        self.given = self.values = leaves
        inputs: list[StageTensor] = []
        for value in leaves:
            kind = type(value)
            if kind is StageTensor and value.program is program:
                inputs.append(value)
            elif kind not in _LEAF_KINDS:
                self._look_closer(program)
                return
        self.tensors = inputs
        self.inputs = inputs

    def _look_closer(self, program: TensorOwner) -> None:
        """There are containers, plain tensors, parameters, objects, or values of another program."""
        for value in self._outer:
            kind = type(value)
            if kind is not StageTensor and kind not in _LEAF_KINDS and trees.is_container(value):
                self.given, shape = taken_apart(self._outer)
                self.skeleton = (self._num_positional, *self._keywords, *shape)
                self.holds_containers = True
                break
        values = list(self.given)
        tensors: list[torch.Tensor] = []
        inputs: list[StageTensor] = []
        self.values, self.tensors, self.inputs = values, tensors, inputs
        for index, value in enumerate(values):
            kind = type(value)
            if kind is StageTensor and value.program is program:
                tensors.append(value)
                inputs.append(value)
            elif kind not in _LEAF_KINDS and isinstance(value, torch.Tensor):
                values[index] = resolved = program.resolve(value)
                tensors.append(resolved)
                if isinstance(resolved, StageTensor):
                    inputs.append(resolved)

    def promote(self, index: int, value: StageTensor) -> None:
        """Let the plain tensor that is leaf ``index`` be a value with a home."""
        self.values[index] = value
        self.tensors = [leaf for leaf in self.values if isinstance(leaf, torch.Tensor)]
        self.inputs.append(value)

    def call(self, func: Callable[..., Any], leaves: list[Any]) -> Any:
        """``func`` with these arguments, but other leaves."""
        if self.holds_containers:
            iterator = iter(leaves)
            leaves = [_refilled(value, iterator) for value in self._outer]
        if not self._keywords:
            return func(*leaves)
        num_positional = self._num_positional
        return func(*leaves[:num_positional], **dict(zip(self._keywords, leaves[num_positional:], strict=True)))

    def opaque(self) -> list[Any]:
        """The leaves that are not tensors, in order."""
        return [value for value in self.values if not isinstance(value, torch.Tensor)]

    def objects(self) -> list[Any]:
        """The leaves that the callee could change: neither tensors nor values."""
        return [
            value
            for value in self.values
            if type(value) is not StageTensor
            and type(value) not in _VALUE_KINDS
            and not isinstance(value, (torch.Tensor, *_PRIMITIVES))
        ]

    def keys(self, *, are_floats_plain: bool) -> list[Hashable]:
        """What of each leaf decides the structure of the output."""
        keys: list[Hashable] = []
        for value in self.values:
            kind = type(value)
            if kind is StageTensor:
                keys.append(value.spec)
            elif kind in _VALUE_KINDS:
                keys.append((kind, value))
            elif kind is float:
                keys.append(float if are_floats_plain else value)
            else:
                keys.append(_rare_key(value, are_floats_plain=are_floats_plain))
        return keys


def _refilled(item: Any, leaves: Iterator[Any]) -> Any:
    """``item`` with its leaves replaced by the next ones; containers in which nothing changes stay themselves."""
    kind = type(item)
    if kind is StageTensor or kind in _LEAF_KINDS:
        return next(leaves)
    if kind is not tuple and kind is not list:
        return trees.map_leaves(lambda _: next(leaves), item)
    mapped = [_refilled(child, leaves) for child in item]
    for new, old in zip(mapped, item, strict=True):
        if new is not old:
            return mapped if kind is list else tuple(mapped)
    return item


def _rare_key(leaf: Any, *, are_floats_plain: bool) -> Hashable:
    if isinstance(leaf, StageTensor):
        return leaf.spec
    if isinstance(leaf, torch.Tensor):
        return (leaf.shape, leaf.stride(), leaf.dtype, leaf.requires_grad, leaf.device.type)
    if isinstance(leaf, float):
        return float if are_floats_plain else leaf
    if isinstance(leaf, slice):
        if type(leaf.start) in _BOUNDS and type(leaf.stop) in _BOUNDS and type(leaf.step) in _BOUNDS:
            return (slice, leaf.start, leaf.stop, leaf.step)
        parts = (leaf.start, leaf.stop, leaf.step)
        return ("slice", *((type(part), _rare_key(part, are_floats_plain=False)) for part in parts))
    if isinstance(leaf, _VALUES):
        return (type(leaf), leaf)
    if type(leaf).__module__ == "numpy" and hasattr(leaf, "tobytes"):  # numbers and indices, like Python's own
        if are_floats_plain and not leaf.shape and leaf.dtype.kind == "f":
            return type(leaf).__qualname__
        return (type(leaf).__qualname__, str(leaf.dtype), leaf.shape, leaf.tobytes())
    return type(leaf).__qualname__


def taken_apart(values: Sequence[Any]) -> tuple[list[Any], list[Hashable]]:
    """(leaves, what tells how they are nested) of arguments with containers among them."""
    leaves: list[Any] = []
    shape: list[Hashable] = []
    for value in values:
        _collect(value, leaves, shape)
    return leaves, shape


def _collect(item: Any, leaves: list[Any], shape: list[Hashable]) -> None:
    # No inner function of taken_apart: one that calls itself is a cycle, and would keep the values alive with it.
    kind = type(item)
    if kind is StageTensor or kind in _LEAF_KINDS:
        leaves.append(item)
    elif kind is tuple or kind is list:
        shape.append((len(leaves), kind, len(item)))
        for child in item:
            _collect(child, leaves, shape)
    elif trees.is_container(item):
        pairs = trees.children(item)
        keys = tuple(key for key, _ in pairs) if isinstance(item, dict) else len(pairs)
        shape.append((len(leaves), kind.__name__, keys))
        for _, child in pairs:
            _collect(child, leaves, shape)
    else:
        leaves.append(item)
