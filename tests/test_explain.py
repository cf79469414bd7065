"""`modelparallel explain`: one story of what the ranks of a job wrote down."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from modelparallel.errors import LaunchError, SMPConfigError
from modelparallel.launch import JobSpec, run_job
from modelparallel.launch.command_line import app
from modelparallel.launch.explain import explain
from modelparallel.launch.folder import JobFolder
from modelparallel.training.event_files import EventFile
from pool import run_ranks
from stages_apart import PATIENT, THIS, calls_once_more, dies, go_apart, raises, sleeps


def story_of(folder: Path, body: Callable[..., Any], *, num_good: int = 2, **more: Any) -> str:
    """Run a step that goes wrong on 2 ranks that write into a job folder; what is told of it."""
    environ = {"SMP_EVENT_DIR": str(folder / "events")}
    parameters = PATIENT | {"pipeline_parallel_degree": 2} | more.pop("parameters", {})
    run_ranks(
        go_apart, 2, [body], "turns", num_good, parameters=parameters, environ=environ, return_failures=True, **more
    )
    text = explain(JobFolder(folder))
    print(text)
    return text


def test_exception_of_one_rank_is_first(tmp_path: Path) -> None:
    text = story_of(tmp_path, raises)
    line = rf"{THIS}:\d+"
    assert re.search(rf"first: rank 0 \(pp_rank 0\) failed in call 3 of a step function, at {line}: KeyError", text)
    assert re.search(rf"look at {line}", text)
    wait = r"rank 1 \(pp_rank 1\) in call 3 of a step function, microbatch \d: [\d.]+ s for d input from rank 0"
    assert re.search(wait, text)
    order = text[text.index("errors, in the order of time") :]
    assert order.index("rank 0 (pp_rank 0): KeyError") < order.index("rank 1 (pp_rank 1): CommunicationError")
    assert "[passes on another rank's failure]" in order
    assert re.search(rf"the last events of rank 0 \(pp_rank 0\):\n  microbatch \d, event \d: .* \({line}", text)


def test_divergence_names_both_lines(tmp_path: Path) -> None:
    text = story_of(tmp_path, calls_once_more)
    found = re.search(r"look at (.+) and at (.+): the ranks went different ways there", text)
    assert found and found.group(1).startswith(THIS) and found.group(1) != found.group(2)


def test_killed_rank_has_no_file_and_is_first(tmp_path: Path) -> None:
    text = story_of(tmp_path, dies)
    assert not JobFolder(tmp_path).event_file(1).exists()
    assert "first: rank 1 ended without a word" in text
    assert "rank 1: no event file (a killed rank cannot write one)" in text
    assert re.search(rf"rank 0 \(pp_rank 0\) in call 3 .* from rank 1 \(.*{THIS}:\d+", text)


def test_timeout_says_where_the_other_was(tmp_path: Path) -> None:
    text = story_of(tmp_path, sleeps, parameters={"timeout_seconds": 1.0}, seconds=2.5)
    assert "first: rank 0 (pp_rank 0) failed in call 3" in text and "WaitTimeoutError" in text
    assert re.search(rf"look at {THIS}:\d+, where pp_rank 1 was\n", text)


def all_went_well() -> None:
    from modelparallel.job import session

    go_apart([sleeps], "turns", 1)
    session.shutdown()


def test_files_at_exit_and_none_without_failure(tmp_path: Path) -> None:
    parameters = PATIENT | {"pipeline_parallel_degree": 2}
    environ = {"SMP_EVENT_DIR": str(tmp_path / "events")}
    run_ranks(all_went_well, 2, parameters=parameters, environ=environ)
    assert not (tmp_path / "events").exists()
    run_ranks(all_went_well, 2, parameters=parameters, environ=environ | {"SMP_EVENTS": "exit"})
    for rank in range(2):
        records = [json.loads(line) for line in JobFolder(tmp_path).event_file(rank).read_text().splitlines()]
        assert records[0]["kind"] == "rank" and records[0]["pp_rank"] == rank and records[0]["call"] == 2
        events = [record for record in records if record["kind"] == "event" and record["microbatch"] == 2]
        assert [event["number"] for event in events] == list(range(1, len(events) + 1)) and len(events) > 2
        assert not any(record["kind"] in ("error", "wait") for record in records)


def test_variables_are_checked(tmp_path: Path) -> None:
    with pytest.raises(SMPConfigError, match="SMP_EVENTS: must be one of 'error', 'exit', 'off', got 'always'"):
        EventFile.from_environment(0, {"SMP_EVENT_DIR": str(tmp_path), "SMP_EVENTS": "always"})
    assert EventFile.from_environment(0, {"SMP_EVENT_DIR": str(tmp_path), "SMP_EVENTS": "off"}) is None
    assert EventFile.from_environment(0, {}) is None


def test_folder_without_a_job(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="holds no job"):
        explain(JobFolder(tmp_path))
    result = CliRunner().invoke(app, ["explain", str(tmp_path)])
    assert result.exit_code == 2


SCRIPT = """
import os, signal, torch
import modelparallel as smp

