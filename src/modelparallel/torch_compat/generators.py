"""The generators that random operations of the process draw from: torch's on each device, Python's and numpy's."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from typing import Any

import torch

_CPU = torch.device("cpu")
_MAX_NUMBER = (1 << 62) - 1
with torch.inference_mode(False):  # in which somebody may import this
    _NUMBER = torch.empty((), dtype=torch.int64, device=_CPU)


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that operations on ``device`` draw from."""
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


def drawn_from(device: torch.device) -> list[torch.device]:
    """Where code draws whose tensors are on ``device``: on the CPU, and there."""
    return [_CPU, device] if device.type == "cuda" else [_CPU]


def drawn_number() -> int:
    """A number from torch's generator on the CPU: what ``torch.randint`` gives, in half the time. For one thread."""
    return int(_NUMBER.random_(_MAX_NUMBER).item())


def states_of(devices: Sequence[torch.device]) -> list[torch.Tensor]:
    """The states of the default generators of ``devices``."""
    return [
        torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.default_generator.get_state()
        for device in devices
    ]


class SavedGenerators:
    """The states of Python's generator, of torch's on ``devices`` and, if asked for, of numpy's, to be put back."""

    def __init__(self, devices: Sequence[torch.device], *, has_numpy: bool) -> None:
        self._devices, self._states = devices, states_of(devices)
        self._python = random.getstate()
        numpy = sys.modules.get("numpy") if has_numpy else None
        self._numpy: Any = None if numpy is None else numpy.random.get_state()

    def restore(self) -> None:
        """Put them back."""
        for device, state in zip(self._devices, self._states, strict=True):
            if device.type == "cuda":
                torch.cuda.set_rng_state(state, device)
            else:
                torch.default_generator.set_state(state)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
