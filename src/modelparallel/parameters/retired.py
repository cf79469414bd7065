"""Parameters in whose place the library has put others, as lists that a script has kept still hold them.

[Note: retired parameters] Sharded data parallelism and tensor parallelism put parameters of their own into the modules.
A list from before then holds objects that no module has: a gradient that is cleared or edited there, or a value that is
written, would be lost without a word. So such an object becomes a look at the parameter that stands for it: every
operation on it is one on that. Where a layer that splits has no counterpart of it, and where the counterpart is a
slice of it, values that a script reads or writes would be other ones than it thinks: that is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from modelparallel import trees
from modelparallel.errors import AbsentTensorError
from modelparallel.parameters.table import stand_in
from modelparallel.torch_compat import DisableTorchFunctionSubclass

#: What is answered of a parameter of another shape: gradients are cleared and frozen alike, and it may be asked for its
#: kind.
_OF_SLICES = frozenset("grad requires_grad requires_grad_ dtype device is_leaf ndim dim".split())


class RetiredParameter(nn.Parameter):
    """``retired_for``: the parameter in its place, or None; ``retired_name``: its own name."""

    retired_for: nn.Parameter | None
    retired_name: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = in_their_place(func, args, kwargs or {})
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _replacement(self, "__deepcopy__").__deepcopy__(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _replacement(self, "__reduce_ex__").__reduce_ex__(protocol)


def retire(old: nn.Parameter, name: str, new: nn.Parameter | None) -> None:
    """Let ``old`` stand for ``new``, and give its memory back if that holds its values. Of a parameter of another class
    it is noted alone, for optimizers.
    """
    mark: Any = old
    mark.retired_for, mark.retired_name = new, name
    if type(old) is not nn.Parameter:
        return
    if new is not None and new.shape == old.shape:
        old.grad = None
        old.data = stand_in(old, old.device)
    old.__class__ = RetiredParameter


def retire_replaced(
    before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter], new_names: Mapping[str, str]
) -> None:
    """Modules of a model that is about to be wrapped were replaced: of its parameters before and after, by name, those
    that are gone stand for what has their name now, or their new name.
    """
    kept = set(after.values())
    for name, parameter in before.items():
        if parameter not in kept:
            retire(parameter, name, after.get(new_names.get(name, name)))


def name_before(parameter: nn.Parameter) -> str | None:
    """The name that a replaced parameter had in the model; None if it was not replaced."""
    return getattr(parameter, "retired_name", None)


def replacement_of(parameter: nn.Parameter) -> nn.Parameter | None:
    """The parameter that stands in a wrapped model for one that was replaced; None if there is none."""
    new: nn.Parameter | None = parameter.retired_for  # type: ignore[attr-defined]
    while new is not None and name_before(new) is not None:
        new = new.retired_for  # type: ignore[attr-defined]
    return new


def without_retired(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors, with the parameters that stand for retired ones."""
    return [_replacement(one, "grad") if isinstance(one, RetiredParameter) else one for one in tensors]


def in_their_place(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments of an operation, with the parameters that stand for retired ones."""
    name: str = getattr(getattr(func, "__self__", None), "__name__", "") or getattr(func, "__name__", str(func))
    replaced: tuple[Any, dict[str, Any]] = trees.map_leaves(
        lambda leaf: _replacement(leaf, name) if isinstance(leaf, RetiredParameter) else leaf, (list(args), kwargs)
    )
    return replaced


def _replacement(retired: RetiredParameter, what: str) -> nn.Parameter:
    new = replacement_of(retired)
    with DisableTorchFunctionSubclass():
        own_shape = torch.Size(retired.shape)
    if new is not None and (new.shape == own_shape or what in _OF_SLICES):
        return new
    raise AbsentTensorError(
        f"{what} of parameter '{retired.retired_name}', of which tensor parallelism has put slices in its place when "
        "the model was wrapped: nothing that is done to it, or read from it, has to do with the model\n"
        "  wrong: parameters = list(net.parameters()); model = smp.DistributedModel(net)\n"
        "  right: model = smp.DistributedModel(net); parameters = list(model.parameters())"
    )
