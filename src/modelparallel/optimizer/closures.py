"""The closures that scripts give to ``optimizer.step``, as the inner optimizer gets them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from modelparallel.comm.waits import reduce_in_place
from modelparallel.errors import UnsupportedError
from modelparallel.optimizer.targets import updates_each_element_alone

if TYPE_CHECKING:
    from modelparallel.training.runtime import Runtime


def evaluated(result: Any, optimizer_name: str) -> Callable[[], Any]:
    """In place of a closure that has been evaluated; for an optimizer of unknown kind, which may want it again."""
    num_calls = 0

    def closure() -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls > 1:
            raise UnsupportedError(
                f"{optimizer_name} evaluates its closure several times within an update, where masters or shards of "
                "the parameters are not in the model yet: leave out fp16, bf16, shard_optimizer_state and "
                "sharded_data_parallel_degree, or use another optimizer"
            )
        return result

    return closure


def with_mean_loss(closure: Callable[[], Any], optimizer: torch.optim.Optimizer, runtime: Runtime) -> Callable[[], Any]:
    """For an optimizer that may decide by the loss (a line search), which must be one number on all copies of the
    model.
    """
    group = runtime.session.groups.dp
    if group.size == 1 or updates_each_element_alone(optimizer):
        return closure

    def mean_loss() -> Any:
        loss = closure()
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            return loss
        mean = loss.detach().clone()
        seconds = runtime.session.config.timeout_seconds
        reduce_in_place(mean, group, "the mean of the losses that a closure has returned", seconds=seconds)
        return mean / group.size

    return mean_loss
