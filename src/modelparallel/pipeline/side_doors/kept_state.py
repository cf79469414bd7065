"""What the code of a script can write to beside the tensors that it is given: attributes of modules, containers that
modules and functions reach, names of closures.

A module reaches its attributes, and what its forward and its hooks reach; a function its closure and the globals that
it names; both what is in the containers and plain objects there. Code and objects of libraries are not looked into.
"""

from __future__ import annotations

import functools
import operator
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from modelparallel.torch_compat import hook_registries
from modelparallel.torch_compat.private_parts import version_of

#: (model, name of a module in it, then steps of two: how to go on from there, and with which name).
Place = tuple[Any, ...]
#: Says that there is nothing.
MISSING = object()
OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {"forward"}

_COMPARED = (int, float, complex, bool, str, types.MethodType)
_CALLED = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)
_MUTABLE = (list, dict, set, deque)
_LIBRARIES = ("torch.", "torchvision.", "transformers.", "timm.", "diffusers.", "peft.", "modelparallel.", "numpy.")
_MOST_ITEMS = 256  # of a container that is looked into for others
_DEEPEST = 3
_MOST_BYTES = 1 << 26  # of a tensor that is copied


def containers_of(module: nn.Module, where: Place, seen: set[int]) -> Iterator[tuple[Place, Any]]:
    """(place, container) of the containers that a module and its forward reach; ``seen``: the ids of objects that were
    met before.
    """
    for name, value in list(vars(module).items()):
        if name not in OF_EVERY_MODULE:
            yield from _inside(value, (*where, "attribute", name), seen, 0)
    yield from _of_function(forward_of(module), (*where, "forward", ""), seen, 0)


def ordinary_tensor(module: nn.Module, name: str) -> torch.Tensor | None:
    """An attribute of a module that is a tensor, but neither a parameter nor a buffer."""
    value = vars(module).get(name)
    return value if type(value) is torch.Tensor and not value.is_inference() else None


def forward_of(module: nn.Module) -> Any:
    """The function behind a module's forward."""
    forward: Any = module.forward
    while hasattr(forward, "leads_to"):  # a door
        forward = forward.leads_to
    return getattr(forward, "__func__", forward)


def cell_of(cell: Any) -> Any:
    """The content of a cell of a closure; None where it is not filled yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def content_of(container: Any) -> Any:
    """A flat copy of a container's content."""
    if isinstance(container, dict):
        return dict(container)
    return set(container) if isinstance(container, set) else list(container)


def refill(container: Any, content: Any) -> None:
    """Let ``container`` hold ``content`` and nothing else."""
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(content)
    else:
        container.extend(content)


def _inside(value: Any, place: Place, seen: set[int], depth: int) -> Iterator[tuple[Place, Any]]:
    if id(value) in seen or depth > _DEEPEST:
        return
    if isinstance(value, _MUTABLE):
        seen.add(id(value))
        yield place, value
        if len(value) <= _MOST_ITEMS and not isinstance(value, set):
            for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
                if isinstance(key, (str, int)):
                    yield from _inside(item, (*place, "item", key), seen, depth + 1)
    elif isinstance(value, types.FunctionType):
        yield from _of_function(value, place, seen, depth)
    elif _is_plain_object(value):
        seen.add(id(value))
        yield from _inside(vars(value), (*place, "fields", ""), seen, depth + 1)


def _is_plain_object(value: Any) -> bool:
    kinds = (nn.Module, torch.Tensor, type, types.ModuleType, *_CALLED)
    if not hasattr(value, "__dict__") or isinstance(value, kinds):
        return False
    return not f"{type(value).__module__}.".startswith(_LIBRARIES)


def _of_function(function: Any, place: Place, seen: set[int], depth: int) -> Iterator[tuple[Place, Any]]:
    if not _is_of_script(function) or id(function) in seen or depth > _DEEPEST:
        return
    seen.add(id(function))
    for kind, name, value in _reached(function):
        yield from _inside(value, (*place, kind, name), seen, depth + 1)


def _is_of_script(function: Any) -> bool:
    # functools.wraps takes over __module__.
    return isinstance(function, types.FunctionType) and not f"{function.__globals__.get('__name__')}.".startswith(
        _LIBRARIES
    )


def _reached(function: types.FunctionType) -> list[tuple[str, Any, Any]]:
    cells = [("cell", index, cell_of(cell)) for index, cell in enumerate(function.__closure__ or ())]
    return cells + [("global", name, function.__globals__.get(name)) for name in function.__code__.co_names]


