"""The bootstrap that runs in every process of a job, before the script.

It is started by path (`python .../launch/worker.py script.py arguments`), so that the log is open before anything heavy
is imported. It sends output to the log of its rank, tells the launcher that the process started, rehearses CUDA where
the job runs on the CPU, runs the script as `__main__`, and writes down an exception with its time.
"""

import sys

# Started by path, Python puts this file's directory first; its neighbours must not be importable as top-level modules.
if __name__ == "__main__":
    del sys.path[0]

import atexit
import contextlib
import ctypes
import faulthandler
import importlib.util
import io
import json
import os
import signal
import threading
import time
import traceback
import types
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
#: The launcher sends it to a rank for the stacks of its threads. Not SIGUSR1, by which batch systems ask all processes
#: of a job to save, and which scripts use.
STACKS_SIGNAL: int = signal.SIGRTMIN if sys.platform == "linux" else signal.SIGUSR2
#: modelparallel.EXIT_PREEMPTED, which cannot be imported before the script has begun.
_EXIT_PREEMPTED = 85


def main() -> None:
    script, arguments = sys.argv[1], sys.argv[2:]
    job = json.loads(Path(os.environ["MODELPARALLEL_JOB"]).read_text(encoding="utf-8"))
    global_rank = _own_global_rank()
    status = Path(job["status"])
    _redirect_output(Path(job["logs"]) / f"rank_{global_rank}.log")
    hosts = job.get("hosts", [])
    _end_with_launcher(None if hosts else job["launcher"])
    if hosts:
        job["num_devices"] = _tell_host(hosts, global_rank)
    faulthandler.enable()
    # The launcher asks for the stacks of a job that runs out of time.
    faulthandler.register(STACKS_SIGNAL, all_threads=True)
    # Meant for the launcher, which batch systems do not tell from the processes that it has started, nor these from
    # theirs: see [Note: preemption] in job/preemption.py.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    _write(status / f"rank_{global_rank}.started.json", _identity())
    os.chdir(job["working_directory"])
    sys.argv = [script, *arguments]
    sys.path.insert(0, os.path.dirname(script))
    if importlib.util.find_spec("modelparallel") is None:
        # The launcher was run from a source tree that is not installed.
        sys.path.append(str(Path(__file__).resolve().parents[2]))
    exit_codes: list[int] = []
    # Registered first, so it runs last: handlers of the script may still communicate.
    atexit.register(_leave, exit_codes)
    try:
        if job["device"] == "cpu":
            _start_rehearsal(job)
        _run_as_main(script)
    except BaseException as error:
        code = _code_of(error)
        exit_codes.append(0 if code == _EXIT_PREEMPTED else code)
        _record_and_leave(error, status, global_rank)
    else:
        exit_codes.append(0)
        _note(status / f"rank_{global_rank}.finished.json", {"time": time.time()})


