"""The description that a job's nodes read: it comes back, without what only the submitting machine knows."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from modelparallel.errors import LaunchError
from modelparallel.launch.clusters.description import (
    ClusterJob,
    DataChannel,
    node_description,
    read_node_description,
)

JOB = ClusterJob(
    name="j",
    entry_point="pkg/train.py",
    source_dir=Path("/home/me/code"),
    num_nodes=2,
    processes_per_node=4,
    arguments=("--lr", "0.1", "ä\n"),
    hyperparameters={"lr": 0.1, "mp_parameters": {"ddp": True}},
    parameters={"ddp": True},
    channels={"train": DataChannel("s3://b/x", "FastFile"), "test": DataChannel("/data")},
    environment={"A": "1"},
    secrets={"HF_TOKEN": "env:HF_TOKEN"},
    requirements="requirements.txt",
    dependencies=(Path("/home/me/lib"),),
    instance_type="ml.p4d.24xlarge",
    max_seconds=60.0,
    max_restarts=2,
    checkpoints="s3://b/ck",
    output="/out",
    service_options={"role": object()},
)


def written(tmp_path, text):
    path = tmp_path / "job.json"
    path.write_text(text)
    return path


def test_a_description_comes_back(tmp_path):
    text = node_description(JOB)
    assert "/home/me" not in text and "role" not in text
    found = read_node_description(written(tmp_path, text))
    assert (
        replace(
            found.job, source_dir=JOB.source_dir, dependencies=JOB.dependencies, service_options=JOB.service_options
        )
        == JOB
    )
    assert found.folder == tmp_path and found.secrets_file == tmp_path / "secrets.env"
    assert found.code == str(tmp_path / "sourcedir.tar.gz")
    (tmp_path / "unpacked").mkdir()
    (tmp_path / "code").symlink_to("unpacked")
    assert read_node_description(tmp_path / "job.json").code == str(tmp_path / "sourcedir.tar.gz")
    (tmp_path / "code").unlink()
    (tmp_path / "code").mkdir()
    assert read_node_description(tmp_path / "job.json").code == str(tmp_path / "code")


def test_folder_and_code_may_be_elsewhere(tmp_path):
    path = written(tmp_path, node_description(JOB, folder="/jobs/j", code="s3://b/code.tar.gz"))
    found = read_node_description(path)
    assert found.folder == Path("/jobs/j") and found.code == "s3://b/code.tar.gz"
    path = written(tmp_path, node_description(JOB, folder="run", code="/image/code"))
    found = read_node_description(path)
    assert found.folder == tmp_path / "run" and found.code == "/image/code"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2, "version": "9.0"}, "written by modelparallel 9.0, which this one"),
        ({"newer": 1, "version": "9.0"}, "newer: not known to this version .*9.0 wrote it"),
        ({"num_nodes": "two"}, "num_nodes"),
        ({"channels": {"train": 5}}, "channels"),
        ({"environment": {"A": 1}}, "environment"),
        ({"folder": 1}, "folder and code are texts"),
        ({"name": None}, "name"),
    ],
)
def test_what_is_no_description(tmp_path, change, words):
    values = {**json.loads(node_description(JOB)), **change}
    with pytest.raises(LaunchError, match=f"job.json.*(\n.*)*{words}"):
        read_node_description(written(tmp_path, json.dumps(values)))


def test_what_is_no_description_at_all(tmp_path):
    for text in ("", "[]", "{}", "[" * 5000):
        with pytest.raises(LaunchError, match=r"job\.json is no description of a job"):
            read_node_description(written(tmp_path, text))
    with pytest.raises(LaunchError, match="cannot be read: No such file"):
        read_node_description(tmp_path / "none.json")
