"""Weights of losses: ``model.backward(loss, weight=number_of_tokens)`` (smp-api section 5; the weight is ours).

[Note: weighted losses] The mean over the tokens of a batch is the mean of the microbatches' means, weighted by their
numbers of tokens, over all microbatches and data-parallel ranks. Their total is known when the step is over, so each
backward starts from weight / unit, a power of two near the total of the step before, which keeps half precision in its
range. At the end the ranks add up their weights, and what the step has added to the gradients is multiplied by
unit / total, before it is reduced: buckets wait for the end of such a step. Gradients that were there before the step
are set aside meanwhile. A microbatch of weight 0 goes backward, too, since other ranks of split layers wait for it; the
NaN that the mean over no token gives stays out of its gradients.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from modelparallel.comm.collectives.started import exchange_integers
from modelparallel.errors import StepUsageError

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group


def checked_weight(value: Any) -> float:
    """The weight as a number; raises StepUsageError for what is none."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, (int, float)) and math.isfinite(value) and value >= 0:
        return float(value)
    raise StepUsageError(
        f"model.backward: weight={value!r}: expected a number from 0, or a tensor with one: the number of tokens or "
        "samples that the loss is the mean of"
    )


def unit_for(total: float) -> float:
    """The power of two next to ``total``."""
    return 2.0 ** round(math.log2(total)) if total > 0 else 1.0


def total_of(own: float, group: Group) -> float:
    """The sum over the group, the same to the bit on all ranks. Collective over it."""
    (bits,) = struct.unpack("<q", struct.pack("<d", own))
    rows = exchange_integers((bits,), group, "model.backward with a weight")
    total = math.fsum(struct.unpack("<d", struct.pack("<q", row[0]))[0] for row in rows)
    if total > 0:
        return total
    raise StepUsageError(
        "model.backward: the weights of all microbatches, on all data-parallel ranks, are 0: there is nothing to take "
        "the mean of. Leave such a batch out, on all ranks"
    )


class LossWeights:
    """The weights that are given in one call of a step function."""

    def __init__(self) -> None:
        #: Whether losses have weights; None until the first backward.
        self.are_given: bool | None = None
        self.unit = 1.0

    def note(self, is_given: bool) -> bool:
        """A backward, with a weight or without; returns whether it is the first of the step.

        Raises StepUsageError where others had one, or had none.
        """
        if self.are_given is not None and self.are_given != is_given:
            raise StepUsageError(
                "model.backward was given a weight for some losses of this step and none for others: give one for "
                "each, or for none; a mean over samples has the number of samples as its weight"
            )
        is_first, self.are_given = self.are_given is None, is_given
        return is_first


def check_same_weight(first: object, weight: object) -> None:
    """Raise StepUsageError if a microbatch has two weights."""
    is_same = first is weight or (isinstance(first, float) and isinstance(weight, float) and first == weight)
    if not is_same:
        raise StepUsageError(
            "model.backward was given two weights in one microbatch: gradients are added up "
            "before they are divided, so all losses of a microbatch need the same one; add the losses up yourself"
        )


def shares(weights: Sequence[float]) -> tuple[float, ...]:
    """The share of each weight in their sum."""
    total = math.fsum(weights)
    return tuple(weight / total if total else 0.0 for weight in weights)
