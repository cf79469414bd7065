"""Runs a step: without a pipeline, or the programs of one stage by the plan of the step.

The first step of a kind runs in *discovery order*, microbatch after microbatch, all forwards, then all backwards, each
message waited for. That is right for every deterministic program; planned schedules are compared with it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from modelparallel import trees
from modelparallel.comm.stages.transport import MessageKind, MessageName
from modelparallel.pipeline.bodies import Body, ThreadBody
from modelparallel.pipeline.engine import PipelineEngine
from modelparallel.pipeline.interpreter import Interpreter, discovery_actions
from modelparallel.pipeline.left_behind import leave_behind
from modelparallel.pipeline.local_program import LocalProgram
from modelparallel.pipeline.loss_weights import checked_weight
from modelparallel.pipeline.program.program import Program
from modelparallel.pipeline.program.randomness import RandomFrames
from modelparallel.pipeline.program.turns import Sightings
from modelparallel.pipeline.schedule.chains import Follower, StepPlan, WayRecorder
from modelparallel.pipeline.side_doors.kept_state import KeptState
from modelparallel.pipeline.side_doors.ledger import Ledger
from modelparallel.pipeline.values.stage_tensor import StageTensor
from modelparallel.pipeline.values.wire import TENSORS_PER_MESSAGE, pack, receive_tensors
from modelparallel.plan.schedule import BACKWARD_FIRST, Action, ActionKind
from modelparallel.torch_compat import ThreadState


class MicrobatchRun(NamedTuple):
    """What one microbatch needs: the call of the user's ``function``, its random frames, its share of the batch."""

    function: Callable[..., Any]
    call: Callable[[], Any]
    frames: RandomFrames
    weight: float = 1.0


def run_locally(
    engine: PipelineEngine,
    runs: Sequence[MicrobatchRun],
    kind: Hashable,
    *,
    before_last_backward: Callable[[], None],
    detach_outputs: bool,
) -> tuple[list[Any], list[float | None]]:
    """Run each microbatch, in order, without a pipeline; returns the outputs and the weights of the losses.

    ``kind`` says what is run (which function, in which mode).

    [Note: watching] Seeding random operations in glue needs a look at every operation between the modules, about a
    microsecond each. So only the first step of a kind is watched; if no random operation was seen there, later ones are
    not. Where such an operation first appears later (behind a branch on data), it draws from the generator as the last
    unit has left it: random and reproducible, but then not equal to the same run under a pipeline.
    """
    is_watched = kind not in engine.kinds_without_random_glue
    outputs: list[Any] = []
    weights: list[float | None] = []
    for run in runs:
        run.frames.enter_microbatch(seeds_numpy=False)
        program = LocalProgram(run.frames, run.weight, before_last_backward if run is runs[-1] else None)
        outputs.append(engine.run_locally(program, run.call, is_watched=is_watched))
        weights.append(program.loss_weight)
    if is_watched and all(run.frames.num_glue_operations == 0 for run in runs):
        engine.kinds_without_random_glue.add(kind)
    return trees.map_leaves(_detached, outputs) if detach_outputs else outputs, weights


def run_step(
    engine: PipelineEngine,
    runs: Sequence[MicrobatchRun],
    kind: Hashable,
    *,
    before_last_backward: Callable[[], None],
    detach_outputs: bool,
) -> tuple[list[Any], list[float | None]]:
    """Run all microbatches, forwards and backwards; returns the outputs and the weights of the losses, equal on all
    stages. Collective over PP_GROUP.

    ``kind`` says what is run (which function, in which mode, how many microbatches): the first step of a kind runs in
    discovery order, the next ones by the plan that was made of it.
    """
    plan, is_first = engine.plans.get(kind), engine.plans.is_open(kind)
    step = _StepRun(engine, runs, plan, kind if is_first else None)
    try:
        outputs = step.run(before_last_backward)
        if is_first:
            engine.plans.meet(engine.transport)
        else:
            engine.plans.compare(kind, step.programs, step.waiting_share, engine.transport)
        results = _share_outputs(engine, outputs, step.programs[0], detach_outputs=detach_outputs)
        engine.transport.drain()
    except BaseException as error:
        engine.transport.abandon(error)
        step.abandon()
        raise
    finally:
        step.close()
    for program in step.programs:
        program.check_leaves()
    if not is_first:
        engine.plans.note_run(kind, has_left=any(program.tracker.has_left for program in step.programs))
    return [output for output, _ in results], [_weight_of(weight) for _, weight in results]


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