smp.init({"pipeline_parallel_degree": 2, "microbatches": 2})
model = smp.DistributedModel(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)))

@smp.step
def train(model, x):
    loss = model(x).square().mean()
    model.backward(loss)
    return loss

train(model, torch.ones(4, 8))
if smp.rank() == 1:
    raise ValueError("between the steps")
train(model, torch.ones(4, 8))
"""


@pytest.mark.slow
def test_launched_job_is_explained(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    folder = JobFolder(tmp_path / "job")
    job = JobSpec("job", script, tmp_path, tmp_path, folder, 2, "elastic", "cpu")
    result = run_job(job, output=sys.stdout)
    assert result.exit_code == 1
    told = CliRunner().invoke(app, ["explain", str(folder.root)])
    print(told.output)
    assert told.exit_code == 0
    assert re.search(r"first: rank 1 failed at train\.py:\d+: ValueError: between the steps", told.output)
    assert "its process has ended, after call 1 of a step function" in told.output
    assert re.search(r"rank 0 \(pp_rank 0\) in call 2 .* from rank 1 \(", told.output)


def write_node(
    root: Path, node: int, host: str, first_rank: int, errors: list[str], *, ahead: float, at: float
) -> None:
    """What a host leaves of a job on several: some ranks, each with its error; times by a clock that is ahead."""
    folder = JobFolder(root, node)
    for directory in (folder.status, folder.events, folder.logs):
        directory.mkdir(parents=True, exist_ok=True)
    description = {"num_devices": len(errors), "first_rank": first_rank, "host": host, "clock_ahead": ahead}
    folder.description.write_text(json.dumps(description))
    for number, error in enumerate(errors):
        rank = first_rank + number
        folder.started_file(rank).write_text("{}")
        record = {"time": at + ahead + number, "summary": error, "traceback": f'File "train.py", line {rank}\n{error}'}
        if error:
            folder.error_file(rank).write_text(json.dumps({**record, "is_interrupt": False, "exit_code": 1}))
        else:
            folder.finished_file(rank).write_text("{}")


@pytest.mark.parametrize("is_shared", [True, False])
def test_the_story_of_several_hosts_is_told_by_the_clock_of_the_first(tmp_path: Path, is_shared: bool) -> None:
    roots = [tmp_path / "job"] * 2 if is_shared else [tmp_path / "copy-of-a", tmp_path / "copy-of-b"]
    write_node(roots[0], 0, "node-a", 0, ["RuntimeError: later"], ahead=0.0, at=1000.5)
    # By its own clock it would have failed after the other one.
    write_node(roots[1], 1, "node-b", 1, ["ValueError: first", ""], ahead=100.0, at=1000.0)
    roots[0].joinpath("output").mkdir()
    JobFolder(roots[0]).failure_file.write_text("rank 1 of 3 on node-b failed first\nmore\n")
    result = CliRunner().invoke(app, ["explain", *dict.fromkeys(map(str, roots))])
    assert result.exit_code == 0, result.output
    assert "3 ranks, 2 of them with an error" in result.output
    assert "the launchers said: rank 1 of 3 on node-b failed first\n" in result.output
    assert "first: rank 1 (node-b) failed at train.py:1: ValueError: first" in result.output
    order = result.output[result.output.index("errors, in the order of time") :]
    assert order.index("+0.000 s rank 1 (node-b): ValueError") < order.index("+0.500 s rank 0 (node-a): RuntimeError")


def test_folders_of_two_jobs_are_not_one_story(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_node(tmp_path / name, 0, "node-a", 0, ["ValueError: x"], ahead=0.0, at=1.0)
    with pytest.raises(LaunchError, match="these are two jobs"):
        explain(JobFolder(tmp_path / "one"), JobFolder(tmp_path / "two"))
