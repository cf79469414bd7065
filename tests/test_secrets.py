"""Secrets of jobs for other machines: what looks like one is refused in plain, and values are in one file alone."""

import base64
import json
import os
import stat
import subprocess
import sys
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelparallel.errors import LaunchError
from modelparallel.launch.clusters.cluster import Cluster, JobStatus, Rendered
from modelparallel.launch.clusters.cluster_file import kinds, make_cluster
from modelparallel.launch.clusters.description import ClusterJob, DataChannel, node_description
from modelparallel.launch.clusters.secrets import (
    check_plain,
    check_secrets,
    looks_secret,
    masked_secrets,
    read_secret,
    read_secrets,
    secret_options,
    secret_values,
    secrets_on_node,
    without_values,
    write_secrets,
)
from secret_free import ODD, assert_no_secret, assert_renders_no_secret, planted_secrets

TOKEN = "hf_AbCdEfGhIjKlMnOp"


def job_of(tmp_path, **values):
    return ClusterJob(name="j", entry_point="t.py", source_dir=tmp_path, num_nodes=1, processes_per_node=1, **values)


class SlurmLike(Cluster):
    """Renders as the kinds do: the description, and what stands for the secrets; or the secrets themselves."""

    kind = "like"
    leak: str = ""

    def check(self, job):
        check_secrets(job, ("env", "file"))

    def render(self, job):
        self.check(job)
        values = secret_values(job, os.environ)
        leaks = {
            "": "",
            "raw": values["PLANTED_FILE"],
            "json": json.dumps(values),
            "base64": base64.b64encode(b"ab" + values["PLANTED_VARIABLE"].encode()).decode(),
        }
        files = {"job.json": node_description(job), "secrets.env": masked_secrets(job), "x": leaks.get(self.leak, "")}
        command = ("sbatch", values["PLANTED_VARIABLE"]) if self.leak == "command" else ("sbatch", "job.sbatch")
        return Rendered(files, (("call", {"body": values if self.leak == "request" else {}}),), command)

    def check_access(self, job): ...

    def submit(self, job): ...

    def status(self, record):
        return JobStatus("unknown")

    def logs(self, record, *, rank=None, node=None, follow=False):
        return iter(())

    def stop(self, record): ...


def test_a_rendering_holds_no_secret(tmp_path, monkeypatch):
    planted = planted_secrets(monkeypatch, tmp_path)
    job = planted.added_to(job_of(tmp_path))
    assert_renders_no_secret(SlurmLike(), job, planted)
    assert masked_secrets(job) == "PLANTED_FILE='***'\nPLANTED_VARIABLE='***'\n"


ROWS = {
    "slurm": {"folder": "/shared/jobs"},
    "kubernetes": {"image": "registry.example.com/mp:1"},
    "sagemaker": {
        "role": "arn:aws:iam::123456789012:role/r",
        "region": "us-west-2",
        "image": "123456789012.dkr.ecr.us-west-2.amazonaws.com/mp:1",
        "container": "own",
    },
}


@pytest.mark.parametrize("kind", sorted(kinds()))
def test_no_kind_of_cluster_renders_a_secret(tmp_path, monkeypatch, kind):
    """Those that take values from this machine show none; the others refuse them, and show none either."""
    (tmp_path / "t.py").write_text("")
    planted = planted_secrets(monkeypatch, tmp_path)
    cluster = make_cluster("c", {"kind": kind, **ROWS[kind]}, "here")
    plain = job_of(tmp_path, instance_type="ml.p4d.24xlarge" if kind == "sagemaker" else None)
    cluster.render(plain)
    try:
        assert_renders_no_secret(cluster, planted.added_to(plain), planted)
    except LaunchError as error:
        assert kind != "slurm" and "secret" in str(error).lower()
        assert_no_secret(str(error), planted.values)


@pytest.mark.parametrize("leak", ["raw", "json", "base64", "command", "request"])
def test_a_leak_would_be_found(tmp_path, monkeypatch, leak):
    planted = planted_secrets(monkeypatch, tmp_path)
    with pytest.raises(AssertionError, match="holds the value of"):
        assert_renders_no_secret(SlurmLike(leak=leak), planted.added_to(job_of(tmp_path)), planted)


