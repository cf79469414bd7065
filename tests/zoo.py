"""Models that are trained pipelined, unmodified, and compared with one process: each with its inputs and its step
body. Here: what every entry of the zoo is, and models of plain torch; ``zoo_catalogue.py`` has them all.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 32
BATCH_SIZE = 8
LENGTH = 8


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    class_name: the class trained, as its users import it; family: the heading it stands under in docs/models.md.
    body: ``body(model, *batch)`` returns the loss of a (micro)batch.
    remarks: what a user must know, for docs/models.md.
    draws: whether the model draws random numbers. Those are the same on any number of stages, and others than plain
        torch draws, so such a model is compared with the library on one stage.
    default_dtype: torch's, while the model is built and trained; float64 for those that make tensors of it and cannot
        be trained in double precision otherwise.
    """

    class_name: str
    family: str
    make_model: Callable[[], nn.Module]
    make_batch: Callable[[int], tuple[Any, ...]]
    body: Callable[..., Tensor]
    remarks: str = ""
    draws: bool = False
    default_dtype: torch.dtype = torch.float32
    num_steps: int = 3


def tokens(seed: int, *, length: int = LENGTH) -> tuple[Tensor, ...]:
    """Token ids and their attention mask, each [BATCH_SIZE, length]; two samples end in padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (BATCH_SIZE, length), generator=generator)
    mask = torch.ones(BATCH_SIZE, length, dtype=torch.long)
    mask[1, -2:] = 0
    mask[6, -1:] = 0
    return ids, mask


def images(seed: int, *, side: int = 8, channels: int = 3) -> tuple[Tensor, ...]:
    """Images [BATCH_SIZE, channels, side, side] and labels 0..3."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(BATCH_SIZE, channels, side, side, generator=generator, dtype=torch.float64)
    return pixels, torch.randint(0, 4, (BATCH_SIZE,), generator=generator)


def vectors(seed: int, *, width: int = 16) -> tuple[Tensor, ...]:
    """Vectors [BATCH_SIZE, width] and labels 0..3."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(BATCH_SIZE, width, generator=generator, dtype=torch.float64),
        torch.randint(0, 4, (BATCH_SIZE,), generator=generator),
    )


def classification_loss(model: Any, inputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs), labels)


def next_token_loss(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    logits = model(ids)
    return F.cross_entropy(logits[:, -ids.shape[1] :].flatten(0, 1), ids.flatten())


# Plain torch


class ConvNet(nn.Module):
    """A CNN with BatchNorm, in-place ReLU and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(8)
        self.plain_norm = nn.BatchNorm2d(8, affine=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += x
        y = self.plain_norm(self.relu(y))
        return self.head(y.mean(dim=(2, 3)))


class UNet(nn.Module):
    """Skip connections across the whole depth."""

    def __init__(self) -> None:
        super().__init__()
        widths = [4, 8, 16]
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(2, b), nn.SiLU())
            for a, b in zip([3, *widths], widths, strict=False)
        )
        self.middle = nn.Conv2d(16, 16, 3, padding=1)
        self.up = nn.ModuleList(nn.Conv2d(2 * width, max(width // 2, 4), 3, padding=1) for width in reversed(widths))
        self.head = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for block in self.up:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = F.relu(block(torch.cat([x, skips.pop()], dim=1)))
        return self.head(x).mean(dim=(2, 3))


class CalledTwice(nn.Module):
    """One module called twice, with another in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.shared = nn.Linear(16, 16)
        self.between = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.shared(self.first(x)))
        return self.head(self.shared(torch.tanh(self.between(x))) + x)


class Branching(nn.Module):
    """Goes another way where a value says so."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 1)
        self.left = nn.Linear(16, 16)
        self.right = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
        self.after = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        score = self.gate(x).mean()
        hidden = self.left(x) if score.item() > 0 else self.right(x)
        if (hidden.detach().abs().mean() > 0.3).all():
            hidden = hidden * torch.sigmoid(score)
        return self.head(torch.tanh(self.after(hidden)))


@dataclass
class Carried:
    """What the stages of ``Containers`` hand to each other."""

    hidden: Tensor
    extra: dict[str, Any]
    nothing: None = None


class _Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, carried: Carried, *, scale: float, pair: tuple[Tensor | None, int] = (None, 0)) -> Carried:
        hidden = self.linear(carried.hidden) * scale
        if pair[0] is not None:
            hidden = hidden + pair[0] * pair[1]
        return Carried(
            hidden, {"previous": carried.hidden, "count": carried.extra["count"], "list": [hidden.detach(), None]}
        )


class Containers(nn.Module):
    """Dataclasses, dicts, None, numbers, keyword arguments and tuples between the stages."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(_Stage() for _ in range(4))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        carried = Carried(x, {"count": 2})
        for index, stage in enumerate(self.stages):
            pair = (carried.extra.get("previous"), index) if index > 1 else (None, 0)
            carried = stage(carried, scale=0.5, pair=pair)
        return self.head(carried.hidden + carried.extra["list"][0] * carried.extra["count"])


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x * factor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor * 3, None


class Gluey(nn.Module):
    """Weights used directly, parameters above all modules, in-place glue, an autograd.Function, writing into a plain
    tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 16) * 0.1)
        self.scale = nn.Parameter(torch.ones(16))
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)
        self.third = nn.Linear(16, 16)
        self.register_buffer("steps", torch.zeros((), dtype=torch.float64))
        self.register_buffer("average", torch.zeros(16, dtype=torch.float64))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.first(x)
        x.mul_(self.scale)
        y = self.third(self.second(torch.tanh(x)))
        collected = torch.zeros(x.shape[0], x.shape[1], 16, dtype=torch.float64)
        for position in range(x.shape[1]):
            collected[:, position] = y[:, position] + x[:, 0]
        y = _Scale.apply(collected, 0.5) + y.masked_fill(y > 1.0, 0.0)
        y[:, 0] = 0.0
        self.steps += 1
        self.average = 0.9 * self.average + 0.1 * y.detach().mean(dim=(0, 1))
        return F.linear(y, self.embed.weight)


