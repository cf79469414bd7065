"""Attributes and hooks of modules that glue sets while other microbatches may be under way.

[Note: assignments] Scripts set a flag, a mode, a hook or a recorder in the place of a ``forward`` for the time of one
call, and take it back. Where microbatches take turns, another one would meet it, or take it back too early. What the
first microbatch sets and leaves there (set once and for all) harms nobody. Anything else that shows in the first step
of a kind lets the microbatches run one after another; where it begins later it is an error.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from modelparallel.errors import StepUsageError
from modelparallel.pipeline.side_doors.kept_state import MISSING, is_same
from modelparallel.torch_compat import FORWARD_HOOKS


class Assignments:
    """The assignments of one microbatch, outside the modules that run at their homes; ``takes_turns``: with other
    microbatches.
    """

    def __init__(self, microbatch: int, *, takes_turns: bool) -> None:
        self._microbatch = microbatch
        self._takes_turns = takes_turns
        self._first: set[tuple[int, str]] = set()

    def note(self, module: nn.Module, name: str, value: Any) -> bool:
        """``value`` is about to be set, or registered; or the attribute is about to be deleted. Returns whether the
        next microbatch would meet it.

        Raises StepUsageError where one that is under way would.
        """
        if isinstance(value, (torch.Tensor, nn.Module)) or is_same(vars(module).get(name, MISSING), value):
            return False  # tensors are looked at where they are read
        if _is_being_made(module):
            return False  # ``nn.CrossEntropyLoss()`` in the step function: no other microbatch has it
        is_again = (id(module), name) in self._first
        if name not in FORWARD_HOOKS and not self._microbatch and not is_again:
            self._first.add((id(module), name))
            return False
        if self._takes_turns:
            what = "a hook is registered on" if name in FORWARD_HOOKS else f"attribute '{name}' is set on"
            raise StepUsageError(
                f"{what} a {type(module).__name__} by microbatch {self._microbatch}, while other microbatches are "
                "under way that would meet it: the microbatches take turns on each stage, since in the first step of "
                "this kind nothing was set. Do it in the first step, too (then they run one after another), or once, "
                "outside the step function"
            )
        return True


def _is_being_made(module: nn.Module) -> bool:
    """Whether an ``__init__`` of the module is under way, which sets the attribute."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        code = frame.f_code
        if code.co_name == "__init__" and code.co_argcount and frame.f_locals.get(code.co_varnames[0]) is module:
            return True
    return False
