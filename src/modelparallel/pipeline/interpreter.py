"""Runs the actions of one stage: the one interpreter of all schedules.

It goes through its stage's list of actions. A forward runs a microbatch's body until the next visit begins, a backward
replays the tape of the visit; both wait for exactly the messages that they need.

[Note: leaving the plan] The programs decide what is needed, the plan only whose turn it is; so a program that goes
another way than planned (a branch on data, a value read for the first time, a new shape) is still right. The stage then
*leaves the plan* and tells the others to do so, too: each runs whatever can run, backwards first, until the step is
over. Forwards stay in the order of the microbatches, visit by visit, since what a module keeps from call to call
(running statistics) depends on it; so on every stage the oldest microbatch that is not done may always go on, and
nothing waits for ever.

Bodies that run in one go (each stage is visited once) keep their whole order even then; what can run ahead of a wait
that the plan does not know are the backwards of earlier microbatches, and the other stages need not be told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager

from modelparallel.comm.stages.transport import Awaited, StageTransport
from modelparallel.pipeline.bodies import Body
from modelparallel.pipeline.program.program import NeededMessage
from modelparallel.plan.schedule import Action, ActionKind
from modelparallel.torch_compat import ThreadState


class Interpreter:
    """One stage's part of one step.

    bodies: one for each microbatch. actions: what the plan says. is_sequential: the bodies run in one go.
    backward_first: a backward may run before the last forward. active_microbatches: how many may be under way (what the
    actions say is not looked at). state: torch's state outside the bodies. outside: a
    context in which no program runs. before_last_backward: called once, when only one microbatch's backward is left.
    is_lockstep: other pipelines run the same, see lockstep.py. announce_next: told before each planned action which
    ``horizon`` come next, itself the first of them.
    """

    def __init__(
        self,
        transport: StageTransport,
        bodies: Sequence[Body],
        actions: Iterable[Action],
        *,
        is_sequential: bool,
        backward_first: bool,
        active_microbatches: int,
        state: ThreadState,
        outside: Callable[[], AbstractContextManager[None]],
        before_last_backward: Callable[[], None],
        is_lockstep: bool = False,
        announce_next: Callable[[Sequence[Action]], None] | None = None,
        horizon: int = 0,
    ) -> None:
        self._transport = transport
        self._bodies = bodies
        self._actions = actions
        self._is_sequential = is_sequential
        self._backward_first = backward_first
        self._active_microbatches = active_microbatches
        self._state = state
        self._outside = outside
        self._before_last_backward = before_last_backward
        self._is_lockstep = is_lockstep
        self._announce_next = announce_next
        self._horizon = horizon
        self._is_armed = False
        #: Whether this stage does not follow its plan any more.
        self.has_left = False
        #: Most microbatches whose forward had begun and whose backward was not done, for tests and reports.
        self.peak_active = 0
        self._deferred: dict[int, set[int]] = {}  # microbatch -> visits whose weights wait
        if is_sequential:
            for body in bodies:
                body.program.on_wait = self._wait_inside

    def run(self) -> None:
        """Run everything; collective over the pipeline."""
        for index, action in enumerate(self._actions):
            if self._must_leave():
                break
            if self._announce_next is not None and isinstance(self._actions, Sequence):
                self._announce_next(self._actions[index : index + 1 + self._horizon])
            self._perform(action)
        while not all(body.is_done for body in self._bodies) or self._unfinished():
            if not self._run_something():
                self._transport.wait_any(self._awaited())
        self._arm()

    # Planned

    def _must_leave(self) -> bool:
        if self._is_sequential:
            return False
        if self.has_left:
            self._transport.leave_plan()
        self.has_left = self._transport.has_left
        return self.has_left

    def _perform(self, action: Action) -> None:
        body = self._bodies[action.microbatch]
        if action.kind is ActionKind.F:
            self._forward(body, action.visit)
            return
        program = body.program
        if action.kind is ActionKind.W:
            if action.visit in self._deferred.get(action.microbatch, ()):
                self._arm_before(action.microbatch)
                self._weights(action.microbatch, action.visit)
            return
        if not body.is_done:
            self.has_left = True
            return
        self._arm_before(action.microbatch)
        is_split = action.kind is ActionKind.I
        while program.has_backward_left and program.last_visit >= action.visit:
            awaited = program.next_gradient()
            if awaited is not None and not self._wait_planned(awaited):
                return
            self._backward_event(body, is_split=is_split)

    def _wait_planned(self, awaited: Awaited) -> bool:
        """Wait for a message that it is the turn of; False if the plan is left before."""
        self._transport.wait_any([awaited], or_leave=not self._is_sequential)
        return self._is_sequential or not self._transport.has_left

    def _forward(self, body: Body, visit: int) -> None:
        while not body.is_done and (not body.is_started or body.visit <= visit):
            if body.wait is not None:
                if body.program.tracker.has_left or not body.wait.is_planned:
                    self.has_left = True
                    return
                if not self._wait_planned(body.wait.awaited):
                    return
            self._resume(body)
        self.has_left |= body.program.tracker.has_left

    def _resume(self, body: Body) -> None:
        body.resume()
        self.peak_active = max(self.peak_active, self._num_active())

    def _num_active(self) -> int:
        return sum(body.is_started and (not body.is_done or self._is_unfinished(body)) for body in self._bodies)

    # Whatever can run

    def _wait_inside(self, wait: NeededMessage) -> None:
        """A body that runs in one go needs a message."""
        awaited = wait.awaited
        self.has_left |= any(body.program.tracker.has_left for body in self._bodies)
        if (wait.is_planned and not self.has_left) or not self._backward_first or self._is_lockstep:
            self._transport.wait_any([awaited])
            return
        with self._outside(), self._state.active():
            while not self._transport.has(awaited.source, awaited.name):
                if not self._run_backward():
                    self._transport.wait_any([awaited, *self._awaited_gradients()])

    def _run_something(self) -> bool:
        """Run one piece of what can run; whether there was one."""
        if self._may_run_backward() and self._run_backward():
            return True
        for body in self._bodies_in_turn():
            if self._can_resume(body):
                self._resume(body)
                return True
        return self._run_deferred()

    def _may_run_backward(self) -> bool:
        return self._backward_first or all(body.is_done for body in self._bodies)

    def _bodies_in_turn(self) -> list[Body]:
        """The bodies whose forward may go on without overtaking the microbatch before."""
        ready = []
        before: Body | None = None
        for body in self._bodies:
            if not body.is_done and (before is None or before.is_done or before.visit > body.visit):
                ready.append(body)
            before = body
        return ready

    def _can_resume(self, body: Body) -> bool:
        if not body.is_started:
            return self._num_active() < self._active_microbatches
        return body.wait is not None and self._transport.has(body.wait.awaited.source, body.wait.awaited.name)

    def _run_backward(self) -> bool:
        for index, body in enumerate(self._bodies):
            if not body.is_done or not body.program.has_backward_left:
                continue
            awaited = body.program.next_gradient()
            if awaited is None or self._transport.has(awaited.source, awaited.name):
                self._arm_before(index)
                self._backward_event(body, is_split=False)
                return True
        return False

    def _run_deferred(self) -> bool:
        for index, visits in self._deferred.items():
            if visits:
                self._arm_before(index)
                self._weights(index, max(visits))
                return True
        return False

    def _awaited(self) -> list[Awaited]:
        # Only messages that something can be done with: for another one that is here, this would not wait at all.
        waits = [body.wait.awaited for body in self._bodies_in_turn() if body.wait is not None]
        return [*waits, *self._awaited_gradients()] if self._may_run_backward() else waits

    def _awaited_gradients(self) -> list[Awaited]:
        waits = []
        for body in self._bodies:
            if body.is_done and body.program.has_backward_left:
                awaited = body.program.next_gradient()
                if awaited is not None:
                    waits.append(awaited)
        return waits

    # Backwards

    def _backward_event(self, body: Body, *, is_split: bool) -> None:
        program = body.program
        if is_split and not program.is_whole_backward:
            self._deferred.setdefault(program.microbatch, set()).add(program.last_visit)
        program.backward_event(is_split=is_split)

    def _weights(self, microbatch: int, visit: int) -> None:
        self._deferred[microbatch].discard(visit)
        self._bodies[microbatch].program.backward_weights(visit)

    def _is_unfinished(self, body: Body) -> bool:
        return body.program.has_backward_left or bool(self._deferred.get(body.program.microbatch))

    def _unfinished(self) -> list[int]:
        return [index for index, body in enumerate(self._bodies) if self._is_unfinished(body)]

    def _arm_before(self, microbatch: int) -> None:
        """Before a backward of ``microbatch``: gradients may be reduced as they come if no other one is left."""
        if self._is_armed or not all(body.is_done for body in self._bodies):
            return
        if all(index == microbatch for index in self._unfinished()):
            self._arm()

    def _arm(self) -> None:
        if not self._is_armed:
            self._is_armed = True
            self._before_last_backward()


def discovery_actions(num_microbatches: int) -> tuple[list[Action], list[Action]]:
    """(forwards, backwards), microbatch after microbatch: right for every deterministic program."""
    forwards = [Action(ActionKind.F, index) for index in range(num_microbatches)]
    return forwards, [Action(ActionKind.B, index) for index in range(num_microbatches)]
