"""The engine of one process: what is placed where, the program that runs, the interception of calls and operations."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from modelparallel.comm.stages.transport import StageTransport
from modelparallel.errors import DivergenceError, StepUsageError, UnsupportedError
from modelparallel.parameters.retired import RetiredParameter, in_their_place
from modelparallel.pipeline.bodies import WorkerPool
from modelparallel.pipeline.local_program import LocalProgram
from modelparallel.pipeline.operations import calls, conversions, doors, glue, transforms
from modelparallel.pipeline.operations.captured_values import Captured
from modelparallel.pipeline.operations.placed_modules import PlacedModule
from modelparallel.pipeline.program.first_run import ActivationStore
from modelparallel.pipeline.program.program import CountWork, Program
from modelparallel.pipeline.program.randomness import RandomFrames, may_draw, unit_number
from modelparallel.pipeline.recompute.region import RecomputedRegion
from modelparallel.pipeline.schedule.chains import Work
from modelparallel.pipeline.side_doors.kept_state import MISSING
from modelparallel.pipeline.side_doors.kept_values import refuse_graph
from modelparallel.pipeline.step_plans import StepPlans
from modelparallel.pipeline.values.buffers import BufferHabits
from modelparallel.pipeline.values.functions import traits_of
from modelparallel.pipeline.values.stage_tensor import StageTensor
from modelparallel.pipeline.values.stage_view import PlacedTensor
from modelparallel.pipeline.values.structures import Structure
from modelparallel.torch_compat import (
    DELETED,
    FORWARD_HOOKS,
    CheckpointFunction,
    DisableTorchFunctionSubclass,
    current_backward_id,
    install_call,
    intercepted_checkpoints,
    intercepted_function_apply,
    noticed_attributes,
    noticed_tensor_hooks,
    resume_function_mode,
    suspend_function_mode,
)
from modelparallel.torch_compat.conversions import intercepted_conversions
from modelparallel.torch_compat.private_parts import has_compiled_call
from modelparallel.torch_compat.transforms import intercepted_transforms, module_of_backward_hook

#: Operations on a tensor that show its gradient.
_LOOKS_AT_GRADIENT = ("grad", "register_hook", "register_post_accumulate_grad_hook")
_CHECKPOINT = "a region of torch.utils.checkpoint"


class _GlueMode(TorchFunctionMode):
    """Sees every operation outside the placed modules: those on parameters, on promoted tensors, and random ones."""

    def __init__(self, engine: PipelineEngine) -> None:
        super().__init__()
        self._engine = engine

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        engine = self._engine
        if engine.is_native:
            return func(*args, **kwargs)
        if RetiredParameter in types:
            args, kwargs = in_their_place(func, args, kwargs)
        traits = traits_of(func)
        if traits.is_metadata:
            with DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        program = engine.program
        if program is not None and (
            StageTensor in types
            or engine.has_placed(program, args, kwargs)
            or (traits.is_random and program.inside is not None)
        ):
            return glue.run(engine, program, func, args, kwargs)
        if program is None and func is torch.Tensor.backward:
            raise StepUsageError(
                "loss.backward() inside a function decorated with @smp.step: write model.backward(loss), which averages"
                " over the microbatches and lets the gradients be reduced over the data-parallel ranks"
            )
        if program is not None and traits.name in _LOOKS_AT_GRADIENT and args and program.is_leaf(args[0]):
            refuse_graph([], engine.placed)
        if engine.frames is not None and traits.is_random:
            engine.frames.enter_glue_operation()
        result = func(*args, **kwargs)
        if program is not None:
            if traits.is_in_place:
                # torch.nn.init passes its tensor by name.
                program.note_plain_write(args[0] if args else kwargs.get("tensor", kwargs.get("input")))
            elif engine.is_discovering:
                program.note_made(result)
            if program.region is not None and not traits.is_in_place:
                program.region.note_plain(result)
        return result


class _Natively:
    """While a module or an operation runs at its home nothing of the engine is in between."""

    __slots__ = ("_engine", "_is_suspended", "_was_native")

    def __init__(self, engine: PipelineEngine) -> None:
        self._engine = engine

    def __enter__(self) -> None:
        engine = self._engine
        self._was_native = engine.is_native
        engine.is_native = True
        self._is_suspended = suspend_function_mode(engine.mode)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_suspended:
            resume_function_mode(self._engine.mode)
        self._engine.is_native = self._was_native


class PipelineEngine:
    """One per process; all distributed models of the process share it, so that values may flow from one into another.

    ``transport`` is None without pipelining; then only the random frames of the units are at work.
    """

    def __init__(
        self,
        device: torch.device,
        transport: StageTransport | None,
        push_limit_bytes: int,
        schedule_kind: str = "interleaved",
        active_microbatches: int | None = None,
    ) -> None:
        self.device = device
        self.stage = transport.stage if transport is not None else 0
        self.num_stages = transport.num_stages if transport is not None else 1
        self._transport = transport
        self.push_limit_bytes = push_limit_bytes
        self.placed: dict[int, PlacedTensor] = {}
        self.copied: list[nn.Parameter] = []  # of modules that several stages have
        self.structures: dict[Hashable, Structure] = {}
        self.plans = StepPlans(schedule_kind, active_microbatches)
        self.workers = WorkerPool()
        #: How often everything was forgotten; see agree().
        self.generation = 0
        #: The work of each placed module, as far as it is known.
        self.costs: dict[str, Work] = {}
        #: Where it is not: finds it out, in the first step of a kind.
        self.count_work: CountWork | None = None
        #: The most microbatches that were under way here in the last step.
        self.last_peak_active = 0
        self.structures_of_known: dict[Hashable, Structure] = {}  # of operations on values that all stages can read
        self.program: Program | None = None
        self.local_program: LocalProgram | None = None
        self.frames: RandomFrames | None = None
        self.kinds_without_random_glue: set[Hashable] = set()
        self.is_native = False
        #: What the transform of torch.func that runs here has captured.
        self.captured: Captured | None = None
        #: Whether the step that runs is the first of its kind.
        self.is_discovering = False
        #: Whether a region runs (for the first or the second time) that will be, or is, recomputed.
        self.is_in_region = False
        self.buffer_habits = BufferHabits()
        #: Modules of which was said that several stages recompute them, by id.
        self.known_to_span: set[int] = set()
        self.activation_store: ActivationStore | None = None  # of inputs of recomputed regions, in the meantime
        self.mode = _GlueMode(self)
        #: The attributes that the module which runs at its home has assigned: (module, name, what was there before).
        self.assigned: dict[tuple[int, str], tuple[nn.Module, str, Any]] | None = None
        self._module_places: dict[int, tuple[int, str]] = {}
        self._homes: weakref.WeakKeyDictionary[nn.Module, frozenset[int]] = weakref.WeakKeyDictionary()
        self._entries: list[PlacedModule] = []
        self._entry_of: dict[int, PlacedModule] = {}  # by id of the module
        self._roots: list[nn.Module] = []
        self._assigned_buffers: list[tuple[nn.Module, str, torch.Tensor | None]] = []
        self._loose_buffers: list[tuple[nn.Module, str]] = []  # without a home
        self._loose_values: dict[tuple[nn.Module, str], torch.Tensor | None] = {}
        # Where a parameter is in the lists of placed modules, by id.
        self._places_of: dict[int, list[tuple[list[nn.Parameter], int]]] = {}

    @property
    def transport(self) -> StageTransport:
        if self._transport is None:
            raise StepUsageError("there is no pipeline (pipeline_parallel_degree is 1)")
        return self._transport

    # Placing

    def place_tensor(self, tensor: torch.Tensor, name: str, home: int) -> None:
        """Note the home of a parameter or stateful buffer. Call it before the other stages drop the storage."""
        self._homes.clear()
        self.placed[id(tensor)] = PlacedTensor(tensor, name, home, tuple(tensor.shape), tensor.stride())

    def replace_tensor(self, old: nn.Parameter, new: Sequence[nn.Parameter]) -> None:
        """Others have taken the place of ``old``, at its home; nothing here keeps it alive. No effect if it has none.

        ``new``: all that stand for it, the one that is asked whether it is trained first.
        """
        for parameters, place in self._places_of.pop(id(old), ()):
            parameters[place] = new[0]
            self._places_of.setdefault(id(new[0]), []).append((parameters, place))
        placed = self.placed.pop(id(old), None)
        if placed is not None:
            self.placed.update((id(tensor), replace(placed, tensor=tensor)) for tensor in new)

    def place_buffer(self, owner: nn.Module, name: str) -> None:
        """Note that glue may assign a new value to this placed buffer (``self.average = 0.9 * self.average + ...``)."""
        self._assigned_buffers.append((owner, name, owner._buffers[name]))

    def settle_buffers(self, program: Program) -> None:
        """After the forward of a microbatch: values that glue has assigned to buffers go into the buffers themselves,
        at their homes.
        """
        for owner, name, buffer in self._assigned_buffers:
            assigned = owner._buffers.get(name)
            if buffer is None or not isinstance(assigned, StageTensor):
                continue
            home = self.placed[id(buffer)].home
            program.carries_state = True
            program.fetch([assigned], home, f"value of buffer '{name}'")
            if home == self.stage:
                with torch.no_grad():
                    buffer.copy_(program.local(assigned))
            owner._buffers[name] = buffer
        for owner, name in self._loose_buffers:
            assigned = owner._buffers.get(name)
            if isinstance(assigned, StageTensor):
                owner._buffers[name] = program.written.assign(self._loose_values.get((owner, name)), assigned)
                self._loose_values[owner, name] = owner._buffers[name]

    def assigned_buffers(self) -> list[tuple[nn.Module, str, torch.Tensor | None]]:
        """The buffers that glue may assign to, and what they are now."""
        assigned = [(owner, name) for owner, name, _ in self._assigned_buffers]
        return [(owner, name, owner._buffers.get(name)) for owner, name in (*assigned, *self._loose_buffers)]

    def place_module(
        self,
        module: nn.Module,
        name: str,
        home: int,
        copies: Sequence[int] = (),
        *,
        unit_name: str | None,
        model: int = 0,
        around: PlacedModule | None = None,
    ) -> None:
        """From now on calls of ``module`` inside a step run on ``home``, those inside other modules also on the stages
        that have ``copies``. ``unit_name``: in its model, if it is a unit. ``around``: see doors.py.
        """
        unit = None if unit_name is None else unit_number(unit_name)
        entry = PlacedModule(module, name, home, unit, (home, *copies), model=model, around=around)
        self._homes.clear()
        if copies:
            self.copied.extend(entry.parameters)
        is_compiled = has_compiled_call(module)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.is_native:
                if self.program is not None:
                    return calls.run_inside(self, entry, args, kwargs)
                return entry.inner(*args, **kwargs)
            program = self.program
            if program is None:
                if self.stage not in entry.holders:
                    raise StepUsageError(
                        f"module '{entry.name}' is on pp_rank {entry.home} and was called on pp_rank {self.stage} "
                        "outside a step: "
                        "call the model inside a function decorated with @smp.step"
                    )
                return entry.inner(*args, **kwargs)
            if entry.watch.is_touched():
                return doors.run(self, program, entry, args, kwargs)
            return self.run_placed(program, entry, args, kwargs, entry.inner)

        entry.inner = install_call(module, call)
        if not is_compiled and not entry.watch.has_replaced_forward():
            doors.Door(self, entry)
        self._entries.append(entry)
        for place, parameter in enumerate(entry.parameters):
            self._places_of.setdefault(id(parameter), []).append((entry.parameters, place))
        self._entry_of[id(module)] = entry

    def place_inside(self, module: nn.Module, name: str, around: PlacedModule) -> None:
        """From now on ``module``, a part of ``around``, which was opened, runs at its home by itself, too."""
        if id(module) not in self._entry_of:
            self.place_module(module, name, around.home, unit_name=None, around=around)

    def run_placed(
        self, program: Program, entry: PlacedModule, args: Any, kwargs: Any, call: Callable[..., Any]
    ) -> Any:
        """Run ``call``, the module's own, at its home; every stage of the pipeline does."""
        is_suspended = suspend_function_mode(self.mode)  # a native region, without the cost of an object
        self.is_native = True
        try:
            return calls.run(self, program, entry, args, kwargs, call)
        finally:
            self.is_native = False
            if is_suspended:
                resume_function_mode(self.mode)

    def place_model(self, root: nn.Module) -> None:
        """``root`` holds placed modules. Its buffers that have no home by now are ordinary tensors on every stage."""
        number = len(self._roots)
        self._roots.append(root)
        for name, module in root.named_modules():
            self._module_places.setdefault(id(module), (number, name))
        for owner in root.modules():
            for name, buffer in owner._buffers.items():
                if buffer is None or id(buffer) not in self.placed:
                    self._loose_buffers.append((owner, name))
                    self._loose_values[owner, name] = buffer

    @property
    def roots(self) -> Sequence[nn.Module]:
        """The modules of all models that are partitioned."""
        return self._roots

    def holds_placed(self, module: nn.Module) -> bool:
        """Whether ``module`` is above placed modules."""
        placed = {id(entry.module) for entry in self._entries}
        return any(id(part) in placed for part in module.modules() if part is not module)

    def has_copy(self, tensor: torch.Tensor) -> bool:
        """Whether this stage holds a tied copy of a placed parameter of another one."""
        return any(
            self.stage in entry.holders and any(tensor is known for known in entry.parameters)
            for entry in self._entries
            if len(entry.holders) > 1
        )

    def module_places(self) -> dict[int, tuple[int, str]]:
        """(number of the model, name in it) of the modules, by id; equal on all stages."""
        return self._module_places

    def module_at(self, number: int, name: str) -> nn.Module:
        """The module of that number and name."""
        return self._roots[number].get_submodule(name)

    def _notice_assignment(self, module: nn.Module, name: str, value: Any) -> bool:
        """Before an attribute is assigned, or a hook registered: note it; whether it must not be."""
        assigned = self.assigned
        if assigned is None:
            program = self.program
            is_of_glue = not self.is_native and not self.runs_again
            if program is not None and is_of_glue and (self.is_discovering or program.sightings is not None):
                program.carries_state |= program.assignments.note(module, name, value)
            # A module that runs once more in the backward would put its own tensor over the value of the step.
            return self.runs_again and isinstance(vars(module).get(name), StageTensor)
        if (id(module), name) not in assigned and name not in FORWARD_HOOKS and value is not DELETED:
            assigned[id(module), name] = (module, name, vars(module).get(name, MISSING))
        return False

    def homes_of(self, module: nn.Module) -> frozenset[int]:
        """The stages on which the weights of ``module`` are; empty without any, and before the partition."""
        known = self._homes.get(module)
        if known is not None:
            return known
        entries = {id(entry.module): entry.home for entry in self._entries}
        homes: set[int] = set()
        pending = [module]
        while pending:
            part = pending.pop()
            if id(part) in entries:
                homes.add(entries[id(part)])
                continue
            own = (*part._parameters.values(), *part._buffers.values())
            homes.update(self.placed[id(tensor)].home for tensor in own if id(tensor) in self.placed)
            pending.extend(part.children())
        self._homes[module] = result = frozenset(homes)
        return result

    def buffer_states(self, names: Iterable[str]) -> dict[str, Hashable]:
        """The states of the buffers of the placed modules with these names; see :func:`calls.buffer_state`."""
        wanted = set(names)
        return {entry.name: calls.buffer_state(entry.module) for entry in self._entries if entry.name in wanted}

    def frame_unit(self, module: nn.Module, name: str, model: int, *, is_compiled: bool = False) -> None:
        """Without pipelining: seed the generators around each call of a unit inside a step, as a pipeline would.

        Around compiled code the engine is out of the way in any case: torch would compile it, too.
        """
        number = unit_number(name) if may_draw(module) else None
        if number is None and not is_compiled:
            return

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.is_native or self.frames is None:
                return inner(*args, **kwargs)
            if number is not None:
                self.frames.enter_unit(number, self.frames.note_model(model))
            with _Natively(self):
                return inner(*args, **kwargs)

        inner = install_call(module, call)

    def has_placed(self, program: Program, args: Any, kwargs: Any) -> bool:
        """Whether a placed tensor, or one that has become a StageTensor, is among the arguments."""
        placed, written = self.placed, program.written
        pending = [*args, *kwargs.values()] if kwargs else list(args)
        for value in pending:
            if isinstance(value, torch.Tensor):
                if id(value) in placed or written.find(program, value) is not None:
                    return True
            elif isinstance(value, (list, tuple)):
                pending.extend(value)
        return False

    # Running

    def natively(self) -> _Natively:
        """A context in which torch runs untouched."""
        return _Natively(self)

    @contextmanager
    def running(self, program: Program) -> Iterator[None]:
        """Run the user's code as ``program``."""
        self.program, self.frames, self.is_native, self.is_in_region = program, program.frames, False, False
        try:
            with self.mode:
                yield
        finally:
            self.leave()

    @contextmanager
    def intercepting(self) -> Iterator[None]:
        """See the calls of torch that pass by the interception of tensors; around all programs of a step."""
        with (
            intercepted_function_apply(self._function_apply),
            intercepted_checkpoints(self._checkpoint),
            noticed_tensor_hooks(self._notice_hook),
            intercepted_transforms(functools.partial(transforms.call, self)),
            noticed_attributes(self._notice_assignment),
            intercepted_conversions(self._is_converted),
        ):
            yield

    def _is_converted(self, module: nn.Module, convert: Callable[[Any], Any]) -> bool:
        """Whether glue converts a module of a model, which then is as it should be already."""
        place = self._module_places.get(id(module))
        if self.program is None or self.is_native or place is None:
            return False
        with self.natively():
            conversions.check_keeps_kind(module, place[1], convert)
        return True

    def _notice_hook(self) -> None:
        if self.program is not None:
            self.program.is_whole_backward = True

    def leave(self) -> tuple[Any, ...]:
        """No program runs now; returns what :meth:`enter` needs to go on with the one that did."""
        state = (self.program, self.frames, self.is_native, self.is_in_region)
        self.program, self.frames, self.is_native, self.is_in_region = None, None, False, False
        return state

    def enter(self, state: tuple[Any, ...]) -> None:
        """Go on with the program that was left."""
        self.program, self.frames, self.is_native, self.is_in_region = state

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Leave the program that runs now for a while."""
        state = self.leave()
        try:
            yield
        finally:
            self.enter(state)

    @property
    def runs_module(self) -> bool:
        """Whether a module runs at its home now, for the first time or once more in the backward."""
        return self.is_native or self.runs_again

    @property
    def runs_again(self) -> bool:
        """Whether code that runs now is part of a module's second run in the backward, if it is of one."""
        return self.program is None and current_backward_id() != -1

    # Agreement of the stages

    def forget(self) -> None:
        """Drop what was learned from earlier steps; on all stages at the same step."""
        self.structures.clear()
        self.plans.clear()
        self.generation += 1

    def knowledge(self) -> tuple[int, int, int]:
        """What must be equal on all stages when a step begins."""
        return self.generation, len(self.structures), len(self.plans)

    def agree(self, knowledge: tuple[int, int, int]) -> None:
        """Compare with pp_rank 0, which forgets everything after a step that failed: some stages may then have
        learned what others have not.
        """
        if knowledge[0] != self.generation:
            self.forget()
            self.generation = knowledge[0]
        if knowledge != self.knowledge():
            raise DivergenceError(
                f"pp_rank {self.stage} and pp_rank 0 have seen different steps {self.knowledge()} / {knowledge}, "
                "probably since one failed on some ranks only: begin again from a checkpoint on all ranks"
            )

    def run_locally(self, program: LocalProgram, call: Callable[[], Any], *, is_watched: bool) -> Any:
        """Run the user's code without a pipeline; only a watched run sees the operations between the modules."""
        self.local_program, self.frames = program, program.frames
        try:
            if is_watched:
                with self.mode:
                    return call()
            return call()
        finally:
            self.local_program = self.frames = None

    def run_glue(self, program: Program, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return glue.run(self, program, func, args, kwargs)

    # Recomputation

    def recomputed(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], **options: Any
    ) -> Any:
        """``function(*args, **kwargs)`` as a region of its own, with the ``options`` of :class:`RecomputedRegion`."""
        if self.is_in_region or not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with RecomputedRegion(self, function, args, kwargs, **options):
            return function(*args, **kwargs)

    def _checkpoint(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context_fn: Any
    ) -> AbstractContextManager[None] | None:
        """What the region of a non-reentrant ``torch.utils.checkpoint`` is; None: torch's own.

        Inside a module at its home torch's own is right, but its backward must not be taken apart: it would be
        recomputed for each part.
        """
        if self.is_in_region:
            return nullcontext()
        if self.is_native or self.program is None:
            if self.program is not None:
                self.program.is_whole_backward = True
            return None
        return RecomputedRegion(self, function, args, kwargs, what=_CHECKPOINT, contexts=context_fn())

    def _reentrant_checkpoint(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        # Like the original: without an input that requires grad the region is no part of any graph.
        needs_grad = any(isinstance(value, torch.Tensor) and value.requires_grad for value in args)
        with torch.set_grad_enabled(torch.is_grad_enabled() and needs_grad):
            return self.recomputed(function, args, {}, what=_CHECKPOINT)

    def _refuse_backward_hooks(self, module: nn.Module) -> NoReturn:
        name = next((name for root in self._roots for name, part in root.named_modules() if part is module), "")
        parts = [entry.name for entry in self._entries if any(entry.module is part for part in module.modules())]
        where = f"Register it on the modules that are placed ({', '.join(parts[:4])}{', ...' if parts[4:] else ''})"
        raise UnsupportedError(
            f"module '{name}' ({type(module).__name__}) has full backward hooks (or pre-hooks) and is not placed as a "
            f"whole (pp_ranks {', '.join(map(str, sorted(self.homes_of(module)))) or 'of its data'}): its gradients of "
            f"inputs and outputs are on several stages. {where if parts else 'Remove it'}, or use "
            "tensor.register_hook on what goes in and comes out"
        )

    def _function_apply(
        self, function_class: Any, apply: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        program = self.program
        if function_class is CheckpointFunction and (self.is_in_region or (program is not None and not self.is_native)):
            return self._reentrant_checkpoint(args[0], args[2:])
        if self.is_native or program is None:
            if program is not None and function_class is CheckpointFunction:
                program.is_whole_backward = True  # see _checkpoint
            return apply(*args, **kwargs)
        if any(isinstance(value, StageTensor) for value in args) or self.has_placed(program, args, kwargs):
            if (hooked := module_of_backward_hook(function_class)) is not None:
                self._refuse_backward_hooks(hooked)
            with _Natively(self):
                return glue.run(self, program, apply, args, kwargs)
        return apply(*args, **kwargs)
