"""Jobs for Kubernetes with the real libraries: what is rendered is valid, and the official client submits, follows and
stops a job at an API server that writes everything down.
"""

import copy
import os
import sys
import threading
import time
from importlib.metadata import version

import pytest
import yaml
from packaging.version import Version

import kubernetes_cases as cases
from clusters.kubernetes_server import KubernetesServer
from clusters.libraries import folder_of
from modelparallel.errors import LaunchError
from modelparallel.launch.cluster_jobs import chosen_cluster
from modelparallel.launch.clusters.cluster import JobRecord
from modelparallel.launch.clusters.k8s import pod_logs
from modelparallel.launch.clusters.k8s.client import check_train_job
from modelparallel.launch.submitted import SubmittedJob, find_job, submit_job

CLIENT = ("kubernetes>=37", "kubeflow-trainer-api>=2.3", "kubernetes-validate==1.37.0")
FORMS = ("trainjob", "indexed-job")
PLURALS = {"trainjob": "trainjobs", "indexed-job": "jobs"}
#: As the controllers of both forms label the pods of nodes.
LABELS = {
    "trainjob": {"jobset.sigs.k8s.io/jobset-name": cases.NAME, "jobset.sigs.k8s.io/replicatedjob-name": "node"},
    "indexed-job": {"batch.kubernetes.io/job-name": cases.NAME},
}


@pytest.fixture(scope="module", autouse=True)
def client():
    if Version(version("pydantic")) < Version("2.14.2"):
        pytest.skip(f"the client of Kubernetes needs pydantic 2.14.2, and here is {version('pydantic')}")
    folder = str(folder_of(*CLIENT))
    sys.path.append(folder)  # behind the environment's own
    yield
    sys.path.remove(folder)


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr(pod_logs, "_LOOK_SECONDS", 0.1)
    monkeypatch.setattr(pod_logs, "_PAUSE_SECONDS", 0.1)
    with KubernetesServer().running() as server:
        server.write_kubeconfig(tmp_path / "kubeconfig")
        claim = {"metadata": {"name": "data"}, "spec": {"accessModes": ["ReadWriteMany"]}}
        server.put("persistentvolumeclaims", "team-a", claim)
        yield server


@pytest.fixture
def code(tmp_path):
    directory = tmp_path / "code"
    directory.mkdir()
    return cases.write_code(directory)


def cluster(form, **keys):
    return cases.cluster(cases.ROW | {"form": form}, **{"queue": "", **keys})


def objects():
    for case in cases.CASES:
        for made in yaml.safe_load_all((cases.GOLDEN / f"{case}.yaml").read_text()):
            yield pytest.param(made, id=f"{case}-{made['kind']}")


