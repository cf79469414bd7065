"""The files of examples/clusters, each read by the library of its engine; and a job on a Ray cluster of two nodes."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

import kubernetes_cases as cases
from clusters.libraries import folder_of, python_of
from clusters.runs import PATIENCE, SCRIPT, check_losses
from clusters.test_kubernetes_api import client
from modelparallel.launch.clusters.cluster_file import read_clusters
from modelparallel.launch.clusters.k8s.client import differences
from modelparallel.launch.clusters.k8s.cluster import Kubernetes
from scripts import ROOT

__all__ = ["client"]

EXAMPLES = ROOT / "examples" / "clusters"
DSTACK = """
import sys, yaml
from dstack._internal.core.models.configurations import parse_run_configuration
task = parse_run_configuration(yaml.safe_load(open(sys.argv[1])))
assert type(task).__name__ == "TaskConfiguration" and task.nodes == 2, task
assert (task.resources.gpu.name, task.resources.gpu.count.min) == (["A100"], 8), task.resources
print(task.commands[-1])
"""
SKYPILOT = """
import sys, sky
task = sky.Task.from_yaml(sys.argv[1])
(resources,) = task.resources
assert task.num_nodes == 2 and resources.accelerators == {"A100": 8}, task
print(task.run)
"""
RAY = """
import os, runpy, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
os.environ["RAY_ADDRESS"] = cluster.address
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def printed(python, source, *arguments):
    """What a program prints that is given as text, in an environment without the tests' own packages."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-c", source, *map(str, arguments)]
    result = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("file", "requirement", "source"),
    [("dstack.yml", "dstack==0.22.5", DSTACK), ("skypilot.yaml", "skypilot==0.14.1", SKYPILOT)],
)
def test_a_task_is_one_of_its_engine(file, requirement, source):
    command = printed(python_of(requirement), source, EXAMPLES / file)
    assert command.startswith("modelparallel run --nnodes auto") and "train.py" in command


@pytest.fixture
def short():
    """A folder with a short name: Ray's sockets are in it."""
    with tempfile.TemporaryDirectory(prefix="modelparallel-ray-", ignore_cleanup_errors=True) as folder:
        yield folder


def test_a_job_on_ray(tmp_path, short):
    """Two nodes of Ray on this machine, a launcher on each: the losses of one process, and a failure's exit code."""
    folder = folder_of("ray==2.60.0")
    shutil.copy(SCRIPT, tmp_path / "train.py")
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), str(folder)]),
        "RAY_DEDUP_LOGS": "0",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(short),
    }
    for name in ("RAY_ADDRESS", "GLOO_SOCKET_IFNAME"):
        environ.pop(name, None)
    command = [
        sys.executable,
        "-c",
        RAY,
        EXAMPLES / "ray_job.py",
        "--nodes",
        "2",
        "--",
        "--device",
        "cpu",
        "--nproc",
        "1",
    ]
    command += ["--parameters", '{"pipeline_parallel_degree": 2, "microbatches": 2}', "train.py", "--pp", "2"]
    for more, code in (([], 0), (["--fail", "1:1"], 1)):
        # In a session of its own: Ray leaves processes when its driver ends.
        process = subprocess.Popen(
            [*command, *more],
            cwd=tmp_path,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            text, _ = process.communicate(timeout=PATIENCE)
        finally:
            end_session(process.pid)
        assert process.returncode == code, text
        if code:
            assert "ValueError: deliberate failure of the script" in text, text
        else:
            check_losses(text)


def end_session(session):
    """End what is left of a session that the test began."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) == session:
                    os.kill(int(entry.name), signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass


def objects_of(name):
    return list(yaml.safe_load_all((EXAMPLES / "kubernetes" / name).read_text()))


def test_manifests_of_an_administrator_are_valid(client):
    import kubernetes_validate
    from kubeflow_trainer_api.models.trainer_v1alpha1_training_runtime import TrainerV1alpha1TrainingRuntime

    for made in objects_of("objects.yaml"):
        assert kubernetes_validate.validate(made, "1.33", strict=True) == "1.33"
    (runtime,) = objects_of("training-runtime.yaml")
    parsed = TrainerV1alpha1TrainingRuntime.from_dict(runtime)
    assert list(differences(runtime, parsed.to_dict())) == []


def test_a_pytorch_job_has_pods_that_are_valid(client):
    """Its own type is in no library of today; its pods are those of Kubernetes."""
    import kubernetes_validate

    (made,) = objects_of("pytorchjob.yaml")
    replicas = made["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"}
    for replica in replicas.values():
        template = replica["template"]
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": template["metadata"], "spec": template["spec"]}
        kubernetes_validate.validate(pod, "1.33", strict=True)
        (container,) = template["spec"]["containers"]
        assert container["command"][:4] == ["modelparallel", "run", "--nnodes", "auto"]


def test_the_cluster_of_the_example_can_be_submitted_to(tmp_path):
    cluster = read_clusters(EXAMPLES / "kubernetes" / "modelparallel.toml")["k8s"]
    assert isinstance(cluster, Kubernetes)
    job = cases.job(cases.write_code(tmp_path), channels={})
    objects, _ = cases.read_back(cluster.render(job))
    (runtime,) = objects_of("training-runtime.yaml")
    reference = objects[-1]["spec"]["runtimeRef"]
    assert (reference["kind"], reference["name"]) == (runtime["kind"], runtime["metadata"]["name"])
    claims = {
        made["metadata"]["name"] for made in objects_of("objects.yaml") if made["kind"] == "PersistentVolumeClaim"
    }
    assert {volume.claim for volume in cluster.volumes} == claims
