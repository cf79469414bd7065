"""Jobs for Kubernetes: what is rendered, and what is refused before anything is sent. Nothing here needs a cluster, or
the client; tests/clusters/test_kubernetes_api.py has what does.
"""

import json
import re
import sys

import pytest
import yaml

import kubernetes_cases as cases
from modelparallel.errors import LaunchError, SMPConfigError
from modelparallel.launch.clusters.cluster_file import read_clusters
from modelparallel.launch.clusters.description import DataChannel
from modelparallel.launch.clusters.k8s import names
from modelparallel.launch.clusters.k8s.cluster import Kubernetes
from modelparallel.launch.clusters.k8s.manifests import yaml_text

TRAIN_JOB, INDEXED_JOB = cases.ROW, cases.ROW | cases.INDEXED


@pytest.fixture
def code(tmp_path):
    return cases.write_code(tmp_path)


@pytest.mark.parametrize("case", cases.CASES)
def test_rendering_is_as_written_down(case, tmp_path):
    objects, packed = cases.rendered(case, tmp_path)
    version = json.loads(objects[0]["data"]["job.json"])["version"]
    text = yaml_text(objects).replace(f'"version": "{version}"', '"version": "VERSION"')
    assert packed == ["train.py"]
    assert text == (cases.GOLDEN / f"{case}.yaml").read_text()


def test_dry_run_is_what_kubectl_reads(code):
    """All that is printed is one YAML stream, comments included, and the same job gives the same digest."""
    rendering = cases.cluster().render(cases.job(code))
    kinds = [made["kind"] for made in yaml.safe_load_all(rendering.text())]
    assert kinds == ["ConfigMap", "TrainJob"]
    again = cases.cluster().render(cases.job(code))
    assert rendering.digest() == again.digest()
    (code / "train.py").write_text("print('other')\n")
    assert rendering.digest() != cases.cluster().render(cases.job(code)).digest()


def test_rendering_needs_no_client(code, monkeypatch):
    for library in ("kubernetes", "kubeflow_trainer_api"):
        monkeypatch.setitem(sys.modules, library, None)
    cluster = cases.cluster()
    cluster.render(cases.job(code))
    with pytest.raises(LaunchError, match=r"pip install 'modelparallel\[k8s\]'"):
        cluster.check_access(cases.job(code))


