"""Ordinary tensors that a program has written values with a home into.

Such a tensor (zeros that glue fills row by row, a running sum outside the model) exists on every stage, but after the
writing only the home has its value: within the program it counts as a StageTensor from then on. If it outlives the
microbatch, the home sends its value to the other stages, so that it is an ordinary tensor again.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any, Protocol

import torch

from modelparallel.comm.stages.transport import MessageKind, MessageName
from modelparallel.pipeline.program.first_run import Record
from modelparallel.pipeline.program.turns import Sightings
from modelparallel.pipeline.values.in_place import element_range
from modelparallel.pipeline.values.stage_tensor import AliasGroup, StageTensor, TensorSpec, is_dense, storage_address
from modelparallel.pipeline.values.stage_view import StageView
from modelparallel.pipeline.values.wire import TENSORS_PER_MESSAGE, receive_tensors, send_tensors
from modelparallel.torch_compat import num_storage_users
from modelparallel.torch_compat.private_parts import is_view


class Writer(Protocol):
    """What these tensors need of the program that writes to them (:class:`Program`)."""

    engine: StageView
    microbatch: int
    stage: int
    carries_state: bool
    sightings: Sightings | None
    region: Record | None

    def new(
        self, spec: TensorSpec, home: int, local: torch.Tensor | None, aliases: AliasGroup | None = None
    ) -> StageTensor:
        """A value that ``home`` has computed."""
        ...

    def local(self, tensor: StageTensor) -> torch.Tensor:
        """The tensor itself; only where it is."""
        ...

    def note_value(self, source: int) -> bool:
        """All stages wait for a value of ``source`` now."""
        ...

    def next_event(self, description: str) -> int:
        """The number of the event that happens now."""
        ...

    def wait_for(self, source: int, name: MessageName, description: str) -> None:
        """Before a message is taken that all stages but its sender need."""
        ...


class WrittenTensors:
    """The written ordinary tensors of one program, and those that share memory with them."""

    def __init__(self) -> None:
        # Kept alive, or their ids and addresses would be given to others. (No reference to the program: a cycle would
        # keep it alive after the step.)
        self._entries: dict[int, tuple[torch.Tensor, StageTensor]] = {}
        self._last_at: dict[int, StageTensor] = {}  # by address of the memory

    def add(self, program: Writer, tensor: torch.Tensor, home: int) -> StageTensor:
        """From now on ``tensor`` is a value with a home; every stage calls this at the same point of the program."""
        if program.sightings is not None:
            program.sightings.used(program.microbatch, tensor, is_written=True)
        if program.region is not None:
            program.region.check_written(tensor)
        return self._note(tensor, program.new(TensorSpec.of(tensor), home, self._here(program, tensor, home)))

    def assign(self, tensor: torch.Tensor | None, value: StageTensor) -> torch.Tensor:
        """The ordinary tensor that gets the value when the microbatch ends: ``tensor``, or a new one if it does not
        fit.
        """
        spec = value.spec
        if tensor is None or tuple(tensor.shape) != tuple(spec.shape) or tensor.dtype != spec.dtype:
            tensor = torch.empty(spec.shape, dtype=spec.dtype, device=value.program.device)
        self._note(tensor, value)
        return tensor

    def find(self, program: Writer, leaf: torch.Tensor) -> StageTensor | None:
        """The value that ``leaf`` has become, if it or a tensor that shares its memory was written to."""
        if program.sightings is not None:
            program.sightings.used(program.microbatch, leaf, is_written=False)
        if not self._entries:
            return None
        entry = self._entries.get(id(leaf))
        if entry is not None:
            return entry[1]
        other = self._last_at.get(_address(leaf))
        if other is None:
            return None
        # Only the home's own tensor can tell whether it requires grad, so that the rule is the same everywhere.
        spec = replace(TensorSpec.of(leaf), requires_grad=other.spec.requires_grad)
        local = self._here(program, leaf, other.home)
        is_current = local is None or other.local is None or _address(other.local) == _address(leaf)
        if not is_current:
            local = self._in_new_version(leaf, other.home)
            local = leaf if local is None else local
        elif local is not None and local.requires_grad != spec.requires_grad:
            local = local.detach().requires_grad_(spec.requires_grad)
        value = program.new(spec, other.home, local, other.aliases)
        if local is leaf and not is_current:
            value.mark_stale(
                "a tensor is used that shares memory with one that values of the pipeline were written to, of which a "
                "new version was made in between: take views (slices, reshapes) again after the writing"
            )
        return self._note(leaf, value)

    def _in_new_version(self, leaf: torch.Tensor, home: int) -> torch.Tensor | None:
        """The view of a written tensor's present value that ``leaf`` is of its first one."""
        first, last = element_range(leaf)
        for tensor, value in self._entries.values():
            if value.local is None or value.home != home or value.stale_reason is not None:
                continue
            start, end = element_range(tensor)
            if _address(tensor) != _address(leaf) or first < start or last > end or tensor.dtype != leaf.dtype:
                continue
            if tensor.stride() == value.local.stride() and is_dense(tuple(tensor.shape), tensor.stride()):
                offset = int(leaf.storage_offset()) - start + int(value.local.storage_offset())
                return value.local.as_strided(leaf.shape, leaf.stride(), offset)
        return None

    def _note(self, tensor: torch.Tensor, value: StageTensor) -> StageTensor:
        self._entries[id(tensor)] = (tensor, value)
        self._last_at[_address(tensor)] = value
        return value

    @staticmethod
    def _here(program: Writer, tensor: torch.Tensor, home: int) -> torch.Tensor | None:
        return tensor if home == program.stage else None

    def settle(self, program: Writer) -> None:
        """At the end of the microbatch: give every stage the values of those that live on."""
        entries = list(self._entries.values())
        self.clear()
        for home in sorted({value.home for _, value in entries}):
            there = [entry for entry in entries if entry[1].home == home]
            for start in range(0, len(there), TENSORS_PER_MESSAGE):
                self._share(program, home, there, range(start, min(start + TENSORS_PER_MESSAGE, len(there))))

    @staticmethod
    def _share(program: Writer, home: int, entries: list[tuple[torch.Tensor, StageTensor]], part: range) -> None:
        transport = program.engine.transport
        program.note_value(home)
        number = program.next_event(f"tensors written to on pp_rank {home}")
        name = MessageName(MessageKind.VALUE, program.microbatch, number)
        what = "tensors that values of the pipeline were written to"
        specs = [entries[index][1].spec for index in part]
        if home != program.stage:
            program.wait_for(home, name, what)
            for index, received in zip(part, receive_tensors(transport, home, name, specs, what), strict=True):
                if received is not None:
                    program.carries_state = True
                    with torch.no_grad():
                        entries[index][0].copy_(received)
            return
        sent: list[torch.Tensor | None] = []
        for index in part:
            if not _lives_on(entries, index):
                sent.append(None)
                continue
            tensor, value = entries[index]
            local = program.local(value)
            if _address(local) != _address(tensor):
                with torch.no_grad():
                    tensor.copy_(local)
            program.carries_state = True
            sent.append(local)
        for peer in transport.peers():
            send_tensors(transport, peer, name, sent, specs, what)

    def clear(self) -> None:
        """Let go of everything."""
        self._entries.clear()
        self._last_at.clear()


def _address(tensor: Any) -> int:
    address = storage_address(tensor)
    return -id(tensor) if address is None else address


def _num_references(entries: list[tuple[torch.Tensor, Any]], index: int) -> int:
    return sys.getrefcount(entries[index][0])


def _lives_on(entries: list[tuple[torch.Tensor, StageTensor]], index: int) -> bool:
    """Whether something beside the program may read the tensor later: a reference to it, or to its memory."""
    # How many references the counting itself takes depends on the version of Python.
    own = _num_references([(torch.empty(0), None)], 0)
    tensor, value = entries[index]
    local = value.local
    own += 1 + (local is tensor) + (value.local is tensor)  # the variables here
    if _num_references(entries, index) > own or is_view(tensor):
        return True
    if value.spec.requires_grad:
        return False  # what autograd has saved of it does not count
    shares = local is not None and local is not tensor and _address(local) == _address(tensor)
    return num_storage_users(tensor) > 1 + shares
