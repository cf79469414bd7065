"""The Slurm kind of clusters, without a Slurm: the sbatch file, what is refused, and what answers of Slurm mean."""

import json
import os
import shlex
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from modelparallel.errors import LaunchError, SMPConfigError
from modelparallel.launch.clusters.cluster import JobRecord
from modelparallel.launch.clusters.cluster_file import kinds, make_cluster, read_clusters
from modelparallel.launch.clusters.description import ClusterJob, DataChannel
from modelparallel.launch.clusters.job_end import JobEnd, write_job_end
from modelparallel.launch.clusters.slurm import Slurm
from modelparallel.launch.clusters.slurm import commands as slurm_commands
from modelparallel.launch.clusters.slurm.commands import status_of

CLUSTER = Slurm(
    folder="/shared/jobs",
    partition="gpu",
    gpus_per_node=8,
    cpus_per_node=96,
    time="24:00:00",
    setup=("module load cuda/12.4", "ulimit -n 65536"),
    python="/shared/envs/mp/bin/python",
    extra={"account": "ml", "qos": "high", "exclusive": ""},
    env={"NCCL_DEBUG": "WARN"},
)
JOB = ClusterJob("train-1", "train.py", Path("/home/me/code"), 2, 8, ("--epochs", "3"), {"epochs": 3})

GOLDEN = """\
#!/bin/bash
# train-1: 2 nodes, 8 processes on each. By hand: sbatch /shared/jobs/train-1/job.sbatch
#SBATCH --job-name=train-1
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=1-00:00:00
#SBATCH --partition=gpu
#SBATCH --chdir=/shared/jobs/train-1
#SBATCH --output=/shared/jobs/train-1/slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --account=ml
#SBATCH --qos=high
#SBATCH --exclusive

export NCCL_DEBUG=WARN
module load cuda/12.4
ulimit -n 65536

# Slurm sends USR1 here 120 s before the time is over. The ranks are told, and a script that asks
# (smp.preemption_requested) saves and leaves with exit code 85. Then it goes back into the queue.
trap 'scancel --signal=USR1 "$SLURM_JOB_ID"' USR1

# One agent on each node, which starts the processes there.
srun --mpi=none --cpus-per-task=96 --kill-on-bad-exit=0 --wait=600 \\
    --output=/shared/jobs/train-1/node_%t.log --open-mode=append \\
    /shared/envs/mp/bin/python -m modelparallel node /shared/jobs/train-1/job.json &
step=$!
while wait "$step"; kill -0 "$step" 2>/dev/null; do :; done  # a signal ends a wait
wait "$step"; code=$?

echo "$code" > /shared/jobs/train-1/exit_code
case "$code" in 85|75) scontrol requeue "$SLURM_JOB_ID";; esac  # preempted, or a node was lost
exit "$code"
"""
SMALL = """\
#!/bin/bash
# one: 1 node, 1 process on each. By hand: sbatch '/my jobs/one/job.sbatch'
#SBATCH --job-name=one
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=00:10:00
#SBATCH --chdir="/my jobs/one"
#SBATCH --output="/my jobs/one/slurm-%j.out"
#SBATCH --open-mode=append
#SBATCH --no-requeue
#SBATCH --signal=B:USR1@120
#SBATCH --comment="a # b"
#SBATCH --gres=gpu:2

export TEXT='it'"'"'s $HOME
and a line'

# Slurm sends USR1 here 120 s before the time is over. The ranks are told, and a script that asks
# (smp.preemption_requested) saves and leaves with exit code 85.
trap 'scancel --signal=USR1 "$SLURM_JOB_ID"' USR1

# One agent on each node, which starts the processes there.
srun --mpi=pmix --kill-on-bad-exit=0 --wait=600 --container-image="my image" \\
    --output='/my jobs/one/node_%t.log' --open-mode=append \\
    apptainer exec --nv /shared/mp.sif python -m modelparallel node '/my jobs/one/job.json' &
step=$!
while wait "$step"; kill -0 "$step" 2>/dev/null; do :; done  # a signal ends a wait
wait "$step"; code=$?

echo "$code" > '/my jobs/one/exit_code'
exit "$code"
"""


def script_of(cluster, job=JOB):
    return cluster.render(job).files[f"{cluster.folder}/{job.name}/job.sbatch"]


