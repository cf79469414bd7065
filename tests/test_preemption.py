"""A job that is preempted: all ranks learn it at the same step, and the script saves, leaves and goes on later."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import modelparallel as smp
from launched_jobs import job_of, processes_with, write_script
from modelparallel.errors import LaunchError, StepUsageError
from modelparallel.job import session
from modelparallel.job.preemption import ASKS_SUFFIX, FILE_VARIABLE
from modelparallel.launch import run_job, worker
from modelparallel.launch.folder import JobFolder
from modelparallel.launch.signals import ended_by_signal
from modelparallel.launch.supervision import RankMonitor
from pool import RankError, run_ranks
from scripts import ROOT, load_script

EXAMPLE = "examples/clusters/train_preemptible.py"
PARAMETERS = {"pipeline_parallel_degree": 2, "microbatches": 2, "ddp": True, "timeout_seconds": 120}
PIPELINE = {"pipeline_parallel_degree": 2, "ddp": True, "timeout_seconds": 40}


# What a script is told


def signalled(number, rank):
    before = smp.preemption_requested()
    if smp.rank() == rank:
        os.kill(os.getpid(), number)
    smp.barrier()
    return before, smp.preemption_requested(), smp.preemption_requested()


@pytest.mark.parametrize(("number", "num_ranks"), [(signal.SIGUSR1, 4), (signal.SIGTERM, 2)])
def test_all_ranks_learn_what_one_was_told_by_a_signal(number, num_ranks):
    answers = run_ranks(signalled, num_ranks, number, 1, parameters=PIPELINE)
    assert answers == [(False, True, True)] * num_ranks


def told_by_file(path):
    os.environ[FILE_VARIABLE] = f"{path}{smp.rank()}"  # each host has its own
    before = smp.preemption_requested()
    if smp.rank() == 1:
        Path(f"{path}1").touch()
    smp.barrier()
    after = smp.preemption_requested()
    Path(f"{path}1").unlink(missing_ok=True)
    return before, after, smp.preemption_requested()


def test_all_ranks_learn_what_the_launcher_of_one_host_was_told(tmp_path):
    answers = run_ranks(told_by_file, 2, str(tmp_path / "preempt"), parameters=PIPELINE)
    assert answers == [(False, True, True)] * 2
    assert Path(f"{tmp_path / 'preempt'}0{ASKS_SUFFIX}").exists(), "a launcher must know that its script asks"


def handlers_of_the_script():
    signal.signal(signal.SIGUSR1, noted := lambda number, frame: None)
    asked = smp.preemption_requested()
    kept = signal.getsignal(signal.SIGUSR1) is noted
    taken = signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    session.shutdown()
    return asked, kept, taken, signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_handlers_of_the_script_stay_and_ours_go_with_the_session():
    assert run_ranks(handlers_of_the_script, 1, parameters={}) == [(False, True, True, True)]


def twice_terminated():
    smp.preemption_requested()
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)  # Python runs handlers between its instructions
    return "alive"


def test_the_second_sigterm_ends_a_process():
    with pytest.raises(RankError, match="exit code -15"):
        run_ranks(twice_terminated, 1, parameters={})


def inside_a_step():
    model = smp.DistributedModel(torch.nn.Linear(2, 2))

    @smp.step
    def train(model, x):
        smp.preemption_requested()
        return model(x)

    with pytest.raises(StepUsageError, match=r"smp\.preemption_requested inside a step function"):
        train(model, torch.ones(2, 2))


def test_inside_a_step_it_is_an_error():
    run_ranks(inside_a_step, 1, parameters={})


def asked_by_one_rank_only():
    with pytest.raises(RuntimeError) as caught:
        if smp.rank() == 0:
            smp.preemption_requested()
        else:
            time.sleep(3)
            raise RuntimeError("done")
    return str(caught.value)


def test_a_rank_that_does_not_ask_is_named():
    parameters = {"ddp": True, "timeout_seconds": 40, "message_timeout_seconds": 1}
    text = run_ranks(asked_by_one_rank_only, 2, parameters=parameters)[0]
    assert "smp.preemption_requested" in text and "message_timeout_seconds=1" in text, text


# What the launcher does


SAVES = """
    import os, sys, time
    path = os.environ["MODELPARALLEL_PREEMPTION_FILE"]
    if "asks" in sys.argv:
        open(path + ".asks", "w").close()
    print("ready", flush=True)
    deadline = time.monotonic() + 60
    while not os.path.exists(path) and time.monotonic() < deadline:
        time.sleep(0.05)
    if "stays" in sys.argv:
        time.sleep(60)
    if os.environ["RANK"] == "1":
        time.sleep(2)  # it still saves when the other has left
        print("saved", flush=True)
    sys.exit(85)
