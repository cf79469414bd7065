"""`modelparallel cluster-check`: what the ranks of a new cluster say of themselves, and how the report puts it."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launched_jobs import COMMAND
from modelparallel.comm.collectives.started import start_all_reduce
from modelparallel.config.topology import CommGroup
from modelparallel.errors import LaunchError
from modelparallel.job import messages
from modelparallel.launch import cluster_check
from modelparallel.launch.cluster_report import Clock, ClusterReport, RankFacts, Reduction, parse_sizes, spans
from modelparallel.launch.command_line import app
from rank_tests import RankTests, on

VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "modelparallel": "1.0", "NCCL": "2.27.7"}


def ranks_of(num_hosts, per_host):
    return tuple(
        RankFacts(
            global_rank=host * per_host + local_rank,
            host=f"node-{'abcd'[host]}",
            local_rank=local_rank,
            launcher="Slurm",
            device="cuda: NVIDIA H200",
            device_id=f"GPU-{host}{local_rank}",
            interface="eth0",
            nccl_interface="=eth0",
            versions=VERSIONS,
            parameters={"tensor_parallel_degree": per_host, "ddp": True},
        )
        for host in range(num_hosts)
        for local_rank in range(per_host)
    )


def changed(ranks, global_rank, **changes):
    return tuple(replace(facts, **changes) if facts.global_rank == global_rank else facts for facts in ranks)


GOOD = ClusterReport(
    ranks_of(2, 4),
    (
        Reduction("world", tuple(range(8)), 1 << 20, 0.001, True),
        Reduction("world", tuple(range(8)), 1 << 28, 0.02, True),
        Reduction("tp", (0, 1, 2, 3), 1 << 20, 0.00002, True),
        Reduction("tp", (4, 5, 6, 7), 1 << 20, 0.00004, True),
        Reduction("tp", (0, 1, 2, 3), 1 << 28, 0.001, True),
        Reduction("tp", (4, 5, 6, 7), 1 << 28, 0.0011, True),
    ),
    (Clock("node-a", 0.0, 0.0), Clock("node-b", -0.0021, 0.0003)),
)

GOOD_TEXT = """\
cluster check: 8 ranks on 2 hosts, started by Slurm; tensor_parallel_degree 4, ddp True

ranks  host    local  device             gloo  NCCL
0-3    node-a  0-3    cuda: NVIDIA H200  eth0  =eth0
4-7    node-b  0-3    cuda: NVIDIA H200  eth0  =eth0

versions  python 3.11.7, torch 2.13.0, modelparallel 1.0, NCCL 2.27.7
clocks    node-b is 2.1 ms behind node-a's, to within 0.3 ms

all-reduce, the slowest group of each axis: time, bus bandwidth
axis   groups  1.0 MiB            256.0 MiB            slowest at 256.0 MiB
world  1 of 8  1.0 ms, 1.84 GB/s  20.0 ms, 23.49 GB/s
tp     2 of 4  40 us, 39.32 GB/s  1.1 ms, 366.05 GB/s  ranks 4-7

