"""Restarts: a job whose processes died is started again, with as many of them or fewer, and ends as if nothing was."""

import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from launched_jobs import job_of, processes_with, seed_distribution, write_script
from modelparallel.config.reading import validate_parameters
from modelparallel.errors import LaunchError
from modelparallel.launch import JobFailedError, PyTorch, estimator, job, run_job
from modelparallel.launch.attempts import Attempt, Start, next_start, read_attempts
from modelparallel.launch.command_line import app
from modelparallel.launch.devices import device_names, working_devices
from modelparallel.launch.explain import explain
from modelparallel.launch.folder import JobFolder
from modelparallel.launch.process_counts import fitting_counts, parse_process_counts
from modelparallel.launch.supervision import RankMonitor
from parity import assert_parity
from pool import run_ranks
from restart_job import NUM_STEPS, PARAMETERS, train


@pytest.fixture
def devices(monkeypatch):
    """Jobs on "cuda" here do not import torch; this says which devices they have, and which still work."""
    state = {"names": ("0", "1", "2", "3"), "working": ("0", "1", "2", "3")}
    monkeypatch.setattr(job, "device_names", lambda environment: state["names"])
    monkeypatch.setattr(job, "working_devices", lambda environment: state["working"])
    return state


# Training goes on


def uninterrupted(tmp_path, num_ranks):
    """The weights after a training that nobody disturbs."""
    whole = tmp_path / "whole"
    whole.mkdir()
    return run_ranks(train, num_ranks, str(whole), parameters=PARAMETERS)[0]


