"""Random numbers that do not depend on the partition (design: RNG units).

The generators are seeded around every call of a unit (the finest modules that the partitioner may place, fixed by the
model alone) from (seed, unit, call count, microbatch, step, dp coordinate), and around every random operation in glue
from its number in program order. Python's own generator is seeded at the start of each microbatch. A step restores
the generators' states at its end, so that code outside sees the stream it would see without pipelining.

numpy's global generator costs tens of microseconds to save, so it is treated so only under a pipeline, where the stages
would otherwise go apart; its numbers then differ from those of one process.
"""

from __future__ import annotations

import random
import sys
import zlib
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from modelparallel.torch_compat import current_backward_id

_MASK = (1 << 63) - 1
_GLUE = zlib.crc32(b"glue")
_PYTHON = zlib.crc32(b"python")

# Modules of torch.nn that draw nothing; a unit made of these alone needs no frame.
_DRAWS_NOTHING = frozenset(
    getattr(nn, name)
    for name in (
        "Linear Bilinear Identity Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d BatchNorm1d "
        "BatchNorm2d BatchNorm3d "
        "LayerNorm GroupNorm RMSNorm InstanceNorm1d InstanceNorm2d InstanceNorm3d Embedding EmbeddingBag PReLU ReLU "
        "ReLU6 GELU SiLU Tanh "
        "Sigmoid Softmax LogSoftmax ELU LeakyReLU Hardtanh Hardswish Softplus Mish Flatten Unflatten MaxPool1d "
        "MaxPool2d MaxPool3d AvgPool1d "
        "AvgPool2d AvgPool3d AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveMaxPool2d Upsample Sequential ModuleList "
        "ModuleDict"
    ).split()
)


def may_draw(module: nn.Module) -> bool:
    """Whether calls of ``module`` may draw random numbers; a subclass may, whatever its base class does."""
    if any("forward" in part.__dict__ for part in module.modules()):
        return True
    return any(type(part) not in _DRAWS_NOTHING for part in module.modules())


def unit_number(name: str) -> int:
    """A number for a unit's name, equal in every process."""
    return zlib.crc32(name.encode())


@dataclass
class RandomFrames:
    """Seeds the default generators for one microbatch of one step."""

    device: torch.device
    seed: int
    step: int
    dp_coordinate: int
    microbatch: int
    _calls: dict[int, int] = field(default_factory=dict)
    _seen: dict[tuple[int, int], int] = field(default_factory=dict)
    _models: dict[int, int] = field(default_factory=dict)

    def at_this_point(self) -> RandomFrames:
        """Frames that seed the calls that come next as these do; they count on their own."""
        return replace(self, _calls=dict(self._calls), _seen={}, _models=dict(self._models))

    def enter_microbatch(self, *, seeds_numpy: bool) -> None:
        """Seed the generators outside torch; before the user's code runs for this microbatch."""
        value = hash((self.seed, _PYTHON, self.microbatch, self.step, self.dp_coordinate)) & _MASK
        random.seed(value)
        if seeds_numpy and "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(value & 0xFFFFFFFF)

    def note_model(self, model: int) -> int:
        """The number of a model among those whose units draw in this microbatch, in the order of their first calls;
        every stage calls this for every such unit. Models may have units of equal names.
        """
        return self._models.setdefault(model, len(self._models))

    def enter_unit(self, unit: int, model: int = 0) -> None:
        """Seed for the next call of ``unit`` (see :func:`unit_number`) of the model of that number."""
        what = unit if model == 0 else hash((unit, model)) & _MASK
        self._seed(what, self._count(what))

    def enter_glue_operation(self) -> None:
        """Seed for the next random operation in glue; every stage calls it for every such operation."""
        self._seed(_GLUE, self._count(_GLUE))

    def counts(self) -> dict[int, int]:
        """How often each unit was called, and random operations in glue."""
        return dict(self._calls)

    def counted_since(self, before: dict[int, int]) -> tuple[tuple[int, int], ...]:
        """How often each since :meth:`counts`."""
        more = ((what, count - before.get(what, 0)) for what, count in self._calls.items())
        return tuple(sorted((what, count) for what, count in more if count))

    def skip(self, counts: tuple[tuple[int, int], ...]) -> None:
        """Another stage has made these calls."""
        for what, count in counts:
            self._calls[what] = self._calls.get(what, 0) + count

    @property
    def num_glue_operations(self) -> int:
        """How many random operations in glue there were."""
        return self._calls.get(_GLUE, 0)

    def _count(self, what: int) -> int:
        """The number of this call. A call that torch.utils.checkpoint repeats in the backward has its first number.

        A checkpoint puts the generator into the state that it had before the first time, and the seed in it tells which
        call that was.
        """
        before = torch.default_generator.initial_seed()
        if current_backward_id() != -1 and (first := self._seen.get((what, before))) is not None:
            return first
        count = self._calls.get(what, 0)
        self._calls[what] = count + 1
        self._seen[what, before] = count
        return count

    def _seed(self, what: int, count: int) -> None:
        # The hash of a tuple of ints is the same in every process, and well mixed.
        value = hash((self.seed, what, count, self.microbatch, self.step, self.dp_coordinate)) & _MASK
        torch.default_generator.manual_seed(value)
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index or 0].manual_seed(value)
