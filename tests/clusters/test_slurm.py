"""Jobs on a real Slurm of two hosts (slurm_engine.py): started by srun, and submitted to the kind slurm."""

import io
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import test_seed_jobs
from clusters.slurm_engine import SlurmEngine, slurm_engine, wait_for_text
from modelparallel.errors import LaunchError
from modelparallel.launch import JobFailedError, Slurm
from modelparallel.launch.clusters.description import ClusterJob
from modelparallel.launch.submitted import find_job, submit_job
from pool import run_ranks
from scripts import ROOT, load_script
from seed_job import PARAMETERS

TESTS = ROOT / "tests"
SEED = "train_tensor_pipeline_parallel"  # pp 2 x tp 2
EXAMPLE = "examples/clusters/train_preemptible.py"
PYTHON_PATH = os.pathsep.join([str(ROOT / "src"), str(TESTS)])


@pytest.fixture(scope="module")
def engine() -> Iterator[SlurmEngine]:
    with slurm_engine() as engine:
        yield engine


def check_seed_job(results, monkeypatch):
    """The losses and weights of 4 processes equal those of one."""
    monkeypatch.setitem(test_seed_jobs.COPIES, SEED, 2)
    ranks = [torch.load(results / f"rank{rank}.pt", weights_only=True) for rank in range(4)]
    test_seed_jobs.check(SEED, ranks, torch.float32)


def test_two_jobs_that_srun_starts_on_the_same_nodes_do_not_meet(engine, tmp_path, monkeypatch):
    """Both are at once on both nodes; each equals one process, with nothing set by hand but the parameters."""
    jobs = []
    for number in range(2):
        results, log = tmp_path / str(number), tmp_path / f"{number}.log"
        results.mkdir()
        command = ["srun", "--nodes=2", "--ntasks-per-node=2", "--label", "--kill-on-bad-exit=1"]
        # As the launcher's own rehearsal does: the torchvision here may be one for CUDA beside a torch without.
        run = "import runpy; from modelparallel.launch import rehearsal; rehearsal.declare_torchvision_operators(); "
        run += "runpy.run_module('seed_job', run_name='__main__')"
        command += [sys.executable, "-c", run, SEED, str(results)]
        variables = {"SM_HP_MP_PARAMETERS": json.dumps(PARAMETERS[SEED])}
        jobs.append((results, log, engine.start(*command, log=log, **variables)))
    for results, log, process in jobs:
        assert process.wait(500) == 0, engine.logs() + log.read_text()[-6000:]
        check_seed_job(results, monkeypatch)


# Jobs that are submitted


@pytest.fixture
def cluster(engine, tmp_path, monkeypatch):
    """The engine as a row of a cluster file would have it; the records of jobs lie in the test's folder."""
    engine.on_path(monkeypatch)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)  # of the tests' own jobs; sbatch hands on what is set
    variables = {"PYTHONPATH": PYTHON_PATH, "OMP_NUM_THREADS": "1", "MODELPARALLEL_DEVICE": "cpu", "TMPDIR": "/tmp"}
    return Slurm(name="test", folder=str(tmp_path / "my jobs"), python=sys.executable, time="00:50:00", env=variables)


def job_of(tmp_path, name, text, *arguments, num_nodes=2, processes_per_node=1, **values):
    source = tmp_path / f"source of {name}"
    source.mkdir()
    (source / "train.py").write_text(textwrap.dedent(text))
    return ClusterJob(name, "train.py", source, num_nodes, processes_per_node, arguments, device="cpu", **values)


def stand_in(tmp_path, cluster, text):
    """The cluster with a program in place of Python, for what happens between Slurm and an agent."""
    program = tmp_path / "stand-in"
    program.write_text(f"#!/bin/bash\n{textwrap.dedent(text)}")
    program.chmod(0o755)
    return cluster.model_copy(update={"python": str(program)})


