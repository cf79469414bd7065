"""Ranks that have caught the exception of a step with sharded parameters, and go on with the next one.

[Note: a step that one rank has left] Such a rank calls the collectives of the next step while the others are in the
middle of theirs: gathers would pair with reductions of other sizes, which ends the process in gloo. If all ranks have
left the step, as by a check that comes out alike everywhere, they may go on. So a rank that has left one says so in the
store, and before it uses the parameters again it waits for the others to have said the same. Steps that end well pay
nothing.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

import torch.distributed as dist

from modelparallel.comm.waits import Wait
from modelparallel.errors import CommunicationError, DivergenceError, WaitTimeoutError
from modelparallel.torch_compat import default_store

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group


class RaisedSteps:
    """The steps that the ranks of ``group`` have left by an exception. Made in the same order on all of them."""

    def __init__(self, group: Group, timeout_seconds: float, *, is_pipelined: bool) -> None:
        self._group = group
        # A stage of a pipeline learns of another one's exception by a CommunicationError, and so do its copies.
        self._follows = WaitTimeoutError if is_pipelined else CommunicationError
        self._timeout = datetime.timedelta(seconds=timeout_seconds)
        name = f"modelparallel/raised steps/{'-'.join(map(str, group.ranks))}"
        store = dist.PrefixStore(name, default_store())
        # Sessions of one process share the store.
        self._store = dist.PrefixStore(str(store.add(f"made by {group.rank_in_group}", 1)), store)
        self._number = 0
        self._is_alone = False

    def note(self, error: BaseException) -> DivergenceError | None:
        """This rank has left a step. Local. Returns what ``error`` comes of: a rank that has caught one of its own."""
        self._number += 1
        # What comes of a rank that is missing is not the same exception on all.
        is_own = not isinstance(error, self._follows)
        self._store.set(self._key(self._group.rank_in_group), "left" if is_own else "failed")
        self._is_alone = True
        missing = [] if is_own else [rank for rank in self._others() if self._has_left(rank)]
        return self._apart(missing[0], self._group.rank_in_group) if missing else None

    def check(self) -> None:
        """Before the parameters are used again: raise DivergenceError if this rank has left a step that others have
        not. Waits for the others then, at most ``timeout_seconds``.
        """
        if not self._is_alone:
            return
        for rank in self._others():
            purpose = "the step before, which this rank has left by an exception"
            wait = Wait(self._group, purpose, self._group.ranks[rank], "word that it has left it, too")
            try:
                with wait.around():
                    self._store.wait([self._key(rank)], self._timeout)
            except RuntimeError as error:
                raise self._apart(self._group.rank_in_group, rank) from error
            if not self._has_left(rank):
                raise self._apart(self._group.rank_in_group, rank)
        self._is_alone = False

    def _key(self, rank: int) -> str:
        return f"{self._number}/{rank}"

    def _others(self) -> list[int]:
        return [rank for rank in range(self._group.size) if rank != self._group.rank_in_group]

    def _has_left(self, rank: int) -> bool:
        return self._store.check([self._key(rank)]) and self._store.get(self._key(rank)) == b"left"

    def _apart(self, left: int, stays: int) -> DivergenceError:
        ranks = self._group.ranks
        return DivergenceError(
            f"global rank {ranks[left]} has caught an exception of smp.step and goes on, but global rank "
            f"{ranks[stays]} has not left that step: the ranks {list(ranks)}, which share sharded parameters, are not "
            "at the same step. An exception that is caught must be one of all of them: let them agree before the step "
            "(smp.allgather(flag, smp.DP_GROUP)), or let it end the job"
        )