"""


LAUNCHER = """
import sys
from pathlib import Path
from launched_jobs import job_of
from modelparallel.launch import run_job
place, script, *arguments = sys.argv[1:]
result = run_job(job_of(Path(place), Path(script), arguments=tuple(arguments), max_restarts=3))
print(result.message)
sys.exit(result.exit_code)
"""


def launched(tmp_path, script, *arguments, environment=None):
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(tmp_path), str(script), *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", **(environment or {})},
        )
    deadline = time.monotonic() + 120
    while (tmp_path / "output").read_text().count("ready") < 2:
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "output").read_text()
        time.sleep(0.05)
    return process


def ended(process, tmp_path):
    code = process.wait(timeout=120)
    return code, (tmp_path / "output").read_text()


@pytest.mark.parametrize(
    ("number", "arguments"),
    [
        (signal.SIGUSR1, ()),
        (signal.SIGTERM, ("asks",)),
        pytest.param(signal.SIGUSR1, ("asks",), marks=pytest.mark.slow),
    ],
)
def test_the_launcher_asks_the_script_and_passes_its_exit_code_on(tmp_path, number, arguments):
    script = write_script(tmp_path, SAVES)
    process = launched(tmp_path, script, *arguments)
    process.send_signal(number)
    code, output = ended(process, tmp_path)
    assert code == smp.EXIT_PREEMPTED, output
    assert f"[launcher] {number.name}: the job is to be preempted" in output
    assert ("which it has not done yet" in output) == (not arguments), output
    # Nobody is ended because another has left, and no attempt follows.
    assert "[rank 1] saved" in output and "attempt 2" not in output
    assert "was preempted after" in output and "left with exit code 85" in output
    assert not JobFolder(tmp_path / "job").failure_file.exists(), "it is no failure"


@pytest.mark.parametrize(
    "case", ["second signal", *(pytest.param(case, marks=pytest.mark.slow) for case in ("does not ask", "stays"))]
)
def test_sigterm_ends_a_job_that_does_not_leave(tmp_path, case):
    script = write_script(tmp_path, SAVES)
    arguments = {"does not ask": (), "second signal": ("asks", "stays"), "stays": ("asks", "stays")}[case]
    process = launched(tmp_path, script, *arguments, environment={"MODELPARALLEL_PREEMPTION_SECONDS": "1"})
    if case == "second signal":
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    code, output = ended(process, tmp_path)
    assert code == 143, output
    if case == "stays":
        assert "its script was asked to save and leave, and has not left in time" in output


def test_a_request_is_told_to_every_attempt(tmp_path):
    script = write_script(
        tmp_path,
        """
        import os, sys, time
        path = os.environ["MODELPARALLEL_PREEMPTION_FILE"]
        deadline = time.monotonic() + 60
        while not os.path.exists(path) and time.monotonic() < deadline:
            time.sleep(0.05)
        sys.exit(3 if os.environ["MODELPARALLEL_RESTART_COUNT"] == "0" else 85)
        """,
    )
    monitor = RankMonitor()
    monitor.request_preemption("a test")
    result = run_job(job_of(tmp_path, script, max_restarts=2), io.StringIO(), monitor)
    assert (result.exit_code, len(result.attempts), result.is_preempted) == (85, 2, True), result.message
    assert "was preempted in attempt 2 of 3" in result.message
    assert [attempt.exit_code for attempt in result.attempts] == [3, 85]
    # A later job in the same folder was asked by nobody.
    script.write_text("import os; assert not os.path.exists(os.environ['MODELPARALLEL_PREEMPTION_FILE'])")
    assert run_job(job_of(tmp_path, script), io.StringIO()).exit_code == 0


def test_a_wrong_number_of_seconds_is_named(monkeypatch):
    monkeypatch.setenv("MODELPARALLEL_PREEMPTION_SECONDS", "soon")
    with pytest.raises(LaunchError, match="MODELPARALLEL_PREEMPTION_SECONDS: expected a number of seconds, got 'soon'"):
        with ended_by_signal(RankMonitor()):
            pass


def test_the_bootstrap_knows_the_exit_code():
    assert worker._EXIT_PREEMPTED == smp.EXIT_PREEMPTED


# Training goes on


def train(folder):
    load_script(EXAMPLE).main(folder)


def run_training(folder, *, backend="elastic", signal_to=None):
    """`modelparallel run` of the example; after its second step `signal_to(launcher)` preempts it."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "modelparallel", "run", "--nproc", "2", "--device", "cpu", "--backend", backend]
    command += ["--parameters", json.dumps(PARAMETERS), "--job-dir", str(folder / "job")]
    command += [str(ROOT / EXAMPLE), str(folder), "--seconds", "0" if signal_to is None else "0.5"]
    with open(folder / "output", "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 240
            while signal_to is not None and "[rank 1] step 1 " not in (folder / "output").read_text():
                assert process.poll() is None and time.monotonic() < deadline, (folder / "output").read_text()
                time.sleep(0.05)
            if signal_to is not None:
                signal_to(process, JobFolder(folder / "job"))
            code = process.wait(timeout=240)
        finally:
            process.kill()
            process.wait()
    return code, (folder / "output").read_text()


def to_launcher(process, folder):
    process.send_signal(signal.SIGUSR1)


def to_all_processes(number):
    """As a batch system does, which does not tell the launcher from the ranks."""

    def send(process, folder):
        for pid in [process.pid, *processes_with(str(folder.description))]:
            os.kill(pid, number)

    return send


def losses_of(folder):
    return [tuple(json.loads(line)) for line in (folder / "losses.jsonl").read_text().splitlines()]


WAYS = {
    "SIGUSR1 to the launcher": ("elastic", to_launcher),
    "SIGUSR1 to all": ("elastic", to_all_processes(signal.SIGUSR1)),
    "SIGTERM to all": ("elastic", to_all_processes(signal.SIGTERM)),
    "mpi": ("mpi", to_launcher),
}


@pytest.mark.parametrize("way", ["SIGTERM to all", *(pytest.param(w, marks=pytest.mark.slow) for w in list(WAYS)[:2]),
                                 pytest.param("mpi", marks=pytest.mark.slow)])  # fmt: skip
@pytest.mark.timeout(700)
def test_a_preempted_job_goes_on_with_the_losses_of_one_that_was_not(tmp_path, way):
    backend, signal_to = WAYS[way]
    (tmp_path / "whole").mkdir()
    run_ranks(train, 2, tmp_path / "whole", parameters=PARAMETERS)
    code, output = run_training(tmp_path / "parts", backend=backend, signal_to=signal_to)
    assert code == smp.EXIT_PREEMPTED, output
    assert "was preempted after" in output and "Traceback" not in output, output
    first = losses_of(tmp_path / "parts")
    assert 2 <= len(first) < 5, first
    code, output = run_training(tmp_path / "parts", backend=backend)
    assert code == 0 and "all steps are done" in output, output
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")
    assert [step for step, _ in losses_of(tmp_path / "parts")] == list(range(5)), "no step was done twice"
