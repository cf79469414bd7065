"""Who a process is, by the variables of launchers. Pure: no process group, no torch."""

import shutil
import subprocess

import pytest

from modelparallel.errors import SMPConfigError
from modelparallel.job import node_lists
from modelparallel.job.discovery import (
    ProcessIdentity,
    discover_process,
    has_own_marks,
    job_marks,
    lonely_hint,
    master_host,
)
from modelparallel.job.node_lists import expand_nodes


def variables(text: str) -> dict[str, str]:
    """`A=1 B=2` -> a dict."""
    return dict(pair.split("=", 1) for pair in text.split())


WORKER = "RANK=5 WORLD_SIZE=8 LOCAL_RANK=1 LOCAL_WORLD_SIZE=4 "
TASK = (
    "SLURM_JOB_ID=7 SLURM_STEP_ID=1 SLURM_PROCID=2 SLURM_STEP_NUM_TASKS=4 SLURM_LOCALID=0 SLURM_NODEID=1 "
    "SLURM_STEP_TASKS_PER_NODE=2(x2) "
)
DAEMON = (
    "SLURM_JOB_ID=7 SLURM_STEP_ID=1 SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=2 SLURM_LOCALID=0 SLURM_NODEID=1 "
    "SLURM_STEP_TASKS_PER_NODE=1(x2) "
)
OPEN_MPI = "OMPI_COMM_WORLD_RANK=6 OMPI_COMM_WORLD_SIZE=8 OMPI_COMM_WORLD_LOCAL_RANK=2 OMPI_COMM_WORLD_LOCAL_SIZE=4 "


