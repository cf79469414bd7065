"""Jobs for clusters, from what a user says to what is submitted, followed and stopped; the cluster is the tests'."""

import json
import logging
import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import pytest
from typer.testing import CliRunner

from modelparallel.errors import LaunchError, SMPConfigError
from modelparallel.launch import JobFailedError, PyTorch
from modelparallel.launch import submitted as following
from modelparallel.launch.cluster_jobs import chosen_cluster, cluster_channels
from modelparallel.launch.clusters import cluster_file
from modelparallel.launch.clusters.cluster import Cluster, JobRecord, JobStatus, Rendered
from modelparallel.launch.clusters.description import DataChannel, node_description
from modelparallel.launch.clusters.interrupts import engine_asked
from modelparallel.launch.command_line import app

PARAMETERS = {"pipeline_parallel_degree": 2, "microbatches": 2, "ddp": True}
DISTRIBUTION = {
    "smdistributed": {"modelparallel": {"enabled": True, "parameters": PARAMETERS}},
    "mpi": {"enabled": True, "processes_per_host": 4},
}


class Yard(Cluster):
    """A cluster whose engine is a list of the statuses that it will tell, one after another."""

    kind: ClassVar[str] = "yard"
    service_arguments: ClassVar[tuple[str, ...]] = ("volume_size",)
    told: ClassVar[list] = []
    lines: ClassVar[list] = []
    submitted: ClassVar[list] = []
    stopped: ClassVar[list] = []

    folder: str = ""
    devices: int | None = None

    @property
    def devices_per_node(self):
        return self.devices

    def check(self, job):
        if "_" in job.name:
            raise LaunchError(f"job name {job.name!r}: no '_'")

    def render(self, job):
        self.check(job)
        return Rendered({"job.json": node_description(job)}, command=("enter", job.name))

    def check_access(self, job):
        pass

    def submit(self, job):
        rendered = self.render(job)
        Yard.submitted.append(job)
        return JobRecord(
            job.name, self.title, self.kind, self.model_dump(), "7", self.folder, 1.0, rendered.digest(), "/m"
        )

    def status(self, record):
        return self.told.pop(0) if len(self.told) > 1 else self.told[0]

    def logs(self, record, *, rank=None, node=None, follow=False):
        yield from (line for line in self.lines if rank is None or line.startswith(f"[rank {rank}]"))

    def stop(self, record):
        Yard.stopped.append(record.engine_id)

    def adopt(self, engine_id):
        return JobRecord(f"job{engine_id}", "yard", "yard", {}, engine_id, "", 0.0, "")


