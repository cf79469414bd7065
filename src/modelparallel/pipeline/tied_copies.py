"""Tied copies, of one parameter on several stages, kept equal: the sum of their gradients is the gradient of each.

[Note: tied copies] Modules that share a parameter and lie far apart may each have a copy at home (``tied_weights``), so
that no microbatch has to come back to one stage. In the backward every copy gets the gradient of its own uses. When
the step is over, after the reduction over the data-parallel ranks, the holders exchange what was added since the last
exchange, and all add it up in the same order: to the bit the same gradient everywhere, so the same weights for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from modelparallel.comm.stages.transport import MessageKind, MessageName, StageTransport
from modelparallel.parameters.table import ParameterTable
from modelparallel.pipeline.values.stage_tensor import TensorSpec
from modelparallel.pipeline.values.wire import receive_tensors, send_tensors

_START = -1  # in place of a microbatch, in the names of messages: the values to start with
_GRADIENTS = -2


@dataclass(frozen=True)
class TiedCopy:
    """This stage's copy of a parameter; ``holders`` are all stages that have one, the home first."""

    name: str
    parameter: torch.nn.Parameter
    holders: tuple[int, ...]


class TiedCopies:
    """The tied copies that this stage holds, in an order that is the same on all stages."""

    def __init__(self, transport: StageTransport, copies: Sequence[tuple[int, TiedCopy]]) -> None:
        """``copies`` come with a number that is the same on all holders."""
        self._transport = transport
        self._copies = tuple(copies)
        self._before: dict[int, torch.Tensor | None] = {}  # gradients that were exchanged already

    @classmethod
    def of(cls, table: ParameterTable, transport: StageTransport) -> TiedCopies | None:
        """The tied copies of a model; None if this stage holds none."""
        numbered = [
            (number, TiedCopy(row.name, parameter, row.holders))
            for number, (row, parameter) in enumerate(table.parameters())
            if row.tied_copies and transport.stage in row.holders
        ]
        return cls(transport, numbered) if numbered else None

    def make_equal(self) -> None:
        """Take over the home's values; collective over the holders."""
        for number, copy in self._copies:
            name = MessageName(MessageKind.VALUE, _START, number)
            spec = TensorSpec.of_gradient(copy.parameter)
            what = f"the value of '{copy.name}'"
            home = copy.holders[0]
            if home == self._transport.stage:
                for peer in copy.holders[1:]:
                    send_tensors(self._transport, peer, name, [copy.parameter.detach()], [spec], what)
                continue
            value = receive_tensors(self._transport, home, name, [spec], what)[0]
            if value is not None:
                with torch.no_grad():
                    copy.parameter.copy_(value)

    def begin_step(self) -> None:
        """A step with gradients begins: remember the gradients that are exchanged already."""
        for number, copy in self._copies:
            gradient = copy.parameter.grad
            if gradient is None or (number in self._before and not bool(gradient.any())):
                self._before[number] = None  # taken away (zero_grad) since the last step
            elif number not in self._before:
                self._before[number] = gradient.detach().clone()

    def add_up(self) -> None:
        """Give every copy the sum of the gradients; collective over the holders, after the last backward."""
        own: dict[int, torch.Tensor | None] = {}
        for number, copy in self._copies:
            gradient, before = copy.parameter.grad, self._before.get(number)
            own[number] = gradient if gradient is None or before is None else gradient - before
            spec = TensorSpec.of_gradient(copy.parameter)
            for peer in copy.holders:
                if peer != self._transport.stage:
                    name = MessageName(MessageKind.VALUE, _GRADIENTS, number)
                    send_tensors(self._transport, peer, name, [own[number]], [spec], _what(copy))
        for number, copy in self._copies:
            self._sum(number, copy, own[number])
        self._before.clear()
        self._transport.drain()

    def _sum(self, number: int, copy: TiedCopy, own: torch.Tensor | None) -> None:
        parameter, total = copy.parameter, self._before.get(number)
        spec = TensorSpec.of_gradient(parameter)
        name = MessageName(MessageKind.VALUE, _GRADIENTS, number)
        for stage in sorted(copy.holders):
            part = own
            if stage != self._transport.stage:
                part = receive_tensors(self._transport, stage, name, [spec], _what(copy))[0]
            if part is not None:
                part = part.to(parameter.device)
                total = part if total is None else total + part
        if total is None:
            return
        if parameter.grad is None:
            parameter.grad = total.detach().clone()
        else:
            with torch.no_grad():
                parameter.grad.copy_(total)


def _what(copy: TiedCopy) -> str:
    return f"the gradient of '{copy.name}'"
