"""Checkpoints against plain ``torch.distributed.checkpoint`` and one file of rank 0; in the background; resuming."""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import modelparallel as smp
from bench.cases.case import Case
from bench.cases.memory import MEBIBYTE, reset_peak, status_bytes
from bench.checkpoint_jobs import GIGABYTE, SMALL, SPREADS, Job, forget_cached, make_job, own_pieces, timed
from bench.checkpoint_peers import load_gathered, plain_state, save_gathered
from bench.harness import Result, paired_result, plain_result
from bench.models import GPTSize
from bench.ranks import run_on_ranks
from modelparallel.deferred.host_heap import trim_heap

NUM_RANKS = 4
COMPARED = ("pp2_tp2", "sharded4")
NUM_LAUNCHES = 2
#: Of the slow ones.
NUM_FEW_PAIRS = 6
NUM_RESUMES = 3
STEPS_MEANWHILE = 2
MMAP_THRESHOLD = -3  # of mallopt
TAG, PLAIN, ONE_FILE = "t", "plain", "one_file.pt"

Pairs = tuple[list[float], list[float]]


# On the ranks


def compare_plain(size: GPTSize, num_pairs: int, is_ours_first: bool, folder: str) -> dict[str, Pairs]:
    """Seconds of saving, of loading from the disk and of loading what is in the page cache; ours and plain DCP."""
    job = make_job(size)
    pieces = own_pieces(job)
    state = plain_state(pieces)
    plain = os.path.join(folder, PLAIN)

    def save_ours() -> None:
        smp.save_checkpoint(folder, TAG)

    def save_plain() -> None:
        dcp.save(state, checkpoint_id=plain)

    def load_ours() -> None:
        smp.resume_from_checkpoint(folder, TAG)

    def load_plain() -> None:
        dcp.load(state, checkpoint_id=plain)

    # Ours comes last: it gives the optimizer new counts of steps, and the peer's are then out of date.
    for save, load in ((save_plain, load_plain), (save_ours, load_ours)):
        _check_round(save, load, job, folder)
    empty = partial(_empty, folder)
    results = {"save": _alternate(save_ours, save_plain, num_pairs, is_ours_first, empty)}
    empty()
    save_ours()
    save_plain()
    cold = partial(_forget, folder)
    results["load"] = _alternate(load_ours, load_plain, num_pairs, is_ours_first, cold)
    results["load_cached"] = _alternate(load_ours, load_plain, num_pairs, is_ours_first)
    return results


def compare_gathered(size: GPTSize, num_pairs: int, is_ours_first: bool, folder: str) -> dict[str, Any]:
    """Seconds of saving and loading, and bytes of the process with the highest peak; ours and one file of rank 0."""
    job = make_job(size)
    pieces = own_pieces(job)
    path = os.path.join(folder, ONE_FILE)
    calls: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "save": (lambda: smp.save_checkpoint(folder, TAG), lambda: save_gathered(pieces, path)),
        "load": (lambda: smp.resume_from_checkpoint(folder, TAG), lambda: load_gathered(pieces, path)),
    }
    for save, load in list(zip(calls["save"], calls["load"], strict=True))[::-1]:  # ours last, see compare_plain
        _check_round(save, load, job, folder)
    empty = partial(_empty, folder)
    results: dict[str, Any] = {"save": _alternate(*calls["save"], num_pairs, is_ours_first, empty)}
    empty()
    for save in calls["save"]:
        save()
    results["load"] = _alternate(*calls["load"], num_pairs, is_ours_first, partial(_forget, folder))
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 256 * 1024)  # freed memory goes back at once
    for kind, both in calls.items():
        results[f"{kind}_peak"] = tuple(_peak(call) for call in both)
    return results


