"""Dropout inside the transformer family: masks that agree where ranks hold the same, and differ where they do not."""

from __future__ import annotations

import torch

from modelparallel.comm.collectives.agreed_random import generator_of
from modelparallel.nn.layouts import HiddenLayout


def keep_mask(shape: tuple[int, ...], probability: float, like: torch.Tensor, seed: int) -> torch.Tensor:
    """Zeros with ``probability``, and 1 / (1 - probability) elsewhere."""
    if like.is_meta:
        return like.new_empty(shape)
    mask = torch.empty(shape, dtype=like.dtype, device=like.device)
    mask.bernoulli_(1.0 - probability, generator=generator_of(seed, like.device))
    return mask.div_(1.0 - probability) if probability < 1.0 else mask


def hidden_dropout(hidden: torch.Tensor, probability: float, seed: int | None, layout: HiddenLayout) -> torch.Tensor:
    """Dropout on a hidden state in the layout inside. ``seed``: agreed over the group; None: there is no dropout.

    The mask is drawn for the whole hidden state, so that it does not depend on the tensor parallel degree.
    """
    if seed is None or probability == 0.0:
        return hidden
    if not layout.is_memory:
        return hidden * keep_mask(tuple(hidden.shape), probability, hidden, seed)
    size = layout.group.size
    mask = keep_mask((*hidden.shape[:-1], hidden.shape[-1] * size), probability, hidden, seed)
    return hidden * mask.chunk(size, -1)[layout.group.rank_in_group]
