"""Which key each query sees: padding, causal and windowed masks, and the bias of ALiBi (smp-api section 9)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group


def attention_mask(
    mask: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    causal: bool,
    window_size: int | None,
) -> torch.Tensor | None:
    """``mask`` (added to the scores, or a bool that is True where a key is seen; None: all are) and the causal and
    windowed masks in one tensor of the same kind.

    ``query`` and ``key`` are [N, heads, S, head_size]; the last query stands at the last key.
    """
    seen = _seen(query, key, causal=causal, window_size=window_size)
    if mask is None:
        return seen
    if mask.dtype == torch.bool:
        return mask if seen is None else mask & seen
    mask = mask.to(query.dtype)
    # Not a sum: the least number of the dtype twice is minus infinity, and a row of those alone has no softmax.
    return mask if seen is None else torch.where(seen, mask, torch.finfo(mask.dtype).min)


def _seen(query: torch.Tensor, key: torch.Tensor, *, causal: bool, window_size: int | None) -> torch.Tensor | None:
    if not causal and window_size is None:
        return None
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    ahead = torch.arange(num_keys, device=query.device) - torch.arange(
        num_keys - num_queries, num_keys, device=query.device
    ).unsqueeze(1)
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if causal:
        seen &= ahead <= 0
    if window_size is not None:
        seen &= ahead > -window_size
    return seen


def padding_mask(masked: torch.Tensor | None) -> torch.Tensor | None:
    """[N, S] with 1 where a position is masked -> the bool mask [N, 1, 1, S] of the keys that are seen."""
    return None if masked is None else (masked == 0)[:, None, None, :]


def alibi_bias(
    mask: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    num_heads: int,
    group: Group,
    bias_max: int,
) -> torch.Tensor:
    """The bias of this rank's heads, [1 or N, local heads, 1 or S, S], joined with ``mask``.

    Head h (from 1) has the slope 2^-(h * bias_max / heads); key j the bias slope * (j - (S - 1)).
    """
    num_local = num_heads // group.size
    heads = torch.arange(1, num_local + 1, device=query.device, dtype=torch.float64) + group.rank_in_group * num_local
    slopes = torch.pow(2.0, -heads * bias_max / num_heads)
    length = key.shape[-2]
    distances = torch.arange(1 - length, 1, device=query.device, dtype=torch.float64)
    bias = (slopes[:, None, None] * distances).to(query.dtype).unsqueeze(0)
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return bias + mask.to(bias.dtype)
