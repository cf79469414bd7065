"""Glue: operations between the placed modules, run where their data is.

Every stage reaches the operation; each takes the same decisions from the symbolic state alone (where to run it, what to
send, which structure the output has), and only the chosen home computes.
"""

from __future__ import annotations

import pickle
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from modelparallel import trees
from modelparallel.comm.transport import is_dense
from modelparallel.errors import DivergenceError, StepUsageError, UnsupportedError
from modelparallel.pipeline.randomness import is_random
from modelparallel.pipeline.stage_tensor import AliasGroup, StageTensor, function_name
from modelparallel.pipeline.structures import (
    Structure,
    check_same,
    decode,
    encode,
    flatten_call,
    is_value_shaped,
    operation_key,
)
from modelparallel.pipeline.writing import writable

if TYPE_CHECKING:
    from modelparallel.pipeline.engine import PipelineEngine
    from modelparallel.pipeline.program import Program

_IN_PLACE_DUNDERS = frozenset(
    "__setitem__ __iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __imod__ __ipow__ __iand__ __ior__ __ixor__ "
    "__ilshift__ __irshift__".split()
)
_READS = frozenset("item tolist __bool__ __int__ __float__ __index__ __complex__ numpy __array__ is_nonzero".split())
_REFUSED = {
    "backward": "use model.backward(loss) inside smp.step: with pipelining the backward of all stages is run by the "
    "library",
    "grad": "gradients inside a step are not known before the step returns (the backward runs at its end): read "
    "parameter.grad after it",
    "data_ptr": "a value that is spread over the stages has no address",
    "untyped_storage": "a value that is spread over the stages has no storage here",
    "storage": "a value that is spread over the stages has no storage here",
    "__dlpack__": "a value that is spread over the stages cannot be exported",
    "resize_": "use an operation that returns a new tensor",
    "resize_as_": "use an operation that returns a new tensor",
    "set_": "use an operation that returns a new tensor",
    "t_": "use x.t()",
    "transpose_": "use x.transpose()",
    "squeeze_": "use x.squeeze()",
    "unsqueeze_": "use x.unsqueeze()",
    "swapaxes_": "use x.swapaxes()",
}


