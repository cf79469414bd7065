"""``model.join()``: data-parallel ranks with different numbers of batches (smp-api section 5).

What is announced, and what a rank that ran out does in each event, is put together here; the protocol is that of
data_parallel/joining.py. All stages of a pipeline, and all ranks of a TP_GROUP, run out together, so that each
data-parallel group joins for itself.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from torch.distributed.algorithms.join import Join

from modelparallel.data_parallel import JoinEvents
from modelparallel.errors import SMPConfigError, StepUsageError

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group
    from modelparallel.data_parallel import GradientReducer
    from modelparallel.parameters.table import ParameterTable
    from modelparallel.training.participants import ParameterHolder
    from modelparallel.training.runtime import Runtime

REDUCTION = "the reduction of gradients"
BUFFERS = "the broadcast of buffers"


class JoinedGradients(Protocol):
    """The gradients of the model that joins."""

    @property
    def reducer(self) -> GradientReducer | None:
        """None before the partition."""

    def send_buffers(self) -> None:
        """Broadcast the buffers."""

    def send_everything(self) -> None:
        """Broadcast parameters and buffers."""

    def begin_join(self) -> None:
        """The context manager is entered."""

    def end_join(self) -> None:
        """It is left."""


class ModelJoin:
    """The events of one model inside ``join``; made with the model, at work inside the context manager."""

    def __init__(self, runtime: Runtime, table: ParameterTable, gradients: JoinedGradients) -> None:
        session = runtime.session
        self._runtime = runtime
        self._table = table
        self._gradients = gradients
        self._divides_by_initial = True
        # Those whose updates are collective over the data-parallel ranks, inside the context manager.
        self._optimizers: list[ParameterHolder] = []
        self._is_updating_beside = False
        group = session.groups.dp
        self._group = group
        self._events = JoinEvents(group, session.device, session.config.timeout_seconds, self._finish)
        self._events.on(REDUCTION, self._shadow_reduction)
        self._events.on(BUFFERS, gradients.send_buffers)

    @property
    def is_joining(self) -> bool:
        """Whether the context manager is entered, and enabled."""
        return self._events.is_joining

    def announce_update(self, optimizer: ParameterHolder) -> None:
        """The optimizer begins an update of shards, which is collective over the data-parallel ranks; nothing outside
        join(), and nothing for an update that a rank without batches does beside.
        """
        if self._optimizers and not self._is_updating_beside:
            position = next((index for index, other in enumerate(self._optimizers) if other is optimizer), None)
            if position is not None:
                self._events.announce(_update_by(position))

    def _shadow_update(self, optimizer: ParameterHolder) -> None:
        self._is_updating_beside = True
        try:
            optimizer.step()
        finally:
            self._is_updating_beside = False

    def _follow_optimizers(self) -> None:
        """A rank that runs out of batches goes on updating its shards, since nobody else has their state."""
        self._optimizers = self._runtime.optimizers_of(self._table)
        if not self._optimizers:
            raise StepUsageError(
                "model.join() with shard_optimizer_state: wrap the optimizer in smp.DistributedOptimizer before, since "
                "ranks that ran out of batches go on updating their shards"
            )
        for position, optimizer in enumerate(self._optimizers):
            self._events.on(_update_by(position), functools.partial(self._shadow_update, optimizer))

    def _forget_optimizers(self) -> None:
        for position in range(len(self._optimizers)):
            self._events.forget(_update_by(position))
        self._optimizers = []

    def announce_buffers(self) -> None:
        """A broadcast of buffers comes."""
        self._events.announce(BUFFERS)

    def announce_reduction(self) -> tuple[int, int]:
        """A reduction comes. Returns what gradients are divided by, and the number of ranks at work."""
        self._events.announce(REDUCTION)
        return self._divisor_and_number()

    def _divisor_and_number(self) -> tuple[int, int]:
        number = sum(self._events.at_work)
        return (self._group.size if self._divides_by_initial else number), number

    def _shadow_reduction(self) -> None:
        reducer = self._gradients.reducer
        assert reducer is not None
        reducer.shadow_reduction(*self._divisor_and_number())

    def source_of(self, group: Group) -> int:
        """The first rank_in_group that is at work, or was so last: whose buffers count."""
        if not self._events.is_joining:
            return 0
        working = {rank for rank, is_working in zip(self._group.ranks, self._events.at_work, strict=True) if is_working}
        return next((index for index, rank in enumerate(group.ranks) if rank in working), 0)

    @contextmanager
    def join(self, *, divides_by_initial: bool, is_enabled: bool, throws: bool) -> Iterator[None]:
        """The context manager; collective over DP_GROUP."""
        config = self._runtime.session.config
        if not config.ddp:
            raise SMPConfigError("model.join() needs ddp: True: there are no other ranks that could have more batches")
        if self._group.size == 1 or not is_enabled:
            yield
            return
        if config.sharded_data_parallel_degree > 1:
            raise SMPConfigError(
                f"model.join() with sharded_data_parallel_degree: {config.sharded_data_parallel_degree}: ranks gather "
                "parameters from each other in the forward, also from those that ran out of batches: give all ranks "
                "equally many (drop_last=True)"
            )
        if self._events.is_joining:
            raise StepUsageError("model.join() inside model.join(): one is enough")
        if config.shard_optimizer_state:
            self._follow_optimizers()
        self._divides_by_initial = divides_by_initial
        self._events.is_joining = True
        self._gradients.begin_join()
        try:
            with Join([self._events], True, throws):
                yield
                if self._gradients.reducer is None:
                    raise StepUsageError(
                        "model.join(): this rank ran out of batches before the model was partitioned, which all ranks "
                        "do together at the first step: give every rank at least one batch"
                    )
        finally:
            self._events.is_joining = False
            self._forget_optimizers()
            self._gradients.end_join()

    def _finish(self) -> None:
        """All ranks have run out: parameters and buffers are those of one that went on longest."""
        self._gradients.send_everything()


def _update_by(position: int) -> str:
    return f"the update by optimizer {position}"
