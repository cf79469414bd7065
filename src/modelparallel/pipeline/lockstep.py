"""The pipelines of a tensor-parallel or a sharding group, in lockstep.

[Note: lockstep] With tensor parallelism every stage is a group of processes, one in each of t pipelines, and what runs
on it runs on all of them together: split layers exchange tensors in forward and backward. So all t pipelines must run
the same actions in the same order, although their batches differ and nobody sees the messages of the others. With
``sdp_gather: visit`` the same holds for the data-parallel ranks, since each call of a module gathers its parameters.

- They use one plan. Costs that were counted on batches of different lengths may give different ones; then all take
  their units as equal.
- What a stage may do while it waits depends on what has come by then, so it does nothing. With stages that are visited
  once that costs time, and nothing else: a forward needs forwards of later stages at most, and those need nothing that
  comes later here.
- Where stages are visited several times, a plan must be left when a program goes another way than planned (a new
  shape is enough, or a mask that is not needed), and it cannot be left at one moment in all pipelines. So such steps
  run in discovery order, which is right and slow.

Every function is collective over ``group``, the ranks of one stage in all pipelines.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from modelparallel.comm.collectives.started import exchange_integers
from modelparallel.comm.groups import Group
from modelparallel.errors import StepUsageError

IN_TURN = (
    "Pipeline schedule: stages are visited several times, and with tensor parallelism or sdp_gather: visit such steps "
    "run one microbatch after another. Let each stage be visited once to run them together (tied_weights: replicate, "
    "and no virtual_pipeline_degree), or set sdp_gather: step"
)


def check_microbatches(group: Group, num_microbatches: int, num_samples: Sequence[int], wanted: int) -> None:
    """Raise StepUsageError on all ranks if a rank of the group has fewer microbatches than another."""
    counts = exchange_integers((num_microbatches, sum(num_samples)), group, "smp.step")
    if len({row[0] for row in counts}) > 1:
        samples = ", ".join(f"{row[1]} on tp_rank {rank}" for rank, row in enumerate(counts))
        raise StepUsageError(
            f"smp.step: with microbatches={wanted} and split layers each rank of a tensor-parallel group needs equally "
            f"many microbatches that are not empty, but the ranks gave batches of different length ({samples} "
            f"samples): give every rank at least {wanted} samples, or the same number"
        )


def is_same_on_all(group: Group, text: str) -> bool:
    """Whether all pipelines have the same ``text``."""
    own = zlib.crc32(text.encode())
    return all(row[0] == own for row in exchange_integers((own,), group, "the plan of a step"))
