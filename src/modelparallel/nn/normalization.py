"""Normalisation layers of ``smp.nn``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class FusedLayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` under the name, and with the signature, of the fused kernel that scripts test for.

    torch's own kernel is fused; parameters are called ``weight`` and ``bias``. ``memory_efficient`` (recompute the
    normalised input in backward) is accepted and changes nothing.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        memory_efficient: bool = False,
    ) -> None:
        shape = [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)
        super().__init__(shape, eps=eps, elementwise_affine=elementwise_affine)
        self.memory_efficient = memory_efficient
