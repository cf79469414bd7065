"""A microbatch's run through the user's function: at once, or in pieces with other microbatches in between.

[Note: threads] A body that must wait for another stage while other microbatches go on keeps its Python frames; only a
thread can keep those of arbitrary code. So such a body has a thread of its own, but one runs at a time: the interpreter
hands the turn to it and sleeps until the body waits again or is done. What torch keeps per thread is handed on
(ThreadState), what it keeps per process and a program may change (Python's and numpy's random numbers) is kept apart
per body.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Any

import torch

from modelparallel.pipeline.program.program import NeededMessage, Program
from modelparallel.torch_compat import ThreadState
from modelparallel.torch_compat.generators import SavedGenerators


class AbandonedBody(BaseException):
    """Raised in a body that will not be continued, so that its ``finally`` clauses run; the step has failed."""


class Body:
    """The body of one microbatch, run by the calling thread in one go.

    ``run`` executes it and returns its output; ``wait`` is what it waits for while it is not running.
    """

    def __init__(self, program: Program, run: Callable[[], Any]) -> None:
        self.program = program
        self._run = run
        self.is_started = False
        self.is_done = False
        self.output: Any = None
        self.wait: NeededMessage | None = None

    @property
    def visit(self) -> int:
        """The visit that it is in, or that begins with what it waits for."""
        return self.program.tracker.visit

    def resume(self) -> None:
        """Run it; returns when it is done."""
        self.is_started = True
        self.output = self._run()
        self.is_done = True

    def take_output(self) -> Any:
        """What it has returned; once."""
        output, self.output = self.output, None
        return output

    def abandon(self) -> None:
        """End a body that is not done."""

    def close(self) -> None:
        """Let go of everything."""
        self.output, self._run, self.wait = None, _nothing, None


def _nothing() -> None:
    return None


class ThreadBody(Body):
    """A body that may be left while it waits: ``resume`` returns when it waits again or is done."""

    def __init__(self, program: Program, run: Callable[[], Any], state: ThreadState, pool: WorkerPool) -> None:
        super().__init__(program, run)
        self._state = state
        self._pool = pool
        self._worker: _Worker | None = None
        self._error: BaseException | None = None
        self._is_abandoned = False
        self._saved: tuple[Any, ...] | None = None
        self._context = contextvars.copy_context()
        program.on_wait = self.suspend

    def resume(self) -> None:
        if self._worker is None:
            self.is_started = True
            self._worker = self._pool.take()
            self._worker.job = self._work
        if self._saved is not None:
            _restore_process_state(self.program, self._saved)
        self.wait = None
        worker = self._worker
        worker.run_turn()
        if self.is_done or self._error is not None:
            self._worker = None
            self._pool.give_back(worker)
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        """In the worker's thread."""
        try:
            with self._state.active():
                self.output = self._context.run(self._run)
            self.is_done = True
        except AbandonedBody:
            self.is_done = True
        except BaseException as error:
            self._error = error

    def suspend(self, wait: NeededMessage) -> None:
        """In the worker's thread: give the turn back until the message is there."""
        self.wait = wait
        self._saved = _process_state(self.program)
        if self._worker is not None:
            self._worker.yield_turn()
        if self._is_abandoned:
            raise AbandonedBody("the step has failed")

    def abandon(self) -> None:
        if not self.is_started or self.is_done or self._worker is None:
            return
        self._is_abandoned = True
        self._error = None
        for _ in range(3):  # a body that catches everything may wait again
            self._worker.run_turn()
            if self.is_done or self._error is not None:
                self._pool.give_back(self._worker)
                break
        self._worker = None


def _process_state(program: Program) -> tuple[Any, ...]:
    """What the process has one of and each body its own."""
    return (program.engine.leave(), SavedGenerators((), has_numpy=True))


def _restore_process_state(program: Program, saved: tuple[Any, ...]) -> None:
    engine_state, generators = saved
    program.engine.enter(engine_state)
    generators.restore()


class _Worker(threading.Thread):
    """A thread that runs bodies, one after another, when it has the turn."""

    def __init__(self) -> None:
        super().__init__(name="microbatch", daemon=True)
        self.job: Callable[[], None] = lambda: None
        self._turn = threading.Semaphore(0)
        self._back = threading.Semaphore(0)
        self._num_torch_threads = torch.get_num_threads()

    def run(self) -> None:
        torch.set_num_threads(self._num_torch_threads)
        while True:
            self._turn.acquire()
            job = self.job
            job()
            self.job = lambda: None
            del job
            self._back.release()

    def run_turn(self) -> None:
        """Let the worker run until it yields or its job is done."""
        self._turn.release()
        self._back.acquire()

    def yield_turn(self) -> None:
        """In the worker's thread: wait for the next turn."""
        self._back.release()
        self._turn.acquire()


class WorkerPool:
    """Workers are kept from step to step: a new thread costs time, and memory that the old one has freed."""

    def __init__(self) -> None:
        self._idle: list[_Worker] = []

    def take(self) -> _Worker:
        """A worker that is free."""
        if self._idle:
            return self._idle.pop()
        worker = _Worker()
        worker.start()
        return worker

    def give_back(self, worker: _Worker) -> None:
        """The job of ``worker`` is done."""
        self._idle.append(worker)
