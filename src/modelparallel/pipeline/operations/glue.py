"""Glue: operations between the placed modules, run where their data is.

Every stage reaches the operation; each takes the same decisions from the symbolic state alone (where to run it, what to
send), and only the chosen home computes (execution.py).
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from modelparallel import trees
from modelparallel.errors import DivergenceError, StepUsageError, UnsupportedError
from modelparallel.pipeline.operations import inner_gradients
from modelparallel.pipeline.operations.execution import execute
from modelparallel.pipeline.operations.pushes import push
from modelparallel.pipeline.program.program import Program
from modelparallel.pipeline.side_doors.kept_values import watched_hook
from modelparallel.pipeline.values.arguments import Arguments
from modelparallel.pipeline.values.functions import NO_OPERATIONS, FunctionTraits, traits_of
from modelparallel.pipeline.values.stage_tensor import StageTensor, is_dense
from modelparallel.pipeline.values.stage_view import StageView
from modelparallel.pipeline.values.structures import is_value_shaped, operation_key

_INDEXING = ("__getitem__", "__setitem__")


def run(engine: StageView, program: Program, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """One glue operation; every stage of the pipeline calls it for the same operation."""
    traits = traits_of(func)
    if traits.is_special:
        special = _special(program, func, traits.name, args, kwargs)
        if special is not None:
            return special[0]
    elif traits.name in _INDEXING:
        args = (args[0], _with_plain_bounds(args[1]), *args[2:])
    arguments = Arguments(program, args, kwargs)
    inputs = arguments.inputs
    is_drawn_inside = traits.is_random and program.inside is not None  # in the order of the module, at its home
    if not inputs and not is_drawn_inside:
        if traits.is_random:
            program.frames.enter_glue_operation()
        return func(*args, **kwargs)
    if program.region is not None:
        program.region.note_used(arguments)
    if traits.is_read and inputs and all(value.known_value is not None for value in inputs):
        # Known everywhere: no message, so that a read under `if smp.rank() == 0` cannot hang.
        with engine.natively():
            return arguments.call(
                func,
                [
                    value.known_value() if isinstance(value, StageTensor) and value.known_value else value
                    for value in arguments.values
                ],
            )
    written = _written_index(traits, args, kwargs, arguments.given) if kwargs or traits.is_in_place else None
    home = choose_home(program.inside, traits, arguments.values, inputs, written)
    if written is not None and not isinstance(arguments.values[written], StageTensor):
        arguments.promote(written, program.written.add(program, arguments.values[written], home))
        inputs = arguments.inputs
    program.fetch(inputs, home, traits.input_description)
    if traits.is_random and not is_drawn_inside:
        program.frames.enter_glue_operation()
    is_known = (
        written is None
        and bool(inputs)
        and inputs[0].known_value is not None
        and not traits.is_random
        and all(_is_known_everywhere(value) for value in inputs)
    )
    if program.ledger is not None and not str(traits.identity[1]).startswith("modelparallel."):  # those name groups
        program.ledger.note(traits.description, arguments.values, written=written, may_be_alone=is_known)
    key = None if is_value_shaped(traits, arguments) else operation_key(traits, arguments)
    if key is not None and written is not None:
        key = (key, _written_with(arguments.values, written))
    program.tracker.note_work(home, "")
    compute = program.counted(func, home)
    result = execute(program, traits.description, key, arguments, home, compute, written=written, is_known=is_known)
    if written is not None:
        # x += y must leave the user's own object (a buffer, a plain tensor) in x
        return arguments.given[written] if result is arguments.values[written] else result
    if is_known:
        _derive_known_values(engine, arguments, result, func)
        if program.ledger is not None:
            program.ledger.note_known(traits.description, arguments.values, result)
    else:
        _push_if_reduced(engine, program, inputs, result)
    return result


def _with_plain_bounds(index: Any) -> Any:
    """``x[first:last]`` with values of the step as bounds: every stage reads them, since they decide the shape."""
    if isinstance(index, tuple):
        return tuple([_with_plain_bounds(part) for part in index])
    if isinstance(index, slice):
        bounds = (index.start, index.stop, index.step)
        if any(isinstance(bound, StageTensor) for bound in bounds):
            return slice(*[bound.item() if isinstance(bound, StageTensor) else bound for bound in bounds])
    return index


def _is_known_everywhere(value: StageTensor) -> bool:
    return value.known_value is not None and is_dense(value.spec.shape, value.spec.stride)


def choose_home(
    inside: int | None,
    traits: FunctionTraits,
    values: Sequence[Any],
    inputs: Sequence[StageTensor],
    written: int | None,
) -> int:
    """Where the fewest bytes must be moved to; ties go to the later stage. Parameters do not move, nor does what is
    written to. ``inside``: the home of the opened module that the operation belongs to; it runs there.
    """
    if inside is not None and all(tensor.home == inside or not tensor.is_pinned_home for tensor in inputs):
        return inside
    home = inputs[0].home
    for tensor in inputs:
        if tensor.home != home:
            break
    else:
        return home
    if written is not None and isinstance(values[written], StageTensor):
        target: StageTensor = values[written]
        return target.home
    if traits.stays_with_base and isinstance(values[0], StageTensor):
        return values[0].home  # view_as, expand_as: a view stays with its base
    pinned = {tensor.home for tensor in inputs if tensor.is_pinned_home}
    candidates = pinned or {tensor.home for tensor in inputs}
    if len(candidates) == 1:
        return candidates.pop()

    def moved_bytes(stage: int) -> int:
        return sum(tensor.spec.num_bytes for tensor in inputs if stage not in tensor.places)

    return min(candidates, key=lambda stage: (moved_bytes(stage), -stage))


def _written_with(values: Sequence[Any], written: int) -> tuple[int, ...]:
    """The arguments that are written to when the one at ``written`` is, since they share its memory."""
    target = values[written]
    return tuple(
        [
            index
            for index, value in enumerate(values)
            if isinstance(value, StageTensor)
            and (value is target or (value.home == target.home and value.aliases is target.aliases))
        ]
    )


def _written_index(traits: FunctionTraits, args: Any, kwargs: Any, leaves: Sequence[Any]) -> int | None:
    target = None
    if kwargs.get("out") is not None:
        target = kwargs["out"]
        if not isinstance(target, torch.Tensor):
            raise UnsupportedError(
                f"{traits.name}(out=several tensors) is not supported on values of a pipelined step: use the returned "
                "ones"
            )
    elif traits.is_in_place:
        target = args[0]
    elif kwargs.get("inplace") is True:
        target = args[0] if args else kwargs.get("input")
    if not isinstance(target, torch.Tensor):
        return None
    return next(index for index, leaf in enumerate(leaves) if leaf is target)


def _special(program: Program, func: Any, name: str, args: Any, kwargs: Any) -> tuple[Any] | None:
    """Functions that are not operations; returns (result,) if ``func`` is one of them."""
    kind = getattr(func, "__name__", "")
    if kind == "__set__":
        if name == "requires_grad":
            return (args[0].requires_grad_(args[1]),)
        raise UnsupportedError(
            f"setting .{name} of a value that is spread over the pipeline stages is not supported: use an operation"
        )
    if kind == "__get__":
        if name == "requires_grad":
            return (program.returned(args[0]).spec.requires_grad,)
        if name == "grad_fn":
            return (None,)
        if name == "grad":
            raise StepUsageError(str(NO_OPERATIONS["grad"]))
        if name == "_version":
            return (0,)
    if func is torch.autograd.grad:
        return (inner_gradients.run(program, args, kwargs),)
    reason = NO_OPERATIONS.get(name)
    if reason is not None and not (name == "grad" and kind != "grad"):
        raise StepUsageError(f"{name} on a value of a pipelined step: {reason}")
    if name == "requires_grad_":
        return (_requires_grad_(program, args[0], *args[1:], **kwargs),)
    if name == "retain_grad":
        return (None,)
    if name == "register_hook":
        return (_register_hook(program, program.returned(args[0]), args[1]),)
    return None


def _requires_grad_(program: Program, tensor: Any, requires_grad: bool = True) -> Any:
    known = program.returned(tensor)
    if isinstance(known, StageTensor) and known.is_pinned_home and known.spec.requires_grad is not requires_grad:
        raise StepUsageError(
            f"requires_grad_({requires_grad}) of a parameter inside the step: the stages have agreed on what is "
            "trained when the step began. Freeze and unfreeze parameters between steps, on all ranks"
        )
    if isinstance(tensor, StageTensor) and not tensor.is_pinned_home:
        if not requires_grad:
            return _stop_requiring(tensor)
        tensor.is_leaf_of_user = tensor.is_leaf_of_user or not tensor.spec.requires_grad
        tensor.mark_requires_grad()
        if tensor.local is not None and not tensor.local.requires_grad:
            tensor.local.requires_grad_()
    return tensor


def _stop_requiring(tensor: StageTensor) -> StageTensor:
    if not tensor.spec.requires_grad:
        return tensor
    if not tensor.is_leaf_of_user:  # what torch says
        raise RuntimeError(
            "you can only change requires_grad flags of leaf variables. If you want to use a computed variable in a "
            "subgraph that doesn't require differentiation use var_no_grad = var.detach()."
        )
    tensor.spec = replace(tensor.spec, requires_grad=False)
    tensor.is_leaf_of_user = False
    if tensor.local is not None:
        tensor.local = tensor.local.detach()
    return tensor


def _register_hook(program: Program, tensor: StageTensor, hook: Callable[[torch.Tensor], Any]) -> Any:
    if tensor.home == program.stage:
        # On a copy of a leaf: a leaf's own hook would see the gradient piece by piece.
        local = program.local(tensor)
        if local.is_leaf and not tensor.is_pinned_home:
            local = tensor.local = local.view_as(local)
        return local.register_hook(watched_hook(program.engine, hook, "a value of the step"))
    return torch.utils.hooks.RemovableHandle(OrderedDict())


def _derive_known_values(engine: StageView, arguments: Arguments, result: Any, compute: Callable[..., Any]) -> None:
    """The results of an operation on values that every stage may read can be read by every stage, too: computed when
    they are.
    """
    kept: list[Any] = []
    for index, leaf in enumerate(trees.leaves(result)):
        if not isinstance(leaf, StageTensor) or leaf.known_value is not None:
            continue
        if leaf.spec.num_bytes > engine.push_limit_bytes:
            continue
        leaf.known_value = (
            _own(leaf) if leaf.home == engine.stage else _computed(engine, arguments, compute, kept, index)
        )


def _own(result: StageTensor) -> Callable[[], torch.Tensor]:
    weak_result = weakref.ref(result)  # a value that refers to itself, or to its inputs, would be freed late

    def read() -> torch.Tensor:
        alive = weak_result()
        if alive is None or alive.local is None:
            raise DivergenceError("a value known on every stage was read after it had gone")
        return alive.local.detach()

    return read


def _computed(
    engine: StageView, arguments: Arguments, compute: Callable[..., Any], kept: list[Any], index: int
) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        if not kept:
            with torch.no_grad(), engine.natively():
                known = [
                    value.known_value() if isinstance(value, StageTensor) and value.known_value else value
                    for value in arguments.values
                ]
                kept.extend(trees.leaves(arguments.call(compute, known)))
        known_value: torch.Tensor = kept[index]
        return known_value.detach()

    return read


def _push_if_reduced(engine: StageView, program: Program, inputs: Sequence[StageTensor], result: Any) -> None:
    """A single number made of many is a loss or a metric, which scripts like to print on one rank alone: let every
    stage know it.
    """
    if not isinstance(result, StageTensor) or result.known_value is not None or result.is_pinned_home:
        return
    if result.spec.num_elements != 1 or result.spec.num_bytes > engine.push_limit_bytes:
        return
    is_view = any(result.aliases is value.aliases for value in inputs)
    if not is_view and any(value.spec.num_elements > 1 for value in inputs):
        push(program, result)
