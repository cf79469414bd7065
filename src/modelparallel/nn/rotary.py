"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864)."""

from __future__ import annotations

import torch

from modelparallel.nn.options import TransformerOptions


def rotated(
    query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor | None, options: TransformerOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys [N, heads, S, head_size] with their first ``rotary_dim`` features rotated.

    ``positions`` [N, S]; None: 0 to S - 1.
    """
    rotary_dim = options.rotary_dim
    assert rotary_dim is not None
    if positions is None:
        positions = torch.arange(query.shape[2], device=query.device).unsqueeze(0)
    exponents = torch.arange(0, rotary_dim, 2, device=query.device, dtype=torch.int64).float() / rotary_dim
    frequencies = 1.0 / (options.rotary_base**exponents)
    # In fp32 at least: the angles of late positions have no room in half precision.
    angles = positions[:, None, :, None].to(frequencies.dtype) * frequencies
    cosine, sine = angles.cos().to(query.dtype), angles.sin().to(query.dtype)
    turn = _turn_interleaved if options.rotary_interleaved else _turn_halves
    return turn(query, cosine, sine, rotary_dim), turn(key, cosine, sine, rotary_dim)


def _turn_interleaved(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, rotary_dim: int) -> torch.Tensor:
    first, rest = heads[..., :rotary_dim], heads[..., rotary_dim:]
    even, odd = first[..., 0::2], first[..., 1::2]
    turned = torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], -1).flatten(-2)
    return turned if rest.shape[-1] == 0 else torch.cat([turned, rest], -1)


def _turn_halves(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, rotary_dim: int) -> torch.Tensor:
    first, rest = heads[..., :rotary_dim], heads[..., rotary_dim:]
    low, high = first.chunk(2, -1)
    turned = [low * cosine - high * sine, high * cosine + low * sine]
    return torch.cat(turned if rest.shape[-1] == 0 else [*turned, rest], -1)
