"""LocalProgram: the run of one microbatch through the step function where there is no pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from modelparallel.errors import StepUsageError
from modelparallel.pipeline.loss_weights import check_same_weight, checked_weight
from modelparallel.pipeline.program.randomness import RandomFrames
from modelparallel.torch_compat import keep_nan_out


class LocalProgram:
    """What :class:`~modelparallel.pipeline.program.program.Program` is to a pipeline. Its backwards run at once.

    ``weight``: the share of the samples that the microbatch holds; ``before_backward``: called before each backward
    of the microbatch.
    """

    def __init__(self, frames: RandomFrames, weight: float, before_backward: Callable[[], None] | None) -> None:
        self.frames = frames
        self.weight = weight
        #: What was given to ``model.backward`` as the weight of the loss.
        self.loss_weight: float | None = None
        self._before_backward = before_backward

    def start_backward(
        self,
        tensors: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor | None],
        scale: float,
        weight: float | torch.Tensor | None,
        note_root: Callable[[torch.Tensor], None] | None,
    ) -> None:
        """``model.backward``, with the arguments of :func:`modelparallel.pipeline.roots.backward_root`."""
        if self._before_backward is not None:
            self._before_backward()
        if note_root is not None:
            note_root(tensors[0])
        if weight is not None:
            number = checked_weight(weight)
            if self.loss_weight is not None:
                check_same_weight(self.loss_weight, number)
            self.loss_weight = number
            scale *= number
            if number == 0:
                keep_nan_out(tensors)
        if scale != 1.0:
            gradients = [_scaled(tensor, one, scale) for tensor, one in zip(tensors, gradients, strict=True)]
        torch.autograd.backward(tensors, gradients)


def _scaled(root: torch.Tensor, gradient: torch.Tensor | None, scale: float) -> torch.Tensor:
    if gradient is not None:
        return gradient * scale
    if root.numel() != 1:
        raise StepUsageError(
            f"model.backward without grad_tensors needs a scalar, got a tensor of shape {tuple(root.shape)}: reduce "
            "it, or pass gradients"
        )
    return torch.full_like(root, scale)
