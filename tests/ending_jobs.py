"""Many small jobs whose processes come to a real end of the interpreter, from one import of torch.

    python ending_jobs.py '[{"num_ranks": 2, "late": "meet", "late_rank": 1, "seconds": 1.0}, ...]'
    python ending_jobs.py "[{..., \"port\": 29500}, ...]" 1/2 10.77.0.1  # every second rank; others are on another host

All jobs run at the same time. Each rank is forked from this process before it has any thread, gets what a launcher sets
in the environment, trains a step and falls off the end of this script. So the ends of hundreds of processes can be
tried, which no pool does that leaves by ``os._exit``. Prints, as JSON, the exit codes of each job's ranks and what they
have printed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
if len(sys.argv) == 2:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("MODELPARALLEL_DEVICE", "cpu")

import torch

import modelparallel as smp
from modelparallel.comm import ending
from modelparallel.comm.stages import gloo as gloo_transport

PATIENCE = 900.0
HOST, NUM_HOSTS = map(int, sys.argv[2].split("/")) if len(sys.argv) > 2 else (0, 1)
MASTER = sys.argv[3] if len(sys.argv) > 2 else "127.0.0.1"


class SlowToGo:
    """In the globals of the script: makes the end of the interpreter take so long that any thread wakes in it."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __del__(self, sleep: Callable[[float], None] = time.sleep) -> None:
        sleep(self.seconds)


def delayed(owner: Any, name: str, seconds: float) -> None:
    inner = getattr(owner, name)

    def slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return inner(*args, **kwargs)

    setattr(owner, name, slowly)


def train(job: dict[str, Any], rank: int, folder: Path) -> None:
    ending.MEETING_SECONDS = job.get("meeting", 10.0)
    ending.AFTER_ERROR_SECONDS = gloo_transport._GOODBYE_SECONDS = 1.0
    smp.init({"microbatches": 2, "ddp": True, "timeout_seconds": 60, **job.get("parameters", {})})
    model = smp.DistributedModel(torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(4))))
    optimizer = smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1))

    @smp.step
    def step(model: Any, x: torch.Tensor) -> torch.Tensor:
        loss = model(x).sum()
        model.backward(loss)
        return loss

    step(model, torch.ones(4, 4))
    optimizer.step()
    is_late = rank == job.get("late_rank", 0)
    late, seconds = job.get("late"), job.get("seconds", 0.0)
    if late == "save":  # in the background, at the end
        if is_late:
            from modelparallel.checkpoints.partial.dcp_storage import DraftWriter

            delayed(DraftWriter, "write_data", seconds)
        smp.save_checkpoint(folder, "last", model=model, optimizer=optimizer, async_save=True)
    elif late == "goodbye":
        if is_late:
            delayed(gloo_transport.GlooTransport, "say_goodbye", seconds)
    elif late == "stopped":
        if is_late:
            (folder / "stopped").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
    elif late == "script":
        time.sleep(seconds if is_late else 0.0)
    elif late == "thread":  # nothing ends its listeners, and the others say goodbye when the interpreter ends
        if not is_late:
            for module in (ending, gloo_transport):
                setattr(module, "close_connections", lambda groups: None)  # noqa: B010
            ending._THREAD_SECONDS = 0.1
            ending.MEETING_SECONDS = 0.1
        else:
            delayed(gloo_transport.GlooTransport, "say_goodbye", seconds)
    elif late and late != "error":
        delayed(ending, late, seconds if is_late else 0.0)
    print("done", flush=True)
    if late == "error":
        raise ValueError("at the end")
    if "exit" in job:
        raise SystemExit(job["exit"])


def start(number: int, job: dict[str, Any], folder: Path) -> tuple[int | None, dict[int, int]]:
    """Fork the ranks of a job on this host; in a rank, return its number. Else the pids by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = job.get("port", probe.getsockname()[1])
    pids: dict[int, int] = {}
    ranks = range(HOST, job["num_ranks"], NUM_HOSTS)
    for rank in ranks:
        pid = os.fork()
        if pid == 0:
            log = os.open(folder / f"{number}_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(ranks.index(rank)), WORLD_SIZE=str(job["num_ranks"]),
                LOCAL_WORLD_SIZE=str(len(ranks)), MASTER_ADDR=MASTER, MASTER_PORT=str(port),
            )  # fmt: skip
            return rank, pids
        pids[rank] = pid
    return None, pids


def collect(pids: list[int], codes: dict[int, int], seconds: float) -> set[int]:
    """Wait for processes; which are left."""
    deadline = time.monotonic() + seconds
    left = set(pids)
    while left and time.monotonic() < deadline:
        for pid in list(left):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
                left.discard(pid)
        time.sleep(0.02)
    return left


folder = Path(tempfile.mkdtemp(prefix="ends-"))
started = []
for number, job in enumerate(json.loads(sys.argv[1])):
    rank, pids = start(number, job, folder)
    if rank is not None:
        break
    started.append((job, pids))
else:
    codes: dict[int, int] = {}
    begin = time.monotonic()
    for job, pids in started:
        wanted = [pid for rank, pid in pids.items() if job.get("late") != "stopped" or rank != job["late_rank"]]
        collect(wanted, codes, max(0.0, begin + PATIENCE - time.monotonic()))
        for pid in pids.values():
            if pid not in codes:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
    print(
        json.dumps(
            [
                {
                    "codes": [codes.get(pid) for pid in pids.values()],
                    "logs": [(folder / f"{number}_{rank}.log").read_text() for rank in pids],
                }
                for number, (job, pids) in enumerate(started)
            ]
        )
    )
    shutil.rmtree(folder)
    sys.exit()

job_folder = Path(job.get("folder", folder / str(number)))
job_folder.mkdir(exist_ok=True, parents=True)
# The others are at the end of their interpreter for a while: whatever wakes one of their threads then would abort them.
slow = SlowToGo(0.0 if job.get("late_rank", 0) == rank else job.get("slow", 1.0))
train(job, rank, job_folder)