@pytest.fixture
def yard(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("MODELPARALLEL_CLUSTERS", raising=False)
    real = cluster_file.kinds()
    monkeypatch.setattr(cluster_file, "kinds", lambda: {**real, "yard": Yard})
    monkeypatch.setattr(following, "kinds", lambda: {**real, "yard": Yard})
    monkeypatch.setattr(following, "POLL_SECONDS", 0.01)
    Yard.told, Yard.lines, Yard.submitted, Yard.stopped = [JobStatus("succeeded", exit_code=0)], [], [], []
    (tmp_path / "train.py").write_text("print('trained')\n")
    (tmp_path / "modelparallel.toml").write_text('[clusters.back]\nkind = "yard"\ndevices = 4\nfolder = "/shared"\n')
    return Yard


def command(*arguments):
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


def test_the_estimator_describes_the_job_as_the_launch_file_says(yard, caplog):
    job = PyTorch(
        "train.py",
        role="r",
        instance_type="ml.p4d.24xlarge",
        cluster="back",
        instance_count=2,
        distribution=DISTRIBUTION,
        hyperparameters={"epochs": 3},
        environment={"A": "b"},
        base_job_name="SMD_demo",
        checkpoint_s3_uri="s3://b/checkpoints",
        checkpoint_local_path="/opt/ml/checkpoints",
        output_path="s3://b/out",
        max_run=60,
        max_restarts=1,
        volume_size=30,
        secrets={"TOKEN": "env:TOKEN"},
    )
    with caplog.at_level(logging.INFO, "modelparallel.launch"):
        job.fit({"train": "data", "test": "s3://b/test"}, wait=False)
    made = Yard.submitted[0]
    assert (made.num_nodes, made.processes_per_node, made.num_processes) == (2, 4, 8)
    assert made.parameters["partitions"] == made.parameters["pipeline_parallel_degree"] == 2
    assert made.hyperparameters["epochs"] == 3 and made.hyperparameters["mp_parameters"] == made.parameters
    assert made.arguments[:2] == ("--epochs", "3") and "--mp_parameters" in made.arguments
    assert made.channels == {"train": DataChannel(str(Path.cwd() / "data")), "test": DataChannel("s3://b/test")}
    assert made.channels["test"].is_url and not made.channels["train"].is_url
    assert (made.checkpoints, made.output, made.max_seconds) == ("s3://b/checkpoints", "s3://b/out", 60)
    assert made.name.startswith("SMD-demo-") and len(made.name) <= 63
    assert made.service_options["checkpoint_local_path"] == "/opt/ml/checkpoints"
    assert "accepted without effect on back: checkpoint_local_path, role" in caplog.messages
    handle = job.latest_training_job
    assert handle.address == f"back/{made.name}" and job.model_data == "/m"
    assert handle.status().state == "succeeded"
    told = json.loads(node_description(made))
    assert told["secrets"] == {"TOKEN": "env:TOKEN"} and "source_dir" not in told and "service_options" not in told


def test_rendering_submits_nothing(yard):
    job = PyTorch("train.py", cluster="back", distribution=DISTRIBUTION)
    rendered = job.render(job_name="n1")
    assert "enter n1" in rendered.text() and '"processes_per_node": 4' in rendered.text()
    assert rendered.digest() == job.render(job_name="n1").digest() != job.render(job_name="n2").digest()
    assert not Yard.submitted and job.latest_training_job is None
    with pytest.raises(LaunchError, match="this machine is not submitted"):
        PyTorch("train.py").render()


def test_one_process_for_each_device(yard):
    for name in ("torch_distributed", "pytorchddp"):
        PyTorch("train.py", cluster="back", distribution={name: {"enabled": True}}, instance_count=3).fit()
        assert (Yard.submitted[-1].num_processes, Yard.submitted[-1].parameters) == (12, None)
    plain = {"torch_distributed": {"enabled": True}}
    PyTorch("train.py", cluster=Yard(), instance_type="ml.p4d.24xlarge", distribution=plain).fit()
    assert Yard.submitted[-1].num_processes == 8
    with pytest.raises(LaunchError, match="nobody says how many yard has"):
        PyTorch("train.py", cluster=Yard(), distribution=plain).fit()
    with pytest.raises(SMPConfigError, match="enabled must be True"):
        PyTorch("train.py", distribution={"torch_distributed": {"enabled": False}})
    with pytest.raises(SMPConfigError, match="8 processes on 4 devices"):
        eight = {**DISTRIBUTION, "mpi": {"enabled": True, "processes_per_host": 8}}
        PyTorch("train.py", cluster="back", distribution=eight).fit()


def test_where_a_job_runs(yard):
    assert chosen_cluster(None, "local") is None and chosen_cluster(None, None) is None
    assert chosen_cluster("back", "ml.p3.16xlarge").title == "back"
    assert chosen_cluster(None, "yard:back").folder == "/shared" and chosen_cluster(None, "back").devices == 4
    assert chosen_cluster(None, "yard").title == "yard"
    with pytest.raises(LaunchError, match=r"'bck'.*did you mean 'back'"):
        chosen_cluster("bck", None)
    with pytest.raises(LaunchError, match=r"'locl'.*did you mean 'local'"):
        chosen_cluster(None, "locl")
    with pytest.raises(LaunchError, match=r"cluster: expected a name"):
        chosen_cluster(3, None)
    Path("modelparallel.toml").write_text('[clusters.back]\nkind = "yard"\nfoldr = "/x"\n')
    with pytest.raises(SMPConfigError, match=r"\[clusters\.back\]: unknown key 'foldr': did you mean 'folder'"):
        chosen_cluster("back", None)
    Path("modelparallel.toml").write_text('[clusters.back]\nkind = "yrd"\n')
    with pytest.raises(SMPConfigError, match="did you mean 'yard'"):
        chosen_cluster("back", None)
    Path("modelparallel.toml").write_text('[clusters.back]\nkind = "yard"\ndevices = "many"\n')
    with pytest.raises(SMPConfigError, match=r"\[clusters\.back\]: devices: .*'many'"):
        chosen_cluster("back", None)
    with pytest.raises(LaunchError, match=r"nowhere\.toml is no file"):
        chosen_cluster("back", None, "nowhere.toml")


def test_channels_of_a_cluster(yard):
    class TrainingInput:
        def __init__(self, config):
            self.config = config

    cloud = TrainingInput({"DataSource": {"S3DataSource": {"S3Uri": "s3://b/x"}}, "InputMode": "FastFile"})
    assert cluster_channels({"train": cloud}) == {"train": DataChannel("s3://b/x", "FastFile")}
    assert cluster_channels("gs://b/x") == {"training": DataChannel("gs://b/x")}
    assert cluster_channels("file:///data")["training"].location == "/data"
    with pytest.raises(SMPConfigError, match="'Pipe' is not built"):
        cluster_channels("s3://b/x", "Pipe")
    with pytest.raises(LaunchError, match="names no location in S3"):
        cluster_channels({"train": TrainingInput({})})


def test_waiting_shows_states_and_output_and_ends_with_the_job(yard, capsys):
    Yard.told = [
        JobStatus("pending", "Resources"), JobStatus("pending", "Resources"), JobStatus("running"),
        JobStatus("succeeded", exit_code=0),
    ]  # fmt: skip
    Yard.lines = ["[rank 0] loss 1", "[rank 1] loss 2"]
    PyTorch("train.py", cluster="back").fit(job_name="j1")
    shown = capsys.readouterr().out
    for line in ("back/j1: pending (Resources)", "back/j1: running", "back/j1: succeeded", "[rank 1] loss 2"):
        assert shown.count(line) == 1, shown
    Yard.told = [JobStatus("failed", "OutOfMemory", 3)]
    job = PyTorch("train.py", cluster="back")
    with pytest.raises(JobFailedError, match="back/j2 failed: OutOfMemory") as caught:
        job.fit(job_name="j2", logs="None")
    assert caught.value.exit_code == 3 and "loss" not in capsys.readouterr().out
    Yard.told = [JobStatus("stopped")]
    with pytest.raises(JobFailedError) as caught:
        job.latest_training_job.wait()
    assert caught.value.exit_code == 143
    Yard.told = [JobStatus("running", "step 4")]
    with pytest.raises(LaunchError, match=r"has not ended within 0.05 s \(it is running: step 4\); it goes on"):
        job.latest_training_job.wait(0.05)
    Yard.told = [JobStatus("unknown", "no such job")]
    with pytest.raises(LaunchError, match="does not know how it ended: no such job"):
        job.latest_training_job.wait()


def test_an_interrupted_wait_leaves_the_job_alone(yard, capsys, monkeypatch):
    job = PyTorch("train.py", cluster="back")
    job.fit(job_name="j1")

    def interrupted(self, record):
        raise KeyboardInterrupt

    monkeypatch.setattr(Yard, "status", interrupted)
    with pytest.raises(KeyboardInterrupt):
        job.latest_training_job.wait()
    assert "goes on: `modelparallel attach back/j1`" in capsys.readouterr().out and not Yard.stopped
    code, _ = command("attach", "back/j1")
    assert code == 130 and not Yard.stopped


def test_the_commands(yard):
    given = ("--cluster", "back", "--nodes", "2", "--parameters", json.dumps(PARAMETERS), "--time", "1h")
    code, text = command("submit", *given, "--name", "j1", "--dry-run", "train.py", "--epochs", "3")
    assert code == 0 and "# enter j1" in text and '"3"' in text and not Yard.submitted
    code, text = command("submit", *given, "--name", "j1", "--env", "A=b=c", "train.py", "--epochs", "3")
    assert code == 0 and text.splitlines()[-1] == "back/j1"
    made = Yard.submitted[0]
    assert (made.num_processes, made.arguments, made.max_seconds) == (8, ("--epochs", "3"), 3600)
    assert made.environment == {"A": "b=c"}
    Yard.told = [JobStatus("failed", "NodeFail", 9, ("10:00 pending", "10:01 running"))]
    Yard.lines = ["[rank 0] a", "[rank 1] b"]
    for name in ("back/j1", "j1", "yard:7"):
        code, text = command("status", name)
        assert code == 0 and "failed, exit code 9 (NodeFail)" in text and "10:01 running" in text
    assert command("logs", "j1", "--rank", "1") == (0, "[rank 1] b\n")
    code, text = command("wait", "j1")
    assert code == 9 and "NodeFail" in text
    code, text = command("attach", "j1")
    assert code == 9 and "[rank 0] a" in text
    code, text = command("jobs")
    assert code == 0 and "back/j1" in text and "NodeFail" in text
    told = json.loads(command("jobs", "--json")[1])
    assert [(job["job"], job["state"], job["exit_code"]) for job in told] == [("back/j1", "failed", 9)]
    assert json.loads(command("status", "j1", "--json")[1]) == told[0]
    assert command("stop", "j1")[0] == 0 and Yard.stopped == ["7"]
    Yard.told = [JobStatus("running")]
    assert command("wait", "j1", "--timeout", "0.1")[0] == 124


def test_a_job_is_found_after_its_cluster_file_has_gone(yard):
    PyTorch("train.py", cluster="back").fit(job_name="j1")
    Path("modelparallel.toml").unlink()
    found = following.find_job("back/j1")
    assert found.record.folder == "/shared" and found.status().state == "succeeded"
    attached = PyTorch.attach("back/j1")
    assert attached.latest_training_job.name == "j1"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--cluster", "bck", "train.py"), "did you mean 'back'"),
        (("--cluster", "back", "missing.py"), "missing.py does not exist"),
        (("--cluster", "yard", "train.py"), "--nproc is missing"),
        (("--cluster", "back", "--name", "a_b", "train.py"), "job name 'a_b'"),
        (("--cluster", "back", "--env", "A", "train.py"), "--env: expected NAME=VALUE, got 'A'"),
        (("--cluster", "back", "--time", "soon", "train.py"), "soon"),
        (("--cluster", "back", "--nproc", "3", "--parameters", json.dumps(PARAMETERS), "train.py"), "3"),
        (("--cluster", "back", "--channel", "x", "train.py"), "expected NAME="),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_submitted(yard, arguments, text):
    code, output = command("submit", *arguments)
    assert code == 2 and text in output, output
    assert not Yard.submitted and not (Path.cwd() / "state").exists()


def test_unknown_jobs(yard):
    PyTorch("train.py", cluster="back").fit(job_name="j1")
    for name in ("back/j2", "j2"):
        code, text = command("status", name)
        assert code == 2 and "j2" in text
    with pytest.raises(LaunchError):
        PyTorch.attach("nobody/j1")


def test_the_code_of_a_repository(yard, tmp_path):
    repository = tmp_path / "repository"
    (repository / "code").mkdir(parents=True)
    (repository / "code" / "train.py").write_text("print('of the repository')\n")
    (repository / "extra.py").write_text("")
    for arguments in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "1"],
    ):
        subprocess.run(["git", "-C", repository, *arguments], check=True)
    given = {"git_config": {"repo": str(repository)}, "source_dir": "code", "dependencies": ["extra.py"]}
    rendered = PyTorch("train.py", cluster="back", **given).render()
    assert '"entry_point": "train.py"' in rendered.text()
    PyTorch("train.py", cluster="back", **given).fit()
    made = Yard.submitted[0]
    assert made.source_dir.name == "code" and [path.name for path in made.dependencies] == ["extra.py"]
    assert tmp_path not in made.source_dir.parents and "git_config" not in made.service_options
    with pytest.raises(LaunchError, match=r"dependencies: expected a list of paths, got 'extra\.py'"):
        PyTorch("train.py", cluster="back", **{**given, "dependencies": "extra.py"}).fit()
    with pytest.raises(LaunchError, match="leads out of the repository"):
        PyTorch("train.py", cluster="back", **{**given, "source_dir": ".."}).fit()
    with pytest.raises(LaunchError, match=r"missing\.py does not exist"):
        PyTorch("missing.py", cluster="back", **given).fit()
    assert len(Yard.submitted) == 1


