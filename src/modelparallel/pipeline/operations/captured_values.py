"""What a function reads beside its arguments: values of the step and weights in its closure, in modules that it names,
in its defaults. Found without running it, so that every stage finds the same; and given to it while it runs.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from modelparallel import trees
from modelparallel.errors import StepUsageError
from modelparallel.pipeline.program.program import Program
from modelparallel.pipeline.values.functions import traits_of
from modelparallel.pipeline.values.stage_tensor import StageTensor
from modelparallel.torch_compat import DisableTorchFunctionSubclass

_PRIMITIVES = (int, float, complex, bool, str, bytes, type(None), type(...), torch.dtype, torch.device, slice, range)


class Reached:
    """``tensors``: values of the step, weights and buffers with a home, each once, in an order that all stages share.
    ``key``: what else decides how the function works; None if that cannot be told.
    """

    def __init__(self, program: Program) -> None:
        self.tensors: list[torch.Tensor] = []
        self.modules: list[nn.Module] = []
        self._engine, self._program = program.engine, program
        self._key: list[Hashable] = []
        self._is_told = True
        self._known: set[int] = set()
        self._seen: set[tuple[int, int]] = set()
        self._alive: list[Any] = []  # ids are unique among those that live only

    @property
    def key(self) -> Hashable | None:
        return tuple(self._key) if self._is_told else None

    def leave_out(self, tensors: list[torch.Tensor]) -> None:
        """These are given in another way."""
        self._known.update(id(tensor) for tensor in tensors)

    def visit(self, value: Any, names: frozenset[str] = frozenset()) -> None:
        """Look into ``value``; ``names``: those that the code uses that holds it."""
        if isinstance(value, _PRIMITIVES):
            self._key.append((type(value).__name__, repr(value)))
            return
        if (id(value), id(names)) in self._seen:
            return
        self._seen.add((id(value), id(names)))
        self._alive.append((value, names))
        if isinstance(value, torch.Tensor):
            self._visit_tensor(value)
        elif isinstance(value, nn.Module):
            self._visit_module(value, names)
        elif isinstance(value, FunctionType):
            self._visit_function(value)
        elif isinstance(value, MethodType):
            self.visit(value.__func__)
            self.visit(value.__self__, _names_of(value.__func__))
        elif isinstance(value, partial):
            for part in (value.func, value.args, value.keywords):
                self.visit(part, names)
        elif trees.is_container(value):
            self._key.append((type(value).__qualname__, len(value) if hasattr(value, "__len__") else 0))
            for key, child in trees.children(value):
                self._key.append(repr(key))
                self.visit(child, names)
        elif isinstance(value, (type, ModuleType, BuiltinFunctionType)) or type(value).__module__ == "builtins":
            self._key.append(getattr(value, "__qualname__", getattr(value, "__name__", type(value).__qualname__)))
        else:
            self._visit_object(value, names)

    def _visit_tensor(self, tensor: torch.Tensor) -> None:
        if not self._is_ours(tensor):
            self._key.append((tuple(tensor.shape), str(tensor.dtype), tensor.requires_grad))
        elif id(tensor) not in self._known:
            self._known.add(id(tensor))
            self.tensors.append(tensor)

    def _is_ours(self, tensor: torch.Tensor) -> bool:
        if isinstance(tensor, StageTensor) or id(tensor) in self._engine.placed:
            return True
        return self._program.written.find(self._program, tensor) is not None

    def _visit_function(self, function: FunctionType) -> None:
        names = _names_of(function)
        self._key.append(function.__code__)
        for cell in function.__closure__ or ():
            try:
                self.visit(cell.cell_contents, names)
            except ValueError:
                continue  # not filled yet
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self.visit(value, names)
        if (function.__module__ or "").split(".")[0] == "torch":
            return
        for name in sorted(names & function.__globals__.keys()):
            value = function.__globals__[name]
            if isinstance(value, (torch.Tensor, nn.Module, FunctionType, *_PRIMITIVES)):
                self.visit(value, names)

    def _visit_module(self, module: nn.Module, names: frozenset[str]) -> None:
        self._key.append((id(module), module.training))
        self.modules.append(module)
        if self._engine.holds_placed(module):
            present = [name for name in sorted(names) if _has(module, name)]
            for name in present:
                self._visit_attribute(module, name, names)
            if present:
                return
        # It is called, or given away. (One that is placed, or in a placed one, is small: all of it counts.)
        for tensor in (*module.parameters(), *module.buffers()):
            if self._is_ours(tensor):
                self._visit_tensor(tensor)

    def _visit_object(self, value: Any, names: frozenset[str]) -> None:
        self._is_told = False
        attributes = getattr(value, "__dict__", {})
        present = [name for name in sorted(names) if name in attributes or callable(getattr(type(value), name, None))]
        for name in present:
            self._visit_attribute(value, name, names)
        own_call = vars(type(value)).get("__call__")
        if isinstance(own_call, FunctionType):
            self.visit(MethodType(own_call, value))

    def _visit_attribute(self, holder: Any, name: str, names: frozenset[str]) -> None:
        own = getattr(type(holder), name, None)
        if isinstance(own, property):
            own = own.fget
        if isinstance(own, FunctionType):
            if not (own.__module__ or "").startswith("torch."):
                self.visit(own)
                self.visit(holder, _names_of(own))
            return
        self.visit(getattr(holder, name, None), names)


class Captured(TorchFunctionMode):
    """While a transform runs at its home: what is here of the values that its function has captured."""

    def __init__(self, program: Program, what: str) -> None:
        super().__init__()
        self._engine, self._frames, self._what = program.engine, program.frames, what
        self._locals: dict[int, torch.Tensor] = {}
        self._is_in_unit = False

    def hold(self, captured: Sequence[torch.Tensor], locals_: Sequence[torch.Tensor]) -> None:
        """``locals_`` stand for ``captured``."""
        self._locals = {id(one): local for one, local in zip(captured, locals_, strict=True)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        traits = traits_of(func)
        if traits.is_metadata:
            with DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if traits.is_random and not self._is_in_unit:
            self._frames.enter_glue_operation()
        return func(*self.replaced(args), **self.replaced(kwargs))

    def replaced(self, values: Any) -> Any:
        """Arguments with what is here in the place of what was captured."""
        return trees.map_leaves(self._local, values)

    def _local(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        local = self._locals.get(id(leaf))
        if local is not None:
            return local
        if isinstance(leaf, StageTensor):
            raise StepUsageError(
                f"{self._what}: its function reads a value of the step ({leaf!r}) that it is not given and that does "
                "not stand in its closure: give it to the function as an argument"
            )
        placed = self._engine.placed.get(id(leaf))
        if placed is not None and placed.home != self._engine.stage and not self._engine.has_copy(leaf):
            raise StepUsageError(
                f"{self._what} runs on pp_rank {self._engine.stage}, and its function reads '{placed.name}', which is "
                f"on pp_rank {placed.home}, in a way that does not show in its code: give it to the function as an "
                "argument, or place both on one stage (smp.set_partition)"
            )
        return leaf

    @contextmanager
    def in_unit(self, unit: int | None) -> Iterator[None]:
        """A unit is called; it draws as it does without a pipeline."""
        was_in_unit = self._is_in_unit
        if unit is not None and not was_in_unit:
            self._frames.enter_unit(unit)
        self._is_in_unit = True
        try:
            yield
        finally:
            self._is_in_unit = was_in_unit


def _has(module: nn.Module, name: str) -> bool:
    """Whether it has something of this name that is not every module's."""
    own = (module._parameters, module._buffers, module._modules, module.__dict__)
    return any(name in part for part in own) or (hasattr(type(module), name) and not hasattr(nn.Module, name))


_names: dict[CodeType, frozenset[str]] = {}


def _names_of(function: Any) -> frozenset[str]:
    """All names of attributes and globals in the code of a function and of the functions that are made in it."""
    code = function.__code__
    known = _names.get(code)
    if known is None:
        names, pending = set(), [code]
        while pending:
            part = pending.pop()
            names.update(part.co_names)
            pending.extend(constant for constant in part.co_consts if isinstance(constant, CodeType))
        known = _names[code] = frozenset(names)
    return known