@pytest.mark.parametrize("made", list(objects()))
def test_what_is_rendered_is_valid(made):
    """By the schemas of Kubernetes, strictly, and by the models of the Trainer, compared with what goes in."""
    import kubernetes_validate

    if made["kind"] == "TrainJob":
        check_train_job(made)
        return
    for release in ("1.31", "1.33", "1.37"):
        assert kubernetes_validate.validate(made, release, strict=True) == release
    wrong = copy.deepcopy(made)
    wrong["metadata"]["lables"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.33", strict=True)


def test_what_the_trainer_does_not_know_is_found():
    *_, made = yaml.safe_load_all((cases.GOLDEN / "trainjob.yaml").read_text())
    for change, words in (
        (lambda job: job["spec"]["trainer"].update(numNode=2), r"does not know: \.spec\.trainer\.numNode$"),
        (lambda job: job["spec"]["trainer"].update(numNodes="two"), "valid integer"),
        (lambda job: job["spec"].pop("runtimeRef"), "runtimeRef"),
        (lambda job: job["spec"]["runtimePatches"][0].update(spec={}), r"runtimePatches\[0\]\.spec|^$"),
    ):
        changed = copy.deepcopy(made)
        change(changed)
        if words.endswith("|^$"):
            changed["spec"]["runtimePatches"][0]["spec"] = {"a": 1}
            words = words.removesuffix("|^$")
        with pytest.raises(LaunchError, match=words):
            check_train_job(changed)


@pytest.mark.parametrize("form", FORMS)
def test_submit_follow_and_stop(server, code, form):
    target, job = cluster(form), cases.job(code)
    submitted = submit_job(target, job)
    created = [
        (path.split("/")[-1], body["kind"], query) for method, path, query, body in server.requests if method == "POST"
    ]
    rendered, _ = cases.read_back(target.render(job))
    kinds = [made["kind"] for made in rendered]
    # First all of them on trial, then all of them, and none with a field that the server would drop.
    assert [(kind, query.get("dryRun")) for _, kind, query in created] == [(k, "All") for k in kinds] + [
        (k, None) for k in kinds
    ]
    assert all(query["fieldValidation"] == "Strict" for _, _, query in created)
    assert submitted.record.engine_id == f"team-a/{cases.NAME}"
    # What the server has is what a dry run shows.
    plurals = {"ConfigMap": "configmaps", "Service": "services", "TrainJob": "trainjobs", "Job": "jobs"}
    for made in rendered:
        kept = server.made(plurals[made["kind"]])[cases.NAME]
        assert {name: kept[name] for name in made if name != "metadata"} == {
            n: v for n, v in made.items() if n != "metadata"
        }
        assert kept["metadata"]["labels"] == made["metadata"]["labels"]

    # From another shell, by the record.
    found = find_job(f"k8s/{cases.NAME}")
    assert found.status().state == "pending"
    for index in (0, 1):
        server.add_pod(f"pod-{index}", LABELS[form], index)
    assert found.status().state == "running"
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(found.logs(follow=True)))
    server.break_logs_after = 2
    reader.start()
    server.log("pod-0", "[launcher] job begins", "[a rank 0] one", "[a rank 1] two")
    server.log("pod-1", "[b rank 8] other")
    wait_until(lambda: len(lines) >= 4, "four lines")
    server.log("pod-0", "[a rank 0] three")
    server.end_pod("pod-0")
    server.end_pod("pod-1")
    server.set_condition(PLURALS[form], cases.NAME, "Complete", "JobsCompleted", "jobset completed")
    reader.join(60)
    assert not reader.is_alive()
    assert [line for line in lines if "a rank" in line] == ["[a rank 0] one", "[a rank 1] two", "[a rank 0] three"]
    assert sorted(set(lines)) == sorted(lines) and "[node 0] job begins" in lines and "[b rank 8] other" in lines
    assert found.wait(timeout=60).exit_code == 0
    assert list(found.logs(rank=8)) == ["[b rank 8] other"] and len(list(found.logs(node=0))) == 4

    for options, words in (
        ({"rank": 16}, r"rank 16: .* has the ranks 0\.\.15"),
        ({"node": 2}, r"has the nodes 0\.\.1"),
    ):
        with pytest.raises(LaunchError, match=words):
            found.logs(**options)

    found.stop()
    assert server.requests[-1][0] == "DELETE" and server.requests[-1][2] == {"propagationPolicy": "Foreground"}
    # What was made for the job goes with it.
    assert {key[0] for key in server.objects} == {"persistentvolumeclaims", "pods"}
    assert found.status().state == "stopped"
    for ask in (found.stop, found.logs):
        with pytest.raises(LaunchError, match="not there any more"):
            ask()


def wait_until(happens, what, seconds=60):
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline, f"{what} did not come within {seconds} s"
        time.sleep(0.05)


@pytest.mark.parametrize("form", FORMS)
def test_a_failing_job(server, code, form):
    submitted = submit_job(cluster(form), cases.job(code))
    server.add_pod("pod-0", LABELS[form], 0)
    server.add_pod("pod-1", LABELS[form], 1)
    server.end_pod("pod-1", 137, reason="OOMKilled")
    server.set_condition(PLURALS[form], cases.NAME, "Failed", "BackoffLimitExceeded", "Job has reached its limit")
    status = submitted.status()
    assert (status.state, status.exit_code) == ("failed", 137)
    assert status.reason == "BackoffLimitExceeded: Job has reached its limit; node 1 exited with 137 (OOMKilled)"


