"""Calls of placed modules: native at the home, an announcement elsewhere."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from modelparallel import trees
from modelparallel.errors import REMEDY_FOR_GUESTS, StepUsageError, UnsupportedError
from modelparallel.pipeline.operations.execution import execute
from modelparallel.pipeline.operations.placed_modules import PlacedModule
from modelparallel.pipeline.operations.running_stage import RunningStage
from modelparallel.pipeline.program.program import Program
from modelparallel.pipeline.program.randomness import RandomFrames
from modelparallel.pipeline.side_doors.kept_values import watched_hooks
from modelparallel.pipeline.side_doors.side_writes import Noted
from modelparallel.pipeline.values.arguments import Arguments, taken_apart
from modelparallel.pipeline.values.holders import held_values, with_values
from modelparallel.torch_compat import BACKWARD_HOOKS, DisableTorchFunctionSubclass, autocast_state, replaced_attributes
from modelparallel.torch_compat.private_parts import version_of

DYNAMIC_MARK = "_modelparallel_dynamic"


def mark_dynamic(module: nn.Module) -> None:
    """Let ``module`` announce its output at every call, since its shapes depend on data. Local, but the same calls on
    every rank. Ours, not the original's.
    """
    module.__dict__[DYNAMIC_MARK] = True


def run(
    engine: RunningStage, program: Program, entry: PlacedModule, args: Any, kwargs: Any, call: Callable[..., Any]
) -> Any:
    """Call a placed module, which is ``call`` at its home; every stage of the pipeline does, in the same order."""
    arguments = Arguments(program, args, kwargs)
    home = entry.home
    objects = arguments.objects() if len(arguments.inputs) != len(arguments.values) else []
    if objects and (held := [value for item in objects for value in held_values(item)]):
        call = _with_held(entry, call, held, objects, home == engine.stage)
        arguments, objects = Arguments(program, (held, args, kwargs), {}), []
    if program.region is not None:
        program.region.note_used(arguments)
    if program.ledger is not None:
        program.ledger.note(entry.description, arguments.values)
    program.fetch(arguments.inputs, home, entry.input_description)
    key: Hashable | None = None
    if DYNAMIC_MARK not in entry.module.__dict__:
        key = (
            entry.identity,
            entry.module.training,
            torch.is_grad_enabled(),
            autocast_state(),
            _trained((*entry.parameters, *engine.copied)),
            arguments.skeleton,
            *arguments.keys(are_floats_plain=False),
        )
    if objects and not program.is_replay:
        filled = [value for value in objects if entry.is_first_filling(value)]
        objects = [value for value in objects if not any(value is other for other in filled)]
        for value in filled:
            program.filled.setdefault(id(value), (value, entry.description, entry.home))
    if engine.is_discovering and home == engine.stage and (hooked := _hooked_parts(entry.module)):
        call = _with_watched_hooks(engine, entry, hooked, call)
    is_framed = entry.unit is not None and program.inside is None and entry.needs_frame()
    model = program.frames.note_model(entry.model) if is_framed else 0
    if home == engine.stage:
        if entry.has_buffers and (program.region is not None or program.is_replay):
            call = _around(program, entry.module, call)
        if is_framed and entry.unit is not None:
            call = _framed(program.frames, entry.unit, model, call)
        if (objects or arguments.holds_containers) and not program.is_replay:
            call = _guarded(entry, objects, arguments.holds_containers, call)
        if program.sightings is not None and entry.module.training and entry.has_buffers:
            call = _watched(program, entry, call)
        call = entry.side_writes.watched(engine, key, call, is_replay=program.is_replay)
    program.tracker.note_work(home, entry.name)
    call = program.counted(call, home, entry.parameters)
    result = execute(program, entry.description, key, arguments, home, call, protect=True)
    if type(result) is Noted:
        if not program.is_replay:
            program.carries_state = True
            entry.side_writes.put(engine, result)
        return result.output
    return result


def _with_held(
    entry: PlacedModule, inner: Callable[..., Any], held: list[Any], objects: list[Any], is_here: bool
) -> Callable[..., Any]:
    """The call of a module that is given objects that hold values of the step: with copies that hold what is here.

    What it stores there is let go with the copy, which is right for a cache that this layer is given once.
    """
    watched = [item for item in objects if is_here and not entry.is_first_filling(item)]

    def call(locals_: Sequence[torch.Tensor], args: Any, kwargs: Any) -> Any:
        local_of = {id(value): local for value, local in zip(held, locals_, strict=True)}
        copies = {id(item): with_values(item, local_of) for item in objects}
        before = [_fingerprint(copies[id(item)]) for item in watched]
        args, kwargs = trees.map_leaves(lambda leaf: copies.get(id(leaf), leaf), (args, kwargs))
        output = inner(*args, **kwargs)
        for item, old in zip(watched, before, strict=True):
            if old is not None and _fingerprint(copies[id(item)]) != old:
                raise _changed(entry, type(item))
        return output

    return call


def _trained(parameters: Sequence[nn.Parameter]) -> tuple[bool, ...]:
    """Which weights are trained: freezing one changes which outputs need gradients."""
    with DisableTorchFunctionSubclass():  # those of another stage are of a class that is slow to ask
        return tuple([parameter.requires_grad for parameter in parameters])


def run_inside(engine: RunningStage, entry: PlacedModule, args: Any, kwargs: Any) -> Any:
    """A placed module is called inside another one, or in a function of autograd, that runs here."""
    if engine.captured is not None:  # inside a transform, which looks after the weights
        with engine.captured.in_unit(entry.unit if entry.needs_frame() else None):
            return entry.inner(*args, **kwargs)
    if engine.stage not in entry.holders:
        raise StepUsageError(
            f"module '{entry.name}' is on pp_rank {entry.home} and is called inside a module (or an autograd.Function) "
            f"that runs on pp_rank {engine.stage}, which has no copy of it: the step that was traced for the partition "
            "made no such call, or none was traced (skip_tracing, a loaded plan). Let the first step make it, or "
            f"{REMEDY_FOR_GUESTS}"
        )
    if len(entry.holders) == 1:
        return entry.inner(*args, **kwargs)
    if entry.watch.is_touched():
        raise UnsupportedError(
            f"{entry.description} has a hook, or a forward that was replaced, and is called inside modules of several "
            "stages: what the hook keeps would be there on one of them alone. Put the hook on the modules that call "
            f"it, or {REMEDY_FOR_GUESTS}"
        )
    if not entry.has_buffers:
        return entry.inner(*args, **kwargs)
    before = buffer_state(entry.module)
    output = entry.inner(*args, **kwargs)
    if buffer_state(entry.module) != before:
        raise UnsupportedError(
            f"{entry.description} is called inside modules of several stages (pp_ranks "
            f"{', '.join(map(str, entry.holders))} have copies of it) and changes its buffers; the copies would "
            f"go apart: {REMEDY_FOR_GUESTS}"
        )
    return output


def buffer_state(module: nn.Module) -> tuple[tuple[int, int], ...]:
    """What changes when buffers are written to or replaced."""
    return tuple((id(buffer), version_of(buffer)) for buffer in module.buffers() if not buffer.is_inference())


def _hooked_parts(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if any(vars(part)[name] for name in BACKWARD_HOOKS)]


def _with_watched_hooks(
    engine: RunningStage, entry: PlacedModule, hooked: Sequence[nn.Module], inner: Callable[..., Any]
) -> Callable[..., Any]:
    """In the first step of a kind: what hooks in the backward keep is an error."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for part in hooked:
                own = {name: vars(part)[name] for name in BACKWARD_HOOKS}
                stack.enter_context(replaced_attributes(part, watched_hooks(engine, own, entry.description)))
            return inner(*args, **kwargs)

    return call


