"""Run a test function on several ranks, cheaply, and never hang.

``from pool import run_ranks``; ``run_ranks(body, 4, x, parameters={...})`` calls the module-level function ``body(x)``
in 4 processes that share a gloo process group, and returns the 4 results in rank order.

The processes are forked from a fork server that has imported torch, the package and what the test session had imported
by then, so that a run costs a few tenths of a second instead of the seconds of ``import torch``. The rendezvous is a
file: no ports. Results and arguments travel as plain pickles through pipes (torch's shared-memory reductions would tie
them to the life of the child). A rank that fails, dies or hangs ends the run: the first failure's traceback, or every
rank's stack after a timeout, is in the error, and only children of this run are killed.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before torch: the children compute with one thread each, and gloo must not look up the host's name.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
# Also where there is a GPU; tests of GPUs ask for it.
os.environ.setdefault("MODELPARALLEL_DEVICE", "cpu")

import torch
import torch.distributed as dist

TESTS_FOLDER = Path(__file__).resolve().parent
# Imported by the server once, because a child would otherwise import them at its first optimizer, mesh or checkpoint.
ALWAYS_PRELOADED = ["pool", "torch._dynamo", "torch.distributed.tensor", "torch.testing", "pytest", "modelparallel"]
PRELOADED_IF_USED = ("transformers", "torchvision", "hypothesis", "modelparallel", "smdistributed")
LOG_TAIL_CHARACTERS = 6000


def declare_torchvision_operators() -> None:
    """Let torchvision (built for CUDA) and with it transformers be imported beside a CPU-only torch."""
    try:
        from modelparallel.launch.rehearsal import declare_torchvision_operators as declare
    except ImportError:
        if torch.version.cuda is None and not hasattr(declare_torchvision_operators, "library"):
            library = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            declare_torchvision_operators.library = library  # type: ignore[attr-defined]  # keeps the declarations alive
    else:
        declare()


declare_torchvision_operators()


class RankError(RuntimeError):
    """A rank raised, died or hung: ``global_rank`` is the first one that did, ``__cause__`` its exception, if any."""

    def __init__(self, message: str, global_rank: int | None, failures: list[RankFailure]) -> None:
        super().__init__(message)
        self.global_rank = global_rank
        self.failures = failures


class RankTimeout(RankError):
    """The ranks did not end in time; the message holds every rank's stack."""


@dataclass
class RankFailure:
    """What became of a rank that gave no result (an entry of the results with ``return_failures=True``)."""

    global_rank: int
    summary: str
    traceback: str = ""
    exception: BaseException | None = None


@dataclass
class _Rank:
    global_rank: int
    process: Any
    pipe: multiprocessing.connection.Connection
    log: Path
    is_done: bool = False
    result: Any = None
    failure: RankFailure | None = None

    def log_text(self) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return text[-LOG_TAIL_CHARACTERS:].rstrip()


