"""Glue: operations between the placed modules, run where their data is.

Every stage reaches the operation; each takes the same decisions from the symbolic state alone (where to run it, what to
send, which structure the output has), and only the chosen home computes.
"""

from __future__ import annotations

import pickle
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from modelparallel import trees
from modelparallel.errors import DivergenceError, StepUsageError, UnsupportedError
from modelparallel.pipeline.arguments import Arguments
from modelparallel.pipeline.functions import NO_OPERATIONS, FunctionTraits, traits_of
from modelparallel.pipeline.kept_values import watched_hook
from modelparallel.pipeline.pushes import push
from modelparallel.pipeline.stage_tensor import StageTensor, is_dense
from modelparallel.pipeline.structures import (
    Structure,
    as_announced,
    check_same,
    decode,
    encode,
    is_value_shaped,
    operation_key,
)
from modelparallel.pipeline.writing import writable

if TYPE_CHECKING:
    from modelparallel.pipeline.engine import PipelineEngine
    from modelparallel.pipeline.program import Program


_INDEXING = ("__getitem__", "__setitem__")


def run(engine: PipelineEngine, program: Program, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
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
    if traits.is_read and inputs and all(value.replica is not None for value in inputs):
        # Known everywhere: no message, so that a read under `if smp.rank() == 0` cannot hang.
        with engine.native_region():
            return arguments.call(
                func,
                [
                    value.replica() if isinstance(value, StageTensor) and value.replica else value
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
        and inputs[0].replica is not None
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
        _derive_replicas(engine, arguments, result, func)
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


def execute(
    program: Program,
    what: str,
    key: Hashable | None,
    arguments: Arguments,
    home: int,
    compute: Callable[..., Any],
    *,
    written: int | None = None,
    protect: bool = False,
    is_known: bool = False,
) -> Any:
    """Run ``compute`` on ``home`` and give every stage its output, with StageTensors for its tensors.

    ``key`` is the signature (None: the output is announced every time). ``written``: the leaf of the arguments that
    the operation writes to. ``protect``: leaves that need a gradient go in as copies if the callee writes to them, or
    may. ``is_known``: every stage may read all values, and finds out the structure by itself; so such an operation, and
    the reading of its result, may stand behind ``if smp.rank() == 0``.
    """
    engine = program.engine
    program.begin_operation()
    if key is not None and (without_gaps := _moved_without_gaps(arguments.inputs, home)):
        key = (key, without_gaps)
    known = None if key is None else program.structure_of(key, is_known=is_known)
    structure = known
    new_locals: list[torch.Tensor] | None = None
    if home == engine.stage:
        found, new_locals = _compute_here(program, what, arguments, compute, written, protect, known)
        if known is None:
            structure = found
    if known is None:
        if not is_known:
            structure = _announce(program, home, structure, what, is_always=key is None)
        elif structure is None:
            structure = _structure_of_known(program, arguments, compute, what)
        if structure is None:
            raise DivergenceError(f"the home of {what} has not computed it")
        if key is not None and structure.is_cacheable:
            program.keep_structure(key, structure, is_known=is_known)
    if structure is None:
        raise DivergenceError(f"no structure for {what}")
    tensors = arguments.tensors
    if structure.mutated:
        _note_all_written(program, tensors, structure, home, what)
    new = []
    for index, spec in enumerate(structure.specs):
        alias = structure.aliases[index]
        group = None
        if alias is not None:
            source = program.resolve(tensors[alias])
            if isinstance(source, StageTensor) and source.home == home:
                group = source.aliases
        new.append(program.new(spec, home, None if new_locals is None else new_locals[index], group))
    if structure.payload is None:
        return new[0]
    return decode(structure, tensors, arguments.opaque(), new)


def _moved_without_gaps(inputs: Sequence[StageTensor], home: int) -> tuple[int, ...]:
    """Which of the values are views with gaps that have come to ``home`` from another stage: they travel row by row,
    and the strides of what is computed from them are others than where they were made.
    """
    for tensor in inputs:
        if tensor.home != home:
            break
    else:
        return ()
    return tuple(
        [
            index
            for index, tensor in enumerate(inputs)
            if tensor.home != home and not is_dense(tensor.spec.shape, tensor.spec.stride)
        ]
    )


def _compute_here(
    program: Program,
    what: str,
    arguments: Arguments,
    compute: Callable[..., Any],
    written: int | None,
    protect: bool,
    known: Structure | None,
) -> tuple[Structure, list[torch.Tensor]]:
    """(structure, new tensors) of the output, which is checked against the ``known`` structure."""
    locals_: list[Any] = []
    for value in arguments.values:
        if type(value) is StageTensor:
            local = value.local
            locals_.append(program.local(value) if local is None or value.stale_reason is not None else local)
        else:
            locals_.append(value)
    inputs = arguments.tensors
    if written is not None or (protect and (known is None or known.mutated)):
        _make_writable(arguments, locals_, written, protect, known)
    tensors = locals_ if len(inputs) == len(locals_) else [leaf for leaf in locals_ if isinstance(leaf, torch.Tensor)]
    versions = _versions(tensors)
    engine = program.engine
    was_native = engine.is_native
    engine.is_native = True
    try:
        if program.around_compute is None:
            output = arguments.call(compute, locals_)
        else:
            with program.around_compute:
                output = arguments.call(compute, locals_)
    finally:
        engine.is_native = was_native
    mutated: tuple[tuple[int, bool], ...] = ()
    if _versions(tensors) != versions:
        mutated = _written_here(inputs, tensors, versions, what)
    if known is not None and mutated == known.mutated:
        new = as_announced(known, output, tensors)
        if new is not None:
            return known, new
    found, new = encode(output, tensors, arguments.opaque(), mutated, what, values_are_fixed=False)
    if known is not None:
        check_same(known, found, what)
    return found, new


def _versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    """How often each was written to; inference tensors do not count that."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _make_writable(
    arguments: Arguments, locals_: list[Any], written: int | None, protect: bool, known: Structure | None
) -> None:
    """A leaf that needs a gradient (cut, or received) cannot be written to: the writing goes to a copy, which then is
    the value.
    """
    written_before = {index for index, _ in known.mutated} if known is not None else None
    num_tensors = 0
    for index, value in enumerate(arguments.values):
        if not isinstance(value, torch.Tensor):
            continue
        may_be_written = index == written or (protect and (written_before is None or num_tensors in written_before))
        if may_be_written and isinstance(value, StageTensor):
            locals_[index] = writable(value, locals_[index])
        num_tensors += 1


def _written_here(
    inputs: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], versions: Sequence[int], what: str
) -> tuple[tuple[int, bool], ...]:
    """(index, requires_grad) of each tensor that was written to."""
    mutated: list[tuple[int, bool]] = []
    for index, version in enumerate(_versions(tensors)):
        if version == versions[index]:
            continue
        tensor, source = tensors[index], inputs[index]
        mutated.append((index, tensor.requires_grad))
        if isinstance(source, StageTensor) and source.local is not tensor:
            for other in source.sharing():
                other.mark_stale(
                    f"{what} wrote in place to a value that shares memory with this one, after a stage boundary; "
                    "write x = x.clone() before the in-place operation, or use the operation that returns a new tensor"
                )
            source.local = tensor
    return tuple(mutated)


def _structure_of_known(program: Program, arguments: Arguments, compute: Callable[..., Any], what: str) -> Structure:
    """What the home finds out, found out here with copies of the values."""
    locals_: list[Any] = []
    program.is_finding_out = True
    try:
        for value in arguments.values:
            if isinstance(value, StageTensor) and value.replica is not None:
                copied = torch.empty_strided(value.spec.shape, value.spec.stride, dtype=value.spec.dtype)
                copied = copied.to(program.device if value.spec.device_type != "cpu" else "cpu")
                locals_.append(copied.copy_(value.replica()).requires_grad_(value.spec.requires_grad))
            else:
                locals_.append(value)
    finally:
        program.is_finding_out = False
    tensors = [local for local in locals_ if isinstance(local, torch.Tensor)]
    versions = _versions(tensors)
    with program.engine.native_region():
        output = arguments.call(compute, locals_)
    mutated = [
        (index, tensor.requires_grad)
        for index, (tensor, version) in enumerate(zip(tensors, _versions(tensors), strict=True))
        if version != versions[index]
    ]
    return encode(output, tensors, arguments.opaque(), mutated, what, values_are_fixed=False)[0]


def _is_known_everywhere(value: StageTensor) -> bool:
    return value.replica is not None and is_dense(value.spec.shape, value.spec.stride)


def _announce(
    program: Program, home: int, structure: Structure | None, what: str, *, is_always: bool
) -> Structure | None:
    payload = program.announce(home, lambda: pickle.dumps(structure), what, is_always=is_always)
    if payload is not None:
        received: Structure = pickle.loads(payload)
        return received
    return structure


def _note_all_written(
    program: Program, tensors: Sequence[torch.Tensor], structure: Structure, home: int, what: str
) -> None:
    for index, requires_grad in structure.mutated:
        tensor = program.resolve(tensors[index])
        if not isinstance(tensor, StageTensor):
            tensor = program.written.add(program, tensor, home)
        _note_written(tensor, home, requires_grad, what)


def _note_written(tensor: StageTensor, home: int, requires_grad: bool, what: str) -> None:
    if tensor.home != home:
        if tensor.is_pinned_home:
            raise StepUsageError(
                f"{what} on pp_rank {home} writes to a parameter or buffer that lives on pp_rank {tensor.home}"
            )
        for other in tensor.sharing():
            other.mark_stale(
                f"{what} wrote in place, on another pipeline stage, to a value of which this is a view; write to a "
                "copy instead"
            )
        tensor.home = home
    for member in (tensor, *tensor.sharing()):
        member.places = {member.home}
        member.replica = None
        if requires_grad:
            member.mark_requires_grad()


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
        from modelparallel.pipeline import inner_gradients  # it is made of operations

        return (inner_gradients.run(program.engine, program, args, kwargs),)
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


def _derive_replicas(engine: PipelineEngine, arguments: Arguments, result: Any, compute: Callable[..., Any]) -> None:
    """The results of an operation on values that every stage may read can be read by every stage, too: computed when
    they are.
    """
    kept: list[Any] = []
    for index, leaf in enumerate(trees.leaves(result)):
        if not isinstance(leaf, StageTensor) or leaf.replica is not None:
            continue
        if leaf.spec.num_bytes > engine.push_limit_bytes:
            continue
        leaf.replica = _own(leaf) if leaf.home == engine.stage else _computed(engine, arguments, compute, kept, index)


def _own(result: StageTensor) -> Callable[[], torch.Tensor]:
    weak_result = weakref.ref(result)  # a value that refers to itself, or to its inputs, would be freed late

    def read() -> torch.Tensor:
        alive = weak_result()
        if alive is None or alive.local is None:
            raise DivergenceError("a value known on every stage was read after it had gone")
        return alive.local.detach()

    return read


def _computed(
    engine: PipelineEngine, arguments: Arguments, compute: Callable[..., Any], kept: list[Any], index: int
) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        if not kept:
            with torch.no_grad(), engine.native_region():
                known = [
                    value.replica() if isinstance(value, StageTensor) and value.replica else value
                    for value in arguments.values
                ]
                kept.extend(trees.leaves(arguments.call(compute, known)))
        found: torch.Tensor = kept[index]
        return found.detach()

    return read


def _push_if_reduced(engine: PipelineEngine, program: Program, inputs: Sequence[StageTensor], result: Any) -> None:
    """A single number made of many is a loss or a metric, which scripts like to print on one rank alone: let every
    stage know it.
    """
    if not isinstance(result, StageTensor) or result.replica is not None or result.is_pinned_home:
        return
    if result.spec.num_elements != 1 or result.spec.num_bytes > engine.push_limit_bytes:
        return
    is_view = any(result.aliases is value.aliases for value in inputs)
    if not is_view and any(value.spec.num_elements > 1 for value in inputs):
        push(result)
