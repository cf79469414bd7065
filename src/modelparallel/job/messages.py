"""The public functions on ranks, groups and messages (smp-api sections 2 and 3).

Thin: each reads the session and calls the part that does the work. Before `smp.init()` every one of them raises
`NotInitializedError`.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.distributed as dist

from modelparallel.comm.groups import Group
from modelparallel.comm.objects import ObjectMessenger
from modelparallel.config.topology import CommGroup, GroupKind, RankType
from modelparallel.errors import GroupTypeError
from modelparallel.job import session


def rank() -> int:
    """The global rank of this process, 0 to `size() - 1`. Local."""
    return _group(GroupKind.WORLD).rank_in_group


def size() -> int:
    """The number of processes of the job. Local."""
    return _group(GroupKind.WORLD).size


def local_rank() -> int:
    """The rank of this process among the processes of its host. Local."""
    return session.current().identity.local_rank


def local_size() -> int:
    """The number of processes on this host. Local."""
    return session.current().identity.local_world_size


def tp_rank() -> int:
    """The position of this process in its TP_GROUP. Local. Source: smp-api section 2."""
    return _group(GroupKind.TP).rank_in_group


def tp_size() -> int:
    """The number of processes in this process's TP_GROUP. Local. Source: smp-api section 2."""
    return _group(GroupKind.TP).size


def get_tp_group() -> list[int]:
    """The global ranks, ascending, of the TP_GROUP: the processes that share the layers of one stage. Local."""
    return list(_group(GroupKind.TP).ranks)


def get_tp_process_group() -> dist.ProcessGroup:
    """The torch process group of this process's TP_GROUP, for `torch.distributed` calls. Local."""
    return _group(GroupKind.TP).process_group


def pp_rank() -> int:
    """The position of this process in its PP_GROUP. Local. Source: smp-api section 2."""
    return _group(GroupKind.PP).rank_in_group


def pp_size() -> int:
    """The number of processes in this process's PP_GROUP. Local. Source: smp-api section 2."""
    return _group(GroupKind.PP).size


def get_pp_group() -> list[int]:
    """The global ranks, ascending, of the PP_GROUP: the stages of one model, same slice. Local."""
    return list(_group(GroupKind.PP).ranks)


def get_pp_process_group() -> dist.ProcessGroup:
    """The torch process group of this process's PP_GROUP, for `torch.distributed` calls. Local."""
    return _group(GroupKind.PP).process_group


def rdp_rank() -> int:
    """The position of this process in its RDP_GROUP. Local. Source: smp-api section 2."""
    return _group(GroupKind.RDP).rank_in_group


def rdp_size() -> int:
    """The number of processes in this process's RDP_GROUP. Local. Source: smp-api section 2."""
    return _group(GroupKind.RDP).size


def get_rdp_group() -> list[int]:
    """The global ranks, ascending, of the RDP_GROUP: the holders of the same slice of the same stage. Local."""
    return list(_group(GroupKind.RDP).ranks)


def get_rdp_process_group() -> dist.ProcessGroup:
    """The torch process group of this process's RDP_GROUP, for `torch.distributed` calls. Local."""
    return _group(GroupKind.RDP).process_group


def dp_rank() -> int:
    """The position of this process in its DP_GROUP. Local. Source: smp-api section 2."""
    return _group(GroupKind.DP).rank_in_group


def dp_size() -> int:
    """The number of processes in this process's DP_GROUP. Local. Source: smp-api section 2."""
    return _group(GroupKind.DP).size


def get_dp_group() -> list[int]:
    """The global ranks, ascending, of the DP_GROUP: all processes of the same stage. Local."""
    return list(_group(GroupKind.DP).ranks)


def get_dp_process_group() -> dist.ProcessGroup:
    """The torch process group of this process's DP_GROUP, for `torch.distributed` calls. Local."""
    return _group(GroupKind.DP).process_group


def mp_rank() -> int:
    """The position of this process in its MP_GROUP. Local. Source: smp-api section 2."""
    return _group(GroupKind.MP).rank_in_group


def mp_size() -> int:
    """The number of processes in this process's MP_GROUP. Local. Source: smp-api section 2."""
    return _group(GroupKind.MP).size


def get_mp_group() -> list[int]:
    """The global ranks, ascending, of the MP_GROUP: the processes that hold one whole model. Local."""
    return list(_group(GroupKind.MP).ranks)


def get_mp_process_group() -> dist.ProcessGroup:
    """The torch process group of this process's MP_GROUP, for `torch.distributed` calls. Local."""
    return _group(GroupKind.MP).process_group