@given(value=st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1))
@settings(max_examples=60, deadline=None)
def test_values_come_back(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "values" / "secrets.env"
    path.parent.mkdir(exist_ok=True)
    write_secrets(path, {"A": value, "B": "x"})
    assert read_secrets(path) == {"A": value, "B": "x"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_shell_reads_the_same(tmp_path):
    write_secrets(tmp_path / "secrets.env", {"A": ODD})
    shell = subprocess.run(
        ["sh", "-c", f'. {tmp_path}/secrets.env; printf %s "$A"'], capture_output=True, text=True, check=True
    )
    assert shell.stdout == ODD
    assert [path.name for path in tmp_path.iterdir()] == ["secrets.env"]


def test_a_file_of_others_is_not_read(tmp_path):
    path = tmp_path / "secrets.env"
    write_secrets(path, {"A": "v"})
    path.chmod(0o640)
    with pytest.raises(LaunchError, match="can be read by others"):
        read_secrets(path)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(LaunchError, match="cannot be read"):
        read_secrets(tmp_path / "link")
    for text in ("A='v", "no assignment\n", "1A=v\n"):
        write_secrets(path, {})
        path.write_text(text)
        with pytest.raises(LaunchError, match="is damaged"):
            read_secrets(path)
    with pytest.raises(LaunchError, match="cannot be written"):
        write_secrets(tmp_path / "none" / "secrets.env", {})


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "api_key", "APIKEY", "AWS_SECRET_ACCESS_KEY",
                                  "DB_PASSWORD", "MY_SECRETS", "KEY_FILE", "token", "GIT_CREDENTIALS"])  # fmt: skip
def test_names_of_secrets(tmp_path, name):
    with pytest.raises(LaunchError, match=f"{name} looks like a secret .by its name.*--secret {name}=env:{name}"):
        check_plain(job_of(tmp_path, environment={name: "v"}))
    check_plain(job_of(tmp_path, environment={name: "v"}), allowed=True)


def test_what_is_no_secret(tmp_path):
    names = ("TOKENIZERS_PARALLELISM", "MAX_TOKENS", "NCCL_DEBUG", "MONKEY", "KEYBOARD", "HTTP_PROXY", "SECRETARY")
    for name in names:
        assert not looks_secret(name, "http://proxy.example:3128")
    job = job_of(tmp_path, environment=dict.fromkeys(names, "1"), hyperparameters={"num_tokens": 5, "key": "a"},
                 channels={"train": DataChannel("s3://bucket/data")}, arguments=("--token", "x"))  # fmt: skip
    check_plain(job)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"environment": {"HTTP_PROXY": "http://me:pass@proxy:3128"}}, "HTTP_PROXY"),
        ({"environment": {"MODEL": TOKEN}}, "MODEL"),
        ({"hyperparameters": {"hub": TOKEN}}, "hyperparameter 'hub'"),
        ({"arguments": ("--hub", TOKEN)}, "argument 2 of the script"),
        ({"channels": {"train": DataChannel("ftp://me:pass@host/x")}}, "channel 'train'"),
        ({"output": "ftp://me:pass@host/x"}, "output"),
        ({"custom_mpi_options": f"-x HUB={TOKEN}"}, "custom_mpi_options"),
    ],
)
def test_values_of_secrets(tmp_path, values, what):
    with pytest.raises(LaunchError, match=f"{what} looks like a secret") as caught:
        check_plain(job_of(tmp_path, **values))
    assert TOKEN not in str(caught.value) and "pass@" not in str(caught.value)


@pytest.mark.parametrize(
    ("secrets", "words"),
    [
        ({"HF_TOKEN": TOKEN}, "HF_TOKEN: what was given is no reference of this cluster: use env:HF_TOKEN, file:/"),
        ({"A": "env:"}, "'env' is no reference"),
        ({"A": f"{TOKEN}:x"}, "what was given is no reference"),
        ({"A": "aws-secretsmanager:arn"}, "'aws-secretsmanager' is no reference"),
        ({"A": "file:relative"}, "no absolute path"),
        ({"A": "env:no-name"}, "no name of a variable"),
        ({"1A": "env:X"}, "'1A': the name is that of a variable"),
        ({"LD_PRELOAD": "env:X"}, "decides how processes start"),
        ({"MODELPARALLEL_JOB": "env:X"}, "decides how processes start"),
        ({"SET": "env:X"}, "the environment of the job sets SET, too"),
    ],
)
def test_wrong_references(tmp_path, secrets, words):
    with pytest.raises(LaunchError, match=words) as caught:
        check_secrets(job_of(tmp_path, secrets=secrets, environment={"SET": "1"}), ("env", "file"))
    assert TOKEN not in str(caught.value)


