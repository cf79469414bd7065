"""Which process is where: rank arithmetic without torch, and what the launcher's variables say about this process.

A placement strategy is an order of the letters D (reduced data parallel, axis rdp), P (pipeline, axis pp) and T (tensor
parallel, axis tp). The right-most letter varies fastest over ascending global ranks:

    global_rank = (idx(s0) * n(s1) + idx(s1)) * n(s2) + idx(s2)

Everything else follows: a group is the set of global ranks that share the coordinates of the other axes, always in
ascending order, and a rank within a group is a position in that order (smp-api section 2).
"""

import enum
import itertools
from dataclasses import dataclass
from functools import cached_property, lru_cache

from modelparallel.errors import GroupMembershipError, SMPConfigError

NAMED_STRATEGIES = {"cluster": "DPT", "spread": "TPD"}


class GroupKind(str, enum.Enum):
    """The six kinds of process groups."""

    WORLD = "world"
    TP = "tp"
    PP = "pp"
    RDP = "rdp"
    DP = "dp"
    MP = "mp"

    def __str__(self) -> str:
        return self.value


# The axes that vary inside a group of each kind; the other coordinates are shared by its members.
_VARYING_AXES: dict[GroupKind, frozenset[str]] = {
    GroupKind.WORLD: frozenset(("pp", "tp", "rdp")),
    GroupKind.TP: frozenset(("tp",)),
    GroupKind.PP: frozenset(("pp",)),
    GroupKind.RDP: frozenset(("rdp",)),
    GroupKind.DP: frozenset(("tp", "rdp")),
    GroupKind.MP: frozenset(("pp", "tp")),
}


class CommGroup(enum.Enum):
    """A group in a communication call, always the caller's own instance of it. Source: smp-api sections 2 and 3."""

    WORLD = "WORLD"
    MP_GROUP = "MP_GROUP"
    DP_GROUP = "DP_GROUP"
    TP_GROUP = "TP_GROUP"
    PP_GROUP = "PP_GROUP"
    RDP_GROUP = "RDP_GROUP"

    @property
    def kind(self) -> GroupKind:
        """The kind of group that this name stands for."""
        return GroupKind(self.value.removesuffix("_GROUP").lower())


class RankType(enum.Enum):
    """How a peer's number is read: within the caller's own group of this kind. Source: smp-api sections 2 and 3."""

    WORLD_RANK = "WORLD_RANK"
    MP_RANK = "MP_RANK"
    DP_RANK = "DP_RANK"
    TP_RANK = "TP_RANK"
    PP_RANK = "PP_RANK"
    RDP_RANK = "RDP_RANK"

    @property
    def kind(self) -> GroupKind:
        """The kind of group within which the number is read."""
        return GroupKind(self.value.removesuffix("_RANK").lower())


def strategy_letters(placement_strategy: str) -> str:
    """The letters of a placement strategy: `"cluster"` is DPT, `"spread"` is TPD, a permutation is itself."""
    letters = NAMED_STRATEGIES.get(placement_strategy, placement_strategy)
    if sorted(letters) != ["D", "P", "T"]:
        raise SMPConfigError(
            f"placement_strategy: {placement_strategy!r} is not a permutation of D,P,T: "
            "use 'cluster' (= DPT), 'spread' (= TPD), or one of DPT, DTP, PDT, PTD, TDP, TPD"
        )
    return letters


@dataclass(frozen=True)
class Coordinates:
    """The position of a process on the three axes."""

    pp_rank: int
    tp_rank: int
    rdp_rank: int