class LSTMLanguageModel(nn.Module):
    """A recurrent model whose state is carried through glue."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 12)
        self.lstm = nn.LSTM(12, 16, num_layers=2, batch_first=True)
        self.cell = nn.GRUCell(16, 16)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        outputs, (state, _) = self.lstm(self.embed(tokens))
        hidden, collected = state[-1], []
        for position in range(outputs.shape[1]):
            hidden = self.cell(outputs[:, position], hidden)
            collected.append(hidden)
        return self.head(torch.stack(collected, dim=1))


class EarlyExit(nn.Module):
    """Leaves the loop when it is confident, and returns several outputs of which not all are used."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(5))
        self.unused = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        side = None
        for layer in self.layers:
            x = torch.tanh(layer(x)) + x
            side = self.unused(x)
            logits = self.head(x)
            if logits.detach().softmax(-1).max() > 0.6:
                break
        assert side is not None
        return logits


class Routed(nn.Module):
    """A mixture of experts: boolean indexing, nonzero, index_add on a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)
        self.router = nn.Linear(16, 3)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        weights = self.router(x).softmax(-1)
        choice = weights.argmax(-1)
        result = torch.zeros(x.shape, dtype=x.dtype)
        for index, expert in enumerate(self.experts):
            rows = (choice == index).nonzero().squeeze(-1)
            if rows.numel():
                result.index_add_(0, rows, expert(x[rows]) * weights[rows, index].unsqueeze(-1))
        high = result[result > 0]
        return self.head(result) + high.sum() * 0.01


class DenseNet(nn.Module):
    """Each layer reads the outputs of all before it; BatchNorm in between; a dense block is a list in glue."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList(
            nn.ModuleList(self._layer(8 + 4 * index, 4) for index in range(3)) for _ in range(2)
        )
        self.transition = nn.Sequential(nn.BatchNorm2d(20), nn.ReLU(inplace=True), nn.Conv2d(20, 8, 1), nn.AvgPool2d(2))
        self.norm = nn.BatchNorm2d(20)
        self.head = nn.Linear(20, 4)

    @staticmethod
    def _layer(width: int, growth: int) -> nn.Sequential:
        return nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, growth, 3, padding=1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for index, block in enumerate(self.blocks):
            features = [x]
            for layer in block.children():
                features.append(layer(torch.cat(features, dim=1)))
            x = torch.cat(features, dim=1)
            if index == 0:
                x = self.transition(x)
        return self.head(F.relu(self.norm(x)).mean(dim=(2, 3)))


class TreeRecursive(nn.Module):
    """Recursion over a binary tree whose shape depends on the batch: the same modules at every node."""

    def __init__(self) -> None:
        super().__init__()
        self.leaf = nn.Embedding(VOCABULARY, 16)
        self.left = nn.Linear(16, 16)
        self.right = nn.Linear(16, 16)
        self.gate = nn.Linear(32, 16)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self._node(ids, split=int(ids.sum()) % 3)).unsqueeze(1).expand(-1, ids.shape[1], -1)

    def _node(self, ids: Tensor, split: int) -> Tensor:
        if ids.shape[1] == 1:
            return self.leaf(ids[:, 0])
        middle = max(1, min(ids.shape[1] - 1, ids.shape[1] // 2 + split - 1))
        one, other = self._node(ids[:, :middle], split), self._node(ids[:, middle:], split)
        gate = torch.sigmoid(self.gate(torch.cat([one, other], dim=-1)))
        return torch.tanh(gate * self.left(one) + (1 - gate) * self.right(other))


class LayerDrop(nn.Module):
    """Skips layers at random, as Python's ``random`` says; dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.2)) for _ in range(6))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if random.random() < 0.3:
                continue
            x = x + F.dropout(layer(x), 0.1, self.training)
        return self.head(x)


class Looped(nn.Module):
    """One block called in a loop, as often as the input says, between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(16, 16)
        self.block = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU())
        self.other = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        num_rounds = 3 + int(x.sum() > 0)
        x = self.before(x)
        for index in range(num_rounds):
            x = x + self.block(x)
            if index == 1:
                x = torch.tanh(self.other(x))
        return self.head(x)


def _plain(model_class: type[nn.Module], make_batch: Any, body: Any, **more: Any) -> Entry:
    what = " ".join((model_class.__doc__ or "").split()).rstrip(".")
    return Entry(model_class.__name__, "plain torch", model_class, make_batch, body, what, **more)


PLAIN: dict[str, Entry] = {
    "cnn_batchnorm": _plain(ConvNet, images, classification_loss),
    "unet": _plain(UNet, images, classification_loss),
    "densenet": _plain(DenseNet, images, classification_loss),
    "called_twice": _plain(CalledTwice, vectors, classification_loss),
    "looped": _plain(Looped, vectors, classification_loss),
    "branching": _plain(Branching, vectors, classification_loss),
    "containers": _plain(Containers, vectors, classification_loss),
    "gluey": _plain(Gluey, tokens, next_token_loss),
    "lstm": _plain(LSTMLanguageModel, tokens, next_token_loss),
    "tree": _plain(TreeRecursive, tokens, next_token_loss),
    "early_exit": _plain(EarlyExit, vectors, classification_loss),
    "layer_drop": _plain(LayerDrop, vectors, classification_loss, draws=True),
    "routed": _plain(Routed, vectors, classification_loss),
}