@dataclass
class _Job:
    """All that a child needs; travels as one pickle."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    global_rank: int
    num_ranks: int
    store: str
    log: str
    parameters: dict[str, Any] | None
    timeout: float
    environ: dict[str, str] = field(default_factory=dict)


def run_ranks(
    function: Callable[..., Any],
    num_ranks: int,
    *args: Any,
    parameters: dict[str, Any] | None = None,
    timeout: float = 300,
    environ: Mapping[str, str] | None = None,
    return_failures: bool = False,
    grace: float = 10,
    **kwargs: Any,
) -> list[Any]:
    """Call ``function(*args, **kwargs)`` on ``num_ranks`` processes and return their results in rank order.

    function: module-level, found by import in the child. Arguments and results are pickled (tensors by value).
    parameters: when given, ``smp.init(parameters)`` is called first. The default gloo group exists in any case.
    timeout: seconds for the whole run; then every rank's stack is collected and :class:`RankTimeout` raised.
    environ: extra environment variables of the children, beside RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE.
    return_failures: failed ranks give a :class:`RankFailure` in the list instead of an error of the run.
    grace: seconds that the other ranks get to end by themselves once one has failed.
    """
    folder = Path(tempfile.mkdtemp(prefix="ranks-"))
    ranks: list[_Rank] = []
    try:
        context = _fork_server()
        for global_rank in range(num_ranks):
            log = folder / f"rank{global_rank}.log"
            job = _Job(
                function, args, kwargs, global_rank, num_ranks, str(folder / "store"), str(log), parameters, timeout,
                dict(environ or {}),
            )  # fmt: skip
            ours, theirs = context.Pipe()
            process = context.Process(target=_child, args=(theirs, pickle.dumps(job)), daemon=True)
            process.start()
            theirs.close()
            ranks.append(_Rank(global_rank, process, ours, log))
        first = _collect(ranks, timeout, grace)
        for rank in ranks:
            if text := rank.log_text():
                print("\n".join(f"[rank {rank.global_rank}] {line}" for line in text.splitlines()))
        if first is not None and not return_failures:
            _raise_first(ranks, first)
        return [rank.failure if rank.failure is not None else rank.result for rank in ranks]
    finally:
        _end(ranks)
        shutil.rmtree(folder, ignore_errors=True)


def preload() -> None:
    """Let the ranks of later runs find imported what this process has imported by now.

    A fork server that was started before is ended, and the next run starts another one: a few seconds, once, against
    the seconds that each rank would need to import transformers.
    """
    server: Any = multiprocessing.forkserver._forkserver
    if server._forkserver_pid is not None and not set(_wanted()) <= set(server._preload_modules):
        server._stop()


def _wanted() -> list[str]:
    used = [name for name in list(sys.modules) if name.split(".")[0] in PRELOADED_IF_USED]
    return [name for name in used if "." not in name or ".modeling_" in name or name.startswith("modelparallel.")]


def _fork_server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    server: Any = multiprocessing.forkserver._forkserver
    if server._forkserver_pid is None:  # not started yet
        context.set_forkserver_preload(ALWAYS_PRELOADED + _wanted())
        before = os.environ.get("PYTHONPATH")
        # Python before 3.13 does not hand sys.path to the server, only to its children.
        os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS_FOLDER), *(before or "").split(os.pathsep)])
        try:
            multiprocessing.forkserver.ensure_running()
        finally:
            if before is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = before
    return context


def _collect(ranks: list[_Rank], timeout: float, grace: float) -> int | None:
    """Wait until all ranks gave a result or the time is up; return the first failing rank."""
    deadline = time.monotonic() + timeout
    first: int | None = None
    while pending := [rank for rank in ranks if not rank.is_done]:
        ready = multiprocessing.connection.wait([rank.pipe for rank in pending], max(0.0, deadline - time.monotonic()))
        if not ready:
            stacks = _stacks(pending)
            if first is None:
                names = ", ".join(str(rank.global_rank) for rank in pending)
                text = f"rank(s) {names} of {len(ranks)} did not end within {timeout:g} s. Their stacks:\n{stacks}"
                _end(ranks)
                raise RankTimeout(text, pending[0].global_rank, [])
            for rank in pending:
                rank.failure = RankFailure(rank.global_rank, f"killed {grace:g} s after rank {first} failed", stacks)
            break
        for rank in pending:
            if rank.pipe in ready:
                _receive(rank)
                if rank.failure is not None and first is None:
                    first = rank.global_rank
                    deadline = min(deadline, time.monotonic() + grace)
    if first is None:
        for rank in ranks:  # nobody leaves while another rank may still talk to it
            rank.pipe.send_bytes(b"leave")
        for rank in ranks:
            rank.process.join(5)
    return first


def _receive(rank: _Rank) -> None:
    rank.is_done = True
    try:
        kind, payload = pickle.loads(rank.pipe.recv_bytes())
    except (EOFError, ConnectionResetError):
        rank.process.join(5)
        code = rank.process.exitcode
        rank.failure = RankFailure(
            rank.global_rank, f"process ended without a result, exit code {code}", rank.log_text()
        )
        return
    if kind == "result":
        rank.result = pickle.loads(payload)
        return
    summary, text, pickled = payload
    try:
        exception = pickle.loads(pickled) if pickled else None
    except Exception:  # an exception class with its own constructor may not unpickle; its traceback is enough
        exception = None
    rank.failure = RankFailure(rank.global_rank, summary, text, exception)


def _stacks(ranks: list[_Rank]) -> str:
    for rank in ranks:
        if rank.process.is_alive():
            os.kill(rank.process.pid, signal.SIGUSR1)
    time.sleep(0.5)
    return "\n".join(f"--- rank {rank.global_rank} ---\n{rank.log_text()}" for rank in ranks)


def _end(ranks: list[_Rank]) -> None:
    for rank in ranks:
        if rank.process.is_alive():
            rank.process.kill()
    for rank in ranks:
        rank.process.join(5)
        rank.pipe.close()


def _raise_first(ranks: list[_Rank], first: int) -> None:
    failures = [rank.failure for rank in ranks if rank.failure is not None]
    failure = ranks[first].failure
    assert failure is not None
    others = "".join(
        f"\n  also rank {other.global_rank}: {other.summary}" for other in failures if other.global_rank != first
    )
    raise RankError(
        f"rank {first} of {len(ranks)} failed: {failure.summary}{others}\n{failure.traceback}", first, failures
    ) from failure.exception


def _child(pipe: multiprocessing.connection.Connection, payload: bytes) -> None:
    """One rank's life."""
    try:
        job: _Job = pickle.loads(payload)
        _prepare(job)
        result = job.function(*job.args, **job.kwargs)
        message = pickle.dumps(("result", pickle.dumps(result)))
    except BaseException as error:
        summary = f"{type(error).__name__}: {error}"
        try:
            pickled = pickle.dumps(error)
        except Exception:  # the text is enough
            pickled = b""
        message = pickle.dumps(("failure", (summary, traceback.format_exc(), pickled)))
    sys.stdout.flush()
    sys.stderr.flush()
    pipe.send_bytes(message)
    with contextlib.suppress(EOFError):  # raised when the parent has gone
        pipe.recv_bytes()
    os._exit(0)  # destroying gloo groups one after another can wait for peers that have left


def _prepare(job: _Job) -> None:
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    tempfile.tempdir = os.path.dirname(job.log)  # what a rank makes goes with the run
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    faulthandler.enable(file=sys.stderr)
    os.environ.update(
        RANK=str(job.global_rank),
        WORLD_SIZE=str(job.num_ranks),
        LOCAL_RANK=str(job.global_rank),
        LOCAL_WORLD_SIZE=str(job.num_ranks),
    )
    os.environ.setdefault("SMP_TIMEOUT", "30")  # of the waits in a step, where a test does not say
    os.environ.update(job.environ)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(job.store, job.num_ranks),
        rank=job.global_rank,
        world_size=job.num_ranks,
        timeout=datetime.timedelta(seconds=job.timeout),
    )
    if job.parameters is not None:
        import modelparallel as smp

        smp.init(job.parameters)
