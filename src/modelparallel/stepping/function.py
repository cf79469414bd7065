"""``smp.step``: run a function once per microbatch, over the stages of the pipeline (smp-api section 4)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from modelparallel import trees
from modelparallel.comm.event_log import user_code_line
from modelparallel.errors import DivergenceError, SMPConfigError, StepUsageError
from modelparallel.model.backward import scale_by_weights
from modelparallel.model.placing import partition_models
from modelparallel.model.wrapper import DistributedModel
from modelparallel.pipeline.batch_lists import ListReader
from modelparallel.pipeline.executor import MicrobatchRun, run_locally, run_step
from modelparallel.pipeline.inputs import share_inputs
from modelparallel.pipeline.lockstep import check_microbatches
from modelparallel.pipeline.loss_weights import shares
from modelparallel.pipeline.microbatches import Microbatches, slice_objects, split
from modelparallel.pipeline.program.randomness import RandomFrames
from modelparallel.pipeline.side_doors.kept_state import KeptState
from modelparallel.stepping.output import merge_outputs
from modelparallel.torch_compat import DisableTorchFunctionSubclass
from modelparallel.torch_compat.generators import SavedGenerators, drawn_from, drawn_number
from modelparallel.training import runtime as runtime_module
from modelparallel.training.memory_report import ExplainedMemory
from modelparallel.training.participants import RunningStep
from modelparallel.training.runtime import Runtime

if TYPE_CHECKING:
    from modelparallel.config.reading import Config


class StepFunction:
    """What ``@smp.step`` makes of a function.

    Not a descriptor on purpose: as a class attribute it is called without the instance, which scripts rely on.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        non_split_inputs: Iterable[str] | None,
        input_split_axes: Mapping[str, int] | None,
        detach_outputs: bool,
    ) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._name = getattr(function, "__name__", repr(function))
        self._title = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', function)}"
        self._signature = inspect.signature(function)
        self._whole = set(non_split_inputs or ())
        self._axes = dict(input_split_axes or {})
        self._detach_outputs = detach_outputs
        # The usual case, and the quick one: every argument can be given by name.
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
        parameters = self._signature.parameters.values()
        self._takes_names = all(parameter.kind in named for parameter in parameters)
        self._names = tuple(self._signature.parameters)
        # With so many arguments, none by name, they are for the first parameters: no need to bind, which takes longer.
        usual = [parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for parameter in parameters]
        num_required = sum(parameter.default is inspect.Parameter.empty for parameter in parameters)
        self._positional = range(num_required, len(usual) + 1) if all(usual) else range(0)
        self._variadic = next((p.name for p in parameters if p.kind is inspect.Parameter.VAR_POSITIONAL), None)
        self._lists = ListReader()
        self._said: set[Hashable] = set()
        self._check_names()

    def _check_names(self) -> None:
        parameters = self._signature.parameters
        if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            return
        for option, names in (("non_split_inputs", self._whole), ("input_split_axes", set(self._axes))):
            unknown = sorted(names - set(parameters))
            if unknown:
                raise SMPConfigError(
                    f"smp.step: {option} names {unknown[0]!r}, which is not an argument of {self._name}"
                    f"{self._signature}: use one of {', '.join(parameters)}"
                )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function on each microbatch of the arguments; collective over PP_GROUP (and DP_GROUP when gradients
        are reduced).
        """
        runtime = runtime_module.current()
        if runtime.step is not None:
            raise StepUsageError(
                f"{self._name} is decorated with @smp.step and was called inside another step function: call it from "
                "outside, or call the undecorated function"
            )
        if runtime.is_pipelined and torch.is_inference_mode_enabled():
            # Inference tensors do not say when they are written to, which the stages must know.
            args, kwargs = trees.map_leaves(_normal, (args, kwargs))
            with torch.inference_mode(False), torch.no_grad():
                return self(*args, **kwargs)
        config = runtime.session.config
        arguments = self._named_arguments(args, kwargs)
        if not runtime.is_pipelined or runtime.engine.stage == 0:
            arguments = slice_objects(arguments, config.microbatches, self._axes, self._whole)
        explained = ExplainedMemory(runtime, "in {}, call {} of a step function", self._name, runtime.num_steps + 1)
        with explained:
            partition_models(runtime, arguments, lambda: self._trace(runtime, arguments, config))
        runtime.num_steps += 1
        try:
            with explained:
                return self._step(runtime, arguments)
        except BaseException as error:
            runtime.note_failure(error)
            raise

    # The parts of a call

    def _step(self, runtime: Runtime, arguments: dict[str, Any]) -> Any:
        config = runtime.session.config
        number = runtime.num_steps - 1
        # Drawn, so that a script which resumes, and puts the state of torch's generator back, has the same numbers.
        seed = drawn_number() if config.seed is None else config.seed
        if runtime.is_pipelined:
            arguments, seed = self._shared(runtime, arguments, seed, number)
        if runtime.session.groups.dp.size > 1 and runtime.engine.stage == 0:
            runtime.input_checks.note(arguments, self._whole)
        microbatches = self._split(arguments, config)
        if microbatches.notices:
            self._say(runtime, microbatches.notices)
        running = RunningStep()
        try:
            place = 0 if config.seed is None else number + runtime.num_earlier_steps
            outputs, weights = self._run(runtime, running, microbatches, seed, place)
            if running.loss_weights.are_given:
                scale_by_weights(runtime, running, weights)
        except BaseException as error:
            runtime.num_training_steps += any(model.gradients.has_begun for model in running.models)
            for model in runtime.models:
                model.gradients.put_back(None, set())
            causes = [model.abort_step(error) for model in running.models]
            for cause in filter(None, causes):
                raise cause from error
            raise
        finally:
            runtime.step = None
        runtime.num_training_steps += running.has_backward
        try:
            if running.has_backward:
                running.launches.finish()
            has_reduced = [model.finish_step(running.has_backward) for model in running.models]
        except BaseException as error:
            if runtime.is_pipelined:
                runtime.engine.transport.abandon(error)
            raise
        if runtime.is_pipelined:
            runtime.engine.transport.end_step()
        if True in has_reduced:
            self._compare_copies(runtime)
        if running.has_backward:
            runtime.check_offload()
        if running.loss_weights.are_given:
            return merge_outputs(outputs, shares(weights), sum(weights))
        return merge_outputs(outputs, microbatches.weights)

    def _shared(
        self, runtime: Runtime, arguments: dict[str, Any], seed: int, number: int
    ) -> tuple[dict[str, Any], int]:
        """(arguments, seed) of pp_rank 0, on every stage; they find out whether they call the same function."""
        engine = runtime.engine
        engine.transport.begin_step(number)
        if engine.transport.take_failure_seen() and engine.stage == 0:
            engine.forget()
        try:
            own_trained = _trained_flags(runtime)
            extra = (seed, self._title, engine.knowledge(), own_trained)
            own = arguments
            arguments, (seed, called, knowledge, trained) = share_inputs(
                engine.transport, arguments, extra, number, runtime.session.device
            )
            if engine.stage:
                text = runtime.input_checks.difference_of_stages(own, arguments, engine.stage)
                if text:
                    runtime_module.logger.warning(text)
            if called != self._title:
                raise DivergenceError(
                    f"pp_rank {engine.stage} calls the step function {self._title} at {user_code_line()}, pp_rank 0 "
                    f"calls {called}: all ranks of a PP_GROUP must call the same step functions in the same order"
                )
            engine.agree(knowledge)
            _check_trained(runtime, own_trained, trained)
        except BaseException as error:
            engine.transport.abandon(error)
            raise
        return arguments, seed

    def _compare_copies(self, runtime: Runtime) -> None:
        """In the first steps, and on one stage: whether the data-parallel ranks feed samples of their own."""
        groups = runtime.session.groups
        if runtime.engine.stage or any(model.gradients.joining.is_joining for model in runtime.models):
            return
        text = runtime.input_checks.compare_copies(groups, is_prescaled=runtime.session.config.prescaled_batch)
        if text and groups.dp.rank_in_group == 0:
            runtime_module.logger.warning(text)

    def _named_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name; those of ``*args`` and ``**kwargs`` parameters under names of their own."""
        if not kwargs and len(args) in self._positional:
            return dict(zip(self._names, args, strict=False))
        bound = self._signature.bind(*args, **kwargs)
        named: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            kind = self._signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                named.update(value)
            else:
                named[name] = value
        return named

    def _call(self, arguments: Mapping[str, Any]) -> Any:
        if self._takes_names:
            return self._function(**arguments)
        positional: list[Any] = []
        keyword: dict[str, Any] = {}
        parameters = self._signature.parameters
        has_var_positional = any(name in arguments and p.kind is p.VAR_POSITIONAL for name, p in parameters.items())
        for name, value in arguments.items():
            parameter = parameters.get(name)
            if parameter is None or parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                keyword[name] = value
            elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                positional.extend(value)
            elif parameter.kind is inspect.Parameter.POSITIONAL_ONLY or has_var_positional:
                positional.append(value)
            else:
                keyword[name] = value
        return self._function(*positional, **keyword)

    def _split(self, arguments: Mapping[str, Any], config: Config) -> Microbatches:
        return split(
            arguments,
            config.microbatches,
            self._axes,
            self._whole,
            is_uneven_allowed=config.uneven_microbatches == "exact",
            reader=self._lists,
            variadic=self._variadic,
        )

    def _say(self, runtime: Runtime, notices: Mapping[Hashable, str]) -> None:
        """Each once, and not by every rank."""
        for subject, text in notices.items():
            if subject not in self._said and runtime.session.groups.world.rank_in_group == 0:
                runtime_module.logger.warning(text)
            self._said.add(subject)

    def _trace(self, runtime: Runtime, arguments: Mapping[str, Any], config: Config) -> list[DistributedModel]:
        """Run the body once on the first microbatch, for real, on the unsplit models; returns those that it calls."""
        copies: dict[int, torch.Tensor] = {}  # by id: the same tensor twice stays one

        def copied(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            return copies.setdefault(id(leaf), leaf.detach().clone().requires_grad_(leaf.requires_grad))

        # Of copies, since the body may write to its inputs and the step itself is yet to come.
        first = trees.map_leaves(copied, self._split(arguments, config).arguments[0])
        running = runtime.step = RunningStep(is_tracing=True)
        # What the body and its hooks count and collect would be there once more on the ranks that trace.
        kept = KeptState((model.module for model in runtime.models), [self._function])
        try:
            self._call(first)
        finally:
            runtime.step = None
            kept.restore()
        return [model for model in running.models if isinstance(model, DistributedModel)]

    def _run(
        self, runtime: Runtime, running: RunningStep, microbatches: Microbatches, seed: int, number: int
    ) -> tuple[list[Any], list[float]]:
        """The outputs of the microbatches, and the weights of their losses: 0 where there was none."""
        engine = runtime.engine
        device = runtime.session.device
        is_on_cpu = device.type == "cpu"
        dp_rank = runtime.session.groups.dp.rank_in_group
        runtime.step = running
        num_microbatches = len(microbatches.arguments)
        frames = [RandomFrames(device, seed, number, dp_rank, index) for index in range(num_microbatches)]
        saved = SavedGenerators(drawn_from(device), has_numpy=runtime.is_pipelined)

        def call(index: int) -> Any:
            arguments = microbatches.arguments[index]
            return self._call(arguments if is_on_cpu else _on_device(arguments, device))

        runs = [
            MicrobatchRun(self._function, functools.partial(call, index), frames[index], microbatches.weights[index])
            for index in range(num_microbatches)
        ]
        modes = (torch.is_grad_enabled(), *[model.training for model in runtime.models])
        kind: Hashable = (self, num_microbatches, *modes)
        try:
            _check_microbatches(runtime, microbatches)
            run = run_step if runtime.is_pipelined else run_locally
            outputs, given = run(
                engine, runs, kind, before_last_backward=running.arm, detach_outputs=self._detach_outputs
            )
            return outputs, [weight or 0.0 for weight in given]
        finally:
            saved.restore()


def _check_microbatches(runtime: Runtime, microbatches: Microbatches) -> None:
    """Split layers are called once for each microbatch, by all ranks of a TP_GROUP. Collective over it."""
    active = runtime.session
    if active.groups.tp.size == 1 or not any(
        row.split is not None for model in runtime.models for row in model.table.rows()
    ):
        return
    lengths = []
    for arguments in microbatches.arguments:
        tensors = [leaf for leaf in trees.leaves(dict(arguments)) if isinstance(leaf, torch.Tensor) and leaf.ndim]
        lengths.append(tensors[0].shape[0] if tensors else 0)
    check_microbatches(active.groups.tp, len(lengths), lengths, active.config.microbatches)


def _trained_flags(runtime: Runtime) -> bytes:
    """For each parameter of the wrapped models, wherever it lives, whether it is trained."""
    models = runtime.models
    with DisableTorchFunctionSubclass():
        return bytes([parameter.requires_grad for model in models for _, parameter in model.table.parameters()])


def _check_trained(runtime: Runtime, own: bytes, first: bytes) -> None:
    """Compare with pp_rank 0: what is frozen decides what travels backwards, also from and to other stages."""
    if own == first or len(own) != len(first):
        return
    names = [model.title_of(row.name) for model in runtime.models for row, _ in model.table.parameters()]
    index = next(index for index, flag in enumerate(own) if flag != first[index])
    raise DivergenceError(
        f"parameter '{names[index]}' has requires_grad={bool(own[index])} on pp_rank {runtime.engine.stage} and "
        f"{bool(first[index])} on pp_rank 0: freeze and unfreeze parameters on all stages alike, those of other "
        "stages, too\n"
        "  wrong: for name, parameter in model.named_parameters():  # after the first step what this rank holds\n"
        "  right: for name, parameter in model.virtual_named_parameters():  # all, in every place\n"
        "             parameter.requires_grad_(...)"
    )


def _normal(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor) or not leaf.is_inference():
        return leaf
    with torch.inference_mode(False):
        return leaf.clone()


def _on_device(arguments: Mapping[str, Any], device: torch.device) -> Mapping[str, Any]:
    moved: dict[str, Any] = trees.map_leaves(
        lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, dict(arguments)
    )
    return moved


def step(
    function: Callable[..., Any] | None = None,
    *,
    non_split_inputs: Iterable[str] | None = None,
    input_split_axes: Mapping[str, int] | None = None,
    detach_outputs: bool = True,
) -> Any:
    """Decorate one forward (and backward) pass: each call splits its arguments into microbatches and runs the function
    once for each. A call is collective over PP_GROUP and TP_GROUP, one that trains over DP_GROUP, too.

    ``@smp.step``, ``@smp.step()`` and ``@smp.step(non_split_inputs=[...], ...)`` all work. All ranks of a PP_GROUP must
    call the same step functions in the same order. With pipelining the inputs are those of pp_rank 0. Inside, use
    ``model.backward(loss)``; call the optimizer outside.

    Args:
        function: the step function. Tensors among its arguments, also inside containers, are split; an object with
            ``smp_slice(num_mb, mb, axis)`` splits itself; anything else is passed as it is.
        non_split_inputs: names of arguments that go whole to every microbatch.
        input_split_axes: for names of arguments, the axis along which their tensors are split; 0 for all others.
        detach_outputs: False: returned tensors keep their graph (with pipelining: they require grad, the graph has been
            used).

    Returns:
        The decorated function, whose calls give returned tensors as :class:`StepOutput`, other values as lists, one
        entry per microbatch, equal on all ranks of the PP_GROUP.

    Source: smp-api section 4.
    """
    if function is not None and not callable(function):
        raise SMPConfigError(
            f"smp.step takes keyword arguments only, got {function!r}: write @smp.step(non_split_inputs=[...])"
        )

    def decorate(inner: Callable[..., Any]) -> StepFunction:
        return StepFunction(inner, non_split_inputs, input_split_axes, detach_outputs)

    return decorate if function is None else decorate(function)


def is_tracing() -> bool:
    """Whether the body of a step function runs for the trace of the first step. Local. Source: smp-api section 1."""
    running = runtime_module.current().step
    return running is not None and running.is_tracing


def num_microbatches() -> int:
    """The configured number of microbatches. Local. Source: smp-api section 18."""
    return runtime_module.current().session.config.microbatches


__all__ = ["DistributedModel", "StepFunction", "is_tracing", "num_microbatches", "step"]
