"""Linear maps of which each rank of a group does a part, with communication beside the computation in backward.

[Note: two layouts] Let H be the width of the hidden state, [rows, H], and t the size of the group.

- *speed*: every rank holds the whole hidden state. A column-parallel map reads it and gives the own slice of the
  output features; its backward sums the input's gradient over the ranks. A row-parallel map reads the own slice of the
  input features, and the partial results are summed.
- *memory*: every rank holds a slice, [rows, H/t]. A column-parallel map gathers the slices first, and keeps only its
  own for backward, where they are gathered again (for the gradient of the weight, while that of the input is
  computed). The partial results of a row-parallel map are summed and scattered.

Bytes that a rank sends, with n = rows * H * (bytes of an element) and f = (t - 1) / t:

    ============  =================  ===================
    map           speed              memory
    ============  =================  ===================
    column        0, 2 f n           f n, 2 f n
    row           2 f n, 0           f n, f n
    ============  =================  ===================

(forward, backward). For small or two-rank all-reduces the formula is the same with t - 1 in place of 2 f.

These Functions do not support double backward, and say so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from modelparallel.comm.collectives.started import start_all_reduce, start_gather_blocks, start_reduce_blocks
from modelparallel.torch_compat.functions import TensorFunction

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group


def column_linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, group: Group, *, is_memory: bool
) -> torch.Tensor:
    """[..., H] (or, memory: [..., H/t]) -> [..., own output features]; ``weight`` [own output features, H]."""
    if group.size == 1:
        return F.linear(input, weight, bias)
    return _ColumnLinear.apply(*_autocast(input, weight, bias), group, is_memory)


def row_linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, group: Group, *, is_memory: bool
) -> torch.Tensor:
    """[..., own input features] -> [..., H] (or, memory: [..., H/t]); ``weight`` [H, own input features]; ``bias`` is
    that of the result, and added once.
    """
    if group.size == 1:
        return F.linear(input, weight, bias)
    return _RowLinear.apply(*_autocast(input, weight, bias), group, is_memory)


def _autocast(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Under autocast everything in its dtype, before it is sent: an autograd.Function is not cast by torch."""
    device_type = input.device.type
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return input, weight, bias
    if input.dtype == torch.float64:
        return input, weight, bias
    dtype = torch.get_autocast_dtype(device_type)
    return input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


class _ColumnLinear(TensorFunction):
    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, group: Group, is_memory: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(input, weight)
        ctx.group, ctx.is_memory = group, is_memory
        whole = start_gather_blocks(input, group).wait() if is_memory else input
        return F.linear(whole, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        group, grad = ctx.group, grads[0]
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        gathering = start_gather_blocks(input, group) if ctx.is_memory and needs_weight else None
        reducing = None
        if needs_input:
            input_grad = grad @ weight
            if ctx.is_memory:
                reducing = start_reduce_blocks(input_grad.chunk(group.size, -1), group)
            else:
                reducing = start_all_reduce(input_grad, group)
        weight_grad = None
        if needs_weight:
            whole = input if gathering is None else gathering.wait()
            weight_grad = _rows(grad).t() @ _rows(whole)
        bias_grad = _rows(grad).sum(0) if needs_bias else None
        return None if reducing is None else reducing.wait(), weight_grad, bias_grad, None, None


class _RowLinear(TensorFunction):
    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, group: Group, is_memory: bool
    ) -> torch.Tensor:
        partial = F.linear(input, weight)
        ctx.save_for_backward(input, weight)
        ctx.group, ctx.is_memory = group, is_memory
        if is_memory:
            output = start_reduce_blocks(partial.chunk(group.size, -1), group).wait()
        else:
            output = start_all_reduce(partial, group).wait()
        return output if bias is None else output.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        grad = start_gather_blocks(grads[0], ctx.group).wait() if ctx.is_memory else grads[0]
        input_grad = grad @ weight if ctx.needs_input_grad[0] else None
        weight_grad = _rows(grad).t() @ _rows(input) if ctx.needs_input_grad[1] else None
        bias_grad = _rows(grads[0]).sum(0) if ctx.needs_input_grad[2] else None
        return input_grad, weight_grad, bias_grad, None, None


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
