"""Several hosts on one machine: each has a network, a host name, an /etc/hosts and a /dev/shm of its own.

    from clusters.hosts import Host, some_hosts, two_hosts      # two_hosts is a fixture: import it, and name it

    def test_of_two_hosts(two_hosts, tmp_path):
        first, second = two_hosts
        worker = second.start([sys.executable, "train.py", first.address], log=tmp_path / "second.log", RANK="1")
        assert first.run([sys.executable, "train.py"], RANK="0").returncode == 0
        assert worker.wait(300) == 0

    with some_hosts(names=["algo-1", "algo-2"], own_name="loopback") as hosts: ...

A host is a process that holds a network, a UTS and a mount namespace; another holds the switch, a bridge between the
hosts. Nothing of it has a name outside: there is nothing to clean in /run/netns or /etc, runs that are under way at the
same time do not meet, and addresses (10.77.0.1, fd77::1, ...) and ports may be the same in each. The files of the
machine are the same on all hosts (a shared file system); TMPDIR is not. Processes are those of the machine: pids hold
everywhere, `Popen.kill` and signals work. All that was started on a host is killed at the end, also if the tests
themselves are killed.

`some_hosts` skips the test, with the reason, where the machine does not let namespaces be made (it needs root or
CAP_SYS_ADMIN and CAP_NET_ADMIN, and the commands unshare, nsenter, ip and mount).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from scripts import ROOT

#: Variables of the tests' own process, and of launchers, that must not reach the programs on a host.
_OF_THIS_PROCESS = (
    "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
    "MASTER_PORT", "PYTEST_CURRENT_TEST", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT",
)  # fmt: skip
# Holds the namespaces until its standard input ends, which also happens when the tests are killed; then ends what runs
# in them. Adopts nobody, and needs no site packages.
_HOLDER = """
import os, signal, sys
def end_others():
    own, found = os.stat("/proc/self/ns/net").st_ino, False
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and int(name) != os.getpid() and os.stat(f"/proc/{name}/ns/net").st_ino == own:
                os.kill(int(name), signal.SIGKILL)
                found = True
        except OSError:
            pass
    return found
print("ready", flush=True)
sys.stdin.read()
while end_others():
    pass
"""


@dataclass
class Host:
    """A host of `some_hosts`: `name`, `address` and `address6` are what others reach it by."""

    name: str
    address: str
    address6: str
    folder: Path
    holder: subprocess.Popen[str]
    switch: subprocess.Popen[str]
    port: str = ""  # of the switch
    started: list[subprocess.Popen[Any]] = field(default_factory=list)

    def command(self, argv: Sequence[str | os.PathLike[str]]) -> list[str]:
        """The command that runs ``argv`` on this host, in the place of this process (a signal reaches ``argv``)."""
        spaces = [f"--{kind}=/proc/{self.holder.pid}/ns/{file}" for kind, file in _SPACES.items()]
        return ["nsenter", *spaces, f"--wd={os.getcwd()}", "--", *map(os.fspath, argv)]

    def environ(self, changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
        """The environment of programs on this host, with changes; None takes a variable out."""
        environ = {name: value for name, value in os.environ.items() if name not in _OF_THIS_PROCESS}
        paths = [str(ROOT / "src"), str(ROOT / "tests"), *filter(None, [environ.get("PYTHONPATH")])]
        environ |= {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "MODELPARALLEL_DEVICE": "cpu",
            "TMPDIR": str(self.folder / "tmp"),
        }
        for name, value in (changes or {}).items():
            environ.pop(name, None)
            if value is not None:
                environ[name] = value
        return environ

    def start(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        log: Path | None = None,
        cwd: str | os.PathLike[str] | None = None,
        environ: Mapping[str, str | None] | None = None,
        **variables: str,
    ) -> subprocess.Popen[str]:
        """Start a program. Its output goes into ``log``, or can be read by ``communicate()``.

        ``environ`` and ``variables`` are changes to `environ()`.
        """
        command = self.command(argv)
        if cwd is not None:
            command[command.index(f"--wd={os.getcwd()}")] = f"--wd={os.fspath(cwd)}"
        with contextlib.ExitStack() as stack:
            output: Any = subprocess.PIPE if log is None else stack.enter_context(open(log, "ab"))
            process = subprocess.Popen(
                command,
                env=self.environ({**(environ or {}), **variables}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        timeout: float = 600.0,
        cwd: str | os.PathLike[str] | None = None,
        environ: Mapping[str, str | None] | None = None,
        **variables: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end; standard error is in ``stdout``, too. What takes too long is killed with its
        group, and raises `subprocess.TimeoutExpired` with the output so far.
        """
        process = self.start(argv, cwd=cwd, environ=environ, **variables)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            raise subprocess.TimeoutExpired(process.args, timeout, output) from error
        return subprocess.CompletedProcess(process.args, process.returncode, output)

    def pids(self) -> list[int]:
        """All processes on this host, but the one that holds it."""
        own = _network_of(self.holder.pid)
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        return [pid for pid in pids if pid != self.holder.pid and _network_of(pid) == own and not _is_zombie(pid)]

    def disconnect(self) -> None:
        """Take the cable out: the host's network is gone, and nobody is told."""
        _ip(self.switch, "link", "set", self.port, "down")

    def connect(self) -> None:
        """Put the cable back."""
        _ip(self.switch, "link", "set", self.port, "up")

    def crash(self) -> None:
        """The host goes: its network first, without a word, then all that runs on it."""
        self.disconnect()
        self.kill()

    def kill(self) -> None:
        """Kill all that runs on this host."""
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for process in self.started:
                process.poll()
            time.sleep(0.01)
        for process in self.started:
            process.wait()


