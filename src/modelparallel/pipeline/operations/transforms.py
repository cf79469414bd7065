"""Transforms of torch.func (vmap, grad, jvp, vjp, ...) and functional_call between the placed modules: one operation.

[Note: transforms] Inside a transform torch works on wrappers, of which the engine sees nothing. So the outermost call
is one operation, at the home of its data or of the weights that it reads. What the function reads beside its arguments
(see captured_values.py) goes in with them: at the home a mode puts the values in the place of the StageTensors, and of
weights that came from other stages. Meeting one that was not found is an error, since what is here of it are no
numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modelparallel import trees
from modelparallel.pipeline.operations.captured_values import Captured, Reached
from modelparallel.pipeline.operations.execution import execute
from modelparallel.pipeline.operations.glue import choose_home
from modelparallel.pipeline.operations.running_stage import RunningStage
from modelparallel.pipeline.program.program import Program
from modelparallel.pipeline.values.arguments import Arguments
from modelparallel.pipeline.values.functions import traits_of
from modelparallel.torch_compat import autocast_state


@dataclass
class Drawing:
    """The result of a transform in which random numbers were drawn, with what the frames have counted."""

    result: Any
    counts: tuple[tuple[int, int], ...]


def call(
    engine: RunningStage, what: str, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A call of a transform, as torch's own code makes it."""
    program = engine.program
    if engine.captured is not None and engine.is_native:
        args, kwargs = engine.captured.replaced(args), engine.captured.replaced(kwargs)
        return original(*args, **kwargs)
    if program is None or engine.is_native:
        return original(*args, **kwargs)
    if what.endswith("vjp"):
        return _vjp(engine, what, original, args, kwargs)
    reached = Reached(program)
    if what.endswith("functional_call"):
        reached.leave_out(_given_in_another_way(*args[:2], ties=kwargs.get("tie_weights", True)))
    return _run(engine, program, what, reached, original, args, kwargs)


def _given_in_another_way(module: nn.Module, given: Any, *, ties: bool) -> list[torch.Tensor]:
    """The weights and buffers of ``module`` in whose place functional_call puts others."""
    replaced, kept = [], set()
    for source in (module.named_parameters, module.named_buffers):
        for name, tensor in source(remove_duplicate=False):
            if name in given:
                replaced.append(tensor)
            else:
                kept.add(id(tensor))
    return [tensor for tensor in replaced if ties or id(tensor) not in kept]


def _vjp(
    engine: RunningStage, what: str, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The function that ``vjp`` gives cannot leave the home; so it is another operation, with the forward in it."""
    has_aux = kwargs.get("has_aux", False)

    def forward(*inner: Any) -> Any:
        results = original(*inner, **kwargs)
        return (results[0], results[2]) if has_aux else results[0]

    def backward(inner: tuple[Any, ...], cotangents: tuple[Any, ...], more: dict[str, Any]) -> Any:
        return original(*inner, **kwargs)[1](*cotangents, **more)

    def vjp_fn(*cotangents: Any, **more: Any) -> Any:
        return call(engine, f"{what} (the function it returns)", backward, (args, cotangents, more), {})

    results = call(engine, f"{what} (its forward)", forward, args, {})
    return (results[0], vjp_fn, results[1]) if has_aux else (results, vjp_fn)


def _run(
    engine: RunningStage,
    program: Program,
    what: str,
    reached: Reached,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    for value in (*args, *kwargs.values()):
        for leaf in trees.leaves(value):
            if not isinstance(leaf, torch.Tensor):
                reached.visit(leaf)
    captured = tuple(reached.tensors)
    mode = Captured(program, what)
    with engine.natively():
        arguments = Arguments(program, (captured, args, kwargs), {})
    if not arguments.inputs:
        return original(*args, **kwargs)
    if program.region is not None:
        program.region.note_used(arguments)

    def compute(locals_: Sequence[torch.Tensor], inner: tuple[Any, ...], more: dict[str, Any]) -> Any:
        mode.hold(captured, locals_)
        before = program.frames.counts()
        outer, engine.captured = engine.captured, mode
        try:
            with mode:
                result = original(*inner, **more)
        finally:
            engine.captured = outer
        drawn = program.frames.counted_since(before)
        return Drawing(result, drawn) if drawn else result

    with engine.natively():
        home = choose_home(program.inside, traits_of(original), arguments.values, arguments.inputs, None)
        program.fetch(arguments.inputs, home, f"input of {what}")
        key: Hashable | None = None
        if reached.key is not None:
            modes = (torch.is_grad_enabled(), autocast_state())
            key = (what, reached.key, modes, arguments.skeleton, *arguments.keys(are_floats_plain=False))
        program.tracker.note_work(home, "")
        weights = [tensor for tensor in captured if isinstance(tensor, nn.Parameter)]
        counted = program.counted(compute, home, weights)
        output = execute(program, what, key, arguments, home, counted, protect=True)
    if not isinstance(output, Drawing):
        return output
    if home != engine.stage:
        program.frames.skip(output.counts)
    return output.result