@dataclass(frozen=True)
class Topology:
    """The placement of `world_size` processes on the axes pp, tp and rdp (smp-api section 2).

    Raises `SMPConfigError` if `pp_degree * tp_degree` does not divide `world_size`.
    """

    world_size: int
    pp_degree: int = 1
    tp_degree: int = 1
    placement_strategy: str = "cluster"

    def __post_init__(self) -> None:
        for name in ("world_size", "pp_degree", "tp_degree"):
            if getattr(self, name) < 1:
                raise SMPConfigError(f"{name}: expected int >= 1, got {getattr(self, name)}")
        strategy_letters(self.placement_strategy)
        mp_degree = self.pp_degree * self.tp_degree
        if self.world_size % mp_degree:
            raise SMPConfigError(
                f"world size {self.world_size} is not divisible by pipeline_parallel_degree * tensor_parallel_degree = "
                f"{self.pp_degree} * {self.tp_degree} = {mp_degree}: "
                f"start a multiple of {mp_degree} processes, or choose degrees whose product divides {self.world_size}"
            )

    @property
    def rdp_degree(self) -> int:
        """How many processes hold the same slice of the same stage."""
        return self.world_size // (self.pp_degree * self.tp_degree)

    def group_size(self, kind: GroupKind) -> int:
        """The number of members of every group of this kind."""
        size = 1
        for axis, degree in self._degrees.items():
            if axis in _VARYING_AXES[kind]:
                size *= degree
        return size

    def coordinates(self, global_rank: int) -> Coordinates:
        """The position of a process on the three axes."""
        self._check_rank(global_rank)
        rest, indices = global_rank, {}
        for axis in reversed(self._axes):
            rest, indices[axis] = divmod(rest, self._degrees[axis])
        return Coordinates(pp_rank=indices["pp"], tp_rank=indices["tp"], rdp_rank=indices["rdp"])

    def global_rank(self, coordinates: Coordinates) -> int:
        """The process at a position; the inverse of `coordinates`."""
        rank = 0
        for axis in self._axes:
            rank = rank * self._degrees[axis] + getattr(coordinates, f"{axis}_rank")
        return rank

    def group_ranks(self, kind: GroupKind, global_rank: int) -> tuple[int, ...]:
        """The global ranks, ascending, of the group of this kind that `global_rank` is in."""
        self._check_rank(global_rank)
        return _membership(self, kind)[global_rank]

    def rank_in(self, kind: GroupKind, global_rank: int) -> int:
        """The position of `global_rank` in its group of this kind."""
        return self.group_ranks(kind, global_rank).index(global_rank)

    def all_groups(self, kind: GroupKind) -> tuple[tuple[int, ...], ...]:
        """Every group of this kind, ordered by its smallest member; the same on every process."""
        return tuple(dict.fromkeys(_membership(self, kind)))

    @property
    def _axes(self) -> tuple[str, ...]:
        return tuple({"D": "rdp", "P": "pp", "T": "tp"}[letter] for letter in strategy_letters(self.placement_strategy))

    @cached_property
    def _degrees(self) -> dict[str, int]:
        return {"pp": self.pp_degree, "tp": self.tp_degree, "rdp": self.rdp_degree}

    def _check_rank(self, global_rank: int) -> None:
        if not 0 <= global_rank < self.world_size:
            raise GroupMembershipError(f"global rank {global_rank} is outside the world 0..{self.world_size - 1}")


@lru_cache(maxsize=64)
def _membership(topology: Topology, kind: GroupKind) -> tuple[tuple[int, ...], ...]:
    """For every global rank, the members of its group of this kind."""
    varying = _VARYING_AXES[kind]
    members: dict[tuple[int, ...], list[int]] = {}
    keys = []
    for global_rank in range(topology.world_size):
        position = topology.coordinates(global_rank)
        key = tuple(getattr(position, f"{axis}_rank") for axis in ("pp", "tp", "rdp") if axis not in varying)
        members.setdefault(key, []).append(global_rank)
        keys.append(key)
    groups = {key: tuple(ranks) for key, ranks in members.items()}
    return tuple(groups[key] for key in keys)


def all_strategies() -> tuple[str, ...]:
    """The six permutations of D, P, T."""
    return tuple("".join(letters) for letters in itertools.permutations("DPT"))