def test_a_job_whose_record_cannot_be_written_is_submitted_all_the_same(yard, caplog, tmp_path):
    (tmp_path / "state").write_text("")
    estimator = PyTorch("train.py", cluster="back")
    estimator.fit(job_name="j1", wait=False)
    assert estimator.latest_training_job.address == "yard:7"
    assert "was submitted (yard: 7)" in caplog.text and "attach yard:7" in caplog.text


def test_an_interruption_leaves_no_job_without_a_record(yard, caplog, monkeypatch):
    real = Yard.submit

    def before(self, job):
        signal.raise_signal(signal.SIGINT)
        return real(self, job)

    def while_asked(self, job):
        with engine_asked():
            signal.raise_signal(signal.SIGINT)
            return real(self, job)

    def refused(self, job):
        with suppress(LaunchError), engine_asked():
            raise LaunchError("no")
        signal.raise_signal(signal.SIGINT)

    for submit, count in ((before, 0), (refused, 0), (while_asked, 1)):
        monkeypatch.setattr(Yard, "submit", submit)
        with pytest.raises(KeyboardInterrupt):
            PyTorch("train.py", cluster="back").fit(job_name="j1")
        assert len(Yard.submitted) == count
    assert following.find_job("back/j1").record.engine_id == "7"
    assert "`modelparallel stop back/j1` ends it" in caplog.text
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interruption_does_not_wait(yard, monkeypatch):
    def submit(self, job):
        with engine_asked():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Yard, "submit", submit)
    with pytest.raises(KeyboardInterrupt):
        PyTorch("train.py", cluster="back").fit(job_name="j1")


