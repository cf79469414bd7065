"""Buffers of modules that are run twice: the second run must see what the first saw, and leave them as they are.

A BatchNorm in a recomputed region would otherwise count every batch twice. The second run works on stand-ins.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from modelparallel.torch_compat.private_parts import version_of


class BufferHabits:
    """Which buffers runs of regions have changed so far, by id: found out in the first run of each.

    By their values, since a BatchNorm's statistics do not count how often they are written to.
    """

    def __init__(self) -> None:
        self.constant: set[int] = set()
        self.changing: set[int] = set()


class KeptBuffers:
    """The buffers of a module in training mode before its first run, with copies of those that may change."""

    def __init__(self, module: nn.Module, habits: BufferHabits) -> None:
        self._habits = habits
        # (the module that owns it, its name, the buffer, its version, a copy or None where it never changed so far)
        self._entries: list[tuple[nn.Module, str, torch.Tensor, int, torch.Tensor | None]] = []
        for owner in module.modules():
            if not owner._buffers or not owner.training:
                continue
            for name, buffer in owner._buffers.items():
                if buffer is not None and not buffer.is_inference():
                    copied = None if id(buffer) in habits.constant else buffer.detach().clone()
                    self._entries.append((owner, name, buffer, version_of(buffer), copied))

    def forget_constants(self) -> None:
        """After the first run: buffers that have not changed need no copy, in this and in later runs."""
        habits, changed = self._habits, []
        for entry in self._entries:
            owner, name, buffer, version, copied = entry
            if id(buffer) not in habits.changing:
                is_same = owner._buffers.get(name) is buffer and version_of(buffer) == version
                if is_same and (copied is None or torch.equal(buffer, copied)):
                    habits.constant.add(id(buffer))
                    continue
                habits.constant.discard(id(buffer))
                habits.changing.add(id(buffer))
            changed.append(entry)
        self._entries = changed

    @contextmanager
    def stand_ins(self) -> Iterator[None]:
        """Inside, the module has copies of its buffers as they were before the first run."""
        present = [owner._buffers.get(name) for owner, name, *_ in self._entries]
        for owner, name, value, _, copied in self._entries:
            # Where it changed for the first time in this run there is no older copy than that of now.
            owner._buffers[name] = value.detach().clone() if copied is None else copied.clone()
        try:
            yield
        finally:
            for (owner, name, *_), buffer in zip(self._entries, present, strict=True):
                owner._buffers[name] = buffer