def test_a_secret_is_only_referred_to(code, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789-the-value")
    text = cases.cluster().render(cases.job(code)).text()
    assert "0123456789-the-value" not in text
    environment = trainer_of(text)["env"]
    reference = {"secretKeyRef": {"name": "wandb", "key": "key"}}
    assert {"name": "WANDB_API_KEY", "valueFrom": reference} in environment
    # What the node command fetches itself is no business of the cluster.
    fetched = cases.job(code, secrets={"A": "aws-secretsmanager:arn:aws:secretsmanager:eu-west-1:1:secret:a"})
    assert "A" not in [entry["name"] for entry in trainer_of(cases.cluster().render(fetched).text())["env"]]


def trainer_of(text):
    *_, made = yaml.safe_load_all(text)
    return made["spec"]["trainer"]


def container_of(rendering):
    objects, _ = cases.read_back(rendering)
    (container,) = objects[-1]["spec"]["template"]["spec"]["containers"]
    return container


def test_code_that_is_not_packed(code):
    """An absolute path is where the code is; below a URL it will be uploaded, and each node fetches it."""
    for key, told in (("/workspace/code", "/workspace/code"), ("s3://b/c/", f"s3://b/c/{cases.NAME}/sourcedir.tar.gz")):
        objects, packed = cases.read_back(cases.cluster(code=key).render(cases.job(code)))
        assert packed == [] and json.loads(objects[0]["data"]["job.json"])["code"] == told


def test_code_that_is_too_large_for_a_config_map(code):
    (code / "weights.bin").write_bytes(bytes(range(256)) * 10)
    cases.cluster().render(cases.job(code))
    import random

    (code / "weights.bin").write_bytes(random.Random(0).randbytes(1 << 20))
    with pytest.raises(LaunchError, match=r"10\d\d KiB packed, and a ConfigMap takes 900.*modelparallelignore.*a URL"):
        cases.cluster().render(cases.job(code))
    cases.cluster(code="s3://bucket/code").render(cases.job(code))
    (code / ".modelparallelignore").write_text("*.bin\n")
    cases.cluster().render(cases.job(code))


def test_devices_of_the_instance_type_of_a_cloud_launch_file(code):
    row = INDEXED_JOB | {"resources": {"memory": "200Gi"}}
    for instance, device, expected in (
        ("ml.p4d.24xlarge", "auto", "8"),
        ("ml.p4d.24xlarge", "cpu", None),
        ("ml.m5.large", "auto", None),
        (None, "auto", None),
    ):
        job = cases.job(code, instance_type=instance, device=device)
        limits = container_of(cases.cluster(row).render(job))["resources"]["limits"]
        assert limits.get("nvidia.com/gpu") == expected, (instance, device)


def test_shared_memory(code):
    def mounts_of(**keys):
        objects, _ = cases.read_back(cases.cluster(INDEXED_JOB | {"shm": ""} | keys).render(cases.job(code)))
        pod = objects[-1]["spec"]["template"]["spec"]
        volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
        return [volumes[m["name"]] for m in pod["containers"][0]["volumeMounts"] if m["mountPath"] == "/dev/shm"]

    assert mounts_of() == [{"emptyDir": {"medium": "Memory"}}]
    assert mounts_of(shm="1Gi") == [{"emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}]
    own = {"claim": "data", "path": "/data"}, {"scratch": "2Gi", "path": "/dev/shm"}
    assert mounts_of(volumes=own) == [{"emptyDir": {"sizeLimit": "2Gi"}}]


def test_names_that_are_made(code):
    import datetime

    now = datetime.datetime(2026, 1, 31, 12, 0, 0)
    cluster = cases.cluster()
    assert cluster.new_name("Train_MNIST.v2", now) == "train-mnist-v2-2026-01-31-12-00-00-000"
    for base in ("3d-conv", "x" * 100, "___", "9" * 100):
        name = cluster.new_name(base, now)
        cluster.check(cases.job(code, name=name))
        assert name[0].isalpha() and len(name) <= cluster.max_name_length


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "Train_1"}, "lower-case letters.*for example 'train-1'"),
        ({"name": "1-train"}, "a letter first.*for example 'train'"),
        ({"name": "t" * 46}, "46 characters: at most 45"),
        ({"processes_per_node": 16}, "16 processes on a node with 8 devices"),
        ({"parameters": {"pipeline_parallel_degree": 3, "partitions": 3, "ddp": True}}, "16"),
        ({"secrets": {"TOKEN": "env:TOKEN"}}, "secret TOKEN: 'env:TOKEN': on Kubernetes a secret is given as NAME/KEY"),
        ({"secrets": {"TOKEN": "hf"}}, "NAME/KEY"),
        ({"secrets": {"LEVEL": "a/b"}}, "LEVEL"),
        ({"environment": {"HF_TOKEN": "x"}}, "HF_TOKEN"),
        ({"environment": {"HF_HOME": "hf_0123456789"}}, "HF_HOME looks like a secret"),
        ({"channels": {"train": DataChannel("/home/me/mnist")}}, "channel 'train': /home/me/mnist is a path of this"),
        ({"channels": {"train": DataChannel("/database")}}, "/database is a path of this machine"),
        ({"checkpoints": "/scratch/ck"}, "checkpoints: /scratch/ck is a path.*add a volume, or give a URL"),
        ({"output": "file:///tmp/out"}, "output: /tmp/out is a path"),
        ({"max_seconds": 0.5}, "1 s or more"),
        ({"service_options": {"image_uri": "https://registry/x"}}, "image 'https://registry/x': expected the name of"),
    ],
)
def test_what_is_wrong_with_a_job(code, changes, words):
    with pytest.raises((LaunchError, SMPConfigError), match=words):
        cases.cluster().check(cases.job(code, **changes))
    with pytest.raises((LaunchError, SMPConfigError), match=words):
        cases.cluster().render(cases.job(code, **changes))