def test_the_name_of_a_job_that_runs_is_in_use_whatever_its_cluster_is_now(yard):
    Yard.told = [JobStatus("running")]
    PyTorch("train.py", cluster="back").fit(job_name="j1", wait=False)
    with pytest.raises(LaunchError, match=r"job name 'j1' is in use: back/j1 \(7\) was submitted from here and is run"):
        PyTorch("train.py", cluster=Yard(name="back", folder="/other")).fit(job_name="j1", wait=False)
    Yard.told = [JobStatus("succeeded")]
    PyTorch("train.py", cluster="back").fit(job_name="j1", wait=False)
    assert len(Yard.submitted) == 2


@pytest.mark.parametrize("entry_point", ["../other.py", "/ABS/other.py"])
def test_a_script_outside_the_code_is_an_error(yard, tmp_path, entry_point):
    (tmp_path / "code").mkdir()
    (tmp_path / "other.py").write_text("")
    estimator = PyTorch(entry_point.replace("/ABS", str(tmp_path)), source_dir="code", cluster="back")
    with pytest.raises(LaunchError, match=r"other\.py is not below source_dir .*/code: only that directory is sent"):
        estimator.render()


def test_an_engine_that_is_silent_for_a_while_does_not_end_the_wait(yard, capsys, monkeypatch):
    answers = [JobStatus("running"), LaunchError("slurmctld is down"), LaunchError("slurmctld is down")]

    def status(self, record):
        answer = answers.pop(0) if answers else JobStatus("succeeded")
        if isinstance(answer, LaunchError):
            raise answer
        return answer

    monkeypatch.setattr(Yard, "status", status)
    estimator = PyTorch("train.py", cluster="back")
    estimator.fit(job_name="j1")
    assert capsys.readouterr().out.count("is asked again: slurmctld is down") == 1 and not answers
    answers += [JobStatus("running"), *[LaunchError("gone")] * 3]
    monkeypatch.setattr(following, "SILENT_SECONDS", 0.0)
    with pytest.raises(LaunchError, match="gone"):
        estimator.latest_training_job.wait()
    answers[:] = [JobStatus("unknown", "forgotten")]
    assert command("wait", "j1", "--timeout", "60")[0] == 2


