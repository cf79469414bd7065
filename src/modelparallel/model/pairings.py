"""Loops over the parameters of a partitioned model beside a second list: ``zip(average.parameters(), ...)``.

After the partition the model's list has what this rank holds. Beside a list of the whole model, as a copy from before
wrapping gives it, zip would pair the wrong ones, and stop early, without a word. So in code that calls zip the
iterators look at what they are zipped with, once for each place in the code.
"""

from __future__ import annotations

import gc
import sys
import types
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from modelparallel.errors import StepUsageError

T = TypeVar("T")
#: A place in the script's code, and the model whose parameters it goes through.
Place = tuple[types.CodeType, int]


def place_with_zip(depth: int) -> Place | None:
    """Where the caller's caller is, if its code calls zip. Quick."""
    frame = sys._getframe(depth)
    return (frame.f_code, frame.f_lasti) if "zip" in frame.f_code.co_names else None


class PairedIterator(Iterator[T]):
    """``values``, of which the model has ``num_here`` on this rank and ``num_all`` in all."""

    def __init__(self, values: Iterator[T], num_here: int, num_all: int, checked: set[Place], place: Place) -> None:
        self._values, self._num_here, self._num_all = values, num_here, num_all
        self._checked, self._place = checked, place

    def __next__(self) -> T:
        if self._place not in self._checked:
            self._check()
            self._checked.add(self._place)
        return next(self._values)

    def _check(self) -> None:
        # zip keeps the iterators that it goes through in a tuple.
        for holder in gc.get_referrers(self):
            if type(holder) is not tuple or self._num_here == self._num_all:
                continue
            if any(_length(other) == self._num_all for other in holder if other is not self):
                raise StepUsageError(
                    f"zip of a list of {self._num_all} parameters and those of a partitioned model, of which this rank "
                    f"holds {self._num_here}, would pair the wrong ones\n"
                    "  wrong: for a, p in zip(average.parameters(), model.parameters()): a.lerp_(p, 0.1)\n"
                    "  right: smp.average_weights(average, model, 0.9)  # or smp.copy_weights(target, model)\n"
                    "  right: own = dict(average.named_parameters())\n"
                    "         for name, p in model.named_parameters(): own[name].lerp_(p, 0.1)"
                )


def _length(iterator: Any) -> int | None:
    """How many parameters another iterator goes through, if that can be told."""
    if isinstance(iterator, types.GeneratorType):
        owner = None if iterator.gi_frame is None else iterator.gi_frame.f_locals.get("self")
        is_plain = isinstance(owner, nn.Module) and iterator.gi_code.co_name in ("parameters", "named_parameters")
        return sum(1 for _ in owner.parameters()) if is_plain and owner is not None else None
    if type(iterator) in (type(iter([])), type(iter(()))):
        content = iterator.__reduce__()[1][0]
        return len(content)
    return None
