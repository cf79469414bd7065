"""Placed modules that code of the script looks into: hooks, and forwards that were replaced for a while.

[Note: doors] A placed module runs at its home alone, and so would a hook that stores what it sees, or a recorder that
stands in the place of a module's ``forward`` (transformers collects hidden states and attentions so). What they keep
would be there on one stage only, as an ordinary tensor that nobody can tell from one that every stage has. So while
there is such code on a module, its call goes on *on every stage* as far as that code: hooks of the module itself see
the StageTensors of its arguments and outputs, and a *door* in the place of its forward leads to the home. Where the
code sits on a module deeper inside, every module on the way to it is opened: its forward is glue, and its children are
placed modules of the same home.

All that is computed in an opened module runs at the home, in the order in which the module itself would have run it,
so that values and random numbers are what they are without a door, and nothing more travels.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from modelparallel.errors import UnsupportedError
from modelparallel.pipeline.arguments import Arguments
from modelparallel.pipeline.kept_values import watched_hooks
from modelparallel.torch_compat import (
    BACKWARD_HOOKS,
    FORWARD_HOOKS,
    forward_hooks_for_all,
    forward_hooks_of,
    replaced_attributes,
)

if TYPE_CHECKING:
    from modelparallel.pipeline.calls import PlacedModule
    from modelparallel.pipeline.engine import PipelineEngine
    from modelparallel.pipeline.program import Program

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
            if part is not self._module or not leads_to_door(forward, part):
                return True
        return False

    def has_replaced_forward(self) -> bool:
        """Whether something stands in the place of the module's own forward now."""
        forward = vars(self._module).get("forward")
        return forward is not None and self._is_replaced(forward, self._module)

    def _is_replaced(self, forward: Any, part: nn.Module) -> bool:
        if isinstance(forward, Door) or forward is self._placed_with.get(id(part)):
            return False
        # What recorders leave behind when they put the forward back.
        return getattr(forward, "__func__", None) is not type(part).forward


def _has_foreign(hooks: Any) -> bool:
    return any(_is_foreign(hook) for hook in hooks.values()) if hooks else False


def _is_foreign(hook: Any) -> bool:
    return not _origin(hook).startswith(_OWN_MACHINERY)


def _origin(hook: Any) -> str:
    """The module of Python that a hook comes from, with a dot at the end."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    function = getattr(hook, "__func__", hook)
    return f"{getattr(function, '__globals__', {}).get('__name__') or type(function).__module__}."


class Door:
    """Stands in the place of a placed module's forward, behind its hooks and behind what others put in that place."""

    def __init__(self, engine: PipelineEngine, entry: PlacedModule) -> None:
        self._engine = engine
        self._entry = entry
        self.leads_to = entry.module.forward
        functools.update_wrapper(self, self.leads_to, assigned=("__doc__", "__name__"), updated=())
        entry.module.__dict__["forward"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        engine, entry = self._engine, self._entry
        program = engine.program
        if engine.is_native or program is None:
            return self.leads_to(*args, **kwargs)
        hooks, entry.has_met_door = entry.backward_hooks, True
        if entry.watch.is_touched_inside():
            if hooks is not None:
                raise UnsupportedError(
                    f"{entry.description} has full backward hooks, and code of the script sits on a module inside it "
                    "(a hook, a forward that was replaced): register the backward hooks on the modules inside"
                )
            return self.leads_to(*args, **kwargs)
        call = self.leads_to if hooks is None else functools.partial(self._with_hooks, hooks)
        return engine.run_placed(program, entry, args, kwargs, call)

    def _with_hooks(self, backward_hooks: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The module's own call, with these hooks alone: those before and after the forward run on every stage."""
        module = self._entry.module
        own = watched_hooks(self._engine, backward_hooks, self._entry.description)
        none: dict[str, Any] = {name: OrderedDict() for name in FORWARD_HOOKS}
        with replaced_attributes(module, {**own, **none, "forward": self.leads_to}):
            return module._call_impl(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _own_forward(memo.get(id(self._entry.module), self._entry.module))

    def __reduce__(self) -> Any:
        return _own_forward, (self._entry.module,)


def _own_forward(module: nn.Module) -> Any:
    """The forward of a copy: that of its class, bound to itself."""
    return types.MethodType(type(module).forward, module)


def leads_to_door(forward: Any, module: nn.Module) -> bool:
    """Whether ``forward``, which stands in the place of the module's, was put there after the door: it calls that."""
    seen: set[int] = set()
    pending = [forward]
    while pending:
        found = pending.pop()
        if isinstance(found, Door):
            return found._entry.module is module
        if id(found) in seen or not callable(found):
            continue
        seen.add(id(found))
        pending.append(getattr(found, "__wrapped__", None))
        pending.append(getattr(found, "__func__", None))
        if isinstance(found, functools.partial):
            pending.extend((found.func, *found.args, *found.keywords.values()))
        for cell in getattr(found, "__closure__", None) or ():
            try:
                pending.append(cell.cell_contents)
            except ValueError:  # not filled yet
                continue
    return False


def run(engine: PipelineEngine, program: Program, entry: PlacedModule, args: Any, kwargs: Any) -> Any:
    """Call a module that code of the script sits on; every stage of the pipeline does, in the same order."""
    with engine.native_region():  # what is done to local tensors on the way is not the script's
        program.fetch(Arguments(program, args, kwargs).inputs, entry.home, entry.input_description)
    if any(_origin(hook).startswith("torch.distributed.") for hooks in entry.watch.own for hook in hooks.values()):
        raise UnsupportedError(
            f"{entry.description} has a hook, or one inside it, and its parameters are gathered by hooks of its own "
            "(sdp_gather: visit), which cannot run in between: set sdp_gather to 'step'"
        )
    program.carries_state = True  # what the code keeps, the next microbatch would find
    if entry.watch.is_touched_inside():
        open_module(engine, entry)
    if entry.unit is not None and entry.needs_frame() and program.inside is None:
        program.frames.enter_unit(entry.unit, program.frames.note_model(entry.model))
    outer, program.inside = program.inside, entry.home
    try:
        if not any(vars(entry.module)[name] for name in BACKWARD_HOOKS):
            return entry.inner(*args, **kwargs)
        with replaced_attributes(entry.module, {name: OrderedDict() for name in BACKWARD_HOOKS}) as hooks:
            entry.backward_hooks = hooks  # they belong to the graph at the home
            entry.has_met_door = False
            output = entry.inner(*args, **kwargs)
        if not entry.has_met_door:
            raise UnsupportedError(
                f"{entry.description} has full backward hooks, and something stands in the place of its forward that "
                "does not lead to the forward as it is inside a step (it was made before the first step, or calls "
                "something else), so that the hooks would not run: take a forward hook to see what comes out"
            )
        return output
    finally:
        program.inside, entry.backward_hooks = outer, None


def open_module(engine: PipelineEngine, entry: PlacedModule) -> None:
    """Give the modules inside a placed module its home, so that those without such code run there as they are."""
    if entry.is_opened:
        return
    entry.is_opened = True
    for name, child in _callable_children(entry.module, entry.name):
        engine.place_inside(child, name, entry)
    for part in entry.module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and id(buffer) in engine.placed:
                engine.place_buffer(part, name)


def _callable_children(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules with weights that the forward of ``module`` may call, elements of its lists included."""
    for name, child in module.named_children():
        if next(child.parameters(), None) is None and next(child.buffers(), None) is None:
            continue
        full_name = f"{prefix}.{name}" if prefix else name
        if type(child).forward is not nn.Module.forward:
            yield full_name, child
        if isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            yield from _callable_children(child, full_name)
