"""Normalisation layers of ``smp.nn``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from modelparallel.comm.collectives.started import start_all_reduce, start_gather_rows
from modelparallel.nn.family import FamilyModule
from modelparallel.plan.rows import SplitSpec
from modelparallel.torch_compat.functions import TensorFunction

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group


class FusedLayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` under the name, and with the signature, of the fused kernel that scripts test for. Local.

    torch's own kernel is fused; parameters are called ``weight`` and ``bias``. ``memory_efficient`` (recompute the
    normalised input in backward) is accepted and changes nothing. Source: smp-api section 9.
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


class DistributedLayerNorm(FamilyModule):
    """Layer normalisation of a hidden state in the layout inside (see layouts.py); the last dim is ``hidden_size``.

    With ``optimize="memory"`` each rank holds a slice of the features, [.., H/t], and of ``weight`` and ``bias``: the
    statistics of the slices are combined exactly, with one message of two numbers a row forward, and one backward. With
    "speed" every rank holds all of it. With ``is_inner=False`` (a layer that stands alone) it takes and gives the
    caller's own batch, [N, .., H]. Construction is local; calls and backward are collective over TP_GROUP.

    Raises:
        TensorParallelError: ``optimize="memory"``, and ``hidden_size`` is not divisible by t.

    Source: smp-api section 9.
    """

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, hidden_size: int, eps: float = 1e-5, *, is_inner: bool = False) -> None:
        super().__init__()
        self.hidden_size, self.eps, self.is_inner = hidden_size, eps, is_inner
        dim = 0 if self.is_memory else None
        self.weight = self.slice_parameter(torch.ones(hidden_size), dim)
        self.bias = self.slice_parameter(torch.zeros(hidden_size), dim)

    def split_tensors(self) -> dict[str, SplitSpec]:
        """Both parameters, where each rank holds a slice of the features."""
        if not self.is_memory:
            return {}
        return {name: SplitSpec(0, (self.hidden_size,)) for name in ("weight", "bias")}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., H], or [..., H/t] inside the memory layout."""
        if self.is_inner:
            return self._normalise(input)
        counts = self.layout.scaled_rows("DistributedLayerNorm", [input])
        return self.layout.leave(self._normalise(self.layout.enter(input, counts)), counts)

    def _normalise(self, input: torch.Tensor) -> torch.Tensor:
        group = self.tp_group
        if not self.is_memory or group.size == 1:
            return F.layer_norm(input, self.weight.shape, self.weight, self.bias, self.eps)
        return _SlicedLayerNorm.apply(input, self.weight, self.bias, self.eps, self.hidden_size, group)

    def extra_repr(self) -> str:
        """The global size and the local slice."""
        return f"{self.hidden_size}, eps={self.eps}, local_weight={tuple(self.weight.shape)}"


class _SlicedLayerNorm(TensorFunction):
    """Statistics in fp32 at least, combined as Chan, Golub and LeVeque (1979) combine those of two sets: means and sums
    of squared deviations, no difference of large numbers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
        hidden_size: int,
        group: Group,
    ) -> torch.Tensor:
        exact = input if input.dtype == torch.float64 else input.float()
        mean = exact.mean(-1, keepdim=True)
        # Not torch.var_mean, which takes many times as long on CPUs.
        variance = (exact - mean).square_().mean(-1)
        own = torch.stack([mean.squeeze(-1), variance]).unsqueeze(0)
        statistics = start_gather_rows(own, group, (1,) * group.size).wait()
        means, variances = statistics[:, 0], statistics[:, 1]
        # All slices have equal widths, so the means and variances of the slices are averaged.
        whole_mean = means.mean(0)
        whole_variance = variances.mean(0) + (means - whole_mean).square().mean(0)
        rstd = torch.rsqrt(whole_variance + eps)
        normalised = exact.sub(whole_mean.unsqueeze(-1)).mul_(rstd.unsqueeze(-1))
        ctx.save_for_backward(input, weight, whole_mean, rstd)
        ctx.group, ctx.hidden_size = group, hidden_size
        return torch.addcmul(bias.to(exact.dtype), normalised, weight.to(exact.dtype)).to(input.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight, mean, rstd = ctx.saved_tensors
        exact, grad = (each if each.dtype == torch.float64 else each.float() for each in (input, grads[0]))
        normalised = exact.sub(mean.unsqueeze(-1)).mul_(rstd.unsqueeze(-1))
        products, exact_weight = grad * normalised, weight.to(grad.dtype)
        reducing = start_all_reduce(torch.stack([grad @ exact_weight, products @ exact_weight]), ctx.group)
        flat = tuple(range(grad.dim() - 1))
        weight_grad, bias_grad = products.sum(flat).to(weight.dtype), grad.sum(flat).to(weight.dtype)
        input_grad = torch.mul(grad, exact_weight, out=products)
        sums = reducing.wait().div_(ctx.hidden_size)
        input_grad.sub_(sums[0].unsqueeze(-1)).sub_(normalised.mul_(sums[1].unsqueeze(-1))).mul_(rstd.unsqueeze(-1))
        return input_grad.to(input.dtype), weight_grad, bias_grad, None, None, None
