"""Uneven numbers of batches: ranks that ran out take part in what the others still do, by torch's generic ``Join``.

[Note: events] Inside ``Join`` every group of collectives among the data-parallel ranks is an *event*: a broadcast of
buffers, a reduction of gradients, an update of shards. A rank that is still at work announces each: it notifies
``Join`` and says which event comes. A rank that ran out waits in ``Join`` for the next announcement and plays its own,
empty part in that event. So nothing needs to be known of how many forwards, backwards and updates make an iteration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join, Joinable, JoinHook

from modelparallel.comm.waits import Wait
from modelparallel.errors import DivergenceError

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group


class JoinEvents(Joinable):
    """The events of one group. ``finish()`` is called on all ranks when all have run out; then ``at_work`` is said of
    those that went on longest.
    """

    def __init__(self, group: Group, device: torch.device, timeout_seconds: float, finish: Callable[[], None]) -> None:
        super().__init__()
        #: Whether announcements are to be made.
        self.is_joining = False
        #: Of each rank of the group whether it was at work at the last event.
        self.at_work: tuple[bool, ...] = (True,) * group.size
        self._group = group
        self._device = device
        self._timeout_seconds = timeout_seconds
        self._finish = finish
        self._shadows: dict[str, Callable[[], None]] = {}

    def on(self, event: str, shadow: Callable[[], None]) -> None:
        """``shadow()`` is what a rank that ran out does in this event; the same events on all ranks."""
        self._shadows[event] = shadow

    def forget(self, event: str) -> None:
        """There is no such event any more."""
        del self._shadows[event]

    def announce(self, event: str) -> None:
        """An event comes: called by all ranks that are at work, in one order. Nothing outside ``Join``.

        Raises RuntimeError where a rank ran out and ``throw_on_early_termination`` was asked for, DivergenceError
        where the ranks announce different events.
        """
        if not self.is_joining:
            return
        work = Join.notify_join_context(self)
        if work is not None:
            wait = Wait(self._group, f"the announcement of {event}", seconds=self._timeout_seconds)
            wait.end(work, self._device)
        self._exchange(event)

    def _exchange(self, event: str | None) -> str:
        """Which event it is; None: this rank ran out."""
        names = sorted(self._shadows)
        number = -1 if event is None else names.index(event)
        numbers = self._gather(number, "the kind of the next event inside join()")
        self.at_work = tuple(other >= 0 for other in numbers)
        announced = sorted({other for other in numbers if other >= 0})
        if len(announced) > 1:
            raise DivergenceError(
                f"inside model.join() the ranks {list(self._group.ranks)} do different things at the same time: "
                f"{', '.join(names[other] for other in announced)}. Those that have batches left must call the model, "
                "backward and the optimizer in the same order"
            )
        return names[announced[0]]

    def _gather(self, number: int, purpose: str) -> list[int]:
        own = torch.tensor([number], dtype=torch.int64, device=self._device)
        gathered = [torch.empty_like(own) for _ in self._group.ranks]
        wait = Wait(self._group, purpose, seconds=self._timeout_seconds)
        process_group = self._group.process_group
        wait.run(lambda: dist.all_gather(gathered, own, process_group, async_op=True), self._device)
        return torch.cat(gathered).tolist()

    def shadow_next(self) -> None:
        """Take part in the next event with nothing to give; called by ``Join``."""
        self._shadows[self._exchange(None)]()

    def end(self, is_last: bool) -> None:
        """All ranks have run out; called by ``Join``."""
        self.at_work = tuple(number > 0 for number in self._gather(int(is_last), "the end of join()"))
        self._finish()

    # Joinable

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """What ``Join`` calls."""
        return _EventHook(self)

    @property
    def join_device(self) -> torch.device:
        """Where the messages of ``Join`` are."""
        return self._device

    @property
    def join_process_group(self) -> Any:
        """Over which they go."""
        return self._group.process_group


class _EventHook(JoinHook):
    def __init__(self, events: JoinEvents) -> None:
        self._events = events

    def main_hook(self) -> None:
        self._events.shadow_next()

    def post_hook(self, is_last_joiner: bool) -> None:
        self._events.end(is_last_joiner)
