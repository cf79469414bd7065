"""Nested containers of values: walk them and rebuild them with the same types.

Scripts pass dictionaries, tuples, dataclasses, Hugging Face outputs and batches to their step functions and modules,
and expect the same types back. torch's pytree knows only registered classes, so this walks every list, tuple, named
tuple, dict, set, dataclass and their subclasses; anything else is a leaf.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

Path = tuple[Any, ...]


def is_container(value: object) -> bool:
    """Whether :func:`map_leaves` looks inside ``value``."""
    return _is_container_class(type(value))  # type: ignore[arg-type]


@functools.lru_cache(maxsize=1024)
def _is_container_class(kind: Any) -> bool:
    if issubclass(kind, (list, tuple, dict, set, frozenset, UserDict)):
        return True
    # A dataclass that can be called is an object with a life of its own, such as a module.
    can_be_called = any("__call__" in vars(base) for base in kind.__mro__)
    return not can_be_called and dataclasses.is_dataclass(kind)


def map_leaves(fn: Callable[[Any], Any], value: Any) -> Any:
    """``value`` with every leaf replaced by ``fn(leaf)``; containers keep their type, and those without a changed leaf
    are not copied.
    """
    kind = type(value)
    if kind is tuple or kind is list:
        mapped = [map_leaves(fn, child) for child in value]
        for new, old in zip(mapped, value, strict=True):
            if new is not old:
                return mapped if kind is list else tuple(mapped)
        return value
    if not is_container(value):
        return fn(value)
    pairs = children(value)
    parts = {key: map_leaves(fn, child) for key, child in pairs}
    return value if all(parts[key] is child for key, child in pairs) else rebuild(value, parts)


def map_leaves_with_path(fn: Callable[[Path, Any], Any], value: Any, path: Path = ()) -> Any:
    """Like :func:`map_leaves`; ``fn`` also gets the keys, indices and field names that lead to the leaf."""
    if not is_container(value):
        return fn(path, value)
    pairs = children(value)
    mapped = {key: map_leaves_with_path(fn, child, (*path, key)) for key, child in pairs}
    if all(mapped[key] is child for key, child in pairs):
        return value
    return rebuild(value, mapped)


def children(value: Any) -> list[tuple[Any, Any]]:
    """The (key, child) pairs of one container, in order; the members of a set are keyed by their position."""
    if isinstance(value, (dict, UserDict)):
        return list(value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(enumerate(value))
    return [
        (field.name, getattr(value, field.name)) for field in dataclasses.fields(value) if hasattr(value, field.name)
    ]


def rebuild(value: Any, mapped: dict[Any, Any]) -> Any:
    """A container of the type of ``value`` that holds ``mapped`` (keys as from :func:`children`)."""
    kind = type(value)
    if kind is dict:
        return mapped
    if isinstance(value, (dict, UserDict)):
        # Copying keeps what a subclass carries beside its items (a default factory, Hugging Face's attributes).
        result = copy.copy(value)
        for key, child in mapped.items():
            result[key] = child
        return result
    if isinstance(value, tuple):
        if hasattr(value, "_fields"):
            return kind(*mapped.values())
        if kind.__module__ == "torch.return_types":
            return kind(tuple(mapped.values()))
        if kind.__module__ == "torch" and not all(isinstance(child, int) for child in mapped.values()):
            return tuple(mapped.values())  # a torch.Size holds nothing but numbers
        return kind(mapped.values())
    if isinstance(value, (list, set, frozenset)):
        return kind(mapped.values())
    result = copy.copy(value)
    for name, child in mapped.items():
        object.__setattr__(result, name, child)  # frozen dataclasses refuse setattr
    return result


def leaves(value: Any) -> Iterator[Any]:
    """The leaves of ``value``, in order."""
    if not is_container(value):
        yield value
        return
    for _, child in children(value):
        yield from leaves(child)


def zip_leaves(fn: Callable[[list[Any]], Any], values: list[Any]) -> Any:
    """One tree from several of the same structure: each leaf is ``fn`` of the leaves at its place.

    Where the trees differ in structure the whole sub-trees are handed to ``fn``, as leaves.
    """
    first = values[0]
    if not is_container(first) or len(set(map(type, values))) > 1:
        return fn(values)
    pairs = [children(value) for value in values]
    keys = [key for key, _ in pairs[0]]
    if any([key for key, _ in other] != keys for other in pairs[1:]):
        return fn(values)
    columns = [dict(other) for other in pairs]
    return rebuild(first, {key: zip_leaves(fn, [column[key] for column in columns]) for key in keys})
