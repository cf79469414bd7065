"""Several sessions of the library in one process, one after another, each with its own configuration."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

import modelparallel as smp
from modelparallel.job import session
from modelparallel.pipeline.schedule.chains import StepPlan
from modelparallel.training import runtime

_num_sessions = 0


@contextmanager
def session_with(parameters: Mapping[str, Any]) -> Iterator[None]:
    """A session with this configuration, and a process group of its own from then on; collective over the world."""
    global _num_sessions
    _num_sessions += 1
    num_ranks, global_rank = dist.get_world_size(), dist.get_rank()
    dist.barrier()
    dist.destroy_process_group()
    # A new store: a group that is made again under its old name would find the addresses of the old one.
    store = dist.FileStore(f"{os.environ['BENCH_STORE']}-{_num_sessions}", num_ranks)
    dist.init_process_group("gloo", store=store, rank=global_rank, world_size=num_ranks)
    smp.init(dict(parameters))
    try:
        yield
        dist.barrier()  # nobody leaves while another rank may still talk to it
    finally:
        session.shutdown()


def last_step_plan() -> StepPlan:
    """The plan that was made last in this session."""
    plan = runtime.current().engine.plans.last
    if plan is None:
        raise RuntimeError("the stages run in discovery order: no plan was made")
    return plan
