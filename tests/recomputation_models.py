"""Models that count how often their parts run, and the memory that a step saves, for the tests of recomputation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class Runs:
    """A count that the engine does not take for the state of a module (it does not look into objects with slots)."""

    __slots__ = ("number",)

    def __init__(self) -> None:
        self.number = 0


class Block(nn.Module):
    """Two layers with dropout between them; ``num_runs`` counts the calls of forward."""

    def __init__(self, width: int = 8, dropout: float = 0.3, *, has_norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width) if has_norm else nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)
        self.runs = Runs()

    def forward(self, x: Tensor) -> Tensor:
        self.runs.number += 1
        return x + self.drop(self.down(torch.tanh(self.up(self.norm(x)))))


def num_runs(module: nn.Module) -> list[int]:
    """How often each counting part has run."""
    return [part.runs.number for part in module.modules() if hasattr(part, "runs")]


class SavedBytes:
    """What the graph of a computation holds: the storages of saved tensors, parameters left out, each once."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        self._own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._seen: dict[int, int] = {}
        self.num_tensors = 0

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self._seen.values())

    def pack(self, tensor: Tensor) -> Tensor:
        """The hook."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._seen[storage.data_ptr()] = storage.nbytes()
            self.num_tensors += 1
        return tensor


@contextmanager
def saved_bytes(module: nn.Module) -> Iterator[SavedBytes]:
    """Measure what is saved inside for the backward, where no region of ours or torch's is."""
    found = SavedBytes(module.parameters())
    with torch.autograd.graph.saved_tensors_hooks(found.pack, lambda tensor: tensor):
        yield found


class CountProducts(TorchDispatchMode):
    """Counts matrix products with a bias: two in the forward of each block."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func is torch.ops.aten.addmm.default
        return func(*args, **(kwargs or {}))


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """The steps inside draw what those of any other such context draw."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        yield
