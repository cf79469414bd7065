"""No process that has done its work ends in an abort, however late one on another host comes to its own end."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clusters.hosts import Host, two_hosts
from clusters.runs import check_run, ends_of, start_torchrun
from test_ends import PIPELINE, TENSOR, job_of

__all__ = ["two_hosts"]

#: Starts of the series. 40 take some ten minutes on a quiet machine with two cores.
NUM_STARTS = int(os.environ.get("NUM_STARTS", "10"))
ENDING_JOBS = Path(__file__).parent.parent / "ending_jobs.py"
STEPS = [
    "script", "error", "finish_background", "goodbye", "meet", "close_connections", "destroy_groups",
    "let_threads_finish", "save", "stopped", "thread",
]  # fmt: skip


def start_jobs(hosts: list[Host], jobs: list[dict], folder: Path) -> list[tuple[subprocess.Popen[str], Path]]:
    started = []
    for number, host in enumerate(hosts):
        command = [sys.executable, ENDING_JOBS, json.dumps(jobs), f"{number}/{len(hosts)}", hosts[0].address]
        log = folder / f"{host.name}.log"
        started.append((host.start(command, log=log, environ={"SMP_EVENT_DIR": None}), log))
    return started


def test_no_process_aborts_whatever_step_of_the_end_is_late_on_one_of_two_hosts(two_hosts, tmp_path):
    jobs = []
    for number, step in enumerate(STEPS):
        for rank in (0, 1):
            parameters = PIPELINE if number % 2 else TENSOR
            place = {"port": 21000 + len(jobs), "folder": str(tmp_path / f"{step}-{rank}")}
            jobs.append(job_of(step, rank, parameters) | place)
    # A part at a time: each has to load nothing, but waits for processors.
    for part in range(0, len(jobs), 8):
        check_jobs(two_hosts, jobs[part : part + 8], tmp_path)


def check_jobs(hosts: list[Host], jobs: list[dict], folder: Path) -> None:
    found = []
    for code, text in ends_of(start_jobs(hosts, jobs, folder), 1200):
        assert code == 0, text[-4000:]
        found.append(json.loads(text.splitlines()[-1]))
    for host in hosts:
        (folder / f"{host.name}.log").unlink()
    for number, job in enumerate(jobs):
        for rank in range(job["num_ranks"]):
            [code], [log] = (found[rank][number][name] for name in ("codes", "logs"))
            wanted = 1 if job["late"] == "error" else 0
            if job["late"] == "stopped" and rank == job["late_rank"]:
                wanted = None
            assert code == wanted, f"{job} rank {rank}: {code}\n{log[-2000:]}"
            assert "terminate called" not in log and (wanted is None or "done" in log), (
                f"{job} rank {rank}: {log[-2000:]}"
            )


@pytest.fixture
def other_starts() -> Iterator[None]:
    """Processes start and end on this machine all the time."""
    starts = "import subprocess, sys\nwhile True: subprocess.run([sys.executable, '-c', 'import json'])"
    busy = [subprocess.Popen([sys.executable, "-c", starts]) for _ in range(2)]
    yield
    for process in busy:
        process.kill()
        process.wait()


def test_none_of_many_starts_by_torchrun_aborts(two_hosts, tmp_path, other_starts):
    """Two jobs at a time, each beside the start or the end of the other, with either kind of groups."""
    running = []
    for number in range(NUM_STARTS):
        folder = tmp_path / str(number)
        folder.mkdir()
        degree = "--pp" if number % 2 else "--tp"
        running.append(start_torchrun(two_hosts, [degree, "2"], folder, port=29500 + number))
        if len(running) == 2:
            check_run(running.pop(0))
    for started in running:
        check_run(started)
