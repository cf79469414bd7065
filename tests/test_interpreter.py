"""The interpreter on all stages of a pipeline at once, in threads of one process and with programs that only send.

Programs that follow the plan run in its order; programs that go another way, on any microbatch, end all the same.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelparallel.comm.stages.transport import Awaited, LocalTransport, MessageKind, MessageName
from modelparallel.errors import WaitTimeoutError
from modelparallel.pipeline.bodies import Body, ThreadBody, WorkerPool
from modelparallel.pipeline.interpreter import Interpreter
from modelparallel.pipeline.program.program import NeededMessage
from modelparallel.pipeline.schedule.chains import Follower, StepPlan, build_chain
from modelparallel.pipeline.schedule.making import make_schedule
from modelparallel.plan.schedule import ActionKind
from modelparallel.torch_compat import ThreadState

NOTHING = torch.empty(0, dtype=torch.uint8)
TIMEOUT = 10.0


class FakeProgram:
    """Walks through a list of entries on one stage, as a Program does."""

    def __init__(
        self, microbatch: int, recorded: list[Any], plan: StepPlan, transport: LocalTransport, log: list
    ) -> None:
        self.microbatch = microbatch
        self.recorded = recorded
        self.transport = transport
        self.tracker = Follower(plan, transport.stage)
        self.engine = SimpleNamespace(leave=lambda: (), enter=lambda state: None)
        self.on_wait: Any = None
        self.is_whole_backward = False
        self.log = log
        self.tape: list[tuple[str, int, int, int]] = []
        self.weights: dict[int, int] = {}

    def body(self) -> None:
        stage, has_root = self.transport.stage, False
        for event, (kind, first, second) in enumerate(self.recorded):
            name = MessageName(MessageKind.ACTIVATIONS, self.microbatch, event)
            if kind == "M":
                is_planned = self.tracker.note_move(first, second)
                if stage == first:
                    self.transport.send(second, name, NOTHING)
                    self.tape.append(("send", event, second, self.tracker.visit))
                elif stage == second:
                    self.take(first, name, is_planned)
                    self.tape.append(("receive", event, first, self.tracker.visit))
            elif kind == "V":
                is_planned = self.tracker.note_value(first)
                if stage != first:
                    self.take(first, name, is_planned)
                    continue
                for peer in self.transport.peers():
                    self.transport.send(peer, name, NOTHING)
            elif kind == "R":
                self.tracker.note_root(first)
                has_root = True
                if stage == first:
                    self.tape.append(("root", event, first, self.tracker.visit))
            elif stage == first:
                self.log.append(("F", self.microbatch, self.tracker.visit))
        if not has_root:
            self.tape.clear()
        self.tracker.finish()

    def take(self, source: int, name: MessageName, is_planned: bool) -> None:
        if not self.transport.has(source, name) or self.tracker.begins_visit:
            self.on_wait(NeededMessage(Awaited(source, name, "a value", "line"), is_planned))
        assert self.transport.has(source, name), "resumed without its message"
        self.transport.receive(source, name)

    @property
    def has_backward_left(self) -> bool:
        return bool(self.tape)

    @property
    def last_visit(self) -> int:
        return self.tape[-1][3]

    def next_gradient(self) -> Awaited | None:
        kind, event, peer, _ = self.tape[-1]
        if kind != "send":
            return None
        return Awaited(peer, MessageName(MessageKind.GRADIENTS, self.microbatch, event), "a gradient", "line")

    def backward_event(self, *, is_split: bool) -> None:
        awaited = self.next_gradient()
        kind, event, peer, visit = self.tape.pop()
        if awaited is not None:
            self.transport.receive(awaited.source, awaited.name)
        elif kind == "receive":
            self.transport.send(peer, MessageName(MessageKind.GRADIENTS, self.microbatch, event), NOTHING)
        self.log.append(("I" if is_split else "B", self.microbatch, visit))

    def backward_weights(self, visit: int) -> None:
        self.log.append(("W", self.microbatch, visit))


def run_stage(
    transport: LocalTransport, plan: StepPlan, programs: list[list[Any]], cap: int, found: dict[int, Any]
) -> None:
    @contextlib.contextmanager
    def outside() -> Iterator[None]:
        yield

    if plan.schedule.kind not in ("interleaved", "zero_bubble"):
        cap = len(programs)
    log: list[tuple[str, int, int]] = []
    num_armed: list[int] = []
    transport.begin_step(0)
    try:
        state, pool = ThreadState(), WorkerPool()
        made = [FakeProgram(index, entries, plan, transport, log) for index, entries in enumerate(programs)]
        bodies: list[Any] = [
            Body(program, program.body) if plan.is_sequential else ThreadBody(program, program.body, state, pool)
            for program in made
        ]
        interpreter = Interpreter(
            transport, bodies, plan.schedule.actions[transport.stage], is_sequential=plan.is_sequential,
            backward_first=plan.schedule.kind in ("interleaved", "zero_bubble"), active_microbatches=cap, state=state,
            outside=outside, before_last_backward=lambda: num_armed.append(len(log)),
        )  # fmt: skip
        interpreter.run()
        assert all(body.is_done and not body.program.tape for body in bodies)
        assert len(num_armed) == 1
        found[transport.stage] = (log, interpreter.peak_active)
    except BaseException as error:
        transport.abandon(error)
        found[transport.stage] = error


def run_all(plan: StepPlan, programs: list[list[Any]], cap: int, timeout: float = TIMEOUT) -> list[Any]:
    transports = LocalTransport.make_all(plan.chain.num_stages, timeout)
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=run_stage, args=(transport, plan, programs, cap, found)) for transport in transports
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout + 5)
        assert not thread.is_alive()
    for result in found.values():
        if isinstance(result, BaseException):
            raise result
    return [found[stage] for stage in range(plan.chain.num_stages)]


@st.composite
def programs_of(draw: Any, max_stages: int = 4) -> tuple[int, list[Any]]:
    """Values move wherever they like, work is done in between, values are read by all now and then."""
    num_stages = draw(st.integers(2, max_stages))
    generator = random.Random(draw(st.integers(0, 10**6)))
    return num_stages, random_program(generator, num_stages, draw(st.integers(1, 8)))


def random_program(generator: random.Random, num_stages: int, num_moves: int) -> list[Any]:
    here, recorded = 0, [("C", 0, "module")]
    for _ in range(num_moves):
        if generator.random() < 0.15:
            recorded.append(("V", here, -1))
            continue
        source = here if generator.random() < 0.7 else generator.randrange(num_stages)
        here = (source + generator.choice([1, 1, 1, *range(1, num_stages)])) % num_stages
        recorded.append(("M", source, here))
        recorded.append(("C", here, "module"))
    if generator.random() < 0.9:
        recorded.append(("R", here, -1))
    return recorded


def plan_of(num_stages: int, recorded: list[Any], num_microbatches: int, kind: str, cap: int) -> StepPlan:
    chain, starts, entries = build_chain(recorded, num_stages, {})
    if not any(entry[0] == "R" for entry in recorded):
        kind = "forward_only"
    return StepPlan(entries, starts, chain, make_schedule(chain, num_microbatches, kind, cap))


KINDS = ["simple", "interleaved", "zero_bubble"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(programs_of(), st.integers(1, 5), st.integers(1, 5), st.sampled_from(KINDS))
def test_programs_that_follow_the_plan_run_in_its_order(
    made: tuple[int, list[Any]], num_microbatches: int, cap: int, kind: str
) -> None:
    num_stages, recorded = made
    plan = plan_of(num_stages, recorded, num_microbatches, kind, cap)
    for stage, (log, peak) in enumerate(run_all(plan, [recorded] * num_microbatches, cap)):
        worked = list(dict.fromkeys((m, visit) for letter, m, visit in log if letter == "F"))
        order = [(a.microbatch, a.visit) for a in plan.schedule.actions[stage] if a.kind is ActionKind.F]
        assert worked == [entry for entry in order if entry in set(worked)]
        if plan.schedule.kind in ("interleaved", "zero_bubble"):
            assert peak <= cap
        if plan.schedule.kind == "simple":
            letters = [letter for letter, _, _ in log]
            assert "F" not in letters[letters.index("B") :] if "B" in letters else True


@settings(max_examples=120, deadline=None, derandomize=True)
@given(programs_of(), st.integers(1, 5), st.integers(1, 4), st.sampled_from(KINDS), st.integers(0, 10**6))
def test_programs_that_leave_the_plan_end_all_the_same(
    made: tuple[int, list[Any]], num_microbatches: int, cap: int, kind: str, seed: int
) -> None:
    num_stages, recorded = made
    plan = plan_of(num_stages, recorded, num_microbatches, kind, cap)
    generator = random.Random(seed)
    programs = []
    for _ in range(num_microbatches):
        if generator.random() < 0.5:
            programs.append(recorded)
            continue
        kept = recorded[: generator.randrange(len(recorded) + 1)]
        programs.append(kept + random_program(generator, num_stages, generator.randrange(5)))
    for stage, (log, _) in enumerate(run_all(plan, programs, cap)):
        for index, entries in enumerate(programs):
            num_worked = sum(letter == "F" and m == index for letter, m, _ in log)
            assert num_worked == sum(entry[:2] == ("C", stage) for entry in entries)
            num_events = sum(stage in entry[1:] for entry in entries if entry[0] in "MR")
            has_root = any(entry[0] == "R" for entry in entries)
            assert sum(letter in "BI" and m == index for letter, m, _ in log) == num_events * has_root


def test_a_message_that_never_comes_ends_in_a_timeout_that_names_it() -> None:
    recorded = [("C", 0, "a"), ("M", 0, 1), ("C", 1, "b"), ("R", 1, -1)]
    plan = plan_of(2, recorded, 2, "interleaved", 2)
    transports = LocalTransport.make_all(2, 0.5)
    found: dict[int, Any] = {}
    run_stage(transports[1], plan, [recorded] * 2, 2, found)
    assert isinstance(found[1], WaitTimeoutError)
    assert "pp_rank 1, microbatch 0: waiting to receive a value from pp_rank 0 (line)" in str(found[1])


def test_bodies_keep_their_own_grad_mode_random_numbers_and_context() -> None:
    """Two bodies that take turns inside no_grad, autocast, and draws of Python's random."""
    seen: list[Any] = []

    def make(index: int) -> ThreadBody:
        program = SimpleNamespace(
            engine=SimpleNamespace(leave=lambda: (), enter=lambda state: None), tracker=SimpleNamespace(visit=0),
            on_wait=None,
        )  # fmt: skip

        def body() -> float:
            random.seed(index)
            first = random.random()
            with torch.no_grad() if index else torch.enable_grad():
                body_of.suspend(NeededMessage(Awaited(0, MessageName(MessageKind.VALUE, 0, 0), ""), True))
                seen.append((index, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
            return first + random.random()

        body_of: Any = ThreadBody(program, body, state, pool)
        return body_of

    pool = WorkerPool()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = ThreadState()
    bodies = [make(0), make(1)]
    for _ in range(2):
        for one in bodies:
            one.resume()
    assert sorted(seen) == [(0, True, True), (1, False, True)] and not torch.is_autocast_enabled("cpu")
    for index, one in enumerate(bodies):
        expected = random.Random(index)
        assert one.is_done and one.take_output() == expected.random() + expected.random()


def test_a_body_that_is_abandoned_runs_its_finally_clauses() -> None:
    left: list[str] = []
    program = SimpleNamespace(
        engine=SimpleNamespace(leave=lambda: (), enter=lambda state: None),
        tracker=SimpleNamespace(visit=0),
        on_wait=None,
    )

    def body() -> None:
        try:
            one.suspend(NeededMessage(Awaited(0, MessageName(MessageKind.VALUE, 0, 0), ""), True))
        finally:
            left.append("finally")

    one: Any = ThreadBody(program, body, ThreadState(), WorkerPool())
    one.resume()
    one.abandon()
    assert left == ["finally"] and one.is_done


def test_an_error_in_a_body_reaches_the_one_who_resumed_it() -> None:
    program = SimpleNamespace(
        engine=SimpleNamespace(leave=lambda: (), enter=lambda state: None),
        tracker=SimpleNamespace(visit=0),
        on_wait=None,
    )

    def body() -> None:
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        ThreadBody(program, body, ThreadState(), WorkerPool()).resume()
