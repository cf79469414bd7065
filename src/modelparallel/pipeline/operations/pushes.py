"""Small outputs of a model, pushed to all stages when they are made, so that any stage may read them without asking.

A stage waits for a pushed value only when it reads it; what is never read stays in the mailbox until the step is over.
"""

from __future__ import annotations

import torch

from modelparallel.comm.stages.transport import MessageKind, MessageName
from modelparallel.pipeline.program.program import Program
from modelparallel.pipeline.values.stage_tensor import StageTensor, TensorSpec
from modelparallel.pipeline.values.wire import receive_tensors, send_tensors

_WHAT = "a small output of the model"


def push(program: Program, tensor: StageTensor) -> None:
    """Send a value from its home to all other stages; every stage calls this at the same point of the program."""
    if program.replays_push(tensor):
        return
    name = MessageName(MessageKind.PUSH, program.microbatch, program.next_push())
    if tensor.home != program.stage:
        tensor.known_value = _Pushed(program, tensor.home, name, tensor.spec).value
    else:
        transport = program.engine.transport
        detached = program.local(tensor).detach()
        for peer in transport.peers():
            send_tensors(transport, peer, name, [detached], [tensor.spec], _WHAT)
        tensor.known_value = lambda: detached
    if program.region is not None:
        program.region.known_values.append(tensor.known_value)


class _Pushed:
    """A pushed value on a stage that is not its home: received when it is first read."""

    def __init__(self, program: Program, home: int, name: MessageName, spec: TensorSpec) -> None:
        self._program = program
        self._home = home
        self._name = name
        self._spec = spec
        self._value: torch.Tensor | None = None

    def value(self) -> torch.Tensor:
        """The value, waited for if need be."""
        if self._value is None:
            program = self._program
            program.check_open()
            program.wait_alone_for(self._home, self._name, _WHAT)
            received = receive_tensors(program.engine.transport, self._home, self._name, [self._spec], _WHAT)[0]
            self._value = torch.empty(0) if received is None else received.to(program.device)
        return self._value
