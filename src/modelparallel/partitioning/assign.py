"""From what is known to the plan: the one entry point, and the log line."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from modelparallel.errors import PartitionError
from modelparallel.partitioning.costs import Trace, microbatches_in_flight, sizes_only, untied
from modelparallel.partitioning.guests import settled, with_copies
from modelparallel.partitioning.manual import Mark, check_sharing, manual_plan
from modelparallel.partitioning.solve import solve
from modelparallel.partitioning.split import StepTime
from modelparallel.partitioning.units import find_units
from modelparallel.plan.partition import PartitionPlan

LOGGER = logging.getLogger("modelparallel.partitioning")


def make_plan(
    root: nn.Module,
    num_stages: int,
    *,
    units: Sequence[str] | None = None,
    trace: Trace | None = None,
    memory_weight: float = 0.8,
    num_microbatches: int = 1,
    active_microbatches: int | None = None,
    schedule: str = "interleaved",
    virtual_degree: int = 1,
    memory_limit: int | None = None,
    step_time: StepTime | None = None,
    tied_weights: str = "colocate",
    is_automatic: bool = True,
    marks: Mark | None = None,
    overrides: Sequence[tuple[nn.Module, int]] = (),
    default_partition: int = 0,
    load_from: str | Path | None = None,
    stored: PartitionPlan | None = None,
) -> PartitionPlan:
    """The partition plan of the user's module ``root`` for ``num_stages`` stages (smp-api section 6).

    Pure and local: equal arguments give an equal plan. Stored (``load_from``), by hand (``is_automatic=False``;
    contexts and overrides count only then), from a trace, or from sizes.

    Args:
        units: from ``find_units(root)``; found here when None.
        trace: from ``trace_step``. Ranks must use one and the same trace (that of one rank, broadcast), or their
            plans may differ.
        memory_weight, num_microbatches, active_microbatches, schedule, virtual_degree, memory_limit, step_time:
            see :func:`~modelparallel.partitioning.solve.solve`; the last three count only in the automatic partition.
        marks, overrides, default_partition: see :func:`~modelparallel.partitioning.manual.manual_plan`.
        load_from: the file of a plan saved with ``PartitionPlan.save``.
        stored: a plan of the model for as many stages, which is taken (of a checkpoint).
        tied_weights: "colocate" places modules that share a parameter on one stage; "replicate" places each where it
            fits best, with a copy of the parameter; "auto" does what is cheaper (see :func:`_cheaper`).

    Raises:
        PartitionError: the model cannot be placed as asked, or not within the memory limit; a stored plan does not
            fit the model or the number of stages.
    """
    units = find_units(root) if units is None else tuple(units)
    if stored is not None:
        plan = replace(stored, origin="loaded")
    elif load_from is not None:
        plan = _loaded(load_from, num_stages)
    elif not is_automatic:
        active = num_stages + 2 if active_microbatches is None else active_microbatches
        plan = manual_plan(
            root,
            units,
            marks or _no_mark,
            overrides,
            default_partition,
            num_stages,
            trace=trace,
            in_flight=microbatches_in_flight(num_stages, num_microbatches, active, schedule),
            may_replicate=tied_weights != "colocate",
        )
    else:
        find = functools.partial(
            solve,
            num_stages=num_stages,
            memory_weight=memory_weight,
            num_microbatches=num_microbatches,
            active_microbatches=active_microbatches,
            schedule=schedule,
            virtual_degree=virtual_degree,
            memory_limit=memory_limit,
            step_time=step_time,
        )
        known = settled(root, trace or sizes_only(root, units))
        plan = _with_ties(find, root, known, tied_weights) if known.ties else find(known)
        plan = with_copies(plan, root, known)
    check_plan(plan, root)
    if tied_weights == "colocate":
        check_sharing(root, plan)
    return plan


def check_plan(plan: PartitionPlan, root: nn.Module) -> None:
    """Raise PartitionError unless ``plan`` places all that the user's module ``root`` has, and nothing else."""
    plan.check(
        [name for name, _ in root.named_parameters()],
        module_names=[name for name, _ in root.named_modules()],
        buffer_names=[name for name, _ in root.named_buffers()],
    )


def _loaded(path: str | Path, num_stages: int) -> PartitionPlan:
    plan = PartitionPlan.load(path)
    if plan.num_stages != num_stages:
        raise PartitionError(
            f"the partition plan {str(path)!r} is for {plan.num_stages} stages, but "
            f"pipeline_parallel_degree is {num_stages}: use pipeline_parallel_degree={plan.num_stages}, "
            "or make a new plan (load_partition false)"
        )
    return replace(plan, origin="loaded")


def _with_ties(
    find: Callable[[Trace], PartitionPlan], root: nn.Module, trace: Trace, tied_weights: str
) -> PartitionPlan:
    if tied_weights == "colocate":
        return find(trace)
    copied = find(settled(root, untied(root, trace)))
    if tied_weights == "replicate":
        return copied
    try:
        colocated = find(trace)
    except PartitionError:  # too few items, or more than a stage may hold
        return copied
    return _cheaper(colocated, copied)


def _cheaper(colocated: PartitionPlan, copied: PartitionPlan) -> PartitionPlan:
    """Copies, if the dearest stage then has less to compute and the fullest stage does not hold more than a tenth more.

    A microbatch that does not come back to a stage also waits less, which is not counted.
    """
    if not colocated.figures or not copied.figures:
        return colocated
    work = [max(figures.compute_share or 0.0 for figures in plan.figures) for plan in (colocated, copied)]
    held = [max(figures.memory_share for figures in plan.figures) for plan in (colocated, copied)]
    return copied if work[1] <= work[0] and held[1] <= 1.1 * held[0] else colocated


def log_plan(plan: PartitionPlan, logger: logging.Logger = LOGGER, *, predicted_bubble: float | None = None) -> None:
    """Log the plan's report, after the line ``Partition assignments:`` that job logs are searched for.

    Args:
        predicted_bubble: see :meth:`PartitionPlan.report`.
    """
    logger.info("Partition assignments: (%s)\n%s", plan.origin, plan.report(predicted_bubble))


def _no_mark(module: nn.Module) -> None:
    return None
