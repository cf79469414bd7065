"""Records of submitted jobs: found from another shell, whole, for their owner alone; damaged ones are named."""

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from modelparallel.errors import LaunchError
from modelparallel.launch.clusters import records
from modelparallel.launch.clusters.cluster import JobRecord
from modelparallel.launch.clusters.records import (
    find_record,
    forget_record,
    list_records,
    names_in_use,
    record_path,
    records_folder,
    write_record,
)

RECORD = JobRecord(
    "train-1", "gpu", "slurm", {"partition": "gpu", "gpus_per_node": 8}, "1234", "/jobs/train-1", 5.0, "d"
)


@pytest.fixture
def environ(tmp_path):
    return {"XDG_STATE_HOME": str(tmp_path)}


def test_a_record_comes_back(environ, tmp_path):
    path = write_record(RECORD, environ)
    assert path == tmp_path / "modelparallel" / "jobs" / "gpu" / "train-1.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert os.listdir(path.parent) == ["train-1.json"]
    assert find_record("gpu/train-1", environ) == find_record("train-1", environ) == RECORD
    write_record(replace(RECORD, engine_id="1235"), environ)
    assert find_record("train-1", environ).engine_id == "1235"
    # A record of before a field was added.
    values = json.loads(path.read_text())
    del values["model"]
    path.write_text(json.dumps(values))
    assert find_record("train-1", environ).model == ""
    forget_record(RECORD, environ)
    forget_record(RECORD, environ)
    assert list_records(environ) == ((), ())


def test_the_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    home = tmp_path / ".local" / "state" / "modelparallel" / "jobs"
    assert records_folder({}) == records_folder({"XDG_STATE_HOME": "relative"}) == home
    assert records_folder({"XDG_STATE_HOME": "/x"}) == Path("/x/modelparallel/jobs")


def test_lists_are_of_all_or_of_one_cluster(environ):
    others = [replace(RECORD, name=name, cluster=cluster, submitted=moment)
              for name, cluster, moment in (("b", "gpu", 9.0), ("b", "aws", 7.0), ("ns/c", "k8s", 8.0))]  # fmt: skip
    for record in (RECORD, *others):
        write_record(record, environ)
    assert [record.address for record in list_records(environ)[0]] == ["gpu/b", "k8s/ns/c", "aws/b", "gpu/train-1"]
    assert [record.address for record in list_records(environ, "gpu")[0]] == ["gpu/b", "gpu/train-1"]
    assert names_in_use("gpu", environ) == {"b", "train-1"} and names_in_use("none", environ) == set()
    assert find_record("k8s/ns/c", environ) == find_record("ns/c", environ) == others[2]
    assert find_record("aws/b", environ) == others[1]
    with pytest.raises(LaunchError, match="'b' is on several clusters: name one of aws/b, gpu/b"):
        find_record("b", environ)
    with pytest.raises(LaunchError, match="did you mean 'gpu/train-1'"):
        find_record("gpu/trian-1", environ)
    with pytest.raises(LaunchError, match="did you mean 'train-1'"):
        find_record("trian-1", environ)


@pytest.mark.parametrize("cluster", ["..", ".", ".hidden", "a/b", "../../x", "ä ö", "a%2Fb", "-x"])
def test_any_name_is_one_file(environ, tmp_path, cluster):
    record = replace(RECORD, cluster=cluster, name=cluster)
    path = write_record(record, environ)
    assert path.parent.parent == records_folder(environ) and not path.name.startswith(".")
    assert path.resolve().is_relative_to(tmp_path.resolve())
    assert list_records(environ) == ((record,), ())
    assert find_record(f"{cluster}/{cluster}", environ) == record


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "Expecting value"),
        ("[]", "no record of format 1"),
        ('{"format": 2}', "no record of format 1"),
        ('{"format": 1, "name": "x"}', "does not say cluster"),
        ({"unknown": 1}, "more entries than this version knows: unknown"),
        ({"name": 1}, "name is no text"),
        ({"submitted": "now"}, "no finite number"),
        ({"settings": []}, "settings is no object"),
        ({"cluster": "other"}, "it says that it is of other/train-1"),
        ("[" * 3000, "nested too deeply"),
        ("x" * (1 << 20) + "x", "too long"),
    ],
)
def test_damaged_records_are_named_and_skipped(environ, text, words):
    write_record(replace(RECORD, name="good"), environ)
    path = write_record(RECORD, environ)
    path.write_text(text if isinstance(text, str) else json.dumps({**json.loads(path.read_text()), **text}))
    found, problems = list_records(environ)
    assert [record.name for record in found] == ["good"]
    assert len(problems) == 1 and problems[0].startswith(f"{path} is no record of a job and was skipped: ")
    assert words in problems[0]
    with pytest.raises(LaunchError, match=r"train-1.json is no record.*modelparallel attach"):
        find_record("gpu/train-1", environ)


def test_no_job_yet(environ):
    with pytest.raises(LaunchError, match="no job was submitted from here"):
        find_record("a", environ)


def test_a_record_that_cannot_be_written_tells_how_to_find_the_job(environ, tmp_path):
    (tmp_path / "modelparallel").write_text("a file")
    with pytest.raises(LaunchError, match=r"was submitted \(slurm: 1234\).*modelparallel attach slurm:1234"):
        write_record(RECORD, environ)


def test_a_record_is_whole_at_any_moment(environ, monkeypatch):
    path = write_record(RECORD, environ)

    def full(path, text):
        path.write_text(text[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records, "write_private", full)
    with pytest.raises(LaunchError, match="No space left"):
        write_record(replace(RECORD, engine_id="9"), environ)
    assert find_record("train-1", environ) == RECORD and os.listdir(path.parent) == ["train-1.json"]
    assert record_path("gpu", "train-1", environ) == path


@pytest.mark.parametrize("moment", [-1.0, 1e300])
def test_a_record_of_no_time_is_skipped(tmp_path, moment):
    environ = {"XDG_STATE_HOME": str(tmp_path)}
    write_record(replace(RECORD, submitted=moment), environ)
    records, problems = list_records(environ)
    assert records == () and "submitted is no time" in problems[0]