def _weight_of(weight: Any) -> float | None:
    return None if weight is None else checked_weight(weight)


class _StepRun:
    """The programs and bodies of one step on this stage."""

    def __init__(
        self,
        engine: PipelineEngine,
        runs: Sequence[MicrobatchRun],
        plan: StepPlan | None,
        discovered_kind: Hashable | None,
    ) -> None:
        self._engine = engine
        self._function = runs[0].function
        self._discovered_kind = discovered_kind
        self._num_microbatches = len(runs)
        self._plan = plan
        self._is_sequential = plan is None or plan.is_sequential
        #: The part of its time in which this stage waited for others.
        self.waiting_share = 0.0
        self._sightings = None if self._is_sequential else Sightings()
        #: What the first microbatch of the discovery step has left, and the running statistics before each.
        self._kept: KeptState | None = None
        self._statistics: list[Hashable] = []
        self.programs = [self._make_program(index, run) for index, run in enumerate(runs)]
        engine.transport.logs = [program.log for program in self.programs]
        engine.is_discovering = plan is None
        self._state = ThreadState()
        self._bodies: list[Body] = []
        for program, run in zip(self.programs, runs, strict=True):
            execute = functools.partial(self._execute, program, run)
            if self._is_sequential:
                self._bodies.append(Body(program, execute))
            else:
                self._bodies.append(ThreadBody(program, execute, self._state, engine.workers))

    def _make_program(self, index: int, run: MicrobatchRun) -> Program:
        engine, plan = self._engine, self._plan
        tracker = WayRecorder() if plan is None else Follower(plan, engine.stage)
        # [Note: structures in a step] An announcement is made by the first program that needs it. Bodies that run one
        # after another know what the earlier ones have heard. Of bodies that take turns nobody can say on all stages
        # alike which was first, so each hears for itself, and they put together what they know when the step is over.
        structures = engine.structures if self._is_sequential else {}
        is_last = self._discovered_kind is not None and index == self._num_microbatches - 1
        count_work = engine.count_work if is_last else None
        program = Program(engine, index, run.frames, tracker, structures, run.weight, self._sightings, count_work)
        program.ledger = Ledger() if is_last else None
        return program

    def _execute(self, program: Program, run: MicrobatchRun) -> Any:
        """The whole forward of one microbatch."""
        engine = self._engine
        run.frames.enter_microbatch(seeds_numpy=True)
        with engine.running(program):
            output = run.call()
        leave_behind(program)
        program.log.leave()
        returned = trees.map_leaves(program.returned, (output, program.loss_weight))
        if program.ledger is not None:
            program.ledger.note("the output of the step function", trees.leaves(returned))
        del output  # a tensor that only it refers to does not outlive the microbatch
        engine.settle_buffers(program)
        program.written.settle(program)
        if self._discovered_kind is not None:
            self._look_for_state(program)
        if self._sightings is not None:
            self._sightings.done(program.microbatch)
        program.end_forward(has_backward=engine.plans.has_backward)
        return returned

    def _look_for_state(self, program: Program) -> None:
        """In the discovery step: whether the microbatch has left something behind that the next one may find."""
        # What the first one changes may be set once and for all.
        if self._kept is not None and self._kept.has_changed():
            program.carries_state = True
        if self._kept is None and self._num_microbatches > 1:
            self._kept = KeptState(self._engine.roots, [self._function])
        if isinstance(program.tracker, WayRecorder):
            # Running statistics depend on the order of the calls, which differs if a module is called in two visits.
            repeated = program.tracker.repeated_modules(self._engine.stage)
            statistics: list[Hashable] = [*sorted(self._engine.buffer_states(repeated).items())]
            if program.microbatch and statistics != self._statistics:
                program.carries_state = True
            self._statistics = statistics

    def run(self, before_last_backward: Callable[[], None]) -> list[Any]:
        """All forwards and backwards; the outputs of the microbatches."""
        engine, plan = self._engine, self._plan
        actions = self._unplanned_actions() if plan is None else plan.schedule.actions[engine.stage]
        interpreter = Interpreter(
            engine.transport,
            self._bodies,
            actions,
            is_sequential=self._is_sequential,
            backward_first=plan is not None and plan.schedule.kind in BACKWARD_FIRST,
            active_microbatches=engine.plans.limit_of(plan, len(self._bodies)),
            state=self._state,
            outside=engine.outside,
            before_last_backward=before_last_backward,
            is_lockstep=engine.plans.lockstep_group is not None,
            announce_next=None if engine.activation_store is None else self._fetch_activations,
            horizon=0 if engine.activation_store is None else engine.activation_store.horizon,
        )
        start, waited = time.perf_counter(), engine.transport.seconds_waited
        with engine.intercepting():
            interpreter.run()
        spent = time.perf_counter() - start
        self.waiting_share = (engine.transport.seconds_waited - waited) / spent if spent else 0.0
        engine.last_peak_active = interpreter.peak_active
        if not self._is_sequential:
            for program in self.programs:
                engine.structures.update(program.structures)
        return [body.take_output() for body in self._bodies]

    def _fetch_activations(self, actions: Sequence[Action]) -> None:
        """These actions come next: what their backwards need may come back from host memory."""
        store = self._engine.activation_store
        if store is not None:
            backwards = (ActionKind.B, ActionKind.I)
            store.fetch((action.microbatch, action.visit) for action in actions if action.kind in backwards)

    def _unplanned_actions(self) -> Iterator[Action]:
        """Discovery order. The backwards of a kind's first step come in the order of the plan that is made of its
        forwards, so that gradients are added up as in the later steps: a run that goes on from a checkpoint begins with
        such a step, and gives what it would have given without the interruption, to the bit.
        """
        engine = self._engine
        forwards, backwards = discovery_actions(len(self._bodies))
        yield from forwards
        plan: StepPlan | None = None
        if self._discovered_kind is not None:
            plan = engine.plans.note_discovery(self._discovered_kind, self.programs, engine.costs, engine.transport)
        if plan is None:
            yield from backwards
            return
        visits = plan.visits_of_points(engine.stage)
        for program in self.programs:
            program.number_visits(visits)
        yield from (action for action in plan.schedule.actions[engine.stage] if action.kind is not ActionKind.F)

    def abandon(self) -> None:
        """The step has failed: end the bodies that are not done."""
        for body in self._bodies:
            body.abandon()

    def close(self) -> None:
        """Let go of everything, also of what refers to itself: that would be freed late."""
        for body in self._bodies:
            body.close()
        for program in self.programs:
            program.close()


