"""Which process is where: rank arithmetic without torch, and what the launcher's variables say about this process.

A placement strategy is an order of the letters D (reduced data parallel, axis rdp), P (pipeline, axis pp) and T (tensor
parallel, axis tp). The right-most letter varies fastest over ascending global ranks:

    global_rank = (idx(s0) * n(s1) + idx(s1)) * n(s2) + idx(s2)

Everything else follows: a group is the set of global ranks that share the coordinates of the other axes, always in
ascending order, and a rank within a group is a position in that order (smp-api section 2).
"""

import enum
import itertools
import re
from collections.abc import Mapping
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


@dataclass(frozen=True)
class ProcessIdentity:
    """What the launcher says about this process. `local_*` count the processes of this host; `is_host_known`: that was
    said, and not taken for granted.
    """

    global_rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    source: str
    is_host_known: bool = False

    def __post_init__(self) -> None:
        for rank_name, rank, size_name, size in (
            ("rank", self.global_rank, "world size", self.world_size),
            ("local rank", self.local_rank, "local world size", self.local_world_size),
        ):
            if not 0 <= rank < size:
                raise SMPConfigError(
                    f"{rank_name} {rank} is outside 0..{size - 1} ({size_name} {size}, from the variables of "
                    f"{self.source}): check how the processes were started"
                )


# Where each launcher tells rank, world size, local rank and local world size. Tried in this order: torchrun first, as
# its agent may itself have been started by mpirun or srun, and then the outer variables count agents, not workers.
_LAUNCHERS: tuple[tuple[str, tuple[str, str], tuple[str, str]], ...] = (
    ("torchrun", ("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")),
    (
        "Open MPI",
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ),
    ("PMI", ("PMI_RANK", "PMI_SIZE"), ("MPI_LOCALRANKID", "MPI_LOCALNRANKS")),
)
#: Every variable that `discover_process` and `master_host` read.
LAUNCHER_VARIABLES: tuple[str, ...] = (
    *(name for _, world, local in _LAUNCHERS for name in (*world, *local)),
    "MASTER_ADDR",
    "SLURM_PROCID",
    "SLURM_STEP_ID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_NTASKS",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_TASKS_PER_NODE",
    "SLURM_STEP_NODELIST",
    "SLURM_JOB_NODELIST",
)


def discover_process(environ: Mapping[str, str]) -> ProcessIdentity:
    """Find rank and world size of this process (smp-config section 5.7).

    Read in this order: torchrun's variables, Open MPI's, PMI's (MPICH, Intel MPI), Slurm's; otherwise the process is
    alone. Raises `SMPConfigError` for a variable that is not a number or a rank outside its world.
    """
    for source, (rank_key, size_key), (local_rank_key, local_size_key) in _LAUNCHERS:
        if rank_key not in environ or size_key not in environ:
            continue
        global_rank, world_size = _number(environ, rank_key), _number(environ, size_key)
        # Without local variables the processes are taken to be on one host.
        local_size = _number(environ, local_size_key) if local_size_key in environ else world_size
        local_rank = _number(environ, local_rank_key) if local_rank_key in environ else global_rank % max(local_size, 1)
        return ProcessIdentity(global_rank, world_size, local_rank, local_size, source, local_size_key in environ)
    # Only a step started by srun has a step id and one process per task. A script run directly in a batch job also sees
    # SLURM_PROCID and SLURM_NTASKS, but it is alone.
    if "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ:
        size_key = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
        world_size = _number(environ, size_key) if size_key in environ else 1
        local_rank = _number(environ, "SLURM_LOCALID") if "SLURM_LOCALID" in environ else 0
        local_size = _slurm_local_size(environ, world_size)
        is_known = "SLURM_STEP_TASKS_PER_NODE" in environ or "SLURM_TASKS_PER_NODE" in environ
        global_rank = _number(environ, "SLURM_PROCID")
        return ProcessIdentity(global_rank, world_size, local_rank, local_size, "Slurm", is_known)
    return ProcessIdentity(0, 1, 0, 1, "single process")


def _number(environ: Mapping[str, str], key: str) -> int:
    try:
        return int(environ[key])
    except ValueError as error:
        raise SMPConfigError(
            f"environment variable {key}: expected int, got {environ[key]!r}: it is set by the launcher; unset it to "
            "run a single process"
        ) from error


def _slurm_local_size(environ: Mapping[str, str], world_size: int) -> int:
    """Tasks on this node, from a text like `2(x3),1`: three nodes with two tasks, then one with one."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
    if not text:
        return world_size
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\(x(\d+)\))?\s*", part)
        if match is None:
            raise SMPConfigError(f"environment variable SLURM_TASKS_PER_NODE: cannot read {text!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    node = _number(environ, "SLURM_NODEID") if "SLURM_NODEID" in environ else 0
    return counts[node] if node < len(counts) else counts[-1]


def master_host(environ: Mapping[str, str]) -> str | None:
    """The host of global rank 0, where the launcher names it; None where it does not (smp-config section 5.6)."""
    if environ.get("MASTER_ADDR"):
        return environ["MASTER_ADDR"]
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        return None
    # "n[03-05,9],m1" -> "n03"; "host1,host2" -> "host1"
    match = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    return None if match is None else match[1] + (match[2] or "")
