"""Small jobs over two hosts, by every means, one after another beside other work: each ends with the right exit code
and leaves no process, no port and no file outside its folder. NUM_ROUNDS=10 makes a hundred of them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from clusters.hosts import Host
from clusters.runs import PATIENCE, SCRIPT, check_losses, start_torchrun
from clusters.slurm_engine import SlurmEngine, slurm_engine
from clusters.test_mpi_hosts import agent_for
from modelparallel.errors import LaunchError
from modelparallel.launch import Slurm
from modelparallel.launch.clusters.description import ClusterJob
from modelparallel.launch.mpi_backend import find_mpirun
from modelparallel.launch.submitted import submit_job
from scripts import ROOT

NUM_ROUNDS = int(os.environ.get("NUM_ROUNDS", "1"))
PARAMETERS = '{"pipeline_parallel_degree": 2, "microbatches": 2}'
#: Other jobs that start while those of the test do.
_BUSY = "import subprocess, sys\nwhile True:\n    subprocess.run([sys.executable, '-c', 'import torch'])\n"
#: A cache of torch's for the user, and what torchrun itself leaves.
_OF_TORCH = ("torchinductor_", "torchelastic_")
#: In which what a job has started ends after it.
_SECONDS = 60.0
Ends = list[tuple[int, str]]


def open_ports(host: Host) -> set[str]:
    """The sockets that listen on a host."""
    tables = host.run(["cat", "/proc/net/tcp", "/proc/net/tcp6"]).stdout.splitlines()
    return {line.split()[1] for line in tables if len(line.split()) > 3 and line.split()[3] == "0A"}


def files(hosts: Sequence[Host]) -> set[str]:
    """What lies where programs put what they need for a while."""
    found = set()
    for folder in (*(host.folder / "tmp" for host in hosts), Path(os.environ["TMPDIR"])):
        found |= {str(path) for path in folder.iterdir() if not path.name.startswith(_OF_TORCH)}
    for host in hosts:
        found |= {f"{host.name}: {path}" for path in host.run(["find", "/dev/shm", "-mindepth", "1"]).stdout.split()}
    return found


@contextmanager
def nothing_left(hosts: Sequence[Host], folder: Path) -> Iterator[None]:
    """A block that runs a job in ``folder``."""
    before = [set(host.pids()) for host in hosts], [open_ports(host) for host in hosts], files(hosts)
    beside = set(folder.parent.iterdir())
    yield
    deadline = time.monotonic() + _SECONDS
    while True:
        after = [set(host.pids()) for host in hosts], [open_ports(host) for host in hosts], files(hosts)
        left = [[later - earlier for earlier, later in zip(before[kind], after[kind], strict=True)] for kind in (0, 1)]
        if not any(left[0]) and not any(left[1]) and not after[2] - before[2]:
            break
        assert time.monotonic() < deadline, (left, after[2] - before[2])
        time.sleep(0.5)
    assert set(folder.parent.iterdir()) == beside


def by_nodes(engine: SlurmEngine, folder: Path, *arguments: str) -> Ends:
    started = []
    for number, host in enumerate(engine.hosts):
        place = ["--nnodes", "2", "--node-rank", str(number), "--rendezvous", engine.hosts[0].name, "--nproc", "1"]
        command = [sys.executable, "-m", "modelparallel", "run", "--device", "cpu", *place, "--parameters", PARAMETERS]
        log = folder / f"{host.name}.log"
        job = ["--job-dir", str(folder / f"job of {host.name}"), str(SCRIPT), *arguments]
        started.append((host.start([*command, *job], log=log, cwd=folder), log))
    return [(process.wait(PATIENCE), log.read_text()) for process, log in started]


def by_torchrun(engine: SlurmEngine, folder: Path, *arguments: str) -> Ends:
    started = start_torchrun(engine.hosts, ["--pp", "2", *arguments], folder)
    return [(process.wait(PATIENCE), log.read_text()) for process, log in started]


def by_mpirun(engine: SlurmEngine, folder: Path, *arguments: str) -> Ends:
    hosts = ",".join(f"{host.name}:1" for host in engine.hosts)
    command = [sys.executable, "-m", "modelparallel", "run", "--device", "cpu", "--backend", "mpi", "--hosts", hosts]
    command += ["--parameters", PARAMETERS, "--job-dir", str(folder / "job"), str(SCRIPT), *arguments]
    agent = str(agent_for(engine.hosts, folder))
    result = engine.hosts[0].run(command, timeout=PATIENCE, cwd=folder, PRTE_MCA_plm_ssh_agent=agent)
    return [(result.returncode, result.stdout)]


def by_srun(engine: SlurmEngine, folder: Path, *arguments: str) -> Ends:
    command = ["srun", "-N2", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=60", sys.executable]
    command += ["-m", "modelparallel", "run", "--nnodes", "auto", "--nproc", "1", "--device", "cpu"]
    command += ["--parameters", PARAMETERS, "--job-dir", str(folder / "job"), str(SCRIPT), *arguments]
    result = engine.run(*command, timeout=PATIENCE, SLURM_CPU_BIND="none")
    return [(result.returncode, result.stdout)]


def by_submission(engine: SlurmEngine, folder: Path, *arguments: str) -> Ends:
    source = folder / "source"
    source.mkdir()
    shutil.copy(SCRIPT, source / "train.py")
    python_path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    variables = {"PYTHONPATH": python_path, "OMP_NUM_THREADS": "1", "MODELPARALLEL_DEVICE": "cpu"}
    cluster = Slurm(name="test", folder=str(folder / "jobs"), python=sys.executable, time="00:30:00", env=variables)
    parameters = json.loads(PARAMETERS)
    job = submit_job(
        cluster,
        ClusterJob("job", "train.py", source, 2, 1, arguments, {"mp_parameters": parameters}, parameters, device="cpu"),
    )
    deadline = time.monotonic() + PATIENCE
    while not (status := job.status()).is_final:
        assert time.monotonic() < deadline, engine.logs()
        time.sleep(0.5)
    return [(-1 if status.exit_code is None else status.exit_code, "\n".join(job.logs()))]


MEANS = (by_nodes, by_torchrun, by_mpirun, by_srun, by_submission)


def test_jobs_by_every_means_end_as_they_should_and_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))  # of jobs that sbatch starts
    for name in ("state", "tmp"):
        (tmp_path / name).mkdir()
    means = list(MEANS)
    try:
        find_mpirun()
    except LaunchError:
        means.remove(by_mpirun)
    busy = subprocess.Popen([sys.executable, "-c", _BUSY], start_new_session=True)
    try:
        with slurm_engine() as engine:
            engine.on_path(monkeypatch)
            for number in range(NUM_ROUNDS):
                for start in means:
                    for arguments in ((), ("--fail", "1:1")):
                        folder = tmp_path / f"{number}_{start.__name__}_{len(arguments)}"
                        folder.mkdir()
                        with nothing_left(engine.hosts, folder):
                            ends = start(engine, folder, *arguments)
                        text = "\n".join(f"--- {start.__name__}, exit code {code}\n{said}" for code, said in ends)
                        assert {code for code, _ in ends} == {1 if arguments else 0}, text
                        assert "terminate called" not in text, text
                        if arguments:
                            assert "deliberate failure of the script" in text, text
                        else:
                            check_losses(text)
    finally:
        os.killpg(busy.pid, 9)
        busy.wait()
