"""The arguments of a call of glue or of a placed module, taken apart into leaves, and their part of its signature.

Nearly all calls are flat (tensors and numbers, no containers): they are handled without walking trees.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modelparallel import trees
from modelparallel.pipeline.stage_tensor import StageTensor

if TYPE_CHECKING:
    from modelparallel.pipeline.program import Program

# Their value and type go into a signature, and they are no containers.
_VALUES = (
    int, bool, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.memory_format, torch.layout
)  # fmt: skip
_VALUE_KINDS = frozenset(_VALUES)
_LEAF_KINDS = _VALUE_KINDS | {float, complex, slice}
_PRIMITIVES = (*_VALUES, float, complex, nn.Module)


class Arguments:
    """``values`` are the leaves as the engine sees them (see Program.resolve), ``given`` as the caller gave them;
    ``tensors`` those of the values that are tensors, ``inputs`` those that are StageTensors, in order.
    """

    __slots__ = ("_args", "_kwargs", "given", "holds_containers", "inputs", "skeleton", "tensors", "values")

    def __init__(self, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._args, self._kwargs = args, kwargs
        self.holds_containers = False
        self.skeleton: Hashable = (len(args), *kwargs) if kwargs else len(args)
        leaves = [*args, *kwargs.values()] if kwargs else list(args)
        for value in leaves:
            kind = type(value)
            if kind is not StageTensor and kind not in _LEAF_KINDS and trees.is_container(value):
                leaves, self.skeleton = taken_apart(args, kwargs)
                self.holds_containers = True
                break
        self.given = self.values = leaves
        self.tensors: list[torch.Tensor] = []
        self.inputs: list[StageTensor] = []
        self._resolve(program)

    def _resolve(self, program: Program) -> None:
        tensors, inputs = self.tensors, self.inputs
        for index, value in enumerate(self.given):
            kind = type(value)
            if kind is StageTensor and value.program is program:
                tensors.append(value)
                inputs.append(value)
            elif kind not in _LEAF_KINDS and isinstance(value, torch.Tensor):
                resolved = program.resolve(value)
                if resolved is not value:
                    self.replace(index, resolved)
                tensors.append(resolved)
                if isinstance(resolved, StageTensor):
                    inputs.append(resolved)

    def replace(self, index: int, value: Any) -> None:
        """Let ``value`` be the leaf ``index`` for the engine."""
        if self.values is self.given:
            self.values = list(self.given)
        self.values[index] = value

    def promote(self, index: int, value: StageTensor) -> None:
        """Let the plain tensor that is leaf ``index`` be a value with a home."""
        self.replace(index, value)
        self.tensors = [leaf for leaf in self.values if isinstance(leaf, torch.Tensor)]
        self.inputs.append(value)

    def rebuilt(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) with other leaves."""
        if not self.holds_containers:
            num_positional = len(self._args)
            return tuple(leaves[:num_positional]), dict(zip(self._kwargs, leaves[num_positional:], strict=True))
        iterator = iter(leaves)
        args, kwargs = trees.map_leaves(lambda _: next(iterator), (self._args, self._kwargs))
        return args, kwargs

    def call(self, func: Callable[..., Any], leaves: Sequence[Any]) -> Any:
        """``func`` with these arguments, but other leaves."""
        if not self.holds_containers and not self._kwargs:
            return func(*leaves)
        args, kwargs = self.rebuilt(leaves)
        return func(*args, **kwargs)

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


def _rare_key(leaf: Any, *, are_floats_plain: bool) -> Hashable:
    if isinstance(leaf, StageTensor):
        return leaf.spec
    if isinstance(leaf, torch.Tensor):
        return (leaf.shape, leaf.stride(), leaf.dtype, leaf.requires_grad, leaf.device.type)
    if isinstance(leaf, float):
        return float if are_floats_plain else leaf
    if isinstance(leaf, slice):
        parts = (leaf.start, leaf.stop, leaf.step)
        return ("slice", *((type(part), _rare_key(part, are_floats_plain=False)) for part in parts))
    if isinstance(leaf, _VALUES):
        return (type(leaf), leaf)
    return type(leaf).__qualname__


def taken_apart(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], tuple[Hashable, ...]]:
    """(leaves, a hashable skeleton) of a call with containers among its arguments."""
    found: list[Any] = []
    shape: list[Hashable] = []
    _collect((args, kwargs), found, shape)
    return found, tuple(shape)


def _collect(item: Any, found: list[Any], shape: list[Hashable]) -> None:
    # No inner function of taken_apart: one that calls itself is a cycle, and would keep the values alive with it.
    if not trees.is_container(item):
        found.append(item)
        return
    pairs = trees.children(item)
    shape.append((type(item).__name__, tuple(key for key, _ in pairs) if isinstance(item, dict) else len(pairs)))
    for _, child in pairs:
        _collect(child, found, shape)
