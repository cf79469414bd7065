"""Launching: the contract that a script finds, backends, failures, and that nothing is left behind."""

import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import fsspec
import pytest
from torch.distributed.launcher.api import LaunchConfig
from typer.testing import CliRunner

from launched_jobs import LEAVES_CHILDREN, MPI_OPTIONS, job_of, processes_with, seed_distribution, write_script
from modelparallel.errors import LaunchError, SMPConfigError
from modelparallel.launch import Estimator, HuggingFace, JobFailedError, PyTorch, estimator, run_job
from modelparallel.launch.channels import input_channels, local_path
from modelparallel.launch.command_line import app
from modelparallel.launch.devices import check_devices
from modelparallel.launch.environment import command_arguments, encode
from modelparallel.launch.failures import first_candidate
from modelparallel.launch.folder import JobFolder, new_job_name
from modelparallel.launch.mpi_options import mpirun_arguments, parse_mpi_options
from modelparallel.launch.output import Console, LogRelay
from modelparallel.launch.rendezvous_port import reserved_port

SEED_PARAMETERS = {
    "tensor": {
        "pipeline_parallel_degree": 1,
        "placement_strategy": "cluster",
        "tensor_parallel_degree": 4,
        "ddp": True,
    },
    "tensor and pipeline": {
        "microbatches": 4,
        "pipeline_parallel_degree": 2,
        "placement_strategy": "cluster",
        "tensor_parallel_degree": 2,
        "ddp": True,
    },
}


@pytest.fixture
def no_rehearsal(monkeypatch):
    """Make the estimator take this machine for one with 8 GPUs, so that processes need not import torch."""
    monkeypatch.setattr(estimator, "resolve_device", lambda asked: ("cuda", 8))


REPORT = """
    import json, os, sys
    report = {"argv": sys.argv, "cwd": os.getcwd(), "name": __name__, "file": __file__, "environ": dict(os.environ)}
    rank = os.environ.get("RANK") or os.environ["OMPI_COMM_WORLD_RANK"]
    with open(os.path.join(os.environ["SM_OUTPUT_DATA_DIR"], f"rank{rank}.json"), "w") as file:
        json.dump(report, file)
"""


def reports_of(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.output_data.glob("rank*.json"))]


# Statement 96: the seed's dictionaries


@pytest.mark.parametrize(("which", "backend"), [("tensor", "elastic"), ("tensor and pipeline", "mpi")])
def test_c096_seed_distribution_starts_8_processes(tmp_path, capsys, no_rehearsal, which, backend):
    write_script(tmp_path, REPORT)
    job = PyTorch(
        entry_point="train.py",
        source_dir=str(tmp_path),
        role="a role",
        instance_type="local",
        sagemaker_session=None,
        framework_version="1.8.1",
        py_version="py36",
        instance_count=1,
        distribution=seed_distribution(SEED_PARAMETERS[which]),
        base_job_name="SMD-MP-demo",
        job_dir=tmp_path / "job",
        backend=backend,
    )
    job.fit()
    reports = reports_of(job.latest_training_job.folder)
    assert len(reports) == 8
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    mpi_names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE")
    for rank, report in enumerate(reports):
        environ = report["environ"]
        present, absent = (names, ()) if backend == "elastic" else (mpi_names, names)
        assert [environ[name] for name in present] == [str(rank), str(rank), "8"]
        assert not set(absent) & set(environ)
        published = json.loads(environ["SM_HP_MP_PARAMETERS"])
        assert published["partitions"] == SEED_PARAMETERS[which]["pipeline_parallel_degree"]
        framework = json.loads(environ["SM_FRAMEWORK_PARAMS"])
        assert framework["sagemaker_mpi_num_of_processes_per_host"] == 8
        assert framework["sagemaker_mpi_custom_mpi_options"] == MPI_OPTIONS["custom_mpi_options"]
    assert f"8 processes by {backend}" in capsys.readouterr().out


