"""The order in which the reducers of one step begin: the same on all ranks, whenever their gradients are ready.

[Note: one order] A reducer launches its full buckets in a fixed order during the last backward. With two models in a
step the buckets of both would be launched as the gradients come, and these need not come in one order on all ranks: a
stage of a pipeline runs the backwards whose messages are there, and the last microbatch of one copy is not that of
another. Messages of one group are told apart by their order alone, so that one model would get the gradients of the
other: in silence, if they are as long. So a reducer waits here until those before it have launched all that they launch
early, and at the end of the step what is left of that comes before everything else.
"""

from __future__ import annotations

import threading
from typing import Protocol


class EarlyReducer(Protocol):
    """A reducer that is at work in a step."""

    def launch_full_buckets(self) -> bool:
        """Launch the next buckets that are full; whether all early ones are launched."""

    def launch_early_buckets(self) -> None:
        """Launch the early buckets that are left."""


class LaunchOrder:
    """The order of the reducers of one step."""

    def __init__(self) -> None:
        self._waiting: list[EarlyReducer] = []
        self._lock = threading.RLock()  # CUDA runs hooks in threads of the autograd engine, one per device

    def add(self, reducer: EarlyReducer) -> None:
        """``reducer`` begins to launch, after the reducers that were added before. The same calls on all ranks."""
        with self._lock:
            self._waiting.append(reducer)

    def launch(self) -> None:
        """A bucket of one of the reducers is full."""
        with self._lock:
            while self._waiting and self._waiting[0].launch_full_buckets():
                self._waiting.pop(0)

    def finish(self) -> None:
        """The backwards are done. Collective over the groups of the parameters."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
            for reducer in waiting:
                reducer.launch_early_buckets()
