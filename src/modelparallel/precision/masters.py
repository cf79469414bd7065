"""Weights in full precision beside those of the model: updates that are too small for fp16 and bf16 add up in them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from modelparallel.torch_compat.private_parts import by_kind, foreach_check_finite_and_unscale_, foreach_copy_


def make_master(source: nn.Parameter) -> nn.Parameter:
    """The fp32 master of a parameter in half precision, with its values."""
    return nn.Parameter(source.detach().to(torch.float32, copy=True), requires_grad=source.requires_grad)


@torch.no_grad()
def update_masters(sources: Sequence[nn.Parameter], masters: Sequence[nn.Parameter]) -> None:
    """Take over the values of the model, where they are others than the master's rounded ones: what the masters have
    beyond the precision of the model is kept.
    """
    for source, master in zip(sources, masters, strict=True):
        changed = master.to(source.dtype) != source
        if bool(changed.any()):
            master.copy_(torch.where(changed, source.to(master.dtype), master))


@torch.no_grad()
def write_back(sources: Sequence[nn.Parameter], masters: Sequence[nn.Parameter]) -> None:
    """Round the masters to the precision of the model."""
    if sources:
        foreach_copy_([source.detach() for source in sources], [master.detach() for master in masters])


@torch.no_grad()
def unscale(gradients: Sequence[torch.Tensor], scale: float, overflow: torch.Tensor) -> None:
    """Divide the gradients by ``scale``, in place; ``overflow`` becomes 1 if one of them is not finite."""
    inverse = torch.full((), 1.0 / scale, dtype=torch.float32, device=overflow.device)
    for (device, _), members in by_kind(gradients).items():
        own = overflow.to(device)
        foreach_check_finite_and_unscale_(members, own, inverse.to(device))
        if own is not overflow:
            overflow.copy_(torch.maximum(overflow, own.to(overflow.device)))