# What `local -1 of 0` says: the processes find out when they meet.
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "single process: 0 of 1, local 0 of 1"),
        (WORKER, "torchrun: 5 of 8, local 1 of 4"),
        # By hand, or a PyTorchJob with one process a pod
        ("RANK=3 WORLD_SIZE=4", "torchrun: 3 of 4, local -1 of 0"),
        ("RANK=3 WORLD_SIZE=4 LOCAL_RANK=0", "torchrun: 3 of 4, local 0 of 0"),
        ("RANK=3 WORLD_SIZE=4 LOCAL_WORLD_SIZE=2", "torchrun: 3 of 4, local -1 of 0"),
        (OPEN_MPI, "Open MPI: 6 of 8, local 2 of 4"),
        ("PMI_RANK=1 PMI_SIZE=4 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2", "PMI: 1 of 4, local 1 of 2"),
        ("PMI_RANK=1 PMI_SIZE=4 PMI_LOCAL_RANK=1 PMI_LOCAL_SIZE=2", "PMI: 1 of 4, local 1 of 2"),
        ("PMI_RANK=1 PMI_SIZE=4", "PMI: 1 of 4, local -1 of 0"),
        ("FLUX_TASK_RANK=1 FLUX_JOB_SIZE=4 FLUX_TASK_LOCAL_ID=1", "Flux: 1 of 4, local 1 of 0"),
        (
            "PALS_RANKID=1 PALS_LOCAL_RANKID=1 PALS_LOCAL_SIZE=2 PMI_RANK=1 PMI_SIZE=4",
            "PALS: 1 of 4, local 1 of 2",
        ),
        ("PALS_RANKID=1 PALS_SIZE=2 PALS_LOCAL_RANKID=1 PALS_LOCAL_SIZE=2", "PALS: 1 of 2, local 1 of 2"),
        ("MV2_COMM_WORLD_RANK=1 MV2_COMM_WORLD_SIZE=2", "MVAPICH: 1 of 2, local -1 of 0"),
        (
            "MV2_COMM_WORLD_RANK=3 MV2_COMM_WORLD_SIZE=4 MV2_COMM_WORLD_LOCAL_RANK=1 MV2_COMM_WORLD_LOCAL_SIZE=2",
            "MVAPICH: 3 of 4, local 1 of 2",
        ),
        (
            "JSM_NAMESPACE_RANK=3 JSM_NAMESPACE_SIZE=4 JSM_NAMESPACE_LOCAL_RANK=1 JSM_NAMESPACE_LOCAL_SIZE=2 "
            "OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4 PMIX_RANK=3",
            "Open MPI: 3 of 4, local 1 of 2",
        ),
        ("JSM_NAMESPACE_RANK=1 JSM_NAMESPACE_SIZE=2", "jsrun: 1 of 2, local -1 of 0"),
        # Slurm
        (TASK, "Slurm: 2 of 4, local 0 of 2, step 7.1"),
        (TASK.replace("STEP_TASKS_PER_NODE=2(x2)", "STEP_TASKS_PER_NODE=3,1"), "Slurm: 2 of 4, local 0 of 1, step 7.1"),
        (
            "SLURM_STEP_ID=0 SLURM_PROCID=6 SLURM_STEP_NUM_TASKS=7 SLURM_LOCALID=0 SLURM_NODEID=3 "
            "SLURM_STEP_TASKS_PER_NODE=2(x3),1",
            "Slurm: 6 of 7, local 0 of 1",
        ),
        ("SLURM_STEP_ID=0 SLURM_PROCID=1 SLURM_NTASKS=2 SLURM_LOCALID=0", "Slurm: 1 of 2, local 0 of 0"),
        # Counts of something else, and of which node?
        (TASK.replace("2(x2)", "4(x2)"), "Slurm: 2 of 4, local 0 of 0, step 7.1"),
        (TASK.replace("NODEID=1", "NODEID=2"), "Slurm: 2 of 4, local 0 of 0, step 7.1"),
        (TASK.replace("SLURM_NODEID=1", ""), "Slurm: 2 of 4, local 0 of 0, step 7.1"),
        (
            TASK + "SLURM_HET_SIZE=2 SLURM_JOB_ID_HET_GROUP_0=6 SLURM_JOB_ID_HET_GROUP_1=7",
            "Slurm: 2 of 4, local 0 of 2, step 6.1",
        ),
        # srun --pty, salloc's interactive step, and a script that runs directly in a batch job, are alone.
        (
            "SLURM_STEP_ID=4294967290 SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1 SLURM_NTASKS=4",
            "Slurm: 0 of 1, local 0 of 1",
        ),
        ("SLURM_PROCID=0 SLURM_NTASKS=4", "single process: 0 of 1, local 0 of 1"),
        # srun --mpi=pmi2 and --mpi=pmix
        (TASK + "PMI_RANK=2 PMI_SIZE=4", "Slurm: 2 of 4, local 0 of 2, step 7.1"),
        (TASK + "PMIX_RANK=2", "Slurm: 2 of 4, local 0 of 2, step 7.1"),
        # Set by hand from what Slurm says
        (TASK + "RANK=2 WORLD_SIZE=4", "torchrun: 2 of 4, local 0 of 2, step 7.1"),
        (TASK + "WORLD_SIZE=4", "Slurm: 2 of 4, local 0 of 2, step 7.1"),
        # Agents of torchrun in a step, or under mpirun; daemons of mpirun and of Intel MPI in a step
        (DAEMON + WORKER, "torchrun: 5 of 8, local 1 of 4"),
        ("RANK=1 WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=1", "torchrun: 1 of 2, local -1 of 0"),
        (DAEMON + OPEN_MPI, "Open MPI: 6 of 8, local 2 of 4"),
        (DAEMON + "PMI_RANK=5 PMI_SIZE=8 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=4", "PMI: 5 of 8, local 1 of 4"),
        # One of several jobs of torchrun in a step: what its agent says is sure.
        (
            TASK + "RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 TORCHELASTIC_RUN_ID=x",
            "torchrun: 0 of 1, local 0 of 1",
        ),
        # The user's word
        (TASK + OPEN_MPI + "MODELPARALLEL_LAUNCHER=slurm", "Slurm: 2 of 4, local 0 of 2, step 7.1"),
        (TASK + OPEN_MPI + "MODELPARALLEL_LAUNCHER=MPI", "Open MPI: 6 of 8, local 2 of 4"),
        (WORKER + OPEN_MPI + "MODELPARALLEL_LAUNCHER=mpi", "Open MPI: 6 of 8, local 2 of 4"),
        (TASK + WORKER + "MODELPARALLEL_LAUNCHER=none", "single process: 0 of 1, local 0 of 1"),
        ("RANK=3 MODELPARALLEL_LAUNCHER=none", "single process: 0 of 1, local 0 of 1"),
        ("PMIX_RANK=3 MODELPARALLEL_LAUNCHER=none", "single process: 0 of 1, local 0 of 1"),
    ],
)  # fmt: skip
def test_discovery(text: str, expected: str) -> None:
    found = discover_process(variables(text))
    local = f"local {found.local_rank} of {found.local_world_size}"
    step = f", step {found.slurm_step}" if found.slurm_step else ""
    assert f"{found.source}: {found.global_rank} of {found.world_size}, {local}{step}" == expected
    assert found.is_host_known == (" of 0" not in local)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("RANK=0 WORLD_SIZE=many", "WORLD_SIZE: expected int, got 'many'"),
        ("RANK= WORLD_SIZE=", "RANK: expected int, got ''"),
        ("RANK=4 WORLD_SIZE=4", r"rank 4 is outside 0\.\.3"),
        (WORKER.replace("LOCAL_RANK=1", "LOCAL_RANK=4"), r"local rank 4 is outside 0\.\.3"),
        # Half of what a launcher sets
        ("RANK=3", "RANK=3 is set, but WORLD_SIZE is not: set both"),
        ("WORLD_SIZE=4 LOCAL_RANK=1", "WORLD_SIZE=4 is set, but RANK is not: set both"),
        (TASK + "RANK=3", "RANK=3 is set, but WORLD_SIZE is not; Slurm says rank 2 of 4"),
        (TASK + "WORLD_SIZE=8", "WORLD_SIZE=8 is set, but RANK is not; Slurm says rank 2 of 4"),
        ("OMPI_COMM_WORLD_RANK=1", "OMPI_COMM_WORLD_RANK=1 is set, but OMPI_COMM_WORLD_SIZE is not"),
        ("PMI_SIZE=2", "PMI_SIZE=2 is set, but PMI_RANK is not"),
        ("FLUX_JOB_SIZE=4", "FLUX_JOB_SIZE=4 is set, but FLUX_TASK_RANK is not"),
        ("PALS_RANKID=1 PALS_LOCAL_RANKID=1", "PALS_RANKID=1 is set, but PALS_SIZE is not"),
        ("PMIX_RANK=2", "PMIX_RANK='2' says that this is one of several"),
        # Two launchers
        (
            TASK + "OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=2",
            r"Open MPI says rank 0 of 2; Slurm says rank 2 of 4.*MODELPARALLEL_LAUNCHER.*\(mpi or slurm",
        ),
        (TASK + OPEN_MPI, "Open MPI says rank 6 of 8; Slurm says rank 2 of 4"),  # not one daemon a node
        (DAEMON + "OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=2", "rank 0 of 2; Slurm says rank 1 of 2"),
        (TASK + "RANK=0 WORLD_SIZE=1", "torchrun says rank 0 of 1; Slurm says rank 2 of 4"),
        (TASK + "RANK=1 WORLD_SIZE=4", "torchrun says rank 1 of 4; Slurm says rank 2 of 4"),
        (OPEN_MPI + "PMI_RANK=1 PMI_SIZE=8", "Open MPI says rank 6 of 8; PMI says rank 1 of 8"),
        # The user's word
        ("MODELPARALLEL_LAUNCHER=lsf", "MODELPARALLEL_LAUNCHER: must be one of slurm, mpi, torchrun, flux, none"),
        (WORKER + "MODELPARALLEL_LAUNCHER=slurm", "has not set its variables .SLURM_PROCID and SLURM_STEP_ID"),
        ("MODELPARALLEL_LAUNCHER=torchrun", "RANK and WORLD_SIZE"),
        (TASK + "RANK=2 MODELPARALLEL_LAUNCHER=torchrun", "RANK=2 is set, but WORLD_SIZE is not"),
    ],
)  # fmt: skip
def test_what_would_train_as_many_jobs_or_on_a_wrong_gpu_is_refused(text: str, expected: str) -> None:
    with pytest.raises(SMPConfigError, match=expected):
        discover_process(variables(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("SLURM_PROCID=0 SLURM_NTASKS=4 SLURM_NNODES=2", "allocation with 4 tasks: start it by srun"),
        ("SLURM_NNODES=2", "allocation with 2 nodes: start it by srun"),
        ("SLURM_STEP_ID=4294967290 SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1 SLURM_NTASKS=4", "allocation with 4 tasks"),
        ("JOB_COMPLETION_INDEX=2", "in pod 2 of an Indexed Job: each trains alone"),
        ('SM_HOSTS=["algo-1","algo-2"]', "on one of 2 hosts (algo-1, algo-2): each trains alone"),
        # mpirun that a worker of torchrun has started, or the reverse: they look the same.
        (
            "RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 TORCHELASTIC_RUN_ID=x " + OPEN_MPI,
            "one process (torchrun), while Open MPI says rank 6 of 8: each trains alone",
        ),
        # Nothing says that more were meant.
        ("SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_STEP_NUM_TASKS=1 SLURM_NNODES=1", ""),
        ('JOB_COMPLETION_INDEX=0 SM_HOSTS=["algo-1"]', ""),
        (TASK + 'SLURM_NTASKS=4 SM_HOSTS=["algo-1","algo-2"]', ""),
        ("RANK=0 WORLD_SIZE=1 SLURM_NTASKS=4", ""),
    ],
)
def test_one_process_where_several_were_meant_is_told(text: str, expected: str) -> None:
    environ = variables(text)
    hint = lonely_hint(discover_process(environ), environ)
    assert expected in hint and bool(hint) == bool(expected)


