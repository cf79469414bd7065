"""Train a wrapped model on this rank's share of the batches, with the same record as ``parity.reference_run``."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import modelparallel as smp
from modelparallel.model import states as model_states
from parity import ReferenceResult
from training import step_of


def distributed_run(
    make_model: Callable[[], nn.Module],
    batches: Sequence[tuple[Any, ...]],
    body: Callable[..., Tensor],
    *,
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    num_steps: int | None = None,
    **model_arguments: Any,
) -> ReferenceResult:
    """As ``reference_run``, on the ranks of a job; every rank returns the whole record.

    batches: the *union* of the batches of all data-parallel ranks, one after another along dim 0.
    model_arguments: for smp.DistributedModel.
    """
    model = smp.DistributedModel(make_model(), **model_arguments)
    optimizer = smp.DistributedOptimizer(make_optimizer(model.parameters()))
    train_step = step_of(body)
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    for step in range(len(batches) if num_steps is None else num_steps):
        batch = own_share(batches[step % len(batches)])
        optimizer.zero_grad()
        losses.append(mean_over_copies(train_step(model, *batch).reduce_mean()))
        if step == 0 and not smp.state.cfg.shard_optimizer_state:  # there a rank has its part of them only
            gradients = merged_gradients(model)
        optimizer.step()
    return ReferenceResult(losses, gradients, model.state_dict())


def own_device() -> torch.device:
    """Of this rank, which ranks of a GPU test share."""
    return torch.device("cuda", 0) if os.environ.get("MODELPARALLEL_DEVICE") == "cuda" else torch.device("cpu")


def own_share(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """This data-parallel rank's part of a union of batches."""
    return tuple(
        value.tensor_split(smp.dp_size())[smp.dp_rank()] if isinstance(value, Tensor) and value.ndim else value
        for value in batch
    )


def mean_over_copies(loss: Tensor) -> float:
    """The mean of a number over the data-parallel ranks."""
    total = loss.detach().double().clone()
    dist.all_reduce(total, group=smp.get_dp_process_group())
    return float(total) / smp.dp_size()


def merged_gradients(model: Any) -> dict[str, Tensor]:
    """Every gradient by name, un-sliced and from all stages; no gradient counts as zero. Collective over MP_GROUP."""
    local = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()
        for name, parameter in model.local_named_parameters()
    }
    parts = smp.allgather((smp.pp_rank(), smp.tp_rank(), local), smp.MP_GROUP)
    return model_states.merge(model, parts)


def assert_equal_over(group: smp.CommGroup, value: Any) -> None:
    """``value`` (nested tensors and numbers) is the same, to the bit, on all ranks of the group."""
    for other in smp.allgather(value, group):
        torch.testing.assert_close(other, value, rtol=0, atol=0)


def shared_folder() -> str:
    """A new folder, the same on all ranks; it goes with the run of the ranks."""
    return smp.allgather(tempfile.mkdtemp() if smp.rank() == 0 else "", smp.WORLD)[0]
