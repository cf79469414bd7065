"""A record of the operations that make tensors, and running the part of it that one tensor needs.

[Note: what a tensor needs] Each deferred tensor has a `Handle`: the operation that made it, and the storage that it
looks at. A storage knows the operations that wrote to it, in order. The value of a tensor is made by the operation that
made it, and by the writers of its storage, from the last one that wrote all of it on; if that is not the operation
that made the storage, then of that one only the memory is needed. Operations need values of their own arguments *as
they were then*: they carry numbers, larger than those of all earlier operations on the same storages (Lamport's clocks,
so that nothing is shared between models), and only smaller numbers count.

[Note: random numbers] An operation that draws keeps the state that its generator had. Its replay starts from that
state, so that it draws what it would have drawn at once, whichever other operations are replayed or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from modelparallel import trees
from modelparallel.deferred.host_heap import FreedMemory
from modelparallel.errors import DeferredTensorError
from modelparallel.torch_compat import dispatch_modes_off
from modelparallel.torch_compat.generators import default_generator
from modelparallel.torch_compat.private_parts import version_of


class TapeStorage:
    """The operations that wrote to one storage, the one that made it first, and the number of the last that used it."""

    def __init__(self) -> None:
        self.writers: list[Operation] = []
        self.last = 0


@dataclass(eq=False)
class Handle:
    """A tensor on the tape: output ``index`` of ``producer``, looking at ``storage``."""

    producer: Operation
    index: int
    storage: TapeStorage

    @property
    def key(self) -> tuple[int, int]:
        """What stands for the tensor during a replay."""
        return id(self.producer), self.index


# Not dataclasses: those are containers to `trees`, and these two are leaves.
class Reference:
    """In the recorded arguments: a deferred tensor. ``is_read``: its values count, not only where they lie."""

    def __init__(self, handle: Handle, is_read: bool) -> None:
        self.handle, self.is_read = handle, is_read


class Constant:
    """In the recorded arguments: a tensor that exists. It may not be written to before the replay."""

    def __init__(self, tensor: torch.Tensor, version: int | None) -> None:
        self.tensor, self.version = tensor, version

    def value(self, function: Any) -> torch.Tensor:
        """The tensor, unless it was written to since."""
        if self.version is not None and version_of(self.tensor) != self.version:
            raise DeferredTensorError(
                f"a tensor of shape {tuple(self.tensor.shape)} was given to {function} on a parameter whose "
                "initialisation is delayed, and was changed before the parameter was placed, so that the parameter "
                "cannot be made as it would have been: give it a copy (tensor.clone())"
            )
        return self.tensor


@dataclass(frozen=True)
class RandomState:
    """The state of the generator of ``device``, or of the user's own ``generator``, before an operation drew."""

    device: torch.device
    generator: torch.Generator | None
    state: torch.Tensor


@dataclass(frozen=True)
class StorageLayout:
    """What memory an output with a storage of its own takes."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(eq=False)
class Operation:
    """One recorded call.

    overwritten: the storage of which it writes every element without reading any.
    is_uninitialised: it stands for a tensor of the meta device, and makes memory that nobody has filled.
    made: the layouts of those outputs whose storages it makes, by their index.
    """

    function: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    number: int
    default_dtype: torch.dtype
    random: RandomState | None = None
    overwritten: TapeStorage | None = None
    is_uninitialised: bool = False
    made: dict[int, StorageLayout] = field(default_factory=dict)
    references: list[Reference] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.references = [
            leaf for leaf in trees.leaves((self.arguments, self.keywords)) if isinstance(leaf, Reference)
        ]


@dataclass
class Needed:
    """``operations`` make some tensors, in this order; of those in ``memory_only``, by identity, only the memory is
    needed; ``is_unfilled``: a value comes from memory that nobody has filled.
    """

    operations: list[Operation]
    memory_only: set[int]
    is_unfilled: bool


def needed_for(handles: Sequence[Handle]) -> Needed:
    """What must run to make the tensors of ``handles`` with the values that they have now."""
    needed: dict[int, Operation] = {}
    memory_only: set[int] = set()
    is_unfilled = False
    waiting: list[tuple[Operation, bool]] = []  # and whether it must run: its memory may be enough

    def need_values(storage: TapeStorage, before: float) -> None:
        nonlocal is_unfilled
        writers = [operation for operation in storage.writers if operation.number < before]
        first = max((index for index, each in enumerate(writers) if each.overwritten is storage), default=0)
        if writers and writers[first].is_uninitialised:
            is_unfilled = True
        waiting.extend((operation, True) for operation in writers[first:])

    for handle in handles:
        waiting.append((handle.producer, False))
        need_values(handle.storage, float("inf"))
    while waiting:
        operation, must_run = waiting.pop()
        must_run = must_run or not operation.made
        if id(operation) in needed and not (must_run and id(operation) in memory_only):
            continue
        needed[id(operation)] = operation
        memory_only.discard(id(operation))
        if not must_run:
            memory_only.add(id(operation))
            continue
        for reference in operation.references:
            waiting.append((reference.handle.producer, False))
            if reference.is_read:
                need_values(reference.handle.storage, operation.number)
    return Needed(sorted(needed.values(), key=lambda each: each.number), memory_only, is_unfilled)


# Of all replays, which are many and small: see [Note: holes in the heap].
_freed = FreedMemory()


@torch.no_grad()
def replay(handles: Sequence[Handle]) -> list[torch.Tensor]:
    """Make the tensors of ``handles``, with real storage; those that share storage on the tape share it here.

    What is made on the way is freed after its last use. The random generators end as they were.
    """
    needed = needed_for(handles)
    last_use = {
        reference.handle.key: operation
        for operation in needed.operations
        if id(operation) not in needed.memory_only
        for reference in operation.references
    }
    wanted = {handle.key for handle in handles}
    values: dict[tuple[int, int], torch.Tensor] = {}
    with dispatch_modes_off():
        for operation in needed.operations:
            if id(operation) in needed.memory_only:
                for index, layout in operation.made.items():
                    key = (id(operation), index)
                    if key in wanted or key in last_use:
                        values[key] = torch.empty_strided(
                            layout.size, layout.stride, dtype=layout.dtype, device=layout.device
                        )
                continue
            result = _run(operation, values)
            for index, output in enumerate(result if isinstance(result, list | tuple) else (result,)):
                key = (id(operation), index)
                if isinstance(output, torch.Tensor) and (key in wanted or key in last_use):
                    values[key] = output
            del result
            for reference in operation.references:
                key = reference.handle.key
                if key not in wanted and last_use[key] is operation and key in values:
                    _freed.add(values.pop(key))
    _freed.trim_if_much()
    return [values[handle.key] for handle in handles]


def _run(operation: Operation, values: dict[tuple[int, int], torch.Tensor]) -> Any:
    def real(leaf: Any) -> Any:
        if isinstance(leaf, Reference):
            return values[leaf.handle.key]
        return leaf.value(operation.function) if isinstance(leaf, Constant) else leaf

    arguments, keywords = trees.map_leaves(real, (operation.arguments, operation.keywords))
    with ExitStack() as stack:
        if torch.get_default_dtype() != operation.default_dtype:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(operation.default_dtype)
        if operation.random is not None:
            # On a generator of the replay's own, or the default one for its time: the user's goes on where it is.
            generator = operation.random.generator
            if generator is None:
                generator = default_generator(operation.random.device)
            stack.callback(generator.set_state, generator.get_state())
            generator.set_state(operation.random.state)
        return operation.function(*arguments, **keywords)
