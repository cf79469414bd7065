"""The models of the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional


@dataclass(frozen=True)
class GPTSize:
    """Sizes of a GPT; the default is the one that the targets name, 8 layers of width 512."""

    num_layers: int = 8
    hidden: int = 512
    num_heads: int = 8
    vocabulary: int = 2048
    sequence: int = 64


class Embedding(nn.Module):
    """Token and position embedding."""

    def __init__(self, size: GPTSize) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.hidden)
        self.positions = nn.Embedding(size.sequence, size.hidden)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))


class Block(nn.Module):
    """A transformer block with causal attention, normalised before each half."""

    def __init__(self, size: GPTSize) -> None:
        super().__init__()
        self.num_heads = size.num_heads
        self.attention_norm = nn.LayerNorm(size.hidden)
        self.attention_in = nn.Linear(size.hidden, 3 * size.hidden)
        self.attention_out = nn.Linear(size.hidden, size.hidden)
        self.mlp_norm = nn.LayerNorm(size.hidden)
        self.mlp_in = nn.Linear(size.hidden, 4 * size.hidden)
        self.mlp_out = nn.Linear(4 * size.hidden, size.hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (x.shape[0], x.shape[1], 3, self.num_heads, -1)
        query, key, value = self.attention_in(self.attention_norm(x)).view(shape).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp_out(functional.gelu(self.mlp_in(self.mlp_norm(x))))


class Head(nn.Module):
    """Final norm and projection to the vocabulary."""

    def __init__(self, size: GPTSize) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size.hidden)
        self.projection = nn.Linear(size.hidden, size.vocabulary, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection(self.norm(x))


class GPT(nn.Module):
    """Embedding, blocks, head."""

    def __init__(self, size: GPTSize) -> None:
        super().__init__()
        self.embedding = Embedding(size)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.num_layers))
        self.head = Head(size)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def pieces_of_gpt(model: GPT, num_pieces: int) -> list[list[nn.Module]]:
    """Equal numbers of layers per piece, the embedding in the first, the head in the last."""
    per_piece = len(model.blocks) // num_pieces
    pieces: list[list[nn.Module]] = [
        list(model.blocks[piece * per_piece : (piece + 1) * per_piece]) for piece in range(num_pieces)
    ]
    pieces[0].insert(0, model.embedding)
    pieces[-1].append(model.head)
    return pieces


def language_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy of every position."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def token_batch(size: GPTSize, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and targets, [batch, sequence]; the same on all ranks."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, size.vocabulary, (batch, size.sequence + 1), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


class ConvPyramid(nn.Module):
    """Images through levels of residual blocks: each level halves the side and doubles the channels.

    The first levels do most of the work and keep most of the activations, the last ones hold most of the weights.
    """

    def __init__(
        self, channels: int = 16, blocks_per_level: tuple[int, ...] = (2, 2, 2, 2), num_classes: int = 10
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        levels: list[nn.Module] = []
        for level, num_blocks in enumerate(blocks_per_level):
            width = channels * 2**level
            if level:
                levels.append(nn.Conv2d(width // 2, width, 3, stride=2, padding=1))
            levels += [ResidualConv(width) for _ in range(num_blocks)]
        self.levels = nn.ModuleList(levels)
        self.head = nn.Linear(channels * 2 ** (len(blocks_per_level) - 1), num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.stem(images)
        for level in self.levels:
            x = level(x)
        return self.head(x.mean(dim=(2, 3)))


class ResidualConv(nn.Module):
    """Two convolutions of 3 x 3 and the sum with the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(4, channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(functional.relu(self.norm(self.first(x))))


class EncoderDecoder(nn.Module):
    """A transformer for a long source and a short target: the encoder's layers cost more than the decoder's."""

    def __init__(self, size: GPTSize, num_decoder_layers: int = 4) -> None:
        super().__init__()
        self.source = nn.Embedding(size.vocabulary, size.hidden)
        self.target = nn.Embedding(size.vocabulary, size.hidden)
        self.encoder = nn.ModuleList(
            nn.TransformerEncoderLayer(size.hidden, size.num_heads, 4 * size.hidden, dropout=0.0, batch_first=True)
            for _ in range(size.num_layers)
        )
        self.decoder = nn.ModuleList(
            nn.TransformerDecoderLayer(size.hidden, size.num_heads, 4 * size.hidden, dropout=0.0, batch_first=True)
            for _ in range(num_decoder_layers)
        )
        self.head = nn.Linear(size.hidden, size.vocabulary, bias=False)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        memory = self.source(source)
        for layer in self.encoder:
            memory = layer(memory)
        x = self.target(target)
        for layer in self.decoder:
            x = layer(x, memory)
        return self.head(x)


def image_batch(batch: int, side: int = 32, num_classes: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images [batch, 3, side, side] and classes; the same on all ranks."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, side, side, generator=generator)
    return images, torch.randint(0, num_classes, (batch,), generator=generator)
