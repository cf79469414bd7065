"""What the launch files of examples/mnist become on each kind of cluster, written into docs/clusters.md.

    python docs/render_clusters.py

The launch files are loaded, and their estimators asked with another `cluster`; nothing is sent. A test compares.
"""

import re
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from modelparallel.launch import Cluster, PyTorch
from modelparallel.launch.clusters.cluster_file import make_cluster

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "clusters.md"
LAUNCH_FILES = ("launch_tensor_parallel", "launch_tensor_pipeline_parallel")
START, END = "<!-- docs/render_clusters.py writes from here", "<!-- to here -->"
_IMAGE = "123456789012.dkr.ecr.us-west-2.amazonaws.com/training:1"
_ROLE = "arn:aws:iam::123456789012:role/training"
#: Title, row of the cluster file, further arguments of the estimator, location of the data.
CLUSTERS: tuple[tuple[str, dict[str, Any], dict[str, Any], str], ...] = (
    (
        "Slurm",
        {"kind": "slurm", "partition": "gpu", "gpus_per_node": 8, "cpus_per_node": 96, "time": "4h",
         "folder": "/shared/jobs", "python": "/shared/env/bin/python"},
        {"instance_type": "local"},
        "/shared/data",
    ),
    (
        "SageMaker",
        {"kind": "sagemaker", "region": "us-west-2", "bucket": "s3://bucket"},
        {"instance_type": "ml.p3.16xlarge", "role": _ROLE, "image_uri": _IMAGE},
        "s3://bucket/data",
    ),
    (
        "Kubernetes, as a TrainJob of Kubeflow",
        {"kind": "kubernetes", "namespace": "team-a", "image": "registry.example.com/training:1", "queue": "gpu-queue",
         "shm": "64Gi", "resources": {"nvidia.com/gpu": 8}, "volumes": [{"claim": "data", "path": "/data"}]},
        {"instance_type": "local"},
        "/data",
    ),
    (
        "Kubernetes, as an Indexed Job",
        {"kind": "kubernetes", "form": "indexed-job", "namespace": "team-a", "image": "registry.example.com/training:1",
         "shm": "64Gi", "resources": {"nvidia.com/gpu": 8}, "volumes": [{"claim": "data", "path": "/data"}]},
        {"instance_type": "local"},
        "/data",
    ),
)  # fmt: skip


def estimator_of(launch_file: str) -> PyTorch:
    """The estimator that the launch file makes; its `fit` does nothing."""
    caught: list[PyTorch] = []
    with mock.patch.object(PyTorch, "fit", lambda self, *_args, **_named: caught.append(self)):
        with mock.patch.object(sys, "argv", [launch_file]):
            runpy.run_path(str(ROOT / "examples" / "mnist" / f"{launch_file}.py"), run_name="__main__")
    return caught[0]


def rendered(launch_file: str, cluster: Cluster, arguments: dict[str, Any], data: str) -> str:
    """What is submitted for a launch file."""
    estimator = estimator_of(launch_file)
    estimator.cluster = cluster
    estimator.instance_type = arguments["instance_type"]
    estimator.service_options |= {name: value for name, value in arguments.items() if name != "instance_type"}
    name = launch_file.removeprefix("launch_").replace("_", "-")
    text = estimator.render({"train": data}, job_name=name).text().replace(f"{ROOT}/", "")
    # The packed code, which changes with each line of the examples.
    return re.sub(r"(sourcedir\.tar\.gz: )\S{80,}", r"\1...  # the code, in base64", text)


def text() -> str:
    """The section, without its marks."""
    parts = []
    for title, row, arguments, data in CLUSTERS:
        cluster = make_cluster("", row, title)
        keys = ", ".join(f"{key}={value!r}" for key, value in row.items() if key != "kind")
        parts.append(f"### {title}\n\n`{type(cluster).__name__}({keys})`\n")
        for launch_file in LAUNCH_FILES:
            body = rendered(launch_file, cluster, arguments, data).rstrip()
            parts.append(f"`examples/mnist/{launch_file}.py`:\n\n```\n{body}\n```\n")
    return "\n".join(parts)


def updated(page: str) -> str:
    """The page, with the section as it is now."""
    before, rest = page.split(START)
    head, after = rest.split("-->", 1)
    return f"{before}{START}{head}-->\n\n{text()}\n{END}{after.split(END, 1)[1]}"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
