"""What happens to the gradients and buffers of one wrapped model over the ranks that hold the same part of it.

Made with the model and told of each step by it: before a forward, before the backward of the last microbatch, at the
end. It puts the parts of ``data_parallel`` and the replicas of the pipeline in order; it reads the parameter table.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from modelparallel.data_parallel import BroadcastTensor, GradientReducer, ReducedParameter, broadcast_parameters
from modelparallel.pipeline.replicas import ReplicatedParameters

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group
    from modelparallel.parameters import ParameterTable
    from modelparallel.plan.parameters import ParameterRow
    from modelparallel.runtime import Runtime
    from modelparallel.shards import ParameterShards


class ModelGradients:
    """The reduction of one model's gradients; the arguments are those of ``smp.DistributedModel``."""

    def __init__(
        self,
        table: ParameterTable,
        runtime: Runtime,
        *,
        overlaps: bool,
        backward_passes_per_step: int,
        bucket_cap_mb: float,
        broadcasts_buffers: bool,
        gradient_as_bucket_view: bool,
    ) -> None:
        self._table = table
        self._runtime = runtime
        self._overlaps = overlaps
        self._backward_passes_per_step = backward_passes_per_step
        self._bucket_cap_mb = bucket_cap_mb
        self._broadcasts_buffers = broadcasts_buffers
        self._gradient_as_bucket_view = gradient_as_bucket_view
        self._reducer: GradientReducer | None = None
        self._replicas: ReplicatedParameters | None = None
        #: The parameters that are shared out among ranks; None if all are whole.
        self.shards: ParameterShards | None = None
        self._has_begun = False
        self._num_backward_steps = 0
        # Counted here as well as in the reducer: before the partition there is none.
        self._num_no_sync = 0

    def start(self) -> None:
        """The local parameters are in place: make them, and the buffers, equal on all holders, and from now on reduce
        gradients among them. Collective over the world.
        """
        session, groups = self._runtime.session, self._runtime.session.groups
        stage = self._runtime.engine.stage
        if self._runtime.is_pipelined:
            self._replicas = ReplicatedParameters.of(self._table, self._runtime.engine.transport)
            if self._replicas is not None:
                self._replicas.make_equal()
        tensors = [
            BroadcastTensor(row.name, tensor, self._group_of(row))
            for source in (self._table.parameters(), self._table.buffers())
            for row, tensor in source
            if self._table.is_local(row, stage)
        ]
        broadcast_parameters(tensors, timeout_seconds=session.config.timeout_seconds)
        if groups.dp.size == 1:
            return
        self._reducer = GradientReducer(
            [
                ReducedParameter(row.name, parameter, self._group_of(row))
                for row, parameter in self._table.parameters()
                if self._table.is_local(row, stage)
            ],
            divisor=groups.dp.size,
            bucket_cap_mb=self._bucket_cap_mb,
            overlap=self._overlaps,
            timeout_seconds=session.config.timeout_seconds,
        )

    def _group_of(self, row: ParameterRow) -> Group:
        groups = self._runtime.session.groups
        return groups.rdp if row.reducer_axis == "rdp" else groups.dp

    # Steps

    def prepare(self, *, is_training: bool) -> None:
        """Before a forward with gradients outside a step function."""
        if self._reducer is not None:
            self._reducer.prepare()
            self._synchronise_buffers(is_training)

    def enter_step(self) -> None:
        """The model is used in a step for the first time."""
        self._has_begun = False

    def begin_step(self, *, is_training: bool) -> None:
        """The model is used in a step with gradients; once is enough."""
        if self._has_begun:
            return
        self._has_begun = True
        # These look at the parameters themselves; the engine would take that for glue of the program.
        with self._runtime.engine.native_region():
            if self._replicas is not None:
                self._replicas.begin_step()
            if self._reducer is not None:
                self._reducer.begin_step(will_synchronize=self._will_synchronize())
                self._synchronise_buffers(is_training)

    def _will_synchronize(self) -> bool:
        """Whether the gradients of this step are made final at its end."""
        is_boundary = (self._num_backward_steps + 1) % self._backward_passes_per_step == 0
        return is_boundary and self._num_no_sync == 0

    def arm(self) -> None:
        """The backward of the last microbatch begins."""
        if self._reducer is not None and self._has_begun:
            self._reducer.arm()

    def finish_step(self, has_backward: bool) -> None:
        """The step function has run; ``has_backward``: some model of the step has called backward, and the gradients
        may have reached this one too. Collective over the groups of the parameters where gradients become final.
        """
        if not self._has_begun:
            return
        if not has_backward:
            self.abort_step()
            return
        will_synchronize = self._will_synchronize()
        self._num_backward_steps += 1
        if self._reducer is not None:
            self._reducer.finish_step()
        if self._replicas is not None and will_synchronize:
            self._replicas.add_up()

    def abort_step(self) -> None:
        """The step ended without a backward, or raised."""
        if self._reducer is not None:
            self._reducer.abort_step()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, gradients are accumulated on each rank."""
        self._num_no_sync += 1
        try:
            with self._reducer.no_sync() if self._reducer is not None else nullcontext():
                yield
        finally:
            self._num_no_sync -= 1

    def _synchronise_buffers(self, is_training: bool) -> None:
        groups = self._runtime.session.groups
        if not self._broadcasts_buffers or groups.dp.size == 1 or not is_training:
            return
        stage = self._runtime.engine.stage
        tensors = [
            BroadcastTensor(row.name, buffer, self._group_of(row))
            for row, buffer in self._table.buffers()
            if row.is_persistent and self._table.is_local(row, stage)
        ]
        if tensors:
            timeout = self._runtime.session.config.timeout_seconds
            broadcast_parameters(tensors, is_checked=False, timeout_seconds=timeout)
