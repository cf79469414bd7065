"""The partitioner: which stage is the home of which module (marks -> trace -> costs -> solve -> plan)."""

from modelparallel.partitioning.assign import check_plan, log_plan, make_plan
from modelparallel.partitioning.costs import Trace, microbatches_in_flight, sizes_only
from modelparallel.partitioning.manual import manual_plan
from modelparallel.partitioning.operations import work_of_call
from modelparallel.partitioning.solve import solve
from modelparallel.partitioning.trace import trace_step, untouched
from modelparallel.partitioning.units import find_units

__all__ = [
    "Trace",
    "check_plan",
    "find_units",
    "log_plan",
    "make_plan",
    "manual_plan",
    "microbatches_in_flight",
    "sizes_only",
    "solve",
    "trace_step",
    "untouched",
    "work_of_call",
]
