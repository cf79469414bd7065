"""Parameters and buffers of a partitioned model that live on another stage, as scripts outside a step meet them.

[Note: absent tensors] A script keeps lists of parameters from before the partition, and every stage runs its every
line. A tensor of another stage stays the same object, of a class of its own. What is written to it is done at its home,
by the same line of the script there, so here it has no effect; a random initialisation draws here, too, so that the
generators of the stages stay alike. What shows its values raises AbsentTensorError; views and copies are absent
as it is. Inside a step function none of this is asked: the engine sees every operation first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from modelparallel import trees
from modelparallel.errors import AbsentTensorError
from modelparallel.parameters.table import stand_in
from modelparallel.pipeline.values.functions import FunctionTraits, traits_of
from modelparallel.torch_compat import DisableTorchFunctionSubclass

#: Answered by the stand-in itself, beside what is metadata for the engine.
_OF_OBJECT = frozenset(
    "requires_grad requires_grad_ grad grad_fn retains_grad retain_grad _version _base _grad _backward_hooks _cdata "
    "register_hook register_post_accumulate_grad_hook _post_accumulate_grad_hooks storage untyped_storage data_ptr "
    "backward is_inference _is_zerotensor imag_ real_ has_names __dir__ is_shared _has_symbolic_sizes_strides "
    "_has_compatible_shallow_copy_type "
    "dim_order is_set_to is_pinned _typed_storage __class__".split()
)
#: They give another look at the tensor, or a copy.
_LOOKS = frozenset(
    "data detach view reshape flatten T mT H mH t transpose permute narrow select __getitem__ squeeze unsqueeze expand "
    "expand_as view_as reshape_as chunk split split_with_sizes tensor_split unbind diagonal swapaxes swapdims movedim "
    "moveaxis unflatten ravel adjoint view_as_real view_as_complex real imag clone contiguous as_strided "
    "alias __iter__ detach_copy atleast_1d atleast_2d atleast_3d".split()
)
_AS_OTHER = frozenset("view_as expand_as reshape_as type_as".split())
_CONVERSIONS = frozenset("to type type_as float double half bfloat16 cpu cuda pin_memory share_memory_".split())
#: They ask for shape, dtype and device only.
_MAKERS = frozenset(
    "new_empty new_zeros new_ones new_full new_tensor new_empty_strided new zeros_like ones_like empty_like full_like "
    "rand_like randn_like randint_like result_type promote_types can_cast broadcast_tensors_shape".split()
)


class AbsentTensor(torch.Tensor):
    """A buffer of another stage, or a look at a parameter of it."""

    #: "parameter 'name'", the stage that holds it, and the one that runs here.
    absent_title: str
    absent_home: int
    absent_stage: int
    absent_device: torch.device

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _called(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        kind = f"{tuple(self.shape)}, {self.dtype}"
        return f"<{self.absent_title} ({kind}) of pp_rank {self.absent_home}, absent on pp_rank {self.absent_stage}>"

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        _refuse(self, "copy.deepcopy")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse(self, "pickle (torch.save)")


class AbsentParameter(AbsentTensor, nn.Parameter):
    """A parameter of another stage."""


def make_absent(tensor: torch.Tensor, title: str, home: int, stage: int, device: torch.device) -> None:
    """``tensor``, which lives on stage ``home``, keeps its shape and loses its values on this ``stage``."""
    kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
    tensor.data = stand_in(tensor, device)
    tensor.__class__ = AbsentParameter if kind == "parameter" else AbsentTensor
    _note(tensor, f"{kind} '{title}'", home, stage, device)  # type: ignore[arg-type]


def make_present(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """The tensor lives here, too, from now on."""
    if isinstance(tensor, AbsentTensor):
        kind: type = nn.Parameter if isinstance(tensor, nn.Parameter) else torch.Tensor
        tensor.__class__ = kind
    tensor.data = values


def is_absent(tensor: object) -> bool:
    """Whether the values of the tensor are on another stage."""
    return isinstance(tensor, AbsentTensor)


def _note(tensor: AbsentTensor, title: str, home: int, stage: int, device: torch.device) -> None:
    tensor.absent_title, tensor.absent_home, tensor.absent_stage, tensor.absent_device = title, home, stage, device


def _called(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    traits = traits_of(func)
    name, target = traits.name, args[0] if args else kwargs.get("tensor", kwargs.get("input"))
    is_setter = getattr(func, "__name__", "") == "__set__"
    if name == "device" and isinstance(target, AbsentTensor):
        return target.absent_device
    if traits.is_metadata or (name in _OF_OBJECT and not is_setter) or name in ("requires_grad", "grad"):
        with DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if is_setter and name == "data" and isinstance(target, AbsentTensor):
        return _set_data(target, args[1])
    if name.startswith("_foreach_") and name.endswith("_") and "out" not in kwargs:
        return _write_each(func, args, kwargs, name)
    written = kwargs.get("out") if kwargs.get("out") is not None else target if _writes(traits, kwargs) else None
    if written is not None:
        return _write(func, args, kwargs, traits, written)
    if isinstance(target, AbsentTensor):
        if name in _MAKERS:
            return func(_stand_in(target), *args[1:], **kwargs)
        if name in _CONVERSIONS:
            one = func(_stand_in(target)[(slice(0, 1),) * target.ndim], *args[1:], **kwargs)
            return _absent(one.expand(target.shape), target, one.device)
        if name in _LOOKS:
            with DisableTorchFunctionSubclass():
                looked = func(_meta(target), *args[1:], **kwargs)
            return trees.map_leaves(lambda leaf: _absent(leaf, target, target.absent_device), looked)
    elif name in _AS_OTHER:  # only the shape, or dtype, of the other one is asked for
        return func(target, _stand_in(args[1]))
    _refuse(_first(args, kwargs), name)


def _writes(traits: FunctionTraits, kwargs: dict[str, Any]) -> bool:
    return traits.is_in_place or kwargs.get("inplace") is True


def _write(func: Any, args: Sequence[Any], kwargs: dict[str, Any], traits: FunctionTraits, written: Any) -> Any:
    """What is written to an absent tensor is written at its home; an absent one cannot be the source of a present."""
    if not isinstance(written, AbsentTensor):
        _refuse(_first(args, kwargs), traits.name, " and written to a tensor that is here")
    if traits.is_random:
        scratch = torch.empty(written.shape, dtype=written.dtype, device=written.absent_device)
        kwargs = {key: scratch if value is written else value for key, value in kwargs.items()}
        with torch.no_grad():
            func(*(scratch if value is written else value for value in args), **kwargs)
        return scratch  # initialisations look at what they have drawn, and draw again where it is out of bounds
    return written


def _write_each(func: Any, args: Sequence[Any], kwargs: dict[str, Any], name: str) -> None:
    """An operation on lists, for the tensors of the first list that are here."""
    targets = args[0]
    here = [index for index, target in enumerate(targets) if not isinstance(target, AbsentTensor)]

    def chosen(value: Any) -> Any:
        is_list = isinstance(value, (list, tuple)) and len(value) == len(targets)
        return [value[index] for index in here] if is_list else value

    args, kwargs = [chosen(value) for value in args], {key: chosen(value) for key, value in kwargs.items()}
    sources = [leaf for leaf in trees.leaves((args, kwargs)) if isinstance(leaf, AbsentTensor)]
    if sources:
        _refuse(sources[0], name, " and written to a tensor that is here")
    if here:
        func(*args, **kwargs)


def _set_data(target: AbsentTensor, value: torch.Tensor) -> None:
    """Another shape, dtype or device is taken over; the values are set at the home."""
    target.absent_device = value.device
    with DisableTorchFunctionSubclass():
        shaped = torch.empty(value.shape, dtype=value.dtype, device="meta")
        target.data = stand_in(shaped, target.absent_device)


def _stand_in(target: AbsentTensor) -> torch.Tensor:
    with DisableTorchFunctionSubclass():
        return stand_in(_meta(target), target.absent_device)


def _meta(target: AbsentTensor) -> torch.Tensor:
    """Shape and dtype alone: whatever is a look at an absent tensor has no values that could be taken for its own."""
    return torch.empty(target.shape, dtype=target.dtype, device="meta")


def _absent(result: Any, of: AbsentTensor, device: torch.device) -> Any:
    if isinstance(result, torch.Tensor):
        result.__class__ = AbsentTensor
        _note(result, of.absent_title, of.absent_home, of.absent_stage, device)  # type: ignore[arg-type]
    return result


def _first(args: Any, kwargs: Any) -> AbsentTensor:
    return next(leaf for leaf in trees.leaves((list(args), kwargs)) if isinstance(leaf, AbsentTensor))


def _refuse(tensor: AbsentTensor, what: str, more: str = "") -> NoReturn:
    raise AbsentTensorError(
        f"{tensor.absent_title} lives on pp_rank {tensor.absent_home} and is read by {what} on pp_rank "
        f"{tensor.absent_stage}{more}: since the partition each stage holds its own weights\n"
        "  wrong: for p in parameters_listed_before_the_first_step: ...\n"
        "  right: for name, p in model.named_parameters(): ...  # those of this rank\n"
        "Whole models: model.state_dict() gives all values, smp.copy_weights(target, model) and "
        "smp.average_weights(average, model, decay) copy and average them"
    )
