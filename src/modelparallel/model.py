"""``smp.DistributedModel``: the wrapper that replaces, partitions, places and synchronises a model (smp-api sections 5 and 6)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from modelparallel import model_states, registry, trees
from modelparallel import runtime as runtime_module
from modelparallel.data_parallel import BroadcastTensor, GradientReducer, ReducedParameter, broadcast_parameters
from modelparallel.errors import NotBuiltError, PartitionError, SMPConfigError, StepUsageError
from modelparallel.module_view import attach_module_attribute
from modelparallel.parameters import ParameterTable
from modelparallel.partitioning import Trace, find_units, log_plan, make_plan, trace_step
from modelparallel.pipeline.stage_tensor import StageTensor
from modelparallel.plan.partition import PartitionPlan
from modelparallel.ranks_and_messages import allgather
from modelparallel.runtime import RunningStep, Runtime
from modelparallel.tensor_parallel.distributed_module import DistributedModule
from modelparallel.tensor_parallel.replace import replace_marked_modules
from modelparallel.topology import CommGroup

logger = logging.getLogger("modelparallel")

Hook = Callable[["DistributedModel", Any], Any]


class DistributedModel(nn.Module):
    """Wraps the user's model; use it in place of the model from then on. Collective over the world.

    Without pipelining (pp=1) modules marked for tensor parallelism are replaced, parameters are placed on the device and made equal over the
    data-parallel ranks at once; ``model(x)`` and ``loss.backward()`` then also work outside a step function. With pipelining the modules are
    replaced at once and the model is partitioned at the first step call; calls outside a step function raise StepUsageError.

    Arguments:
        module: any ``nn.Module``, built alike on every rank.
        trace_device: "cpu" or "gpu": where the first step is traced.
        trace_execution_times: take measured times and not FLOPs as the costs of the partitioner (not with trace_device="cpu").
        trace_memory_usage: take measured memory where it is more than the saved tensors.
        overlapping_allreduce: reduce gradients while the backward still runs.
        backward_passes_per_step: number of step calls (or backward passes) whose gradients are summed before they are reduced.
        average_grads_across_microbatches: gradients are the mean over the microbatches; False: their sum.
        bucket_cap_mb: size of the reduction buckets in MB.
        broadcast_buffers: make persistent buffers equal to those of the first data-parallel rank at each training step.
        gradient_as_bucket_view, find_unused_parameters: accepted; gradients are never views of buckets, and unused parameters always work.

    Source: smp-api section 5.
    """

    def __init__(
        self,
        module: nn.Module,
        trace_device: str = "gpu",
        trace_execution_times: bool = False,
        overlapping_allreduce: bool = True,
        backward_passes_per_step: int = 1,
        average_grads_across_microbatches: bool = True,
        bucket_cap_mb: float = 25,
        trace_memory_usage: bool = False,
        broadcast_buffers: bool = True,
        gradient_as_bucket_view: bool = False,
        find_unused_parameters: bool = False,
    ) -> None:
        _check_arguments(module, trace_device, trace_execution_times, backward_passes_per_step, bucket_cap_mb)
        super().__init__()
        runtime = runtime_module.current()
        active = runtime.session
        # Kept out of nn.Module's registries: plain objects.
        self.__dict__["_runtime"] = runtime
        self._trace_device = trace_device
        self._trace_execution_times = trace_execution_times
        self._trace_memory_usage = trace_memory_usage
        self._overlap = overlapping_allreduce
        self._backward_passes_per_step = backward_passes_per_step
        self._average_grads = average_grads_across_microbatches
        self._bucket_cap_mb = bucket_cap_mb
        self._broadcast_buffers = broadcast_buffers
        self._reducer: GradientReducer | None = None
        self._plan: PartitionPlan | None = None
        self._is_partitioned = False
        self._has_called_backward = False
        self._num_backward_steps = 0
        self._overrides: list[tuple[nn.Module, int]] = []
        self._post_partition_hooks: dict[int, Hook] = {}
        self._post_step_hooks: dict[int, Hook] = {}
        self._has_run_post_partition_hooks = False
        self._has_run_post_step_hooks = False

        before = dict(module.named_parameters(remove_duplicate=False))
        module = replace_marked_modules(module, active.groups.tp, match_weights=active.config.match_weights)
        for name, parameter in module.named_parameters(remove_duplicate=False):
            old = before.get(name)
            if old is not None and old is not parameter:
                runtime.replaced[id(old)] = (old, parameter)
        self.module = module
        attach_module_attribute(module)
        self._units = find_units(module)
        self._check_sync_batch_norm()
        if not runtime.is_pipelined:
            module.to(active.device)
        self._table = ParameterTable(module)
        active.models.append(self)
        if not runtime.is_pipelined:
            for name in self._units:
                runtime.engine.frame_unit(module.get_submodule(name), name)
            self._synchronise_start()
            self._is_partitioned = True

    # Calls

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model. With pipelining only inside a function decorated with ``@smp.step``."""
        step = self._runtime.step
        if step is None:
            if self._runtime.is_pipelined:
                raise StepUsageError(
                    "with pipeline_parallel_degree > 1 the model can only be called inside a step function\n"
                    "  wrong: loss = criterion(model(x), y)\n"
                    "  right: @smp.step\n"
                    "         def train_step(model, x, y):\n"
                    "             loss = criterion(model(x), y)\n"
                    "             model.backward(loss)\n"
                    "             return loss"
                )
            self._run_post_partition_hooks()
            if torch.is_grad_enabled() and self._reducer is not None:
                self._reducer.prepare()
                self._synchronise_buffers()
            return self.module(*args, **kwargs)
        if step.is_tracing:
            return self.module(*args, **kwargs)
        self._enter_step(step)
        output = self.module(*args, **kwargs)
        if self._runtime.is_pipelined:
            self._push_small_outputs(output)
        return output

    def backward(
        self,
        tensors: torch.Tensor | Sequence[torch.Tensor],
        grad_tensors: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    ) -> None:
        """In place of ``tensors.backward(grad_tensors)`` inside a step function; with pipelining it runs at the end of the step.

        Gradients are averaged over the microbatches, weighted by their samples (``average_grads_across_microbatches``). Source: smp-api
        section 5.
        """
        roots = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        if grad_tensors is None or isinstance(grad_tensors, torch.Tensor):
            seeds: list[torch.Tensor | None] = [grad_tensors] * len(roots)
        else:
            seeds = list(grad_tensors)
        if len(seeds) != len(roots):
            raise StepUsageError(f"model.backward: {len(roots)} tensors but {len(seeds)} gradients; give one for each")
        step = self._runtime.step
        if step is None:
            if self._runtime.is_pipelined:
                raise StepUsageError("model.backward can only be called inside a function decorated with @smp.step")
            torch.autograd.backward(roots, seeds)
            return
        if step.is_tracing:
            return
        self._enter_step(step)
        self._has_called_backward = True
        scale = step.weight if self._average_grads else 1.0
        program = self._runtime.engine.program
        if program is not None:
            with self._runtime.engine.native_region():
                program.backward_root(roots, seeds, scale)
            return
        if step.is_last_microbatch:
            self.arm()
        if scale != 1.0:
            seeds = [_scaled_seed(root, seed, scale) for root, seed in zip(roots, seeds, strict=True)]
        torch.autograd.backward(roots, seeds)

    def _push_small_outputs(self, output: Any) -> None:
        program = self._runtime.engine.program
        limit = self._runtime.engine.push_limit_bytes
        if program is None:
            return
        with self._runtime.engine.native_region():
            for leaf in trees.leaves(output):
                if isinstance(leaf, StageTensor) and leaf.spec.num_bytes <= limit and leaf.replica is None:
                    program.push(leaf)

    # Steps

    def _enter_step(self, step: RunningStep) -> None:
        if self in step.models:
            return
        step.models.append(self)
        self._has_called_backward = False
        if self._reducer is not None and torch.is_grad_enabled():
            is_boundary = (self._num_backward_steps + 1) % self._backward_passes_per_step == 0
            # The reducer looks at the parameters themselves; the engine would take that for glue of the program.
            with self._runtime.engine.native_region():
                self._reducer.begin_step(will_synchronize=is_boundary)
                if self.training:
                    self._synchronise_buffers()

    def arm(self) -> None:
        """The backward of the last microbatch begins."""
        if self._reducer is not None:
            self._reducer.arm()

    def finish_step(self) -> None:
        """The step function has run: reduce gradients, run the hooks that wait for the first step. Called by smp.step."""
        if self._has_called_backward:
            self._num_backward_steps += 1
            if self._reducer is not None:
                self._reducer.finish_step()
        elif self._reducer is not None:
            self._reducer.abort_step()
        if not self._has_run_post_step_hooks:
            self._has_run_post_step_hooks = True
            for hook in list(self._post_step_hooks.values()):
                hook(self, self._optimizer())

    def abort_step(self) -> None:
        """The step function raised. Called by smp.step."""
        if self._reducer is not None:
            self._reducer.abort_step()

    def no_sync(self) -> AbstractContextManager[None]:
        """Inside, gradients are accumulated on each rank; the first backward outside reduces them too, as in DDP."""
        return self._reducer.no_sync() if self._reducer is not None else nullcontext()

    # Partition

    @property
    def partitioned(self) -> bool:
        """Whether the model has been partitioned: at the first step call, or at once without pipelining."""
        return self._is_partitioned

    @property
    def partition_plan(self) -> PartitionPlan | None:
        """The frozen plan; None before the partition and without pipelining."""
        return self._plan

    def set_partition(self, module: nn.Module, index: int) -> None:
        """Place an existing module on a stage (``smp.set_partition``)."""
        if self._is_partitioned and self._runtime.is_pipelined:
            raise PartitionError("smp.set_partition: the model is already partitioned; call it before the first step")
        self._overrides.append((module, index))

    def _make_plan(self, trace: Trace | None) -> PartitionPlan:
        config = self._runtime.session.config
        return make_plan(
            self.module,
            config.pipeline_parallel_degree,
            units=self._units,
            trace=trace,
            memory_weight=config.memory_weight,
            num_microbatches=config.microbatches,
            active_microbatches=config.active_microbatches,
            is_automatic=config.auto_partition,
            marks=registry.partition_mark,
            overrides=self._overrides,
            default_partition=config.default_partition,
            load_from=config.partition_file if config.load_partition else None,
        )

    def _trace(self, run: Callable[[], None]) -> Trace:
        device = self._runtime.session.device
        if device.type == "cuda" and self._trace_device == "gpu":
            self.module.to(device)
        return trace_step(
            self.module,
            self._units,
            run,
            measure_times=self._trace_execution_times,
            measure_memory=self._trace_memory_usage,
        )

    def place(self, plan: PartitionPlan) -> None:
        """Give every module its home according to the plan; collective over the world."""
        runtime = self._runtime
        engine = runtime.engine
        self._plan = plan
        if runtime.session.groups.world.rank_in_group == 0:
            log_plan(plan)
        homes = {row.name: plan.home_of_tensor(row.name) for row in self._table.rows()}
        self._table.set_homes(homes.get)
        device = runtime.session.device
        for source in (self._table.parameters(), self._table.buffers()):
            for row, tensor in source:
                if row.home is not None:
                    engine.place_tensor(tensor, row.name, row.home)
                if self._table.is_local(row, engine.stage):
                    tensor.data = tensor.data.to(device)
                else:
                    tensor.data = _stand_in(tensor, device)
        for name, _ in plan.tensors:
            owner, _, attribute = name.rpartition(".")
            if attribute in self.module.get_submodule(owner)._buffers:
                engine.place_buffer(self.module.get_submodule(owner), attribute)
        units = set(self._units)
        for name, home in plan.modules:
            engine.place_module(self.module.get_submodule(name), name, home, is_unit=name in units)
        self._synchronise_start()
        self._is_partitioned = True
        for optimizer in runtime.live_optimizers():
            optimizer.keep_local_parameters(self)
        self._run_post_partition_hooks()

    def _synchronise_start(self) -> None:
        """Equal parameters and buffers on all holders, and the gradient reduction among them."""
        session = self._runtime.session
        groups = session.groups
        stage = self._runtime.engine.stage

        def group_of(axis: str) -> Any:
            return groups.rdp if axis == "rdp" else groups.dp

        tensors = [
            BroadcastTensor(row.name, tensor, group_of(row.reducer_axis))
            for source in (self._table.parameters(), self._table.buffers())
            for row, tensor in source
            if self._table.is_local(row, stage)
        ]
        broadcast_parameters(tensors, timeout_seconds=session.config.timeout_seconds)
        if groups.dp.size == 1:
            return
        self._reducer = GradientReducer(
            [
                ReducedParameter(row.name, parameter, group_of(row.reducer_axis))
                for row, parameter in self._table.parameters()
                if self._table.is_local(row, stage)
            ],
            divisor=groups.dp.size,
            bucket_cap_mb=self._bucket_cap_mb,
            overlap=self._overlap,
            timeout_seconds=session.config.timeout_seconds,
        )

    def _synchronise_buffers(self) -> None:
        groups = self._runtime.session.groups
        if not self._broadcast_buffers or groups.dp.size == 1 or not self.training:
            return
        stage = self._runtime.engine.stage
        tensors = [
            BroadcastTensor(row.name, buffer, groups.rdp if row.reducer_axis == "rdp" else groups.dp)
            for row, buffer in self._table.buffers()
            if row.is_persistent and self._table.is_local(row, stage)
        ]
        if tensors:
            timeout = self._runtime.session.config.timeout_seconds
            broadcast_parameters(tensors, is_checked=False, timeout_seconds=timeout)

    def _check_sync_batch_norm(self) -> None:
        groups = self._runtime.session.groups
        if groups.dp.size == groups.world.size:
            return
        for name, module in self.module.named_modules():
            if isinstance(module, nn.SyncBatchNorm):
                group = module.process_group
                size = groups.world.size if group is None else group.size()
                if size > groups.dp.size:
                    raise SMPConfigError(
                        f"module '{name}' is a SyncBatchNorm over a group of {size} processes, but only the {groups.dp.size} ranks of a DP_GROUP "
                        "run it, so it would wait for ever: convert with torch.nn.SyncBatchNorm.convert_sync_batchnorm(model, "
                        "smp.get_dp_process_group())"
                    )

    # Hooks

    def register_post_partition_hook(self, hook: Hook) -> RemovableHandle:
        """Call ``hook(model, optimizer)`` once, after the partition and before the first forward. Returns a removable handle."""
        return _register(self._post_partition_hooks, hook)

    def register_post_step_hook(self, hook: Hook) -> RemovableHandle:
        """Call ``hook(model, optimizer)`` once, after the first step call. Returns a removable handle. Source: smp-api section 18."""
        return _register(self._post_step_hooks, hook)

    def _run_post_partition_hooks(self) -> None:
        if self._has_run_post_partition_hooks:
            return
        self._has_run_post_partition_hooks = True
        for hook in list(self._post_partition_hooks.values()):
            hook(self, self._optimizer())

    def _optimizer(self) -> Any:
        """The wrapped optimizer that holds parameters of this model; None if there is none."""
        own = {id(parameter) for _, parameter in self._table.parameters()}
        for optimizer in reversed(self._runtime.live_optimizers()):
            if any(id(parameter) in own for parameter in optimizer.all_parameters()):
                return optimizer
        return None

    # Parameters, buffers, modules

    def get_module(self) -> nn.Module:
        """The user's module (with replaced layers), without any wrapper. Source: smp-api section 18."""
        return self.module

    @property
    def table(self) -> ParameterTable:
        """The parameter table: names, shapes, homes and slices of all parameters and buffers."""
        return self._table

    def _is_local_tensor(self, tensor: torch.Tensor) -> bool:
        row = self._table.row_of(tensor)
        return row is None or self._table.is_local(row, self._runtime.engine.stage)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Names as in the user's model; after the partition only what this rank holds."""
        for name, parameter in self.module.named_parameters(prefix, recurse, remove_duplicate):
            if self._is_local_tensor(parameter):
                yield name, parameter

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Names as in the user's model; after the partition only what this rank holds."""
        for name, buffer in self.module.named_buffers(prefix, recurse, remove_duplicate):
            if self._is_local_tensor(buffer):
                yield name, buffer

    def virtual_named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of all parameters in the order of the model, equal on all ranks; those of other stages are stand-ins.

        Source: smp-api section 18.
        """
        return self.module.named_parameters()

    def local_named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of what this rank holds; after the partition."""
        self._needs_partition("local_named_parameters")
        return self.named_parameters()

    def local_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that this rank holds; after the partition."""
        self._needs_partition("local_parameters")
        return (parameter for _, parameter in self.named_parameters())

    def local_named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, buffer) of what this rank holds; after the partition."""
        self._needs_partition("local_named_buffers")
        return self.named_buffers()

    def local_buffers(self) -> Iterator[torch.Tensor]:
        """The buffers that this rank holds; after the partition."""
        self._needs_partition("local_buffers")
        return (buffer for _, buffer in self.named_buffers())

    def local_named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """(name, module) of the modules that run on this rank: those at home here, and those without a home."""
        self._needs_partition("local_named_modules")
        stage = self._runtime.engine.stage
        for name, module in self.module.named_modules():
            home = self._plan.home_of_module(name) if self._plan is not None else None
            if home is None or home == stage:
                yield name, module

    def local_modules(self) -> Iterator[nn.Module]:
        """The modules that run on this rank; after the partition."""
        return (module for _, module in self.local_named_modules())

    def distributed_modules(self) -> Iterator[nn.Module]:
        """The modules that are split by tensor parallelism."""
        return (module for module in self.module.modules() if isinstance(module, DistributedModule))

    def is_distributed_parameter(self, parameter: torch.Tensor) -> bool:
        """Whether the parameter is sliced over the tensor-parallel ranks."""
        row = self._table.row_of(parameter)
        return row is not None and row.split is not None

    def is_distributed_buffer(self, buffer: torch.Tensor) -> bool:
        """Whether the buffer is sliced over the tensor-parallel ranks."""
        return self.is_distributed_parameter(buffer)

    def is_scaled_batch_parameter(self, parameter: torch.Tensor) -> bool:
        """Whether the parameter works on the batch of the whole TP_GROUP."""
        row = self._table.row_of(parameter)
        return row is not None and row.reducer_axis == "rdp"

    def is_scaled_batch_buffer(self, buffer: torch.Tensor) -> bool:
        """Whether the buffer works on the batch of the whole TP_GROUP."""
        return self.is_scaled_batch_parameter(buffer)

    def default_reducer_named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of the local parameters whose gradients are averaged over the DP_GROUP."""
        return ((name, parameter) for name, parameter in self.named_parameters() if not self.is_scaled_batch_parameter(parameter))

    def scaled_batch_reducer_named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of the local parameters whose gradients are summed over the RDP_GROUP and divided by dp."""
        return ((name, parameter) for name, parameter in self.named_parameters() if self.is_scaled_batch_parameter(parameter))

    def _needs_partition(self, what: str) -> None:
        if not self._is_partitioned:
            raise PartitionError(
                f"model.{what}() needs the partition, which is made at the first call of a step function: call it after that, or in a "
                "hook given to model.register_post_partition_hook"
            )

    # Moving

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> DistributedModel:
        if self._runtime.is_pipelined and not self._is_partitioned:
            probe = fn(torch.empty(0))
            if probe.dtype == torch.empty(0).dtype:
                return self  # a move: the library places each part itself, at the first step
        return super()._apply(fn, recurse)

    def cpu(self) -> DistributedModel:
        """Gather all parameters and buffers over the MP_GROUP and move the model to the CPU; collective over MP_GROUP.

        With pipelining every rank then holds the whole model and steps raise; sliced layers stay sliced. Source: smp-api section 5.
        """
        if self._runtime.is_pipelined and self._is_partitioned:
            model_states.gather_whole(self)
            self._is_partitioned = False
            self._has_left = True
        self.module._apply(lambda tensor: tensor.cpu())
        return self

    _has_left = False

    # State dicts

    def local_state_dict(self) -> dict[str, Any]:
        """What this rank holds, under the user's names, with ``_smp_is_partial: True``; local. Source: smp-api section 5."""
        return model_states.local_state_dict(self)

    def state_dict(self, *args: Any, gather_to_rank0: bool = False, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The whole, un-sliced state on the CPU under the user's names.

        Collective over the caller's MP_GROUP. ``gather_to_rank0``: only global rank 0 gets it, the others ``{}``. Source: smp-api section 5.
        """
        if args or set(kwargs) - {"prefix", "keep_vars"}:
            return super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        return {prefix + name: value for name, value in model_states.full_state_dict(self, gather_to_rank0).items()}

    def load_state_dict(  # type: ignore[override]
        self, state_dict: Mapping[str, Any], strict: bool = True, same_partition_load: bool = False
    ) -> Any:
        """Load a full or partial state dict; collective over MP_GROUP for partial ones. Legal before and after the partition.

        A partial dict (``_smp_is_partial: True``) is merged over the MP_GROUP first; ``same_partition_load=True`` loads the local part as it
        is. Returns the missing and unexpected names, as torch does. Source: smp-api section 5.
        """
        return model_states.load_state_dict(self, state_dict, strict, same_partition_load)

    # Not built yet

    def register_comm_hook(self, state: object, callable: Callable[..., Any]) -> None:
        """A DDP communication hook for the gradient reduction; needs ddp and overlapping_allreduce."""
        if not self._runtime.session.config.ddp:
            raise SMPConfigError("model.register_comm_hook needs ddp: True: there is no gradient reduction to hook into")
        raise NotBuiltError("model.register_comm_hook is not built yet: gradients are reduced by an all-reduce per bucket")

    def join(self, *args: Any, **kwargs: Any) -> Any:
        """Uneven numbers of batches on the data-parallel ranks."""
        raise NotBuiltError("model.join() is not built yet: give all data-parallel ranks the same number of batches (drop_last=True)")


def partition_models(runtime: Runtime, arguments: Mapping[str, Any], trace_body: Callable[[], None]) -> None:
    """At the start of a step call: partition the models that are not yet, and run their hooks. Collective over the world if so."""
    if not runtime.is_pipelined:
        for model in runtime.session.models:
            model._run_post_partition_hooks()
        return
    if all(model.partitioned for model in runtime.session.models):
        return
    given = [leaf for leaf in trees.leaves(dict(arguments)) if isinstance(leaf, DistributedModel)]
    known = given or runtime.session.models
    waiting = [model for model in known if not model.partitioned]
    if any(model._has_left for model in waiting):
        raise StepUsageError("the model was moved away from the pipeline by model.cpu(); it cannot be trained any more")
    can_trace = len(waiting) == len(known)
    for model in waiting:
        model.place(_agreed_plan(runtime, model, trace_body if can_trace else None))


def _agreed_plan(runtime: Runtime, model: DistributedModel, trace_body: Callable[[], None] | None) -> PartitionPlan:
    """The plan made by one rank, on every rank."""
    config, groups = runtime.session.config, runtime.session.groups
    plan: PartitionPlan | None = None
    problem: BaseException | None = None
    is_traced = trace_body is not None and config.auto_partition and not config.skip_tracing and not config.load_partition
    try:
        if groups.pp.rank_in_group == 0 and groups.rdp.rank_in_group == 0:
            # The whole TP_GROUP traces, since split layers talk to each other.
            trace = model._trace(trace_body) if is_traced and trace_body is not None else None
            plan = model._make_plan(trace)
    except Exception as error:
        problem = error
    answers = allgather((plan, None if problem is None else f"{type(problem).__name__}: {problem}"), CommGroup.WORLD)
    if problem is not None:
        raise problem
    failed = next(((rank, text) for rank, (_, text) in enumerate(answers) if text is not None), None)
    if failed is not None:
        raise PartitionError(f"global rank {failed[0]} could not trace and partition the model: {failed[1]}")
    result = next(found for found, _ in answers if found is not None)
    if config.partition_file and not config.load_partition and groups.world.rank_in_group == 0:
        result.save(config.partition_file)
    return result


def set_partition(module: nn.Module, index: int) -> None:
    """Place ``module``, part of a wrapped model, and everything in it on stage ``index``; after wrapping, before the first step.

    Needs ``auto_partition: False``; ignored otherwise. Same calls on every rank. Source: smp-api sections 6 and 18.
    """
    active = runtime_module.current().session
    num_stages = active.config.pipeline_parallel_degree
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < num_stages:
        raise PartitionError(f"smp.set_partition: there is no partition {index!r}, use 0 to {num_stages - 1} (pipeline_parallel_degree={num_stages})")
    for model in reversed(active.models):
        if any(module is part for part in model.module.modules()):
            model.set_partition(module, index)
            return
    raise PartitionError(
        f"smp.set_partition: this {type(module).__name__} is part of no smp.DistributedModel: wrap the model first, and take the module from "
        "model.get_module()"
    )


def _scaled_seed(root: torch.Tensor, seed: torch.Tensor | None, scale: float) -> torch.Tensor:
    if seed is not None:
        return seed * scale
    if root.numel() != 1:
        raise StepUsageError(
            f"model.backward without grad_tensors needs a scalar, got a tensor of shape {tuple(root.shape)}: reduce it, or pass gradients"
        )
    return torch.full_like(root, scale)


def _stand_in(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the same shape and dtype on one element of memory: what another stage holds. Reading it gives NaN, or zero."""
    value = float("nan") if tensor.is_floating_point() or tensor.is_complex() else 0
    return torch.full((1,) * tensor.ndim, value, dtype=tensor.dtype, device=device).expand(tensor.shape)


def _register(hooks: dict[int, Hook], hook: Hook) -> RemovableHandle:
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle


def _check_arguments(
    module: nn.Module, trace_device: str, trace_execution_times: bool, backward_passes_per_step: int, bucket_cap_mb: float
) -> None:
    if isinstance(module, DistributedModel):
        raise StepUsageError("smp.DistributedModel was given a smp.DistributedModel: wrap the model once")
    if isinstance(module, torch.nn.parallel.DistributedDataParallel):
        raise StepUsageError("smp.DistributedModel was given a DistributedDataParallel: give the model itself; data parallelism is built in (ddp: True)")
    if not isinstance(module, nn.Module):
        raise SMPConfigError(f"smp.DistributedModel: expected an nn.Module, got {type(module).__name__}")
    if isinstance(module, torch.jit.ScriptModule):
        raise SMPConfigError("smp.DistributedModel: a ScriptModule cannot be partitioned: give the original nn.Module")
    for part in module.modules():
        if part is not module and isinstance(part, (DistributedModel, torch.nn.parallel.DistributedDataParallel)):
            raise StepUsageError(f"smp.DistributedModel: the model contains a {type(part).__name__}: wrap the whole model once, without it")
    if trace_device not in ("cpu", "gpu"):
        raise SMPConfigError(f'trace_device: must be "cpu" or "gpu", got {trace_device!r}')
    if trace_device == "cpu" and trace_execution_times:
        raise SMPConfigError(
            'trace_execution_times=True needs trace_device="gpu": times on the CPU say nothing about those on the device; leave one of them out'
        )
    if isinstance(backward_passes_per_step, bool) or not isinstance(backward_passes_per_step, int) or backward_passes_per_step < 1:
        raise SMPConfigError(f"backward_passes_per_step: expected int >= 1, got {backward_passes_per_step!r}")
    if bucket_cap_mb <= 0:
        raise SMPConfigError(f"bucket_cap_mb: expected a size > 0 in MB, got {bucket_cap_mb!r}")
