"""When no split keeps the memory limit: by how much, and what would help, each remedy tried before it is named."""

from __future__ import annotations

from dataclasses import dataclass, replace

from modelparallel.errors import PartitionError
from modelparallel.partitioning.costs import Trace, microbatches_in_flight
from modelparallel.partitioning.items import Item, arrangements
from modelparallel.partitioning.split import Bounds, Costs, leanest_split, stage_memory
from modelparallel.plan.partition import readable_bytes

_MOST_STAGES = 4  # times as many stages as asked are tried


@dataclass(frozen=True)
class LimitedSearch:
    """A search for a split within ``memory_limit`` bytes a stage."""

    trace: Trace
    num_stages: int
    num_microbatches: int
    active_microbatches: int
    schedule: str
    virtual_degree: int
    memory_limit: int

    def leanest(self, activation_factor: float = 1.0) -> tuple[float, Bounds, list[Item], Costs] | None:
        """The bytes of the fullest stage of the split where that is least, and the split; None: too few items.

        Args:
            activation_factor: the activations of a microbatch, compared to those of the trace.
        """
        in_flight = microbatches_in_flight(
            self.num_stages, self.num_microbatches, self.active_microbatches, self.schedule, self.virtual_degree
        )
        best: tuple[float, Bounds, list[Item], Costs] | None = None
        for items in arrangements(self.trace):
            for item in items:
                item.activation_bytes *= activation_factor
            costs = Costs(items, self.num_stages, 1.0, in_flight)
            bounds = leanest_split(costs)
            if bounds is not None and (best is None or max(stage_memory(costs, bounds)) < best[0]):
                best = max(stage_memory(costs, bounds)), bounds, items, costs
        return best

    def fits(self, activation_factor: float = 1.0) -> bool:
        """Whether there is a split within the limit."""
        leanest = self.leanest(activation_factor)
        return leanest is not None and leanest[0] <= self.memory_limit


def over_the_limit(search: LimitedSearch) -> PartitionError:
    """The error for a search that has found nothing."""
    leanest = search.leanest()
    if leanest is None:
        raise AssertionError("the number of items is checked before the limit")
    needed, bounds, items, costs = leanest
    lines = []
    for stage, memory in enumerate(stage_memory(costs, bounds)):
        pieces = range(stage, costs.num_pieces, costs.num_stages)
        state = sum(item.state_bytes for piece in pieces for item in items[slice(*bounds[piece])])
        excess = int(memory - search.memory_limit)
        verdict = f"{readable_bytes(excess)} ({excess:,} bytes) over the limit" if excess > 0 else "within the limit"
        lines.append(
            f"  stage {stage}: {readable_bytes(memory)}, of which {readable_bytes(state)} parameters, gradients and "
            f"optimizer state, {readable_bytes(memory - state)} activations in flight: {verdict}"
        )
    return PartitionError(
        f"memory_limit={search.memory_limit}: no split over {search.num_stages} stages keeps every stage within "
        f"{readable_bytes(search.memory_limit)}. The leanest split needs {int(needed):,} bytes on its fullest stage:\n"
        + "\n".join(lines)
        + "\nWhat would help: "
        + "; ".join([f"memory_limit >= {int(needed)}", *_remedies(search, items)])
    )


def _remedies(search: LimitedSearch, items: list[Item]) -> list[str]:
    """What was tried and found to be enough, and what else there is."""
    remedies = []
    largest = max(items, key=lambda item: item.state_bytes)
    if largest.state_bytes > search.memory_limit:
        remedies.append(
            f"{largest.name} needs {readable_bytes(largest.state_bytes)} by itself, whatever the split: make it "
            "smaller or write it as several submodules, use tensor parallelism, or freeze it"
        )
    most = min(len(items) // search.virtual_degree, _MOST_STAGES * search.num_stages)
    for num_stages in range(search.num_stages + 1, most + 1):
        if replace(search, num_stages=num_stages).fits():
            remedies.append(f"pipeline_parallel_degree={num_stages}")
            break
    if search.virtual_degree > 1 and replace(search, virtual_degree=1).fits():
        remedies.append("virtual_pipeline_degree=1")
    if not any(item.activation_bytes for item in items):
        return remedies
    if search.schedule == "simple" and replace(search, schedule="interleaved").fits():
        remedies.append('pipeline="interleaved"')
    for active in range(min(search.active_microbatches, search.num_microbatches) - 1, 0, -1):
        if replace(search, active_microbatches=active).fits():
            remedies.append(f"active_microbatches={active}")
            break
    for factor in (2, 4, 8, 16):
        if replace(search, num_microbatches=search.num_microbatches * factor).fits(1 / factor):
            remedies.append(f"smaller microbatches: microbatches={search.num_microbatches * factor}")
            break
    if search.fits(0.0):
        remedies.append("activation checkpointing, which keeps fewer activations")
    return remedies