def test_c096_tensor_parallelism_without_ddp_fails_before_any_process(tmp_path):
    write_script(tmp_path, REPORT)
    parameters = {**SEED_PARAMETERS["tensor"], "ddp": False}
    distribution = seed_distribution(parameters)
    with pytest.raises(SMPConfigError, match="ddp"):
        PyTorch("train.py", source_dir=tmp_path, distribution=distribution, job_dir=tmp_path / "job").fit()
    assert not (tmp_path / "job").exists()


def test_c096_repeated_mca_option_is_given_to_mpirun_once():
    arguments = mpirun_arguments(8, parse_mpi_options(MPI_OPTIONS["custom_mpi_options"] * 2), ["SM_HOSTS"])
    assert arguments.count("btl_vader_single_copy_mechanism") == 1
    text = " ".join(arguments)
    assert "--mca btl_vader_single_copy_mechanism none" in text
    assert "-x SM_HOSTS" in text


# Statement 99: the launch contract


CONTRACT_SCRIPT = (
    REPORT
    + """
    from transformers.utils import is_sagemaker_mp_enabled
    import torch.distributed as dist
    dist.init_process_group("nccl")
    report["is_mp"] = is_sagemaker_mp_enabled()
    report["world"] = dist.get_world_size()
    with open(os.path.join(os.environ["SM_OUTPUT_DATA_DIR"], f"rank{rank}.json"), "w") as file:
        json.dump(report, file)
"""
)


