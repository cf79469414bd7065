"""A module with a home, and the watch for code of the script that sits on it: hooks, and forwards that were replaced.

What a stage does at a call of such a module is told in calls.py, and in doors.py where there is such code.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from modelparallel.pipeline.program.randomness import may_draw
from modelparallel.pipeline.side_doors.side_writes import SideWrites
from modelparallel.pipeline.values.holders import is_decoder_cache
from modelparallel.torch_compat import forward_hooks_for_all, forward_hooks_of

# Hooks that belong to how a module computes its weights, not to the script.
_OWN_MACHINERY = ("torch.", "modelparallel.")


class Watch:
    """Tells whether code of the script sits on a module, or on one inside it. Asked at every call."""

    def __init__(self, module: nn.Module, around: Watch | None) -> None:
        """``around``: of the placed module that ``module`` is a part of, and that code sits on by now."""
        self._module = module
        self.own = forward_hooks_of(module)
        self._global = forward_hooks_for_all()
        inside = [part for part in module.modules() if part is not module]
        self._inside = tuple(hooks for part in inside for hooks in forward_hooks_of(part))
        self._all = (*self.own, *self._global, *self._inside)
        self._parts = [(vars(part), part) for part in module.modules()]
        #: Forwards that the modules had of their own when they were placed: those are theirs.
        self._placed_with: dict[int, Any] = (
            {id(part): attributes["forward"] for attributes, part in self._parts if "forward" in attributes}
            if around is None
            else around._placed_with
        )

    def is_touched(self) -> bool:
        """Whether there is such code anywhere; quick where there is none."""
        if any(self._all) and any(map(_has_foreign, self._all)):
            return True
        for attributes, part in self._parts:
            if "forward" in attributes and self._is_replaced(attributes["forward"], part):
                return True
        return False

    def is_touched_inside(self) -> bool:
        """Whether there is such code behind the door: on a module inside, or in the place of the module's forward."""
        if any(map(_has_foreign, (*self._global, *self._inside))):
            return True
        for attributes, part in self._parts:
            forward = attributes.get("forward")
            if forward is None or not self._is_replaced(forward, part):
                continue
            if part is not self._module or not _leads_to_door(forward, part):
                return True
        return False

    def has_replaced_forward(self) -> bool:
        """Whether something stands in the place of the module's own forward now."""
        forward = vars(self._module).get("forward")
        return forward is not None and self._is_replaced(forward, self._module)

    def _is_replaced(self, forward: Any, part: nn.Module) -> bool:
        if isinstance(forward, Doorway) or forward is self._placed_with.get(id(part)):
            return False
        # What recorders leave behind when they put the forward back.
        return getattr(forward, "__func__", None) is not type(part).forward


def _has_foreign(hooks: Any) -> bool:
    return any(_is_foreign(hook) for hook in hooks.values()) if hooks else False


def _is_foreign(hook: Any) -> bool:
    return not hook_origin(hook).startswith(_OWN_MACHINERY)


def hook_origin(hook: Any) -> str:
    """The module of Python that a hook comes from, with a dot at the end."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    function = getattr(hook, "__func__", hook)
    return f"{getattr(function, '__globals__', {}).get('__name__') or type(function).__module__}."


class Doorway:
    """Stands in the place of a placed module's forward, behind its hooks and behind what others put in that place."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.leads_to = module.forward
        module.__dict__["forward"] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _own_forward(memo.get(id(self.module), self.module))

    def __reduce__(self) -> Any:
        return _own_forward, (self.module,)


def _own_forward(module: nn.Module) -> Any:
    """The forward of a copy: that of its class, bound to itself."""
    return types.MethodType(type(module).forward, module)


def _leads_to_door(forward: Any, module: nn.Module) -> bool:
    """Whether ``forward``, which stands in the place of the module's, was put there after the door: it calls that."""
    seen: set[int] = set()
    pending = [forward]
    while pending:
        function = pending.pop()
        if isinstance(function, Doorway):
            return function.module is module
        if id(function) in seen or not callable(function):
            continue
        seen.add(id(function))
        pending.append(getattr(function, "__wrapped__", None))
        pending.append(getattr(function, "__func__", None))
        if isinstance(function, functools.partial):
            pending.extend((function.func, *function.args, *function.keywords.values()))
        for cell in getattr(function, "__closure__", None) or ():
            try:
                pending.append(cell.cell_contents)
            except ValueError:  # not filled yet
                continue
    return False


@dataclass
class PlacedModule:
    """A module with a home; ``inner`` is its own call, hooks included; ``unit`` its number if frames hang on it;
    ``holders`` the stages that have it, more than one if it is called inside modules of other stages.
    """

    module: nn.Module
    name: str
    home: int
    unit: int | None
    holders: tuple[int, ...]
    inner: Callable[..., Any] = lambda *args, **kwargs: None
    parameters: list[nn.Parameter] = field(default_factory=list)
    description: str = ""
    input_description: str = ""
    identity: object = field(default_factory=object)  # its part of a call's signature
    model: int = 0  # which of the wrapped models it belongs to
    around: PlacedModule | None = None  # the opened one that it is a part of
    backward_hooks: dict[str, Any] | None = None  # while its other hooks run on every stage
    has_met_door: bool = False
    is_opened: bool = False  # its children are placed, too, see doors.py
    filled: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)

    watch: Watch = field(init=False)
    side_writes: SideWrites = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = list(self.module.parameters())
        self.watch = Watch(self.module, None if self.around is None else self.around.watch)
        self.description = f"module '{self.name}' ({type(self.module).__name__})"
        self.side_writes = SideWrites(self.module, self.home, self.description)
        self.input_description = f"{self.name} input"
        self._may_draw = may_draw(self.module)
        self.has_buffers = next(self.module.buffers(), None) is not None

    def needs_frame(self) -> bool:
        """Whether a call may draw random numbers: the module, or a hook of it."""
        return self._may_draw or any(forward_hooks_of(self.module))

    def is_first_filling(self, value: Any) -> bool:
        """Whether this is an object in which the layers of a Hugging Face decoder keep keys and values, each for
        itself, and this layer is given it for the first time.

        With ``use_cache=True``, their default, decoders make one in every forward. What a layer stores there may stay
        at its home until it is read again: by the forward for a next token, which gives it to the layer a second time.
        """
        if not is_decoder_cache(value):
            return False
        is_first = value not in self.filled
        self.filled.add(value)
        return is_first
