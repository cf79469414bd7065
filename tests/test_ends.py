"""How processes end: none aborts, none is held up, and what is waited for has a name."""

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from modelparallel.comm.ending import close_connections
from pool import RankFailure, run_ranks

PIPELINE = {"pipeline_parallel_degree": 2}
TENSOR = {"tensor_parallel_degree": 2}
SHARDED = {"sharded_data_parallel_degree": 2}


def ends_of(jobs):
    """Run jobs of ending_jobs.py; (exit codes, outputs) of the ranks of each."""
    script = Path(__file__).with_name("ending_jobs.py")
    result = subprocess.run([sys.executable, script, json.dumps(jobs)], capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stderr[-4000:]
    return [(found["codes"], found["logs"]) for found in json.loads(result.stdout.splitlines()[-1])]


def job_of(late, late_rank=1, parameters=PIPELINE, num_ranks=2):
    # The others have met in vain, and are at the end of their interpreter, when the late rank comes to its own end.
    return {
        "late": late, "late_rank": late_rank, "seconds": 2.0, "slow": 3.0, "meeting": 0.3,
        "parameters": parameters, "num_ranks": num_ranks,
    }  # fmt: skip


def check_ends(jobs):
    for job, (codes, logs) in zip(jobs, ends_of(jobs), strict=True):
        wanted = [1 if job["late"] == "error" else job.get("exit", 0)] * job["num_ranks"]
        if job["late"] == "stopped":
            wanted[job["late_rank"]] = None
        assert codes == wanted, f"{job}: {codes}\n" + "\n".join(log[-2000:] for log in logs)
        for code, log in zip(codes, logs, strict=True):
            assert code is None or ("done" in log and "terminate called" not in log), f"{job}: {log[-2000:]}"


def test_no_process_aborts_at_its_end_however_late_another_comes():
    jobs = [job_of("script"), job_of("goodbye", 0), job_of("save"), job_of("stopped")]
    if sys.platform == "linux":  # the last resort; no exit code changes
        jobs += [job_of("thread"), job_of("thread") | {"exit": 3}]
    check_ends(jobs)


@pytest.mark.skipif(sys.platform != "linux", reason="the last resort is Linux's")
def test_a_child_that_is_waited_for_may_take_longer_than_the_end_of_the_interpreter():
    """Where a thread is left, too, such as tqdm's."""
    program = """if True:
        import atexit, multiprocessing, threading, time
        from modelparallel.comm import ending

        ending._LAST_SECONDS = 10  # the end itself takes more than a second on a machine that is busy
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        atexit.register(ending.keep_from_aborting)
        multiprocessing.get_context("fork").Process(target=time.sleep, args=(12,)).start()
    """
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parameters", "num_ranks"), [(PIPELINE, 2), (TENSOR, 2), ({}, 2), (SHARDED, 2), (PIPELINE | TENSOR, 4)]
)
def test_no_process_aborts_whatever_step_of_the_end_is_late(parameters, num_ranks):
    steps = [
        "script", "error", "finish_background", "meet", "close_connections", "destroy_groups", "let_threads_finish",
        "save", "stopped",
    ]  # fmt: skip
    check_ends([job_of(step, rank, parameters, num_ranks) for step in steps for rank in (0, 1)])


@pytest.mark.slow
def test_none_of_sixty_jobs_of_eight_processes_aborts():
    """Twenty at once, then four at a time, on a machine that starts other processes all the time. About 15 minutes with
    two cores.
    """
    busy = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys\nwhile True: subprocess.run([sys.executable, '-c', 'import json'])",
        ]
    )
    try:
        for num_jobs in (20, *(4,) * 10):
            jobs = []
            for number in range(num_jobs):
                parameters = [PIPELINE | TENSOR, PIPELINE, TENSOR, {}][number % 4]
                jobs.append({"num_ranks": 8, "parameters": parameters | {"timeout_seconds": 600}, "slow": 0.1})
            for codes, logs in ends_of(jobs):
                assert codes == [0] * 8, "\n".join(log[-2000:] for log in logs)
    finally:
        busy.kill()
        busy.wait()


