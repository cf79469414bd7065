"""The transformer family written out on whole parameters, by their names: what every split layer must equal.

Softmax, masks and LayerNorms are spelled out in the order of smp-api section 9; nothing of the library is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Params = Mapping[str, Tensor]


def layer_norm(params: Params, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    """``x`` normalised, or itself if there is no LayerNorm of this name."""
    if f"{name}.weight" not in params:
        return x
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * params[f"{name}.weight"] + params[f"{name}.bias"]


def linear(params: Params, name: str, x: Tensor, index: int | None = None) -> Tensor:
    weight, bias = params[f"{name}.weight"], params.get(f"{name}.bias")
    if index is not None:
        num_maps = 3 if name.endswith("qkv") else 2
        weight, bias = weight.chunk(num_maps)[index], None if bias is None else bias.chunk(num_maps)[index]
    return x @ weight.t() + (0 if bias is None else bias)


def attention(
    params: Params,
    prefix: str,
    x: Tensor,
    mask: Tensor | None = None,
    *,
    heads: int,
    head_size: int,
    causal: bool = False,
    states: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    alibi: bool = False,
    source: Tensor | None = None,
) -> Tensor:
    """The whole attention layer; with ``source`` (normalised already) only what is added to the residual."""
    is_branch = source is not None
    source = layer_norm(params, f"{prefix}pre_layernorm", x) if source is None else source
    if states is None:
        mapped = [linear(params, f"{prefix}qkv", source, index) for index in range(3)]
    else:
        mapped = [linear(params, f"{prefix}query", source)]
        mapped += [linear(params, f"{prefix}key_value", states, index) for index in range(2)]
    q, k, v = (one.view(*one.shape[:2], heads, head_size).transpose(1, 2) for one in mapped)
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(head_size) if scale is None else scale)
    length = scores.shape[-1]
    if alibi:
        slopes = torch.tensor([2.0 ** (-8 * (head + 1) / heads) for head in range(heads)], dtype=x.dtype)
        scores = scores + slopes[:, None, None] * torch.arange(1 - length, 1, dtype=x.dtype)
    hidden_keys = torch.zeros(scores.shape[-2:], dtype=torch.bool)
    for query in range(scores.shape[-2]):
        for key in range(length):
            hidden_keys[query, key] = (causal and key > query) or (window is not None and key <= query - window)
    scores = scores.masked_fill(hidden_keys, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    context = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    output = linear(params, f"{prefix}dense", context)
    return output if is_branch else layer_norm(params, f"{prefix}post_layernorm", x + output)


def output_layer(
    params: Params, prefix: str, x: Tensor, *, activation: Any = F.gelu, source: Tensor | None = None
) -> Tensor:
    """The whole output layer; with ``source`` only what is added to the residual."""
    normalised = layer_norm(params, f"{prefix}pre_layernorm", x) if source is None else source
    output = linear(params, f"{prefix}dense2", activation(linear(params, f"{prefix}dense1", normalised)))
    return output if source is not None else layer_norm(params, f"{prefix}post_layernorm", x + output)


def layer(params: Params, prefix: str, x: Tensor, mask: Tensor | None = None, **how: Any) -> Tensor:
    """One transformer layer; ``cross``: (states, mask) of its cross-attention."""
    cross = how.pop("cross", None)
    activation = how.pop("activation", F.gelu)
    if how.pop("parallel", False):
        source = layer_norm(params, f"{prefix}attention.pre_layernorm", x)
        branch = attention(params, f"{prefix}attention.", x, mask, source=source, **how)
        return x + branch + output_layer(params, f"{prefix}output.", x, source=source, activation=activation)
    x = attention(params, f"{prefix}attention.", x, mask, **how)
    if cross is not None:
        sizes = {key: how[key] for key in ("heads", "head_size")}
        x = attention(params, f"{prefix}cross_attention.", x, cross[1], states=cross[0], **sizes)
    return output_layer(params, f"{prefix}output.", x, activation=activation)


def stack(params: Params, prefix: str, x: Tensor, mask: Tensor | None = None, **how: Any) -> Tensor:
    """All layers, with the LayerNorms of the whole stack where there are parameters for them."""
    num_layers = 1 + max(
        int(name.removeprefix(f"{prefix}seq_layers.").split(".")[0])
        for name in params
        if f"{prefix}seq_layers." in name
    )
    x = layer_norm(params, f"{prefix}input_layernorm", x)
    windows = how.pop("windows", [None] * num_layers)
    by_index = how.pop("scale_by_index", False)
    for index in range(num_layers):
        scale = 1 / math.sqrt(how["head_size"]) / (index + 1) if by_index else None
        x = layer(params, f"{prefix}seq_layers.{index}.", x, mask, window=windows[index], scale=scale, **how)
    return layer_norm(params, f"{prefix}output_layernorm", x)


def lm_head(params: Params, inputs: tuple[Tensor | None, ...], **how: Any) -> Tensor:
    """Logits [N, S, V] for (input_ids, attention_mask with 1 = masked, token_type_ids, position_ids)."""
    ids, masked, token_types, positions = (*inputs, None, None, None, None)[:4]
    x = params["embedding.word_embedding.weight"][ids]
    if positions is None:
        positions = torch.arange(ids.shape[1])[None]
    if "embedding.position_embedding.weight" in params:
        x = x + params["embedding.position_embedding.weight"][positions]
    if token_types is not None:
        x = x + params["embedding.token_type_embedding.weight"][token_types]
    mask = None if masked is None else (masked == 0)[:, None, None, :]
    x = stack(params, "transformer.", x, mask, **how)
    logits = x @ params.get("lm_head.weight", params["embedding.word_embedding.weight"]).t()
    return logits + params["lm_head.bias"] if "lm_head.bias" in params else logits


def lm_loss(logits: Tensor, labels: Tensor, *, shifted: bool) -> Tensor:
    """The mean over the labels that are not -100."""
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