def test_marks_tell_jobs_apart() -> None:
    def marks(text: str) -> dict[str, str]:
        return job_marks(discover_process(variables(text)), variables(text))

    assert marks(TASK)["Slurm's job and step"] == "7.1"
    assert marks(OPEN_MPI + "PMIX_NAMESPACE=prterun-a-1@1")["PMIX_NAMESPACE"] == "prterun-a-1@1"
    assert marks(WORKER + "TORCHELASTIC_RUN_ID=job-1")["TORCHELASTIC_RUN_ID"] == "job-1"
    flux = "FLUX_TASK_RANK=0 FLUX_JOB_SIZE=2 FLUX_JOB_ID=f"
    for text in (TASK, OPEN_MPI + "PMIX_NAMESPACE=a", WORKER + "TORCHELASTIC_RUN_ID=b", flux):
        assert has_own_marks(marks(text))
    # torchrun's own word for no name; agents may be in steps of their own, so those do not count.
    for text in (WORKER + "TORCHELASTIC_RUN_ID=none", DAEMON + WORKER, WORKER + "PMIX_NAMESPACE=a"):
        assert marks(text) == {"launcher": "torchrun", "world size": "8"} and not has_own_marks(marks(text))


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"MASTER_ADDR": "algo-1", "SLURM_JOB_NODELIST": "n1"}, "algo-1"),
        ({"SLURM_JOB_NODELIST": "n[03-05,9],m1"}, "n03"),
        ({"SLURM_JOB_NODELIST": "host-a,host-b"}, "host-a"),
        ({"SLURM_JOB_NODELIST": "n[1-4]", "SLURM_STEP_NODELIST": "n[3-4]"}, "n3"),
        ({}, None),
    ],
)
def test_master_host(environ: dict[str, str], expected: str | None) -> None:
    assert master_host(environ) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n1", "n1"),
        ("host-a,host-b", "host-a host-b"),
        ("n[03-05,9],m1", "n03 n04 n05 n9 m1"),
        ("gpu-a-[001-003]", "gpu-a-001 gpu-a-002 gpu-a-003"),
        ("n[8-11]", "n8 n9 n10 n11"),
        ("n[098-101]", "n098 n099 n100 n101"),
        ("rack[1-2]n[1-2]", "rack1n1 rack1n2 rack2n1 rack2n2"),
        ("tux[1-3,7]-ib", "tux1-ib tux2-ib tux3-ib tux7-ib"),
        ("a1,b[1-2],c", "a1 b1 b2 c"),
        (" a[1-2].site.org ", "a1.site.org a2.site.org"),
    ],
)
def test_lists_of_nodes(text: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_lists, "_by_scontrol", lambda text: [])
    assert expand_nodes(text) == expected.split()


def test_lists_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_lists, "_by_scontrol", lambda text: [])
    for text in ("", ",", "n[1-2", "n[a-b]", "n[1-2],,m[", "n[2-1]", "n[1-2] m"):
        with pytest.raises(SMPConfigError, match="is not a list of nodes"):
            expand_nodes(text)


def test_slurm_s_own_answer_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answer(command, **options):
        asked.append(command)
        return subprocess.CompletedProcess(command, returncode, "x1\nx2\n", "")

    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", answer)
    returncode = 0
    assert expand_nodes("x[1-2]") == ["x1", "x2"] and expand_nodes("x1,x2") == ["x1", "x2"]
    assert asked == [["/usr/bin/scontrol", "show", "hostnames", "x[1-2]"]]  # not for a list without brackets
    returncode = 1
    assert expand_nodes("n[1-2]") == ["n1", "n2"]


def test_identity_of_one_host() -> None:
    assert ProcessIdentity(3, 4, 3, 4, "torchrun").is_one_host
    assert not ProcessIdentity(3, 4, 1, 2, "torchrun").is_one_host
    assert not ProcessIdentity(3, 4, -1, 0, "torchrun").is_one_host
