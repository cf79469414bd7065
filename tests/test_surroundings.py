"""`modelparallel env`: what a report of a fault needs, without secrets."""

import time

import pytest
import torch
from typer.testing import CliRunner

from modelparallel import __version__
from modelparallel.job.discovery import LAUNCHER_VARIABLES, discover_process, job_marks, lonely_hint, master_host
from modelparallel.launch.command_line import app
from modelparallel.launch.surroundings import surroundings, without_secrets

TOKEN = "Zx9" * 14


def sections(text):
    """The lines below each title, without the indent."""
    found = {}
    for line in text.splitlines():
        if line and not line.startswith(" "):
            lines = found.setdefault(line, [])
        elif line:
            lines.append(line.strip())
    return found


def test_versions_and_devices_are_those_of_this_environment():
    found = sections(surroundings(None, {}))
    assert list(found) == ["versions", "devices", "launcher", "configuration"]
    assert f"modelparallel {__version__}" in found["versions"]
    assert any(line.startswith(f"torch {torch.__version__}, built for ") for line in found["versions"])
    assert any(line.startswith("cpu: ") and "cores usable" in line for line in found["devices"])
    assert len(found["devices"]) == 2 + torch.cuda.device_count()
    assert found["launcher"] == ["this process is alone"]


def test_a_package_that_is_not_there_is_said_not_to_be(monkeypatch):
    monkeypatch.setattr("modelparallel.launch.surroundings._PACKAGES", ("numpy", "no-such-package"))
    lines = sections(surroundings(None, {}))["versions"]
    assert "no-such-package: not installed" in lines and any(line.startswith("numpy 2") for line in lines)


def test_only_variables_of_launchers_and_of_this_library_are_shown():
    environ = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "SMP_TIMEOUT": "5"}
    other = {"HOME": "/home/somebody", "AWS_REGION": "moon", "SLURM_JOB_USER": "somebody", "WANDB_NAME": "run"}
    lines = sections(surroundings(None, {**environ, **other}))["launcher"]
    assert lines[0] == "this process is rank 1 of 4, local rank 1 of 2 (from torchrun)"
    assert lines[1:] == sorted(f"{name}={value}" for name, value in environ.items())


def test_a_rank_that_cannot_be_is_told_and_ends_nothing():
    found = sections(surroundings(None, {"RANK": "x", "WORLD_SIZE": "2"}))
    assert "environment variable RANK: expected int, got 'x'" in found["launcher"][0]
    assert "RANK=x" in found["launcher"]


def test_the_configuration_is_the_one_that_a_job_would_have():
    environ = {
        "SM_HP_MP_PARAMETERS": '{"partitions": 2, "microbatches": 3}',
        "SMP_TIMEOUT": "7",
        "SMP_DISABLE_D2D": "1",
    }
    lines = sections(surroundings('{"microbatches": 8, "ddp": true}', environ))["configuration"]
    assert "pipeline_parallel_degree = 2 (from SM_HP_MP_PARAMETERS)" in lines
    assert "microbatches = 3 (from SM_HP_MP_PARAMETERS)" in lines
    assert "ddp = True (from --parameters)" in lines
    assert "timeout_seconds = 7.0 (follows from others or from the environment)" in lines
    assert any(line.startswith("microbatches: 8 given to smp.init, 3 in SM_HP_MP_PARAMETERS") for line in lines)
    assert any("SMP_DISABLE_D2D" in line and "no effect" in line for line in lines)
    assert not any(line.startswith("placement_strategy") for line in lines)
    assert lines[-1] == f"everything else: the defaults of modelparallel {__version__}"


@pytest.mark.parametrize(
    ("parameters", "environ", "error"),
    [
        ('{"microbatch": 8}', {}, "microbatch: unknown parameter"),
        ("no-such-file.json", {}, "no-such-file.json"),
        ('{"ddp": ', {}, "not valid JSON"),
        (None, {"SMP_TIMEOUT": "soon"}, "environment variable SMP_TIMEOUT"),
        ('{"pipeline_parallel_degree": 2}', {"RANK": "0", "WORLD_SIZE": "3"}, "3"),
    ],
)
def test_a_wrong_configuration_is_shown_as_its_error(parameters, environ, error):
    lines = sections(surroundings(parameters, environ))["configuration"]
    assert lines[0].startswith("SMPConfigError: ") and error in lines[0]