def closes_when_the_first_rank_has_gone():
    """Rank 1 listens to rank 2, which says nothing; rank 0 has closed its connections. Whether rank 1's thread ends."""
    group = dist.new_group([0, 1, 2])
    everybody = dist.new_group([0, 1, 2])
    has_ended = True
    if dist.get_rank() == 0:
        close_connections([group])
    if dist.get_rank() == 1:

        def listen():
            with contextlib.suppress(RuntimeError):
                group.recv([torch.empty(1)], 2, 0).wait(datetime.timedelta(days=1))

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        with pytest.raises(RuntimeError):
            group.recv([torch.empty(1)], 0, 1).wait(datetime.timedelta(seconds=30))
        close_connections([group])
        thread.join(10)
        has_ended = not thread.is_alive()
    dist.barrier(everybody)
    return has_ended


def test_all_connections_are_closed_also_when_the_first_peer_has_gone():
    assert run_ranks(closes_when_the_first_rank_has_gone, 3) == [True] * 3


# A peer that has stopped


def saves_beside_a_stopped_rank(folder):
    """Rank 1 stops before it writes; what rank 0 is told by the save, and how long it takes to leave."""
    import modelparallel as smp
    from modelparallel.checkpoints.partial.dcp_storage import DraftWriter
    from modelparallel.job import session

    model = smp.DistributedModel(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)))

    @smp.step
    def step(model, x):
        loss = model(x).sum()
        model.backward(loss)

    step(model, torch.ones(4, 4))
    pids = smp.allgather(os.getpid(), smp.WORLD)
    if smp.rank() == 1:
        DraftWriter.write_data = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
    pending = smp.save_checkpoint(folder, "a", model=model, async_save=True)
    start, errors = time.monotonic(), []
    try:
        pending.wait()
    except Exception as error:
        errors.append(f"{type(error).__name__}: {error}")
    session.shutdown()
    seconds = time.monotonic() - start
    os.kill(pids[1], signal.SIGKILL)
    return errors, seconds


def test_stopped_rank_holds_neither_a_save_nor_the_end_of_the_others(tmp_path):
    parameters = {**PIPELINE, "microbatches": 2, "timeout_seconds": 1}
    found = run_ranks(
        saves_beside_a_stopped_rank, 2, str(tmp_path), parameters=parameters, return_failures=True, grace=60
    )
    assert isinstance(found[1], RankFailure)
    [error], seconds = found[0]
    assert error.startswith("WaitTimeoutError: global rank 0: waiting for the checkpoint 'a': files of the global")
    assert "ranks [1]" in error and "timeout_seconds=1" in error
    assert seconds < 30


# The first step


class Refused(ValueError):
    """With another constructor than exceptions are rebuilt by."""

    def __init__(self, name, value):
        super().__init__(f"{name} is {value}")
        self.name = name


def refusal(kind):
    class Hidden(KeyError):
        pass

    return {"own": Refused("width", 3), "local": Hidden("x"), "file": FileNotFoundError(2, "gone", "f")}[kind]


class Refusing(torch.nn.Linear):
    def forward(self, x):
        raise refusal(self.kind)


def errors_of_first_steps():
    import modelparallel as smp

    found = []
    for kind in ("own", "local", "file"):
        for in_module in (True, False):
            model = smp.DistributedModel(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)))
            if in_module:
                model.module[1].__class__, model.module[1].kind = Refusing, kind

            @smp.step
            def step(model, x, kind=kind):
                model(x)
                raise refusal(kind)

            try:
                step(model, torch.ones(4, 4))
            except Exception as error:
                bases = [cls.__name__ for cls in type(error).__mro__[:2]]
                found.append((bases, str(error), getattr(error, "name", None), getattr(error, "filename", None)))
    return found


@pytest.mark.parametrize("num_stages", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_all_ranks_raise_the_user_s_error_of_the_first_step(num_stages):
    parameters = {"pipeline_parallel_degree": num_stages, "microbatches": 2}
    ranks = run_ranks(errors_of_first_steps, num_stages, parameters=parameters)
    own = (["Refused", "ValueError"], "width is 3", "width", None)
    local = (["Hidden", "KeyError"], "'x'", None, None)
    file = (["FileNotFoundError", "OSError"], "[Errno 2] gone: 'f'", None, "f")
    assert ranks == [[own, own, local, local, file, file]] * num_stages