def test_the_sbatch_file_is_what_users_read_and_submit():
    assert script_of(CLUSTER) == GOLDEN
    rendered = CLUSTER.render(JOB)
    assert list(rendered.files) == ["/shared/jobs/train-1/job.sbatch", "/shared/jobs/train-1/job.json"]
    assert rendered.command == ("sbatch", "--parsable", "/shared/jobs/train-1/job.sbatch")
    assert rendered.digest() == CLUSTER.render(JOB).digest()
    description = json.loads(rendered.files["/shared/jobs/train-1/job.json"])
    assert (description["num_nodes"], description["processes_per_node"]) == (2, 8)
    assert "source_dir" not in description, "a path of the submitting machine"


def test_odd_values_are_quoted_and_options_of_the_user_come_first():
    cluster = Slurm(
        folder="/my jobs",
        gpus_per_node=2,
        container="apptainer exec --nv /shared/mp.sif",
        requeue=False,
        extra={"comment": "a # b", "gres": "gpu:2", "overcommit": False},
        srun_extra={"container-image": "my image", "mpi": "pmix"},
        env={"TEXT": "it's $HOME\nand a line"},
    )
    assert script_of(cluster, ClusterJob("one", "t.py", Path("/c"), 1, 1, max_seconds=600)) == SMALL


def test_requeue_always_puts_back_what_has_not_left():
    text = script_of(CLUSTER.model_copy(update={"requeue": "always", "signal_seconds": 60}))
    trap = """trap 'scancel --signal=USR1 "$SLURM_JOB_ID"; (sleep 40; scontrol requeue "$SLURM_JOB_ID") &' USR1"""
    assert trap in text.splitlines()
    assert "# What has not left 40 s later goes back as it is." in text


@pytest.mark.parametrize("update", [{}, {"requeue": "always"}, {"env": {"A": "'\"`$x\\\n"}}, {"folder": "/my jobs"}])
def test_the_file_is_shell(update):
    text = script_of(CLUSTER.model_copy(update=update))
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""


