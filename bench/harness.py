"""Measuring: alternating pairs in one run, medians of ratios, bootstrap intervals, and the results file.

Timings of a machine drift by tens of per cent within minutes, so a benchmark and its peer run in turn, in the same
processes, and each pair gives one ratio. The figure quoted is the median of the ratios with its 95% bootstrap
interval.
"""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

RESULTS_FILE = Path(__file__).with_name("results.json")
NUM_RESAMPLES = 5000
TARGET = re.compile(r"(ratio|ours) <= ([0-9.]+)")


@dataclass(frozen=True)
class Result:
    """A line of the results file.

    ``ours`` and ``peer`` are medians in ``unit``; the ratios are ours / peer, None where there is no peer to divide
    by. ``target`` reads "ratio <= 1.05", "ours <= 150" or "reported".
    """

    name: str
    unit: str
    ours: float
    peer: float | None
    ratio_median: float | None
    ratio_low: float | None
    ratio_high: float | None
    pairs: int
    target: str
    machine: str

    @property
    def verdict(self) -> str:
        """ "met", "missed", "within noise" (the interval holds the target) or "-" where there is no target."""
        match = TARGET.fullmatch(self.target)
        if match is None:
            return "-"
        limit = float(match.group(2))
        if match.group(1) == "ours":
            return "met" if self.ours <= limit else "missed"
        if self.ratio_median is None:
            return "-"
        if self.ratio_median <= limit:
            return "met"
        return "within noise" if self.ratio_low is not None and self.ratio_low <= limit else "missed"


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """95% interval of the median, by resampling with a fixed seed."""
    generator = np.random.default_rng(0)
    samples = generator.choice(np.asarray(values), size=(NUM_RESAMPLES, len(values)))
    low, high = np.percentile(np.median(samples, axis=1), [2.5, 97.5])
    return float(low), float(high)


def paired_result(name: str, unit: str, ours: Sequence[float], peer: Sequence[float], target: str) -> Result:
    """The result of pairs of measurements, both in ``unit``."""
    ratios = [mine / other for mine, other in zip(ours, peer, strict=True)]
    low, high = bootstrap_interval(ratios)
    return Result(
        name,
        unit,
        round(float(np.median(ours)), 3),
        round(float(np.median(peer)), 3),
        round(float(np.median(ratios)), 4),
        round(low, 4),
        round(high, 4),
        len(ratios),
        target,
        machine(),
    )


def plain_result(name: str, unit: str, ours: float, pairs: int, target: str, peer: float | None = None) -> Result:
    """A single figure, with the figure to compare it with if there is one."""
    ratio = None if peer is None else round(ours / peer, 4)
    peer = None if peer is None else round(peer, 3)
    return Result(name, unit, round(ours, 3), peer, ratio, None, None, pairs, target, machine())


def machine() -> str:
    """Processor, number of cores, torch version."""
    model = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpu_info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    import os

    return f"{model}, {os.cpu_count()} cores, torch {torch.__version__}"


def measure_pairs(
    ours: Callable[[], object],
    peer: Callable[[], object],
    num_pairs: int,
    *,
    num_warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[float], list[float]]:
    """Seconds of ``num_pairs`` calls of each, in turn; collective over the default process group, if there is one.

    All ranks start a call together, and the call lasts until the slowest of them is done. ``time.process_time`` as
    ``clock`` counts the processor time of this process instead, for overheads of code that does not wait.
    """
    spent: tuple[list[float], list[float]] = ([], [])
    turns = list(zip((ours, peer), spent, strict=True))
    for number in range(num_warmup + num_pairs):
        for function, times in turns:
            if dist.is_initialized():
                dist.barrier()
            start = clock()
            function()
            end = clock()
            if number >= num_warmup:
                times.append(end - start)
        turns.reverse()  # who comes second finds memory that the first has just freed
    return _slowest(spent[0]), _slowest(spent[1])


def _slowest(times: Sequence[float]) -> list[float]:
    if not dist.is_initialized():
        return list(times)
    values = torch.tensor(times, dtype=torch.float64)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return [float(value) for value in values.tolist()]


def read_results(path: Path = RESULTS_FILE) -> list[Result]:
    """The lines of the results file, or none."""
    return [Result(**entry) for entry in json.loads(path.read_text())] if path.exists() else []


def merge_results(new: Sequence[Result], path: Path = RESULTS_FILE) -> list[Result]:
    """Replace the lines of the same names, keep the others, sort by name and write."""
    lines = {result.name: result for result in read_results(path)} | {result.name: result for result in new}
    merged = [lines[name] for name in sorted(lines)]
    path.write_text(json.dumps([asdict(result) for result in merged], indent=2) + "\n")
    return merged
