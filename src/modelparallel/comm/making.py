"""Making the process groups of this process; see groups.py.

[Note: making groups] A process that does not come, or cannot be reached, keeps all others from making a group. So
nothing in it waits longer than the meeting at the store may last (`MadeGroups.seconds`), while the operations of a
group may take as long as the configuration says. Those who make a group first meet at the store, where it is known who
is missing; then gloo connects them. It takes its limit for that of one attempt, of which it makes up to five.
"""

import datetime
import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from modelparallel.comm.authentication import MadeGroups, gather_json
from modelparallel.comm.groups import Group, Groups
from modelparallel.comm.waits import Wait, watch
from modelparallel.config.topology import GroupKind, Topology
from modelparallel.errors import DivergenceError
from modelparallel.torch_compat.process_groups import set_timeout

# gloo tries to connect so often; the side that is connected to waits as long as all attempts of the other may last.
_ATTEMPTS = 5
_LEAST_SECONDS = 10.0


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
    made.lookout.listen(message_process_group)
    world = Group(
        GroupKind.WORLD, world_ranks, global_rank, message_process_group, made.seconds, "smp.init", made.lookout
    )
    _check_agreement(settings, world)
    groups = {}
    for kind in GroupKind:
        ranks = topology.group_ranks(kind, global_rank)
        own = process_group("training", ranks)
        groups[kind.value] = Group(kind, ranks, ranks.index(global_rank), own, wait_seconds, lookout=made.lookout)
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
        backend = dist.get_backend_config(group.process_group)
        made_group = _made_group(purpose, ranks, made, timeout_seconds, backend)
        own = ranks.index(group.ranks[group.rank_in_group])
        result.append(replace(group, ranks=ranks, rank_in_group=own, process_group=made_group, _copies={}))
    return result[0], result[1]


def gloo_group(
    group: Group,
    purpose: str,
    made: MadeGroups,
    timeout_seconds: float,
) -> Group:
    """The ranks of ``group`` with a gloo process group for one purpose alone, so that its operations need no common
    order with others (they may run in a thread of their own). Collective over ``group`` when it is first asked for.
    ``made`` as in :func:`build_groups`; ``timeout_seconds``: the longest that one of its operations may take.
    """
    made_group = _made_group(purpose, group.ranks, made, timeout_seconds, "gloo")
    return replace(group, process_group=made_group, layer=purpose, _copies={})


def _made_group(
    purpose: str,
    ranks: tuple[int, ...],
    made: MadeGroups,
    timeout_seconds: float,
    backend: str,
) -> dist.ProcessGroup:
    """The process group of this purpose and these ranks. Collective over them when it is first asked for.

    Raises WaitTimeoutError when one of them does not come.
    """
    if (purpose, ranks) in made:
        return made[purpose, ranks]
    own = ranks.index(dist.get_rank())
    title = f"making the process group of {purpose}"
    unmade: Any = None
    wait = Wait(Group(GroupKind.WORLD, ranks, own, unmade, made.seconds, lookout=made.lookout), title)
    if len(ranks) > 1:
        _come_together(purpose, ranks, made, wait)
    with wait.around():
        process_group: dist.ProcessGroup = dist.new_group(
            list(ranks),
            timeout=datetime.timedelta(seconds=connecting_seconds(made.seconds)),
            backend=backend,
            use_local_synchronization=True,
            group_desc=f"modelparallel {purpose}",
        )
    set_timeout(process_group, timeout_seconds)
    made.add(purpose, ranks, process_group)
    return process_group


def connecting_seconds(seconds: float) -> float:
    """The limit to give to gloo, if connecting is to last so many seconds at most (or 50, if that is more, but not more
    than five times as long: a busy machine needs some time).
    """
    return max(seconds / _ATTEMPTS, min(seconds, _LEAST_SECONDS))


def _come_together(purpose: str, ranks: tuple[int, ...], made: MadeGroups, wait: Wait) -> None:
    """Wait until all members are about to make the group. Raises WaitTimeoutError, which names those who are not."""
    name = f"making {purpose} {hashlib.sha256(repr(ranks).encode()).hexdigest()}"  # there may be thousands
    made.store.set(f"{name}/{dist.get_rank()}", "")
    keys = {rank: f"{name}/{rank}" for rank in ranks}

    def described(line: str, verb: str) -> str:
        missing = [rank for rank, key in keys.items() if not made.store.check([key])]
        return f"{wait.described(line, verb)}, of whom the global ranks {missing} have not come"

    advice = f" within {made.seconds:g} s (timeout_seconds, at most 300 for this): {wait.advice}"
    watch(lambda: made.store.check(list(keys.values())), made.lookout, described, made.seconds, advice)


def _check_agreement(settings: Mapping[str, Any], world: Group) -> None:
    """Compare the configuration of all ranks; all of them raise `DivergenceError` if one differs."""
    gathered = gather_json(dict(settings), world, default=repr)
    for other_rank, other in enumerate(gathered):
        differing = [key for key in other if other[key] != gathered[0][key]]
        if differing:
            shown = "; ".join(
                f"{key}: {gathered[0][key]!r} on rank 0, {other[key]!r} on rank {other_rank}" for key in differing
            )
            raise DivergenceError(
                f"the processes were configured differently ({shown}): give smp.init the same parameters on all of them"
            )