def test_c099_launched_script_finds_the_contract(tmp_path, capsys):
    code = tmp_path / "source"
    code.mkdir()
    write_script(code, CONTRACT_SCRIPT)
    data = tmp_path / "mnist"
    data.mkdir()
    (data / "digits").write_text("7")
    single_file = tmp_path / "test.csv"
    single_file.write_text("1,2")
    parameters = {"pipeline_parallel_degree": 2, "microbatches": 4, "ddp": True}
    job = HuggingFace(
        entry_point="train.py",
        source_dir=str(code),
        distribution={
            "smdistributed": {"modelparallel": {"enabled": True, "parameters": parameters}},
            "mpi": {"enabled": True, "processes_per_host": 2, "custom_mpi_options": "-x SMDEBUG_LOG_LEVEL=ERROR"},
        },
        hyperparameters={"epochs": 3, "lr": 0.5, "b": True, "dims": [1, 2]},
        environment={"EXTRA": "yes"},
        job_dir=tmp_path / "job",
        checkpoint_local_path="/opt/ml/checkpoints",
    )
    job.fit({"train": data.as_uri(), "test": single_file})
    folder = job.latest_training_job.folder
    first, second = reports_of(folder)
    environ = first["environ"]

    assert first["is_mp"] and second["is_mp"]
    assert first["world"] == 2
    published = {"ddp": True, "microbatches": 4, "partitions": 2, "pipeline_parallel_degree": 2}
    assert environ["SM_HP_MP_PARAMETERS"] == json.dumps(published, sort_keys=True, separators=(",", ":"))
    framework = json.loads(environ["SM_FRAMEWORK_PARAMS"])
    assert framework["sagemaker_mpi_enabled"] is True
    assert "sagemaker_distributed_dataparallel_enabled" not in framework
    assert environ["MASTER_ADDR"] == "127.0.0.1"
    assert int(environ["MASTER_PORT"]) > 0
    mp_text = "ddp=True,microbatches=4,partitions=2,pipeline_parallel_degree=2"
    expected = ["-b", "True", "--dims", "[1, 2]", "--epochs", "3", "--lr", "0.5", "--mp_parameters", mp_text]
    assert first["argv"][1:] == expected
    assert json.loads(environ["SM_USER_ARGS"]) == expected
    assert first["name"] == "__main__"
    assert Path(first["cwd"]) == code
    assert (Path(environ["SM_CHANNEL_TRAIN"]) / "digits").read_text() == "7"
    assert (Path(environ["SM_CHANNEL_TEST"]) / "test.csv").read_text() == "1,2"
    assert json.loads(environ["SM_CHANNELS"]) == ["test", "train"]
    for name, path in {
        "SM_MODEL_DIR": folder.model,
        "SM_OUTPUT_DATA_DIR": folder.output_data,
        "SM_OUTPUT_INTERMEDIATE_DIR": folder.output_intermediate,
        "SM_INPUT_CONFIG_DIR": folder.input_config,
    }.items():
        assert Path(environ[name]) == path
        assert path.is_dir()
    assert os.path.dirname(os.path.dirname(environ["SM_MODULE_DIR"])) == str(folder.root)
    assert environ["SAGEMAKER_BASE_DIR"] == str(folder.root)
    assert folder.checkpoints.is_dir()
    assert environ["SM_HOSTS"] == '["algo-1"]'
    assert environ["SM_NUM_GPUS"] == "2"
    assert environ["SM_HP_EPOCHS"] == "3"
    assert environ["SM_HP_DIMS"] == "[1,2]"
    assert environ["EXTRA"] == "yes"
    assert environ["SMDEBUG_LOG_LEVEL"] == "ERROR"
    assert environ["SAGEMAKER_JOB_NAME"] == environ["TRAINING_JOB_NAME"] == job.latest_training_job.name
    toolkit = (
        "CURRENT_HOST NETWORK_INTERFACE_NAME NUM_CPUS NUM_NEURONS CURRENT_INSTANCE_TYPE CURRENT_INSTANCE_GROUP "
        "CURRENT_INSTANCE_GROUP_HOSTS INSTANCE_GROUPS INSTANCE_GROUPS_DICT DISTRIBUTION_INSTANCE_GROUPS IS_HETERO "
        "RESOURCE_CONFIG INPUT_DATA_CONFIG HPS USER_ENTRY_POINT MODULE_NAME INPUT_DIR OUTPUT_DIR LOG_LEVEL "
        "FRAMEWORK_MODULE TRAINING_ENV"
    )
    assert not [name for name in toolkit.split() if f"SM_{name}" not in environ]
    for name in ("hyperparameters", "inputdataconfig", "resourceconfig"):
        assert json.loads((folder.input_config / f"{name}.json").read_text())
    assert job.model_data == str(folder.model)
    shown = capsys.readouterr().out
    assert shown.count("rehearsal on the CPU") == 1


def test_c099_mp_parameters_argument_can_be_omitted(tmp_path, no_rehearsal, capsys):
    write_script(tmp_path, REPORT)
    distribution = seed_distribution({"partitions": 1, "ddp": True})
    distribution["mpi"] = {"enabled": True, "processes_per_host": 1}
    job = Estimator(
        "train.py", source_dir=tmp_path, distribution=distribution, job_dir=tmp_path / "job", pass_mp_parameters=False
    )
    job.fit(str(tmp_path), wait=False)
    job.latest_training_job.wait()
    (report,) = reports_of(job.latest_training_job.folder)
    assert report["argv"][1:] == []
    assert "SM_CHANNEL_TRAINING" in report["environ"]
    assert "SM_HP_MP_PARAMETERS" in report["environ"]


def test_values_are_encoded_as_the_toolkit_does():
    assert [encode(value) for value in ("text", None, True, {"b": 1, "a": [1]})] == [
        "text",
        "",
        "true",
        '{"a":[1],"b":1}',
    ]
    assert command_arguments({"x": 1, "name": None}) == ["--name", "", "-x", "1"]


# Output and failures