class KeptState:
    """What modules and functions reach, as it is now; :meth:`restore` puts it back."""

    def __init__(self, modules: Iterable[nn.Module], functions: Iterable[Any]) -> None:
        self._modules: list[tuple[nn.Module, dict[str, Any]]] = []
        self._hooks: list[tuple[Any, dict[int, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._cells: list[tuple[Any, Any]] = []
        self._globals: list[tuple[dict[str, Any], str, Any]] = []
        self._tensors: list[tuple[torch.Tensor, int, torch.Tensor | None]] = []
        self._seen: set[int] = set()
        for module in modules:
            self._keep_module(module)
        for function in functions:
            self._keep(function)

    def _keep_module(self, root: nn.Module) -> None:
        for module in root.modules():
            if id(module) in self._seen:
                continue
            self._seen.add(id(module))
            own = {name: value for name, value in vars(module).items() if name not in OF_EVERY_MODULE}
            self._modules.append((module, own))
            for value in own.values():
                self._keep(value)
            self._keep(forward_of(module))
        for hooks in hook_registries(root):
            self._hooks.append((hooks, dict(hooks)))
            for hook in hooks.values():
                self._keep(hook)

    def _keep(self, value: Any, depth: int = 0) -> None:
        while isinstance(value, functools.partial):
            value = value.func
        if isinstance(value, types.MethodType):
            self._keep(value.__self__, depth)
            value = value.__func__
        if id(value) in self._seen or depth > _DEEPEST:
            return
        if isinstance(value, nn.Module):
            self._keep_module(value)
        elif type(value) is torch.Tensor:
            self._keep_tensor(value)
        elif _is_of_script(value):
            self._seen.add(id(value))
            self._cells.extend((cell, cell_of(cell)) for cell in value.__closure__ or ())
            known = [name for name in value.__code__.co_names if name in value.__globals__]
            self._globals.extend((value.__globals__, name, value.__globals__[name]) for name in known)
            for _, _, reached in _reached(value):
                self._keep(reached, depth + 1)
        elif isinstance(value, _MUTABLE):
            self._keep_container(value, depth)
        elif _is_plain_object(value):
            self._seen.add(id(value))
            self._keep_container(vars(value), depth + 1)

    def _keep_container(self, container: Any, depth: int) -> None:
        if id(container) in self._seen:
            return
        self._seen.add(id(container))
        self._containers.append((container, content_of(container)))
        if len(container) <= _MOST_ITEMS:
            for item in list(container.values() if isinstance(container, dict) else container):
                self._keep(item, depth + 1)

    def _keep_tensor(self, tensor: torch.Tensor) -> None:
        self._seen.add(id(tensor))
        if not tensor.is_inference() and tensor.layout is torch.strided and not tensor.is_meta:
            is_small = tensor.numel() * tensor.element_size() <= _MOST_BYTES
            self._tensors.append((tensor, version_of(tensor), tensor.detach().clone() if is_small else None))

    def has_changed(self) -> bool:
        """Whether something else is there now."""
        for module, own in self._modules:
            now = {name: value for name, value in vars(module).items() if name not in OF_EVERY_MODULE}
            if now.keys() != own.keys() or not all(is_same(value, own[name]) for name, value in now.items()):
                return True
        for container, content in self._containers:
            if not _hold_the_same(container, content, is_same):
                return True
        return (
            any(not is_same(cell_of(cell), content) for cell, content in self._cells)
            or any(not is_same(names.get(name, MISSING), value) for names, name, value in self._globals)
            or any(version_of(tensor) != version for tensor, version, _ in self._tensors)
        )

    def restore(self) -> None:
        """Put back what has changed since, the hooks of modules too, but not large tensors."""
        for module, own in self._modules:
            for name in [name for name in vars(module) if name not in OF_EVERY_MODULE and name not in own]:
                del module.__dict__[name]
            for name, value in own.items():
                if vars(module).get(name, MISSING) is not value:
                    module.__dict__[name] = value
        for container, content in (*self._hooks, *self._containers):
            if not _hold_the_same(container, content, operator.is_):
                refill(container, content)
        for cell, content in self._cells:
            if cell_of(cell) is not content:
                cell.cell_contents = content
        for names, name, value in self._globals:
            if names.get(name, MISSING) is not value:
                names[name] = value
        with torch.no_grad():
            for tensor, version, values in self._tensors:
                if values is not None and version_of(tensor) != version and tensor.shape == values.shape:
                    tensor.detach().copy_(values)


def is_same(one: Any, other: Any) -> bool:
    """Whether it is the same object, or an equal number, string or bound method."""
    return one is other or (type(one) is type(other) and type(one) in _COMPARED and bool(one == other))


def _hold_the_same(container: Any, content: Any, is_one: Callable[[Any, Any], bool]) -> bool:
    if isinstance(container, set):  # a copy of it may be in another order
        return bool(container == content)
    return len(container) == len(content) and all(map(is_one, _parts(container), _parts(content)))


def _parts(content: Any) -> list[Any]:
    return [part for pair in content.items() for part in pair] if isinstance(content, dict) else list(content)
