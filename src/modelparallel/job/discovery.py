"""Who this process is: rank, world size and place on its host, as the launcher says (smp-config section 5.7)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from modelparallel.errors import SMPConfigError


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
