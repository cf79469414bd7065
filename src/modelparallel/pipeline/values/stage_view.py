"""What a program and its operations need of the engine that they run in.

The engine (engine.py) puts all parts of the pipeline together, so it knows them all; what stands below it knows this
side of it only. The protocol is for the type checker: at run time the engine itself is handed over.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from modelparallel.comm.stages.transport import StageTransport
from modelparallel.pipeline.values.buffers import BufferHabits
from modelparallel.pipeline.values.structures import Structure


@dataclass(frozen=True, eq=False)
class PlacedTensor:
    """A parameter or buffer with a home. Shape and stride are those there: other stages hold an empty stand-in."""

    tensor: torch.Tensor
    name: str
    home: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class StageView(Protocol):
    """This stage, as a program and its operations see it. See :class:`PipelineEngine` for what is not said here."""

    device: torch.device
    stage: int
    push_limit_bytes: int
    placed: dict[int, PlacedTensor]  # parameters and buffers with a home, by id
    structures: dict[Hashable, Structure]  # of what operations and modules return
    structures_of_known: dict[Hashable, Structure]
    buffer_habits: BufferHabits
    is_native: bool
    is_discovering: bool
    assigned: dict[tuple[int, str], tuple[nn.Module, str, Any]] | None

    @property
    def transport(self) -> StageTransport:
        """The way to the other stages."""
        ...

    @property
    def runs_module(self) -> bool:
        """Whether a module runs at its home now."""
        ...

    def natively(self) -> AbstractContextManager[None]:
        """A context in which torch runs untouched."""
        ...

    def run_glue(self, program: Any, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run an operation of ``program`` (a :class:`Program`) where its data is."""
        ...

    def leave(self) -> tuple[Any, ...]:
        """No program runs now; returns what :meth:`enter` needs to go on with the one that did."""
        ...

    def enter(self, state: tuple[Any, ...]) -> None:
        """Go on with the program that was left."""
        ...

    def module_places(self) -> dict[int, tuple[int, str]]:
        """(number of the model, name in it) of the modules, by id."""
        ...

    def module_at(self, number: int, name: str) -> nn.Module:
        """The module of that number and name."""
        ...

    def holds_placed(self, module: nn.Module) -> bool:
        """Whether ``module`` is above placed modules."""
        ...

    def has_copy(self, tensor: torch.Tensor) -> bool:
        """Whether this stage holds a tied copy of a placed parameter of another one."""
        ...
