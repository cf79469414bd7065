"""What a step function returns: the values of all microbatches (smp-api section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from modelparallel import trees


class StepOutput:
    """One returned tensor, per microbatch. Everything here is local. Source: smp-api section 4.

    Args:
        outputs: the tensors by microbatch, which may differ in size (a last batch that does not divide).
        weights: their shares of the samples, or of the weights given to ``model.backward(loss, weight=...)``.
        total_weight: the sum of the weights that the microbatches of this rank were given; None without weights.
    """

    def __init__(
        self,
        outputs: Sequence[torch.Tensor],
        weights: Sequence[float] | None = None,
        total_weight: float | None = None,
    ) -> None:
        self.outputs = list(outputs)
        self.total_weight = total_weight
        self.weights = tuple(weights) if weights is not None else (1 / len(self.outputs),) * len(self.outputs)

    def reduce_mean(self) -> torch.Tensor:
        """The mean over the microbatches, weighted by their numbers of samples, or by the weights of their losses: for
        a mean-reduced loss this is the loss of the whole batch. A microbatch of weight 0 does not count; NaN if all
        are.
        """
        if self.total_weight is not None:
            counted = [output * weight for output, weight in zip(self.outputs, self.weights, strict=True) if weight]
            return torch.stack(counted).sum(dim=0) if counted else self.outputs[0] * torch.nan
        if len(set(self.weights)) == 1:
            return (
                torch.stack(self.outputs).mean(dim=0) if self._is_floating() else self.reduce_sum() / len(self.outputs)
            )
        return torch.stack([output * weight for output, weight in zip(self.outputs, self.weights, strict=True)]).sum(
            dim=0
        )

    def reduce_sum(self) -> torch.Tensor:
        """The sum over the microbatches."""
        return torch.stack(self.outputs).sum(dim=0)

    def concat(self) -> torch.Tensor:
        """The microbatches joined along dimension 0: the rows of the batch, in order."""
        return torch.cat(self.outputs, dim=0)

    def stack(self) -> torch.Tensor:
        """The microbatches along a new leading dimension."""
        return torch.stack(self.outputs, dim=0)

    def detach(self) -> StepOutput:
        """A StepOutput of the same tensors, detached from the graph."""
        return StepOutput([output.detach() for output in self.outputs], self.weights, self.total_weight)

    def _is_floating(self) -> bool:
        return self.outputs[0].is_floating_point() or self.outputs[0].is_complex()

    def __len__(self) -> int:
        return len(self.outputs)

    def __repr__(self) -> str:
        return f"StepOutput({len(self.outputs)} x {tuple(self.outputs[0].shape)} {self.outputs[0].dtype})"


def merge_outputs(outputs: Sequence[Any], weights: Sequence[float], total_weight: float | None = None) -> Any:
    """The returns of all microbatches as one: tensors become StepOutputs, other leaves lists, containers keep their
    types.
    """

    def merge(values: list[Any]) -> Any:
        if all(map(torch.is_tensor, values)):
            return StepOutput(values, weights, total_weight)
        return values

    return trees.zip_leaves(merge, list(outputs))
