"""Jobs on two hosts that something else than this library starts: they find each other, train as one process does, and
end; what cannot be is said, with the names of ranks and hosts, and in time.
"""

import re
import sys
import time

import pytest

from clusters.hosts import some_hosts, two_hosts
from clusters.runs import SCRIPT, check_run, ends_of, start_torchrun
from clusters.slurm_engine import slurm_engine

__all__ = ["two_hosts"]


def places_of(text):
    """By rank: (host, "local a of b")."""
    found = re.findall(r"^(\S+) rank (\d+) of \d+ (local \d+ of \d+)", text, re.MULTILINE)
    return {int(rank): (host, local) for host, rank, local in found}


def test_static_rendezvous_with_two_processes_on_each_host(two_hosts, tmp_path):
    text = check_run(start_torchrun(two_hosts, ["--pp", "2", "--tp", "2"], tmp_path, counts=[2, 2]))
    assert places_of(text)[3] == ("node-b", "local 1 of 2")


def test_hosts_may_have_different_numbers_of_processes_and_meet_at_a_rendezvous_of_torchrun(two_hosts, tmp_path):
    options = ["--rdzv-backend=c10d", f"--rdzv-endpoint={two_hosts[0].name}:29400", "--rdzv-id=job-7"]
    text = check_run(start_torchrun(two_hosts, ["--pp", "3"], tmp_path, counts=[1, 2], options=options))
    assert sorted(local for _, local in places_of(text).values()) == ["local 0 of 1", "local 0 of 2", "local 1 of 2"]


def test_replicas_over_hosts(two_hosts, tmp_path):
    check_run(start_torchrun(two_hosts, ["--pp", "2", "--placement", "spread"], tmp_path, counts=[2, 2]))


@pytest.mark.parametrize(("own_name", "master"), [("loopback", "node-a"), ("missing", "")])
def test_a_host_whose_own_name_leads_nowhere(own_name, master, tmp_path):
    with some_hosts(own_name=own_name) as hosts:
        text = check_run(start_torchrun(hosts, ["--pp", "2"], tmp_path, master=master))
    assert text.count("interface eth0 =eth0") == 2
    assert text.count("GLOO_SOCKET_IFNAME=eth0, NCCL_SOCKET_IFNAME==eth0") == 1  # said once


def test_the_sixth_version_of_the_internet_protocol(tmp_path):
    with some_hosts(families=[6]) as hosts:
        check_run(start_torchrun(hosts, ["--pp", "2"], tmp_path, master=hosts[0].address6))


def start_by_hand(hosts, arguments, folder, *, name="hand", ranks=range(4), port=29600, **variables):
    """Rank r of 4 on host r % 2, as a script with two variables would start them."""
    started = []
    for rank in ranks:
        host = hosts[rank % 2]
        log = folder / f"{name}_{rank}.log"
        environ = {"RANK": str(rank), "WORLD_SIZE": "4", "MASTER_ADDR": hosts[0].name, "MASTER_PORT": str(port)}
        started.append((host.start([sys.executable, SCRIPT, *arguments], log=log, environ=environ | variables), log))
    return started


def test_who_shares_a_host_is_counted_where_nobody_says_it(two_hosts, tmp_path):
    text = check_run(start_by_hand(two_hosts, ["--pp", "2", "--tp", "2"], tmp_path))
    assert places_of(text) == {
        0: ("node-a", "local 0 of 2"),
        1: ("node-b", "local 0 of 2"),
        2: ("node-a", "local 1 of 2"),
        3: ("node-b", "local 1 of 2"),
    }


