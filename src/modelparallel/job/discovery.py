"""Who this process is: rank, world size and place on its host, as the launcher says (smp-config section 5.7).

[Note: launchers] A process may see the variables of several launchers: one has started the other (an agent of torchrun
in a step of srun, daemons of mpirun in another), or they are left over. The wrong ones make a job of N processes train
as N jobs of one, or take a GPU of another process, and nobody would notice. So what the launchers say is compared:

- launchers that say the same are one;
- of two, the inner one counts, if the outer one can have started agents that started the processes: it then counts
  fewer processes. torchrun is always the inner one, as nothing else is started by its workers;
- anything else stops the job, by the names of both, until `MODELPARALLEL_LAUNCHER` says whose word counts;
- half of what a launcher sets stops it, too, unless the half agrees with what another launcher says.

Who shares a host is taken from the launcher if it says so. If not, nothing is taken for granted: the processes find out
when they meet (places.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from modelparallel.errors import SMPConfigError
from modelparallel.job.node_lists import expand_nodes

#: Whose variables count, where launchers disagree.
LAUNCHER_VARIABLE = "MODELPARALLEL_LAUNCHER"


@dataclass(frozen=True)
class ProcessIdentity:
    """What the launcher says about this process.

    Attributes:
        local_rank, local_world_size: among the processes of this host; -1 and 0 where the launcher does not say.
        slurm_step: the step of srun whose tasks the processes are, if they are.
    """

    global_rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    source: str
    slurm_step: str = ""

    def __post_init__(self) -> None:
        pairs = [("rank", self.global_rank, "world size", self.world_size)]
        if self.is_host_known:
            pairs.append(("local rank", self.local_rank, "local world size", self.local_world_size))
        for rank_name, rank, size_name, size in pairs:
            if not 0 <= rank < size:
                raise SMPConfigError(
                    f"{rank_name} {rank} is outside 0..{size - 1} ({size_name} {size}, from the variables of "
                    f"{self.source}): check how the processes were started"
                )

    @property
    def is_host_known(self) -> bool:
        """Whether the launcher has said which processes share this host."""
        return self.local_world_size != 0

    @property
    def is_one_host(self) -> bool:
        """Whether all processes are known to share this host."""
        return self.local_world_size == self.world_size


@dataclass(frozen=True)
class _Launcher:
    """Where a launcher tells rank, world size, local rank and local world size: of each, the first variable that is
    set. `kind` is its name in `MODELPARALLEL_LAUNCHER`; `marks` are the same for all processes of a job, and for no
    other job.
    """

    source: str
    kind: str
    rank: str
    sizes: tuple[str, ...]
    local_ranks: tuple[str, ...] = ()
    local_sizes: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()

    def variables(self) -> Iterator[str]:
        yield from (self.rank, *self.sizes, *self.local_ranks, *self.local_sizes, *self.marks)


# An inner one stands before those that may have started its agents.
_LAUNCHERS = (
    _Launcher(
        "torchrun",
        "torchrun",
        "RANK",
        ("WORLD_SIZE",),
        ("LOCAL_RANK",),
        ("LOCAL_WORLD_SIZE",),
        ("TORCHELASTIC_RUN_ID",),
    ),
    # Its tasks are not told how many share the host.
    _Launcher("Flux", "flux", "FLUX_TASK_RANK", ("FLUX_JOB_SIZE",), ("FLUX_TASK_LOCAL_ID",), marks=("FLUX_JOB_ID",)),
    _Launcher(
        "Open MPI",
        "mpi",
        "OMPI_COMM_WORLD_RANK",
        ("OMPI_COMM_WORLD_SIZE",),
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
        ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    ),
    _Launcher(
        "MVAPICH",
        "mpi",
        "MV2_COMM_WORLD_RANK",
        ("MV2_COMM_WORLD_SIZE",),
        ("MV2_COMM_WORLD_LOCAL_RANK",),
        ("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
    _Launcher(
        "jsrun",
        "mpi",
        "JSM_NAMESPACE_RANK",
        ("JSM_NAMESPACE_SIZE",),
        ("JSM_NAMESPACE_LOCAL_RANK",),
        ("JSM_NAMESPACE_LOCAL_SIZE",),
    ),
    _Launcher(
        "PALS",
        "mpi",
        "PALS_RANKID",
        ("PALS_SIZE", "PMI_SIZE"),
        ("PALS_LOCAL_RANKID",),
        ("PALS_LOCAL_SIZE",),
        ("PALS_APID",),
    ),
    _Launcher(
        "PMI",  # MPICH, Intel MPI, Cray, and srun --mpi=pmi2
        "mpi",
        "PMI_RANK",
        ("PMI_SIZE",),
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
    ),
)
_KINDS = ("slurm", "mpi", "torchrun", "flux", "none")
_SLURM_VARIABLES = (
    "SLURM_PROCID",
    "SLURM_JOB_ID",
    "SLURM_JOB_ID_HET_GROUP_0",
    "SLURM_STEP_ID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_NTASKS",
    "SLURM_NNODES",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_TASKS_PER_NODE",
    "SLURM_STEP_NODELIST",
    "SLURM_JOB_NODELIST",
)
#: Every variable that the functions of this module read.
LAUNCHER_VARIABLES: tuple[str, ...] = (
    *dict.fromkeys(name for launcher in _LAUNCHERS for name in launcher.variables()),
    *_SLURM_VARIABLES,
    "MASTER_ADDR",
    "PMIX_RANK",
    "JOB_COMPLETION_INDEX",
    "SM_HOSTS",
    LAUNCHER_VARIABLE,
)


def discover_process(environ: Mapping[str, str]) -> ProcessIdentity:
    """Find rank and world size of this process (smp-config section 5.7), as [Note: launchers] has it.

    Raises `SMPConfigError` for a variable that is not a number, a rank outside its world, a variable without the one
    that belongs to it, and launchers that disagree.
    """
    wanted = environ.get(LAUNCHER_VARIABLE, "").strip().lower()
    if wanted not in ("", *_KINDS):
        raise SMPConfigError(
            f"environment variable {LAUNCHER_VARIABLE}: must be one of {', '.join(_KINDS)}, got "
            f"{environ[LAUNCHER_VARIABLE]!r}"
        )
    alone = ProcessIdentity(0, 1, 0, 1, "single process")
    if wanted == "none":
        return alone
    launchers = [launcher for launcher in _LAUNCHERS if wanted in ("", launcher.kind)]
    found = [_told(launcher, environ) for launcher in launchers if _missing(launcher, environ) == ""]
    if wanted in ("", "slurm") and "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ:
        found.append(_slurm_task(environ))
    for launcher in launchers:
        _check_half(launcher, environ, found)
    if found:
        return _agreed(found, environ)
    if wanted:
        raise SMPConfigError(
            f"environment variable {LAUNCHER_VARIABLE}={wanted!r}, but that launcher has not set its variables "
            f"({_expected(wanted)}): start the processes by it, or unset {LAUNCHER_VARIABLE}"
        )
    if "PMIX_RANK" in environ:
        raise SMPConfigError(
            f"PMIX_RANK={environ['PMIX_RANK']!r} says that this is one of several processes, but no variable says of "
            "how many: start them by mpirun, srun or torchrun, set RANK and WORLD_SIZE for each, or set "
            f"{LAUNCHER_VARIABLE}=none for a process of its own"
        )
    return alone


def _missing(launcher: _Launcher, environ: Mapping[str, str]) -> str:
    """The variable of rank or size that is not set; empty if both are."""
    if launcher.rank not in environ:
        return launcher.rank
    return "" if any(name in environ for name in launcher.sizes) else launcher.sizes[0]


def _told(launcher: _Launcher, environ: Mapping[str, str]) -> ProcessIdentity:
    def first(names: tuple[str, ...], otherwise: int) -> int:
        return next((_number(environ, name) for name in names if name in environ), otherwise)

    rank, size = _number(environ, launcher.rank), first(launcher.sizes, 0)
    local_rank, local_size = first(launcher.local_ranks, -1), first(launcher.local_sizes, 0)
    if local_rank < 0:
        local_size = 0
    return ProcessIdentity(rank, size, local_rank, local_size, launcher.source)


def _slurm_task(environ: Mapping[str, str]) -> ProcessIdentity:
    """A task of a step. Only what srun has started has a step id, and one process per task: a script run directly in a
    batch job also sees SLURM_PROCID and SLURM_NTASKS, but it is alone.
    """
    size_key = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    world_size = _number(environ, size_key) if size_key in environ else 1
    local_rank = _number(environ, "SLURM_LOCALID") if "SLURM_LOCALID" in environ else -1
    counts, local_size = _tasks_per_node(environ), 0
    if world_size == 1:
        local_rank, local_size = 0, 1
    elif local_rank >= 0 and sum(counts) == world_size:  # else they count something else, such as the allocation
        node = _number(environ, "SLURM_NODEID") if "SLURM_NODEID" in environ else len(counts) - 1
        is_known = 0 <= node < len(counts) and ("SLURM_NODEID" in environ or len(counts) == 1)
        local_size = counts[node] if is_known else 0
    # Components of a heterogeneous job have ids of their own.
    job = environ.get("SLURM_JOB_ID_HET_GROUP_0") or environ.get("SLURM_JOB_ID", "")
    step = f"{job}.{environ['SLURM_STEP_ID']}"
    step = step if re.fullmatch(r"\d+\.\d+", step) else ""
    return ProcessIdentity(_number(environ, "SLURM_PROCID"), world_size, local_rank, local_size, "Slurm", step)


def _tasks_per_node(environ: Mapping[str, str]) -> list[int]:
    """Tasks on each node of the step, from a text like `2(x3),1`: three nodes with two tasks, then one with one."""
    name = "SLURM_STEP_TASKS_PER_NODE" if environ.get("SLURM_STEP_TASKS_PER_NODE") else "SLURM_TASKS_PER_NODE"
    counts: list[int] = []
    for part in filter(None, environ.get(name, "").split(",")):
        match = re.fullmatch(r"\s*(\d+)(?:\(x(\d+)\))?\s*", part)
        if match is None:
            raise SMPConfigError(f"environment variable {name}: cannot read {environ[name]!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _check_half(launcher: _Launcher, environ: Mapping[str, str], found: list[ProcessIdentity]) -> None:
    """Refuse a rank without a size, or the reverse, unless it is what another launcher says, too."""
    missing = _missing(launcher, environ)
    has_rank = launcher.rank in environ
    there = launcher.rank if has_rank else launcher.sizes[0]  # the others are of other launchers
    if not missing or there not in environ:
        return
    value = _number(environ, there)
    if any(value == (other.global_rank if has_rank else other.world_size) for other in found):
        return
    others = "".join(f"; {_said(other)}" for other in found)
    raise SMPConfigError(
        f"environment variable {there}={value} is set, but {missing} is not{others}: set both on every process "
        f"(torchrun, mpirun and srun do), or unset {there}; with {LAUNCHER_VARIABLE}=none each is a job of its own"
    )


def _agreed(found: list[ProcessIdentity], environ: Mapping[str, str]) -> ProcessIdentity:
    """The one whose word counts; the inner ones come first."""
    chosen = found[0]
    # Workers of an agent know that they are: it may be one of several, and have other ideas of how many there are.
    is_worker = chosen.source == "torchrun" and "TORCHELASTIC_RUN_ID" in environ
    for other in found[1:]:
        if (other.global_rank, other.world_size) == (chosen.global_rank, chosen.world_size):
            if chosen.source == "PMI" and other.source == "Slurm":  # srun --mpi=pmi2: Slurm knows more
                chosen = other
            elif not chosen.is_host_known:
                chosen = replace(chosen, local_rank=other.local_rank, local_world_size=other.local_world_size)
            if not is_worker:
                chosen = replace(chosen, slurm_step=other.slurm_step)
        elif not is_worker and not _may_count_agents(other, chosen, environ):
            raise SMPConfigError(
                f"two launchers disagree: {_said(chosen)}; {_said(other)}. The variables of one of them are left over "
                f"from something else: unset them, or set {LAUNCHER_VARIABLE} to the one that has started the "
                f"processes ({_kind(chosen.source)} or {_kind(other.source)}; none: this process is a job of its own)"
            )
    return chosen


def _may_count_agents(outer: ProcessIdentity, inner: ProcessIdentity, environ: Mapping[str, str]) -> bool:
    if outer.source == "Slurm" and inner.source != "torchrun" and any(n > 1 for n in _tasks_per_node(environ)):
        return False  # daemons of mpirun are one a node
    return outer.world_size < inner.world_size


def _said(identity: ProcessIdentity) -> str:
    return f"{identity.source} says rank {identity.global_rank} of {identity.world_size}"


def _kind(source: str) -> str:
    return next((launcher.kind for launcher in _LAUNCHERS if launcher.source == source), "slurm")


def _expected(kind: str) -> str:
    if kind == "slurm":
        return "SLURM_PROCID and SLURM_STEP_ID"
    pairs = [f"{launcher.rank} and {launcher.sizes[0]}" for launcher in _LAUNCHERS if launcher.kind == kind]
    return ", or ".join(pairs)


def _number(environ: Mapping[str, str], key: str) -> int:
    try:
        return int(environ[key])
    except ValueError as error:
        raise SMPConfigError(
            f"environment variable {key}: expected int, got {environ[key]!r}: it is set by the launcher; unset it to "
            "run a single process"
        ) from error


def job_marks(identity: ProcessIdentity, environ: Mapping[str, str]) -> dict[str, str]:
    """What tells this job from others, as its launcher says, equal on all of its processes."""
    marks = {"launcher": identity.source, "world size": str(identity.world_size)}
    for launcher in _LAUNCHERS:
        if launcher.source == identity.source:
            marks |= {name: environ[name] for name in launcher.marks if environ.get(name, "none") != "none"}
    if identity.slurm_step:
        marks["Slurm's job and step"] = identity.slurm_step
    return marks


def has_own_marks(marks: Mapping[str, str]) -> bool:
    """Whether no other job has the same marks."""
    return len(marks) > 2


def lonely_hint(identity: ProcessIdentity, environ: Mapping[str, str]) -> str:
    """What somebody should know who has started one process where several were meant; empty if nothing says so."""
    if identity.world_size > 1:
        return ""
    if identity.source == "torchrun":  # its workers may have started another launcher, and it their processes
        outer = [_told(launcher, environ) for launcher in _LAUNCHERS[1:] if _missing(launcher, environ) == ""]
        said = next((_said(other) for other in outer if other.world_size > 1), "")
        return f"this is a job of one process (torchrun), while {said}: each trains alone" if said else ""
    hosts = re.findall(r'"([^"]+)"', environ.get("SM_HOSTS", ""))
    if len(hosts) > 1:
        return f"this is a job of one process, on one of {len(hosts)} hosts ({', '.join(hosts)}): each trains alone"
    tasks, nodes = environ.get("SLURM_NTASKS", "1"), environ.get("SLURM_NNODES", "1")
    if tasks.isdigit() and nodes.isdigit() and max(int(tasks), int(nodes)) > 1:
        many = f"{tasks} tasks" if int(tasks) > 1 else f"{nodes} nodes"
        return f"this is one process of an allocation with {many}: start it by srun to use all of them"
    if environ.get("JOB_COMPLETION_INDEX", "0").strip("0"):
        return (
            f"this is a job of one process, in pod {environ['JOB_COMPLETION_INDEX']} of an Indexed Job: each trains "
            "alone"
        )
    return ""


def master_host(environ: Mapping[str, str]) -> str | None:
    """The host of global rank 0, where the launcher names it; None where it does not (smp-config section 5.6)."""
    if environ.get("MASTER_ADDR"):
        return environ["MASTER_ADDR"]
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    return expand_nodes(nodes)[0] if nodes else None