def run_script(tmp_path, cluster, srun, *, signals=0):
    """The file, run by bash with stand-ins for Slurm's commands; what these were called with, and the exit code."""
    programs = tmp_path / "bin"
    programs.mkdir()
    calls = tmp_path / "calls"
    calls.touch()
    for name, body in {"srun": srun, "scancel": "kill -USR1 $(cat %s)", "scontrol": ""}.items():
        body = body.replace("%s", shlex.quote(str(tmp_path / "step")))
        (programs / name).write_text(f'#!/bin/bash\necho {name} "$@" >> {shlex.quote(str(calls))}\n{body}\n')
        (programs / name).chmod(0o755)
    (Path(cluster.folder) / JOB.name).mkdir(parents=True)
    path = tmp_path / "job.sbatch"
    path.write_text(script_of(cluster))
    environ = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    process = subprocess.Popen(["bash", str(path)], env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for _ in range(signals):
        deadline = time.monotonic() + 60
        while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        (tmp_path / "ready").unlink()
        process.send_signal(10)
    output, _ = process.communicate(timeout=120)
    return process.returncode, calls.read_text().splitlines(), output.decode()


@pytest.mark.parametrize("code", [0, 3, 75, 85])
def test_the_exit_code_of_the_step_is_that_of_the_job(tmp_path, code):
    cluster = CLUSTER.model_copy(update={"folder": str(tmp_path / "my jobs"), "setup": ()})
    found, calls, output = run_script(tmp_path, cluster, f"exit {code}")
    assert found == code, output
    assert (tmp_path / "my jobs" / JOB.name / "exit_code").read_text() == f"{code}\n"
    assert ("scontrol requeue 7" in calls) == (code in (75, 85))
    assert calls[0].startswith("srun --mpi=none") and calls[0].endswith(f"node {tmp_path}/my jobs/train-1/job.json")


def test_the_signal_reaches_the_step_and_its_exit_code_counts(tmp_path):
    cluster = CLUSTER.model_copy(update={"folder": str(tmp_path / "jobs"), "setup": ()})
    ready = shlex.quote(str(tmp_path / "ready"))
    srun = f'echo $$ > %s; trap "n=\\$((n+1)); touch {ready}" USR1; touch {ready}; n=0\n'
    srun += 'for i in $(seq 600); do [ "$n" -ge 2 ] && exit 85; sleep 0.1; done'
    found, calls, output = run_script(tmp_path, cluster, srun, signals=2)
    assert found == 85, output
    assert [call.split()[0] for call in calls] == ["srun", "scancel", "scancel", "scontrol"]
    assert calls[1] == "scancel --signal=USR1 7"


# What is refused


@pytest.mark.parametrize(
    ("cluster", "job", "text"),
    [
        ({"folder": ""}, {}, "folder is missing"),
        ({"folder": "jobs"}, {}, "folder 'jobs': give an absolute path"),
        ({"folder": "/shared/100%"}, {}, "folder '/shared/100%'"),
        ({"folder": '/shared/"a"'}, {}, "folder"),
        ({"folder": "/shared/a\nb"}, {}, "folder"),
        ({"extra": {"nodes": 4}}, {}, "extra: nodes: the number of nodes is instance_count"),
        ({"extra": {"signal": "USR2"}}, {}, "extra: signal: it is the key signal_seconds"),
        ({"extra": {"--account": "ml"}}, {}, "extra: '--account' is no long option: .* as 'account'"),
        ({"extra": {"A": "ml"}}, {}, "extra: 'A' is no long option"),
        ({"extra": {"comment": 'a "b"'}}, {}, "the character '\"' cannot stand in an option of Slurm"),
        ({"extra": {"comment": "a\nb"}}, {}, "cannot stand in an option"),
        ({"srun_extra": {"output": "x"}}, {}, "srun_extra: output: it lies in the job's folder"),
        ({"partition": "a\nb"}, {}, "partition: the character"),
        ({"partition": "a'b"}, {}, "partition = .*cannot stand"),
        ({"env": {"A-B": "1"}}, {}, "env: 'A-B' is no name of a variable"),
        ({"env": {"A": "\0"}}, {}, "env: A: a variable cannot have"),
        ({"time": "soon"}, {}, "time: 'soon' is no time"),
        ({"time": "00:02:00"}, {}, "its time of 00:02:00 is not longer than signal_seconds=120"),
        ({}, {"max_seconds": 60}, "its time of 00:01:00 is not longer"),
        ({}, {"name": "a b"}, "job name 'a b': use letters"),
        ({}, {"name": "-a"}, "job name '-a'"),
        ({}, {"name": "a" * 101}, "job name"),
        ({}, {"processes_per_node": 9}, "9 processes on a node with 8 devices .gpus_per_node of cluster 'slurm'."),
        ({"gpus_per_node": "a100:4"}, {}, "8 processes on a node with 4 devices"),
        ({"gpus_per_node": None}, {"instance_type": "ml.g5.12xlarge"}, "8 processes on a node with 4 devices"),
        ({}, {"environment": {"1A": "x"}}, "environment: '1A' is no name"),
        ({}, {"secrets": {"HF_TOKEN": "hf/token"}}, "secret HF_TOKEN"),
        ({}, {"channels": {"train": DataChannel("data")}}, "channel 'train': 'data' is no absolute path"),
    ],
)
def test_what_cannot_work_is_named_before_anything_is_submitted(cluster, job, text):
    with pytest.raises((LaunchError, SMPConfigError), match=text):
        CLUSTER.model_copy(update=cluster).render(replace(JOB, **job))


def test_cpu_jobs_ask_for_no_gpu_and_may_have_more_processes():
    text = script_of(CLUSTER, replace(JOB, device="cpu", processes_per_node=16))
    assert "gpu" not in text.replace("--partition=gpu", "")


def test_a_launch_file_of_the_cloud_says_how_many_gpus_a_node_has():
    cluster = CLUSTER.model_copy(update={"gpus_per_node": None})
    assert "#SBATCH --gpus-per-node=8" in script_of(cluster, replace(JOB, instance_type="ml.p4d.24xlarge"))
    assert "gpus" not in script_of(cluster)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"partitions": "gpu"}, "unknown key 'partitions': did you mean 'partition'"),
        ({"gpus_per_node": "many"}, "gpus_per_node: .*expected a number of GPUs"),
        ({"gpus_per_node": -1}, "gpus_per_node"),
        ({"requeue": "sometimes"}, "requeue"),
        ({"signal_seconds": 0}, "signal_seconds"),
        ({"cpus_per_node": 0}, "cpus_per_node"),
    ],
)
def test_a_wrong_key_of_the_cluster_file_is_named(row, text):
    with pytest.raises(SMPConfigError, match=text):
        make_cluster("gpu", {"kind": "slurm", **row}, "file: [clusters.gpu]")


