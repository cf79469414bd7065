"""What a region of the program needs to be run again on this stage alone, written down in its first run.

[Note: records] In a replay nothing may depend on other stages or on what has changed since. So the record has the
values from outside the region with all that the engine knew of them when they were first used, what other stages have
sent, and what they have announced, each in the order in which it was needed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from modelparallel.errors import RecomputationError, StepUsageError
from modelparallel.pipeline.values.arguments import Arguments
from modelparallel.pipeline.values.buffers import BufferHabits, KeptBuffers
from modelparallel.pipeline.values.stage_tensor import AliasGroup, StageTensor, TensorSpec
from modelparallel.torch_compat.private_parts import base_of, version_of


class OffloadedTensor(Protocol):
    """A tensor that lives in host memory until it is asked for."""

    def get(self) -> torch.Tensor:
        """The tensor, back on its device."""
        ...


class ActivationStore(Protocol):
    """Where the kept inputs of regions may be while nobody needs them (recomputation/offload.py)."""

    horizon: int  # how many actions of a stage ahead they come back

    def put(self, tensor: torch.Tensor, key: tuple[int, int]) -> OffloadedTensor:
        """Begin to move ``tensor`` to host memory; ``key``: (microbatch, visit) that needs it again."""
        ...

    def fetch(self, keys: Iterable[tuple[int, int]]) -> None:
        """Begin to bring back what these need."""
        ...


class KeptTensor:
    """A tensor as it is now, without its graph; not copied: :meth:`tensor` finds out whether it was written to."""

    __slots__ = ("_kept", "_offloaded", "_requires_grad", "_version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._kept: torch.Tensor | None = tensor.detach()
        self._offloaded: OffloadedTensor | None = None
        self._requires_grad = tensor.requires_grad
        self._version = 0 if tensor.is_inference() else version_of(tensor)

    def move_to(self, store: ActivationStore, key: tuple[int, int]) -> None:
        """Keep it in ``store`` if it is an activation (no ids, no mask), and there already is none in it."""
        kept = self._kept
        if kept is not None and kept.is_floating_point() and not self._is_written(kept):
            self._offloaded, self._kept = store.put(kept, key), None

    def _is_written(self, kept: torch.Tensor) -> bool:
        return not kept.is_inference() and version_of(kept) != self._version

    def tensor(self, what: str) -> torch.Tensor:
        """The tensor as a leaf of its own. Raises RecomputationError if it was written to."""
        if self._offloaded is not None:
            return self._offloaded.get().detach().requires_grad_(self._requires_grad)
        if self._kept is None:
            raise RecomputationError(f"an input of {what} is gone; please report this")
        if self._is_written(self._kept):
            raise RecomputationError(
                f"an input of {what} was written to in place after (or while) it ran, so it cannot be recomputed: use "
                "the operation that returns a new tensor, or x.clone() before"
            )
        return self._kept.detach().requires_grad_(self._requires_grad)


class KeptValue:
    """A value from outside the region, with all that the engine knew of it when it was first used there."""

    def __init__(self, value: StageTensor) -> None:
        self.spec: TensorSpec = value.spec
        self.home = value.home
        self.places = set(value.places)
        self.stale_reason = value.stale_reason
        self.local = None if value.local is None else KeptTensor(value.local)
        self.known_value = value.known_value
        self.aliases: AliasGroup | None = value._aliases


class Record:
    """The record of one region in one program; see the note at the top."""

    def __init__(self) -> None:
        #: The values that the region has made itself.
        self.made: set[int] = set()
        self._kept: dict[int, tuple[weakref.ref[torch.Tensor], KeptValue]] = {}
        self._plain: set[int] = set()  # ordinary tensors that the region has made
        #: What was received, message by message.
        self.received: list[list[KeptTensor]] = []
        self.announced: dict[int, bytes] = {}  # by the number of the operation
        self.num_operations = 0
        #: How this stage reads the values that were pushed.
        self.known_values: list[Callable[[], torch.Tensor] | None] = []
        #: Of the modules that ran here, call by call.
        self.buffers: list[KeptBuffers] = []
        self.glue_buffers: dict[int, torch.Tensor] = {}

    def kept_value(self, value: StageTensor) -> KeptValue:
        """``value`` as it was when the region used it first."""
        known = self._kept.get(id(value))
        if known is not None and known[0]() is value:
            return known[1]
        kept = KeptValue(value)
        self._kept[id(value)] = (weakref.ref(value), kept)
        return kept

    def note_used(self, arguments: Arguments) -> None:
        """Before an operation or a module runs, on any stage."""
        for value in arguments.inputs:
            if value.is_pinned_home:
                local = value.local
                if local is not None and not isinstance(local, nn.Parameter) and id(local) not in self.glue_buffers:
                    self.glue_buffers[id(local)] = local.detach().clone()
            elif id(value) not in self.made:
                self.kept_value(value)
        if arguments.given is arguments.values:
            return
        for given, value in zip(arguments.given, arguments.values, strict=True):
            if value is given or not isinstance(value, StageTensor) or value.is_pinned_home:
                continue
            # An ordinary tensor that has become a value: code in the region refers to the tensor.
            if id(value) not in self.made:
                self._kept[id(given)] = (weakref.ref(given), self.kept_value(value))

    def find(self, tensor: torch.Tensor) -> KeptValue | None:
        """The value that ``tensor`` was, or stood for, when the region ran first."""
        known = self._kept.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else None

    def note_plain(self, result: Any) -> None:
        """Glue in the region has made ordinary tensors."""
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._plain.add(id(base_of(tensor)))

    def check_written(self, tensor: torch.Tensor) -> None:
        """Values are written to an ordinary tensor: only one of the region's own, or the replay would do it twice."""
        if id(base_of(tensor)) not in self._plain:
            raise StepUsageError(
                "a region of the step that is recomputed (activation checkpointing) writes values to a tensor from "
                f"outside of it, of shape {tuple(tensor.shape)}: it would be written to twice. Return the values from "
                "the region, and write them outside"
            )

    def note_received(self, tensors: Sequence[torch.Tensor]) -> None:
        """The tensors of a message, as the program goes on with them."""
        self.received.append([KeptTensor(tensor) for tensor in tensors])

    def note_announced(self, payload: bytes) -> None:
        """What the home of the present operation has announced."""
        self.announced[self.num_operations] = payload

    def module_called(self, module: nn.Module, habits: BufferHabits) -> None:
        """Before a module with buffers runs here."""
        self.buffers.append(KeptBuffers(module, habits))

    def close(self) -> None:
        """The first run is over."""
        self.made.clear()
        self._plain.clear()
        for kept in self.buffers:
            kept.forget_constants()
