"""Run one function of a benchmark on several processes of this machine, one thread each."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Mapping
from typing import Any

NUM_LAUNCHES = 4


def run_on_ranks(
    function: Callable[..., Any],
    num_ranks: int,
    *args: Any,
    parameters: Mapping[str, Any] | None = None,
    timeout: float = 1800,
) -> list[Any]:
    """Call the module-level ``function(*args)`` in ``num_ranks`` fresh processes; their results in rank order.

    The processes share a gloo process group and, with ``parameters``, have called ``smp.init``. Fresh ones, so that
    peak memory means something. Raises RuntimeError with the traceback of the first rank that failed.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        ranks = []
        for global_rank in range(num_ranks):
            ours, theirs = context.Pipe()
            arguments = (theirs, function, args, global_rank, num_ranks, os.path.join(folder, "store"), parameters)
            process = context.Process(target=_child, args=arguments, daemon=True)
            process.start()
            theirs.close()
            ranks.append((process, ours))
        try:
            return _collect(ranks, timeout)
        finally:
            for process, pipe in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
                pipe.close()


def pairs_of_launches(
    function: Callable[[int, bool], Any], num_ranks: int, num_pairs: int, parameters: Mapping[str, Any]
) -> tuple[list[float], list[float]]:
    """Call ``function(num_pairs, is_ours_first)`` on fresh processes several times; the pairs of all calls together.

    Which memory a model got, and which sockets a process group, is settled when they are made, and makes the same code
    up to 5% faster or slower for as long as the process lives. So there are several launches, and the model that is
    built first is ours in every other one; ``function`` should let both communicate over one process group.
    """
    ours: list[float] = []
    peer: list[float] = []
    for launch in range(NUM_LAUNCHES):
        share = len(range(launch, num_pairs, NUM_LAUNCHES))
        if share:
            mine, other = run_on_ranks(function, num_ranks, share, launch % 2 == 0, parameters=parameters)[0]
            ours += mine
            peer += other
    return ours, peer


def _collect(ranks: list[Any], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    pipes = {pipe: global_rank for global_rank, (_, pipe) in enumerate(ranks)}
    while len(results) < len(ranks):
        ready = multiprocessing.connection.wait([pipe for pipe, rank in pipes.items() if rank not in results], timeout)
        if not ready:
            raise RuntimeError(f"a benchmark did not end within {timeout:g} s")
        for pipe in ready:
            global_rank = pipes[pipe]  # type: ignore[index]
            try:
                is_good, payload = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                raise RuntimeError(f"rank {global_rank} of a benchmark ended without a result") from None
            if not is_good:
                raise RuntimeError(f"rank {global_rank} of a benchmark failed:\n{payload}")
            results[global_rank] = payload
    for _, pipe in ranks:  # nobody leaves while another rank may still talk to it
        pipe.send_bytes(b"leave")
    return [results[global_rank] for global_rank in range(len(ranks))]


def _child(
    pipe: Any,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    global_rank: int,
    num_ranks: int,
    store: str,
    parameters: Mapping[str, Any] | None,
) -> None:
    os.environ.update(
        OMP_NUM_THREADS="1",
        GLOO_SOCKET_IFNAME="lo",
        RANK=str(global_rank),
        WORLD_SIZE=str(num_ranks),
        LOCAL_RANK=str(global_rank),
        LOCAL_WORLD_SIZE=str(num_ranks),
        BENCH_STORE=store,
    )
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group("gloo", store=dist.FileStore(store, num_ranks), rank=global_rank, world_size=num_ranks)
        if parameters is not None:
            import modelparallel as smp

            smp.init(dict(parameters))
        message = pickle.dumps((True, function(*args)))
    except BaseException:
        message = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(message)
    with contextlib.suppress(EOFError):  # the parent has gone
        pipe.recv_bytes()
    os._exit(0)  # destroying gloo groups one after another can wait for peers that have left