def _own_global_rank() -> int:
    for name in ("RANK", "OMPI_COMM_WORLD_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    raise SystemExit("neither RANK nor OMPI_COMM_WORLD_RANK is set: this file is run by the launcher only")


def _redirect_output(log: Path) -> None:
    """Send file descriptors 1 and 2 to the log: one file, in the order of writing, C++ included."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if descriptor > 2:  # else this process was started without them
        os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, encoding="utf-8", errors="backslashreplace")


def _identity() -> dict[str, Any]:
    return {"pid": os.getpid(), "time": time.time(), "host": os.uname().nodename}


def _tell_host(hosts: list[tuple[str, int]], global_rank: int) -> int:
    """Set what differs from host to host, where one launcher has started the processes of all; how many are here."""
    end = 0
    for name, size in hosts:
        end += size
        if global_rank < end:
            os.environ.update(SM_CURRENT_HOST=name, CURRENT_HOST=name, SM_NUM_GPUS=str(size))
            return size
    raise SystemExit(f"rank {global_rank} is on none of the hosts {hosts}")


def _end_with_launcher(launcher: int | None) -> None:
    """Have the kernel kill this process when the launcher, or mpirun, dies without a chance to clean up; ``launcher``
    None: when mpirun's daemon on this host does, which the launcher has not started.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if launcher is None:
        return
    # It may have died before that. Another process is the parent then, which knows nothing of the job.
    parent = os.getppid()
    if parent == launcher:
        return
    try:
        variables = Path(f"/proc/{parent}/environ").read_bytes().split(b"\0")
    except OSError:
        variables = []
    if f"MODELPARALLEL_JOB={os.environ['MODELPARALLEL_JOB']}".encode() not in variables:
        os.kill(os.getpid(), signal.SIGKILL)


def _start_rehearsal(job: dict[str, Any]) -> None:
    from modelparallel.launch import rehearsal

    extra = os.environ.get("MODELPARALLEL_REHEARSAL_PATHS", "")
    directories = [job["source_dir"], *filter(None, extra.split(os.pathsep))]
    rehearsal.start(script_directories=directories, num_devices=job["num_devices"])


def _run_as_main(script: str) -> None:
    """As `python script.py`: in a module `__main__` that stays, so that its classes can be pickled."""
    module = types.ModuleType("__main__")
    module.__dict__.update(__file__=script, __builtins__=__builtins__, __cached__=None)
    sys.modules["__main__"] = module
    with open(script, "rb") as file:
        code = compile(file.read(), script, "exec")
    exec(code, module.__dict__)


def _record_and_leave(error: BaseException, status: Path, global_rank: int) -> None:
    """Write down why the script ended, show it as Python would, and exit with its code."""
    exit_code = _code_of(error)
    if isinstance(error, SystemExit):
        if exit_code in (0, _EXIT_PREEMPTED):
            # Whoever has started this process must not end the others, which may still save.
            is_preempted = exit_code == _EXIT_PREEMPTED
            _note(status / f"rank_{global_rank}.finished.json", {"time": time.time(), "is_preempted": is_preempted})
            raise SystemExit(0)
        text = "" if isinstance(error.code, int) else str(error.code)
        summary, shown = f"it exited with code {exit_code}" + (f": {text}" if text else ""), text
    else:
        # What is the user's begins where a script does, or the function of a notebook.
        own_frames, own_files = error.__traceback__, (__file__, str(Path(__file__).with_name("called_function.py")))
        while own_frames is not None and own_frames.tb_frame.f_code.co_filename in own_files:
            own_frames = own_frames.tb_next
        error = error.with_traceback(own_frames)
        summary = "".join(traceback.format_exception_only(type(error), error)).strip().splitlines()[0]
        shown = "".join(traceback.format_exception(type(error), error, own_frames))
    record = {
        "time": time.time(),
        "exit_code": exit_code,
        "summary": summary,
        "traceback": shown,
        "is_interrupt": isinstance(error, KeyboardInterrupt),
    }
    _note(status / f"rank_{global_rank}.error.json", record)
    _tell_session()
    if isinstance(error, SystemExit):
        raise error
    # torch.distributed installs a hook that prefixes lines by rank, which the launcher does already; a hook of the
    # script itself is respected.
    is_from_torch = (getattr(sys.excepthook, "__module__", None) or "").startswith("torch")
    hook = sys.__excepthook__ if is_from_torch else sys.excepthook
    hook(type(error), error, error.__traceback__)
    raise SystemExit(exit_code)


def _code_of(error: BaseException) -> int:
    if not isinstance(error, SystemExit):
        return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    if error.code is None:
        return 0
    return error.code & 0xFF if isinstance(error.code, int) else 1


def _tell_session() -> None:
    """The process ends by an error: nothing is waited for."""
    session: Any = sys.modules.get("modelparallel.job.session")
    if session is not None and session.is_initialized():
        session.current().ends_by_error = True


def _leave(exit_codes: list[int]) -> None:
    """The last that runs before the interpreter ends. torch wants its process group destroyed by then; scripts of this
    API never do it.
    """
    distributed = sys.modules.get("torch.distributed")
    has_groups = distributed is not None and distributed.is_available() and distributed.is_initialized()
    if not has_groups and "modelparallel.comm.ending" not in sys.modules:
        return
    from modelparallel.comm.ending import leave_at_once, let_threads_finish

    if distributed is not None and has_groups:
        distributed.destroy_process_group()
    # A script that made its groups itself would now and then be aborted at its end, as any whose threads go on:
    # [Note: the end of a process].
    if (not let_threads_finish() or threading.active_count() > 1) and exit_codes:
        leave_at_once(exit_codes[0])


def _note(path: Path, content: dict[str, Any]) -> None:
    """Write down how the script ended; a disk that is full does not change it."""
    with contextlib.suppress(OSError):
        _write(path, content)


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write the file whole: the launcher may look at any moment."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content), encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    main()
