"""Regions whose saved tensors are dropped in the forward and made again in the backward.

[Note: regions] Every operation of the forward saves tensors for its backward. While a region runs, a hook of torch puts
an empty holder in the place of each; the graph itself, and the engine's tape, are what they are without recomputation.
The first holder that the backward opens runs the function of the region once more: what is saved in this second run
fills the holders, in the same order. So a region is recomputed once for each run of it, whatever pieces its backward
comes in (several stage visits, or input and weight gradients apart), and all of it counts as a forward only: the graph
of the second run is thrown away.

[Note: two kinds of regions] Without a pipeline, or inside a module at its home, the second run is an ordinary call on
the kept inputs. Between the placed modules the function is part of the program that all stages run, and the second run
is a replay of it on this stage alone: see second_run.py.

A region inside a region is recomputed with the outer one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import nn

from modelparallel import trees
from modelparallel.errors import RecomputationError
from modelparallel.pipeline.operations.running_stage import RunningStage
from modelparallel.pipeline.program.first_run import ActivationStore, KeptTensor, KeptValue, Record
from modelparallel.pipeline.program.program import Program
from modelparallel.pipeline.recompute.second_run import ReplayProgram
from modelparallel.pipeline.values.buffers import KeptBuffers
from modelparallel.pipeline.values.stage_tensor import StageTensor
from modelparallel.torch_compat import ThreadState
from modelparallel.torch_compat.generators import SavedGenerators, drawn_from

#: (around the first run, around the second run), as torch's create_selective_checkpoint_contexts makes them.
Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


class _AllMade(BaseException):
    """Raised in a second run when all holders are filled: what would follow is not needed."""


class _Holder:
    """In the place of a saved tensor. ``region`` is None once the value is there."""

    __slots__ = ("__weakref__", "region", "value")

    def __init__(self, region: RecomputedRegion) -> None:
        self.region: RecomputedRegion | None = region
        self.value: torch.Tensor | None = None


def _open_holder(saved: Any) -> torch.Tensor:
    if type(saved) is not _Holder:
        tensor: torch.Tensor = saved
        return tensor
    if saved.region is not None:
        saved.region.run_again()
    if saved.value is None:
        raise RecomputationError("a recomputed tensor is missing; please report this with the model")
    return saved.value


class RecomputedRegion:
    """One run of a function whose saved tensors are made again. A context around the first run.

    what: for messages. preserves_random: the second run draws the random numbers of the first. contexts: for selective
    recomputation. modules: whose buffers the second run must not change. store: where inputs may be kept.
    """

    def __init__(
        self,
        engine: RunningStage,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        what: str,
        preserves_random: bool = True,
        contexts: Contexts | None = None,
        modules: Sequence[nn.Module] = (),
        store: ActivationStore | None = None,
    ) -> None:
        self._engine = engine
        self._what = what
        self._function: Callable[..., Any] | None = function
        self._program = engine.program
        self._inside = None if engine.program is None else engine.program.inside
        self._is_native = engine.is_native
        self._contexts = contexts
        self._record = None if self._is_native or self._program is None else Record()
        self._store = store
        self._inputs: list[KeptTensor] = []
        self._arguments: Any = (args, kwargs)
        self._modules = modules
        self._buffers: list[KeptBuffers] = []
        self._thread_state = ThreadState()
        self._thread_state.keep_dispatch_modes()
        self._generators = SavedGenerators(drawn_from(engine.device), has_numpy=self._record is not None)
        self._preserves_random = preserves_random or self._record is not None
        self._frames = None if engine.frames is None else engine.frames.at_this_point()
        self._holders: list[weakref.ref[_Holder]] = []
        self._metadata: list[tuple[torch.Size, torch.dtype]] = []
        self._num_made = 0
        self._is_open = False
        self._was_in_region = False
        self._stack: ExitStack | None = None

    def _keep_all(self) -> None:
        self._arguments = trees.map_leaves(self._keep, self._arguments)
        if self._record is None:
            self._buffers = [KeptBuffers(module, self._engine.buffer_habits) for module in self._modules]
        self._modules = ()

    def _keep(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or isinstance(leaf, nn.Parameter):
            return leaf
        if self._record is not None and self._program is not None:
            value = self._program.returned(leaf)
            if isinstance(value, StageTensor):
                if value.is_pinned_home:
                    return leaf
                kept_value = self._record.kept_value(value)
                if kept_value.local is not None:
                    self._inputs.append(kept_value.local)
                return kept_value
        kept = KeptTensor(leaf)
        self._inputs.append(kept)
        return kept

    def _offload(self) -> None:
        if self._store is None:
            self._inputs = []
            return
        program = self._program
        key = (0, 0) if program is None else (program.microbatch, program.tracker.visit)
        for kept in self._inputs:
            kept.move_to(self._store, key)
        self._inputs = []

    # The first run

    def __enter__(self) -> None:
        engine = self._engine
        with engine.natively():
            self._keep_all()
        self._is_open = True
        self._was_in_region, engine.is_in_region = engine.is_in_region, True
        stack = self._stack = ExitStack()
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._drop, _open_holder))
        if self._record is not None and self._program is not None:
            self._program.region = self._record
            if self._contexts is not None:
                self._program.around_compute = self._contexts[0]
        elif self._contexts is not None:
            stack.enter_context(self._contexts[0])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_open = False
        self._engine.is_in_region = self._was_in_region
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.__exit__(kind, error, trace)
        if self._record is not None and self._program is not None:
            self._program.region = self._program.around_compute = None
        if not self._holders or error is not None:
            self._let_go()
            return
        with self._engine.natively():
            if self._record is not None:
                self._record.close()
            for kept in self._buffers:
                kept.forget_constants()
            self._offload()

    def _drop(self, tensor: torch.Tensor) -> Any:
        if not self._is_open or self._engine.program is not self._program:
            return tensor  # the work of another microbatch, done while this one waits
        holder = _Holder(self)
        self._holders.append(weakref.ref(holder))
        self._metadata.append((tensor.shape, tensor.dtype))
        return holder

    # The second run

    def run_again(self) -> None:
        """Run the function once more, and fill the holders that are still there."""
        if self._is_open:
            raise RecomputationError(
                f"{self._what} asks for a gradient (torch.autograd.grad, backward) of what it has just computed: "
                "such a module cannot be recomputed, leave it out of the activation checkpointing"
            )
        function, engine = self._function, self._engine
        if function is None:
            raise RecomputationError(f"{self._what} was recomputed and is needed again; please report this")
        outside = SavedGenerators(drawn_from(engine.device), has_numpy=self._record is not None)
        state, assigned = engine.leave(), engine.assigned_buffers()
        program = self._program
        if self._record is not None and program is not None:
            program = ReplayProgram(program, self._record, self._frames, self._what)
            program.inside = self._inside
            if self._contexts is not None:
                program.around_compute = self._contexts[1]
        engine.enter((program, self._frames, self._is_native, True))
        try:
            if self._preserves_random:
                self._generators.restore()
            args, kwargs = self._arguments_of(program)
            with self._thread_state.active(), self._second_run(program):
                function(*args, **kwargs)
        except _AllMade:
            pass
        finally:
            for owner, name, buffer in assigned:  # the second run may have assigned values of its own
                owner._buffers[name] = buffer
            engine.enter(state)
            outside.restore()
            if torch.is_autocast_cache_enabled():
                torch.clear_autocast_cache()  # casts of weights, which nobody else would clear before they change
        if self._num_made < len(self._holders):
            raise self._differs(f"it saved {self._num_made} tensors, and {len(self._holders)} the first time")
        self._let_go()

    @contextmanager
    def _second_run(self, program: Program | None) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._fill, _open_holder))
            if self._contexts is not None and not isinstance(program, ReplayProgram):
                stack.enter_context(self._contexts[1])
            for kept in self._buffers:
                stack.enter_context(kept.stand_ins())
            yield

    def _arguments_of(self, program: Program | None) -> Any:
        def given(leaf: Any) -> Any:
            if isinstance(leaf, KeptTensor):
                return leaf.tensor(self._what)
            if isinstance(leaf, KeptValue) and isinstance(program, ReplayProgram):
                return program.shadow(leaf)
            return leaf

        return trees.map_leaves(given, self._arguments)

    def _fill(self, tensor: torch.Tensor) -> torch.Tensor:
        index = self._num_made
        if index >= len(self._holders):
            raise _AllMade
        self._num_made += 1
        if (tensor.shape, tensor.dtype) != self._metadata[index]:
            shape, dtype = self._metadata[index]
            raise self._differs(
                f"the saved tensor {index} is {tuple(tensor.shape)} {tensor.dtype}, and was {tuple(shape)} {dtype} the "
                "first time"
            )
        tensor = tensor.detach()
        holder = self._holders[index]()
        if holder is not None:
            holder.value, holder.region = tensor, None
        if self._num_made == len(self._holders):
            raise _AllMade
        return tensor

    def _differs(self, how: str) -> RecomputationError:
        return RecomputationError(
            f"the recomputation of {self._what} differs from its first run: {how}. It must depend on its inputs, its "
            "weights and torch's random numbers alone, and not on what has changed since (a counter, an attribute, an "
            "input written to in place)"
        )

    def _let_go(self) -> None:
        """The second run is done: what was kept for it may go."""
        self._function = self._arguments = self._record = self._contexts = None
        self._inputs = []
        self._program = None
        self._buffers = []
