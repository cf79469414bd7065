"""``self.head.to(x.dtype)`` in a forward: modules that are converted inside a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from modelparallel.errors import UnsupportedError


def check_keeps_kind(module: nn.Module, title: str, convert: Callable[[Any], Any]) -> None:
    """Glue converts a module of a model, named ``title``, to what it is by now, as models do to be sure.

    Raises UnsupportedError if it would become something else: the optimizer and the other stages know its tensors.
    """
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        small = torch.empty((2,) * tensor.ndim, dtype=tensor.dtype, device=tensor.device)
        new = convert(small)
        if (new.dtype, new.device, new.stride()) != (small.dtype, small.device, small.stride()):
            raise UnsupportedError(
                f"module '{title}' is converted inside a step, which would make its tensor '{name}' "
                f"({small.dtype}, {small.device}) one of {new.dtype}, {new.device}: with pipelining its tensors "
                "are those that were there at the partition. Convert it before smp.DistributedModel, or convert "
                "what goes into it"
            )
