"""What happens to the gradients and buffers of one wrapped model over the ranks that hold the same part of it.

Made with the model and told of each step by it: before a forward, before the backward of the last microbatch, at the
end. It puts the parts of ``data_parallel`` and the tied copies of the pipeline in order; it reads the parameter table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from modelparallel.config.topology import GroupKind
from modelparallel.data_parallel import (
    BroadcastTensor,
    CommHook,
    GradientReducer,
    OptimizerShards,
    ReducedParameter,
    SharedParameter,
    broadcast_parameters,
    shareable,
)
from modelparallel.data_parallel.launch_order import LaunchOrder
from modelparallel.data_parallel.own_parts import mark_own_parts
from modelparallel.data_parallel.raised_steps import RaisedSteps
from modelparallel.deferred.deferred import is_deferred
from modelparallel.deferred.host_heap import trim_heap
from modelparallel.errors import SMPConfigError
from modelparallel.model.creation import place_deferred
from modelparallel.model.initial_weights import agree_between_copies
from modelparallel.model.joining import ModelJoin
from modelparallel.model.sharding import shard_parameters
from modelparallel.pipeline.tied_copies import TiedCopies

if TYPE_CHECKING:
    import torch
    from torch import nn

    from modelparallel.comm.groups import Group
    from modelparallel.data_parallel.sharding import ShardedParameters
    from modelparallel.parameters.shards import ParameterShards
    from modelparallel.parameters.table import ParameterTable
    from modelparallel.plan.rows import ParameterRow
    from modelparallel.training.runtime import Runtime


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
        finds_unused_parameters: bool,
    ) -> None:
        self._table = table
        self._runtime = runtime
        self._overlaps = overlaps
        self._backward_passes_per_step = backward_passes_per_step
        self._bucket_cap_mb = bucket_cap_mb
        self._broadcasts_buffers = broadcasts_buffers
        self._gradient_as_bucket_view = gradient_as_bucket_view
        self._finds_unused_parameters = finds_unused_parameters
        #: None while there is nothing to reduce: before the partition, or with one data-parallel rank.
        self.reducer: GradientReducer | None = None
        self._tied_copies: TiedCopies | None = None
        self._comm_hook: CommHook | None = None
        #: The parameters that are shared out among ranks; None if all are whole.
        self.shards: ParameterShards | None = None
        # The same, if the parameters themselves are sharded.
        self.sharding: ShardedParameters | None = None
        # What earlier steps have left at ``p.grad``, by id, while a step with weighted losses runs.
        self._aside: dict[int, torch.Tensor | None] | None = None
        #: Whether the running step uses the model with gradients.
        self.has_begun = False
        # Steps that were left by an exception, where parameters are sharded.
        self._raised: RaisedSteps | None = None
        self._num_backward_steps = 0
        # Whether something waits for storage until parameters are sharded.
        self._has_late = False
        # Whether the weights of the data-parallel copies were compared.
        self._has_agreed = False
        # Counted here as well as in the reducer: before the partition there is none.
        self._num_no_sync = 0
        #: What is announced inside ``model.join()``.
        self.joining = ModelJoin(runtime, table, self)

    def start(self, module: nn.Module, units: Sequence[str], cast: Callable[[nn.Module, set[int]], None]) -> None:
        """The local parameters are in place: make them, and the buffers, equal on all holders, shard the parameters
        that are to be sharded, and from now on reduce gradients. Collective over the world.

        ``units``: the names of the modules in ``module`` that run here. ``cast(module, kept)``: casts what is not
        sharded and not ``kept`` (identities) to the precision that the model is to compute in.
        """
        session, groups = self._runtime.session, self._runtime.session.groups
        if self._runtime.is_pipelined:
            self._tied_copies = TiedCopies.of(self._table, self._runtime.engine.transport)
            if self._tied_copies is not None:
                self._tied_copies.make_equal()
        self._make_equal(lambda tensor: not is_deferred(tensor))
        self._has_late = any(is_deferred(tensor) for _, tensor in self._everything())
        if groups.dp.size == 1:
            return
        self.sharding = shard_parameters(
            module,
            units,
            self._table,
            self._runtime,
            finds_unused=self._finds_unused_parameters,
            place=self._place_late,
        )
        self.shards = self.sharding
        if self.sharding is not None:
            cast(module, {id(value) for value in module.parameters() if self.sharding.has(value)})
            self._raised = RaisedSteps(
                self.sharding.shard_group, session.config.timeout_seconds, is_pipelined=self._runtime.is_pipelined
            )
        local = list(self._local(self._table.parameters()))
        if self.sharding is not None:
            mark_own_parts([parameter for _, parameter in local], self.sharding)
        own_shards = self._share_out(local) if session.config.shard_optimizer_state else None
        if own_shards is not None:
            self.shards = own_shards
        self.reducer = GradientReducer(
            [
                ReducedParameter(row.name, parameter, self._group_of(row))
                for row, parameter in local
                if self.sharding is None or not self.sharding.has(parameter)
            ],
            divisor=groups.dp.size,
            bucket_cap_mb=self._bucket_cap_mb,
            overlap=self._overlaps,
            as_views=self._gradient_as_bucket_view,
            shards=own_shards,
            timeout_seconds=session.config.timeout_seconds,
            progress=lambda: (self._runtime.num_training_steps, self._runtime.num_updates),
        )
        if self.joining.is_joining:
            self.reducer.begin_join(self.joining.announce_reduction)
        if self._comm_hook is not None:
            self.reducer.register_comm_hook(self._comm_hook)

    def _make_equal(self, is_wanted: Callable[[torch.Tensor], bool]) -> None:
        """Give the parameters and buffers that are wanted the values of the first rank that holds them."""
        self._broadcast(((row, tensor) for row, tensor in self._everything() if is_wanted(tensor)), is_checked=True)

    def _place_late(self, part: nn.Module, others: set[int]) -> None:
        """Before parameters are sharded: the tensors of ``part`` that wait for storage get it, but for ``others``."""
        if not self._has_late:
            return
        inside = [tensor for tensor in (*part.parameters(), *part.buffers()) if is_deferred(tensor)]
        rows = [(self._table.row_of(tensor), tensor) for tensor in inside if id(tensor) not in others]
        waiting = list(self._local((row, tensor) for row, tensor in rows if row is not None))
        if waiting:
            trim_heap()  # of the whole parameters of the part before this one
            ids = {id(tensor) for _, tensor in waiting}
            place_deferred(part, self._runtime.session.device, lambda tensor: id(tensor) in ids)
            self._broadcast(waiting, is_checked=True)

    def register_comm_hook(self, state: object, function: Callable[..., Any]) -> None:
        """Reduce gradients by a communication hook; before or after the partition. See `DistributedModel`."""
        config = self._runtime.session.config
        if not config.ddp:
            raise SMPConfigError(
                "model.register_comm_hook needs ddp: True: there is no gradient reduction to hook into"
            )
        if not self._overlaps:
            raise SMPConfigError(
                "model.register_comm_hook needs overlapping_allreduce=True, but the model was wrapped with "
                "overlapping_allreduce=False: leave it out"
            )
        if config.shard_optimizer_state or config.sharded_data_parallel_degree > 1:
            key = "shard_optimizer_state" if config.shard_optimizer_state else "sharded_data_parallel_degree"
            raise SMPConfigError(
                f"model.register_comm_hook: with {key} gradients go to the owners of shards alone, which a hook does "
                "not do: use one of the two"
            )
        if not callable(function):
            raise SMPConfigError(
                f"model.register_comm_hook: expected a function hook(state, bucket), got {function!r}: the state comes "
                "first, register_comm_hook(state, hook)"
            )
        if self._comm_hook is not None:
            raise SMPConfigError(
                f"model.register_comm_hook: the model has the hook {self._comm_hook.title} already; it takes one"
            )
        hook = CommHook(state, function)
        groups = {id(group): group for group in (self._group_of(row) for row, _ in self._table.parameters())}
        hook.check_state(list(groups.values()))
        self._comm_hook = hook
        if self.reducer is not None:
            self.reducer.register_comm_hook(hook)

    def _share_out(self, local: Sequence[tuple[ParameterRow, nn.Parameter]]) -> OptimizerShards | None:
        """Sharding of the optimizer state; copies on several stages stay whole, since their gradients are added up."""
        session, groups = self._runtime.session, self._runtime.session.groups
        possible = shareable(parameter for _, parameter in local)
        shared = [
            SharedParameter(
                row.name,
                parameter,
                self._group_of(row),
                is_counted=row.split is not None or row.reducer_axis == "dp" or groups.tp.rank_in_group == 0,
            )
            for row, parameter in local
            if id(parameter) in possible and not row.tied_copies and self._group_of(row).size > 1
        ]
        if not shared:
            return None
        return OptimizerShards(
            shared,
            divisor=groups.dp.size,
            bucket_cap_mb=self._bucket_cap_mb,
            timeout_seconds=session.config.timeout_seconds,
        )

    def _group_of(self, row: ParameterRow) -> Group:
        return self._runtime.session.groups.of(GroupKind(row.reducer_axis))

    # Memory

    @property
    def are_views_of_buckets(self) -> bool:
        """Whether final gradients are views of the reduction buckets, by ``gradient_as_bucket_view``."""
        return self._gradient_as_bucket_view

    def flat_tensors(self) -> list[torch.Tensor]:
        """The flat memory of the reduction, as far as it is there."""
        buckets = () if self.reducer is None else self.reducer.buckets
        return [flat for bucket in buckets if (flat := bucket.flat) is not None]

    # Steps

    def prepare(self, *, is_training: bool) -> None:
        """Before a forward outside a step function."""
        if self.sharding is not None:
            self._check_raised()
            self.sharding.prepare()
        if self.reducer is not None and torch.is_grad_enabled():
            self.reducer.prepare()
            self._synchronise_buffers(is_training)

    def end_forward(self) -> None:
        """After it: without gradients nothing else follows."""
        if self.sharding is not None and not torch.is_grad_enabled():
            self.sharding.free()

    def enter_step(self) -> None:
        """The model is used in a step for the first time."""
        self.has_begun = False
        if self.sharding is not None:
            self._check_raised()
            with self._runtime.engine.natively():
                self.sharding.enter_step()

    def begin_step(self, *, is_training: bool) -> None:
        """The model is used in a step with gradients; once is enough."""
        if self.has_begun:
            return
        self.has_begun = True
        if self._tied_copies is None and self.reducer is None and self.sharding is None:
            return
        # These look at the parameters themselves; the engine would take that for glue of the program.
        with self._runtime.engine.natively():
            if self._tied_copies is not None:
                self._tied_copies.begin_step()
            if self.reducer is not None:
                if is_training:
                    self._agree_once()
                self.reducer.begin_step(will_synchronize=self._will_synchronize())
                self._synchronise_buffers(is_training)
            if self.sharding is not None:
                self.sharding.begin_step(self._will_synchronize())

    def _check_raised(self) -> None:
        if self._raised is not None:
            self._raised.check()

    def _agree_once(self) -> None:
        """What one rank alone has loaded or drawn since :meth:`start` is found."""
        if self._has_agreed:
            return
        self._has_agreed = True
        if self.joining.is_joining:
            return
        entries = [
            BroadcastTensor(row.name, parameter, self._group_of(row))
            for row, parameter in self._local(self._table.parameters())
            if self.sharding is None or not self.sharding.has(parameter)
        ]
        agree_between_copies(entries, self._runtime.session.config.timeout_seconds)

    def _will_synchronize(self) -> bool:
        """Whether the gradients of this step are made final at its end."""
        is_boundary = (self._num_backward_steps + 1) % self._backward_passes_per_step == 0
        return is_boundary and self._num_no_sync == 0

    def arm(self, launches: LaunchOrder) -> None:
        """The backward of the last microbatch begins; ``launches``: the order of the step's reducers."""
        if self.reducer is not None and self.has_begun:
            self.reducer.arm(launches)
        if self.sharding is not None and self.has_begun:
            self.sharding.arm()

    def set_aside(self) -> None:
        """The first backward of a step with weighted losses begins: what is to be multiplied with what the step adds
        begins at nothing. Local.
        """
        if self.reducer is not None:
            self.reducer.make_local()
        if self.sharding is not None:
            self.sharding.set_aside()
        self._aside = {}
        for _, parameter in self._whole_here():
            self._aside[id(parameter)] = parameter.grad
            parameter.grad = None

    def put_back(self, factor: float | None, done: set[int]) -> None:
        """Such a step is over: its gradients are multiplied by ``factor`` and added to what was set aside; None: they
        are let go. ``done``: parameters, by id, that another model has seen to. Local.
        """
        aside, self._aside = self._aside, None
        if aside is None:
            return
        if self.sharding is not None:
            self.sharding.put_back(factor)
        with torch.no_grad():
            for _, parameter in self._whole_here():
                if id(parameter) in done:
                    continue
                done.add(id(parameter))
                before, gradient = aside.get(id(parameter)), parameter.grad
                if gradient is None or factor is None:
                    parameter.grad = before
                    continue
                gradient.mul_(factor)
                if before is not None:
                    parameter.grad = before.add_(gradient) if before.layout is torch.strided else before + gradient
        if factor is not None and self.reducer is not None:
            self.reducer.arm(LaunchOrder())  # no backward follows, so that nothing is launched early

    def _whole_here(self) -> Iterator[tuple[ParameterRow, nn.Parameter]]:
        """The parameters of this rank whose gradients are at ``p.grad`` until they are reduced."""
        return (
            (row, parameter)
            for row, parameter in self._local(self._table.parameters())
            if self.sharding is None or not self.sharding.has(parameter)
        )

    def finish_step(self, has_backward: bool) -> bool:
        """The step function has run; ``has_backward``: some model of the step has called backward, and the gradients
        may have reached this one too. Collective over the groups of the parameters where gradients become final.
        Returns whether they were reduced over the data-parallel ranks.
        """
        if self.sharding is not None and not (self.has_begun and has_backward):
            self.sharding.free()
        if not self.has_begun:
            return False
        if not has_backward:
            self.abort_step()
            return False
        will_synchronize = self._will_synchronize()
        self._num_backward_steps += 1
        if self.reducer is not None:
            self.reducer.finish_step()
        if self.sharding is not None:
            self.sharding.finish_step()
        if self._tied_copies is not None and will_synchronize:
            self._tied_copies.add_up()
        return will_synchronize and self.reducer is not None

    def abort_step(self, error: BaseException | None = None) -> Exception | None:
        """The step ended without a backward, or raised ``error``. Returns what that comes of, if it is known."""
        cause = None if error is None or self._raised is None else self._raised.note(error)
        if self.reducer is not None:
            self.reducer.abort_step()
        if self.sharding is not None:
            self.sharding.abort_step()
        return cause

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, gradients are accumulated on each rank."""
        self._num_no_sync += 1
        if self.sharding is not None:
            self.sharding.enter_no_sync()
        try:
            with self.reducer.no_sync() if self.reducer is not None else nullcontext():
                yield
        finally:
            self._num_no_sync -= 1
            if self.sharding is not None:
                self.sharding.leave_no_sync()

    def forget(self, *, set_to_none: bool) -> None:
        """``zero_grad`` of the parameters that are shared out. Local."""
        if self.shards is not None:
            self.shards.forget_gradients(set_to_none=set_to_none)

    # Buffers, and ranks with fewer batches

    def _synchronise_buffers(self, is_training: bool) -> None:
        if not self._broadcasts_buffers or self._runtime.session.groups.dp.size == 1 or not is_training:
            return
        if any(row.is_persistent for row, _ in self._local(self._table.buffers())):
            self.joining.announce_buffers()
            self.send_buffers()

    def send_buffers(self) -> None:
        """Make the persistent buffers equal to those of the first rank that is at work; collective over the groups."""
        self._broadcast((row, buffer) for row, buffer in self._local(self._table.buffers()) if row.is_persistent)

    def send_everything(self) -> None:
        """Make parameters and buffers equal to those of a rank that was at work last; collective over the groups."""
        self._broadcast(self._everything())

    def _everything(self) -> Iterator[tuple[ParameterRow, torch.Tensor]]:
        """The parameters that this rank holds, then its buffers."""
        yield from self._local(self._table.parameters())
        yield from self._local(self._table.buffers())

    def _local(self, source: Iterable[tuple[ParameterRow, Any]]) -> Iterator[tuple[ParameterRow, Any]]:
        stage = self._runtime.engine.stage
        return ((row, tensor) for row, tensor in source if self._table.is_local(row, stage))

    def _broadcast(self, source: Iterable[tuple[ParameterRow, torch.Tensor]], *, is_checked: bool = False) -> None:
        entries = []
        for row, tensor in source:
            group = self._group_of(row)
            entries.append(BroadcastTensor(row.name, tensor, group, self.joining.source_of(group)))
        timeout = self._runtime.session.config.timeout_seconds
        broadcast_parameters(entries, is_checked=is_checked, timeout_seconds=timeout)

    def begin_join(self) -> None:
        """Ranks may run out of batches from now on; called by `ModelJoin`."""
        if self.reducer is not None:
            self.reducer.begin_join(self.joining.announce_reduction)

    def end_join(self) -> None:
        """All ranks are together again; called by `ModelJoin`. They have not made equally many passes."""
        self._num_backward_steps = 0
        self._runtime.num_training_steps = self._runtime.num_updates = 0
        if self.reducer is not None:
            self.reducer.end_join()