@pytest.mark.parametrize(
    "environ",
    [
        {"SMP_API_TOKEN": "hush"},
        {"MODELPARALLEL_SECRET_FILE": "/somewhere/hush it"},
        {"SMP_PASSWORD": "hush"},
        {"SMP_STORE_KEY": "hush and hush"},
        {"SMP_EVENT_DIR": "https://somebody:hush@host/folder"},
        {"SMP_EVENT_DIR": "https://hush@host/folder"},
        {"SMP_EVENT_DIR": "https://host/folder?sig=1&access_token=hush&more=2"},
        {"SMP_EVENT_DIR": f"/folder/{TOKEN.replace('Zx9', 'hush9')}"},
        {"SM_HP_MP_PARAMETERS": '{"_wandb_api_key": "hush", "partition_file": "s3://a:hush@bucket/x"}'},
        {"SM_HP_MP_PARAMETERS": '{"password": "hush", '},
    ],
)
def test_what_looks_like_a_secret_is_not_shown(environ):
    text = surroundings(None, environ)
    assert "hush" not in text and "(not shown)" in text
    assert all(name in text for name in environ)


def test_what_is_no_secret_stays():
    for text in (
        "MASTER_ADDR=algo-1",
        "MODELPARALLEL_JOB=/work/modelparallel-jobs/train-2026-01-31-12-00-00-123/status/job.json",
        "OMPI_COMM_WORLD_LOCAL_RANK=3",
        "SLURM_STEP_NODELIST=n[03-05,9],m1",
        "sharded_data_parallel_degree = 2 (from SM_HP_MP_PARAMETERS)",
    ):
        assert without_secrets(text) == text
    assert without_secrets(f"a {TOKEN} b") == "a (not shown) b"
    assert without_secrets("hf_abcdefgh") == "(not shown)" == without_secrets("AKIAABCDEFGH")


def test_long_values_take_no_time():
    started = time.process_time()
    for letter in ("a", "1", "=", "a=", "token", "://"):
        without_secrets(letter * 50_000)
    assert time.process_time() - started < 10


class Watched(dict):
    """An environment that notes which variables were asked for."""

    def __init__(self, entries):
        super().__init__(entries)
        self.asked = set()

    def __contains__(self, name):
        self.asked.add(name)
        return super().__contains__(name)

    def __getitem__(self, name):
        self.asked.add(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        self.asked.add(name)
        return super().get(name, default)


def test_the_variables_of_launchers_are_those_that_are_read():
    task = {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "1", "SLURM_TASKS_PER_NODE": "1"}
    place = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    place["SLURM_STEP_TASKS_PER_NODE"] = "1(x2)"
    asked = set()
    for start in (
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        *({f"{name}RANK": "0", f"{name}SIZE": "1"} for name in ("OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "PMI_")),
        {"JSM_NAMESPACE_RANK": "0", "JSM_NAMESPACE_SIZE": "1"},
        {"PALS_RANKID": "0", "PALS_SIZE": "1"},
        {"FLUX_TASK_RANK": "0", "FLUX_JOB_SIZE": "1"},
        task,
        task | place,
        {},
    ):
        environ = Watched(start)
        identity = discover_process(environ)
        job_marks(identity, environ)
        lonely_hint(identity, environ)
        assert master_host(environ) is None
        asked |= environ.asked
    assert asked == set(LAUNCHER_VARIABLES)


def test_what_the_launcher_does_not_say_is_told():
    found = sections(surroundings(None, {"RANK": "1", "WORLD_SIZE": "4"}))["launcher"][0]
    assert "rank 1 of 4, which processes share its host is found out by smp.init (from torchrun)" in found
    lines = sections(surroundings(None, {"SLURM_NTASKS": "4"}))["launcher"]
    assert lines[0] == "this process is alone" and lines[1].startswith("this is one process of an allocation with 4 t")


def test_the_command_prints_it_and_never_fails(monkeypatch):
    monkeypatch.setenv("SMP_TIMEOUT", "never")
    result = CliRunner().invoke(app, ["env", "--parameters", '{"pipeline_parallel_degree": 2}'])
    assert result.exit_code == 0, result.output
    assert f"modelparallel {__version__}" in result.output and "SMP_TIMEOUT=never" in result.output
    assert "SMPConfigError: environment variable SMP_TIMEOUT" in result.output
