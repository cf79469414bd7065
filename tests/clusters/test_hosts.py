"""The hosts that the other tests of this folder stand on."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clusters.hosts import some_hosts, two_hosts

__all__ = ["two_hosts"]

SERVER = """
import socket, sys
with socket.create_server((sys.argv[1], 7777)) as server:
    print("listening", flush=True)
    connection, peer = server.accept()
    connection.sendall(f"{socket.gethostname()} {peer[0]}".encode())
"""
CLIENT = "import socket, sys; print(socket.create_connection((sys.argv[1], 7777), timeout=60).recv(100).decode())"


def has_ended(pid):
    """Whether a process has gone, or waits only to be counted by whoever adopted it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_hosts_reach_each_other_by_name_and_share_no_port(two_hosts, tmp_path):
    servers = []
    for host in two_hosts:
        log = tmp_path / f"{host.name}.log"
        servers.append(host.start([sys.executable, "-c", SERVER, host.address], log=log, cwd=tmp_path))
        deadline = time.monotonic() + 60
        while "listening" not in log.read_text():
            assert time.monotonic() < deadline and servers[-1].poll() is None, log.read_text()
            time.sleep(0.01)
    first, second = two_hosts
    for here, there in ((first, second), (second, first)):
        result = here.run([sys.executable, "-c", CLIENT, there.name])
        assert result.stdout.strip() == f"{there.name} {here.address}", result.stdout
    assert [server.wait(60) for server in servers] == [0, 0]
    assert first.run(["sh", "-c", "pwd; echo $TMPDIR"], cwd=tmp_path).stdout.split()[0] == str(tmp_path)
    assert first.environ()["TMPDIR"] != second.environ()["TMPDIR"]


@pytest.mark.parametrize(("own_name", "own"), [("address", "10.77.0.1"), ("loopback", "127.0.1.1"), ("missing", None)])
def test_what_a_host_knows_of_its_own_name(own_name, own):
    look = "import socket; print(socket.gethostbyname('node-b'), socket.gethostbyname(socket.gethostname()))"
    with some_hosts(own_name=own_name) as (first, _):
        result = first.run([sys.executable, "-c", look])
        if own is None:
            assert result.returncode != 0 and "gaierror" in result.stdout
        else:
            assert result.stdout.split() == ["10.77.0.2", own]


def test_nothing_is_left_when_the_hosts_go(tmp_path):
    with some_hosts(2) as (first, second):
        processes = [host.start(["sleep", "1000"], log=tmp_path / "log") for host in (first, second)]
        orphan = first.run(["sh", "-c", "sleep 1000 >/dev/null 2>&1 & echo $!"]).stdout.strip()
        assert sorted(first.pids()) == sorted([processes[0].pid, int(orphan)])
        second.crash()
        assert second.pids() == [] and processes[1].returncode == -9
        assert first.run(["ping", "-c", "1", "-W", "1", second.address]).returncode != 0
        folder = first.folder
    assert processes[0].returncode == -9
    assert has_ended(int(orphan)) and not folder.exists()


def test_hosts_go_with_the_tests_that_made_them(tmp_path):
    script = (
        "import os, sys; from clusters.hosts import some_hosts\n"
        "with some_hosts(1) as [host]:\n"
        "    print(host.start(['sleep', '1000']).pid, flush=True); os.kill(os.getpid(), 9)\n"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environ, timeout=60)
    pid = int(result.stdout)
    deadline = time.monotonic() + 60
    while not has_ended(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_host_can_have_one_family_of_addresses():
    with some_hosts(2, families=[6]) as (first, second):
        look = f"import socket; print(socket.getaddrinfo({second.name!r}, 1)[0][4][0])"
        assert first.run([sys.executable, "-c", look]).stdout.strip() == second.address6
        refused = f"import socket; socket.create_connection(({second.address!r}, 7777), timeout=5)"
        assert "unreachable" in first.run([sys.executable, "-c", refused]).stdout