def test_why_a_job_waits_is_read_from_events(server, code):
    submitted = submit_job(cluster("indexed-job", queue="gpu-queue"), cases.job(code))
    about = {"kind": "Workload", "name": f"job-{cases.NAME}-1a2b3"}
    message = "couldn't assign flavors to pod set main: insufficient unused quota for nvidia.com/gpu"
    server.put(
        "events",
        "team-a",
        {"metadata": {"name": "e"}, "involvedObject": about, "reason": "Pending", "message": message},
    )
    status = submitted.status()
    assert status.state == "pending" and status.reason == f"Suspended; Pending: {message}"


def test_nothing_is_made_if_one_object_is_refused(server, code):
    """On trial, by quota or admission; and if the trial was passed and the job is refused all the same."""
    words = 'admission webhook "validator.trainjob" denied the request: runtime not found'
    server.refuse("POST", "/trainjobs", 403, words)
    target = cluster("trainjob")
    with pytest.raises(LaunchError, match=rf"cannot create TrainJob team-a/{cases.NAME}: {words} \(HTTP 403\).*role"):
        submit_job(target, cases.job(code))
    assert not any(query.get("dryRun") != "All" for method, _, query, _ in server.requests if method == "POST")
    with pytest.raises(LaunchError, match="runtime not found"):
        target.submit(cases.job(code))
    assert set(server.objects) == {("persistentvolumeclaims", "team-a", "data")}


def test_a_name_that_is_taken(server, code):
    submit_job(cluster("trainjob"), cases.job(code))
    with pytest.raises(LaunchError, match=f"there is a job team-a/{cases.NAME} already: choose another name"):
        submit_job(cluster("trainjob"), cases.job(code))


def test_a_claim_that_is_not_there(server, code, caplog):
    row = {"volumes": [{"claim": "datta", "path": "/data"}]}
    with pytest.raises(LaunchError, match="there is no PersistentVolumeClaim team-a/datta: make it first"):
        submit_job(cluster("trainjob", **row), cases.job(code))
    server.objects["persistentvolumeclaims", "team-a", "data"]["spec"]["accessModes"] = ["ReadWriteOnce"]
    cluster("trainjob").check_access(cases.job(code))
    assert "claim data is ReadWriteOnce: pods on 2 machines cannot all mount it" in caplog.text
    server.refuse("GET", "/persistentvolumeclaims/data", 403, "forbidden")
    cluster("trainjob").check_access(cases.job(code))  # the pods will say


def test_code_is_uploaded_below_a_url(server, code):
    import fsspec

    submitted = submit_job(cluster("indexed-job", code="memory://store/code"), cases.job(code))
    assert fsspec.filesystem("memory").exists(f"/store/code/{cases.NAME}/sourcedir.tar.gz")
    assert "binaryData" not in server.made("configmaps")[cases.NAME]
    assert submitted.record.settings["code"] == "memory://store/code"
    with pytest.raises(LaunchError, match="cannot be uploaded to nosuch://b/"):
        cluster("indexed-job", code="nosuch://b").submit(cases.job(code, name="other"))
    assert "other" not in server.made("configmaps")


def test_a_job_that_was_submitted_elsewhere(server, code):
    submit_job(cluster("indexed-job"), cases.job(code))
    found = find_job(f"kubernetes:team-a/{cases.NAME}")
    assert isinstance(found, SubmittedJob) and found.status().state == "pending"
    server.add_pod("pod-0", LABELS["indexed-job"], 0)
    server.log("pod-0", "[a rank 0] one")
    assert list(found.logs()) == ["[a rank 0] one"]
    assert find_job(f"k8s:team-a/{cases.NAME}").record.engine_id == found.record.engine_id
    with pytest.raises(LaunchError, match="there is no TrainJob and no Job team-a/nothing"):
        find_job("kubernetes:team-a/nothing")


