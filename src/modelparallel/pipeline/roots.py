"""Where the backward of a microbatch starts: ``model.backward`` under a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from modelparallel.errors import StepUsageError
from modelparallel.pipeline.loss_weights import check_same_weight, checked_weight
from modelparallel.pipeline.program.program import Program
from modelparallel.pipeline.values.stage_tensor import StageTensor
from modelparallel.torch_compat import keep_nan_out


def backward_root(
    program: Program,
    tensors: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor | None],
    scale: float,
    weight: float | torch.Tensor | None,
    note_root: Callable[[torch.Tensor], None] | None,
) -> None:
    """Note where the backward starts; it runs when all forwards are done.

    ``weight``: the loss counts so often; ``note_root`` is told of roots that are on this stage.
    """
    program.check_root()
    if program.ledger is not None:
        program.ledger.note("model.backward", [*tensors, *gradients])
    if weight is not None:
        _keep_weight(program, weight)
    for tensor, gradient in zip(tensors, gradients, strict=True):
        value = program.resolve(tensor)
        if not isinstance(value, StageTensor) or not value.spec.requires_grad:
            raise StepUsageError(
                "model.backward was given a tensor that does not depend on the model's parameters (requires_grad "
                "is False)"
            )
        if gradient is None and value.spec.num_elements != 1:
            raise StepUsageError(
                "model.backward without grad_tensors needs a scalar, got a tensor of shape "
                f"{tuple(value.spec.shape)}: reduce it, or pass gradients"
            )
        seed = program.resolve(gradient)
        if isinstance(seed, StageTensor):
            program.fetch([seed], value.home, "gradient given to model.backward")
        if isinstance(program.loss_weight, StageTensor):
            program.fetch([program.loss_weight], value.home, "weight given to model.backward")
        number = program.next_event("root of the backward")
        program.has_root = True
        program.tracker.note_root(value.home)
        if value.home != program.stage:
            continue
        local, roots, cuts = program.root_here(value)
        if note_root is not None:
            note_root(roots[0])
        start = (
            torch.ones_like(local) if seed is None else (program.local(seed) if isinstance(seed, StageTensor) else seed)
        )
        factor = scale if weight is None else scale * _number_of(program)
        if factor == 0:
            keep_nan_out(roots)
        program.begin_backward(number, local, start.detach().to(local.device) * factor, cuts)


def _keep_weight(program: Program, weight: float | torch.Tensor) -> None:
    value = program.resolve(weight)
    if not isinstance(value, StageTensor):
        value = checked_weight(value)
    elif value.spec.num_elements != 1 or value.spec.requires_grad:
        raise StepUsageError(
            f"model.backward: weight is a tensor of shape {tuple(value.spec.shape)} with "
            f"requires_grad={value.spec.requires_grad}: give a number, or one element without a gradient "
            "(weight.detach())"
        )
    if program.loss_weight is not None:
        check_same_weight(program.loss_weight, value)
    program.loss_weight = value


def _number_of(program: Program) -> float:
    weight = program.loss_weight
    return checked_weight(program.local(weight) if isinstance(weight, StageTensor) else weight)
