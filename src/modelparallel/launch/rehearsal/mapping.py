"""The table of mapped names, and how a mapping is put in place.

The script has to see one thing and libraries another under the same name. Python lets a module have another class for
that (data model, "Customizing module attribute access"): a property on it looks at who reads the name. Libraries get
the very object that was there before, so nothing is different for them, not even identities. For methods of
`torch.Tensor` and `nn.Module` a descriptor in the class does the same.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType, ModuleType
from typing import Any

from modelparallel.launch.rehearsal.callers import ScriptCode


@dataclass(frozen=True)
class MappedName:
    """A name of torch, as the script writes it, and what the script gets under it."""

    name: str
    meaning: str


class Installation:
    """Puts mappings in place; `names` lists them in the order in which they came."""

    def __init__(self, script: ScriptCode) -> None:
        self.script = script
        self.names: list[MappedName] = []
        self._properties: dict[ModuleType, dict[str, property]] = {}

    def module_name(self, module: ModuleType, name: str, replacement: Any, meaning: str) -> None:
        """The script reads `module.name` as `replacement`. A name that this torch does not have is left alone."""
        if name not in vars(module):
            return
        self.names.append(MappedName(f"{module.__name__}.{name}", meaning))
        self._properties.setdefault(module, {})[name] = _property(name, replacement, self.script)

    def method(self, owner: type, name: str, replacement: Callable[..., Any], meaning: str) -> None:
        """`owner.name` becomes `replacement(original, script, instance, ...)`."""
        self.names.append(MappedName(f"{_public_name(owner)}.{name}", meaning))
        original = getattr(owner, name)
        setattr(owner, name, _MappedMethod(original, replacement, self.script))

    def finish(self) -> None:
        """Give the modules their new classes."""
        for module, properties in self._properties.items():
            module.__class__ = type(type(module).__name__, (type(module),), dict(properties))


def _property(name: str, replacement: Any, script: ScriptCode) -> property:
    owns, get_frame = script.owns, sys._getframe

    def read(module: ModuleType) -> Any:
        if owns(get_frame(1)):
            return replacement
        try:
            return module.__dict__[name]
        except KeyError:
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}") from None

    def write(module: ModuleType, value: Any) -> None:
        module.__dict__[name] = value

    def delete(module: ModuleType) -> None:
        del module.__dict__[name]

    return property(read, write, delete)


class _MappedMethod:
    """A method that the script calls in its mapped form; a library that reads it from the class gets the original."""

    def __init__(self, original: Any, replacement: Callable[..., Any], script: ScriptCode) -> None:
        self._original = original
        self._script = script
        self._mapped = functools.partial(replacement, original, script)
        self._function = _as_function(self._mapped, original)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is not None:
            return MethodType(self._mapped, instance)
        if self._script.owns(sys._getframe(1)):
            return self._function
        return self._original


def _as_function(mapped: Callable[..., Any], original: Any) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:  # a name that callers.ScriptCode looks through
        return mapped(*args, **kwargs)

    return wrapper


def _public_name(owner: type) -> str:
    short = {"torch.nn.modules.module": "torch.nn", "torch.storage": "torch"}
    return f"{short.get(owner.__module__, owner.__module__)}.{owner.__qualname__}"