def test_nothing_is_shown_after_an_interrupted_wait(yard, capsys, monkeypatch):
    goes_on, is_over = threading.Event(), threading.Event()

    def logs(self, record, *, rank=None, node=None, follow=False):
        yield "first"
        goes_on.wait(60)
        yield "late"
        is_over.set()

    def status(self, record):
        raise KeyboardInterrupt

    monkeypatch.setattr(Yard, "logs", logs)
    monkeypatch.setattr(Yard, "status", status)
    with pytest.raises(KeyboardInterrupt):
        following.find_job("yard:7").wait(logs=True)
    goes_on.set()
    for thread in threading.enumerate():
        if thread.name.startswith("logs-"):
            thread.join(60)
    text = capsys.readouterr().out
    assert "late" not in text and not is_over.is_set()
    assert "`modelparallel attach yard:7` comes back" in text  # not yard/job7, of which there is no record


def test_many_jobs_of_a_cluster_that_does_not_answer(yard, monkeypatch):
    names = [f"job-with-a-long-name-of-its-own-{number}-2026-01-31-12-00-00-000" for number in range(40)]
    for name in names:
        PyTorch("train.py", cluster="back").fit(job_name=name, wait=False)
    Yard.told = [JobStatus("failed", "[rank 3] [/tmp] no\nmore")]
    text = command("jobs")[1]
    assert all(f"back/{name} " in text for name in names) and text.count("[rank 3] [/tmp] no\\nmore") == 40
    asked = []

    def status(self, record):
        asked.append(record.name)
        raise LaunchError("no answer")

    monkeypatch.setattr(Yard, "status", status)
    told = json.loads(command("jobs", "--json")[1])
    assert sorted(job["job"] for job in told) == sorted(f"back/{name}" for name in names)
    assert {(job["state"], job["reason"]) for job in told} == {("unknown", "no answer")} and len(asked) <= 8


def test_what_only_a_local_job_knows_is_named(yard, caplog):
    with caplog.at_level(logging.INFO, "modelparallel.launch"):
        PyTorch("train.py", cluster="back", job_dir="x", backend="mpi").fit(job_name="j1")
    assert "accepted without effect on back: backend, job_dir" in caplog.text
    with pytest.raises(LaunchError, match="device 'gpu': expected auto, cpu or cuda"):
        PyTorch("train.py", cluster="back", device="gpu").render()
    assert command("submit", "--cluster", "back", "--device", "cpu", "--name", "j2", "train.py")[0] == 0
    assert Yard.submitted[-1].device == "cpu"


def test_names_of_clusters_stand_in_addresses(yard):
    Path("modelparallel.toml").write_text('[clusters."a/b"]\nkind = "yard"\n')
    with pytest.raises(SMPConfigError, match=r"'a/b'.*letters, digits"):
        chosen_cluster("a/b", None)
