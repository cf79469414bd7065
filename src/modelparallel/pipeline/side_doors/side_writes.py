"""What a module leaves behind at its home beside its output: attributes, and what it puts into lists and dictionaries.

[Note: side writes] A module runs at its home alone. Where it writes ``self.aux_loss = ...``, appends to a list or
counts calls, the other stages would go on with what was there before, and glue that reads it would go wrong in silence.
So what a call has written is part of its output: it is announced and checked like the rest, and every stage puts it in
its place, tensors as StageTensors (no more travels than is used). The home is watched at every call: assignments of
attributes by ``nn.Module.__setattr__``, and containers that the modules reach (attributes, closures and globals of
their forwards) by comparing them with what they held before.

Code at the home that meets a StageTensor in such a place works with its local tensor (kept_values.py).
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import nn

from modelparallel import trees
from modelparallel.errors import StepUsageError
from modelparallel.pipeline.side_doors.kept_state import (
    MISSING,
    OF_EVERY_MODULE,
    Place,
    cell_of,
    containers_of,
    content_of,
    forward_of,
    ordinary_tensor,
    refill,
)
from modelparallel.pipeline.values.stage_tensor import StageTensor
from modelparallel.pipeline.values.stage_view import StageView
from modelparallel.torch_compat.private_parts import version_of

_NUMBERS = (int, float, complex)
_SIMPLE = (*_NUMBERS, str, bytes, type(None), type(...), slice, torch.dtype, torch.device, torch.Size, range)


class Noted(NamedTuple):
    """An output together with what the call has written elsewhere."""

    output: Any
    places: tuple[Place, ...]
    values: tuple[Any, ...]


class _Kept:
    """Stands for what a container held before the call, by position."""

    def __init__(self, index: int) -> None:
        self.index = index


class Elsewhere:
    """Stands on the other stages for something that a module keeps at its home and that cannot travel."""

    def __init__(self, text: str) -> None:
        self.__dict__["text"] = text

    def __repr__(self) -> str:
        return f"<{self.text}>"

    def __reduce__(self) -> Any:
        return Elsewhere, (self.text,)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise StepUsageError(
            f"{self.text}, and it cannot travel to the other pipeline stages: keep tensors, numbers, strings and "
            "containers of them there, or return them from the module"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._refuse()

    __bool__ = __len__ = __iter__ = __getitem__ = __setitem__ = __call__ = __contains__ = __float__ = __int__ = _refuse
    __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __rsub__ = __truediv__ = __lt__ = __gt__ = _refuse


class SideWrites:
    """What the calls of one placed module write, and where. Asked and kept at its home."""

    def __init__(self, module: nn.Module, home: int, description: str) -> None:
        self._module = module
        self._home = home
        self._description = description
        self._containers: list[tuple[Place, Any]] | None = None
        self._tensors: list[tuple[nn.Module, str]] = []
        self._always: dict[Hashable, dict[Place, None]] = {}  # by signature of the call
        self._before: dict[Place, Any] = {}

    def watched(self, engine: StageView, key: Hashable, call: Callable[..., Any], *, is_replay: bool) -> Any:
        """``call``, with what it has written in its output. In a replay all is put back as it was."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if self._containers is None or engine.is_discovering:
                self._look_around(engine)
            before = [content_of(container) for _, container in self._containers or ()]
            tensors = [(module, name, ordinary_tensor(module, name)) for module, name in self._tensors]
            versions = [-1 if tensor is None else version_of(tensor) for _, _, tensor in tensors]
            outer, engine.assigned = engine.assigned, {}
            try:
                output = call(*args, **kwargs)
            finally:
                assigned, engine.assigned = engine.assigned, outer
            for (module, name, tensor), version in zip(tensors, versions, strict=True):
                if tensor is not None and version_of(tensor) != version:
                    assigned.setdefault((id(module), name), (module, name, MISSING))
            if not assigned and not before and not self._always:
                return output
            noted = self._noted(engine, key, *self._written(engine, assigned, before))
            if is_replay:
                self._put_back(assigned, before)
            return Noted(output, tuple(noted), tuple(noted.values())) if noted else output

        return run

    def _look_around(self, engine: StageView) -> None:
        self._containers, self._tensors = [], []
        seen: set[int] = set()
        for part in self._module.modules():
            where = engine.module_places().get(id(part))
            if where is None:
                continue
            self._containers.extend(containers_of(part, where, seen))
            self._tensors.extend((part, name) for name in vars(part) if ordinary_tensor(part, name) is not None)

    def _written(
        self, engine: StageView, assigned: dict[Any, tuple[nn.Module, str, Any]], before: list[Any]
    ) -> tuple[dict[Place, Any], set[Place]]:
        """(place -> what was written there, ready to travel; the places of numbers that surely are written once)."""
        written: dict[Place, Any] = {}
        constant: set[Place] = set()
        for module, name, old in assigned.values():
            where = engine.module_places().get(id(module))
            value = vars(module).get(name, MISSING)
            if where is None or value is MISSING or value is old or name in OF_EVERY_MODULE:
                continue
            if isinstance(value, _SIMPLE) and type(old) is type(value) and old == value:
                continue
            place = (*where, "assigned", name)
            written[place] = _portable(value, {}, self._describe(place))
            if type(value) is int and not isinstance(old, _NUMBERS):
                constant.add(place)  # a size, most likely: not worth an announcement at every call
        self._before = {}
        for (place, container), old in zip(self._containers or (), before, strict=True):
            change = _change(container, old, self._describe(place))
            if change is not None:
                written[place] = change
                self._before[place] = old
        return written, constant

    def _noted(
        self, engine: StageView, key: Hashable, written: dict[Place, Any], constant: set[Place]
    ) -> dict[Place, Any]:
        """What a call with this signature notes: always the same places, since the other stages count on it."""
        always = self._always.get(key, {})
        noted = {place: written.pop(place, MISSING) for place in always}
        for place, value in noted.items():
            if value is MISSING:
                noted[place] = self._unchanged(engine, place)
        noted.update(written)
        kept = {place: None for place in noted if place in always or place not in constant}
        if kept and key is not None:
            self._always[key] = kept
        return noted

    def _unchanged(self, engine: StageView, place: Place) -> Any:
        target = resolved(engine, place)
        if place[-2] != "assigned":
            return ("update", {}) if isinstance(target, dict) else ("extend", [])
        return _portable(vars(target).get(place[-1]), {}, self._describe(place))

    def _put_back(self, assigned: dict[Any, tuple[nn.Module, str, Any]], before: list[Any]) -> None:
        for module, name, old in assigned.values():
            if name in OF_EVERY_MODULE or name not in vars(module):
                continue
            if old is MISSING:
                del module.__dict__[name]
            else:
                module.__dict__[name] = old
        for (_, container), old in zip(self._containers or (), before, strict=True):
            refill(container, old)

    def _describe(self, place: Place) -> str:
        return f"{self._description} has kept {described(place)} on pp_rank {self._home}"

    def put(self, engine: StageView, noted: Noted) -> None:
        """Write what the call has written at its home; every stage does."""
        is_home = self._home == engine.stage
        for place, value in zip(noted.places, noted.values, strict=True):
            target = resolved(engine, place)
            if target is None:
                continue
            if place[-2] == "assigned":
                if not (is_home and isinstance(value, Elsewhere)):
                    target.__dict__[place[-1]] = value
                continue
            before = self._before.get(place) if is_home else None
            _put_into(target, value, content_of(target) if before is None else before, is_home=is_home)


