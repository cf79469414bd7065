"""Small models for the tests of plans: their modules, tables and batches, and how they are run on ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

F64 = torch.float64


class Attention(nn.Module):
    """Grouped-query attention; ``is_fused``: one weight holds queries, keys and values, of their own sizes."""

    def __init__(self, width: int, num_heads: int, num_kv_heads: int, head_dim: int, is_fused: bool) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.group = num_heads // num_kv_heads
        self.sizes = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim)
        self.is_fused = is_fused
        if is_fused:
            self.qkv = nn.Linear(width, sum(self.sizes))
            self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        else:
            self.q, self.k, self.v = (nn.Linear(width, size) for size in self.sizes)
        self.q_norm = nn.LayerNorm(head_dim)
        self.out = nn.Linear(self.sizes[0], width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.is_fused:
            own = (self.num_heads * self.head_dim, *[self.num_kv_heads * self.head_dim] * 2)
            q, k, v = self.qkv(x).split(own, -1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        q, k, v = (part.view(*part.shape[:2], -1, self.head_dim).transpose(1, 2) for part in (q, k, v))
        k, v = (part.repeat_interleave(self.group, 1) for part in (k, v))
        mixed = F.scaled_dot_product_attention(self.q_norm(q), k, v, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2))


class GatedMlp(nn.Module):
    """``is_packed``: gate and up are one weight."""

    def __init__(self, width: int, inner: int, is_packed: bool) -> None:
        super().__init__()
        self.is_packed = is_packed
        if is_packed:
            self.gate_up = nn.Linear(width, 2 * inner)
        else:
            self.gate, self.up = nn.Linear(width, inner), nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1) if self.is_packed else (self.gate(x), self.up(x))
        return self.down(F.silu(gate) * up) * self.scale  # an operation after the row-wise layer


class Expert(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


class Mixture(nn.Module):
    """Each token goes to the expert with the highest score; other ranks' tokens may go to other experts."""

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, num_experts)
        self.experts = nn.ModuleList([Expert(width, 8) for _ in range(num_experts)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x.flatten(0, 1)
        scores = self.router(tokens).softmax(-1)
        best = scores.argmax(-1)
        result = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows = torch.where(best == index)[0]
            if rows.numel():
                result = result.index_add(0, rows, expert(tokens[rows]) * scores[rows, index, None])
        return result.view_as(x), scores


class Block(nn.Module):
    def __init__(self, width: int, is_fused: bool, is_mixture: bool) -> None:
        super().__init__()
        self.attn = Attention(width, 8, 4, 4, is_fused)
        self.mlp = Mixture(width, 3) if is_mixture else GatedMlp(width, 8, is_fused)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None = None, table: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x) + table, mask=mask)
        y = self.mlp(self.norm2(x))
        return x + (y[0] if isinstance(y, tuple) else y)


class Tower(nn.Module):
    """A small decoder: vocabulary of 13, blocks, tied or untied head."""

    def __init__(
        self, is_fused: bool = False, is_mixture: bool = False, is_tied: bool = False, is_shared: bool = False
    ) -> None:
        super().__init__()
        self.table = nn.Embedding(13, 16, padding_idx=1)
        self.positions = nn.Parameter(0.1 * torch.randn(1, 5, 16))
        self.layers = nn.ModuleList([Block(16, is_fused, is_mixture) for _ in range(2)])
        if is_shared:
            self.layers[1] = self.layers[0]
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 13, bias=not is_tied)
        if is_tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        mask = torch.ones(5, 5, dtype=torch.bool).tril().expand(len(ids), 1, 5, 5) & (ids != 2)[:, None, None]
        mask = mask | torch.eye(5, dtype=torch.bool)
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x, mask=mask, table=self.positions)
        return self.head(self.norm(x))


ATTENTION = {"layers.*.attn.q": "colwise", "layers.*.attn.k": "colwise", "layers.*.attn.v": "colwise"}
MLP = {"layers.*.mlp.gate": "colwise", "layers.*.mlp.up": "colwise", "layers.*.mlp.down": "rowwise"}
OUT = {"layers.*.attn.out": "rowwise"}
FUSED = {
    "layers.*.attn.qkv": ("colwise", {"parts": (32, 16, 16)}),
    "layers.*.attn.num_heads": "divide",
    "layers.*.attn.num_kv_heads": "divide",
    "layers.*.mlp.gate_up": ("colwise", {"parts": 2}),
    "layers.*.mlp.down": "rowwise",
}
EXPERTS = {"layers.*.mlp.experts.*.up": "colwise", "layers.*.mlp.experts.*.down": "rowwise"}
VOCABULARY = {"table": "vocab", "head": "vocab", "norm": "sequence"}

# name -> (arguments of Tower, plan)
TOWERS = {
    "separate": ({}, {**ATTENTION, **OUT, **MLP}),
    "fused": ({"is_fused": True}, {**FUSED, **OUT, **VOCABULARY}),
    "mixture": ({"is_mixture": True}, {**ATTENTION, **OUT, **EXPERTS}),
    "shared": ({"is_fused": True, "is_shared": True}, {**FUSED, **OUT}),
    "tied": ({"is_tied": True}, {**MLP, **VOCABULARY}),
    "vocabulary": ({}, VOCABULARY),
}


def make_tower(name: str) -> nn.Module:
    torch.manual_seed(5)
    return Tower(**TOWERS[name][0]).double()


def tower_batch(step: int, num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(0, 13, (num_samples, 5), generator=generator)
    return ids, torch.randint(0, 13, (num_samples, 5), generator=generator)


def tower_loss(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())