def ended(job, engine, seconds=400.0):
    """The final status; everything that the job and the daemons have said if there is none."""
    deadline = time.monotonic() + seconds
    while not (status := job.status()).is_final:
        if time.monotonic() > deadline:
            raise AssertionError(f"{status}\n" + "\n".join(job.logs()) + engine.logs())
        time.sleep(0.5)
    return status


def said_by(job):
    return "\n".join(job.logs())


SEED_JOB = """
    import hashlib, os, runpy, socket
    print("secret", hashlib.sha256(os.environ["HF_TOKEN"].encode()).hexdigest()[:8], flush=True)
    print("host", socket.gethostname(), os.environ["SM_HP_EPOCHS"], flush=True)
    runpy.run_module("seed_job", run_name="__main__")
"""


def test_a_submitted_job_of_two_nodes_equals_one_process(cluster, engine, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdef")
    monkeypatch.setenv("RANK", "3")  # left over from something else
    results = tmp_path / "results"
    results.mkdir()
    parameters = PARAMETERS[SEED]
    job = submit_job(
        cluster,
        job_of(
            tmp_path, "seed", SEED_JOB, SEED, str(results), processes_per_node=2, parameters=parameters,
            hyperparameters={"epochs": "it's 3", "mp_parameters": parameters}, secrets={"HF_TOKEN": "env:HF_TOKEN"},
        ),
    )  # fmt: skip
    status = ended(job, engine)
    assert (status.state, status.exit_code) == ("succeeded", 0), said_by(job)
    check_seed_job(results, monkeypatch)
    lines = list(job.logs())
    assert [f"[rank {rank}] host node-{'aabb'[rank]} it's 3" for rank in range(4)] == sorted(
        line for line in lines if "] host " in line
    ), lines
    assert len([line for line in lines if "] secret " in line]) == 4
    assert any(line.startswith("[node 0] [launcher] job seed") for line in lines), lines
    assert list(job.logs(rank=2)) and not [line for line in job.logs(node=1) if line.startswith("[rank 0]")]
    assert any(text.startswith("started ") and "node-a" in text for text in status.history)
    # The secret is in the one file that is made for it.
    holders = [path for path in Path(job.record.folder).rglob("*") if path.is_file() and not path.is_symlink()]
    holders = [path.name for path in holders if b"hf_0123456789abcdef" in path.read_bytes()]
    assert set(holders) <= {"secrets.env"}, holders


FAILING = """
    import os, sys, time
    if os.environ["RANK"] == "1":
        if sys.argv[1] == "exit":
            sys.exit(7)
        raise ValueError("deliberate failure of the script")
    time.sleep(300)
"""


@pytest.mark.parametrize(
    ("how", "code", "text"), [("raise", 1, "deliberate failure"), ("exit", 7, "exited with code 7")]
)
def test_the_failure_of_a_rank_on_another_node_is_that_of_the_job(cluster, engine, tmp_path, how, code, text):
    job = submit_job(cluster, job_of(tmp_path, "failing", FAILING, how))
    status = ended(job, engine)
    assert (status.state, status.exit_code) == ("failed", code), said_by(job)
    assert "NonZeroExitCode" in status.reason and text in status.reason, status
    lines = list(job.logs())
    assert any(line.startswith("[node 0] ") and "rank 1 " in line and "failed first" in line for line in lines), lines
    if how == "raise":
        assert "[rank 1] ValueError: deliberate failure of the script" in lines
    with pytest.raises(JobFailedError) as caught:
        job.wait(60)
    assert caught.value.exit_code == code and text in str(caught.value)


SLEEPING = """
    import time
    print("started", flush=True)
    time.sleep(300)
"""


def test_a_job_waits_with_a_reason_and_both_can_be_stopped(cluster, engine, tmp_path):
    whole = cluster.model_copy(update={"cpus_per_node": 8})
    first = submit_job(whole, job_of(tmp_path, "first", SLEEPING))
    engine.wait_until(first.record.engine_id, "RUNNING")
    second = submit_job(whole, job_of(tmp_path, "second", SLEEPING))
    deadline = time.monotonic() + 60
    while (status := second.status()).reason in ("", "Priority"):  # what it is before Slurm has looked
        assert time.monotonic() < deadline, status
        time.sleep(0.3)
    assert (status.state, status.reason) == ("pending", "Resources")
    with pytest.raises(LaunchError, match="it is pending: Resources"):
        second.wait(0.1, output=io.StringIO())
    second.stop()
    assert ended(second, engine).state == "stopped"
    following = first.logs(rank=1, follow=True)
    assert next(following) == "[rank 1] started"
    first.stop()
    status = ended(first, engine)
    assert (status.state, status.exit_code) == ("stopped", 143), status
    assert not [line for line in following if "Traceback" in line]
    for host in engine.hosts:
        deadline = time.monotonic() + 60
        while [pid for pid in host.pids() if b"first" in command_line(pid)]:
            assert time.monotonic() < deadline, "processes are left"
            time.sleep(0.3)


def command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


PREEMPTED = """
    import os, runpy
    print("restarts", os.environ["MODELPARALLEL_RESTART_COUNT"], flush=True)
    runpy.run_path(os.environ["EXAMPLE"], run_name="__main__")
"""


def train(folder):
    load_script(EXAMPLE).main(folder)


@pytest.mark.parametrize("signals", [("--batch", "--signal=USR1"), ("--signal=TERM",)])
def test_a_preempted_job_is_requeued_and_goes_on_as_if_nothing_was(cluster, engine, tmp_path, signals):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    parameters = {"pipeline_parallel_degree": 2, "microbatches": 2, "ddp": True, "timeout_seconds": 120}
    run_ranks(train, 2, whole, parameters=parameters)
    values = {"parameters": parameters, "hyperparameters": {"mp_parameters": parameters}}
    values |= {"environment": {"EXAMPLE": str(ROOT / EXAMPLE)}}
    job = submit_job(cluster, job_of(tmp_path, "preempted", PREEMPTED, str(parts), "--seconds", "1", **values))
    log = Path(job.record.folder) / "logs" / "node_0" / "rank_0.log"
    wait_for_text(log, "step 1 ")
    # What Slurm does when the time is nearly over; and, to all processes, when it preempts a job with a GraceTime.
    engine.run("scancel", *signals, job.record.engine_id)
    said = engine.wait_until(job.record.engine_id, "PENDING")
    assert "Restarts=1 " in said, said
    status = job.status()
    assert (status.state, status.exit_code) == ("pending", None) and "requeued 1 times" in status.history
    engine.start_now(job.record.engine_id)
    status = ended(job, engine)
    assert status.state == "succeeded", f"{status}\n{engine.job(job.record.engine_id)}\n{said_by(job)}"
    assert "restarts 1" in log.read_text() and "all steps are done" in log.read_text()
    losses = [(folder / "losses.jsonl").read_text() for folder in (whole, parts)]
    assert losses[0] == losses[1]
    assert "the job is to be preempted" in said_by(job)


# Between Slurm and the agents


def test_requeue_always_starts_again_what_does_not_leave(cluster, engine, tmp_path):
    program = """
        trap '' USR1
        echo "start ${SLURM_RESTART_COUNT:-0}"
        [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && exit 0
        sleep 200
    """
    keys = {"requeue": "always", "signal_seconds": 21}
    job = submit_job(stand_in(tmp_path, cluster, program).model_copy(update=keys), job_of(tmp_path, "always", ""))
    log = Path(job.record.folder) / "node_0.log"
    wait_for_text(log, "start 0")
    engine.run("scancel", "--batch", "--signal=USR1", job.record.engine_id)
    assert "Restarts=1 " in engine.wait_until(job.record.engine_id, "PENDING", seconds=60)
    engine.start_now(job.record.engine_id)
    assert ended(job, engine).state == "succeeded"
    assert [line for line in log.read_text().splitlines() if line.startswith("start")] == ["start 0", "start 1"]


def test_a_job_without_requeue_ends_with_the_exit_code_of_its_script(cluster, engine, tmp_path):
    job = submit_job(
        stand_in(tmp_path, cluster, "exit 85").model_copy(update={"requeue": False}), job_of(tmp_path, "once", "")
    )
    status = ended(job, engine)
    assert (status.state, status.exit_code) == ("failed", 85)
    found = find_job(f"slurm:{job.record.engine_id}")
    assert found.record.folder == job.record.folder and found.status().exit_code == 85
    assert found.record.name == "once"


def test_what_slurm_refuses_is_said_in_its_own_words_and_nothing_is_left(cluster, tmp_path):
    job = job_of(tmp_path, "refused", "")
    with pytest.raises(LaunchError, match="invalid partition specified: nowhere") as caught:
        submit_job(cluster.model_copy(update={"partition": "nowhere"}), job)
    assert "sbatch --parsable" in str(caught.value) and "exit code 1" in str(caught.value)
    assert not (tmp_path / "my jobs" / "refused").exists() and not list((tmp_path / "state").rglob("*.json"))
    # Every option that can stand in the file is read by Slurm as it was meant.
    odd = {"comment": "a # b, c=%d [x]", "begin": "now+1hour", "nice": 10}
    accepted = submit_job(cluster.model_copy(update={"extra": odd}), job)
    shown = subprocess.run(
        ["scontrol", "show", "job", accepted.record.engine_id], capture_output=True, text=True
    ).stdout
    assert "Comment=a # b, c=%d [x]" in shown and "Nice=10" in shown, shown
    assert accepted.status().state == "pending" and accepted.status().reason == "BeginTime"
    accepted.stop()


def test_a_missing_python_is_said_by_the_job(cluster, engine, tmp_path):
    job = submit_job(cluster.model_copy(update={"python": "/no/such/python"}), job_of(tmp_path, "no-python", ""))
    status = ended(job, engine)
    assert status.state == "failed", status
    assert any("/no/such/python" in line for line in job.logs()), said_by(job)


def test_the_commands_follow_a_job_from_any_shell(cluster, engine, tmp_path):
    program = stand_in(tmp_path, cluster, "echo hello from $(hostname); exit 3").python
    file = tmp_path / "modelparallel.toml"
    row = f'kind = "slurm"\nfolder = "{cluster.folder}"\npython = "{program}"\ntime = "1h"\nrequeue = false\n'
    file.write_text(f"[clusters.test]\n{row}")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "train.py").write_text("")

    def run(*arguments):
        command = [sys.executable, "-m", "modelparallel", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
        return done.returncode, done.stdout + done.stderr

    options = ["--cluster", "test", "--nodes", "2", "--nproc", "1", "--name", "by-hand"]
    submission = ["submit", *options, "code/train.py", "--lr", "1 2"]
    code, text = run("submit", "--dry-run", *submission[1:])
    assert code == 0 and "#SBATCH --nodes=2" in text and "sbatch --parsable" in text, text
    assert not (tmp_path / "my jobs").exists(), "nothing was written"
    code, text = run(*submission)
    assert code == 0 and text.strip().endswith("test/by-hand"), text
    code, text = run("wait", "test/by-hand")
    assert code == 3 and "NonZeroExitCode" in text, text
    code, text = run("logs", "by-hand")
    assert "[node 0] hello from node-a" in text and "srun: error" in text, text
    code, text = run("status", "by-hand", "--json")
    assert json.loads(text)["state"] == "failed", text
    assert "by-hand" in run("jobs")[1]
    code, text = run(*submission)
    assert code == 2 and "job name 'by-hand' is in use" in text, text
    # The file that was printed is what runs when it is submitted by hand.
    script = next((tmp_path / "my jobs").rglob("job.sbatch"))
    job_id = engine.run("sbatch", "--parsable", str(script)).stdout.strip()
    assert "ExitCode=3:0" in engine.wait_until(job_id, "FAILED")