def test_the_row_of_a_cluster_file_and_of_a_record(tmp_path):
    path = tmp_path / "modelparallel.toml"
    path.write_text(
        textwrap.dedent("""
        [clusters.gpu]
        kind = "slurm"
        partition = "gpu"
        gpus_per_node = 8
        cpus_per_node = 96
        time = "24:00:00"
        folder = "/shared/jobs"
        setup = ["module load cuda/12.4", "ulimit -n 65536"]
        python = "/shared/envs/mp/bin/python"
        extra = {account = "ml", qos = "high", exclusive = ""}
        env = {NCCL_DEBUG = "WARN"}
        """)
    )
    cluster = read_clusters(path)["gpu"]
    assert script_of(cluster) == GOLDEN
    settings = json.loads(json.dumps(cluster.model_dump(mode="json", exclude_defaults=True)))
    assert make_cluster("gpu", {"kind": "slurm", **settings}, "record") == cluster
    assert kinds()["slurm"] is Slurm and cluster.devices_per_node == 8
    assert Slurm(gpus_per_node="a100:4").devices_per_node == 4 and Slurm().devices_per_node is None


# Submitting, following, stopping, with stand-ins for Slurm's commands


class Commands:
    """A folder for jobs, and stand-ins for the commands of Slurm that write down how they were called; `slurm(name,
    text, code)` makes one that answers so.
    """

    def __init__(self, place):
        self.folder, self.programs = place / "jobs", place / "bin"
        self.calls, self.environ = place / "calls", place / "environ"
        self.job = replace(JOB, source_dir=place / "source")
        self.programs.mkdir()
        (place / "source").mkdir()
        (place / "source" / "train.py").write_text("print('hello')\n")
        for name in ("sbatch", "scontrol", "scancel", "sacct"):
            self(name)

    def __call__(self, name, text="", code=0, error="", body=""):
        lines = ["#!/bin/sh", f'echo "$0 $*" >> {self.calls}', f"env > {self.environ}", body]
        lines += [f"printf '%s\\n' {shlex.quote(text)}"] if text else []
        lines += [f"echo {shlex.quote(error)} >&2"] if error else []
        (self.programs / name).write_text("\n".join([*lines, f"exit {code}", ""]))
        (self.programs / name).chmod(0o755)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    commands = Commands(tmp_path)
    monkeypatch.setenv("PATH", f"{commands.programs}:/usr/bin:/bin")
    return commands


def cluster_in(slurm, **keys):
    return Slurm(name="gpu", folder=str(slurm.folder), **keys)


def submitted(slurm, job=None, **keys):
    slurm("sbatch", "1234;other")
    cluster = cluster_in(slurm, **keys)
    job = job or slurm.job
    cluster.check_access(job)
    return cluster, cluster.submit(job)