FAILING = """
    import os, sys, time
    rank = int(os.environ.get("RANK") or os.environ["OMPI_COMM_WORLD_RANK"])
    print("started", sys.argv[1], flush=True)
    how = sys.argv[1]
    if rank == 1:
        time.sleep(0.2)
        if how == "raise":
            raise ValueError("the first error")
        if how == "exit":
            sys.exit(7)
        if how == "leave":
            os._exit(9)
        if how == "kill":
            os.kill(os.getpid(), 9)
    if how != "wait":
        time.sleep(0.4)
        if how in ("raise", "kill"):
            raise RuntimeError("Connection closed by peer [127.0.0.1]")
    time.sleep(60)
"""


@pytest.mark.parametrize("backend", ["elastic", "mpi"])
@pytest.mark.parametrize(
    ("how", "exit_code", "said"),
    [
        ("raise", 1, "ValueError: the first error"),
        ("exit", 7, "it exited with code 7"),
        ("leave", 9, "exit code 9"),
        ("kill", 137, "killed by SIGKILL"),
    ],
)
def test_first_failing_rank_is_reported_and_nothing_is_left(tmp_path, backend, how, exit_code, said):
    script = write_script(tmp_path, FAILING)
    output = io.StringIO()
    started = time.monotonic()
    result = run_job(job_of(tmp_path, script, backend=backend, arguments=(how,)), output)
    assert time.monotonic() - started < 15
    assert result.exit_code == exit_code
    assert result.failure.global_rank == 1
    assert said in result.message
    assert str(result.folder.rank_log(1)) in result.message
    assert result.folder.failure_file.read_text().strip() == result.message.strip()
    assert f"[rank 0] started {how}" in output.getvalue()
    assert result.folder.rank_log(1).read_text().startswith(f"started {how}")
    if how == "raise":
        # The traceback is the last thing, and begins in the script.
        lines = result.message.splitlines()
        assert lines[-1] == "ValueError: the first error"
        assert lines[lines.index("Traceback (most recent call last):") + 1].startswith(f'  File "{script}"')
    assert processes_with(str(result.folder.description)) == []


def test_timeout_stops_the_job_and_keeps_the_stacks(tmp_path):
    script = write_script(tmp_path, FAILING)
    result = run_job(job_of(tmp_path, script, arguments=("wait",), timeout=2.0), io.StringIO())
    assert result.exit_code == 124
    assert "longer than its timeout of 2 s" in result.message
    assert 'train.py", line' in result.folder.rank_log(0).read_text()
    assert processes_with(str(result.folder.description)) == []


