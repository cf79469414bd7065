"""What an operation or a module returns, without its tensors: found out by the home, announced to the other stages,
cached by all.

[Note: announcements] Stages that do not run a module must still know the shapes, dtypes and nesting of its outputs to
go on with the
program. Only the home can say (a custom kernel has no fake version), so the first time a (what, signature) is met the
home sends its
*structure*; later calls take it from the cache, which is equal on all stages, and the home checks every real output
against it.
An output is pickled with its tensors taken out, so any object that can be pickled may be returned, not only known
containers.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any, cast

import torch

from modelparallel import trees
from modelparallel.errors import DivergenceError, UnsupportedError
from modelparallel.pipeline.values.arguments import Arguments
from modelparallel.pipeline.values.functions import FunctionTraits
from modelparallel.pipeline.values.stage_tensor import StageTensor, TensorSpec, storage_address
from modelparallel.torch_compat import autocast_state


@dataclass(frozen=True)
class Structure:
    """An output without its tensors.

    ``specs`` describe its new tensors, ``aliases[i]`` is the index of the input tensor that new tensor i shares storage
    with (or None), ``mutated`` lists the input tensors that were written to, with their requires_grad afterwards.
    ``payload`` is None for a single tensor, else the pickled output. ``is_cacheable``: whether a later call with the
    same signature surely has the same structure.
    """

    payload: bytes | None
    specs: tuple[TensorSpec, ...]
    aliases: tuple[int | None, ...]
    mutated: tuple[tuple[int, bool], ...]
    is_cacheable: bool

    @cached_property
    def template(self) -> tuple[Any] | None:
        """(the output with a :class:`_Slot` for each tensor,) if it is made of plain containers; else None."""
        return None if self.payload is None else _template(self.payload)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # nothing that is found out here


_VALUES = (int, float, complex, str, bytes, bool, type(None), type(...), slice, torch.dtype, torch.device)


class TensorPickler(pickle.Pickler):
    """Takes tensors out. The same object twice stays one object: what is written to it is seen under both names."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self._numbers: dict[int, int] = {}
        self.tensors: list[torch.Tensor] = []

    def taken_out(self, tensor: torch.Tensor) -> int:
        """The number of a tensor among those that were taken out."""
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
        return self._numbers[id(tensor)]


class _Encoder(TensorPickler):
    def __init__(self, file: io.BytesIO, inputs: Sequence[torch.Tensor], opaque: Sequence[Any], what: str) -> None:
        super().__init__(file)
        self._inputs = {id(tensor): index for index, tensor in enumerate(inputs)}
        # Numbers and the like are values, and small ones are one object wherever they stand.
        self._opaque = {id(value): index for index, value in enumerate(opaque) if not isinstance(value, _VALUES)}
        self._what = what
        self.has_values = False
        self.has_inputs = False

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) in self._inputs:
                self.has_inputs = True
                return f"input {self._inputs[id(value)]}"
            return f"new {self.taken_out(value)}"
        if id(value) in self._opaque:
            return f"argument {self._opaque[id(value)]}"
        if isinstance(value, (torch.nn.Module, torch.Generator)):
            raise UnsupportedError(
                f"{self._what} returns a {type(value).__name__}, which cannot be on several pipeline stages: return "
                "tensors, numbers and containers of them"
            )
        if isinstance(value, (int, float, complex)) and not isinstance(value, bool):
            self.has_values = True
        return None


class _Decoder(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, inputs: Any, opaque: Any, new: Any) -> None:
        super().__init__(file)
        self._tables = {"input": inputs, "argument": opaque, "new": new}

    def persistent_load(self, pid: Any) -> Any:
        table, index = pid.split()
        return self._tables[table][int(index)]


