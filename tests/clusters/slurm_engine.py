"""A real Slurm for tests: slurmctld, and a slurmd on each of two hosts (hosts.py), with a munged and a configuration of
their own. Everything lies in one folder, nothing of it outside, and it is gone at the end.

    with slurm_engine() as engine:
        engine.run("srun", "-N2", "hostname")
        engine.on_path(monkeypatch)         # then sbatch, scontrol, ... of this process are those of the engine

Skips the test, with the reason, where the machine refuses: no root, no namespaces, no Slurm and no apt-get.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from clusters.hosts import Host, some_hosts

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged")
COMMANDS = ("sbatch", "srun", "scontrol", "squeue", "scancel", "sacct", "sinfo")
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
_START_SECONDS = 120.0
_CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={first}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
SlurmdLogFile={folder}/slurmd.%n.log
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
KillWait={kill_wait}
OverTimeLimit=0
SchedulerParameters=sched_interval=2,batch_sched_delay=1
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=60 State=UP
"""


@dataclass
class SlurmEngine:
    """The running engine; commands run on its first host, which takes the place of a login node."""

    hosts: list[Host]
    folder: Path

    def run(self, *command: str, timeout: float = 300.0, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command on the first host; standard error is in ``stdout``, too."""
        return self.hosts[0].run(command, timeout=timeout, environ=self.environ(), **variables)

    def start(self, *command: str, log: Path, **variables: str) -> subprocess.Popen[str]:
        """Start a command on the first host."""
        return self.hosts[0].start(command, log=log, environ=self.environ(), **variables)

    def environ(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _PATH}

    def on_path(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let the commands of Slurm that this process runs be run on the first host."""
        monkeypatch.setenv("SLURM_CONF", str(self.folder / "slurm.conf"))
        monkeypatch.setenv("PATH", f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}")

    def write_commands(self) -> None:
        directory = self.folder / "bin"
        directory.mkdir()
        for name in COMMANDS:
            if (program := shutil.which(name, path=_PATH)) is not None:
                path = directory / name
                words = [word for word in self.hosts[0].command([program]) if not word.startswith("--wd=")]
                path.write_text(f'#!/bin/sh\nexec {" ".join(words[:-1])} {program} "$@"\n')
                path.chmod(0o755)

    def logs(self) -> str:
        """The last lines of all daemons, for a test that has failed."""
        return "\n".join(f"--- {path.name}\n{path.read_text()[-1500:]}" for path in sorted(self.folder.glob("*.log")))

    def job(self, job_id: str) -> str:
        """What scontrol says of a job."""
        return self.run("scontrol", "show", "job", "--oneliner", job_id).stdout

    def wait_until(self, job_id: str, *states: str, seconds: float = 300.0) -> str:
        """Wait until the job is in one of the states; what scontrol says of it then."""
        deadline = time.monotonic() + seconds
        while not any(f"JobState={state} " in (said := self.job(job_id)) for state in states):
            assert time.monotonic() < deadline, f"job {job_id} is not {' or '.join(states)} after {seconds:g} s: {said}"
            time.sleep(0.3)
        return said

    def start_now(self, job_id: str) -> None:
        """Slurm lets a job that was requeued wait for two minutes; less than a second would be too early for it."""
        self.wait_until(job_id, "PENDING")  # not COMPLETING any more
        self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now+3")


@contextlib.contextmanager
def slurm_engine(num_hosts: int = 2, *, kill_wait: int = 10) -> Iterator[SlurmEngine]:
    """The engine, until the block ends; no job and no process of it is left then."""
    if reason := _refusal():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="modelparallel-slurm-"))
    folder.chmod(0o755)
    try:
        with some_hosts(num_hosts) as hosts:
            engine = SlurmEngine(hosts, folder)
            _start_munge(engine)
            _start_slurm(engine, kill_wait)
            engine.write_commands()
            yield engine
            engine.run("scancel", "--user=root", timeout=60)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _refusal() -> str:
    """Why there is no Slurm here; installs it where that is possible."""
    if os.geteuid() != 0:
        return "the daemons of Slurm are run as root, and this is another user"
    missing = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if not missing:
        return ""
    if shutil.which("apt-get") is None:
        return f"Slurm is not installed ({', '.join(missing)} not found), and there is no apt-get"
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(
            ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=600", *command],
            env=environ,
            capture_output=True,
            text=True,
            timeout=900,
        )
        if done.returncode:
            return f"apt-get {' '.join(command)}: {done.stderr.strip()[-300:]}"
    missing = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    return f"{', '.join(missing)} not found, although {', '.join(PACKAGES)} are installed" if missing else ""


def _start_munge(engine: SlurmEngine) -> None:
    """The daemon that vouches for users; its socket is a file, which all hosts see."""
    place = engine.folder / "munge"
    place.mkdir(mode=0o755)
    key = place / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(stat.S_IRUSR)
    command = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={place / 'socket'}"]
    command += [f"--pid-file={place / 'pid'}", f"--log-file={place / 'log'}", f"--seed-file={place / 'seed'}"]
    process = engine.hosts[0].start(command, log=engine.folder / "munged.log", environ=engine.environ())
    _wait(lambda: (place / "socket").exists(), "munged", engine, process)


def _start_slurm(engine: SlurmEngine, kill_wait: int) -> None:
    hosts, folder = engine.hosts, engine.folder
    (folder / "state").mkdir()
    nodes = [f"NodeName={host.name} NodeAddr={host.address} CPUs=8 RealMemory=4000 State=UNKNOWN" for host in hosts]
    names = ",".join(host.name for host in hosts)
    (folder / "slurm.conf").write_text(
        _CONFIGURATION.format(
            first=hosts[0].name,
            address=hosts[0].address,
            folder=folder,
            kill_wait=kill_wait,
            nodes="\n".join(nodes),
            names=names,
        )
    )
    started = [hosts[0].start(["slurmctld", "-D", "-i"], log=folder / "slurmctld.out.log", environ=engine.environ())]
    for host in hosts:
        (folder / f"spool.{host.name}").mkdir()
        command = ["slurmd", "-D", "-N", host.name]
        started.append(host.start(command, log=folder / f"slurmd.{host.name}.out.log", environ=engine.environ()))

    def is_idle() -> bool:
        answer = engine.run("sinfo", "--noheader", "--format=%T %D", timeout=60)
        return answer.stdout.split() == ["idle", str(len(hosts))]

    _wait(is_idle, "Slurm with all nodes idle", engine, *started)


def _wait(is_there: object, what: str, engine: SlurmEngine, *processes: subprocess.Popen[str]) -> None:
    assert callable(is_there)
    deadline = time.monotonic() + _START_SECONDS
    while not is_there():
        ended = [process.args for process in processes if process.poll() is not None]
        assert not ended and time.monotonic() < deadline, f"{what} is not there; ended: {ended}\n{engine.logs()}"
        time.sleep(0.2)


def wait_for_text(path: Path, text: str, seconds: float = 300.0, alive: Sequence[subprocess.Popen[str]] = ()) -> str:
    """Wait until a file has the text; what it has then."""
    deadline = time.monotonic() + seconds
    while text not in (said := path.read_text(errors="replace") if path.exists() else ""):
        assert time.monotonic() < deadline, f"{path} has no {text!r} after {seconds:g} s:\n{said[-3000:]}"
        assert all(process.poll() is None for process in alive), f"it has ended without {text!r}:\n{said[-3000:]}"
        time.sleep(0.2)
    return said