def test_submitting_writes_the_folder_and_hands_on_a_clean_environment(slurm, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdef")
    for name in ("RANK", "WORLD_SIZE", "SLURM_JOB_ID", "SLURM_CONF", "OMPI_COMM_WORLD_RANK", "OWN_SETTING"):
        monkeypatch.setenv(name, "1")
    job = replace(slurm.job, secrets={"HF_TOKEN": "env:HF_TOKEN"})
    cluster, record = submitted(slurm, job)
    root = slurm.folder / "train-1"
    assert (record.engine_id, record.address, record.folder) == ("1234", "gpu/train-1", str(root))
    assert record.digest == cluster.render(job).digest()
    assert {path.name for path in root.iterdir()} == {"job.sbatch", "job.json", "secrets.env", "code"}
    assert (root / "code" / "train.py").read_text() == "print('hello')\n"
    assert (root / "job.sbatch").read_text() == script_of(cluster, job)
    assert (root / "secrets.env").stat().st_mode & 0o777 == 0o600 and root.stat().st_mode & 0o777 == 0o700
    assert "hf_0123456789abcdef" in (root / "secrets.env").read_text()
    readable = [(root / "job.sbatch").read_text(), (root / "job.json").read_text(), repr(record)]
    readable += [cluster.render(job).text(), slurm.environ.read_text(), slurm.calls.read_text()]
    assert not any("hf_0123456789abcdef" in text for text in readable)
    environ = dict(line.split("=", 1) for line in slurm.environ.read_text().splitlines() if "=" in line)
    assert not {"RANK", "WORLD_SIZE", "SLURM_JOB_ID", "OMPI_COMM_WORLD_RANK", "HF_TOKEN"} & set(environ)
    assert environ["SLURM_CONF"] == environ["OWN_SETTING"] == "1"


def test_a_refused_job_leaves_nothing_and_says_what_slurm_said(slurm):
    said = "sbatch: error: invalid partition specified: gpux\nsbatch: error: Batch job submission failed"
    slurm("sbatch", code=1, error=said)
    cluster = cluster_in(slurm)
    cluster.check_access(slurm.job)
    with pytest.raises(LaunchError) as caught:
        cluster.submit(slurm.job)
    assert said in str(caught.value)
    assert not (slurm.folder / "train-1").exists()
    slurm("sbatch", "welcome to the cluster")
    with pytest.raises(LaunchError, match="sbatch answered 'welcome to the cluster', which is no number"):
        cluster.submit(slurm.job)
    assert not (slurm.folder / "train-1").exists()


def test_access_is_checked_before_anything_is_written(slurm, tmp_path, monkeypatch):
    cluster, _ = submitted(slurm)
    with pytest.raises(LaunchError, match=r"job name 'train-1' is in use: .*/jobs/train-1 exists"):
        cluster.check_access(slurm.job)
    with pytest.raises(LaunchError, match="secret A: environment variable NO_SUCH_VARIABLE is not set"):
        cluster.check_access(replace(slurm.job, name="other", secrets={"A": "env:NO_SUCH_VARIABLE"}))
    (tmp_path / "file").write_text("")
    with pytest.raises(LaunchError, match="file is no folder that you can write to"):
        Slurm(folder=str(tmp_path / "file" / "jobs")).check_access(slurm.job)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match=r"sbatch, scontrol, scancel not found on PATH: .*login node"):
        cluster.check_access(replace(slurm.job, name="other"))
    assert sorted(path.name for path in slurm.folder.iterdir()) == ["train-1"]


def test_slurm_that_does_not_answer_is_not_waited_for(slurm, monkeypatch):
    slurm("scontrol", body="sleep 30")
    monkeypatch.setattr(slurm_commands, "_SECONDS", 0.5)
    with pytest.raises(LaunchError, match=r"scontrol show job --oneliner 1: Slurm did not answer within 0\.5 s"):
        slurm_commands.ask(["scontrol", "show", "job", "--oneliner", "1"], seconds=0.5)


SHOWN = (
    "JobId=1234 JobName=train-1 JobState={state} Reason={reason} Dependency=(null) Requeue=1 Restarts={restarts} "
    "ExitCode={code} SubmitTime=2026-01-31T12:00:00 StartTime={start} EndTime={end} NodeList=node-[a-b] "
    "StdErr={folder}/slurm-1234.out StdIn=/dev/null StdOut={folder}/slurm-1234.out Power="
)


def shown(state, reason="None", code="0:0", restarts=0, start="Unknown", end="Unknown", folder="/x"):
    return SHOWN.format(state=state, reason=reason, code=code, restarts=restarts, start=start, end=end, folder=folder)