def encode(
    output: Any,
    inputs: Sequence[torch.Tensor],
    opaque: Sequence[Any],
    mutated: Sequence[tuple[int, bool]],
    what: str,
    *,
    values_are_fixed: bool,
) -> tuple[Structure, list[torch.Tensor]]:
    """The structure of ``output`` and its new tensors, in order.

    ``inputs`` are the tensors and ``opaque`` the other objects that went in (an output that is one of them stays that
    object). ``values_are_fixed``: numbers in the output follow from the signature (sizes), not from values.
    """
    if type(output) is torch.Tensor and not any(output is tensor for tensor in inputs):
        return Structure(None, (TensorSpec.of(output),), (_alias(output, inputs),), tuple(mutated), True), [output]
    file = io.BytesIO()
    encoder = _Encoder(file, inputs, opaque, what)
    try:
        encoder.dump(output)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UnsupportedError(
            f"{what} returns a value of type {type(output).__name__} that cannot travel to the other pipeline stages "
            f"({error}): "
            "return tensors, numbers, strings, None and containers of them"
        ) from error
    new = encoder.tensors
    structure = Structure(
        file.getvalue(),
        tuple(TensorSpec.of(tensor) for tensor in new),
        tuple(_alias(tensor, inputs) for tensor in new),
        tuple(mutated),
        values_are_fixed or (not encoder.has_values and (bool(new) or encoder.has_inputs or output is None)),
    )
    return structure, new


def decode(structure: Structure, inputs: Sequence[Any], opaque: Sequence[Any], new: Sequence[StageTensor]) -> Any:
    """The output with its tensors put in: ``new`` for the new ones, ``inputs`` and ``opaque`` as given to
    :func:`encode`.
    """
    if structure.payload is None:
        return new[0]
    if structure.template is not None:
        return _filled(structure.template[0], {"input": inputs, "argument": opaque, "new": new})
    return _Decoder(io.BytesIO(structure.payload), inputs, opaque, new).load()


# [Note: templates] Pickling every output, only to find it as announced, costs more than all else. Most outputs are a
# tensor, or plain tuples, lists and dicts of tensors: those are compared with what was announced, and rebuilt, by
# walking over a template. Whatever differs from its template is pickled and looked at in full.


class _Slot:
    """The place of a tensor, or of another argument, in a template."""

    __slots__ = ("index", "table")

    def __init__(self, table: str, index: int) -> None:
        self.table = table
        self.index = index


class _SlotTable:
    """A slot for every index."""

    def __init__(self, table: str) -> None:
        self._table = table

    def __getitem__(self, index: int) -> _Slot:
        return _Slot(self._table, index)


_PLAIN_CONTAINERS = (tuple, list, dict)
_PLAIN_LEAVES = (_Slot, int, float, complex, str, bytes, bool, type(None))


class _MeetsClass(Exception):
    pass


class _PlainDecoder(_Decoder):
    def find_class(self, module_name: str, global_name: str) -> Any:
        named = super().find_class(module_name, global_name)
        if not _is_named_tuple(cast(Hashable, named)):
            raise _MeetsClass
        return named


@lru_cache(maxsize=256)
def _is_named_tuple(kind: Hashable) -> bool:
    """Whether instances of this class (several results of a torch function, named tuples) are their items alone."""
    if not isinstance(kind, type) or not issubclass(kind, tuple) or kind.__dictoffset__:
        return False
    return kind.__module__ == "torch.return_types" or (hasattr(kind, "_fields") and kind.__bases__ == (tuple,))


def _template(payload: bytes) -> tuple[Any] | None:
    tables = [_SlotTable(name) for name in ("input", "argument", "new")]
    try:
        tree = _PlainDecoder(io.BytesIO(payload), *tables).load()
    except _MeetsClass:
        return None
    return (tree,) if _is_plain(tree, set()) else None


def _is_plain(tree: Any, seen: set[int]) -> bool:
    kind = type(tree)
    if kind not in _PLAIN_CONTAINERS and not _is_named_tuple(cast(Hashable, kind)):
        return kind in _PLAIN_LEAVES
    if id(tree) in seen:  # one list in two places stays one list
        return False
    seen.add(id(tree))
    if kind is dict and not all(type(key) in _PLAIN_LEAVES[1:] for key in tree):
        return False
    return all(_is_plain(child, seen) for child in (tree.values() if kind is dict else tree))


def _filled(template: Any, tables: dict[str, Sequence[Any]]) -> Any:
    kind = type(template)
    if kind is _Slot:
        return tables[template.table][template.index]
    if kind is tuple:
        return tuple([_filled(child, tables) for child in template])
    if kind is list:
        return [_filled(child, tables) for child in template]
    if kind is dict:
        return {key: _filled(child, tables) for key, child in template.items()}
    if _is_named_tuple(cast(Hashable, kind)):
        children = [_filled(child, tables) for child in template]
        return kind(children) if kind.__module__ == "torch.return_types" else kind._make(children)
    return template


