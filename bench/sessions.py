"""Several sessions of the library in one process, one after another, each with its own configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

import modelparallel as smp
from modelparallel import runtime, session
from modelparallel.pipeline.chains import StepPlan


@contextmanager
def session_with(parameters: Mapping[str, Any]) -> Iterator[None]:
    """A session with this configuration; collective over the world."""
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
