"""`modelparallel cluster-check` over two hosts: by the library's own command, and by another launcher."""

from __future__ import annotations

import json
import sys

from clusters.hosts import two_hosts
from clusters.runs import ends_of, start_torchrun

__all__ = ["two_hosts"]

PARAMETERS = '{"pipeline_parallel_degree": 2}'


def check_report(report, hosts):
    assert report["is_good"] and not report["problems"], report
    assert [facts["host"] for facts in report["ranks"]] == [host.name for host in hosts]
    # By the way to the other host, and not by the own name.
    assert {facts["interface"] for facts in report["ranks"]} == {"eth0"}
    assert [(one["axis"], one["ranks"], one["is_right"]) for one in report["reductions"]] == [("pp", [0, 1], True)]
    (first, second) = report["clocks"]
    assert (first["host"], second["host"]) == tuple(host.name for host in hosts)
    assert abs(second["ahead"]) <= second["uncertainty"] + 0.001, "they are one clock"


def test_by_the_command_on_each_host(two_hosts, tmp_path):
    started = []
    for number, host in enumerate(two_hosts):
        log = tmp_path / f"{host.name}.log"
        place = ["--nnodes", "2", "--node-rank", str(number), "--rendezvous", two_hosts[0].name, "--job-id", "check"]
        own = ["--nproc", "1", "--device", "cpu", "--job-dir", str(tmp_path / "job"), "--json", "report.json"]
        command = [
            sys.executable,
            "-m",
            "modelparallel",
            "cluster-check",
            "--sizes",
            "4096",
            "--parameters",
            PARAMETERS,
        ]
        started.append((host.start([*command, *place, *own], log=log, cwd=tmp_path), log))
    ends = ends_of(started)
    assert [code for code, _ in ends] == [0, 0], ends
    assert "cluster check: 2 ranks on 2 hosts" in ends[0][1]
    assert "good: all ranks agree, and all sums are right" in ends[0][1]
    check_report(json.loads((tmp_path / "report.json").read_text()), two_hosts)


def test_by_torchrun(two_hosts, tmp_path):
    path = tmp_path / "report.json"
    arguments = [
        "modelparallel.launch.cluster_check",
        "--sizes",
        "4096",
        "--parameters",
        PARAMETERS,
        "--json",
        str(path),
    ]
    ends = ends_of(start_torchrun(two_hosts, arguments, tmp_path, script="-m"))
    assert [code for code, _ in ends] == [0, 0], ends
    for host, (_, text) in zip(two_hosts, ends, strict=True):
        assert f"of 2 on {host.name} (by torchrun) looks for the others" in text
    check_report(json.loads(path.read_text()), two_hosts)
