"""What a job is and how it ended, as data: what the launcher's parts know of a job, and nothing that runs one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from modelparallel.errors import LaunchError
from modelparallel.job.preemption import EXIT_PREEMPTED
from modelparallel.launch.attempts import Attempt
from modelparallel.launch.devices import Device
from modelparallel.launch.failures import RankFailure
from modelparallel.launch.folder import JobFolder
from modelparallel.launch.hosts import THIS_MACHINE, Hosts

Backend = Literal["elastic", "mpi"]


@dataclass(frozen=True)
class JobSpec:
    """Everything that is decided before a process starts.

    Attributes:
        arguments: the script's full command line.
        channels: where the data of each are; a text is a URL, which a job on one machine fetches before it starts.
        hyperparameters: what is published in SM_HPS and SM_HP_*.
        parameters: the checked model parallel parameters, None for a job that is not model parallel; then nothing is
            published about them and the script's own `smp.init(...)` decides.
        timeout: seconds, all attempts together; None for no limit.
        max_restarts: how often the job is started again after a failure.
        fewer_processes: the numbers of processes, below `num_processes` and the largest first, with which it may then
            start.
        devices: one for each local rank, in order, by the names that CUDA_VISIBLE_DEVICES takes; None for all of this
            host.
        hosts: where the processes are. With backend elastic `num_processes` are those of this host, with backend mpi
            those of all hosts.
        earlier_starts: how often the engine that started this launcher has started the job before.
    """

    name: str
    script: Path
    source_dir: Path
    working_directory: Path
    folder: JobFolder
    num_processes: int
    backend: Backend
    device: Device
    arguments: tuple[str, ...] = ()
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, Any] | None = None
    channels: Mapping[str, Path | str] = field(default_factory=dict)
    custom_mpi_options: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    instance_type: str = "local"
    preferred_port: int = 7777
    timeout: float | None = None
    checkpoints: Path | None = None
    max_restarts: int = 0
    fewer_processes: tuple[int, ...] = ()
    devices: tuple[str, ...] | None = None
    hosts: Hosts = THIS_MACHINE
    earlier_starts: int = 0

    @property
    def num_here(self) -> int:
        """The processes of the current host."""
        return self.hosts.sizes[self.hosts.current] if self.hosts.sizes else self.num_processes

    @property
    def ranks(self) -> range:
        """The global ranks of the processes that this launcher starts."""
        return range(self.hosts.first_rank, self.hosts.first_rank + self.num_processes)

    @property
    def world_size(self) -> int:
        """The processes on all hosts."""
        return sum(self.hosts.sizes) or self.num_processes


@dataclass(frozen=True)
class JobResult:
    """How a job ended.

    Attributes:
        exit_code: 0, or the exit code of the first failing process (128 + signal number if it was killed by a signal),
            124 after the timeout, 130 after Ctrl-C, 143 after SIGTERM, 85 when the script was told of a preemption and
            has saved its state; of the last of the `attempts`.
        seconds: how long all attempts together took.
        failure: the first failing process of the last attempt.
        is_stopped: the job was ended from outside, so that a restart was not due.
    """

    exit_code: int
    seconds: float
    folder: JobFolder
    failure: RankFailure | None = None
    message: str = ""
    is_stopped: bool = False
    attempts: tuple[Attempt, ...] = ()

    @property
    def is_preempted(self) -> bool:
        """Whether the script has saved its state and left, since the job was to be preempted."""
        return self.exit_code == EXIT_PREEMPTED


def check_script(script: Path, what: str = "entry point") -> None:
    """Stop before any process starts if there is nothing to run."""
    if not script.exists():
        raise LaunchError(f"{what} {script} does not exist: check the name and the directory")
    if script.is_dir():
        raise LaunchError(f"{what} {script} is a directory: name a Python script")
