"""Jobs from a cell of a notebook, or from a line of a script: a function runs in several processes of this machine.

    from modelparallel.launch import notebook

    losses = notebook(train, nproc=2, parameters={"pipeline_parallel_degree": 2, "microbatches": 4})

[Note: a call in a job] The job is one like any other; its script is called_function.py. The function, its arguments
and what they refer to come to it in a file of cloudpickle, in a directory for this call alone, and what the ranks
return goes back the same way. cloudpickle takes what a cell or the main script defines by value, so that the processes
need not run the notebook. With it go the places where modules are found, and the sources of the cells, for tracebacks.
"""

import functools
import inspect
import io
import linecache
import marshal
import os
import pickle
import signal
import sys
import tempfile
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType
from typing import Any, cast

from modelparallel.config.reading import parse_parameters, validate_parameters
from modelparallel.errors import LaunchError
from modelparallel.launch.devices import check_devices, resolve_device
from modelparallel.launch.failures import JobFailedError
from modelparallel.launch.folder import JobFolder, default_folder, new_job_name
from modelparallel.launch.job import run_job
from modelparallel.launch.processes import JOB_VARIABLE
from modelparallel.launch.spec import Backend, JobSpec

#: Names the directory of the call, for its processes.
CALL_VARIABLE = "MODELPARALLEL_CALL"
_REHEARSAL_VARIABLE = "MODELPARALLEL_REHEARSAL_PATHS"


def notebook(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    nproc: int | None = None,
    parameters: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    all_ranks: bool = False,
    device: str = "auto",
    backend: str | None = None,
    job_dir: str | os.PathLike[str] | None = None,
    environment: Mapping[str, str] | None = None,
    timeout: float | None = None,
    max_restarts: int = 0,
) -> Any:
    """Run ``function(*args, **kwargs)`` in each of several processes of this machine, as `modelparallel run` runs a
    script; returns what it returns on rank 0.

    The function may be defined in a cell or in the main script, with what it refers to; it calls ``smp.init`` as a
    script does. Each line that it prints is shown with the rank in front. Needs ``pip install
    'modelparallel[notebook]'``.

    Args:
        function: what each process calls. Like its arguments and what it returns, it is copied to and from the
            processes (cloudpickle).
        args, kwargs: its arguments.
        nproc: number of processes; default: one per GPU; on the CPU, as many as the degrees need, or 1.
        parameters: the model parallel parameters; they win over those that the function gives to ``smp.init``.
        all_ranks: return a list with what each rank has returned.
        device: "auto", "cpu" (rehearse CUDA on the CPU) or "cuda".
        backend: "elastic" or "mpi"; default: the variable MODELPARALLEL_BACKEND, else "elastic".
        job_dir: the job folder; default ./modelparallel-jobs/<name of the function>-<time>.
        environment: more variables for the processes.
        timeout: stop the job after so many seconds.
        max_restarts: start all processes again after a failure, up to so many times.

    Raises:
        LaunchError: before any process starts: something cannot be copied, or values do not fit; and where a process
            has ended without returning.
        SMPConfigError: before any process starts: wrong parameters.
        JobFailedError: a process failed; with the traceback of the first one. After Ctrl-C, or the notebook's button,
            it is KeyboardInterrupt.
    """
    if not callable(function):
        raise LaunchError(
            f"notebook: expected a function, got {function!r}: notebook(train, nproc=2), without calling it"
        )
    if JOB_VARIABLE in os.environ:
        raise LaunchError(
            "notebook was called in a process of a job: call it in the notebook or the main script, not in the "
            'function; in a module that the function imports, under if __name__ == "__main__"'
        )
    title = getattr(function, "__name__", type(function).__name__)
    content = _packed(function, tuple(args), dict(kwargs or {}), title)
    with tempfile.TemporaryDirectory(prefix="modelparallel-call-") as directory:
        call = Path(directory)
        sources = _sources_of_cells()
        variables = _variables(call, environment or {}, {os.path.dirname(name) for name in sources})
        job = _job(title, nproc, parameters, device, backend, job_dir, variables, timeout, max_restarts)
        description = {"sys_path": [os.path.abspath(path) for path in sys.path], "sources": sources}
        (call / "call.pickle").write_bytes(pickle.dumps({**description, "content": content, "all_ranks": all_ranks}))
        result = run_job(job)
        if result.exit_code == 128 + signal.SIGINT and result.failure is None:
            raise KeyboardInterrupt(result.message)
        if result.exit_code != 0:
            raise JobFailedError(result.message, result.exit_code, result.failure, result.folder, result.attempts)
        values = [_returned(call, global_rank, title) for global_rank in range(job.num_processes if all_ranks else 1)]
    return values if all_ranks else values[0]


def result_file(call: Path, global_rank: int) -> Path:
    """Where a rank puts what it returns."""
    return call / f"rank_{global_rank}.pickle"


def dumped(value: Any) -> bytes:
    """The value as cloudpickle has it. Raises `LaunchError` without it."""
    try:
        import cloudpickle
    except ImportError as error:
        raise LaunchError(
            "modelparallel.launch.notebook needs cloudpickle: pip install 'modelparallel[notebook]'"
        ) from error

    class Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]
        # cloudpickle's own way with code forgets the file, which tracebacks and rehearsal go by.
        dispatch_table = ChainMap({CodeType: _reduced_code}, cloudpickle.CloudPickler.dispatch_table)

    file = io.BytesIO()
    Pickler(file).dump(value)
    return file.getvalue()


