"""``self.head.to(x.dtype)`` in a forward: modules that are converted inside a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modelparallel.errors import UnsupportedError

if TYPE_CHECKING:
    from modelparallel.pipeline.engine import PipelineEngine


def is_done(engine: PipelineEngine, module: nn.Module, convert: Callable[[Any], Any]) -> bool:
    """Whether glue converts a module of a model to what it is by now, as models do to be sure.

    Raises UnsupportedError if it would become something else: the optimizer and the other stages know its tensors.
    """
    place = engine.module_places().get(id(module))
    if engine.program is None or engine.is_native or place is None:
        return False
    with engine.native_region():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            small = torch.empty((2,) * tensor.ndim, dtype=tensor.dtype, device=tensor.device)
            new = convert(small)
            if (new.dtype, new.device, new.stride()) != (small.dtype, small.device, small.stride()):
                raise UnsupportedError(
                    f"module '{place[1]}' is converted inside a step, which would make its tensor '{name}' "
                    f"({small.dtype}, {small.device}) one of {new.dtype}, {new.device}: with pipelining its tensors "
                    "are those that were there at the partition. Convert it before smp.DistributedModel, or convert "
                    "what goes into it"
                )
    return True