def test_the_job_is_found_where_it_was_sent(server, code, tmp_path):
    """The current context, and the namespace of a context, may be others by now."""
    submitted = submit_job(cases.cluster(cases.ROW | {"namespace": "", "form": "indexed-job"}), cases.job(code))
    assert isinstance(submitted.record, JobRecord) and submitted.record.settings["context"] == "test"
    config = yaml.safe_load((tmp_path / "kubeconfig").read_text())
    other = {"name": "other", "context": {"cluster": "c", "user": "u", "namespace": "elsewhere"}}
    config["contexts"].append(other)
    config["current-context"] = "other"
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    assert submitted.status().state == "pending"
    submitted.stop()
    assert cases.NAME not in server.made("jobs")


@pytest.mark.parametrize("what", ["no file", "no context", "no server", "no login"])
def test_a_cluster_that_cannot_be_reached(server, code, tmp_path, what, monkeypatch):
    target = cluster("trainjob")
    words = "there is no usable kubeconfig"
    if what == "no file":
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    elif what == "no context":
        target, words = cluster("trainjob", context="prod"), "context 'prod': the kubeconfig has test"
    else:
        config = yaml.safe_load((tmp_path / "kubeconfig").read_text())
        if what == "no server":
            config["clusters"][0]["cluster"]["server"] = "http://127.0.0.1:9"
            words = "the API server http://127.0.0.1:9 cannot be reached"
        else:
            config["users"][0]["user"]["token"] = "old"
            words = r"Unauthorized \(HTTP 401\): your credentials are not accepted"
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    with pytest.raises(LaunchError, match=words):
        target.check_access(cases.job(code))


def test_the_commands(server, code, tmp_path, monkeypatch):
    """As a user types them, each in a process of its own."""
    import subprocess

    row = {**cases.ROW, "form": "indexed-job", "queue": ""}
    lines = [f"{key} = {_toml(value)}" for key, value in row.items() if key != "volumes"]
    (tmp_path / "modelparallel.toml").write_text(
        "\n".join(["[clusters.k8s]", *lines, 'volumes = [{claim = "data", path = "/data"}]', ""])
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(folder_of(*CLIENT))]),
    }

    def command(*arguments, code=0):
        result = subprocess.run(
            [sys.executable, "-m", "modelparallel", *arguments],
            cwd=tmp_path,
            env=environment,
            text=True,
            capture_output=True,
            timeout=300,
        )
        assert result.returncode == code, result.stdout + result.stderr
        return result.stdout + result.stderr

    parameters = '{"pipeline_parallel_degree": 2, "microbatches": 2, "ddp": true}'
    submit = ("submit", "--cluster", "k8s", "--nodes", "2", "--parameters", parameters)
    dry = command(*submit, "--dry-run", "--name", "t1", str(code / "train.py"), "--epochs", "3")
    assert [made["kind"] for made in yaml.safe_load_all(dry)] == ["ConfigMap", "Service", "Job"]
    assert not server.requests
    address = command(*submit, "--name", "t1", str(code / "train.py")).splitlines()[-1]
    assert address == "k8s/t1" and "t1" in server.made("jobs")
    assert "already" in command(*submit, "--name", "t1", str(code / "train.py"), code=2)
    server.add_pod("pod-0", {"batch.kubernetes.io/job-name": "t1"}, 0)
    server.log("pod-0", "[a rank 0] one")
    server.end_pod("pod-0", 3)
    assert "pending" in command("status", address)
    assert command("logs", address) == "[a rank 0] one\n"
    server.set_condition("jobs", "t1", "Failed", "PodFailurePolicy", "exit code 3")
    output = command("attach", address, code=3)
    assert "[a rank 0] one" in output and "failed (PodFailurePolicy: exit code 3; node 0 exited with 3)" in output
    command("stop", address)
    assert "stopped" in command("status", address)


def _toml(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}" = {_toml(entry)}' for key, entry in value.items()) + "}"
    return repr(value) if isinstance(value, str) else str(value)


def test_the_estimator_finds_the_cluster(tmp_path, monkeypatch):
    (tmp_path / "modelparallel.toml").write_text('[clusters.k8s]\nkind = "kubernetes"\nimage = "mp:1"\n')
    monkeypatch.chdir(tmp_path)
    found = chosen_cluster(None, "kubernetes:k8s")
    assert found is not None and found.kind == "kubernetes" and found.title == "k8s"