def test_what_a_job_may_name(code):
    row = cases.ROW | {
        "volumes": [{"claim": "data", "path": "/data"}, {"claim": "models", "path": "/models", "read_only": True}],
        "image_paths": ["/opt/data"],
    }
    channels = {"a": DataChannel("/models/x"), "b": DataChannel("/opt/data"), "c": DataChannel("file:///data")}
    cases.cluster(row).check(cases.job(code, channels=channels, checkpoints="/data/ck", output="s3://b/out"))
    for place in ("/models/ck", "/opt/data/ck"):
        with pytest.raises(LaunchError, match=r"only what volumes mount \(/data\)"):
            cases.cluster(row).check(cases.job(code, checkpoints=place))
    shared = {"ddp": True, "ddp_dist_backend": "gloo"}
    cases.cluster().check(cases.job(code, processes_per_node=16, parameters=shared))


def test_where_the_image_comes_from(code):
    job = cases.job(code)
    for row in (TRAIN_JOB, INDEXED_JOB):
        with pytest.raises(LaunchError, match="image is missing"):
            cases.cluster(row | {"image": ""}).check(job)
    # A runtime of one's own has an image; a stock one can be made to do.
    assert "image" not in trainer_of(cases.cluster(image="", runtime="mp").render(job).text())
    assert "image" not in trainer_of(cases.cluster(image="", setup=["pip install modelparallel"]).render(job).text())
    given = cases.job(code, service_options={"image_uri": "other:2"})
    assert trainer_of(cases.cluster().render(given).text())["image"] == "other:2"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"namespac": "a"}, "unknown key 'namespac': did you mean 'namespace'"),
        ({"namespace": "Team_A"}, r"namespace: .*'Team_A': expected lower-case.*for example 'team-a'"),
        ({"form": "mpijob"}, "form"),
        ({"image": "Registry.example.com/MP:1"}, "image: .*lower case"),
        ({"queue": "gpu queue"}, "queue: .*'gpu queue'"),
        ({"volumes": [{"path": "/data"}]}, r"volumes\.0: .*expected one of claim"),
        ({"volumes": [{"path": "/data", "claim": "a", "scratch": "1Gi"}]}, r"\['claim', 'scratch'\]"),
        ({"volumes": [{"path": "data", "claim": "a"}]}, "absolute path"),
        ({"volumes": [{"path": "/data", "claim": "Data"}]}, "for example 'data'"),
        ({"volumes": [{"path": "/data", "claim": "a", "readonly": True}]}, "readonly"),
        ({"volumes": [{"path": "/data", "claim": "a"}, {"path": "/data/", "claim": "b"}]}, "/data is mounted twice"),
        ({"volumes": [{"path": "/dev/shm", "claim": "a"}]}, "/dev/shm is mounted twice"),
        ({"volumes": [{"path": "/etc/modelparallel", "claim": "a"}]}, "mounted twice"),
        ({"volumes": [{"path": "/data", "nfs": "/export"}]}, "expected server:/path"),
        ({"folder": "/jobs"}, "folder: .*on no volume that keeps"),
        ({"shm": "64gb"}, "shm: .*did you mean '64Gi'"),
        ({"shm": "300Gi"}, "shm: 300Gi is more than the container's memory, 200Gi"),
        ({"resources": {"memory": "200m"}}, "memory: '200m' is 0.2 bytes: give a unit"),
        ({"resources": {"nvidia.com/gpu": "7500m"}}, "nvidia.com/gpu: '7500m': expected a whole number"),
        ({"resources": {"memory": "8 GB"}}, "did you mean '8Gi'"),
        ({"requests": {"memory": "1Ti"}}, "requests memory: 1Ti is more than resources memory: 200Gi"),
        ({"secrets": {"HF_TOKEN": "token"}}, "secrets: HF_TOKEN: 'token': on Kubernetes"),
        ({"secrets": {"HF-TOKEN": "hf/token"}}, "'HF-TOKEN': expected the name of a variable"),
        ({"env": {"WANDB_API_KEY": "x"}}, "env: WANDB_API_KEY looks like a secret"),
        ({"env": {"PET_NNODES": "3"}}, "the Trainer sets PET_"),
        ({"labels": {"team": "a b"}}, "labels: team: 'a b'"),
        ({"labels": {"-team": "a"}}, "labels: '-team'"),
        ({"tolerations": [{"operator": "Exists", "value": "x"}]}, "takes no value"),
        ({"tolerations": [{"value": "x"}]}, "without a key"),
        ({"priority_class": "high"}, "a TrainJob cannot set it: it belongs into the runtime 'torch-distributed'"),
        ({"host_network": True}, "a TrainJob cannot set it"),
        ({"image_pull_policy": "Always"}, "a TrainJob cannot set it"),
        ({"port": 80}, "port"),
        ({"grace_seconds": -1}, "grace_seconds"),
    ],
)
def test_what_is_wrong_in_a_row(keys, words):
    with pytest.raises(SMPConfigError, match=rf"modelparallel\.toml: \[clusters\.k8s\]: (?s:.*){words}"):
        cases.cluster(**keys)