@pytest.mark.parametrize(
    ("text", "state", "reason", "code"),
    [
        (shown("PENDING", "Resources"), "pending", "Resources", None),
        (shown("PENDING", "QOSMaxGRESPerUser"), "pending", "QOSMaxGRESPerUser", None),
        (shown("PENDING", "BeginTime", restarts=1), "pending", "BeginTime", None),
        (shown("CONFIGURING"), "pending", "", None),
        (shown("RUNNING"), "running", "", None),
        (shown("COMPLETING"), "running", "", None),
        (shown("COMPLETED"), "succeeded", "", 0),
        (shown("FAILED", "NonZeroExitCode", "3:0"), "failed", "FAILED: NonZeroExitCode", 3),
        (shown("FAILED", "NonZeroExitCode", "0:9"), "failed", "FAILED: NonZeroExitCode", 137),
        (shown("CANCELLED", "None", "0:15"), "stopped", "CANCELLED", 143),
        (shown("TIMEOUT", "TimeLimit", "0:15"), "failed", "TIMEOUT: TimeLimit", 124),
        (shown("NODE_FAIL", "NodeDown", "0:0"), "failed", "NODE_FAIL: NodeDown", 1),
        (shown("OUT_OF_MEMORY", "OutOfMemory", "0:125"), "failed", "OUT_OF_MEMORY", 137),
    ],
)
def test_states_of_slurm(slurm, text, state, reason, code):
    cluster, record = submitted(slurm)
    slurm("scontrol", text)
    status = cluster.status(record)
    assert (status.state, status.reason, status.exit_code) == (state, reason, code)
    assert status.is_final == (code is not None)


def test_history_and_first_failure_are_part_of_a_status(slurm):
    cluster, record = submitted(slurm)
    slurm("scontrol", shown("FAILED", "NonZeroExitCode", "1:0", 2, "2026-01-31T12:01:00", "2026-01-31T12:05:00"))
    write_job_end(Path(record.folder), JobEnd("train-1", "failed", 1, "rank 3: ValueError: no"))
    status = cluster.status(record)
    assert status.reason == "FAILED: NonZeroExitCode: rank 3: ValueError: no"
    assert status.history == (
        "submitted 2026-01-31T12:00:00",
        "requeued 2 times",
        "started 2026-01-31T12:01:00 on node-[a-b]",
        "ended 2026-01-31T12:05:00",
    )


def test_a_job_that_slurm_has_forgotten(slurm):
    cluster, record = submitted(slurm)
    slurm("scontrol", code=1, error="slurm_load_jobs error: Invalid job id specified")
    slurm("sacct", code=1, error="Slurm accounting storage is disabled")
    assert cluster.status(record).state == "unknown"
    (Path(record.folder) / "exit_code").write_text("3\n")
    status = cluster.status(record)
    assert (status.state, status.exit_code) == ("failed", 3)
    (Path(record.folder) / "exit_code").write_text("0\n")
    assert cluster.status(record).state == "succeeded"
    # What the first agent has said comes first; the exit code of a start that was preempted says nothing of the next.
    write_job_end(Path(record.folder), JobEnd("train-1", "stopped", 143, "stopped by SIGTERM"))
    assert (cluster.status(record).state, cluster.status(record).reason) == ("stopped", "stopped by SIGTERM")
    (Path(record.folder) / "exit_code").write_text("85\n")
    write_job_end(Path(record.folder), JobEnd("train-1", "pending", 85))
    assert (cluster.status(record).state, cluster.status(record).exit_code) == ("failed", 85)
    write_job_end(Path(record.folder), JobEnd("train-1", "running", node="node-a"))
    status = cluster.status(record)
    assert status.state == "unknown" and "it was running when it was last heard of, on node-a" in status.reason
    slurm("sacct", "CANCELLED by 1000|0:15|None")
    assert cluster.status(record).state == "stopped"
    slurm("sacct", "TIMEOUT|0:0|None")
    assert (cluster.status(record).state, cluster.status(record).exit_code) == ("failed", 124)
    assert status_of("", "", "").state == "unknown"