def compare_background(size: GPTSize, num_pairs: int, is_ours_first: bool, folder: str) -> dict[str, Pairs]:
    """Seconds that a save in the background blocks, against one that blocks until the end; and seconds of the next
    steps, against steps without a save.
    """
    job = make_job(size, num_steps=2)
    empty = partial(_empty, folder)

    def steps() -> None:
        for _ in range(STEPS_MEANWHILE):
            job.step()

    stalls: Pairs = [], []
    meanwhile: Pairs = [], []
    for pair in range(num_pairs + 1):
        pending: list[Any] = []
        blocking = timed(lambda: smp.save_checkpoint(folder, TAG), empty)
        alone = timed(steps)
        stall = timed(lambda found=pending: found.append(smp.save_checkpoint(folder, TAG, async_save=True)), empty)  # type: ignore[misc]
        busy = timed(steps)
        pending[0].wait()
        if pair:  # the first one warms up
            for (ours, peer), values in ((stalls, (stall, blocking)), (meanwhile, (busy, alone))):
                ours.append(values[0])
                peer.append(values[1])
    return {"stall": stalls, "steps_meanwhile": meanwhile}


def save_once(size: GPTSize, folder: str) -> None:
    """A checkpoint to resume from."""
    job = make_job(size)
    smp.save_checkpoint(folder, TAG, model=job.model, optimizer=job.optimizer)


def first_step(size: GPTSize, folder: str | None) -> float:
    """Seconds from the call of ``smp.resume_from_checkpoint`` to the end of the first step; without: of that step."""
    job = make_job(size, num_steps=0)

    def resume_and_step() -> None:
        if folder is not None:
            smp.resume_from_checkpoint(folder, TAG)
        job.step()

    return timed(resume_and_step, None if folder is None else partial(_forget, folder))


def _alternate(
    ours: Callable[[], object],
    peer: Callable[[], object],
    num_pairs: int,
    is_ours_first: bool,
    before: Callable[[], object] | None = None,
) -> Pairs:
    """Seconds of both in turn, after one call each that is not counted; ``before`` each call, not counted either."""
    spent: Pairs = [], []
    turns = list(zip((ours, peer), spent, strict=True))
    if not is_ours_first:
        turns.reverse()
    for pair in range(num_pairs + 1):
        for function, times in turns:
            seconds = timed(function, before)
            if pair:
                times.append(seconds)
        turns.reverse()
    return spent


def _check_round(save: Callable[[], object], load: Callable[[], object], job: Job, folder: str) -> None:
    """Whether every tensor comes back to the bit. Collective over the world."""
    _empty(folder)
    save()
    pieces = {(piece.key, piece.offsets): piece.tensor for piece in own_pieces(job)}
    wanted = {place: tensor.clone() for place, tensor in pieces.items()}
    for tensor in pieces.values():
        tensor.zero_()
    dist.barrier()
    load()
    for piece in own_pieces(job):  # in another order by now, perhaps
        if not torch.equal(piece.tensor, wanted.pop((piece.key, piece.offsets))):
            raise RuntimeError(f"{piece.key} is not what was saved")
    if wanted:
        raise RuntimeError(f"{list(wanted)} were not loaded")


def _empty(folder: str) -> None:
    """Remove earlier checkpoints. Collective over the world."""
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
    dist.barrier()


def _forget(folder: str) -> None:
    """Let the page cache forget the files. Collective over the world."""
    dist.barrier()
    if dist.get_rank() == 0:
        forget_cached(folder)
    dist.barrier()


def _peak(call: Callable[[], object]) -> int:
    """The most resident memory during a call above that before it, of the rank that needs most. Collective."""
    gc.collect()
    trim_heap()  # what was freed before would be used again, and not be seen
    dist.barrier()
    base = status_bytes("VmRSS")
    reset_peak()
    call()
    most = torch.tensor(status_bytes("VmHWM") - base)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


# All of it


