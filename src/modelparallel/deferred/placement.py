"""Give the deferred tensors of a model their storage, one parameter at a time (smp-api section 12).

A model built on torch's meta device is taken in the same way: its tensors become deferred ones of which nothing is
known, until a state dict is loaded into them or, when they are placed, their module's ``reset_parameters()`` is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from modelparallel import trees
from modelparallel.deferred.deferred import (
    DeferredTensor,
    become,
    is_deferred,
    is_unfilled,
    real_values,
    storage_key,
    uninitialised,
)
from modelparallel.errors import DeferredTensorError
from modelparallel.torch_compat import swap_contents

# torch's own modules have one or the other.
_RESETS = ("reset_parameters", "_reset_parameters")


def has_deferred(root: nn.Module) -> bool:
    """Whether a parameter or buffer of ``root`` waits for its storage."""
    return any(is_deferred(tensor) for part in root.modules() for _, tensor in _own_tensors(part))


def adopt_meta_tensors(root: nn.Module, device: torch.device) -> None:
    """Turn the parameters and buffers of ``root`` on the meta device into deferred ones of ``device``, in place."""
    for part in root.modules():
        for _, tensor in _own_tensors(part):
            if not is_deferred(tensor) and tensor.is_meta:
                become_deferred(tensor, device)


def become_deferred(tensor: torch.Tensor, device: torch.device) -> None:
    """Turn one meta tensor into a deferred one; the object stays the same one."""
    requires_grad = tensor.requires_grad
    new: torch.Tensor = uninitialised(tensor, device)
    new = nn.Parameter(new, requires_grad) if isinstance(tensor, nn.Parameter) else new.requires_grad_(requires_grad)
    attributes = {name: value for name, value in tensor.__dict__.items() if name != "_is_param"}
    new.__dict__.update(attributes)
    swap_contents(tensor, new)


@torch.no_grad()
def place_deferred(
    root: nn.Module, device: torch.device, is_wanted: Callable[[torch.Tensor], bool] = lambda tensor: True
) -> None:
    """Give the deferred parameters and buffers of ``root`` that are wanted storage on ``device``, and their values.

    They are made one after the other (those that share a storage together), so that at any time there is, beside what
    is placed, what one of them is made of. Deferred tensors that modules hold as plain attributes are replaced, too, by
    tensors on the device that they were made for. Each object stays the same one.

    Raises DeferredTensorError for a tensor of the meta device that nothing was loaded into and whose module does not
    say how to initialise it.
    """
    sharing: dict[int, list[DeferredTensor]] = {}
    for part in root.modules():
        for _, tensor in _own_tensors(part):
            if isinstance(tensor, DeferredTensor) and is_wanted(tensor):
                members = sharing.setdefault(storage_key(tensor), [])
                if all(member is not tensor for member in members):
                    members.append(tensor)
    memo: dict[int, Any] = {}
    for name, part in root.named_modules():
        own = [(_joined(name, key), tensor) for key, tensor in _own_tensors(part)]
        waiting = [(full, tensor) for full, tensor in own if isinstance(tensor, DeferredTensor) and is_wanted(tensor)]
        unfilled = [full for full, tensor in waiting if is_unfilled(tensor)]
        filled = [tensor for full, tensor in own if full not in unfilled and is_wanted(tensor)]
        for _, tensor in waiting:
            if isinstance(tensor, DeferredTensor) and is_deferred(tensor):  # not placed with one that shares storage
                _place(sharing[storage_key(tensor)], device)
        if unfilled:
            _reset(part, unfilled, filled)
        _place_attributes(part, memo)


def _place(members: list[DeferredTensor], device: torch.device) -> None:
    for tensor, value in zip(list(members), real_values(members), strict=True):
        become(tensor, value.to(device))


def _reset(part: nn.Module, unfilled: list[str], filled: Iterable[torch.Tensor]) -> None:
    """Initialise the tensors of ``part`` that nothing was written to as the module itself does it."""
    reset = next((method for name in _RESETS if callable(method := getattr(part, name, None))), None)
    if reset is None:
        raise DeferredTensorError(
            f"'{unfilled[0]}' was created on the meta device and has no values, and its module "
            f"({type(part).__name__}) has no reset_parameters() to give it any: load a state dict before the model is "
            "placed (model.load_state_dict(state, assign=True) before smp.DistributedModel(model)), or create the "
            "model inside smp.delay_param_initialization() and not on the meta device"
        )
    kept = [(tensor, tensor.detach().clone()) for tensor in filled if not is_deferred(tensor)]
    reset()
    for tensor, value in kept:
        tensor.copy_(value)


def _place_attributes(part: nn.Module, memo: dict[int, Any]) -> None:
    """Tensors that a module keeps without registering them: tables of constants, mostly."""

    def placed(leaf: Any) -> Any:
        if not isinstance(leaf, DeferredTensor) or isinstance(leaf, nn.Parameter):
            return leaf
        if id(leaf) not in memo:
            memo[id(leaf)] = leaf, real_values([leaf])[0]  # the leaf, so that its id is not used again
        return memo[id(leaf)][1]

    for key, value in part.__dict__.items():
        if key not in ("_parameters", "_buffers", "_modules") and (is_deferred(value) or _may_hold_tensors(value)):
            mapped = trees.map_leaves(placed, value)
            if mapped is not value:
                part.__dict__[key] = mapped


def _may_hold_tensors(value: Any) -> bool:
    return isinstance(value, list | tuple | dict) and any(is_deferred(leaf) for leaf in trees.leaves(value))


def _own_tensors(part: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [
        (name, tensor)
        for table in (part._parameters, part._buffers)
        for name, tensor in table.items()
        if isinstance(tensor, torch.Tensor)
    ]


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