def test_another_error_of_slurm_is_quoted(slurm):
    cluster, record = submitted(slurm)
    slurm("scontrol", code=1, error="slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    with pytest.raises(LaunchError, match=r"Unable to contact slurm controller \(connect failure\)"):
        cluster.status(record)
    slurm("scancel", code=1, error="scancel: error: Kill job error on job id 1234: Invalid job id specified")
    with pytest.raises(LaunchError, match="Kill job error on job id 1234: Invalid job id specified"):
        cluster.stop(record)


def test_stopping(slurm):
    cluster, record = submitted(slurm)
    cluster.stop(record)
    assert slurm.calls.read_text().splitlines()[-1].endswith("scancel 1234")


def test_a_job_that_was_submitted_elsewhere_is_found_by_its_number(slurm):
    _, record = submitted(slurm)
    slurm("scontrol", shown("RUNNING", folder=record.folder))
    found = Slurm().adopt("1234")
    assert (found.name, found.engine_id, found.folder) == ("train-1", "1234", record.folder)
    slurm("scontrol", shown("RUNNING", folder="/no/such folder"))
    assert Slurm().adopt("1234").folder == ""


# Logs


def write_logs(record, logs):
    for name, text in logs.items():
        path = Path(record.folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


LOGS = {
    "slurm-1234.out": "module loaded\n",
    "node_0.log": "[launcher] job train-1: 16 processes\n[node-a rank 0] loss 1\n[rank 0] loss 2\n[launcher] done\n",
    "node_1.log": "[launcher] the other\n",
    "logs/node_0/rank_0.log": "loss 1\rloss 2\nlast",
    "logs/node_1/rank_8.log": "eight\n",
    "logs/node_1/rank_12.log": "twelve\n",
    "logs/node_0/elastic.log": "not shown\n",
}


def test_logs_have_the_rank_in_front(slurm):
    cluster, record = submitted(slurm)
    write_logs(record, LOGS)
    assert list(cluster.logs(record)) == [
        "[node 0] [launcher] job train-1: 16 processes",
        "[node 0] [launcher] done",
        "[slurm] module loaded",
        "[rank 0] loss 1",
        "[rank 0] loss 2",
        "[rank 0] last",
        "[rank 8] eight",
        "[rank 12] twelve",
    ]
    assert list(cluster.logs(record, rank=8)) == ["[rank 8] eight"]
    assert list(cluster.logs(record, node=1)) == ["[node 1] [launcher] the other", "[rank 8] eight", "[rank 12] twelve"]
    for wrong in ({"rank": 16}, {"rank": -1}, {"node": 2}):
        with pytest.raises(LaunchError, match=r"job train-1 has the (ranks 0\.\.15|nodes 0\.\.1)"):
            cluster.logs(record, **wrong)


def test_logs_without_a_folder_are_an_error(slurm):
    cluster, _ = submitted(slurm)
    with pytest.raises(LaunchError, match="its folder /gone is not there"):
        cluster.logs(JobRecord("a", "gpu", "slurm", {}, "1", "/gone", 0.0, ""))


def test_following_ends_with_the_job_and_misses_nothing(slurm, monkeypatch):
    cluster, record = submitted(slurm)
    for name in ("_LOG_SECONDS", "_ASK_SECONDS"):
        monkeypatch.setattr(f"modelparallel.launch.clusters.slurm.cluster.{name}", 0.01)
    slurm("scontrol", shown("RUNNING"))
    write_logs(record, {"logs/rank_0.log": "one\ntw"})
    lines = cluster.logs(record, rank=0, follow=True)
    assert next(lines) == "[rank 0] one"
    write_logs(record, {"logs/rank_0.log": "one\ntwo\n"})
    assert next(lines) == "[rank 0] two"
    # Another attempt begins a file of the same name.
    (Path(record.folder) / "logs" / "rank_0.log").unlink()
    write_logs(record, {"logs/rank_0.log": "three\nfour"})
    assert next(lines) == "[rank 0] three"
    slurm("scontrol", shown("COMPLETED"))
    assert list(lines) == ["[rank 0] four"]


def test_the_daemon_is_asked_now_and_then_only(slurm, monkeypatch):
    cluster, record = submitted(slurm)
    monkeypatch.setattr("modelparallel.launch.clusters.slurm.cluster._LOG_SECONDS", 0.01)
    monkeypatch.setattr("modelparallel.launch.clusters.slurm.cluster._ASK_SECONDS", 1.0)
    slurm("scontrol", shown("RUNNING"))
    num_calls = len(slurm.calls.read_text().splitlines())
    following = cluster.logs(record, rank=0, follow=True)
    threading.Timer(1.5, slurm, ("scontrol", shown("COMPLETED"))).start()
    assert list(following) == []
    assert len(slurm.calls.read_text().splitlines()) <= num_calls + 5


def test_python_is_the_one_that_submits():
    assert f" {sys.executable} -m modelparallel node " in script_of(CLUSTER.model_copy(update={"python": ""}))
