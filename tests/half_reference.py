"""Training in half precision in one process, written out: what distributed runs are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def half_reference_run(
    make_model: Callable[[], nn.Module],
    batches: Sequence[tuple[Tensor, ...]],
    loss_of: Callable[..., Tensor],
    *,
    dtype: torch.dtype,
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    num_parts: int = 1,
    loss_scale: float = 1.0,
    max_norm: float | None = None,
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """(losses, norms of the gradients, masters at the end), with fp32 masters beside a model in ``dtype``.

    batches: the unions over all ranks; each is cut into ``num_parts`` parts (copies times microbatches), whose mean
    gradient is taken. loss_of: ``loss_of(output, *rest)`` of the output in float32.
    """
    model = make_model()
    model.to(dtype)
    masters = {name: nn.Parameter(value.detach().float().clone()) for name, value in model.named_parameters()}
    optimizer = make_optimizer(list(masters.values()))
    losses, norms = [], []
    for batch in batches:
        model.zero_grad()
        mean = 0.0
        for part in zip(*(tensor.tensor_split(num_parts) for tensor in batch), strict=True):
            first = part[0].to(dtype) if part[0].is_floating_point() else part[0]
            loss = loss_of(model(first).float(), *part[1:])
            (loss * (loss_scale / num_parts)).backward()
            mean += float(loss.detach()) / num_parts
        for name, parameter in model.named_parameters():
            masters[name].grad = None if parameter.grad is None else parameter.grad.float() / loss_scale
        gradients = [master.grad.flatten() for master in masters.values() if master.grad is not None]
        norms.append(float(torch.cat(gradients).double().norm()))
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(masters.values(), max_norm)
        optimizer.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(masters[name])
        losses.append(mean)
    return losses, norms, {name: master.detach().clone() for name, master in masters.items()}