def described(place: Place) -> str:
    """A place in words."""
    names = [str(name) for kind, name in zip(place[2::2], place[3::2], strict=True) if kind != "forward"]
    module = f"of module '{place[1]}'" if place[1] else "of the model"
    return f"'{'.'.join(names)}' {module}"


def resolved(engine: StageView, place: Place) -> Any:
    """What is at a place on this stage: the container, or the module of an attribute; None if it is not there."""
    target: Any = engine.module_at(place[0], place[1])
    for kind, name in zip(place[2::2], place[3::2], strict=True):
        if kind == "assigned":
            return target
        try:
            if kind == "attribute":
                target = vars(target)[name]
            elif kind == "item":
                target = target[name]
            elif kind == "fields":
                target = vars(target)
            elif kind == "forward":
                target = forward_of(target)
            elif kind == "cell":
                target = cell_of(target.__closure__[name])
            else:
                target = target.__globals__[name]
        except (KeyError, IndexError, TypeError, AttributeError):
            return None
    return target


def _same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and isinstance(one, _SIMPLE) and one == other)


def _change(container: Any, before: Any, what: str) -> tuple[str, Any] | None:
    """What has become of a container: ("extend", items), ("update", entries) or ("replace", content)."""
    if isinstance(container, dict):
        if len(before) <= len(container) and all(key in container for key in before):
            changed = {key: value for key, value in container.items() if not _same(before.get(key, MISSING), value)}
            changed = {key: value for key, value in changed.items() if _is_portable_key(key)}
            return ("update", _portable(changed, {}, what)) if changed else None
        kept = {id(value): index for index, value in enumerate(before.values())}
        content = {key: value for key, value in container.items() if _is_portable_key(key)}
        return "replace", _portable(content, kept, what)
    if isinstance(container, set):
        return None if container == before else ("replace", _portable(set(container), {}, what))
    items = list(container)
    num_new = _num_appended(items, before, getattr(container, "maxlen", None))
    if num_new is not None:
        return ("extend", _portable(items[len(items) - num_new :], {}, what)) if num_new else None
    return "replace", _portable(items, {id(value): index for index, value in enumerate(before)}, what)


