"""No hang without a name: stages that go apart, sleep, fail or die end within seconds, and say what happened where."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pool import RankFailure, run_ranks
from stages_apart import (
    MODE,
    PATIENT,
    THIS,
    another_way,
    batch,
    calls_once_less,
    calls_once_more,
    dies,
    dies_before_it_is_sent_to,
    finish,
    forgets_backward,
    go_apart,
    is_apart,
    raises,
    reads_large,
    sleeps,
    wrapped,
)
from training import step_of

#: Seconds in which an error must have come: a second until a stage tells that it waits, and a lot for a busy machine.
SOON = 8.0


@pytest.fixture(autouse=True)
def leaves_no_process_behind() -> Iterator[None]:
    """The pool ends what it started, but must have had nothing to end by force but what a test has stopped."""
    yield
    assert not multiprocessing.active_children()


def run(bodies: list[Callable[..., Any]], num_stages: int, layout: str, num_good: int, **more: Any) -> list[Any]:
    parameters = PATIENT | {"pipeline_parallel_degree": num_stages} | more.pop("parameters", {})
    return run_ranks(go_apart, num_stages, bodies, layout, num_good, parameters=parameters, **more)


APART = [calls_once_more, calls_once_less, reads_large, forgets_backward, another_way]
TOOK = re.compile(rf"pp_rank (\d) took ({THIS}:\d+.*?) \(event .*, pp_rank (\d) took ({THIS}:\d+.*?) \(event ")


@pytest.mark.parametrize(
    ("num_stages", "layout", "num_good"),  # the last: in the discovery step, and in a planned one
    [
        (2, "straight", 0),
        (3, "turns", 0),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product([2, 3], ["straight", "turns"], [0, 2])
            if case not in [(2, "straight", 0), (3, "turns", 0)]
        ),
    ],
)
def test_stages_that_go_apart_name_both_lines(num_stages: int, layout: str, num_good: int) -> None:
    ranks = run(APART, num_stages, layout, num_good)
    for index, body in enumerate(APART):
        errors = [found[index] for found in ranks]
        for rank, (error, seconds) in enumerate(errors):
            where = f"{body.__name__}, pp_rank {rank}"
            assert seconds < SOON, f"{where} after {seconds:.1f} s"
            if error == "no error":
                continue  # it needed nothing from the others any more
            assert error.startswith("DivergenceError: "), f"{where}: {error}"
            both = TOOK.search(error)
            assert both and "0" in both.group(1, 3) and both.group(1) != both.group(3), f"{where}: {error}"
            assert both.group(2) != both.group(4), f"{where}: {error}"
            names_step = re.search(rf"{THIS}:\d+, called from {THIS}:\d+\)", error) is not None
            assert names_step or body is another_way, f"{where}: {error}"  # which calls no function of the test's own
        assert any(error != "no error" for error, _ in errors), body.__name__


@pytest.mark.parametrize("layout", ["straight", "turns"])
def test_exception_and_death_of_one_stage_reach_all(layout: str) -> None:
    ranks = run([raises], 3, layout, 2)
    for rank, [(error, seconds)] in enumerate(ranks):
        assert "KeyError: 'only here'" in error and seconds < SOON, f"pp_rank {rank}: {error}"
        if rank:
            assert f"pp_rank {rank}, microbatch" in error and "waiting to receive" in error
            assert re.search(rf"last events of microbatch \d on pp_rank {rank}:\n  event 1: ", error), error
    ranks = run([dies], 3, layout, 2, return_failures=True)
    assert isinstance(ranks[1], RankFailure)
    for rank in (0, 2):
        [(error, seconds)] = ranks[rank]
        assert seconds < SOON and "the connection is gone" in error, error
        assert f"pp_rank {rank}, microbatch" in error and f"on pp_rank {rank}:\n  event 1: " in error, error


def test_send_to_a_stage_that_has_died_names_it_and_the_last_events() -> None:
    ranks = run([dies_before_it_is_sent_to], 3, "turns", 2, return_failures=True)
    [(error, seconds)] = ranks[0]
    assert seconds < SOON and "waiting to send" in error and "to pp_rank 1 (" in error, error
    assert "pp_rank 0, microbatch" in error and "on pp_rank 0:\n  event 1: " in error, error


# One rank does not call the step function


def skip_a_call(layout: str, then: str) -> tuple[str, float]:
    """pp_rank 1 leaves out the third of four calls."""
    import modelparallel as smp
    from modelparallel.job import session

    model = wrapped(layout)
    train = smp.step(sleeps)
    MODE.update(is_on=False)
    error, start = "no error", time.perf_counter()
    try:
        for number in range(4):
            if number != 2 or smp.pp_rank() != 1:
                start = time.perf_counter()
                train(model, batch())
            if then == "barrier":
                smp.barrier()
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    seconds = time.perf_counter() - start
    if then == "barrier":
        raise RuntimeError(f"{seconds:.1f} s {error}")  # ends the process, and with it the barrier of the other
    session.shutdown()  # as at the end of a script
    return error, seconds


@pytest.mark.parametrize("layout", [pytest.param("straight", marks=pytest.mark.slow), "turns"])
def test_skipped_call_before_a_barrier_names_both_lines(layout: str) -> None:
    parameters = PATIENT | {"pipeline_parallel_degree": 2}
    found = run_ranks(skip_a_call, 2, layout, "barrier", parameters=parameters, return_failures=True, grace=1)
    seconds, error = found[0].summary.removeprefix("RuntimeError: ").split(" s ", 1)
    assert error.startswith("DivergenceError: these stages wait for each other"), error
    assert re.search(rf"pp_rank 0, microbatch 0: waiting to receive .* from pp_rank 1 .*{THIS}:\d+", error), error
    assert re.search(r"pp_rank 1, waiting in smp.barrier of world group \[0, 1\] \(test_diagnosis.py:\d+\)", error), (
        error
    )
    assert float(seconds) < SOON


@pytest.mark.parametrize("num_stages", [2, 3])
def test_skipped_call_of_a_rank_that_ends_is_named(num_stages: int) -> None:
    parameters = PATIENT | {"pipeline_parallel_degree": num_stages}
    found = run_ranks(skip_a_call, num_stages, "turns", "end", parameters=parameters, return_failures=True)
    assert found[1][0] == "no error"
    for rank in {*range(num_stages)} - {1}:
        error, seconds = found[rank]
        assert "waiting to receive" in error and f"{THIS}:" in error and seconds < SOON, error
        assert "its process has ended, after call 3 of a step function" in error, error


# Slow is not astray


def test_slow_stage_is_not_reported() -> None:
    ranks = run([sleeps], 2, "turns", 2, seconds=4.0)
    assert [error for [(error, _)] in ranks] == ["no error"] * 2


def talks(model: Any, x: Tensor) -> Tensor:
    """A step with waits of random length on every stage, and values that are read."""
    import modelparallel as smp

    y = model(x)
    for _ in range(3):
        if torch.rand(()) < 0.5:
            time.sleep(0.004 * (smp.pp_rank() + 1))
        y = model.module.b(y * y.mean().item())
        y = model.module.d(y)
    return finish(model, y)


def talk_all_the_time(layout: str, num_steps: int) -> str:
    import modelparallel as smp
    from modelparallel.comm.stages import transport

    transport._FIRST_PAUSE, transport._LONGEST_PAUSE = 0.0003, 0.001
    told = 0
    tell = transport.StageTransport._tell_of

    def counted(self: Any, waiting: Any) -> None:
        nonlocal told
        told += 1
        tell(self, waiting)

    transport.StageTransport._tell_of = counted
    model = wrapped(layout)
    train = smp.step(talks)
    try:
        for number in range(num_steps):
            torch.manual_seed(1000 * number + smp.pp_rank())
            train(model, batch())
            if number % 3 == smp.pp_rank():
                time.sleep(0.005)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "" if told > num_steps else f"told only {told} times"


@pytest.mark.parametrize(("num_stages", "layout"), [(2, "straight"), (2, "turns"), (3, "turns")])
def test_no_false_alarm_when_stages_tell_all_the_time(num_stages: int, layout: str) -> None:
    """Every wait of a millisecond is told to all: whatever is concluded then must be true at any moment of a step."""
    parameters = PATIENT | {"pipeline_parallel_degree": num_stages, "timeout_seconds": 20, "seed": 1}
    assert run_ranks(talk_all_the_time, num_stages, layout, 25, parameters=parameters) == [""] * num_stages


def slow_around_the_step(num_steps: int) -> list[float]:
    """pp_rank 1 is late where the copies of a shared weight are made equal, and where their gradients are added."""
    import modelparallel as smp
    from tied_model import batches, loss_of, make_tied

    model = smp.DistributedModel(make_tied())
    place, finish_step = model.place, model.finish_step

    def late(inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if smp.pp_rank() == 1:
                time.sleep(2.5)
            return inner(*args)

        return call

    model.place, model.finish_step = late(place), late(finish_step)
    train = step_of(loss_of)
    return [float(train(model, *batches(1)[0]).reduce_mean()) for _ in range(num_steps)]


def test_stage_that_is_slow_around_the_step_is_not_reported() -> None:
    parameters = {"pipeline_parallel_degree": 2, "microbatches": 2, "tied_weights": "replicate", "timeout_seconds": 30}
    first, second = run_ranks(slow_around_the_step, 2, 1, parameters=parameters)
    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["straight", "turns"])
def test_stage_that_is_very_slow_is_not_reported(layout: str) -> None:
    ranks = run([sleeps], 3, layout, 2, seconds=20.0, timeout=120)
    for [(error, seconds)] in ranks:
        assert error == "no error" and seconds > 19


@pytest.mark.parametrize("layout", [pytest.param("straight", marks=pytest.mark.slow), "turns"])
def test_timeout_says_where_the_slow_stage_stands(layout: str) -> None:
    parameters = {"timeout_seconds": 1.5, "microbatches": 2}
    ranks = run([sleeps], 2, layout, 2, seconds=4.0, parameters=parameters)
    [(error, seconds)] = ranks[0]
    assert error.startswith("WaitTimeoutError: pp_rank 0, microbatch 0: waiting to receive ") and seconds < 4, error
    assert "within timeout_seconds=1.5" in error
    assert re.search(rf"pp_rank 1 is alive and in the step, at {THIS}:\d+", error), error
    assert "last events of microbatch 0 on pp_rank 0:\n  event 1: " in error
    [(error, seconds)] = ranks[1]
    if layout == "straight" and error == "no error":
        return  # it had received everything that it needs
    assert "the step of pp_rank 0 has failed: WaitTimeoutError: pp_rank 0, microbatch 0: " in error, error
    assert "last events of microbatch" in error and seconds < SOON


def test_stopped_process_is_named_as_silent() -> None:
    ranks = run_ranks(
        be_stopped, 2, parameters=PATIENT | {"pipeline_parallel_degree": 2, "timeout_seconds": 2.5},
        return_failures=True, grace=1,
    )  # fmt: skip
    assert "pp_rank 1 has not said anything: its process is stopped" in ranks[0].summary, ranks[0].summary


def be_stopped() -> None:
    import modelparallel as smp

    [(error, _)] = go_apart([stops], "straight", 1)
    if smp.pp_rank() == 0:
        raise RuntimeError(error)


def stops(model: Any, x: Tensor) -> Tensor:
    y = model(x)
    if is_apart(1):
        os.kill(os.getpid(), signal.SIGSTOP)
    return finish(model, y)