def as_announced(announced: Structure, output: Any, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
    """The new tensors of ``output`` if it surely is what was announced; None says that it must be looked at in full.

    ``inputs`` as for :func:`encode`. What was written to is not compared.
    """
    new: list[torch.Tensor] = []
    if announced.payload is None:
        new.append(output)
    elif announced.template is None or not _collect_new(announced.template[0], output, inputs, new):
        return None
    if len(new) != len(announced.specs):
        return None
    for tensor, spec in zip(new, announced.specs, strict=True):
        if type(tensor) is not torch.Tensor or not spec.describes(tensor):
            return None
        for other in inputs:
            if other is tensor:
                return None
    return new


def _collect_new(template: Any, output: Any, inputs: Sequence[torch.Tensor], new: list[torch.Tensor]) -> bool:
    kind = type(template)
    if kind is _Slot:
        if template.table == "input":
            return output is inputs[template.index]
        if template.table != "new" or template.index > len(new):
            return False
        if template.index < len(new):
            return output is new[template.index]
        if any(output is other for other in new):
            return False
        new.append(output)
        return True
    if type(output) is not kind:
        return False
    if kind is dict:
        return list(template) == list(output) and all(
            _collect_new(child, output[key], inputs, new) for key, child in template.items()
        )
    if kind in _PLAIN_CONTAINERS or _is_named_tuple(cast(Hashable, kind)):
        return len(template) == len(output) and all(
            _collect_new(child, part, inputs, new) for child, part in zip(template, output, strict=True)
        )
    return bool(template == output)


def check_same(announced: Structure, returned: Structure, what: str) -> None:
    """Stop if a real output is not what the other stages were told; called at the home, before anything is sent."""
    is_same_object = announced.payload == returned.payload or _skeleton(announced) == _skeleton(returned)
    if is_same_object and announced.specs == returned.specs and announced.mutated == returned.mutated:
        return
    raise DivergenceError(
        f"{what} returned {_describe(returned)}, but with the same argument shapes it returned {_describe(announced)} "
        "before, and the other "
        "pipeline stages went on with that. If its output depends on data, mark it with smp.dynamic(module) before "
        "the first step: "
        "then it announces its output at every call"
    )


def _skeleton(structure: Structure) -> Any:
    if structure.payload is None:
        return "tensor"
    names = [f"new{i}" for i in range(len(structure.specs))]
    inputs = [f"input{i}" for i in range(256)]
    tree = _Decoder(io.BytesIO(structure.payload), inputs, [f"argument{i}" for i in range(256)], names).load()
    return [
        leaf if isinstance(leaf, (str, int, float, type(None))) else type(leaf).__name__ for leaf in trees.leaves(tree)
    ]


def _describe(structure: Structure) -> str:
    shapes = ", ".join(
        f"{tuple(spec.shape)} {spec.dtype} requires_grad={spec.requires_grad}" for spec in structure.specs
    )
    written = f", writing to its inputs {[index for index, _ in structure.mutated]}" if structure.mutated else ""
    return f"[{shapes}]{written}"


def _alias(tensor: torch.Tensor, inputs: Sequence[torch.Tensor]) -> int | None:
    address = storage_address(tensor)
    if address is None:
        return None
    return next((index for index, candidate in enumerate(inputs) if storage_address(candidate) == address), None)


def is_value_shaped(traits: FunctionTraits, arguments: Arguments) -> bool:
    """Whether the output shape of a torch function may depend on the values of its tensors."""
    if traits.is_value_shaped is not None:
        return traits.is_value_shaped
    if traits.name == "where":
        return len(arguments.values) == 1
    for tensor in arguments.tensors[1:]:  # the indices
        dtype = tensor.spec.dtype if isinstance(tensor, StageTensor) else tensor.dtype
        if dtype is torch.bool or dtype is torch.uint8:
            return True
    return False


def operation_key(traits: FunctionTraits, arguments: Arguments) -> Hashable:
    """The signature of a glue operation: what decides the structure of its output."""
    return (
        traits.identity,
        torch.is_grad_enabled(),
        autocast_state(),
        arguments.skeleton,
        *arguments.keys(are_floats_plain=traits.are_floats_plain),
    )