def measure(num_pairs: int) -> list[Result]:
    """See the description of the case. ``QUICK=1`` takes a model of 1.6 MB."""
    is_small = os.environ.get("QUICK", "0") not in ("", "0")
    size = SMALL if is_small else GIGABYTE
    unit = "s (1.6 MB)" if is_small else "s"
    results = []
    with tempfile.TemporaryDirectory(prefix="bench-checkpoints-") as root:
        folder = os.path.join(root, "checkpoints")
        for spread in COMPARED:
            for kind, (ours, peer) in _launched(compare_plain, spread, size, num_pairs, folder).items():
                target = "reported" if kind == "load_cached" else "ratio <= 1.05"
                results.append(paired_result(f"checkpoints_{kind}_{spread}", unit, ours, peer, target))
        num_few = min(num_pairs, NUM_FEW_PAIRS)
        arguments = (size, num_few, True, folder)
        for kind, (ours, peer) in run_on_ranks(compare_gathered, NUM_RANKS, *arguments, parameters=SPREADS["pp2_tp2"])[
            0
        ].items():
            name = f"checkpoints_gathered_{kind}"
            if kind.endswith("_peak"):
                mine, other = ours / MEBIBYTE, peer / MEBIBYTE
                results.append(plain_result(name, "MiB", mine, 1, "reported", max(other, 1 / MEBIBYTE)))
            else:
                results.append(paired_result(name, unit, ours, peer, "reported"))
        for kind, (ours, peer) in run_on_ranks(
            compare_background, NUM_RANKS, *arguments, parameters=SPREADS["pp2_tp2"]
        )[0].items():
            results.append(paired_result(f"checkpoints_{kind}", unit, ours, peer, "reported"))
        shutil.rmtree(folder, ignore_errors=True)
        run_on_ranks(save_once, NUM_RANKS, size, folder, parameters=SPREADS["pp2_tp2"])
        for name, spread, num_ranks in (("same", "pp2_tp2", NUM_RANKS), ("other", "pp2", NUM_RANKS // 2)):
            seconds = [
                [
                    run_on_ranks(first_step, num_ranks, size, where, parameters=SPREADS[spread])[0]
                    for where in (folder, None)
                ]
                for _ in range(min(num_pairs, NUM_RESUMES))
            ]
            mine, other = (statistics.median(values) for values in zip(*seconds, strict=True))
            results.append(plain_result(f"checkpoints_resume_{name}", unit, mine, len(seconds), "reported", other))
    return results


def _launched(
    function: Callable[..., dict[str, Pairs]], spread: str, size: GPTSize, num_pairs: int, folder: str
) -> dict[str, Pairs]:
    """The pairs of several launches together."""
    found: dict[str, Pairs] = {}
    print(f"  {function.__name__}, {spread}", flush=True)
    for launch in range(NUM_LAUNCHES):
        share = len(range(launch, num_pairs, NUM_LAUNCHES))
        if share:
            arguments = (size, share, launch % 2 == 0, folder)
            for kind, pairs in run_on_ranks(function, NUM_RANKS, *arguments, parameters=SPREADS[spread])[0].items():
                for mine, others in zip(found.setdefault(kind, ([], [])), pairs, strict=True):
                    mine.extend(others)
    return found


CASES = [
    Case(
        "checkpoints",
        "1.0 GB of parameters and Adam's moments (GPT of 6 layers x 1024) over 4 processes, pp=2 x tp=2 and sharded "
        "dp=4, in a temporary folder. `save` and `load` of `smp.save_checkpoint` and `smp.resume_from_checkpoint` "
        "against `torch.distributed.checkpoint` of the same tensors (`DTensor`s), both as they are by default: both "
        "fsync each file; ours also digests it, and compares the digests before loading; `load` after the system has "
        "dropped the files from its cache, `load_cached` with them in it. `gathered`: against sending everything to "
        "rank 0, `torch.save` and fsync, or `torch.load` there and sending each its part; time, and peak of the "
        "process that needs most above what it had. `stall`: how long `async_save=True` keeps training, against a save "
        "that blocks; `steps_meanwhile`: two training steps while it writes, against two without. `resume`: a new "
        "job's call of resume until its first step is done, against a first step without (`same` shape; `other`: "
        "pp=2 on two processes).",
        measure,
    )
]