good: all ranks agree, and all sums are right"""


def test_a_good_report():
    assert str(GOOD) == GOOD_TEXT
    told = GOOD.as_json()
    assert (told["format"], told["is_good"], told["problems"], told["notes"]) == (1, True, [], [])
    assert told["reductions"][0]["bus_bandwidth"] == pytest.approx(2 * 7 / 8 * (1 << 20) / 0.001)
    assert json.loads(json.dumps(told)) == json.loads(json.dumps(GOOD.as_json()))


@pytest.mark.parametrize(
    ("rank", "changes", "text"),
    [
        (5, {"versions": {**VERSIONS, "torch": "2.12.1"}}, "torch: 2.13.0 on ranks 0-4, 6-7; 2.12.1 on rank 5"),
        (0, {"versions": {**VERSIONS, "numpy": "2.4"}}, "numpy: 2.4 on rank 0; not installed on ranks 1-7"),
        (
            7,
            {"device": "cpu: x86_64, 4 cores", "device_id": ""},
            "kind of device: cuda on ranks 0-6; cpu on rank 7",
        ),
        (3, {"launcher": "Open MPI"}, "launcher: Slurm on ranks 0-2, 4-7; Open MPI on rank 3"),
        (
            2,
            {"device_id": "GPU-00"},
            "ranks 0, 2 of host node-a have the same device GPU-00: each needs one of its own",
        ),
    ],
)
def test_ranks_that_differ(rank, changes, text):
    report = replace(GOOD, ranks=changed(GOOD.ranks, rank, **changes))
    assert report.problems() == [text]
    assert str(report).splitlines()[-2:] == [f"PROBLEM: {text}", "not good: see above"]
    assert not report.as_json()["is_good"]


def test_devices_that_are_shared_on_purpose():
    ranks = tuple(replace(facts, device_id="GPU-0") for facts in GOOD.ranks)
    assert len(replace(GOOD, ranks=ranks).problems()) == 2
    assert not replace(GOOD, ranks=ranks, may_share_devices=True).problems()


def test_wrong_sums():
    wrong = tuple(replace(one, is_right=one.axis != "tp" or 0 in one.ranks) for one in GOOD.reductions)
    assert replace(GOOD, reductions=wrong).problems() == ["wrong sums in the tp group of ranks 4-7"]


def test_what_is_odd():
    """A clock that is off beyond doubt, a group that is much slower than others: said, and no reason to stop."""
    slow = (*GOOD.reductions[:-1], replace(GOOD.reductions[-1], seconds=0.01))
    report = replace(GOOD, reductions=slow, clocks=(GOOD.clocks[0], Clock("node-b", 12.04, 0.001)))
    assert report.notes() == [
        "the clock of node-b is 12.0 s ahead of node-a's: what these hosts log cannot be put in order; let chrony or "
        "ntpd set both",
        "tp: the group of ranks 4-7 (node-b) has 40.27 GB/s, the usual one 221.46 GB/s",
    ]
    assert not report.problems() and report.as_json()["is_good"]
    assert not replace(GOOD, clocks=(GOOD.clocks[0], Clock("node-b", 12.04, 12.0))).notes(), "not known well enough"


def test_one_process():
    report = ClusterReport(ranks_of(1, 1), (), (Clock("node-a", 0.0, 0.0),))
    assert not report.problems()
    assert "note: one process has nobody to talk to: start one for each device, on all hosts" in str(report)
    assert "all-reduce" not in str(report) and "clocks" not in str(report)


def test_ranks_that_are_unlike_have_rows_of_their_own():
    ranks = changed(changed(GOOD.ranks, 2, interface="ib0"), 6, device="cuda: NVIDIA A100")
    rows = str(replace(GOOD, ranks=ranks)).splitlines()[2:9]
    assert [row.split()[0] for row in rows[1:]] == ["0-1", "2", "3", "4-5", "6", "7"]


def test_spans():
    assert spans([3, 0, 1, 2, 8]) == "0-3, 8" and spans([5]) == "5" and spans([]) == ""


def test_sizes():
    assert parse_sizes("1024,4,1024") == (4, 1024)
    for text in ("", "x", "0", "7", "-4", "4,,8"):
        with pytest.raises(LaunchError, match="--sizes"):
            parse_sizes(text)
    result = CliRunner().invoke(app, ["cluster-check", "--nproc", "2", "--sizes", "7"])
    assert result.exit_code == 2 and "multiples of 4" in result.stderr


FOUR = RankTests(4, {"pipeline_parallel_degree": 2})
SPLIT = RankTests(2, {"tensor_parallel_degree": 2})


@on(FOUR)
def test_four_ranks_on_two_hosts():
    """The hosts are by name alone, and the clock of the second one is ahead."""
    host = messages.rank() // 2
    patch = pytest.MonkeyPatch()
    now = time.time
    patch.setattr(socket, "gethostname", lambda: f"node-{host}")
    patch.setattr(time, "time", lambda: now() + 30 * host)
    try:
        report = cluster_check.measured((4096, 65536))
    finally:
        patch.undo()
    assert [facts.global_rank for facts in report.ranks] == [0, 1, 2, 3]
    assert [facts.host for facts in report.ranks] == ["node-0", "node-0", "node-1", "node-1"]
    groups = {(one.axis, one.ranks) for one in report.reductions}
    assert groups == {
        ("world", (0, 1, 2, 3)), ("pp", (0, 1)), ("pp", (2, 3)), ("dp", (0, 2)), ("dp", (1, 3)),
    }  # fmt: skip
    assert len(report.reductions) == 2 * len(groups)
    assert all(one.is_right and one.seconds > 0 for one in report.reductions)
    assert not report.problems(), report
    clock = report.clocks[1]
    assert clock.host == "node-1" and abs(clock.ahead - 30) <= clock.uncertainty < 10
    assert messages.rank() or any("node-1 is 30.0 s ahead of node-0's" in note for note in report.notes())
    assert messages.told_by_all(str(report), CommGroup.WORLD, "the test")[1:] == [str(report)] * 3


@on(SPLIT)
def test_an_axis_that_is_the_world_is_measured_once():
    report = cluster_check.measured((4096,))
    assert [(one.axis, one.ranks) for one in report.reductions] == [("tp", (0, 1))]
    assert len(report.clocks) == 1


@on(SPLIT)
def test_a_sum_that_is_wrong_on_one_rank():
    patch = pytest.MonkeyPatch()
    if messages.rank() == 1:

        def start(values, group):
            pending = start_all_reduce(values, group)
            pending.wait()[7] += 1
            return pending

        patch.setattr(cluster_check, "start_all_reduce", start)
    try:
        report = cluster_check.measured((4096,))
    finally:
        patch.undo()
    assert report.problems() == ["wrong sums in the tp group of ranks 0-1"]


def test_the_command_starts_a_job(tmp_path):
    """Of two processes on the CPU; the options of `run` count, and the report is written as JSON."""
    options = ["--nproc", "2", "--parameters", '{"pipeline_parallel_degree": 2}', "--job-dir", "job", "--sizes", "4096"]
    process = subprocess.run(
        [sys.executable, "-c", COMMAND, "cluster-check", *options, "--json", "report.json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert "[rank 1] rank 1 of 2 on " in process.stdout
    assert "[rank 0] good: all ranks agree, and all sums are right" in process.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["is_good"] and report["ranks"][1]["parameters"] == {"pipeline_parallel_degree": 2}
    assert [(one["axis"], one["ranks"]) for one in report["reductions"]] == [("pp", [0, 1])]
    assert (tmp_path / "job" / "logs" / "rank_0.log").exists()


def test_another_launcher_starts_the_module(tmp_path):
    """Whoever sets the variables; one process is enough to see that it starts so."""
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    process = subprocess.run(
        [sys.executable, "-W", "error", "-m", "modelparallel.launch.cluster_check", "--json", "no/such/folder.json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
        env=environment,
    )
    assert process.returncode == 1, process.stderr
    assert "cluster check: 1 rank on 1 host, started by torchrun; ddp True" in process.stdout
    assert "error: the report cannot be written to no/such/folder.json: No such file" in process.stderr


def test_the_document_shows_what_is_printed():
    assert str(GOOD) in (Path(__file__).parent.parent / "docs" / "launching.md").read_text()