@contextlib.contextmanager
def some_hosts(
    num: int = 2,
    *,
    names: Sequence[str] = (),
    own_name: str = "address",
    families: Sequence[int] = (4, 6),
) -> Iterator[list[Host]]:
    """Hosts that reach each other, until the block ends. Skips the test, with the reason, where that is refused.

    Args:
        names: of the hosts; default node-a, node-b, ...
        own_name: what a host's /etc/hosts says of its own name: "address", "loopback" (127.0.1.1, as Debian and Ubuntu
            have it) or "missing". The others' names always lead to their addresses.
        families: versions of the internet protocol that the hosts speak, 4 and 6 (the loopback has both).
    """
    names = list(names) or [f"node-{chr(ord('a') + number)}" for number in range(num)]
    if reason := refusal():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="modelparallel-hosts-"))
    addresses = {name: (f"10.77.0.{number}", f"fd77::{number:x}") for number, name in enumerate(names, 1)}
    holders: list[subprocess.Popen[str]] = []
    hosts: list[Host] = []
    try:
        switch = _hold(["--net"], holders)
        _ip(switch, "link", "add", "br0", "type", "bridge")
        _ip(switch, "link", "set", "br0", "up")
        for number, name in enumerate(names, 1):
            (folder / name / "tmp").mkdir(parents=True)
            (folder / name / "hosts").write_text(_hosts_file(name, addresses, own_name, families))
            host = Host(name, *addresses[name], folder / name, _hold(["--net", "--uts", "--mount"], holders), switch)
            host.port = f"port{number}"
            hosts.append(host)
            _connect(host, families)
        yield hosts
    finally:
        for host in hosts:
            host.kill()
        for holder in holders:
            assert holder.stdin is not None and holder.stdout is not None
            holder.stdin.close()
            holder.wait()
            holder.stdout.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def two_hosts() -> Iterator[list[Host]]:
    """node-a (10.77.0.1, fd77::1) and node-b (10.77.0.2, fd77::2)."""
    with some_hosts(2) as hosts:
        yield hosts


def refusal() -> str:
    """Why this machine makes no hosts; empty if it does."""
    if missing := [name for name in ("unshare", "nsenter", "ip", "mount") if shutil.which(name) is None]:
        return f"hosts are made by the commands unshare, nsenter, ip and mount: {', '.join(missing)} not found"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "sh", "-c", "ip link add br0 type bridge && hostname node-a"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    return f"this machine makes no namespaces: {tried.stderr.strip()}" if tried.returncode else ""


_SPACES = {"net": "net", "uts": "uts", "mount": "mnt"}


def _hold(spaces: list[str], holders: list[subprocess.Popen[str]]) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        ["unshare", *spaces, sys.executable, "-I", "-S", "-c", _HOLDER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for the tests
    )
    holders.append(holder)
    assert holder.stdout is not None and holder.stdout.readline() == "ready\n", "unshare has failed"
    return holder


def _connect(host: Host, families: Sequence[int]) -> None:
    _ip(host.switch, "link", "add", host.port, "type", "veth", "peer", "name", "eth0", "netns", str(host.holder.pid))
    _ip(host.switch, "link", "set", host.port, "master", "br0", "up")
    _ip(host.holder, "link", "set", "lo", "up")
    if 4 in families:
        _ip(host.holder, "addr", "add", f"{host.address}/24", "dev", "eth0")
    if 6 in families:
        _ip(host.holder, "addr", "add", f"{host.address6}/64", "dev", "eth0", "nodad")
    _ip(host.holder, "link", "set", "eth0", "up")
    for command in (
        ["hostname", host.name],
        ["mount", "--bind", str(host.folder / "hosts"), "/etc/hosts"],
        ["mount", "-t", "tmpfs", "none", "/dev/shm"],
    ):
        subprocess.run(host.command(command), check=True, capture_output=True)


def _hosts_file(own: str, addresses: Mapping[str, tuple[str, str]], own_name: str, families: Sequence[int]) -> str:
    lines = ["127.0.0.1 localhost", "::1 localhost"]
    for name, pair in addresses.items():
        if name == own and own_name == "missing":
            continue
        if name == own and own_name == "loopback":
            lines.append(f"127.0.1.1 {name}")
            continue
        lines += [f"{address} {name}" for version, address in zip((4, 6), pair, strict=True) if version in families]
    return "\n".join(lines) + "\n"


def _ip(holder: subprocess.Popen[str], *arguments: str) -> None:
    subprocess.run(["nsenter", f"--net=/proc/{holder.pid}/ns/net", "ip", *arguments], check=True, capture_output=True)


def _network_of(pid: int) -> int:
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:  # it has just ended
        return 0


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
