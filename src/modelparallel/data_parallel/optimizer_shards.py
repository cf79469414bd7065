"""Sharding of the optimizer state: each rank updates a part of what its group holds alike (smp-api section 7).

[Note: what is shared out] Whole parameters cannot balance a model with a big embedding, so flat ranges of elements are
shared out: of each bucket every rank gets one block (shard_buckets.py). Optimizers that look at a parameter as a whole
(LAMB, Adafactor, Muon) get whole ones: then blocks end where parameters end, and the ranks' sums are balanced greedily.

Parameters that are frozen at the start stay whole: nothing is updated, and should they thaw, every rank updates them
alike. So do parameters whose memory is not theirs alone or not contiguous, and empty ones. What is frozen later stays
shared out, and gets no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn

from modelparallel.data_parallel.buckets import ReducedParameter, Slot, fill_buckets
from modelparallel.data_parallel.shard_buckets import ShardBucket, equal_bounds, whole_bounds
from modelparallel.errors import StepUsageError
from modelparallel.parameters.shards import Shard


@dataclass(frozen=True)
class SharedParameter(ReducedParameter):
    """A parameter to share out over its group. ``is_counted``: see `Shard`."""

    is_counted: bool = field(default=True, kw_only=True)


def shareable(parameters: Iterable[nn.Parameter]) -> set[int]:
    """The parameters, by id, that can be shared out."""
    trained = [parameter for parameter in parameters if parameter.requires_grad and parameter.numel()]
    ranges = []
    for parameter in trained:
        if parameter.is_contiguous():
            start = parameter.data_ptr()
            ranges.append((start, start + parameter.numel() * parameter.element_size(), id(parameter)))
    ranges.sort()
    result = {identity for _, _, identity in ranges}
    furthest: tuple[int, int] | None = None  # (end, id) of what reaches furthest up to here
    for start, stop, identity in ranges:
        if furthest is not None and start < furthest[0]:
            result -= {identity, furthest[1]}
        if furthest is None or stop > furthest[0]:
            furthest = stop, identity
    return result


class OptimizerShards:
    """The shards of one model's parameters: a `ParameterShards`.

    parameters: what is shared out, in the same order on all ranks of a group; each group has at least two ranks.
    divisor, bucket_cap_mb, timeout_seconds: as for the reducer, which is given this object and reduces the gradients.
    Local; all ranks must make it alike. The parameters' data moves.
    """

    def __init__(
        self,
        parameters: Sequence[SharedParameter],
        *,
        divisor: int,
        bucket_cap_mb: float = 25,
        timeout_seconds: float = 600.0,
        needs_whole_parameters: bool = False,
    ) -> None:
        self.timeout_seconds = timeout_seconds
        self._bucket_cap_mb = bucket_cap_mb
        self._entries = tuple(parameters)
        self._slots = [Slot(entry, divisor if entry.divisor is None else entry.divisor) for entry in self._entries]
        self._has_whole_parameters = needs_whole_parameters
        self._shards: dict[int, list[Shard]] = {}
        self.buckets: tuple[ShardBucket, ...] = ()
        self._lay_out()

    def _lay_out(self) -> None:
        counted = {id(slot) for entry, slot in zip(self._entries, self._slots, strict=True) if entry.is_counted}
        owners = self._owners() if self._has_whole_parameters else {}
        buckets = []
        for members, group in fill_buckets(self._entries, self._slots, self._bucket_cap_mb):
            if self._has_whole_parameters:
                members = sorted(members, key=lambda slot: owners[id(slot)])
                bounds = whole_bounds(members, [owners[id(slot)] for slot in members], group.size)
            else:
                bounds = equal_bounds(members, group.size)
            buckets.append(
                ShardBucket(members, group, bounds, counted, has_whole_parameters=self._has_whole_parameters)
            )
        self.buckets = tuple(buckets)
        self._shards = {id(entry.parameter): [] for entry in self._entries}
        for bucket in self.buckets:
            for shard in bucket.shards:
                self._shards[id(shard.parameter)].append(shard)

    def _owners(self) -> dict[int, int]:
        """The rank_in_group that updates each slot, by id: the largest first, each to the rank that has least."""
        loads: dict[tuple[int, ...], list[int]] = {}
        owners = {}
        pairs = list(zip(self._entries, self._slots, strict=True))
        for entry, slot in sorted(pairs, key=lambda pair: -pair[0].parameter.numel()):
            load = loads.setdefault(entry.group.ranks, [0] * entry.group.size)
            owner = min(range(len(load)), key=load.__getitem__)
            load[owner] += entry.parameter.numel()
            owners[id(slot)] = owner
        return owners

    # ParameterShards

    def has(self, parameter: nn.Parameter) -> bool:
        """Whether the parameter is shared out."""
        return id(parameter) in self._shards

    def shards_of(self, parameter: nn.Parameter) -> Sequence[Shard]:
        """This rank's shards of the parameter: one or none."""
        return self._shards.get(id(parameter), ())

    def require_whole_parameters(self, optimizer_name: str) -> bool:
        """From now on no parameter is cut; see `ParameterShards`. Raises StepUsageError after the first reduction."""
        if self._has_whole_parameters:
            return False
        if any(bucket.is_used for bucket in self.buckets):
            raise StepUsageError(
                f"{optimizer_name} looks at parameters as a whole (its class does not say is_elementwise = True), but "
                "came after the first step, when they were already shared out by elements (shard_optimizer_state): "
                "build and wrap it before the first step"
            )
        self._has_whole_parameters = True
        self._lay_out()
        return True

    def collect_gradients(self) -> None:
        """What scripts have done at ``p.grad`` counts, and parameters whose data was replaced come back."""
        for bucket in self.buckets:
            bucket.take_edits()
            bucket.take_back()

    def forget_gradients(self, *, set_to_none: bool = True) -> None:
        """Forget the gradients of shards and what waits for a reduction, or fill them with zeros."""
        for bucket in self.buckets:
            bucket.forget_gradients(set_to_none=set_to_none)

    def finish_update(self) -> None:
        """All ranks get the new values; collective over the groups. Raises WaitTimeoutError or CommunicationError."""
        updated = [bucket for bucket in self.buckets if any(slot.parameter.requires_grad for slot in bucket.slots)]
        started = [(bucket, bucket.start_gather()) for bucket in updated]
        for bucket, gathering in started:
            gathering.wait(f"the updated parameters of {bucket.title}", self.timeout_seconds)
            bucket.note_changed()