def test_a_job_that_finds_another_at_its_port_stops_and_leaves_that_one_alone(two_hosts, tmp_path):
    """As two jobs on the same nodes that were given one port; Slurm's variables say whose is whose."""

    def task(rank, job):
        return {
            "SLURM_JOB_ID": job, "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_LOCALID": "0", "SLURM_NODEID": str(rank), "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
            "SLURM_STEP_NODELIST": "node-a,node-b", "MASTER_PORT": "29700",
        }  # fmt: skip

    def start(job, arguments):
        started = []
        for rank, host in enumerate(two_hosts):
            log = tmp_path / f"{job}_{rank}.log"
            started.append((host.start([sys.executable, SCRIPT, *arguments], log=log, environ=task(rank, job)), log))
        return started

    first = start("11", ["--pp", "2", "--until", str(tmp_path / "go on")])
    deadline = time.monotonic() + 300
    while "step 0 loss" not in first[0][1].read_text():
        assert time.monotonic() < deadline and first[0][0].poll() is None, first[0][1].read_text()
        time.sleep(0.1)
    (code_0, text_0), (code_1, text_1) = ends_of(start("12", ["--pp", "2"]))
    assert code_0 == code_1 == 1
    assert re.search(r"rank 0 of 2 \(from Slurm, on node-a\) cannot serve the store at node-a:29700 \(", text_0), text_0
    assert "has found another job at node-a:29700" in text_1, text_1
    assert "its Slurm's job and step is 11.0, and here 12.0" in text_1, text_1
    (tmp_path / "go on").touch()
    check_run(first)
    # Without the variable each has a port of its own.
    both = []
    for job in ("13", "14"):
        both.append([])
        for rank, host in enumerate(two_hosts):
            log = tmp_path / f"{job}_{rank}.log"
            environ = {**task(rank, job), "MASTER_PORT": None}
            both[-1].append((host.start([sys.executable, SCRIPT, "--pp", "2"], log=log, environ=environ), log))
    for started in both:
        check_run(started)


def test_hosts_that_cannot_connect_are_named_on_every_rank_in_time(two_hosts, tmp_path):
    """Both are told to use an interface that leads nowhere."""
    for number, host in enumerate(two_hosts, 1):
        for command in (
            "link add nowhere type bridge", f"addr add 10.99.0.{number}/24 dev nowhere", "link set nowhere up",
        ):  # fmt: skip
            assert host.run(["ip", *command.split()]).returncode == 0
    arguments, environ = ["--pp", "2", "--timeout", "50"], {"GLOO_SOCKET_IFNAME": "nowhere"}
    for code, text in ends_of(start_torchrun(two_hosts, arguments, tmp_path, environ=environ)):
        assert code == 1
        [error] = re.findall(r"^modelparallel.errors\S*: (.*\n.*)", text, re.MULTILINE)
        assert "could not meet the other processes, which it has found at 10.77.0.1:29500" in error, error
        assert "global rank 0 on node-a (10.99.0.1); global rank 1 on node-b (10.99.0.2)" in error, error
        [seconds] = re.findall(r"^failed after (\S+) s", text, re.MULTILINE)
        assert float(seconds) < 50 + 30, text  # gloo alone would take five times as long
    # What cannot lead to another host is refused before gloo starts.
    for code, text in ends_of(start_torchrun(two_hosts, arguments, tmp_path, environ={"GLOO_SOCKET_IFNAME": "lo"})):
        assert code == 1 and "on node-b: GLOO_SOCKET_IFNAME='lo' is the loopback" in text, text


def test_a_failed_process_starts_again_on_all_hosts(two_hosts, tmp_path):
    """Their agents do not agree on how often they have started their workers."""
    options = ["--rdzv-backend=c10d", f"--rdzv-endpoint={two_hosts[0].name}:29400", "--rdzv-id=j", "--max-restarts=2"]
    arguments = ["--pp", "2", "--fail", "1:1", "--once", str(tmp_path / "failed"), "--timeout", "60"]
    ends = ends_of(start_torchrun(two_hosts, arguments, tmp_path, options=options))
    text = "\n".join(text for _, text in ends)
    assert [code for code, _ in ends] == [0, 0], text
    assert "deliberate failure" in text and len(re.findall(r"rank \d done", text)) == 2, text


def test_two_steps_of_a_real_slurm_on_the_same_nodes(tmp_path):
    with slurm_engine() as engine:
        command = ["srun", "--overlap", "-N2", "--ntasks-per-node=1", sys.executable, SCRIPT, "--pp", "2"]
        variables = {**engine.hosts[0].environ(), "SLURM_CPU_BIND": "none"}
        logs = [tmp_path / f"{number}.log" for number in range(2)]
        started = [(engine.start(*map(str, command), log=log, **variables), log) for log in logs]
        for text in map(check_run, ([one] for one in started)):
            assert places_of(text) == {0: ("node-a", "local 0 of 1"), 1: ("node-b", "local 0 of 1")}
