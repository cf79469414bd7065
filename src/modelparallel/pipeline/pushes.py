"""Small outputs of a model, pushed to all stages when they are made, so that any stage may read them without asking.

A stage waits for a pushed value only when it reads it, or at the end of the step. Whatever is read, the values are
received in the order in which their home has sent them, over all microbatches of the step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from modelparallel.comm.transport import MessageKind, MessageName
from modelparallel.pipeline.stage_tensor import StageTensor, TensorSpec
from modelparallel.pipeline.wire import empty_of, wire_view

if TYPE_CHECKING:
    from modelparallel.comm.transport import StageTransport

_WHAT = "a small output of the model"
_TAG = 1


class PushedValues:
    """The pushed values of one step."""

    def __init__(self, transport: StageTransport, device: torch.device) -> None:
        self._transport = transport
        self._device = device
        self._expected: dict[int, list[tuple[MessageName, TensorSpec]]] = {}
        self._received: dict[int, list[torch.Tensor]] = {}

    def push(self, tensor: StageTensor) -> None:
        """Send a value from its home to all other stages; every stage calls this at the same point of the program."""
        home = tensor.home
        if home == self._transport.stage:
            name = MessageName(MessageKind.PUSH, tensor.program.microbatch, tensor.program.next_push())
            local = tensor.program.local(tensor)
            for peer in self._transport.peers():
                self._transport.send_tensors(peer, name, [wire_view(local, tensor.spec)], _WHAT, tag=_TAG)
            detached = local.detach()
            tensor.replica = lambda: detached
            return
        name = MessageName(MessageKind.PUSH, tensor.program.microbatch, tensor.program.next_push())
        expected = self._expected.setdefault(home, [])
        index = len(expected)
        expected.append((name, tensor.spec))
        tensor.replica = lambda: self._value(home, index)

    def receive_all(self) -> None:
        """At the end of the step: receive what was never read."""
        for home, expected in self._expected.items():
            if expected:
                self._value(home, len(expected) - 1)
        self._received.clear()

    def _value(self, home: int, index: int) -> torch.Tensor:
        received = self._received.setdefault(home, [])
        while len(received) <= index:
            name, spec = self._expected[home][len(received)]
            value = empty_of(spec)
            self._transport.receive_tensors(home, name, [wire_view(value, spec)], _WHAT, tag=_TAG)
            received.append(value)
        return received[index].to(self._device)