def get_world_process_group() -> dist.ProcessGroup:
    """The torch process group of all processes, for `torch.distributed` calls. Local."""
    return _group(GroupKind.WORLD).process_group


def send(obj: Any, dest_rank: int, rank_type: RankType) -> None:
    """Send a picklable object to one process, which calls `recv_from`; returns once it has been received.

    Messages from one process to another arrive in the order in which they were sent. Collective over the two processes.

    Args:
        obj: any picklable object. Tensors inside arrive on the CPU if they are on the CPU, else on the receiver's own
            device; without autograd history.
        dest_rank: the receiver, counted within the caller's own group of `rank_type`.
        rank_type: a `smp.RankType`.

    Raises:
        GroupMembershipError: a rank outside the group, or the own rank; also a ValueError.
        GroupTypeError: an unknown rank type; also a TypeError.
        WaitTimeoutError: no answer within `message_timeout_seconds`.
        CommunicationError: the other process has ended, or cannot be reached.

    Source: smp-api section 3.
    """
    _messenger().send(obj, dest_rank, _group(_kind(rank_type, RankType, "rank_type")))


def recv_from(src_rank: int, rank_type: RankType) -> Any:
    """Receive the next object from one process, which calls `send` or `broadcast`. Collective over the two processes.

    Raises what `send` raises.

    Args:
        src_rank: the sender, counted within the caller's own group of `rank_type`.
        rank_type: a `smp.RankType`.

    Source: smp-api section 3.
    """
    return _messenger().receive(src_rank, _group(_kind(rank_type, RankType, "rank_type")))


def broadcast(obj: Any, group: CommGroup) -> None:
    """Send a picklable object to all other members of the caller's own `group`; returns once all have received it.

    Only the sender calls it; every other member calls `recv_from` with the sender's rank and the matching `RankType`.
    Collective over `group` in this sense. Raises what `send` raises. Source: smp-api section 3.
    """
    _messenger().broadcast(obj, _group(_kind(group, CommGroup, "group")))


def allgather(obj: Any, group: CommGroup) -> list[Any]:
    """The objects of all members of the caller's own `group`, in the order of their ranks in it. Collective over
    `group`.

    The objects may differ in type and shape. Raises what `send` raises. Source: smp-api section 3.
    """
    return told_by_all(obj, group, "smp.allgather")


def told_by_all(obj: Any, group: CommGroup, purpose: str) -> list[Any]:
    """`allgather` for a purpose of the library, which a wait that fails names."""
    members = _group(_kind(group, CommGroup, "group"))
    with known_to_peers(purpose, members):
        return _messenger().allgather(obj, members, purpose)


def barrier(group: CommGroup = CommGroup.WORLD) -> None:
    """Wait until all members of the caller's own `group` have called. Collective over `group`.

    Other processes are not waited for. Raises what `send` raises. Source: smp-api section 3.
    """
    members = _group(_kind(group, CommGroup, "group"))
    with known_to_peers("smp.barrier", members):
        _messenger().barrier(members)


def dp_barrier() -> None:
    """`barrier(smp.DP_GROUP)`. Collective over DP_GROUP. Source: smp-api section 3."""
    barrier(CommGroup.DP_GROUP)


def mp_barrier() -> None:
    """`barrier(smp.MP_GROUP)`. Collective over MP_GROUP. Source: smp-api section 3."""
    barrier(CommGroup.MP_GROUP)


def known_to_peers(call: str, members: Group) -> AbstractContextManager[None]:
    """Let the other stages of the pipeline know what this rank waits in: they may wait for it inside a step."""
    ambient = session.current()
    if ambient.runtime is None or not ambient.runtime.is_pipelined:
        return nullcontext()
    stages = [
        stage
        for stage, global_rank in enumerate(ambient.groups.pp.ranks)
        if global_rank in members.ranks and global_rank != ambient.identity.global_rank
    ]
    return ambient.runtime.in_group_call(
        f"{call} of {members.kind.value} group {list(members.ranks)}", f"{members.ranks}", stages
    )


def _group(kind: GroupKind) -> Group:
    return session.current().groups.of(kind)


def _kind(value: Any, expected: type[CommGroup] | type[RankType], argument: str) -> GroupKind:
    if not isinstance(value, expected):
        names = ", ".join(f"smp.{expected.__name__}.{member.name}" for member in expected)
        raise GroupTypeError(f"{argument}: expected one of {names}, got {type(value).__name__} {value!r}")
    return value.kind


def _messenger() -> ObjectMessenger:
    ambient = session.current()
    return ObjectMessenger(
        ambient.groups.message_process_group,
        ambient.identity.global_rank,
        ambient.device,
        ambient.config.message_timeout_seconds,
    )