def _share_outputs(engine: PipelineEngine, outputs: list[Any], program: Program, *, detach_outputs: bool) -> list[Any]:
    """The outputs with every StageTensor replaced by its value: one message per home and receiver."""
    by_home: dict[int, list[StageTensor]] = {}
    for leaf in trees.leaves(outputs):
        if isinstance(leaf, StageTensor):
            group = by_home.setdefault(leaf.home, [])
            if not any(leaf is other for other in group):
                group.append(leaf)
    values: dict[int, torch.Tensor] = {}
    for home in sorted(by_home):
        for start in range(0, len(by_home[home]), TENSORS_PER_MESSAGE):
            part = by_home[home][start : start + TENSORS_PER_MESSAGE]
            for tensor, value in zip(part, _shared_values(engine, home, part, program), strict=True):
                if tensor.spec.requires_grad and not detach_outputs and home != engine.stage:
                    value.requires_grad_()
                values[id(tensor)] = value.detach() if detach_outputs else value
    whole: list[Any] = trees.map_leaves(
        lambda leaf: values[id(leaf)] if isinstance(leaf, StageTensor) else leaf, outputs
    )
    return whole


def _shared_values(
    engine: PipelineEngine, home: int, tensors: list[StageTensor], program: Program
) -> list[torch.Tensor]:
    """The values of ``tensors``, which ``home`` has, on this stage."""
    name = MessageName(MessageKind.OUTPUTS, program.microbatch, program.next_event(f"outputs of pp_rank {home}"))
    what = "the step's outputs"
    specs = [tensor.spec for tensor in tensors]
    if home == engine.stage:
        values = [program.local(tensor) for tensor in tensors]
        presence, payload = pack(values, specs, [True] * len(values))
        for peer in engine.transport.peers():
            engine.transport.send(peer, name, payload, what, presence=presence)
        return values
    received = receive_tensors(engine.transport, home, name, specs, what)
    return [
        value.to(engine.device) if spec.device_type != "cpu" else value
        for value, spec in zip(received, specs, strict=True)
        if value is not None
    ]
