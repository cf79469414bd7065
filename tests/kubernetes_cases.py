"""Rows of a cluster file and jobs that the tests of Kubernetes share, and what is written down of their renderings."""

import base64
import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from modelparallel.launch.clusters.cluster import Rendered
from modelparallel.launch.clusters.cluster_file import make_cluster
from modelparallel.launch.clusters.description import ClusterJob, DataChannel
from modelparallel.launch.clusters.k8s.cluster import Kubernetes

GOLDEN = Path(__file__).parent / "data" / "kubernetes"
NAME = "train-2026-01-31-12-00-00-000"
ROW: dict[str, Any] = {
    "kind": "kubernetes",
    "namespace": "team-a",
    "image": "registry.example.com/mp:1",
    "image_pull_secret": "reg",
    "queue": "gpu-queue",
    "volumes": [{"claim": "data", "path": "/data"}],
    "shm": "64Gi",
    "resources": {"nvidia.com/gpu": 8, "memory": "200Gi"},
    "secrets": {"HF_TOKEN": "hf/token"},
}
#: All that a row can have, of what both forms take.
FULL_ROW: dict[str, Any] = ROW | {
    "python": "/opt/venv/bin/python",
    "setup": ["pip install --no-deps ./extra.whl"],
    "queue_priority": "high",
    "folder": "/data/jobs",
    "volumes": [
        {"claim": "data", "path": "/data", "sub_path": "team-a"},
        {"claim": "models", "path": "/models", "read_only": True},
        {"nfs": "nfs.example.com:/export", "path": "/shared"},
        {"scratch": "500Gi", "path": "/scratch"},
        {"config_map": "settings", "path": "/settings"},
        {"secret": "certificates", "path": "/certificates"},
        {"host_path": "/mnt/cache", "path": "/cache"},
    ],
    "requests": {"memory": "100Gi", "cpu": "16"},
    "peer_secret": "peers/secret",
    "env": {"NCCL_DEBUG": "WARN"},
    "node_selector": {"node.kubernetes.io/instance-type": "p4d.24xlarge"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}]
            }
        }
    },
    "service_account": "trainer",
    "labels": {"team": "a"},
    "annotations": {"example.com/cost-centre": "7"},
    "pod_labels": {"network": "fast"},
    "pod_annotations": {"sidecar.istio.io/inject": "false"},
    "pod_security_context": {"runAsUser": 1000, "fsGroup": 1000},
    "security_context": {"capabilities": {"add": ["IPC_LOCK"]}},
    "grace_seconds": 300,
}
INDEXED: dict[str, Any] = {"form": "indexed-job"}
#: And what only an Indexed Job takes.
FULL_INDEXED: dict[str, Any] = INDEXED | {
    "image_pull_policy": "Always",
    "priority_class": "research",
    "host_network": True,
    "ttl_seconds": 86400,
    "port": 23456,
}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "trainjob": (ROW, {}),
    "trainjob-full": (FULL_ROW, {"max_seconds": 3600.5, "max_restarts": 2}),
    "indexed-job": (ROW | INDEXED, {}),
    "indexed-job-full": (FULL_ROW | FULL_INDEXED, {"max_seconds": 3600.5, "max_restarts": 2}),
}


def cluster(row: Mapping[str, Any] = ROW, **keys: Any) -> Kubernetes:
    made = make_cluster("k8s", {**row, **keys}, "modelparallel.toml: [clusters.k8s]")
    assert isinstance(made, Kubernetes)
    return made


def job(directory: Path, **changes: Any) -> ClusterJob:
    """A job of two nodes with eight processes, whose code is in this directory."""
    fields: dict[str, Any] = {
        "name": NAME,
        "entry_point": "train.py",
        "source_dir": directory,
        "num_nodes": 2,
        "processes_per_node": 8,
        "arguments": ("--epochs", "3"),
        "hyperparameters": {"epochs": 3},
        "parameters": {"pipeline_parallel_degree": 2, "partitions": 2, "microbatches": 4, "ddp": True},
        "channels": {"train": DataChannel("/data/mnist"), "test": DataChannel("s3://bucket/test", "FastFile")},
        "environment": {"LEVEL": "1"},
        "secrets": {"WANDB_API_KEY": "wandb/key"},
    }
    return ClusterJob(**{**fields, **changes})


def write_code(directory: Path) -> Path:
    (directory / "train.py").write_text("print('training')\n")
    return directory


def rendered(case: str, directory: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The objects of a case, read back from its text, and the names in its archive."""
    row, changes = CASES[case]
    return read_back(cluster(row).render(job(write_code(directory), **changes)))


def read_back(rendering: Rendered) -> tuple[list[dict[str, Any]], list[str]]:
    (text,) = rendering.files.values()
    objects = list(yaml.safe_load_all(text))
    binary = objects[0].pop("binaryData", {})
    names: list[str] = []
    for content in binary.values():
        with tarfile.open(fileobj=io.BytesIO(base64.b64decode(content))) as archive:
            names = archive.getnames()
    return objects, names
