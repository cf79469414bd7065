"""The second run of a region of the program, on this stage alone.

[Note: replay] The function of the region runs through the same engine as in the first run, and takes the same
decisions, since it starts from the same symbolic state: values from outside are *shadows* with the home, the places and
the tensor that they had then. Modules and operations at home here compute; what other stages have sent comes from the
record; nothing is sent, announced or written to the tape. The second run is over as soon as all that this stage had
saved is there.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from modelparallel.comm.stages.transport import MessageName
from modelparallel.errors import RecomputationError
from modelparallel.pipeline.program.first_run import KeptValue, Record
from modelparallel.pipeline.program.program import Program
from modelparallel.pipeline.program.randomness import RandomFrames
from modelparallel.pipeline.schedule.chains import ChainTracker
from modelparallel.pipeline.values.stage_tensor import AliasGroup, StageTensor
from modelparallel.pipeline.values.structures import Structure


class ReplayProgram(Program):
    """Stands in for the program of a microbatch while a region of it runs again; see the note at the top."""

    is_replay = True

    def __init__(self, of: Program, record: Record, frames: RandomFrames | None, what: str) -> None:
        super().__init__(of.engine, of.microbatch, frames or of.frames, ChainTracker(), of.structures, of.weight)
        self._of = of
        self._first_run = record
        self._what = what
        self._shadows: dict[int, StageTensor] = {}
        self._groups: dict[int, AliasGroup] = {}
        self._num_received = self._num_known_values = self._num_buffers = 0
        self._num_operations = 0

    def _other_way(self) -> RecomputationError:
        return RecomputationError(
            f"the recomputation of {self._what} goes another way than its first run: it must not depend on what has "
            "changed since (a counter, an attribute, a value from outside)"
        )

    # Values

    def shadow(self, kept: KeptValue) -> StageTensor:
        """The value of this program that stands for ``kept``."""
        known = self._shadows.get(id(kept))
        if known is not None:
            return known
        group = None
        if kept.aliases is not None:
            group = self._groups.setdefault(id(kept.aliases), AliasGroup())
        local = None if kept.local is None else kept.local.tensor(self._what)
        value = self._shadows[id(kept)] = self.new(kept.spec, kept.home, local, group)
        value.places = set(kept.places)
        value.stale_reason = kept.stale_reason
        value.known_value = kept.known_value
        if kept.known_value is not None and local is not None:
            value.known_value = local.detach
        return value

    def resolve(self, leaf: Any, *, keeps_graph: bool = False) -> Any:
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, nn.Parameter):
            if isinstance(leaf, StageTensor) and leaf.program is self:
                return leaf
            kept = self._first_run.find(leaf)
            if kept is not None:
                return self.shadow(kept)
            if isinstance(leaf, StageTensor) and leaf.program is self._of:
                if leaf.is_pinned_home:
                    return leaf
                raise self._other_way()
        return super().resolve(leaf, keeps_graph=keeps_graph)

    def returned(self, leaf: Any) -> Any:
        if isinstance(leaf, StageTensor) and leaf.program is self._of and not leaf.is_pinned_home:
            kept = self._first_run.find(leaf)
            return leaf if kept is None else self.shadow(kept)
        return super().returned(leaf)

    def parameter(self, tensor: torch.Tensor) -> StageTensor:
        known = super().parameter(tensor)
        if known.local is tensor and not isinstance(tensor, nn.Parameter):
            copied = self._first_run.glue_buffers.get(id(tensor), tensor)
            known.local = copied.detach().clone()
        return known

    def check_leaves(self) -> None:
        """Checked by the program itself."""

    # Events: none

    def _move(self, tensors: list[StageTensor], source: int, destination: int, description: str) -> None:
        if self.stage == source:
            self._cut()
        elif self.stage == destination:
            self._cut()
            if self._num_received >= len(self._first_run.received):
                raise self._other_way()
            received = self._first_run.received[self._num_received]
            self._num_received += 1
            if len(received) != len(tensors):
                raise self._other_way()
            for tensor, kept in zip(tensors, received, strict=True):
                tensor.local = kept.tensor(self._what)
        for tensor in tensors:
            tensor.places.add(destination)

    def next_event(self, description: str, source: int = -1, destination: int = -1) -> int:
        return 0

    def note_value(self, source: int) -> bool:
        return True

    def wait_for(self, source: int, name: MessageName, description: str, *, is_planned: bool = True) -> None:
        raise self._other_way()

    def announce(self, source: int, payload: Callable[[], bytes], description: str, *, is_always: bool) -> bytes | None:
        if self.stage == source:
            return None
        known = self._first_run.announced.get(self._num_operations)
        if known is None:
            raise self._other_way()
        return known

    def keep_structure(self, key: Hashable, structure: Structure, *, is_known: bool) -> None:
        """All that was found out is known."""

    def begin_operation(self) -> None:
        self._num_operations += 1

    def replays_push(self, tensor: StageTensor) -> bool:
        if self._num_known_values >= len(self._first_run.known_values):
            raise self._other_way()
        tensor.known_value = self._first_run.known_values[self._num_known_values]
        self._num_known_values += 1
        return True

    def around_call(self, module: nn.Module) -> AbstractContextManager[None]:
        if self._num_buffers >= len(self._first_run.buffers):
            raise self._other_way()
        self._num_buffers += 1
        return self._first_run.buffers[self._num_buffers - 1].stand_ins()

    def check_root(self) -> None:
        raise self._other_way()