@pytest.mark.parametrize(
    ("backend", "number"), [("elastic", signal.SIGINT), ("elastic", signal.SIGKILL), ("mpi", signal.SIGTERM)]
)
def test_signals_to_the_launcher_leave_no_process(tmp_path, backend, number):
    """Processes that ignore the polite signals, and have children in sessions of their own, are ended too."""
    script = write_script(tmp_path, LEAVES_CHILDREN)
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        import launched_jobs
        from modelparallel.launch import run_job
        job = launched_jobs.job_of(Path({str(tmp_path)!r}), Path({str(script)!r}), backend={backend!r})
        result = run_job(job)
        print(result.message, file=sys.stderr)
        sys.exit(result.exit_code)
    """
    launcher = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        num_ready = 0
        for line in launcher.stdout:
            num_ready += "ready" in line
            if num_ready == 2:
                break
        mark = str(tmp_path / "job" / "status" / "job.json")
        assert len(processes_with(mark)) >= 4
        launcher.send_signal(number)
        # The agent of a torch that cannot be told otherwise (2.11) leaves the ranks 30 s.
        _, errors = launcher.communicate(timeout=30 if hasattr(LaunchConfig, "shutdown_timeout") else 60)
        if number == signal.SIGKILL:
            # Nobody is left to look for the helpers; the ranks themselves end with the launcher.
            deadline = time.monotonic() + 10
            while str(script) in "".join(command_lines(mark)) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert str(script) not in "".join(command_lines(mark))
        else:
            assert launcher.returncode == 128 + number
            assert f"stopped by {number.name}" in errors
            assert processes_with(mark) == []
    finally:
        for pid in processes_with(str(tmp_path)):
            os.kill(pid, signal.SIGKILL)
        launcher.kill()
        launcher.wait()


def command_lines(mark):
    for pid in processes_with(mark):
        yield Path(f"/proc/{pid}/cmdline").read_text()


def test_first_failure_prefers_a_death_over_the_complaints_of_its_peers(tmp_path):
    folder = JobFolder(tmp_path)
    folder.prepare(tmp_path, {})
    errors = [(99.9, "RuntimeError: Connection closed by peer"), (100.5, "ValueError: x")]
    for rank, (moment, summary) in enumerate(errors):
        record = {"time": moment, "exit_code": 1, "summary": summary, "traceback": "", "is_interrupt": False}
        folder.error_file(rank).write_text(json.dumps(record))
    folder.started_file(2).write_text("{}")
    died = first_candidate(folder, {2: 100.1}, {0: 1, 1: 1, 2: -9}, range(3)).failure
    assert died.global_rank == 2
    assert died.process_exit_code == 137
    # Killed by the launcher, when its time to end was over: a consequence.
    assert first_candidate(folder, {2: 105.2}, {0: 1, 1: 1, 2: -9}, range(3)).failure.global_rank == 1
    # Stopped by the launcher: a consequence.
    assert first_candidate(folder, {2: 100.1}, {0: 1, 1: 1, 2: -15}, range(3)).failure.global_rank == 1
    # Also where all that the others say is that it did not answer.
    folder.error_file(1).unlink()
    assert first_candidate(folder, {2: 105.2}, {0: 1, 2: -9}, range(3)).failure.global_rank == 0


def test_log_relay_shows_whole_lines_and_progress_bars(tmp_path):
    folder = JobFolder(tmp_path)
    folder.prepare(tmp_path, {})
    output = io.StringIO()
    relay = LogRelay(folder, 3, Console(output, folder))
    relay.forward()
    with folder.rank_log(3).open("wb") as log:
        for piece in (b"one\ntw", b"o\r\n50%\r", "naïve".encode()[:3], "naïve".encode()[3:]):
            log.write(piece)
            log.flush()
            relay.forward()
    relay.close()
    assert output.getvalue() == "[rank 3] one\n[rank 3] two\n[rank 3] 50%\n[rank 3] naïve\n"


# Bad input: one clear error before any process is started


def test_bad_input_of_the_estimator(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    write_script(tmp_path, REPORT)
    with pytest.raises(LaunchError, match=r'ml\.p3\.16xlarge.*instance_type="local"'):
        PyTorch(
            entry_point="train.py",
            instance_type="ml.p3.16xlarge",
            distribution=seed_distribution(SEED_PARAMETERS["tensor"]),
        ).fit()
    with pytest.raises(LaunchError, match=r"missing\.py does not exist"):
        PyTorch("missing.py").fit()
    with pytest.raises(LaunchError, match=r"channel 'train': .*nowhere does not exist"):
        PyTorch("train.py").fit({"train": "nowhere"})
    with pytest.raises(LaunchError, match=r"channel 'training': nowhere://data cannot be opened"):
        PyTorch("train.py").fit("nowhere://data")
    with pytest.raises(LaunchError, match="'hyperparameter': did you mean 'hyperparameters'"):
        PyTorch("train.py", hyperparameter={})
    with pytest.raises(LaunchError, match="instance_count=2"):
        PyTorch("train.py", instance_count=2).fit()
    with pytest.raises(SMPConfigError, match="'elastic' or 'mpi'"):
        PyTorch("train.py", backend="slurm")
    with pytest.raises(LaunchError, match="job_nam"):
        PyTorch("train.py").fit(job_nam="x")
    with pytest.raises(LaunchError, match="no job has been run"):
        _ = PyTorch("train.py").model_data
    with caplog.at_level(logging.INFO, "modelparallel.launch"):
        PyTorch("train.py", role="r", debugger_hook_config=False, volume_size=30)
    assert caplog.messages == ["accepted without effect on a local job: debugger_hook_config, role, volume_size"]
    assert not (tmp_path / "modelparallel-jobs").exists()


def test_more_processes_than_devices():
    with pytest.raises(LaunchError, match="8 processes on 4 devices"):
        check_devices(8, "cuda", 4)
    check_devices(8, "cpu", 0)


def test_bad_input_of_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = str(write_script(tmp_path, REPORT))
    for arguments, said in [
        (["missing.py"], "does not exist"),
        (["--channel", "train", script], "NAME=PATH"),
        (["--channel", "train=nowhere", script], "does not exist"),
        (["--backend", "slurm", script], "elastic or mpi"),
        (["--device", "tpu", script], "auto, cpu or cuda"),
        (["--nproc", "3", "--parameters", '{"partitions": 2, "ddp": true}', script], "3"),
        (["--parameters", '{"microbatch": 2}', script], "microbatches"),
    ]:
        result = CliRunner().invoke(app, ["run", *arguments])
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("error: ")
        assert said in result.stderr
    assert not (tmp_path / "modelparallel-jobs").exists()


def test_command_passes_arguments_and_exit_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("modelparallel.launch.command_line.resolve_device", lambda asked: ("cuda", 2))
    script = write_script(tmp_path, REPORT + "    sys.exit(3 if sys.argv[-1] == '--fail' else 0)\n")
    parameters = tmp_path / "parameters.json"
    parameters.write_text('{"pipeline_parallel_degree": 2}')
    arguments = ["run", "--nproc", "2", "--parameters", str(parameters), "--channel", f"train={tmp_path}"]
    result = CliRunner().invoke(app, [*arguments, "--job-dir", "job", str(script), "--epochs", "3", "a${rank}b"])
    assert result.exit_code == 0, result.output
    first, _ = reports_of(JobFolder(tmp_path / "job"))
    assert first["argv"] == [str(script), "--epochs", "3", "a${rank}b"]
    assert Path(first["cwd"]) == tmp_path
    assert json.loads(first["environ"]["SM_HP_MP_PARAMETERS"]) == {"partitions": 2, "pipeline_parallel_degree": 2}
    result = CliRunner().invoke(app, ["run", "--nproc", "1", str(script), "--fail"])
    assert result.exit_code == 3
    assert "it exited with code 3" in result.stderr
    (folder,) = (tmp_path / "modelparallel-jobs").glob("train-*")
    (report,) = reports_of(JobFolder(folder))
    # Without --parameters nothing is published, so that the script's own smp.init(...) decides.
    assert "SM_HP_MP_PARAMETERS" not in report["environ"]
    assert CliRunner().invoke(app, ["--version"]).output.strip()


# Small parts


def test_mpi_options_are_read_and_merged():
    options = parse_mpi_options("-x FOO=bar -x PATH --NCCL_DEBUG WARN -mca btl ^openib --bind-to core -verbose")
    assert options.exports == {"FOO": "bar", "NCCL_DEBUG": "WARN"}
    assert options.forwards == ("PATH",)
    assert options.rest == ("-verbose",)
    arguments = mpirun_arguments(2, options, ["FOO", "SM_HPS"])
    assert arguments.count("--bind-to") == 1
    assert arguments[arguments.index("--bind-to") + 1] == "core"
    assert arguments.count("FOO") == 1
    assert arguments[arguments.index("btl") + 1] == "^openib"
    with pytest.raises(SMPConfigError, match="--mca needs"):
        parse_mpi_options("--mca btl")


def test_channels(tmp_path):
    assert input_channels(None) == {}
    assert input_channels(tmp_path) == {"training": tmp_path}
    assert local_path(f"file://{tmp_path}", "x") == tmp_path
    with pytest.raises(LaunchError, match="only plain paths"):
        local_path("https://example.org/data", "x")
    with pytest.raises(LaunchError, match="expected a path"):
        input_channels(3)
    with pytest.raises(LaunchError, match="channel name"):
        input_channels({"a b": tmp_path})


def test_a_taken_port_is_avoided():
    with reserved_port(0) as any_port, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        with reserved_port(number) as port:
            assert port not in (number, any_port)
    with reserved_port(number) as port, reserved_port(number) as other:
        assert port == number != other


def test_one_job_per_folder(tmp_path):
    folder = JobFolder(tmp_path / "job")
    with folder.held(), pytest.raises(LaunchError, match="another job is running"), folder.held():
        pass


def test_job_names():
    assert new_job_name("My_demo").startswith("My-demo-2")


def test_failed_fit_raises_with_the_traceback(tmp_path, no_rehearsal, capsys):
    write_script(tmp_path, "raise KeyError('gone')")
    job = PyTorch("train.py", source_dir=tmp_path, job_dir=tmp_path / "job")
    with pytest.raises(JobFailedError, match="KeyError: 'gone'") as caught:
        job.fit()
    assert caught.value.exit_code == 1
    assert caught.value.failure.global_rank == 0


def test_the_handle_of_a_local_job_says_how_it_is_and_what_it_printed(tmp_path):
    write_script(
        tmp_path,
        """
        import os, sys, time
        rank = int(os.environ["RANK"])
        print("rank", rank, "is here", flush=True)
        if os.path.exists("fail"):
            sys.exit(3)
        """,
    )
    two = {**seed_distribution({"ddp": True}), "mpi": {"enabled": True, "processes_per_host": 2}}
    job = PyTorch("train.py", source_dir=tmp_path, distribution=two, job_dir=tmp_path / "job")
    job.fit(wait=False)
    handle = job.latest_training_job
    assert list(handle.logs(rank=1, follow=True)) == ["[rank 1] rank 1 is here"]
    handle.wait(300)
    assert (handle.status().state, handle.status().exit_code) == ("succeeded", 0)
    assert sorted(handle.logs()) == ["[rank 0] rank 0 is here", "[rank 1] rank 1 is here"]
    for wrong in ({"rank": 2}, {"node": 1}):
        with pytest.raises(LaunchError, match=r"rank 2|node 1"):
            handle.logs(**wrong)
    (tmp_path / "fail").touch()
    with pytest.raises(JobFailedError):
        job.fit()
    status = job.latest_training_job.status()
    assert (status.state, status.exit_code) == ("failed", 3) and "rank" in status.reason


def test_a_channel_at_a_url_is_fetched_and_goes_with_the_job(tmp_path, monkeypatch, capsys):
    files = fsspec.filesystem("memory")
    files.pipe("/data/part/one.txt", b"1\n")
    files.pipe("/single.txt", b"2\n")
    monkeypatch.setenv("MODELPARALLEL_SCRATCH", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    write_script(
        tmp_path,
        """
        import os
        channel = os.environ["SM_CHANNEL_TRAIN"]
        print("one", open(os.path.join(channel, "part", "one.txt")).read().strip(), os.environ["SM_CHANNEL_URL_TRAIN"])
        print("two", open(os.path.join(os.environ["SM_CHANNEL_TEST"], "single.txt")).read().strip())
        """,
    )
    job = PyTorch("train.py", source_dir=tmp_path, job_dir=tmp_path / "job")
    job.fit({"train": "memory://data", "test": "memory://single.txt"})
    shown = capsys.readouterr().out
    assert "[rank 0] one 1 memory://data" in shown and "[rank 0] two 2" in shown
    assert not list((tmp_path / "scratch").iterdir())
    with pytest.raises(LaunchError, match=r"channel 'train': there is no file at memory://nothing"):
        job.fit({"train": "memory://nothing"})
