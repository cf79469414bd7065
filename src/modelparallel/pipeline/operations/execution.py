"""A piece of work, a module's call or an operation between the modules, is done at its home, and every stage gets its
output.

Every stage reaches it; each takes the same decisions from the symbolic state alone (which structure the output has,
which values share memory or are written to), and only the home computes.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from modelparallel.errors import DivergenceError, StepUsageError
from modelparallel.pipeline.program.program import Program
from modelparallel.pipeline.values.arguments import Arguments
from modelparallel.pipeline.values.in_place import writable
from modelparallel.pipeline.values.stage_tensor import StageTensor, is_dense
from modelparallel.pipeline.values.structures import Structure, as_announced, check_same, decode, encode
from modelparallel.torch_compat.private_parts import version_of


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
        own_structure, new_locals = _compute_here(program, what, arguments, compute, written, protect, known)
        if known is None:
            structure = own_structure
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
    structure, new = encode(output, tensors, arguments.opaque(), mutated, what, values_are_fixed=False)
    if known is not None:
        check_same(known, structure, what)
    return structure, new


def _versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    """How often each was written to; inference tensors do not count that."""
    try:
        return [version_of(tensor) for tensor in tensors]
    except RuntimeError:
        return [0 if tensor.is_inference() else version_of(tensor) for tensor in tensors]


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
            if isinstance(value, StageTensor) and value.known_value is not None:
                copied = torch.empty_strided(value.spec.shape, value.spec.stride, dtype=value.spec.dtype)
                copied = copied.to(program.device if value.spec.device_type != "cpu" else "cpu")
                locals_.append(copied.copy_(value.known_value()).requires_grad_(value.spec.requires_grad))
            else:
                locals_.append(value)
    finally:
        program.is_finding_out = False
    tensors = [local for local in locals_ if isinstance(local, torch.Tensor)]
    versions = _versions(tensors)
    with program.engine.natively():
        output = arguments.call(compute, locals_)
    mutated = [
        (index, tensor.requires_grad)
        for index, (tensor, version) in enumerate(zip(tensors, _versions(tensors), strict=True))
        if version != versions[index]
    ]
    return encode(output, tensors, arguments.opaque(), mutated, what, values_are_fixed=False)[0]


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
        member.known_value = None
        if requires_grad:
            member.mark_requires_grad()