def _reduced_code(code: CodeType) -> tuple[Callable[[bytes], CodeType], tuple[bytes]]:
    return marshal.loads, (marshal.dumps(code),)


def globals_of(function: Any) -> dict[str, Any]:
    """The names that a function, a method, a partial call or an object that can be called knows."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    if not inspect.isroutine(function) and not isinstance(function, type):
        function = type(function).__call__
    names: dict[str, Any] = getattr(getattr(function, "__func__", function), "__globals__", {})
    return names


def _packed(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], title: str) -> bytes:
    try:
        return dumped((function, args, kwargs))
    except LaunchError:
        raise
    except Exception as error:
        culprits = ", ".join(_culprits(function, args, kwargs)) or "something that it refers to"
        raise LaunchError(
            f"notebook: {title} cannot be copied to other processes, because of {culprits} ({type(error).__name__}: "
            f"{error}): make open files, connections, locks, generators and smp.DistributedModel inside the function"
        ) from error


def _culprits(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[str]:
    code = getattr(inspect.unwrap(function), "__code__", None)
    known = globals_of(function)
    named = {
        **{f"argument {index}": value for index, value in enumerate(args)},
        **{f"argument {name!r}": value for name, value in kwargs.items()},
        **{f"the global name {name!r}": known[name] for name in getattr(code, "co_names", ()) if name in known},
    }
    for what, value in named.items():
        try:
            dumped(value)
        except Exception:
            yield f"{what}, a {type(value).__name__}"


def _job(
    title: str,
    nproc: int | None,
    parameters: Mapping[str, Any] | str | os.PathLike[str] | None,
    device: str,
    backend: str | None,
    job_dir: str | os.PathLike[str] | None,
    environment: Mapping[str, str],
    timeout: float | None,
    max_restarts: int,
) -> JobSpec:
    backend = backend or os.environ.get("MODELPARALLEL_BACKEND") or "elastic"
    if backend not in ("elastic", "mpi"):
        raise LaunchError(f"notebook: backend={backend!r}: expected 'elastic' or 'mpi'")
    for name, value, least in (("nproc", nproc, 1), ("max_restarts", max_restarts, 0)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise LaunchError(f"notebook: {name}={value!r}: expected a whole number, {least} or more")
    if timeout is not None and not timeout > 0:
        raise LaunchError(f"notebook: timeout={timeout!r}: expected a number of seconds above 0, or None for no limit")
    chosen_device, available = resolve_device(device)
    published: dict[str, Any] | None = None
    num_processes = nproc or available or 1
    if parameters is not None:
        given = parse_parameters(parameters, "parameters")
        config = validate_parameters(given, num_processes=None)
        available = 0 if config.shares_devices else available
        num_processes = nproc or available or config.pipeline_parallel_degree * config.tensor_parallel_degree
        config.check_world(num_processes)
        published = {**given, **config.given}
        published["partitions"] = published["pipeline_parallel_degree"] = config.pipeline_parallel_degree
    check_devices(num_processes, chosen_device, available)
    name, here = new_job_name(title), Path.cwd()
    return JobSpec(
        name=name,
        script=Path(__file__).with_name("called_function.py"),
        source_dir=here,
        working_directory=here,
        folder=default_folder(name) if job_dir is None else JobFolder(Path(os.path.abspath(job_dir))),
        num_processes=num_processes,
        backend=cast(Backend, backend),
        device=chosen_device,
        hyperparameters={} if published is None else {"mp_parameters": published},
        parameters=published,
        environment=environment,
        preferred_port=int((published or {}).get("ddp_port", 7777)),
        timeout=timeout,
        max_restarts=max_restarts,
    )


def _variables(call: Path, given: Mapping[str, str], cell_directories: set[str]) -> dict[str, str]:
    """The variables that the processes have beside those of every job."""
    variables = {str(name): str(value) for name, value in given.items()}
    if os.environ.get("MPLBACKEND", "").startswith("module://"):  # it draws into the notebook
        variables.setdefault("MPLBACKEND", "Agg")
    # Rehearsal takes code in these directories for the script's.
    before = variables.get(_REHEARSAL_VARIABLE, os.environ.get(_REHEARSAL_VARIABLE, ""))
    rehearsed = os.pathsep.join(filter(None, (before, *sorted(cell_directories))))
    return {**variables, CALL_VARIABLE: str(call), _REHEARSAL_VARIABLE: rehearsed}


def _sources_of_cells() -> dict[str, str]:
    """The text of code that is in no file, by the name that tracebacks have for it."""
    entries = {name: entry for name, entry in linecache.cache.items() if len(entry) == 4 and entry[1] is None}
    return {name: "".join(entry[2]) for name, entry in entries.items() if not os.path.exists(name)}


def _returned(call: Path, global_rank: int, title: str) -> Any:
    try:
        content = result_file(call, global_rank).read_bytes()
    except FileNotFoundError:
        raise LaunchError(
            f"notebook: rank {global_rank} ended well but without returning from {title}, as after sys.exit(): let the "
            "function return"
        ) from None
    return pickle.loads(content)