def test_options():
    assert secret_options(["A=env:B", "C=file:/x=y"]) == {"A": "env:B", "C": "file:/x=y"}
    for texts in (["A"], ["=x"], ["A="], ["A=env:B", "A=env:C"]):
        with pytest.raises(LaunchError, match="--secret"):
            secret_options(texts)


def test_values_are_read_where_they_are(tmp_path, monkeypatch):
    path = tmp_path / "key"
    path.write_bytes(b"two\nlines\n")
    assert read_secret("A", f"file:{path}", {}) == "two\nlines"
    assert read_secret("A", "env:B", {"B": " v "}) == " v "
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_secret("A", "file:~/key", {}) == "two\nlines"
    path.write_bytes(b"\xff\xfe" + TOKEN.encode())
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "zero").write_bytes(b"a\0" + TOKEN.encode())
    (tmp_path / "long").write_bytes(TOKEN.encode() * 10000)
    for reference, words in ((f"file:{path}", "is no text"), (f"file:{tmp_path}/none", "No such file"),
                             (f"file:{tmp_path}/empty", "is empty"), (f"file:{tmp_path}/long", "is too long"),
                             (f"file:{tmp_path}/zero", "zero byte"), ("env:C", "C is not set"),
                             ("env:EMPTY", "EMPTY is empty"), ("aws-secretsmanager:x", "is not read on")):  # fmt: skip
        with pytest.raises(LaunchError, match=f"secret A: .*{words}") as caught:
            read_secret("A", reference, {"EMPTY": ""})
        assert TOKEN not in str(caught.value)


def test_values_on_a_node(tmp_path):
    path = tmp_path / "secrets.env"
    references = {"A": "env:X", "B": "hf/token"}
    assert secrets_on_node({}, path, {}) == {}
    assert secrets_on_node(references, path, {"A": "1", "B": "2"}) == {"A": "1", "B": "2"}  # a Kubernetes pod
    with pytest.raises(LaunchError, match="secret A: neither is it in"):
        secrets_on_node(references, path, {"B": "2"})
    write_secrets(path, {"A": "v"})
    assert secrets_on_node(references, path, {"A": "1", "B": "2"}) == {"A": "v", "B": "2"}
    with pytest.raises(LaunchError, match="secret C is not in"):
        secrets_on_node({"C": "env:X"}, path, {})
    hide = without_values({"A": "v", "B": "vw"})
    assert hide("a vw b v") == "a *** b ***"


def test_values_of_aws(tmp_path, monkeypatch):
    arn = "arn:aws:secretsmanager:eu-west-1:123456789012:secret:hf-AbCdEf"
    asked = []

    class Client:
        def get_secret_value(self, SecretId):
            return {"SecretString": {arn: '{"token": "v"}', "binary": None}[SecretId]}

    def client(service, region_name):
        asked.append((service, region_name))
        return Client()

    monkeypatch.setitem(sys.modules, "boto3", types.SimpleNamespace(client=client))
    reference = {"A": f"aws-secretsmanager:{arn}"}
    assert secrets_on_node(reference, tmp_path, {}) == {"A": '{"token": "v"}'}
    assert secrets_on_node({"A": f"aws-secretsmanager:{arn}#token"}, tmp_path, {}) == {"A": "v"}
    assert set(asked) == {("secretsmanager", "eu-west-1")}
    for text, words in ((f"{arn}#none", "no JSON object with the key 'none'"), ("binary", "holds no text"),
                        ("arn:none", "cannot be fetched: KeyError")):  # fmt: skip
        with pytest.raises(LaunchError, match=words):
            secrets_on_node({"A": f"aws-secretsmanager:{text}"}, tmp_path, {})
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(LaunchError, match=r"needs boto3: pip install 'modelparallel\[sagemaker\]'"):
        secrets_on_node(reference, tmp_path, {})


def test_spellings_are_found():
    values = {"A": "hf_5e11ae0fbad1dea9" + ODD}
    for text in (values["A"], json.dumps(values), repr(values), base64.b64encode(b"x" + values["A"].encode())):
        with pytest.raises(AssertionError):
            assert_no_secret(text, values)
    assert_no_secret("hf_5e11", values)
