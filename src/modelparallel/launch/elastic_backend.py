"""Starting the processes by torch's elastic agent, in this process."""

import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousHandler

from modelparallel.job.discovery import LAUNCHER_VARIABLE
from modelparallel.job.private_files import open_private
from modelparallel.launch.attempts import MAX_RESTARTS_VARIABLE, RESTART_COUNT_VARIABLE
from modelparallel.launch.environment import interpreter, worker_command
from modelparallel.launch.failures import JobInterrupted
from modelparallel.launch.folder import JobFolder
from modelparallel.launch.spec import JobSpec
from modelparallel.launch.supervision import GRACE
from modelparallel.torch_compat.elastic import IndependentAgent

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
#: Those that the agent handles; the others are handled in signals.py.
_SIGNALS_OF_AGENT = (signal.SIGINT, signal.SIGQUIT)
_SIGNALS_VARIABLE = "TORCHELASTIC_SIGNALS_TO_HANDLE"


class _JobLogsSpecs(LogsSpecs):
    """Gives every process the job's variables."""

    def __init__(self, folder: JobFolder, environment: Mapping[str, str]) -> None:
        super().__init__(str(folder.logs))
        self._folder = folder
        self._environment = environment

    @property
    def root_log_dir(self) -> str:
        return str(self._folder.logs)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        destinations = LogsDest()
        for local_rank, variables in envs.items():
            global_rank = int(variables["RANK"])
            for name, value in self._environment.items():
                # The agent's own variables (its address, its store) are the right ones.
                variables.setdefault(name, value)
            variables["OMP_NUM_THREADS"] = self._environment["OMP_NUM_THREADS"]
            variables[LAUNCHER_VARIABLE] = "torchrun"  # whatever has started the agent
            # The agent counts its own restarts, and each attempt has an agent of its own ([Note: attempts]).
            variables["TORCHELASTIC_RESTART_COUNT"] = self._environment[RESTART_COUNT_VARIABLE]
            variables["TORCHELASTIC_MAX_RESTARTS"] = self._environment[MAX_RESTARTS_VARIABLE]
            error_file = str(self._folder.status / f"rank_{global_rank}.elastic.json")
            variables["TORCHELASTIC_ERROR_FILE"] = error_file
            destinations.error_files[local_rank] = error_file
            # Inherited until the bootstrap opens the log of the rank; the agent would never close files of its own.
            destinations.stdouts[local_rank] = destinations.stderrs[local_rank] = ""
        return destinations


def run(job: JobSpec, environment: Mapping[str, str], meeting: RendezvousHandler) -> tuple[int, dict[int, int]]:
    """Run the processes of this host; returns an exit code and the exit codes of the processes that failed.

    ``meeting`` is where the agents of all hosts meet. Raises `JobInterrupted` when this process is told to stop by a
    signal.
    """
    spec = WorkerSpec(
        role="rank",
        local_world_size=job.num_processes,
        rdzv_handler=meeting,
        entrypoint=interpreter(),
        # The agent replaces ${local_rank} and the like in the arguments; the script's own dollars must arrive.
        args=tuple(text.replace("$", "$$") for text in worker_command(job)),
        max_restarts=0,
        monitor_interval=0.1,
        local_addr=job.hosts.address,
    )
    options = IndependentAgent.known({"shutdown_timeout": int(GRACE)})
    with _signal_state_kept(), _agent_log(job.folder):
        os.environ[_SIGNALS_VARIABLE] = ",".join(number.name for number in _SIGNALS_OF_AGENT)
        try:
            # Who waits for whom at the end is decided in node_run.py.
            result = IndependentAgent(spec, _JobLogsSpecs(job.folder, environment), **options).run()
        except SignalException as interruption:
            raise JobInterrupted(interruption.sigval) from None
        except KeyboardInterrupt:
            raise JobInterrupted(signal.SIGINT) from None
    if result.is_failed():
        return 1, {global_rank: failure.exitcode for global_rank, failure in result.failures.items()}
    return 0, {}


@contextmanager
def _signal_state_kept() -> Iterator[None]:
    """The agent installs signal handlers and a variable and leaves them; this process goes on after the job."""
    variable = os.environ.get(_SIGNALS_VARIABLE)
    is_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in _SIGNALS} if is_main else {}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if variable is None:
            os.environ.pop(_SIGNALS_VARIABLE, None)
        else:
            os.environ[_SIGNALS_VARIABLE] = variable


@contextmanager
def _agent_log(folder: JobFolder) -> Iterator[None]:
    """Keep the agent's own messages in logs/elastic.log: the user is to see one error, that of the script."""
    agent_logger = logging.getLogger("torch.distributed.elastic")
    propagates = agent_logger.propagate
    with open(folder.logs / "elastic.log", "a", encoding="utf-8", opener=open_private) as file:
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        agent_logger.addHandler(handler)
        agent_logger.propagate = False
        try:
            yield
        finally:
            agent_logger.removeHandler(handler)
            agent_logger.propagate = propagates