def _num_appended(items: list[Any], before: list[Any], most: int | None) -> int | None:
    """How many items were appended, if that is all that happened (a full deque drops its first ones)."""
    first = len(items) - len(before)
    for num_new in range(max(0, first), len(items) + 1 if len(items) == most else first + 1):
        rest = items[: len(items) - num_new]
        dropped = len(before) - len(rest)
        if all(_same(one, other) for one, other in zip(rest, before[dropped:], strict=True)):
            return num_new
    return None


def _is_portable_key(key: Any) -> bool:
    return isinstance(key, _SIMPLE) or (isinstance(key, tuple) and all(map(_is_portable_key, key)))


def _portable(value: Any, kept: dict[int, int], what: str) -> Any:
    """``value`` as it can be announced: what was there before by position, what cannot travel by a word about it."""

    def leaf(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            if id(item) in kept:
                return _Kept(kept[id(item)])
            if not isinstance(item, StageTensor):
                return item
            return Elsewhere(what) if item.local is None else item.local
        if isinstance(item, _SIMPLE) or item is MISSING:
            return None if item is MISSING else item
        if id(item) in kept:
            return _Kept(kept[id(item)])
        return Elsewhere(what)

    if not _can_be_named(value):
        return Elsewhere(what)
    return trees.map_leaves(leaf, value)


def _can_be_named(value: Any) -> bool:
    """Whether the classes of all containers in ``value`` can be found in another process."""
    if not trees.is_container(value):
        return True
    kind = type(value)
    if getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is not kind:
        return False
    if isinstance(value, defaultdict) and not isinstance(value.default_factory, (type, type(None))):
        return False
    return all(_can_be_named(child) for _, child in trees.children(value))


def _put_into(container: Any, change: tuple[str, Any], before: Any, *, is_home: bool) -> None:
    """Do to a container what was done at the home; there, put the values of the step in the place of their tensors."""
    kind, content = change
    if kind == "replace":
        held = list(before.values()) if isinstance(before, dict) else list(before)
        content = trees.map_leaves(lambda leaf: held[leaf.index] if isinstance(leaf, _Kept) else leaf, content)
    if isinstance(container, dict):
        if is_home:
            content = {key: value for key, value in content.items() if not _holds_elsewhere(value)}
        elif kind == "replace":
            container.clear()
        container.update(content)
    elif isinstance(container, set):
        if not is_home:
            refill(container, content)
    elif is_home:
        items = list(container)
        start = len(items) - len(content)
        items[start:] = [own if _holds_elsewhere(new) else new for own, new in zip(items[start:], content, strict=True)]
        refill(container, items)
    elif kind == "extend":
        container.extend(content)
    else:
        refill(container, content)


def _holds_elsewhere(value: Any) -> bool:
    return any(isinstance(leaf, Elsewhere) for leaf in trees.leaves(value))