def test_a_row_of_the_file(tmp_path, code):
    path = tmp_path / "modelparallel.toml"
    path.write_text(
        """
        [clusters.k8s]
        kind = "kubernetes"
        namespace = "team-a"
        form = "indexed-job"
        image = "registry.example.com/mp:1"
        queue = "gpu-queue"
        shm = "64Gi"
        resources = {"nvidia.com/gpu" = 8, cpu = 1.5}
        secrets = {HF_TOKEN = "hf/token"}

        [[clusters.k8s.volumes]]
        claim = "data"
        path = "/data"
        """
    )
    cluster = read_clusters(path)["k8s"]
    assert isinstance(cluster, Kubernetes)
    assert cluster.devices_per_node == 8 and cluster.volumes[0].claim == "data"
    assert container_of(cluster.render(cases.job(code)))["resources"] == {
        "limits": {"nvidia.com/gpu": "8", "cpu": "1.5"}
    }
    # As a record keeps it, and reads it again.
    settings = json.loads(json.dumps(cluster.model_dump(mode="json", exclude_defaults=True)))
    again = cases.cluster({"kind": "kubernetes"}, **settings)
    assert again.render(cases.job(code)).digest() == cluster.render(cases.job(code)).digest()


def test_quantities_are_those_of_kubernetes():
    for text, value in (
        ("64Gi", 64 << 30),
        ("1k", 1000),
        ("0.5", 0.5),
        ("1e3", 1000),
        ("250m", 0.25),
        (8, 8),
        (".5G", 5e8),
    ):
        assert names.quantity(text, "x") == value
    for text in ("", "64GB", "64K", "-1", "1 Gi", "Gi", True, "1e", "1_000"):
        with pytest.raises(ValueError, match="expected a number"):
            names.quantity(text, "x")


def test_images_are_those_of_registries():
    digest = "sha256:" + "0" * 64
    for image in ("a", "team/a:1", "r.example.com:5000/t/a-b__c:v1.2_x", f"localhost/a@{digest}", f"a:1@{digest}"):
        assert names.check_image(image, "image") == image
    for image in ("A", "a b", "http://r/a", "a:", "r.example.com/", "a@sha256:1", "a:b:c", "team/A:1"):
        with pytest.raises(ValueError, match=re.escape(repr(image))):
            names.check_image(image, "image")
