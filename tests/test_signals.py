"""Ranks, launchers and mpirun get signals at random moments: no hang, no orphan, every checkpoint whole."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launched_jobs import COMMAND, processes_with
from modelparallel.checkpoints.stores.completion import problems_of
from modelparallel.checkpoints.stores.opening import open_store
from modelparallel.launch.folder import JobFolder
from signal_job import SHAPES

#: Of a job as a whole: what only a rank that was stopped when nobody needed it any more is ended by.
JOB_SECONDS = 60
SECONDS_TO_END = 10
PLACES = ("start", "load", "step", "save", "exit")


def started_job(place, shape, backend):
    arguments = [
        "run", "--nproc", "2", "--device", "cpu", "--backend", backend, "--timeout", JOB_SECONDS,
        "--job-dir", place / "job", Path(__file__).with_name("signal_job.py"), place / "checkpoints", shape,
    ]  # fmt: skip
    environment = {**os.environ, "MODELPARALLEL_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    with open(place / "launcher.txt", "w") as output:
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, *map(str, arguments)], stdout=output, stderr=output, env=environment
        )


def wait_for_place(folder, launcher, name, number, seconds):
    """Until a rank has come to a place for the ``number``-th time, or the job is over."""
    deadline = time.monotonic() + seconds
    while launcher.poll() is None and time.monotonic() < deadline:
        logs = [folder.rank_log(rank) for rank in range(2)]
        if any(log.exists() and log.read_text().count(f"at {name}\n") >= number for log in logs):
            return
        time.sleep(0.01)


def victim_of(kind, folder, launcher, draw):
    if kind == "launcher":
        return launcher.pid
    if kind == "mpirun":
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        return next(int(pid) for pid in children if "--map-by" in command_of(pid))
    ranks = [pid for pid in processes_with(str(folder.description)) if "signal_job.py" in command_of(pid)]
    return draw.choice([pid for pid in ranks if "worker.py" in command_of(pid) and "mpirun" not in command_of(pid)])


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def one_signal(place, draw):
    """Returns what was done; raises AssertionError with it."""
    shape, backend = draw.choice(list(SHAPES)), draw.choice(["elastic", "elastic", "mpi"])
    kind = draw.choice(["rank", "rank", "launcher", *(["mpirun"] if backend == "mpi" else [])])
    number = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
    name = draw.choice(PLACES)
    folder = JobFolder(place / "job")
    launcher = started_job(place, shape, backend)
    done = f"{shape} {backend}: {number.name} to {kind} at {name}"
    try:
        wait_for_place(folder, launcher, name, draw.randint(1, 3) if name in ("step", "save") else 1, 120)
        time.sleep(draw.uniform(0.0, 0.05))
        try:
            victim = victim_of(kind, folder, launcher, draw)
            os.kill(victim, number)
        except (IndexError, StopIteration, OSError):
            victim = None  # it had ended
        if number == signal.SIGSTOP and kind != "rank" and victim is not None:
            time.sleep(1.0)
            os.kill(victim, signal.SIGCONT)  # who starts the job can wait for a supervisor that sleeps
        code = launcher.wait(timeout=JOB_SECONDS + SECONDS_TO_END + 60)
        deadline = time.monotonic() + SECONDS_TO_END + 10
        while processes_with(str(folder.description)) and time.monotonic() < deadline:
            time.sleep(0.1)
        left = [command_of(pid) for pid in processes_with(str(folder.description))]
        said = (place / "launcher.txt").read_text()[-3000:]
        assert not left, f"{done}: left {left}\n{said}"
        allowed = {
            ("rank", signal.SIGKILL): {137},
            ("rank", signal.SIGTERM): {143},
            ("rank", signal.SIGSTOP): {1, 124},
            ("launcher", signal.SIGKILL): {-9},
            ("launcher", signal.SIGTERM): {143, -15},
            ("mpirun", signal.SIGKILL): {1, 137},
            ("mpirun", signal.SIGTERM): {1, 143},
        }.get((kind, number), set())
        if backend == "mpi" and (kind, number) == ("rank", signal.SIGTERM):
            allowed = {*allowed, 1}  # of which mpirun says nothing
        were_done = {line.split("]")[0] for line in said.splitlines() if line.endswith("at exit")}
        if victim is None or len(were_done) == 2 or not allowed:
            allowed = {*allowed, 0}  # the signal came too late, or was a nap
        assert code in allowed, f"{done}: exit code {code}, not in {sorted(allowed)}\n{said}"
        check_checkpoints(place / "checkpoints", done)
        return f"{done}: {code}"
    finally:
        for pid in processes_with(str(folder.description)):
            os.kill(pid, signal.SIGKILL)
        launcher.kill()
        launcher.wait()


def check_checkpoints(path, done):
    if not path.exists():
        return
    store = open_store(str(path))
    for entry in store.names():
        if entry.endswith("_partial") and not entry.startswith("."):
            problems = problems_of(store, entry, checks_digests=True)
            assert not problems, f"{done}: {entry}: {problems}"


@pytest.mark.slow
@pytest.mark.parametrize("part", range(6))
def test_sixty_signals_at_random_moments(tmp_path, part):
    draw = random.Random(part)
    for number in range(10):
        place = tmp_path / str(number)
        place.mkdir()
        print(one_signal(place, draw), flush=True)
