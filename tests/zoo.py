"""Models that are trained pipelined, unmodified, and compared with one process: each with its inputs and its step
body.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 32


@dataclass(frozen=True)
class Entry:
    """A model of the zoo. ``body(model, *batch)`` returns the loss of a (micro)batch."""

    make_model: Callable[[], nn.Module]
    make_batch: Callable[[int], tuple[Tensor, ...]]
    body: Callable[..., Tensor]
    num_steps: int = 3


def _tokens(seed: int, *, size: int = 6, length: int = 8) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, VOCABULARY, (size, length), generator=generator)
    mask = torch.ones(size, length, dtype=torch.long)
    mask[1, -2:] = 0
    return tokens, mask


def _images(seed: int, *, size: int = 6, side: int = 8, channels: int = 3) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, channels, side, side, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 4, (size,), generator=generator)


def _vectors(seed: int, *, size: int = 6, width: int = 16) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(size, width, generator=generator, dtype=torch.float64),
        torch.randint(0, 4, (size,), generator=generator),
    )


def _language_loss(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    # Not the models' own loss: it is computed in float32 whatever the model's dtype.
    logits = model(input_ids=tokens, attention_mask=mask).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def _encoder_decoder_loss(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    logits = model(input_ids=tokens, attention_mask=mask, decoder_input_ids=tokens.roll(1, 1)).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def _classification_loss(model: Any, inputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs), labels)


# Hugging Face


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            use_cache=False,
        )
    )


def _bert(*, is_tied: bool) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            tie_word_embeddings=is_tied,
        )
    )


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=16,
            n_embd=16,
            n_layer=3,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
    )


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            use_cache=False,
            decoder_start_token_id=0,
            pad_token_id=1,
        )
    )


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=3,
            num_experts_per_tok=2,
            max_position_embeddings=32,
            use_cache=False,
        )
    )


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            num_labels=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


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
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        score = self.gate(x).mean()
        hidden = self.left(x) if score.item() > 0 else self.right(x)
        if (hidden.detach().abs().mean() > 0.3).all():
            hidden = hidden * torch.sigmoid(score)
        return self.head(hidden)


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
        self.register_buffer("steps", torch.zeros((), dtype=torch.float64))
        self.register_buffer("average", torch.zeros(16, dtype=torch.float64))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.first(x)
        x.mul_(self.scale)
        y = self.second(torch.tanh(x))
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


def _next_token_loss(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    logits = model(tokens)
    return F.cross_entropy(logits[:, -tokens.shape[1] :].flatten(0, 1), tokens.flatten())


ZOO: dict[str, Entry] = {
    "llama": Entry(_llama, _tokens, _language_loss),
    "bert_tied": Entry(lambda: _bert(is_tied=True), _tokens, _language_loss),
    "bert_untied": Entry(lambda: _bert(is_tied=False), _tokens, _language_loss),
    "gpt2_tied": Entry(_gpt2, _tokens, _language_loss),
    "t5": Entry(_t5, _tokens, _encoder_decoder_loss),
    "mixtral": Entry(_mixtral, _tokens, _language_loss),
    "vit": Entry(
        _vit, _images, lambda model, images, labels: F.cross_entropy(model(pixel_values=images).logits, labels)
    ),
    "cnn_batchnorm": Entry(ConvNet, _images, _classification_loss),
    "unet": Entry(UNet, _images, _classification_loss),
    "called_twice": Entry(CalledTwice, _vectors, _classification_loss),
    "branching": Entry(Branching, _vectors, _classification_loss),
    "containers": Entry(Containers, _vectors, _classification_loss),
    "gluey": Entry(Gluey, _tokens, _next_token_loss),
    "lstm": Entry(LSTMLanguageModel, _tokens, _next_token_loss),
    "early_exit": Entry(EarlyExit, _vectors, _classification_loss),
    "routed": Entry(Routed, _vectors, _classification_loss),
}
