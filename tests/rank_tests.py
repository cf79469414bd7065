"""Tests whose bodies run on several ranks, many in one set of processes.

    PP2 = RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 4})

    @on(PP2)
    def test_something():
        ...  # runs on both ranks, after smp.init(...); assert anything

All bodies of a set run in the order of the file, in one process set, when the first of them is asked for: a set costs
a second, not each test. A body that fails on some ranks only ends its set, since the ranks are no longer in step.
RANK_TESTS_ONLY=part-of-a-name runs the bodies of that name alone.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pool import run_ranks

_sets: dict[str, list[RankTests]] = {}


class RankTests:
    """A set of tests for ``num_ranks`` processes and one configuration; make it at the top level of a test module.

    ``is_slow``: one of many configurations, which ``make test-all`` runs.
    """

    def __init__(
        self, num_ranks: int, parameters: dict[str, Any], timeout: float = 300, *, is_slow: bool = False
    ) -> None:
        # A short wait, so that a test that fails on one rank does not keep the others for minutes.
        self.parameters = {"ddp": True, "timeout_seconds": 40, **parameters}
        self.num_ranks = num_ranks
        self.timeout = timeout
        self.is_slow = is_slow
        self.bodies: dict[str, Callable[[], None]] = {}
        self.module = sys._getframe(1).f_globals["__name__"]
        siblings = _sets.setdefault(self.module, [])
        self.index = len(siblings)
        siblings.append(self)
        self._reports: list[dict[str, str]] | None = None

    def __str__(self) -> str:
        degrees = [("pp", "pipeline_parallel_degree"), ("tp", "tensor_parallel_degree"), ("mb", "microbatches")]
        parts = [f"{short}{self.parameters[key]}" for short, key in degrees if key in self.parameters]
        schedule = [self.parameters["pipeline"]] if "pipeline" in self.parameters else []
        return "-".join([*parts, f"{self.num_ranks}p", *schedule])

    def verify(self, name: str) -> None:
        """Fail if the body ``name`` failed on some rank."""
        if _chosen() not in name:
            pytest.skip(f"RANK_TESTS_ONLY={_chosen()}")
        if self._reports is None:
            self._reports = run_ranks(
                _run_bodies, self.num_ranks, self.module, self.index, parameters=self.parameters, timeout=self.timeout
            )
        texts = [report.get(name, f"{name} did not run here") for report in self._reports]
        failed = [f"--- rank {rank} ---\n{text}" for rank, text in enumerate(texts) if text]
        if failed:
            pytest.fail("\n".join(failed), pytrace=False)


def on(*sets: RankTests) -> Callable[[Callable[[], None]], Callable[..., None]]:
    """Run the decorated body on the ranks of each set, as a test of its name."""

    def decorate(body: Callable[[], None]) -> Callable[..., None]:
        for ranks in sets:
            ranks.bodies[body.__name__] = body

        marked = [pytest.param(ranks, marks=pytest.mark.slow) if ranks.is_slow else ranks for ranks in sets]

        @pytest.mark.parametrize("ranks", marked, ids=str)
        def test(ranks: RankTests) -> None:
            ranks.verify(body.__name__)

        test.__name__ = body.__name__
        test.__doc__ = body.__doc__
        return test

    return decorate


def _chosen() -> str:
    """The part of a name that selects bodies; all contain the empty one."""
    return os.environ.get("RANK_TESTS_ONLY", "")


def _run_bodies(module: str, index: int) -> dict[str, str]:
    """On a rank: run all bodies of the set. Returns by name why one failed or was left out, "" for one that passed."""
    importlib.import_module(module)
    reports: dict[str, str] = {}
    left_out = ""
    apart = dist.new_group()  # a failed body may leave a collective of the default group half done
    for name, body in _sets[module][index].bodies.items():
        if _chosen() not in name:
            continue
        if left_out:
            reports[name] = left_out
            continue
        start = time.monotonic()
        reports[name] = ""
        try:
            body()
        except BaseException:
            reports[name] = traceback.format_exc()
        print(f"{name}: {time.monotonic() - start:.3f} s")
        num_failed = torch.tensor(int(reports[name] != ""))
        dist.all_reduce(num_failed, group=apart)
        if 0 < num_failed < dist.get_world_size():
            left_out = f"not run, since {name} failed on {int(num_failed)} of {dist.get_world_size()} ranks before"
    return reports