def launch_training(tmp_path, *arguments, script_arguments=()):
    """`modelparallel run` of the training script; returns (result, one weights dict a rank of the last attempt)."""
    command = [sys.executable, "-m", "modelparallel", "run", "--device", "cpu", "--job-dir", str(tmp_path / "job")]
    command += ["--parameters", json.dumps(PARAMETERS), *arguments]
    command += [str(Path(__file__).with_name("restart_job.py")), str(tmp_path), *script_arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    print(result.stdout, result.stderr)
    assert result.returncode == 0
    return result, [torch.load(path, weights_only=True) for path in sorted(tmp_path.glob("weights*.pt"))]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_killed_rank_restarts_and_ends_with_the_same_weights(tmp_path):
    expected = uninterrupted(tmp_path, 2)
    death = ("--dies-in-step", "3", "--dying-rank", "1", "--deaths", "1")
    result, weights = launch_training(tmp_path, "--nproc", "2", "--max-restarts", "3", script_arguments=death)
    assert len(weights) == 2
    for state in weights:
        torch.testing.assert_close(state, expected, rtol=0, atol=0)
    # Steps 2 and 3 were done twice: the checkpoint of the first attempt had two steps behind it.
    steps = [int(step) for step in re.findall(r"\[rank 0\] step (\d) of 2 ranks", result.stdout)]
    assert steps == [0, 1, 2, 3, *range(2, NUM_STEPS)]
    assert re.search(r"\[launcher\] attempt 2 of 4 after: rank 1 was killed by SIGKILL", result.stdout)
    assert re.search(r"\[launcher\] job .* finished in [\d.]+ s, in attempt 2 of 4", result.stdout)
    first, second = read_attempts(JobFolder(tmp_path / "job"))
    assert (first.first_rank, first.exit_code, second.first_rank, second.exit_code) == (1, 137, None, 0)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_training_goes_on_with_fewer_ranks(tmp_path):
    expected = uninterrupted(tmp_path, 4)
    death = ("--dies-in-step", "3", "--dying-rank", "3", "--deaths", "2")
    result, weights = launch_training(tmp_path, "--nproc", "2:4", "--max-restarts", "3", script_arguments=death)
    assert len(weights) == 2
    for state in weights:
        assert_parity(state, expected, dtype=torch.float32)
    assert re.search(r"\[launcher\] attempt 2 of 4 after: rank 3 was killed by SIGKILL", result.stdout)
    assert "[launcher] 2 processes (there were 4): rank 3 failed first twice in a row" in result.stdout
    steps = re.findall(r"\[rank 0\] step (\d) of (\d) ranks", result.stdout)
    assert steps[-4:] == [(str(step), "2") for step in range(2, NUM_STEPS)]
    assert [attempt.num_processes for attempt in read_attempts(JobFolder(tmp_path / "job"))] == [4, 4, 2]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_training_goes_on_under_torchrun_s_own_restarts(tmp_path):
    """On several hosts torchrun starts the script; its agent keeps the store between the attempts."""
    expected = uninterrupted(tmp_path, 2)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command += [str(Path(__file__).with_name("restart_job.py")), str(tmp_path)]
    command += ["--dies-in-step", "3", "--dying-rank", "1", "--deaths", "1"]
    environment = {**os.environ, "SM_HP_MP_PARAMETERS": json.dumps(PARAMETERS), "MODELPARALLEL_DEVICE": "cpu"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    for path in sorted(tmp_path.glob("weights*.pt")):
        torch.testing.assert_close(torch.load(path, weights_only=True), expected, rtol=0, atol=0)


# What the launcher does


FAILING = """
    import json, os, sys, time
    from pathlib import Path
    rank = int(os.environ.get("RANK") or os.environ["OMPI_COMM_WORLD_RANK"])
    world = int(os.environ.get("WORLD_SIZE") or os.environ["OMPI_COMM_WORLD_SIZE"])
    count = int(os.environ["MODELPARALLEL_RESTART_COUNT"])
    names = ("MODELPARALLEL_MAX_RESTARTS", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS",
             "CUDA_VISIBLE_DEVICES", "SM_NUM_GPUS", "MASTER_PORT")
    seen = {"world": world, **{name: os.environ.get(name) for name in names}}
    output = Path(os.environ["SM_OUTPUT_DATA_DIR"])
    (output / f"attempt{count}-rank{rank}.json").write_text(json.dumps(seen))
    print(f"attempt {count}", flush=True)
    failures = sys.argv[1].split(",")       # one word an attempt: which rank fails, and how
    if count < len(failures):
        dying, how = failures[count].split("-")
        if rank == int(dying):
            time.sleep(0.2)
            if how == "kill":
                os.kill(os.getpid(), 9)
            raise ValueError(f"failure {count}")
        time.sleep(60)
"""


def seen_by(folder, attempt):
    return [json.loads(path.read_text()) for path in sorted(folder.output_data.glob(f"attempt{attempt}-rank*.json"))]


@pytest.mark.parametrize("backend", ["elastic", "mpi"])
def test_all_ranks_are_started_again(tmp_path, devices, backend):
    script = write_script(tmp_path, FAILING)
    output = io.StringIO()
    spec = job_of(tmp_path, script, backend=backend, arguments=("1-kill,0-raise",), max_restarts=2)
    result = run_job(spec, output)
    assert (result.exit_code, result.message, len(result.attempts)) == (0, "", 3)
    assert [attempt.reason for attempt in result.attempts] == [
        "rank 1 was killed by SIGKILL (by hand, or by the kernel because memory ran out)",
        "rank 0: ValueError: failure 1",
        "",
    ]
    assert "[launcher] attempt 3 of 3 after: rank 0: ValueError: failure 1\n" in output.getvalue()
    for number in range(3):
        for rank, seen in enumerate(seen_by(result.folder, number)):
            assert f"[rank {rank}] attempt {number}\n" in output.getvalue()
            assert (seen["world"], seen["MODELPARALLEL_MAX_RESTARTS"], seen["CUDA_VISIBLE_DEVICES"]) == (2, "2", None)
            if backend == "elastic":
                assert (seen["TORCHELASTIC_RESTART_COUNT"], seen["TORCHELASTIC_MAX_RESTARTS"]) == (str(number), "2")
    # The files of an attempt are its own.
    assert result.folder.rank_log(0).read_text() == "attempt 2\n"
    assert result.folder.attempt(1).rank_log(1).read_text() == "attempt 0\n"
    assert json.loads(result.folder.attempt(2).error_file(0).read_text())["summary"] == "ValueError: failure 1"
    assert not result.folder.error_file(0).exists()
    assert "attempt 2 of 3 after" in result.folder.launcher_log.read_text()
    assert not result.folder.failure_file.exists()
    assert read_attempts(result.folder) == result.attempts
    told = explain(result.folder)
    assert f"modelparallel explain {result.folder.attempt(1).root}" in told
    assert "ValueError: failure 1" in explain(result.folder.attempt(2))
    # A second job in this folder starts from the beginning.
    again = run_job(replace(spec, arguments=("0-raise",), max_restarts=0), io.StringIO())
    assert again.exit_code == 1 and not again.folder.attempts.exists()


def test_failure_of_the_last_attempt_has_the_history(tmp_path, devices):
    script = write_script(tmp_path, FAILING)
    arguments = ("0-kill,1-raise,1-raise",)
    result = run_job(job_of(tmp_path, script, arguments=arguments, max_restarts=2), io.StringIO())
    assert (result.exit_code, result.failure.global_rank) == (1, 1)
    lines = result.message.splitlines()
    assert re.fullmatch(r"job test failed in attempt 3 of 3, after [\d.]+ s:", lines[0])
    moment = r"\(2 processes, \d\d:\d\d:\d\d, [\d.]+ s\)"
    folder = re.escape(str(result.folder.root))
    assert re.fullmatch(rf"  attempt 1 {moment}: rank 0 was killed .*; logs: {folder}/attempts/1/logs", lines[1])
    assert re.fullmatch(
        rf"  attempt 2 {moment}: rank 1: ValueError: failure 1; logs: {folder}/attempts/2/logs", lines[2]
    )
    assert re.fullmatch(rf"  attempt 3 {moment}: rank 1: ValueError: failure 2; logs: {folder}/logs", lines[3])
    assert lines[4].startswith("rank 1 of 2 failed first")
    assert lines[-1] == "ValueError: failure 2"
    assert result.folder.failure_file.read_text().strip() == result.message
    assert processes_with(str(result.folder.description)) == []


def test_job_shrinks_to_devices_that_work(tmp_path, devices):
    script = write_script(tmp_path, FAILING)
    devices["working"] = ("0", "2", "3")
    output = io.StringIO()
    spec = job_of(tmp_path, script, num_processes=4, fewer_processes=(2,), arguments=("1-kill,0-kill",), max_restarts=5)
    result = run_job(spec, output)
    assert [attempt.num_processes for attempt in result.attempts] == [4, 2, 2]
    assert [attempt.devices for attempt in result.attempts] == [None, ("0", "2"), ("0", "2")]
    assert "[launcher] 2 processes on devices 0, 2 (there were 4): 3 of 4 devices work\n" in output.getvalue()
    for number in (1, 2):
        for seen in seen_by(result.folder, number):
            assert (seen["world"], seen["CUDA_VISIBLE_DEVICES"], seen["SM_NUM_GPUS"]) == (2, "0,2", "2")
    devices["working"] = ("3",)
    result = run_job(spec, io.StringIO())
    assert result.exit_code == 137 and len(result.attempts) == 1
    assert "1 of 4 devices work (3), and the job needs 2: it is not started again" in result.message


CLINGING = """
    import os, signal, subprocess, sys, time
    from pathlib import Path
    output = Path(os.environ["SM_OUTPUT_DATA_DIR"])
    rank, count = int(os.environ["RANK"]), int(os.environ["MODELPARALLEL_RESTART_COUNT"])
    if count == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True)
        (output / f"pids{rank}").write_text(f"{os.getpid()} {child.pid}")
        while len(list(output.glob("pids*"))) < 2:
            time.sleep(0.05)
        if rank == 1:
            os.kill(os.getpid(), 9)
        time.sleep(100)     # hangs, as in a message that never comes
    def is_alive(pid):      # a zombie is not
        stat = Path(f"/proc/{pid}/stat")
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
    alive = [pid for path in output.glob("pids*") for pid in path.read_text().split() if is_alive(pid)]
    (output / f"alive{rank}").write_text(" ".join(alive))
"""


def test_ranks_that_hang_and_helpers_are_gone_before_the_next_attempt(tmp_path, devices):
    script = write_script(tmp_path, CLINGING)
    started = time.monotonic()
    result = run_job(job_of(tmp_path, script, max_restarts=1), io.StringIO())
    assert result.exit_code == 0 and len(result.attempts) == 2
    assert time.monotonic() - started < 30
    for rank in range(2):
        assert (result.folder.output_data / f"alive{rank}").read_text() == ""


@pytest.mark.parametrize("how", ["stop", pytest.param("timeout", marks=pytest.mark.slow)])
def test_no_restart_of_a_job_that_was_stopped(tmp_path, devices, how):
    script = write_script(tmp_path, FAILING)
    timeout = 4.0 if how == "timeout" else None
    spec = job_of(tmp_path, script, arguments=("0-kill,9-wait",), max_restarts=5, timeout=timeout)
    monitor = RankMonitor()
    if how == "stop":

        def stop():
            while len(seen_by(spec.folder, 1)) < 2:
                time.sleep(0.1)
            monitor.request_stop("stop() was called")

        threading.Thread(target=stop, daemon=True).start()  # it must not outlive a job that ends otherwise
    result = run_job(spec, io.StringIO(), monitor)
    assert (result.exit_code, len(result.attempts)) == (143 if how == "stop" else 124, 2)
    assert "job test was stopped in attempt 2 of 6" in result.message
    assert "attempt 1 (2 processes" in result.message


def test_estimator_restarts_and_shrinks(tmp_path, devices, monkeypatch, capsys):
    monkeypatch.setattr(estimator, "resolve_device", lambda asked: ("cuda", 4))
    write_script(tmp_path, FAILING)
    settings = {
        "source_dir": tmp_path,
        "distribution": seed_distribution({"pipeline_parallel_degree": 2, "ddp": True}),
        "job_dir": tmp_path / "job",
        "hyperparameters": {},
        "pass_mp_parameters": False,
    }
    script = tmp_path / "train.py"
    script.write_text(script.read_text().replace("sys.argv[1]", "'1-kill,1-kill'"))
    # 8 processes per host, 4 devices: it begins with 4.
    estimator_job = PyTorch("train.py", **settings, max_restarts=2, min_processes=2)
    estimator_job.fit()
    attempts = read_attempts(estimator_job.latest_training_job.folder)
    assert [attempt.num_processes for attempt in attempts] == [4, 4, 2]
    # The device of the rank that failed twice is the one that is left out.
    assert [attempt.devices for attempt in attempts] == [None, None, ("0", "2")]
    assert "(there were 4): rank 1 failed first twice in a row" in capsys.readouterr().out
    with pytest.raises(JobFailedError, match="failed in attempt 2 of 2") as caught:
        PyTorch("train.py", **settings, max_restarts=1, min_processes=2).fit()
    assert [attempt.first_rank for attempt in caught.value.attempts] == [1, 1]
    with pytest.raises(LaunchError, match=r"min_processes=5, processes_per_host=8: .* on 4 devices"):
        PyTorch("train.py", **settings, min_processes=5).fit()
    with pytest.raises(LaunchError, match="max_restarts: expected int >= 0, got -1"):
        PyTorch("train.py", **settings, max_restarts=-1)
    with pytest.raises(LaunchError, match="min_processes: without distribution"):
        PyTorch("train.py", source_dir=tmp_path, min_processes=1)


# Which numbers of processes


def test_ranges_are_read():
    assert parse_process_counts("8") == (8, 8)
    assert parse_process_counts("4:8") == (4, 8)
    for text, said in [("4-8", "8, or 4:8"), ("0", "at least 1"), ("8:4", "is more than the most"), ("", "8, or 4:8")]:
        with pytest.raises(LaunchError, match=said):
            parse_process_counts(text)


def test_only_numbers_that_fit_the_degrees():
    def counts(least, most, available=0, **parameters):
        config = validate_parameters(parameters, num_processes=None)
        return fitting_counts(config, least, most, available, f"--nproc {least}:{most}")

    pipeline = {"pipeline_parallel_degree": 2, "ddp": True}
    assert counts(3, 8, **pipeline) == (8, 6, 4)
    assert counts(3, 8, available=7, **pipeline) == (6, 4)
    assert counts(1, 8, **pipeline, tensor_parallel_degree=2) == (8, 4)
    assert counts(1, 16, **pipeline, sharded_data_parallel_degree=4) == (16, 8)
    assert counts(1, 8, pipeline_parallel_degree=2) == (2,)
    with pytest.raises(LaunchError, match=r"multiple of 4 \(pipeline_parallel_degree=2 \* tensor_parallel_degree=2\)"):
        counts(5, 7, **pipeline, tensor_parallel_degree=2)
    with pytest.raises(LaunchError, match=r"sharded_data_parallel_degree=4\); use a range that holds 8"):
        counts(2, 7, **pipeline, sharded_data_parallel_degree=4)
    with pytest.raises(LaunchError, match="ddp: True"):
        counts(4, 8, pipeline_parallel_degree=2)
    with pytest.raises(LaunchError, match="on 3 devices, one process each"):
        counts(4, 8, available=3, **pipeline)


def test_bad_ranges_stop_the_command_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = str(write_script(tmp_path, FAILING))
    parameters = ["--parameters", json.dumps({"pipeline_parallel_degree": 4, "ddp": True})]
    for arguments, said in [
        (["--nproc", "2:3", *parameters], "multiple of 4 (pipeline_parallel_degree=4"),
        (["--nproc", "x", *parameters], "expected a number of processes or a range"),
        (["--nproc", "2:4"], "a range needs --parameters"),
    ]:
        result = CliRunner().invoke(app, ["run", *arguments, "--device", "cpu", script])
        assert result.exit_code == 2, result.output
        assert said in result.stderr
    assert not (tmp_path / "modelparallel-jobs").exists()


def attempts_of(*firsts, num_processes=4, devices=None):
    return [
        Attempt(number, num_processes, 0.0, 1.0, 137, first, "", devices)
        for number, first in enumerate(firsts, start=1)
    ]


def test_next_start():
    host = ("0", "1", "2", "3")
    # On the CPU: the same number, fewer after the same rank failed twice, the same again if there is no smaller one.
    assert next_start((4, 2), attempts_of(1), (), ()) == Start(4)
    assert next_start((4, 2), attempts_of(1, 2), (), ()) == Start(4)
    assert next_start((4, 2), attempts_of(None, None), (), ()) == Start(4)
    assert next_start((4, 2), attempts_of(0, 1, 1), (), ()) == Start(2, None, "rank 1 failed first twice in a row")
    assert next_start((4,), attempts_of(1, 1), (), ()) == Start(4)
    # Devices: those that work; the suspect goes first; ranks keep theirs; spare ones are used.
    assert next_start((4, 2), attempts_of(1), host, host) == Start(4)
    assert next_start((4, 2), attempts_of(1), host, ("0", "1", "3")) == Start(2, None, "3 of 4 devices work")
    assert next_start((4, 3), attempts_of(1), host, ("0", "1", "3")).devices == ("0", "1", "3")
    assert next_start((4, 3), attempts_of(1, 1), host, host).devices == ("0", "2", "3")
    six = (*host, "4", "5")
    assert next_start((4, 2), attempts_of(1), six, ("0", "2", "3", "4", "5")).devices == ("0", "2", "3", "4")
    swapped = next_start((4,), attempts_of(1, 1), six, six)
    assert (swapped.num_processes, swapped.devices) == (4, ("0", "2", "3", "4"))
    # A failure on other devices does not count as the second one in a row.
    later = [*attempts_of(1), *attempts_of(1, devices=("0", "2", "3", "4"))]
    assert next_start((4, 2), later, six, six) == Start(4, ("0", "2", "3", "4"))
    # A job does not grow again.
    assert next_start((4, 2), [*attempts_of(1), *attempts_of(1, num_processes=2)], host, host) == Start(2)
    with pytest.raises(LaunchError, match="1 of 4 devices work"):
        next_start((4, 2), attempts_of(1), host, ("0",))


def test_devices_that_work(monkeypatch):
    assert device_names({"CUDA_VISIBLE_DEVICES": "3, 1,GPU-8a,-1,0"}) == ("3", "1", "GPU-8a")
    assert device_names({"CUDA_VISIBLE_DEVICES": ""}) == ()
    monkeypatch.setattr("modelparallel.launch.devices.num_gpus", lambda: 2)
    assert device_names({}) == ("0", "1")
    # Each device is tried alone, by its name; one that fails and one that hangs do not count.
    probe = (
        "import os, time; name = os.environ['CUDA_VISIBLE_DEVICES']; time.sleep(60 * (name == '2')); assert name != '1'"
    )
    monkeypatch.setattr("modelparallel.launch.devices._PROBE", probe)
    monkeypatch.setattr("modelparallel.launch.devices._PROBE_SECONDS", 2.0)
    assert working_devices({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}) == ("0", "3")


def test_processes_that_cannot_be_ended_stop_the_restarts(tmp_path, devices, monkeypatch):
    script = write_script(tmp_path, FAILING)
    monkeypatch.setattr(job, "end_leftovers", lambda description, patience: 1 if patience > 2 else 0)
    result = run_job(job_of(tmp_path, script, arguments=("1-raise",), max_restarts=3), io.StringIO())
    assert result.exit_code == 1 and len(result.attempts) == 1
    assert "1 processes of attempt 1 cannot be ended within 30 s" in result.message
    assert result.message.rstrip().endswith("ValueError: failure 0")


def test_interrupt_between_two_attempts_ends_the_job(tmp_path, devices, monkeypatch):
    def interrupt(environment):
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "working_devices", interrupt)
    result = run_job(
        job_of(tmp_path, write_script(tmp_path, FAILING), arguments=("1-raise",), max_restarts=3), io.StringIO()
    )
    assert (result.exit_code, len(result.attempts), result.failure) == (130, 1, None)
    assert "stopped by SIGINT before attempt 2" in result.message
    assert result.folder.failure_file.exists()