def run(engine: PipelineEngine, program: Program, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """One glue operation; every stage of the pipeline calls it for the same operation."""
    name = function_name(func)
    special = _special(program, func, name, args, kwargs)
    if special is not None:
        return special[0]
    values, skeleton, rebuild = flatten_call(args, kwargs)
    written = _written_index(func, name, args, kwargs, values)
    given = values[written] if written is not None else None
    values = [program.resolve(value) for value in values]
    inputs = [value for value in values if isinstance(value, StageTensor)]
    if not inputs:
        if is_random(func):
            program.frames.enter_glue_operation()
        return func(*args, **kwargs)
    if name in _READS and all(value.replica is not None for value in inputs):
        # Known everywhere: no message, so that a read under `if smp.rank() == 0` cannot hang.
        with engine.native_region():
            read_args, read_kwargs = rebuild(
                [value.replica() if isinstance(value, StageTensor) and value.replica else value for value in values]
            )
            return func(*read_args, **read_kwargs)
    home = _choose_home(name, values, inputs, written)
    if written is not None and not isinstance(values[written], StageTensor):
        values[written] = program.written.add(program, values[written], home)
        inputs.append(values[written])
    program.fetch(inputs, home, f"input of {name}")
    if is_random(func):
        program.frames.enter_glue_operation()
    value_shaped = is_value_shaped(func, args, kwargs)
    is_known = written is None and not is_random(func) and all(_is_known_everywhere(value) for value in inputs)
    key = None if value_shaped else operation_key(func, values, skeleton)

    def compute(locals_: list[Any]) -> Any:
        inner_args, inner_kwargs = rebuild(locals_)
        return func(*inner_args, **inner_kwargs)

    result = execute(
        engine, program, f"operation {name}", key, values, home, compute, written=written, is_known=is_known
    )
    if is_known:
        _derive_replicas(engine, values, result, compute)
    elif written is None:
        _push_if_reduced(engine, program, inputs, result)
    if written is not None and result is values[written]:
        return given  # x += y must leave the user's own object (a buffer, a plain tensor) in x
    return result


def execute(
    engine: PipelineEngine,
    program: Program,
    what: str,
    key: Hashable | None,
    values: Sequence[Any],
    home: int,
    compute: Callable[[list[Any]], Any],
    *,
    written: int | None = None,
    protect: bool = False,
    is_known: bool = False,
) -> Any:
    """Run ``compute`` on ``home`` and give every stage its output, with StageTensors for its tensors.

    ``values`` are the arguments' leaves; ``key`` the signature (None: the output is announced every time). ``written``:
    the value that the operation writes to. ``protect``: leaves that need a gradient go in as copies if the callee
    writes to them, or may. ``is_known``: every stage may read all values, and finds out the structure by itself; so
    such an operation, and the reading of its result, may stand behind ``if smp.rank() == 0``.
    """
    # Not one table for both: a stage alone may meet an operation on values that all know.
    table = engine.structures_of_known if is_known else engine.structures
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if key is not None and (without_gaps := _moved_without_gaps(tensors, home)):
        key = (key, without_gaps)
    known = table.get(key) if key is not None else None
    opaque = [value for value in values if not isinstance(value, torch.Tensor)]
    new_locals: list[torch.Tensor] | None = None
    structure = known
    if home == engine.stage:
        found, new_locals = _compute_here(program, what, values, compute, opaque, written, protect, known)
        if known is None:
            structure = found
        else:
            check_same(known, found, what)
    if known is None:
        if not is_known:
            structure = _announce(program, home, structure, what)
        elif structure is None:
            structure = _structure_of_known(program, values, compute, what)
        if structure is None:
            raise DivergenceError(f"the home of {what} has not computed it")
        if key is not None and structure.is_cacheable:
            table[key] = structure
    if structure is None:
        raise DivergenceError(f"no structure for {what}")
    _note_all_written(program, tensors, structure, home, what)
    new = []
    for index, spec in enumerate(structure.specs):
        alias = structure.aliases[index]
        source = program.resolve(tensors[alias]) if alias is not None else None
        group = source.aliases if isinstance(source, StageTensor) and source.home == home else AliasGroup()
        new.append(program.new(spec, home, None if new_locals is None else new_locals[index], group))
    return decode(structure, tensors, opaque, new)


def _moved_without_gaps(tensors: Sequence[torch.Tensor], home: int) -> tuple[int, ...]:
    """Which of the tensors are views with gaps that have come to ``home`` from another stage: they travel row by row,
    and the strides of what is computed from them are others than where they were made.
    """
    return tuple(
        [
            index
            for index, tensor in enumerate(tensors)
            if isinstance(tensor, StageTensor)
            and tensor.home != home
            and not is_dense(tensor.spec.shape, tensor.spec.stride)
        ]
    )


def _compute_here(
    program: Program,
    what: str,
    values: Sequence[Any],
    compute: Callable[[list[Any]], Any],
    opaque: Sequence[Any],
    written: int | None,
    protect: bool,
    known: Structure | None,
) -> tuple[Structure, list[torch.Tensor]]:
    locals_: list[Any] = []
    written_before = {index for index, _ in known.mutated} if known is not None else None
    num_tensors = 0
    for index, value in enumerate(values):
        if not isinstance(value, torch.Tensor):
            locals_.append(value)
            continue
        local = program.local(value) if isinstance(value, StageTensor) else value
        # A leaf that needs a gradient (cut, or received) cannot be written to: the writing goes to a copy, which then
        # is the value.
        may_be_written = index == written or (protect and (written_before is None or num_tensors in written_before))
        if may_be_written and isinstance(value, StageTensor):
            local = writable(value, local)
        num_tensors += 1
        locals_.append(local)
    tensors = [local for local in locals_ if isinstance(local, torch.Tensor)]
    versions = [tensor._version if not tensor.is_inference() else 0 for tensor in tensors]
    engine = program.engine
    with engine.native_region():
        output = compute(locals_)
    mutated: list[tuple[int, bool]] = []
    inputs = [value for value in values if isinstance(value, torch.Tensor)]
    for index, tensor in enumerate(tensors):
        if not tensor.is_inference() and tensor._version != versions[index]:
            mutated.append((index, tensor.requires_grad))
            source = inputs[index]
            if isinstance(source, StageTensor) and source.local is not tensor:
                for other in source.aliases.others(source):
                    other.mark_stale(
                        f"{what} wrote in place to a value that shares memory with this one, after a stage boundary; "
                        "write x = x.clone() before the in-place operation, or use the operation that returns a new "
                        "tensor"
                    )
                source.local = tensor
    structure, new = encode(output, tensors, opaque, mutated, what, values_are_fixed=False)
    return structure, new


def _structure_of_known(
    program: Program, values: Sequence[Any], compute: Callable[[list[Any]], Any], what: str
) -> Structure:
    """What the home finds out, found out here with copies of the values."""
    locals_: list[Any] = []
    for value in values:
        if isinstance(value, StageTensor) and value.replica is not None:
            copied = torch.empty_strided(value.spec.shape, value.spec.stride, dtype=value.spec.dtype)
            copied = copied.to(program.device if value.spec.device_type != "cpu" else "cpu")
            locals_.append(copied.copy_(value.replica()).requires_grad_(value.spec.requires_grad))
        else:
            locals_.append(value)
    tensors = [local for local in locals_ if isinstance(local, torch.Tensor)]
    opaque = [local for local in locals_ if not isinstance(local, torch.Tensor)]
    versions = [tensor._version if not tensor.is_inference() else 0 for tensor in tensors]
    with program.engine.native_region():
        output = compute(locals_)
    mutated = [
        (index, tensor.requires_grad)
        for index, tensor in enumerate(tensors)
        if not tensor.is_inference() and tensor._version != versions[index]
    ]
    return encode(output, tensors, opaque, mutated, what, values_are_fixed=False)[0]


def _is_known_everywhere(value: StageTensor) -> bool:
    return value.replica is not None and is_dense(value.spec.shape, value.spec.stride)


def _announce(program: Program, home: int, structure: Structure | None, what: str) -> Structure | None:
    payload = program.announce(home, lambda: pickle.dumps(structure), what)
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
        for other in tensor.aliases.others(tensor):
            other.mark_stale(
                f"{what} wrote in place, on another pipeline stage, to a value of which this is a view; write to a "
                "copy instead"
            )
        tensor.home = home
    for member in (tensor, *tensor.aliases.others(tensor)):
        member.places = {member.home}
        member.replica = None
        if requires_grad:
            member.mark_requires_grad()


def _choose_home(name: str, values: Sequence[Any], inputs: Sequence[StageTensor], written: int | None) -> int:
    """Where the fewest bytes must be moved to; ties go to the later stage. Parameters do not move, nor does what is
    written to.
    """
    if written is not None and isinstance(values[written], StageTensor):
        target: StageTensor = values[written]
        return target.home
    if name.endswith("_as") and isinstance(values[0], StageTensor):
        return values[0].home  # view_as, expand_as: a view stays with its base
    pinned = {tensor.home for tensor in inputs if tensor.is_pinned_home}
    candidates = pinned or {tensor.home for tensor in inputs}
    if len(candidates) == 1:
        return candidates.pop()

    def moved_bytes(stage: int) -> int:
        return sum(tensor.spec.num_bytes for tensor in inputs if stage not in tensor.places)

    return min(candidates, key=lambda stage: (moved_bytes(stage), -stage))


def _written_index(func: Any, name: str, args: Any, kwargs: Any, values: Sequence[Any]) -> int | None:
    target = None
    if kwargs.get("out") is not None:
        target = kwargs["out"]
        if not isinstance(target, torch.Tensor):
            raise UnsupportedError(
                f"{name}(out=several tensors) is not supported on values of a pipelined step: use the returned ones"
            )
    elif name in _IN_PLACE_DUNDERS or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_"):
        target = args[0]
    elif kwargs.get("inplace") is True:
        target = args[0] if args else kwargs.get("input")
    if not isinstance(target, torch.Tensor):
        return None
    return next(index for index, value in enumerate(values) if value is target)


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
            return (args[0].spec.requires_grad,)
        if name == "grad_fn":
            return (None,)
        if name == "grad":
            raise StepUsageError(_REFUSED["grad"])
        if name == "_version":
            return (0,)
    if name in _REFUSED and not (name == "grad" and kind != "grad"):
        raise StepUsageError(f"{name} on a value of a pipelined step: {_REFUSED[name]}")
    if name == "requires_grad_":
        return (_requires_grad_(args[0], *args[1:], **kwargs),)
    if name == "retain_grad":
        return (None,)
    if name == "register_hook":
        return (_register_hook(program, args[0], args[1]),)
    return None


def _requires_grad_(tensor: Any, requires_grad: bool = True) -> Any:
    if isinstance(tensor, StageTensor) and not tensor.is_pinned_home:
        if not requires_grad:
            raise UnsupportedError(
                "requires_grad_(False) on a value of a pipelined step is not supported: use x.detach()"
            )
        tensor.mark_requires_grad()
        if tensor.local is not None and not tensor.local.requires_grad:
            tensor.local.requires_grad_()
    return tensor


def _register_hook(program: Program, tensor: StageTensor, hook: Callable[[torch.Tensor], Any]) -> Any:
    if tensor.home == program.stage:
        # On a copy of a leaf: a leaf's own hook would see the gradient piece by piece.
        local = program.local(tensor)
        if local.is_leaf and not tensor.is_pinned_home:
            local = tensor.local = local.view_as(local)
        return local.register_hook(hook)
    return torch.utils.hooks.RemovableHandle(OrderedDict())


def _derive_replicas(
    engine: PipelineEngine, values: Sequence[Any], result: Any, compute: Callable[[list[Any]], Any]
) -> None:
    """The results of an operation on values that every stage may read can be read by every stage, too: computed when
    they are.
    """
    kept: list[Any] = []
    for index, leaf in enumerate(trees.leaves(result)):
        if not isinstance(leaf, StageTensor) or leaf.replica is not None:
            continue
        if leaf.spec.num_bytes <= engine.push_limit_bytes:
            leaf.replica = _own(leaf) if leaf.home == engine.stage else _computed(engine, values, compute, kept, index)


def _own(result: StageTensor) -> Callable[[], torch.Tensor]:
    weak_result = weakref.ref(result)  # a value that refers to itself, or to its inputs, would be freed late

    def read() -> torch.Tensor:
        alive = weak_result()
        if alive is None or alive.local is None:
            raise DivergenceError("a value known on every stage was read after it had gone")
        return alive.local.detach()

    return read


def _computed(
    engine: PipelineEngine, values: Sequence[Any], compute: Callable[[list[Any]], Any], kept: list[Any], index: int
) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        if not kept:
            with torch.no_grad(), engine.native_region():
                known = [
                    value.replica() if isinstance(value, StageTensor) and value.replica else value for value in values
                ]
                kept.extend(trees.leaves(compute(known)))
        found: torch.Tensor = kept[index]
        return found.detach()

    return read


def _push_if_reduced(engine: PipelineEngine, program: Program, inputs: Sequence[StageTensor], result: Any) -> None:
    """A single number made of many is a loss or a metric, which scripts like to print on one rank alone: let every
    stage know it.
    """
    if not isinstance(result, StageTensor) or result.replica is not None or result.is_pinned_home:
        return
    if torch.Size(result.spec.shape).numel() != 1 or result.spec.num_bytes > engine.push_limit_bytes:
        return
    is_view = any(result.aliases is value.aliases for value in inputs)
    if not is_view and any(torch.Size(value.spec.shape).numel() > 1 for value in inputs):
        program.pushes.push(result)
