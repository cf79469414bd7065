"""The process groups of this process: one torch process group per set of ranks that communicates.

Made once, by `smp.init`, from the topology. Parts of the library receive a `Group` (or `Groups`) as an argument.
"""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch.distributed as dist

from modelparallel.comm.authentication import MadeGroups, gather_json
from modelparallel.errors import DivergenceError
from modelparallel.topology import GroupKind, Topology


@dataclass(frozen=True)
class Group:
    """The caller's own instance of a kind of group.

    `ranks` are the global ranks of its members, ascending; `rank_in_group` is the caller's position among them.
    `process_group` carries CPU tensors (gloo), and CUDA tensors (NCCL) where the job runs on GPUs; a group of one has a
    real process group, too. No wait in the group is longer than `timeout_seconds`. `layer` is the layer that works on
    it, for errors: each has its own copy (`of_layer`).
    """

    kind: GroupKind
    ranks: tuple[int, ...]
    rank_in_group: int
    process_group: dist.ProcessGroup
    timeout_seconds: float = field(default=600.0, compare=False)
    layer: str = field(default="", compare=False)
    _copies: dict[str, "Group"] = field(default_factory=dict, compare=False, repr=False)

    @property
    def size(self) -> int:
        """The number of members."""
        return len(self.ranks)

    def of_layer(self, layer: str) -> "Group":
        """The same group, for a layer of this full name."""
        found = self._copies.get(layer)
        if found is None:
            found = self._copies[layer] = replace(self, layer=layer, _copies={})
        return found


@dataclass(frozen=True)
class Groups:
    """The caller's instance of every kind of group.

    `pipeline_process_group` and `message_process_group` span the world, are gloo, and each belong to one part: the
    messages between the stages, and the object messages of scripts. So neither can take what was sent to the other.
    """

    world: Group
    tp: Group
    pp: Group
    rdp: Group
    dp: Group
    mp: Group
    pipeline_process_group: dist.ProcessGroup
    message_process_group: dist.ProcessGroup

    def of(self, kind: GroupKind) -> Group:
        """The caller's group of this kind."""
        group: Group = getattr(self, kind.value)
        return group


def build_groups(
    topology: Topology,
    global_rank: int,
    *,
    backend: str,
    timeout_seconds: float,
    wait_seconds: float,
    settings: Mapping[str, Any],
    made: MadeGroups,
) -> Groups:
    """Make the process groups of this process; collective over the world.

    Args:
        backend: of the groups that training uses, as `torch.distributed.new_group` takes it.
        timeout_seconds: the longest that an operation of these groups may take at all.
        wait_seconds: the longest that training waits in them.
        settings: the configuration; it must be equal on all ranks, or they would wait for each other in groups that
            are not the same. Compared before anything depends on it.
        made: process groups that exist already, by purpose and ranks; new ones are added. Groups of equal ranks (tp=1
            makes the PP and MP groups equal, and all groups of one) share one process group, since every rank runs the
            same operations in the same order.

    Plain process groups and not a `DeviceMesh`: a mesh has the axes pp, tp and rdp only, and gives the DP and MP groups
    as flattened meshes with names of their own; the six kinds are simpler to make, and to read, in one loop.
    """
    world_ranks = tuple(range(topology.world_size))

    def process_group(purpose: str, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        # Only the members of a group make it. That cannot deadlock: all ranks go through the kinds in one order, and
        # the groups of a kind are equal to those of an earlier kind on all ranks or on none.
        return _made_group(purpose, ranks, made, timeout_seconds, backend if purpose == "training" else "gloo")

    message_process_group = process_group("messages", world_ranks)
    _check_agreement(settings, global_rank, message_process_group)
    groups = {}
    for kind in GroupKind:
        ranks = topology.group_ranks(kind, global_rank)
        groups[kind.value] = Group(
            kind, ranks, ranks.index(global_rank), process_group("training", ranks), wait_seconds
        )
    return Groups(
        **groups,
        pipeline_process_group=process_group("pipeline", world_ranks),
        message_process_group=message_process_group,
    )


def divide_group(
    group: Group,
    num_ranks: int,
    made: MadeGroups,
    timeout_seconds: float,
) -> tuple[Group, Group]:
    """(the caller's run of ``num_ranks`` consecutive ranks of ``group``, the ranks with its place in the other runs).

    Collective over ``group``; ``num_ranks`` divides its size. New process groups even where the ranks are those of a
    group that exists, so that their operations need no common order with others. ``made`` as in :func:`build_groups`.
    """
    place, start = group.rank_in_group % num_ranks, group.rank_in_group - group.rank_in_group % num_ranks
    # All ranks make the run first, and wait for nobody outside of it.
    result = []
    for purpose, ranks in (
        ("shards", group.ranks[start : start + num_ranks]),
        ("copies of shards", group.ranks[place::num_ranks]),
    ):
        made_group = _made_group(purpose, ranks, made, timeout_seconds, dist.get_backend_config(group.process_group))
        own = ranks.index(group.ranks[group.rank_in_group])
        result.append(Group(group.kind, ranks, own, made_group, group.timeout_seconds))
    return result[0], result[1]


def gloo_group(
    group: Group,
    purpose: str,
    made: MadeGroups,
    timeout_seconds: float,
) -> dist.ProcessGroup:
    """A gloo process group of the ranks of ``group`` for one purpose alone, so that its operations need no common order
    with others (they may run in a thread of their own). Collective over ``group`` when it is first asked for. ``made``
    as in :func:`build_groups`.

    ``timeout_seconds`` is the longest wait of its making, in which nothing tells the ranks of one that has died, and of
    its operations, in which the connection does.
    """
    return _made_group(purpose, group.ranks, made, timeout_seconds, "gloo")


def _made_group(
    purpose: str,
    ranks: tuple[int, ...],
    made: MadeGroups,
    timeout_seconds: float,
    backend: str,
) -> dist.ProcessGroup:
    """The process group of this purpose and these ranks. Collective over them when it is first asked for."""
    if (purpose, ranks) not in made:
        process_group = dist.new_group(
            list(ranks),
            timeout=datetime.timedelta(seconds=timeout_seconds),
            backend=backend,
            use_local_synchronization=True,
            group_desc=f"modelparallel {purpose}",
        )
        made.add(purpose, ranks, process_group, timeout_seconds)
    return made[purpose, ranks]


def _check_agreement(settings: Mapping[str, Any], global_rank: int, process_group: dist.ProcessGroup) -> None:
    """Compare the configuration of all ranks; all of them raise `DivergenceError` if one differs."""
    gathered = gather_json(dict(settings), process_group, default=repr)
    for other_rank, other in enumerate(gathered):
        differing = [key for key in other if other[key] != gathered[0][key]]
        if differing:
            shown = "; ".join(
                f"{key}: {gathered[0][key]!r} on rank 0, {other[key]!r} on rank {other_rank}" for key in differing
            )
            raise DivergenceError(
                f"the processes were configured differently ({shown}): give smp.init the same parameters on all of them"
            )
