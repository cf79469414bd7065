"""What the ranks tell each other with every reduction: at which step they are, and whether parameters were frozen.

[Note: ranks a step apart] A rank that catches an exception, or leaves out an update, goes on with the next batch while
the others still wait in this one: their reductions pair, with gradients of different batches and in the end of
different weights. So the number of training steps and that of updates travel with the flags of the reduction, each as
one flag of four (the number modulo 4): more than one set says that ranks are apart, to all of them.

[Note: frozen on one rank] What is frozen decides how buckets are laid out, so ranks that disagree would reduce buckets
of different lengths, which ends the process in gloo. A rank whose parameters were frozen or thawed therefore keeps its
buckets for one more reduction, which tells the others; then all compare and plan together, and reduce once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from modelparallel.comm.collectives.started import exchange_integers
from modelparallel.errors import DivergenceError

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group

_CYCLE = 4
#: (training steps, updates) of this rank.
Progress = tuple[int, int]
NUM_FLAGS = 2 * _CYCLE + 1
_BITS = 60


def flags_of(progress: Progress, *, wants_plan: bool) -> tuple[bool, ...]:
    """This rank's flags; ``wants_plan``: other parameters are trained than those that the buckets hold."""
    counts = [number % _CYCLE == rest for number in progress for rest in range(_CYCLE)]
    return (*counts, wants_plan)


def wants_plan(flags: Sequence[bool]) -> bool:
    """Whether some rank wants a new plan; ``flags``: of all ranks together."""
    return flags[-1]


def check_progress(flags: Sequence[bool], progress: Progress, group: Group) -> None:
    """Raise DivergenceError, on all ranks, if the ranks of the group are not at the same step."""
    for start, number, what in ((0, progress[0], "training steps"), (_CYCLE, progress[1], "updates")):
        others = [rest for rest in range(_CYCLE) if flags[start + rest] and rest != number % _CYCLE]
        if not others:
            continue
        distances = [(rest - number + _CYCLE // 2) % _CYCLE - _CYCLE // 2 for rest in others]
        numbers = ", ".join(str(number + distance) for distance in distances)
        raise _apart(group, f"has made {_counts(progress)}, another rank {numbers} {what}")


def _counts(progress: Progress) -> str:
    return f"{progress[0]} training steps and {progress[1]} updates"


def _apart(group: Group, how: str) -> DivergenceError:
    return DivergenceError(
        f"the data-parallel ranks {list(group.ranks)} are not at the same step: global rank "
        f"{group.ranks[group.rank_in_group]} {how}. An exception that is caught on one rank, or a batch or an update "
        "that one rank leaves out, must be one of all ranks: let them agree (smp.allgather(flag, smp.DP_GROUP)), and "
        "all take the next batch, or let the exception end the job"
    )


def check_trained(names: Sequence[str], trained: Sequence[bool], group: Group) -> None:
    """Raise DivergenceError, which names a parameter, if the ranks train different ones. Collective over the group."""
    bits = [
        sum(flag << place for place, flag in enumerate(trained[start : start + _BITS]))
        for start in range(0, len(trained), _BITS)
    ]
    rows = exchange_integers(bits, group, f"which of {len(names)} parameters are trained")
    for index, name in enumerate(names):
        of_ranks = [bool(row[index // _BITS] >> (index % _BITS) & 1) for row in rows]
        if len(set(of_ranks)) > 1:
            raise frozen_apart(
                name, [rank for rank, flag in zip(group.ranks, of_ranks, strict=True) if not flag], group
            )


def frozen_apart(name: str, frozen: Sequence[int], group: Group) -> DivergenceError:
    """The error for a parameter that only some ranks train; ``frozen``: the global ranks that do not, if known."""
    where = f"on global ranks {list(frozen)}" if frozen else "on some ranks"
    return DivergenceError(
        f"parameter '{name}' has requires_grad=False {where} and True on others of {list(group.ranks)}: freeze and "
        "unfreeze parameters on all data-parallel ranks alike"
    )
