"""``smp.DistributedModel``: the wrapper that replaces, partitions, places and synchronises a model (smp-api sections 5
and 6).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from modelparallel import trees
from modelparallel.data_parallel.launch_order import LaunchOrder
from modelparallel.deferred.deferred import is_deferred
from modelparallel.errors import CannotTraceError, SMPConfigError, StepUsageError, UnsupportedError
from modelparallel.model import creation
from modelparallel.model import states as model_states
from modelparallel.model.absent_tensors import make_absent
from modelparallel.model.arguments import check_arguments
from modelparallel.model.backward import ModelBackward
from modelparallel.model.batch_norm import synchronise_batch_norms
from modelparallel.model.compilation import ModuleCompiler, checked_options, take_off_compiled_calls
from modelparallel.model.gradients import ModelGradients
from modelparallel.model.initial_weights import agree_before_slicing, check_drawn_slices
from modelparallel.model.planning import PlannedModel
from modelparallel.model.precision import ModelPrecision
from modelparallel.model.sharding import check_can_shard
from modelparallel.model.views import alias_inherited_forwards, attach_module_attribute
from modelparallel.nn.huggingface import new_names_of, prepare_families
from modelparallel.parameters.retired import retire_replaced
from modelparallel.parameters.table import ParameterTable
from modelparallel.partitioning import find_units, log_plan, work_of_call
from modelparallel.pipeline.left_behind import leave_behind
from modelparallel.pipeline.operations.pushes import push
from modelparallel.pipeline.program.program import Program
from modelparallel.pipeline.values.stage_tensor import StageTensor
from modelparallel.plan.partition import PartitionPlan
from modelparallel.tensor_parallel.replace import replace_marked_modules
from modelparallel.torch_compat import has_own_compiled_call
from modelparallel.training import runtime as runtime_module
from modelparallel.training.grad_scaler import agree_on_found_infs
from modelparallel.training.gradient_norm import intercept_clipping
from modelparallel.training.participants import ParameterHolder, RunningStep
from modelparallel.training.runtime import Runtime

Hook = Callable[["DistributedModel", Any], Any]


class DistributedModel(PlannedModel):
    """Wraps the user's model; use it in place of the model from then on. Collective over the world.

    Without pipelining (pp=1) modules marked for tensor parallelism are replaced, parameters are placed on the device
    and made equal over the data-parallel ranks at once; ``model(x)`` and ``loss.backward()`` then also work outside a
    step function. With pipelining the modules are replaced at once and the model is partitioned at the first step call;
    calls outside a step function raise StepUsageError.

    Args:
        module: any ``nn.Module``, built alike on every rank.
        trace_device: "cpu" or "gpu": where the first step is traced.
        trace_execution_times: take measured times and not FLOPs as the costs of the partitioner; not with
            trace_device="cpu".
        overlapping_allreduce: reduce gradients while the backward still runs.
        backward_passes_per_step: number of step calls (or backward passes) whose gradients are summed before they are
            reduced.
        average_grads_across_microbatches: gradients are the mean over the microbatches; False: their sum.
        bucket_cap_mb: size of the buckets in which gradients are reduced, in MiB (1024 * 1024 bytes).
        trace_memory_usage: take measured memory where it is more than the saved tensors.
        broadcast_buffers: make persistent buffers equal to those of the first data-parallel rank at each training step.
        gradient_as_bucket_view: final gradients are views of the reduction buckets, which then take no memory of their
            own; do not keep ``p.grad`` beyond a ``zero_grad`` to save memory.
        find_unused_parameters: accepted; unused parameters always work.
        same_as: ours, not the original's: a wrapped model of the same structure whose partition this one takes; models
            of one structure are partitioned alike by default (see docs/partitioning.md).
        compile: ours, not the original's: True, or a dict of options of ``torch.compile``: compile the calls of the
            modules that this process runs (see docs/engine.md). Default: False.

    Raises:
        SMPConfigError: a wrong argument.
        StepUsageError: a model that is wrapped already, contains a wrapped one, or has lazy parameters.

    Source: smp-api section 5.
    """

    _precision: ModelPrecision
    _backward: ModelBackward
    #: Whether cpu() has taken the partitioned model back.
    has_left = False

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
        *,
        same_as: PlannedModel | None = None,
        compile: bool | Mapping[str, Any] | None = False,
    ) -> None:
        check_arguments(module, trace_device, trace_execution_times, backward_passes_per_step, bucket_cap_mb)
        options = checked_options(compile)
        super().__init__()
        runtime = runtime_module.current()
        active = runtime.session
        # Kept out of nn.Module's registries: plain objects.
        self.__dict__["_runtime"] = runtime
        self._trace_device = trace_device
        self._trace_execution_times = trace_execution_times
        self._trace_memory_usage = trace_memory_usage
        self.__dict__["_backward"] = ModelBackward(self, runtime, is_averaged=average_grads_across_microbatches)
        self._compiler = None if options is None else ModuleCompiler(options)
        self._post_partition_hooks: OrderedDict[int, Hook] = OrderedDict()
        self._post_step_hooks: OrderedDict[int, Hook] = OrderedDict()
        self.has_run_post_partition_hooks = False
        self._has_run_post_step_hooks = False

        before, config = dict(module.named_parameters(remove_duplicate=False)), active.config
        prepare_families(module, keeps_weights=config.match_weights)
        agree_before_slicing(module, active)
        with creation.take_in(module):
            module = replace_marked_modules(module, active.groups.tp, config.match_weights, config.prescaled_batch)
        if not config.match_weights:
            check_drawn_slices(module, active)
        after = dict(module.named_parameters(remove_duplicate=False))
        retire_replaced(before, after, new_names_of(module, before))
        del before, after  # whole parameters, which may be about to be sharded
        for optimizer in runtime.live_optimizers():
            optimizer.replace_parameters()
        self.module = module
        attach_module_attribute(module)
        alias_inherited_forwards(module)
        check_can_shard(module, config)
        self._units = find_units(module)
        take_off_compiled_calls(module, self._units)
        synchronise_batch_norms(module, active.groups, runtime.decisions.samples)
        self.__dict__["_precision"] = ModelPrecision(self, config, runtime.decisions)
        if not self._precision.casts_when_placed:
            self._precision.cast_module(module)
        if not runtime.is_pipelined:
            if not self._precision.casts_when_placed:  # otherwise parameters are born sharded
                creation.place_deferred(module, active.device)
            module.to(active.device)
        self._table = ParameterTable(module)
        self.begin_plan(same_as)
        self.__dict__["gradients"] = ModelGradients(
            self._table,
            runtime,
            overlaps=overlapping_allreduce,
            backward_passes_per_step=backward_passes_per_step,
            bucket_cap_mb=bucket_cap_mb,
            broadcasts_buffers=broadcast_buffers,
            gradient_as_bucket_view=gradient_as_bucket_view,
            finds_unused_parameters=find_unused_parameters,
        )
        self._index = len(runtime.models)
        runtime.models.append(self)
        if not runtime.is_pipelined:
            self._place_whole()
        if len(runtime.models) == 1:
            intercept_clipping(runtime)
            agree_on_found_infs(runtime)

    def _place_whole(self) -> None:
        """Without pipelining: everything is at home here."""
        for name in self._units:
            unit = self.module.get_submodule(name)
            is_compiled = self._compile_call(unit, name)
            self._runtime.engine.frame_unit(unit, name, self._index, is_compiled=is_compiled)
        if self._compiler is not None:
            self._compiler.log("")
        self.gradients.start(self.module, self._units, self._precision.cast_module)
        self._is_partitioned = True
        for optimizer in self._runtime.live_optimizers():
            optimizer.settle()

    # Calls

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model. Collective over PP_GROUP and TP_GROUP, in training over DP_GROUP, too, where there are
        buffers or sharded parameters. With pipelining it is a StepUsageError outside a function decorated with
        ``@smp.step``.
        """
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
            self.run_post_partition_hooks()
            self.check_parameters()
            self.gradients.prepare(is_training=self.training)
            output = self._call_module(args, kwargs)
            self.gradients.end_forward()
            return output
        if step.is_tracing:
            self._check_traceable(step)
            return self._call_module(args, kwargs)
        self.enter_step(step)
        output = self._call_module(args, kwargs)
        program = self._runtime.engine.program
        if self._runtime.is_pipelined and program is not None:
            leave_behind(program)
            self._push_small_outputs(program, output)
        return output

    def _call_module(self, args: Any, kwargs: Any) -> Any:
        if self._is_partitioned or not self._precision.casts_when_placed:
            args, kwargs = self._precision.inputs(args, kwargs)
        return self._precision.outputs(self.module(*args, **kwargs), is_in_step=self._runtime.step is not None)

    def backward(
        self,
        tensors: torch.Tensor | Sequence[torch.Tensor],
        grad_tensors: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
        *,
        weight: float | torch.Tensor | None = None,
    ) -> None:
        """In place of ``tensors.backward(grad_tensors)`` inside a step function; with pipelining it runs at the end of
        the step.

        Gradients are averaged over the microbatches, weighted by their samples (``average_grads_across_microbatches``).
        All stages call it; the last one of a step also reduces the gradients, which is collective over DP_GROUP.

        Args:
            tensors, grad_tensors: as for ``torch.autograd.backward``.
            weight: ours, not the original's: the number of tokens (or samples, ...) that the loss is the mean of.
                The gradients become those of the mean over the tokens of all microbatches and data-parallel ranks of
                this step, whatever ``average_grads_across_microbatches`` says; all losses of a step have a weight, or
                none.

        Source: smp-api section 5.
        """
        self._backward.run(tensors, grad_tensors, weight)

    @property
    def loss_scale(self) -> float:
        """What the loss of a backward is multiplied by: 1 except with fp16. Local."""
        return self._precision.loss_scale()

    def _push_small_outputs(self, program: Program, output: Any) -> None:
        limit = self._runtime.engine.push_limit_bytes
        with self._runtime.engine.natively():
            for leaf in trees.leaves(output):
                if isinstance(leaf, StageTensor) and leaf.spec.num_bytes <= limit and leaf.known_value is None:
                    push(program, leaf)

    # Steps

    def _check_traceable(self, step: RunningStep) -> None:
        if self not in step.models:
            step.models.append(self)
        if self._is_partitioned:
            raise CannotTraceError("the step function also calls a model that is already partitioned")

    def enter_step(self, step: RunningStep) -> None:
        """The model is used in this step: once, and once more when it is first used with gradients. Called by the
        library.
        """
        if self not in step.models:
            self.check_has_not_left()
            if not self._is_partitioned:
                raise StepUsageError(
                    "smp.step: the function calls a smp.DistributedModel that is not among its arguments, so that it "
                    "has not been partitioned: "
                    "pass every model to the step function as an argument"
                )
            self.check_parameters()
            step.models.append(self)
            self.run_post_partition_hooks()
            self.gradients.enter_step()
        if torch.is_grad_enabled():
            self.gradients.begin_step(is_training=self.training)

    def check_has_not_left(self) -> None:
        """Raise StepUsageError if the model was taken out of the pipeline. Local."""
        if self.has_left:
            raise StepUsageError(
                "the model was moved away from the pipeline by model.cpu(); it cannot be used in steps any more"
            )

    def arm(self, launches: LaunchOrder) -> None:
        """The backward of the last microbatch begins; ``launches``: the order of the step's reducers. Called by the
        library.
        """
        self.gradients.arm(launches)

    def finish_step(self, has_backward: bool) -> bool:
        """The step function has run: reduce gradients, run the hooks that wait for the first step. Called by the
        library.

        ``has_backward``: some model of the step has called backward; the gradients may have reached this one too.
        Returns whether gradients were reduced over the data-parallel ranks.
        """
        if not self._has_run_post_step_hooks:
            self.check_made()
        has_reduced = self.gradients.finish_step(has_backward)
        if not self._has_run_post_step_hooks:
            self._has_run_post_step_hooks = True
            for hook in list(self._post_step_hooks.values()):
                hook(self, self.optimizer_of_parameters())
        return has_reduced

    def abort_step(self, error: BaseException) -> Exception | None:
        """The step function raised; gives what the error comes of, if that is known. Called by the library."""
        return self.gradients.abort_step(error)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """A context in which gradients are accumulated on each rank; the first backward outside reduces them too, as in
        DDP. Local, but every rank of the DP_GROUP enters it for the same steps.
        """
        with self.gradients.no_sync():
            yield

    # Partition

    def place(self, plan: PartitionPlan) -> None:
        """Give every module its home according to the plan. Called by the library; collective over the world."""
        runtime = self._runtime
        engine = runtime.engine
        self._plan = plan
        if runtime.session.groups.world.rank_in_group == 0:
            log_plan(plan)
        self._table.set_homes(plan.home_of_tensor, plan.copies_of)
        if not self._precision.casts_when_placed:  # otherwise parameters are born sharded
            creation.place_deferred(self.module, runtime.session.device, self.is_local)
        self._place_tensors()
        for owner, attribute in (name.rpartition(".")[::2] for name, _ in plan.tensors):
            if attribute in self.module.get_submodule(owner)._buffers:
                engine.place_buffer(self.module.get_submodule(owner), attribute)
        engine.place_model(self.module)
        engine.costs.update({self.title_of(name): work for name, work in plan.work.items()})
        is_compiled = self._compiler is not None or any(map(has_own_compiled_call, self.module.modules()))
        engine.count_work = None if plan.costs or is_compiled else work_of_call  # counting keeps code from compiling
        units = set(self._units)
        for name, home in plan.modules:
            placed = self.module.get_submodule(name)
            copies = plan.copies_of(name)
            if engine.stage in (home, *copies):
                self._compile_call(placed, name)
            unit_name = name if name in units else None
            engine.place_module(placed, self.title_of(name), home, copies, unit_name=unit_name, model=self._index)
        if self._compiler is not None:
            self._compiler.log(runtime.session.config.pipeline)
        model_states.check_early_part(self)
        at_home = [name for name, home in plan.modules if home == engine.stage]
        self.gradients.start(self.module, at_home, self._precision.cast_module)
        self._is_partitioned = True
        for optimizer in runtime.live_optimizers():
            optimizer.settle()
        loads, self._loads = self._loads, []
        for load in loads:
            load()
        self.run_post_partition_hooks()

    def _place_tensors(self) -> None:
        engine, device = self._runtime.engine, self._runtime.session.device
        for source in (self._table.parameters(), self._table.buffers()):
            for row, tensor in source:
                if row.home is not None:
                    engine.place_tensor(tensor, self.title_of(row.name), row.home)
                if row.home is not None and not self._table.is_local(row, engine.stage):
                    make_absent(tensor, self.title_of(row.name), row.home, engine.stage, device)
                elif not is_deferred(tensor):
                    tensor.data = tensor.data.to(device)

    def _compile_call(self, module: nn.Module, name: str) -> bool:
        """Compile the calls of a module that this process runs, if that is asked for; whether they are compiled."""
        is_users_own = has_own_compiled_call(module)
        return (self._compiler is not None and self._compiler.install(module, name)) or is_users_own

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Always a StepUsageError: what is compiled is said when the model is wrapped. Local."""
        raise StepUsageError(
            "model.compile() of a smp.DistributedModel would compile the library itself: say it when the model is "
            'wrapped, smp.DistributedModel(model, compile=True) or compile={"backend": ...}'
        )

    # Hooks

    def register_post_partition_hook(self, hook: Hook) -> RemovableHandle:
        """Call ``hook(model, optimizer)`` once, after the partition, before the first forward; returns a handle that
        removes the hook. Local. Source: smp-api section 5.
        """
        return _register(self._post_partition_hooks, hook)

    def register_post_step_hook(self, hook: Hook) -> RemovableHandle:
        """Call ``hook(model, optimizer)`` once, after the first step call; returns a handle that removes the hook.
        Local. Source: smp-api section 18.
        """
        return _register(self._post_step_hooks, hook)

    def run_post_partition_hooks(self) -> None:
        """Run the hooks that wait for the partition, unless they have run; called by the library."""
        if self.has_run_post_partition_hooks:
            return
        self.has_run_post_partition_hooks = True
        for hook in list(self._post_partition_hooks.values()):
            hook(self, self.optimizer_of_parameters())

    def optimizer_of_parameters(self) -> ParameterHolder | None:
        """The wrapped optimizer that holds parameters of this model; None if there is none. Local."""
        return next(reversed(self._runtime.optimizers_of(self._table)), None)

    # Moving

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> DistributedModel:
        if not self._runtime.is_pipelined:
            nn.Module._apply(self, fn, recurse)
            return self
        if self._is_partitioned:
            buffers = [(owner, dict(owner._buffers)) for owner in self.module.modules()]
            nn.Module._apply(self, fn, recurse)
            for owner, known in buffers:  # torch makes new ones, which would have no home
                for name, buffer in known.items():
                    if buffer is not None and (converted := owner._buffers[name]) is not None:
                        buffer.data, owner._buffers[name] = converted, buffer
            return self
        # The library moves each part itself, at the first step; of a conversion, only the dtype counts.
        nn.Module._apply(self, lambda tensor: tensor.to(fn(torch.empty(0, dtype=tensor.dtype)).dtype), recurse)
        return self

    def cpu(self) -> DistributedModel:
        """Gather all parameters and buffers over the MP_GROUP and move the model to the CPU. Collective over MP_GROUP.

        With pipelining every rank then holds the whole model and steps raise; sliced layers stay sliced.

        It is an UnsupportedError for a partitioned pipeline with sharded data parallelism. Source: smp-api section 5.
        """
        if self._runtime.is_pipelined and self._is_partitioned:
            model_states.gather_whole(self)
            self._is_partitioned = False
            self.has_left = True
        self.module._apply(lambda tensor: tensor.cpu())
        return self

    # Copies

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise UnsupportedError(
            "copy.deepcopy of a smp.DistributedModel (AveragedModel of torch.optim.swa_utils makes one): its parts are "
            "on several ranks, which it talks to\n"
            "  wrong: average = copy.deepcopy(model)\n"
            "  right: average = smp.DistributedModel(copy.deepcopy(module))  # of the module, before wrapping\n"
            "         smp.average_weights(average, model, decay)  # or smp.copy_weights(average, model)"
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UnsupportedError(
            "a smp.DistributedModel cannot be pickled (torch.save, copy.copy): its parts are on several ranks, which "
            "it talks to\n"
            "  wrong: torch.save(model, path)\n"
            "  right: smp.save_checkpoint(path, tag=...), or torch.save(model.state_dict(), path)"
        )

    # State dicts

    def local_state_dict(self, gather_if_shard: bool = False) -> dict[str, Any]:
        """What this rank holds, with ``_smp_is_partial: True``. Local; collective with ``gather_if_shard=True``, see
        there.

        Args:
            gather_if_shard: ours, not the original's; counts with sharded data parallelism alone. False: a sharded
                parameter is a ``DTensor`` with the rows of this rank, and one rank may call this alone. True: it is
                whole, which is **collective over the ranks that share the parameters out**
                (``sharded_data_parallel_degree`` ranks of the RDP_GROUP): rank 0 alone would wait for the others.

        Source: smp-api section 5.
        """
        return model_states.local_state_dict(self, gather_if_shard)

    def state_dict(self, *args: Any, gather_to_rank0: bool = False, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The whole, un-sliced state on the CPU under the user's names. Collective over the caller's MP_GROUP.

        With sharded data parallelism the parameters are gathered before that, which is collective over the ranks that
        share them out (see ``local_state_dict``): then all ranks of the world call it, also with ``gather_to_rank0``.

        With ``gather_to_rank0`` only global rank 0 gets the state, all others ``{}``. Source: smp-api section 5.
        """
        if args or set(kwargs) - {"prefix", "keep_vars"}:
            return super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        return {prefix + name: value for name, value in model_states.full_state_dict(self, gather_to_rank0).items()}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, same_partition_load: bool = False
    ) -> Any:
        """Load a whole or a partial state dict, before or after the partition. Local for a whole one, of which each
        rank takes what it holds; collective over MP_GROUP for a partial one (``_smp_is_partial: True``), which is
        merged first.

        Args:
            state_dict: as ``state_dict`` or ``local_state_dict`` gave it, or a plain one of the user's model.
            strict: names must be the same; False takes the names that both have.
            same_partition_load: take a partial dict as the part of this rank, without a merge; local.

        Returns:
            The missing and the unexpected names, as torch does.

        Raises:
            StateDictError: names (with ``strict``) or shapes differ, or a shard is that of another rank; a
                RuntimeError.

        Source: smp-api section 5.
        """
        return model_states.load_state_dict(self, state_dict, strict, same_partition_load)

    def register_comm_hook(self, state: object, callable: Callable[..., Any]) -> None:
        """Reduce gradients by ``callable(state, bucket)``, a communication hook of DDP; before or after the partition,
        once. Local, but all ranks call it.

        The bucket has the methods of ``torch.distributed.GradBucket``; the hook returns a future of its mean over the
        ranks of the process group that is the state, or its attribute ``process_group``. Where the state or the
        attribute is None the bucket's own group is filled in, and this is what to use: with tensor parallelism there
        are two. The microbatches are averaged before.

        Raises:
            SMPConfigError: without ddp, with ``overlapping_allreduce=False``, with sharded parameters or optimizer
                state, for a second hook, and for a group that is not that of the parameters.

        Source: smp-api section 5.
        """
        self.gradients.register_comm_hook(state, callable)

    def join(
        self,
        divide_by_initial_world_size: bool = True,
        enable: bool = True,
        throw_on_early_termination: bool = False,
    ) -> AbstractContextManager[None]:
        """A context in which data-parallel ranks may have different numbers of batches; the ranks of a TP_GROUP, and
        the stages of a pipeline, have equally many. Collective over DP_GROUP: every rank enters and leaves.

        A rank that leaves its loop takes part in the others' reductions until all have left; then all have the
        parameters and buffers of a rank that went on longest. Clear the gradients before each step. Gradients are
        reduced after the backward, without overlap.

        Args:
            divide_by_initial_world_size: divide gradients by the number of all ranks; False: of those with batches
                left.
            enable: False does nothing.
            throw_on_early_termination: end the loops of all ranks by a RuntimeError as soon as one has left.

        Raises:
            SMPConfigError: without ddp; with sharded data parallelism; for SyncBatchNorm layers, unless
                ``throw_on_early_termination``.
            StepUsageError: inside another ``join``; with ``shard_optimizer_state`` and no ``smp.DistributedOptimizer``;
                when this rank had no batch at all in a pipeline that is not partitioned.
            DivergenceError: the ranks with batches left do different things at the same time.
            RuntimeError: on every rank, when one has left, with ``throw_on_early_termination``.

        Source: smp-api section 5.
        """
        has_collectives = any(isinstance(part, nn.SyncBatchNorm) for part in self.module.modules())
        if enable and has_collectives and not throw_on_early_termination:
            raise SMPConfigError(
                "model.join(): the model has SyncBatchNorm layers, whose forward waits for all ranks, also for those "
                "that ran out of batches: use throw_on_early_termination=True, which ends on all ranks, or BatchNorm"
            )
        return self.gradients.joining.join(
            divides_by_initial=divide_by_initial_world_size, is_enabled=enable, throws=throw_on_early_termination
        )


def wrapped_models(runtime: Runtime) -> list[DistributedModel]:
    """The wrapped models of this process, in the order of wrapping. Local."""
    return [model for model in runtime.models if isinstance(model, DistributedModel)]


def _register(hooks: OrderedDict[int, Hook], hook: Hook) -> RemovableHandle:
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle
