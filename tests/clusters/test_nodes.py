"""`modelparallel run --nnodes`: one command on each of several hosts, and one story of what happened on all of them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from clusters.hosts import Host, some_hosts, two_hosts
from clusters.runs import PATIENCE, SCRIPT, check_losses
from scripts import ROOT

__all__ = ["two_hosts"]

RUN = [sys.executable, "-m", "modelparallel", "run", "--device", "cpu"]
EXPLAIN = [sys.executable, "-m", "modelparallel", "explain"]
THREE_STAGES = '{"pipeline_parallel_degree": 3, "microbatches": 2, "ddp": true}'
#: train.py, but for something that is done in the first attempt only.
ONCE = f"""
import os, runpy, sys
if os.environ["MODELPARALLEL_RESTART_COUNT"] == sys.argv[1]:
    sys.argv[1:] = sys.argv[3:]
else:
    sys.argv[1:] = sys.argv[2].split()
print("attempt", os.environ["MODELPARALLEL_RESTART_COUNT"], os.environ["WORLD_SIZE"], flush=True)
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


def start_nodes(
    hosts: Sequence[Host],
    folders: Sequence[Path],
    script: Sequence[str | Path],
    *options: str,
    logs: Path,
    counts: Sequence[int] = (1, 1),
    nnodes: str = "",
    has_rank: bool = True,
    **variables: str,
) -> list[tuple[subprocess.Popen[str], Path]]:
    """The command on each host, with its log."""
    started = []
    for number, host in enumerate(hosts):
        log = logs / f"{host.name}.log"
        place = ["--nnodes", nnodes or str(len(hosts)), "--rendezvous", hosts[0].name, "--job-id", "job"]
        place += ["--node-rank", str(number)] if has_rank else []
        own = ["--nproc", str(counts[number]), "--job-dir", str(folders[number])]
        command = [*RUN, *place, *own, *options, *map(str, script)]
        started.append((host.start(command, log=log, cwd=logs, **variables), log))
    return started


def ends_of(started: Sequence[tuple[subprocess.Popen[str], Path]]) -> list[tuple[int, str]]:
    return [(process.wait(PATIENCE), log.read_text()) for process, log in started]


def shown(ends: Sequence[tuple[int, str]]) -> str:
    return "\n".join(f"--- exit code {code}\n{text}" for code, text in ends)


def wait_for(log: Path, text: str, started: Sequence[tuple[subprocess.Popen[str], Path]]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not log.exists() or text not in log.read_text(errors="replace"):
        assert time.monotonic() < deadline, log.read_text()
        assert all(process.poll() is None for process, _ in started), shown(ends_of(started))
        time.sleep(0.1)


def error_of(text: str) -> str:
    """What the command shows last."""
    return text[text.index("error: ") :]


def test_the_second_seed_job_on_two_hosts_equals_one_process(two_hosts, tmp_path):
    seed_jobs = pytest.importorskip("test_seed_jobs")
    name = "train_tensor_pipeline_parallel"
    job = [ROOT / "tests" / "seed_job.py", name, tmp_path]
    parameters = ("--parameters", json.dumps(seed_jobs.PARAMETERS[name]))
    ends = ends_of(start_nodes(two_hosts, [tmp_path / "job"] * 2, job, *parameters, logs=tmp_path, counts=(2, 2)))
    assert [code for code, _ in ends] == [0, 0], shown(ends)
    results = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(4)]
    seed_jobs.check(name, results, torch.float32, num_copies=2)
    first, second = (text for _, text in ends)
    assert "4 processes (2 on node-a, 2 on node-b) by elastic on cpu; this is node 0" in first
    assert "[launcher] memory of stage 1 (" in first
    assert re.search(r"^\[node-b rank 2\]", second, re.MULTILINE) is None or "node-a rank" not in second


def test_hosts_may_differ_in_the_number_of_processes_and_share_no_files(two_hosts, tmp_path):
    folders = [tmp_path / "on-a", tmp_path / "on-b"]
    options = ("--parameters", THREE_STAGES)
    ends = ends_of(start_nodes(two_hosts, folders, [SCRIPT], *options, logs=tmp_path, counts=(1, 2)))
    assert [code for code, _ in ends] == [0, 0], shown(ends)
    check_losses(ends[0][1])
    for rank in (1, 2):
        local = f"[node-b rank {rank}] node-b rank {rank} of 3 local {rank - 1} of 2 interface eth0 =eth0"
        assert local in ends[1][1], ends[1][1]
    for folder, node, host in ((folders[0], 0, "node-a"), (folders[1], 1, "node-b")):
        config = folder / "input" / "config" / ("" if node == 0 else "node_1") / "resourceconfig.json"
        resources = json.loads(config.read_text())
        assert (resources["current_host"], resources["hosts"]) == (host, ["node-a", "node-b"])
        assert sorted(path.name for path in (folder / "logs").iterdir()) == [f"node_{node}"]
    assert (folders[1] / "logs" / "node_1" / "rank_2.log").exists()


def test_an_exception_on_one_host_is_what_all_hosts_show(two_hosts, tmp_path):
    folder = tmp_path / "job"
    job = [SCRIPT, "--fail", "2:1"]
    options = ("--parameters", THREE_STAGES)
    ends = ends_of(start_nodes(two_hosts, [folder] * 2, job, *options, logs=tmp_path, counts=(1, 2)))
    assert [code for code, _ in ends] == [1, 1], shown(ends)
    first, second = (error_of(text) for _, text in ends)
    assert first == second, shown(ends)
    assert re.match(r"error: rank 2 of 3 on node-b failed first, after [\d.]+ s: ValueError: deliberate failure", first)
    assert f"its log on node-b: {folder}/logs/node_1/rank_2.log" in first
    assert first.rstrip().endswith("ValueError: deliberate failure of the script") and "train.py" in first
    story = subprocess.run([*EXPLAIN, folder], capture_output=True, text=True, timeout=PATIENCE)
    assert "3 ranks" in story.stdout and "the launchers said: rank 2 of 3 on node-b failed first" in story.stdout
    assert re.search(r"first: rank 2 \((pp_rank 2, )?node-b\) failed .*ValueError: deliberate", story.stdout), (
        story.stdout
    )


def test_a_killed_process_on_one_host_is_named_on_all(two_hosts, tmp_path):
    job = [SCRIPT, "--kill", "1:1"]
    options = ("--parameters", THREE_STAGES)
    ends = ends_of(start_nodes(two_hosts, [tmp_path / "job"] * 2, job, *options, logs=tmp_path, counts=(1, 2)))
    assert [code for code, _ in ends] == [137, 137], shown(ends)
    for _, text in ends:
        assert "rank 1 of 3 on node-b failed first" in text and "it was killed by SIGKILL" in text, text


def test_a_host_that_vanishes_is_named_within_a_minute(two_hosts, tmp_path):
    _, second = two_hosts
    job = [SCRIPT, "--steps", "10000", "--seconds", "0.2", "--timeout", "600"]
    options = ("--parameters", '{"pipeline_parallel_degree": 2, "microbatches": 2}')
    started = start_nodes(two_hosts, [tmp_path / "job"] * 2, job, *options, logs=tmp_path)
    wait_for(tmp_path / "node-a.log", "step 3 loss", started)
    second.disconnect()
    gone = time.monotonic()
    code = started[0][0].wait(PATIENCE)
    seconds = time.monotonic() - gone
    first = (tmp_path / "node-a.log").read_text()
    assert code == 75 and seconds < 60 + 45, first  # of silence; and to end, on a busy machine
    assert re.search(r"error: job \S+ failed after [\d.]+ s: host node-b \(node 1\) was lost: no sign of life", first)
    code = started[1][0].wait(PATIENCE)
    other = (tmp_path / "node-b.log").read_text()
    assert code == 75 and "host node-a (node 0) was lost" in other, other


def test_all_hosts_start_again_together(two_hosts, tmp_path):
    script = tmp_path / "once.py"
    script.write_text(ONCE)
    folders = [tmp_path / "on-a", tmp_path / "on-b"]
    options = ("--parameters", THREE_STAGES, "--max-restarts", "2")
    job = [script, "3", "", "--fail", "2:1"]  # Slurm has started it three times before
    started = start_nodes(two_hosts, folders, job, *options, logs=tmp_path, counts=(1, 2), SLURM_RESTART_COUNT="3")
    ends = ends_of(started)
    assert [code for code, _ in ends] == [0, 0], shown(ends)
    for _, text in ends:
        assert "attempt 2 of 3 after: rank 2 on node-b: ValueError: deliberate failure" in text, text
        assert re.search(r"finished in [\d.]+ s, in attempt 2 of 3", text), text
    assert "[node-a rank 0] attempt 3 3" in ends[0][1] and "[node-a rank 0] attempt 4 3" in ends[0][1]
    check_losses(ends[0][1].partition("attempt 2 of 3")[2])
    for folder in folders:
        attempts = json.loads((folder / "attempts" / "attempts.json").read_text())
        assert [(entry["exit_code"], entry["first_rank"]) for entry in attempts] == [(1, 2), (0, None)]
    parts = [folder / "attempts" / "1" for folder in folders]
    story = subprocess.run([*EXPLAIN, *parts], capture_output=True, text=True, timeout=PATIENCE)
    assert re.search(r"first: rank 2 \((pp_rank 2, )?node-b\) failed .*ValueError: deliberate", story.stdout), (
        story.stdout
    )


def test_a_range_of_hosts_goes_on_with_fewer(two_hosts, tmp_path):
    script = tmp_path / "once.py"
    script.write_text(ONCE)
    job = [script, "0", "--pp 1", "--steps", "10000", "--seconds", "0.2"]
    options = ("--parameters", '{"ddp": true, "microbatches": 2}', "--max-restarts", "1")
    started = start_nodes(
        two_hosts, [tmp_path / "on-a", tmp_path / "on-b"], job, *options, logs=tmp_path, nnodes="1:2", has_rank=False
    )
    wait_for(tmp_path / "node-a.log", "step 3 loss", started)
    two_hosts[1].crash()
    code, text = started[0][0].wait(PATIENCE), (tmp_path / "node-a.log").read_text()
    assert code == 0, text
    assert "2 processes (1 on node-a, 1 on node-b)" in text and "1 processes (1 on node-a)" in text, text
    assert "attempt 2 of 2 after: host node-b (node 1) was lost" in text, text
    assert "[node-a rank 0] attempt 1 1" in text
    check_losses(text.partition("attempt 2 of 2")[2])


@pytest.mark.parametrize(("own_name", "families"), [("loopback", (4, 6)), ("missing", (6,))])
def test_hosts_whose_own_names_lead_nowhere_or_to_the_loopback(own_name, families, tmp_path):
    with some_hosts(own_name=own_name, families=families) as hosts:
        options = ("--parameters", '{"pipeline_parallel_degree": 2, "microbatches": 2}')
        ends = ends_of(start_nodes(hosts, [tmp_path / "job"] * 2, [SCRIPT], *options, logs=tmp_path))
    assert [code for code, _ in ends] == [0, 0], shown(ends)
    check_losses(ends[0][1])


def test_slurms_variables_say_it_all(two_hosts, tmp_path):
    """As srun would have started the command, but for the options."""
    step = {
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_STEP_NODELIST": "node-a,node-b", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0",
    }  # fmt: skip
    started = []
    for number, host in enumerate(two_hosts):
        log = tmp_path / f"{host.name}.log"
        command = [*RUN, "--nnodes", "auto", "--nproc", "1", "--job-dir", tmp_path / "job", SCRIPT, "--pp", "2"]
        environ = {**step, "SLURM_NODEID": str(number), "SLURM_PROCID": str(number)}
        started.append((host.start(command, log=log, cwd=tmp_path, environ=environ), log))
    ends = ends_of(started)
    assert [code for code, _ in ends] == [0, 0], shown(ends)
    check_losses(ends[0][1])


LONG = ["--steps", "10000", "--seconds", "0.2"]
TWO_STAGES = '{"pipeline_parallel_degree": 2, "microbatches": 2}'


def test_a_launcher_that_is_told_to_end_ends_the_job_on_all_hosts(two_hosts, tmp_path):
    options = ("--parameters", TWO_STAGES, "--max-restarts", "3")
    started = start_nodes(two_hosts, [tmp_path / "job"] * 2, [SCRIPT, *LONG], *options, logs=tmp_path)
    wait_for(tmp_path / "node-a.log", "step 3 loss", started)
    started[1][0].terminate()
    ends = ends_of(started)
    assert [code for code, _ in ends] == [143, 143], shown(ends)
    for _, text in ends:
        assert re.search(r"error: job \S+ was stopped on node-b by SIGTERM after [\d.]+ s", text), text
    assert not any(host.pids() for host in two_hosts), "something was left"


def test_a_job_that_runs_too_long_is_stopped_on_all_hosts(two_hosts, tmp_path):
    options = ("--parameters", TWO_STAGES, "--timeout", "60")
    ends = ends_of(start_nodes(two_hosts, [tmp_path / "job"] * 2, [SCRIPT, *LONG], *options, logs=tmp_path))
    assert [code for code, _ in ends] == [124, 124], shown(ends)
    assert error_of(ends[0][1]) == error_of(ends[1][1]) and "timeout of 60 s" in ends[0][1], shown(ends)


def test_a_preemption_of_one_host_is_one_of_the_job(two_hosts, tmp_path):
    script = tmp_path / "polite.py"
    script.write_text(
        "import sys, time\nimport modelparallel as smp\nsmp.init()\nprint('begun', flush=True)\n"
        "while not smp.preemption_requested():\n    time.sleep(0.1)\nsys.exit(smp.EXIT_PREEMPTED)\n"
    )
    options = ("--parameters", '{"ddp": true}', "--max-restarts", "3")
    started = start_nodes(two_hosts, [tmp_path / "job"] * 2, [script], *options, logs=tmp_path)
    for host in two_hosts:
        wait_for(tmp_path / f"{host.name}.log", "begun", started)
    started[1][0].send_signal(signal.SIGUSR1)
    ends = ends_of(started)
    assert [code for code, _ in ends] == [85, 85], shown(ends)
    for _, text in ends:
        assert "was preempted after" in text and "attempt 2" not in text, text


def test_a_node_0_that_is_killed_is_named_by_the_others(two_hosts, tmp_path):
    options = ("--parameters", TWO_STAGES)
    started = start_nodes(two_hosts, [tmp_path / "job"] * 2, [SCRIPT, *LONG], *options, logs=tmp_path)
    wait_for(tmp_path / "node-a.log", "step 3 loss", started)
    started[0][0].kill()
    code, text = ends_of(started)[1]
    assert code == 1 and "host node-a (node 0) was lost: its launcher has ended" in text, text
    deadline = time.monotonic() + PATIENCE
    while any(host.pids() for host in two_hosts):  # what it had started is ended after it
        assert time.monotonic() < deadline, [host.pids() for host in two_hosts]
        time.sleep(0.1)


def test_a_spare_host_takes_the_place_of_one_that_is_lost(tmp_path):
    script = tmp_path / "once.py"
    script.write_text(ONCE)
    with some_hosts(3) as hosts:
        folders = [tmp_path / host.name for host in hosts]
        job = [script, "0", "", *LONG]
        options = ("--parameters", TWO_STAGES, "--max-restarts", "1")
        started = start_nodes(hosts, folders, job, *options, logs=tmp_path, counts=(1, 1, 1), nnodes="2:3")
        wait_for(tmp_path / "node-a.log", "step 3 loss", started)
        hosts[1].crash()
        ends = ends_of([started[0], started[2]])
    assert [code for code, _ in ends] == [0, 0], shown(ends)
    first, third = (text for _, text in ends)
    assert "2 processes (1 on node-a, 1 on node-b)" in third and "this node is a spare" in third, third
    assert "2 processes (1 on node-a, 1 on node-c)" in third and "[node-c rank 1] attempt 1 2" in third, third
    check_losses(first.partition("attempt 2 of 2")[2])


def test_two_jobs_on_the_same_hosts_do_not_meet(two_hosts, tmp_path):
    """Not even if the second one has come to the first one's name: then it is not started."""
    started = []
    for name, names in (("one", two_hosts), ("two", two_hosts)):
        (tmp_path / name).mkdir()
        options = ("--parameters", TWO_STAGES, "--job-id", name)
        job = [SCRIPT, "--seconds", "2"]
        started.append(start_nodes(names, [tmp_path / name / "job"] * 2, job, *options, logs=tmp_path / name))
    for host in two_hosts:
        wait_for(tmp_path / "one" / f"{host.name}.log", "by elastic on cpu", started[0])
    (tmp_path / "late").mkdir()
    late = start_nodes(
        two_hosts, [tmp_path / "late" / "job"] * 2, [SCRIPT], "--parameters", TWO_STAGES, "--job-id", "one",
        "--join-timeout", "5", logs=tmp_path / "late",
    )  # fmt: skip
    ends = ends_of(late)
    assert [code for code, _ in ends] == [2, 2], shown(ends)
    assert "node 0 cannot listen at port" in ends[0][1] and "node 1 of job 'one' has come already" in ends[1][1]
    for nodes in started:
        ends = ends_of(nodes)
        assert [code for code, _ in ends] == [0, 0], shown(ends)
        check_losses(ends[0][1])
