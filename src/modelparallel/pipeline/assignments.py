"""Attributes and hooks of modules that glue sets while other microbatches may be under way.

[Note: assignments] Scripts set a flag, a mode, a hook or a recorder in the place of a ``forward`` for the time of one
call, and take it back. Where microbatches take turns, another one would meet it, or take it back too early. What the
first microbatch sets and leaves there (set once and for all) harms nobody. Anything else that shows in the first step
of a kind lets the microbatches run one after another; where it begins later it is an error.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn

from modelparallel.errors import StepUsageError
from modelparallel.pipeline.reachable import MISSING
from modelparallel.torch_compat import FORWARD_HOOKS

_COMPARED = (bool, int, float, complex, str, MethodType)


class Assignments:
    """Of one microbatch, outside the modules that run at their homes."""

    def __init__(self, microbatch: int, *, takes_turns: bool) -> None:
        self._microbatch = microbatch
        self._takes_turns = takes_turns
        self._first: dict[tuple[int, str], tuple[nn.Module, Any]] = {}
        #: Whether another microbatch must not run in between.
        self.is_apart = False

    def note(self, module: nn.Module, name: str, value: Any) -> None:
        """``value`` is about to be set, or registered; or the attribute is about to be deleted.

        Raises StepUsageError where another microbatch would meet it.
        """
        before = vars(module).get(name, MISSING)
        if isinstance(value, (torch.Tensor, nn.Module)) or _is_same(before, value):
            return  # tensors are looked at where they are read
        if name in FORWARD_HOOKS or self._microbatch or (id(module), name) in self._first:
            self._change(module, name)
        else:
            self._first[id(module), name] = module, before

    def _change(self, module: nn.Module, name: str) -> None:
        self.is_apart = True
        if self._takes_turns:
            what = "a hook is registered on" if name in FORWARD_HOOKS else f"attribute '{name}' is set on"
            raise StepUsageError(
                f"{what} a {type(module).__name__} by microbatch {self._microbatch}, while other microbatches are "
                "under way that would meet it: the microbatches take turns on each stage, since in the first step of "
                "this kind nothing was set. Do it in the first step, too (then they run one after another), or once, "
                "outside the step function"
            )


def _is_same(before: Any, value: Any) -> bool:
    return before is value or (type(before) is type(value) and isinstance(value, _COMPARED) and before == value)
