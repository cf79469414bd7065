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
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modelparallel import trees
from modelparallel.errors import DivergenceError, UnsupportedError
from modelparallel.pipeline.stage_tensor import StageTensor, TensorSpec, function_name
from modelparallel.torch_compat import autocast_state

# Whose output has the same structure whatever the values of their numbers. (Not so dropout: with p=0 it gives back its
# input.)
_ARITHMETIC = frozenset(
    "add sub mul div true_divide divide multiply subtract rsub pow add_ sub_ mul_ div_ pow_ __add__ __radd__ __iadd__ "
    "__sub__ __rsub__ "
    "__isub__ __mul__ __rmul__ __imul__ __truediv__ __rtruediv__ __itruediv__ __pow__ __rpow__ addcmul addcdiv lerp "
    "clamp clamp_min clamp_max "
    "eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__ masked_fill masked_fill_ fill_ where "
    "layer_norm softmax log_softmax "
    "gelu leaky_relu leaky_relu_ elu hardtanh normalize cross_entropy smooth_l1_loss huber_loss".split()
)
_SHAPE_DEPENDS_ON_VALUES = frozenset(
    "nonzero argwhere masked_select unique unique_consecutive unique_dim bincount repeat_interleave one_hot "
    "tensor_split nonzero_static combinations cartesian_prod pack_padded_sequence _pack_padded_sequence "
    "pad_packed_sequence _pad_packed_sequence".split()
)


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


_VALUES = (int, float, complex, str, bytes, bool, type(None), type(...), slice, torch.dtype, torch.device)


class _Encoder(pickle.Pickler):
    def __init__(self, file: io.BytesIO, inputs: Sequence[torch.Tensor], opaque: Sequence[Any], what: str) -> None:
        super().__init__(file, protocol=5)
        self._inputs = {id(tensor): index for index, tensor in enumerate(inputs)}
        # Numbers and the like are values, and small ones are one object wherever they stand.
        self._opaque = {id(value): index for index, value in enumerate(opaque) if not isinstance(value, _VALUES)}
        self._what = what
        self._numbers: dict[int, int] = {}
        self.tensors: list[torch.Tensor] = []
        self.has_values = False
        self.has_inputs = False

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) in self._inputs:
                self.has_inputs = True
                return f"input {self._inputs[id(value)]}"
            if id(value) not in self._numbers:
                self._numbers[id(value)] = len(self.tensors)
                self.tensors.append(value)
            return f"new {self._numbers[id(value)]}"
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
    def __init__(self, file: io.BytesIO, inputs: Sequence[Any], opaque: Sequence[Any], new: Sequence[Any]) -> None:
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
    return _Decoder(io.BytesIO(structure.payload), inputs, opaque, new).load()


def check_same(announced: Structure, found: Structure, what: str) -> None:
    """Stop if a real output is not what the other stages were told; called at the home, before anything is sent."""
    is_same_object = announced.payload == found.payload or _skeleton(announced) == _skeleton(found)
    if is_same_object and announced.specs == found.specs and announced.mutated == found.mutated:
        return
    raise DivergenceError(
        f"{what} returned {_describe(found)}, but with the same argument shapes it returned {_describe(announced)} "
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
    if tensor.layout is not torch.strided or not tensor.numel():
        return None
    address = tensor.untyped_storage().data_ptr()
    for index, candidate in enumerate(inputs):
        if (
            candidate.layout is torch.strided
            and candidate.numel()
            and candidate.untyped_storage().data_ptr() == address
        ):
            return index
    return None


def is_value_shaped(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the output shape of a torch function may depend on the values of its tensors."""
    name = function_name(func)
    if name in _SHAPE_DEPENDS_ON_VALUES:
        return True
    if name == "where":
        return len(args) + len(kwargs) == 1
    if name in ("__getitem__", "index"):
        return any(
            isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.bool, torch.uint8)
            for leaf in trees.leaves(args[1:])
        )
    return False


def operation_key(func: Any, leaves: Sequence[Any], skeleton: Hashable) -> Hashable:
    """The signature of a glue operation: what decides the structure of its output."""
    name = function_name(func)
    floats_by_type = name in _ARITHMETIC
    return (
        name,
        getattr(func, "__module__", None) or getattr(getattr(func, "__objclass__", None), "__name__", None),
        torch.is_grad_enabled(),
        autocast_state(),
        skeleton,
        tuple(_leaf_key(leaf, floats_by_type=floats_by_type) for leaf in leaves),
    )


def call_key(name: str, module: torch.nn.Module, leaves: Sequence[Any], skeleton: Hashable) -> Hashable:
    """The signature of a module's call."""
    return (
        "call", name, module.training, torch.is_grad_enabled(), autocast_state(), skeleton,
        tuple(_leaf_key(leaf, floats_by_type=False) for leaf in leaves),
    )  # fmt: skip


def _leaf_key(leaf: Any, *, floats_by_type: bool) -> Hashable:
    if isinstance(leaf, StageTensor):
        return leaf.spec
    if isinstance(leaf, torch.Tensor):
        return (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.requires_grad, leaf.device.type)
    if isinstance(leaf, float):
        return float if floats_by_type else leaf
    if isinstance(leaf, slice):
        return ("slice", *(_leaf_key(part, floats_by_type=False) for part in (leaf.start, leaf.stop, leaf.step)))
    if isinstance(
        leaf, (int, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.memory_format, torch.layout)
    ):
        return (type(leaf).__name__, leaf)
    return type(leaf).__qualname__


_FLAT = "flat"


def flatten_call(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Any], tuple[Hashable, ...], Callable[[Sequence[Any]], Any]]:
    """(leaves, a hashable skeleton, a function that rebuilds (args, kwargs) from other leaves) of a call."""
    found = [*args, *kwargs.values()] if kwargs else list(args)
    if not any(trees.is_container(value) for value in found):
        num_positional = len(args)
        keys = tuple(kwargs)

        def rebuild_flat(leaves: Sequence[Any]) -> Any:
            return tuple(leaves[:num_positional]), dict(zip(keys, leaves[num_positional:], strict=True))

        return found, (_FLAT, num_positional, *keys), rebuild_flat
    found = []
    shape: list[Hashable] = []
    value = (args, kwargs)
    _collect(value, found, shape)

    def rebuild(leaves: Sequence[Any]) -> Any:
        iterator = iter(leaves)
        return trees.map_leaves(lambda _: next(iterator), value)

    return found, tuple(shape), rebuild


def has_containers(skeleton: tuple[Hashable, ...]) -> bool:
    """Whether the call that this is the skeleton of has an argument that is a container."""
    return skeleton[0] != _FLAT


def _collect(item: Any, found: list[Any], shape: list[Hashable]) -> None:
    # No inner function of flatten_call: one that calls itself is a cycle, and would keep the values alive with it.
    if not trees.is_container(item):
        found.append(item)
        return
    pairs = trees.children(item)
    shape.append((type(item).__name__, tuple(key for key, _ in pairs) if isinstance(item, dict) else len(pairs)))
    for _, child in pairs:
        _collect(child, found, shape)