def _watched(program: Program, entry: PlacedModule, inner: Callable[..., Any]) -> Callable[..., Any]:
    """Notice when the module changes its buffers in another order than without turns."""

    def call(*args: Any, **kwargs: Any) -> Any:
        before = buffer_state(entry.module)
        output = inner(*args, **kwargs)
        if buffer_state(entry.module) != before and program.sightings is not None:
            program.sightings.changed_buffers(program.microbatch, entry.name)
        return output

    return call


def _framed(frames: RandomFrames, unit: int, model: int, inner: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        frames.enter_unit(unit, model)
        return inner(*args, **kwargs)

    return call


def _guarded(
    entry: PlacedModule, objects: Sequence[Any], holds_containers: bool, inner: Callable[..., Any]
) -> Callable[..., Any]:
    """Notice when the module changes an argument: the change would stay at its home."""

    def call(*args: Any, **kwargs: Any) -> Any:
        before = [_fingerprint(value) for value in objects]
        leaves, shape = taken_apart([*args, *kwargs.values()]) if holds_containers else ([], [])
        output = inner(*args, **kwargs)
        for value, old in zip(objects, before, strict=True):
            if old is not None and _fingerprint(value) != old:
                raise _changed(entry, type(value))
        if holds_containers:
            leaves_after, shape_after = taken_apart([*args, *kwargs.values()])
            if shape_after != shape or any(one is not other for one, other in zip(leaves_after, leaves, strict=True)):
                changed = next((type(leaf) for leaf in args if trees.is_container(leaf)), dict)
                raise _changed(entry, changed)
        return output

    return call


def _around(program: Program, module: nn.Module, inner: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with program.around_call(module):
            return inner(*args, **kwargs)

    return call


def _changed(entry: PlacedModule, kind: type) -> UnsupportedError:
    return UnsupportedError(
        f"{entry.description} changed its argument of type {kind.__name__}: what it stored there would stay on "
        f"pp_rank {entry.home}. Return it instead, or switch the recording off (Hugging Face models: use_cache=False, "
        "output_attentions=False)"
    )


class _FingerprintPickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return (id(value), version_of(value) if not value.is_inference() else 0)
        if isinstance(value, (nn.Module, type)) or callable(value):
            return id(value)
        return None


def _fingerprint(value: Any) -> bytes | None:
    """The content of an object, for telling whether a module has changed it; None where it cannot be told."""
    file = io.BytesIO()
    try:
        _FingerprintPickler(file).dump(value)
    except (pickle.PicklingError, AttributeError, TypeError, RecursionError):
        return None
    return file.getvalue()
