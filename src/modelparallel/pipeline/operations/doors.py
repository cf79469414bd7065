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
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import nn

from modelparallel.errors import UnsupportedError
from modelparallel.pipeline.operations.placed_modules import Doorway, PlacedModule, hook_origin
from modelparallel.pipeline.operations.running_stage import RunningStage
from modelparallel.pipeline.program.program import Program
from modelparallel.pipeline.side_doors.kept_values import watched_hooks
from modelparallel.pipeline.values.arguments import Arguments
from modelparallel.torch_compat import BACKWARD_HOOKS, FORWARD_HOOKS, replaced_attributes
from modelparallel.torch_compat.private_parts import plain_call


class PlacingStage(RunningStage, Protocol):
    """This stage with what places modules and runs them. See :class:`PipelineEngine` for what is not said here."""

    def run_placed(
        self, program: Program, entry: PlacedModule, args: Any, kwargs: Any, call: Callable[..., Any]
    ) -> Any:
        """Run ``call``, the module's own, at its home."""
        ...

    def place_inside(self, module: nn.Module, name: str, around: PlacedModule) -> None:
        """From now on ``module``, a part of ``around``, runs at its home by itself, too."""
        ...

    def place_buffer(self, owner: nn.Module, name: str) -> None:
        """Note that glue may assign a new value to this placed buffer."""
        ...


class Door(Doorway):
    """The way to the home of a placed module; see the note at the top."""

    def __init__(self, engine: PlacingStage, entry: PlacedModule) -> None:
        super().__init__(entry.module)
        functools.update_wrapper(self, self.leads_to, assigned=("__doc__", "__name__"), updated=())
        self._engine = engine
        self._entry = entry

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
            return plain_call(module, *args, **kwargs)


def run(engine: PlacingStage, program: Program, entry: PlacedModule, args: Any, kwargs: Any) -> Any:
    """Call a module that code of the script sits on; every stage of the pipeline does, in the same order."""
    with engine.natively():  # what is done to local tensors on the way is not the script's
        program.fetch(Arguments(program, args, kwargs).inputs, entry.home, entry.input_description)
    if any(hook_origin(hook).startswith("torch.distributed.") for hooks in entry.watch.own for hook in hooks.values()):
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


def open_module(engine: PlacingStage, entry: PlacedModule) -> None:
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
