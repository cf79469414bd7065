"""``smp.amp``: loss scaling for ``torch.autocast`` in fp16 (smp-api section 7)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from modelparallel.torch_compat import intercept_unscaling
from modelparallel.training import runtime as runtime_module
from modelparallel.training.gradient_norm import reduce

if TYPE_CHECKING:
    from modelparallel.training.runtime import Runtime

__all__ = ["GradScaler"]


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` for the device of this process: same arguments and methods as
    ``torch.cuda.amp.GradScaler``.

    Used with a ``smp.DistributedOptimizer``, this one and torch's own agree over all ranks that hold a part of the
    model whether a gradient is not finite, so that all skip the step and keep the same scale. Scale the loss in the
    step function: ``model.backward(scaler.scale(loss))``. ``unscale_`` and ``step`` are collective over MP_GROUP, with
    sharded parameters or optimizer state over the world. Source: smp-api section 7.
    """

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
    ) -> None:
        device = runtime_module.current().session.device
        super().__init__(device.type, init_scale, growth_factor, backoff_factor, growth_interval, enabled)


def agree_on_found_infs(runtime: Runtime) -> None:
    """Let every ``GradScaler`` of this process ask the other ranks, until the session ends."""

    def is_ours(optimizer: Any) -> bool:
        return any(optimizer is other for other in runtime.live_optimizers())

    def agree(overflow_by_device: dict[torch.device, torch.Tensor]) -> None:
        group, device = runtime.decisions.whole_model, runtime.session.device
        total = torch.zeros((), dtype=torch.float32, device=device)
        for value in overflow_by_device.values():
            total = torch.maximum(total, value.to(device))
        if group.size > 1:
            reduce(total, group, dist.ReduceOp.MAX, runtime, "overflow")
        for value in overflow_by_device.values():
            value.copy_(total)
        overflow_by_device.setdefault(device, total)

    runtime.session.closers.append(intercept_unscaling(is_ours, lambda optimizer: optimizer.collect_gradients(), agree))
