"""How processes meet at a store that may be another job's, and what they find out about each other there. The ranks are
threads of this process, each with a client of its own.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.distributed as dist

from modelparallel.comm.lookout import Lookout
from modelparallel.config import load_config
from modelparallel.errors import CommunicationError, SMPConfigError, WaitTimeoutError
from modelparallel.job import interfaces, meeting, places, rendezvous
from modelparallel.job.discovery import ProcessIdentity
from modelparallel.job.meeting import Meeting, told_by_all
from modelparallel.job.places import Places, find_places

JOB = {"launcher": "Slurm", "world size": "2", "Slurm's job and step": "11.0"}
OTHER_JOB = {**JOB, "Slurm's job and step": "12.0"}
BY_HAND = {"launcher": "torchrun", "world size": "2"}


class Server:
    """A store that threads reach by clients of their own."""

    def __init__(self) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def client(self) -> dist.Store:
        return dist.TCPStore("127.0.0.1", self.store.port, is_master=False, wait_for_workers=False)

    def keys(self) -> list[str]:
        return sorted(self.store.list_keys())


@pytest.fixture
def server() -> Server:
    return Server()


def together(*calls: Callable[[], Any]) -> list[Any]:
    """What calls give, or raise, each in a thread of its own."""
    results: list[Any] = [None] * len(calls)

    def run(number: int) -> None:
        try:
            results[number] = calls[number]()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    return results


@contextlib.contextmanager
def process_named(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Meet as another process."""
    with monkeypatch.context() as patch:
        patch.setattr(meeting, "_this_process", lambda: name)
        yield


def hold(server: Server, rank: int, marks: dict[str, str] = JOB, **options: Any) -> dist.Store:
    size = int(marks["world size"])
    lookout = Lookout(rank, 60)
    try:
        return Meeting(
            server.client(),
            ProcessIdentity(rank, size, -1, 0, "Slurm"),
            marks=marks,
            settings=options.pop("settings", {"microbatches": 2}),
            place="node-c:7777",
            is_of_rank_0=options.pop("is_of_rank_0", True),
            is_own=False,
            seconds=options.pop("seconds", 60),
            lookout=lookout,
        ).hold()
    finally:
        lookout.close()


def test_all_meet_and_what_they_write_is_theirs(server):
    first, second = together(lambda: hold(server, 0), lambda: hold(server, 1))
    first.set("key", "value")
    assert second.get("key") == b"value"
    server.store.set("key", "another's")
    assert first.get("key") == b"value"


def test_another_job_s_store_is_left_alone(server, monkeypatch):
    together(lambda: hold(server, 0), lambda: hold(server, 1))
    before = server.keys()
    with process_named("process 9 on node-d", monkeypatch):
        for marks, problem in (
            (OTHER_JOB, "its Slurm's job and step is 11.0, and here 12.0"),
            ({**BY_HAND}, "its launcher is Slurm, and here torchrun"),
            ({**JOB, "world size": "4"}, "its world size is 2, and here 4"),
            (JOB, "is global rank 1 of that job"),
        ):
            with pytest.raises(CommunicationError, match=problem) as caught:
                hold(server, 1, marks)
            text = str(caught.value)
            assert "global rank 1 of" in text and "process 9 on node-d" in text and "node-c:7777" in text, text
            assert "MASTER_PORT" in text
    with pytest.raises(CommunicationError, match=r"its Slurm's job and step is 11.0, and here 12.0"):
        hold(server, 0, OTHER_JOB)
    assert server.keys() == before


def test_jobs_without_marks_are_told_apart_by_their_configuration(server):
    first, second = together(
        lambda: hold(server, 0, BY_HAND, seconds=2), lambda: hold(server, 1, BY_HAND, settings={"microbatches": 4})
    )
    assert isinstance(second, CommunicationError) and "its processes are configured differently" in str(second)
    assert isinstance(first, WaitTimeoutError) and "for the processes of the global ranks [1]" in str(first)
    # With marks it is one job, and what differs is named when all have met.
    other = Server()
    found = together(lambda: hold(other, 0, JOB), lambda: hold(other, 1, JOB, settings={"microbatches": 4}))
    assert all(isinstance(result, dist.Store) for result in found), found


def test_who_does_not_come_is_named(server):
    [error] = together(lambda: hold(server, 0, {**JOB, "world size": "3"}, seconds=0.3))
    assert isinstance(error, WaitTimeoutError)
    assert "smp.init: global rank 0 waited" in str(error) and "global ranks [1, 2], of 3: they did not" in str(error)
    assert "node-c:7777" in str(error)
    [error] = together(lambda: hold(Server(), 1, seconds=0.3))
    assert isinstance(error, WaitTimeoutError) and "for the processes of the global ranks [0], of 2" in str(error)


@pytest.mark.parametrize("has_come", [True, False])
def test_an_attempt_does_not_take_what_an_earlier_one_has_left_for_its_own(server, monkeypatch, has_come):
    """The store is torchrun's agent's; of the first attempt, rank 1 has come, or not yet."""
    options = {"is_of_rank_0": False}
    with process_named("process 1 on node-a", monkeypatch):
        if has_come:
            together(lambda: hold(server, 0, **options), lambda: hold(server, 1, **options))
        else:
            together(lambda: hold(server, 0, seconds=0.2, **options))
    left = server.store.get("modelparallel/greeting")
    # Another number of processes, and the agents do not agree on how often they have started them.
    marks, found = {**JOB, "world size": "3"}, []
    with process_named("process 2 on node-a", monkeypatch):
        early = threading.Thread(target=lambda: found.append(hold(server, 1, marks, **options)), daemon=True)
        early.start()
        early.join(0.5)
        assert early.is_alive()
        first, second = together(lambda: hold(server, 0, marks, **options), lambda: hold(server, 2, marks, **options))
        early.join(60)
    first.set("key", "value")
    assert [store.get("key") for store in (*found, second)] == [b"value"] * 2
    assert server.store.get("modelparallel/greeting") != left


def test_a_session_after_another_of_the_same_processes_meets_anew(server):
    halls = [together(*(lambda rank=rank: hold(server, rank) for rank in range(2))) for _ in range(3)]
    for number, (first, second) in enumerate(halls):
        first.set("number", str(number))
        assert second.get("number") == str(number).encode()


def test_what_somebody_else_has_written_is_said(server):
    server.store.set("modelparallel/greeting", "[]")
    with pytest.raises(CommunicationError, match="what was written at node-c:7777 is not of this library"):
        hold(server, 1)


# Where the processes are


def found_places(server, hosts, told=(), ways=(), environs=None, addresses=None, **options):
    """find_places of a rank on each of ``hosts``; ``ways``: the own address to the store, by rank."""
    size = len(hosts)
    halls = together(*(lambda rank=rank: hold(server, rank, {**JOB, "world size": str(size)}) for rank in range(size)))
    environs = environs or [{} for _ in hosts]
    here = threading.local()
    addresses = addresses or {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places, "_machine", lambda: hosts[here.rank])
        patch.setattr(places, "socket", types.SimpleNamespace(gethostname=lambda: f"node-{hosts[here.rank]}"))
        patch.setattr(interfaces, "address_towards", lambda host: (ways if host == "store" else addresses)[here.rank])
        patch.setattr(interfaces, "_interfaces", lambda: {"lo": ["127.0.0.1"], "eth1": [f"10.0.0.{hosts[here.rank]}"]})

        def find(rank):
            here.rank = rank
            local_rank, local_size = told[rank] if told else (-1, 0)
            identity = ProcessIdentity(rank, size, local_rank, local_size, "torchrun")
            return find_places(halls[rank], identity, environs[rank], "store", 60, may_choose=True)

        return together(*(lambda rank=rank: find(rank) for rank in range(size)))


def test_local_ranks_are_counted_where_nobody_says_them(server):
    found = found_places(server, "1121", ways=["10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.1"])
    local = [(identity.local_rank, identity.local_world_size) for identity, _ in found]
    assert local == [(0, 3), (1, 3), (0, 1), (2, 3)]
    assert not found[0][1].is_one_host
    assert found[0][1].described() == "global ranks 0, 1, 3 on node-1 (10.0.0.1); global rank 2 on node-2 (10.0.0.2)"


def test_local_ranks_that_were_said_stay(server):
    found = found_places(server, "11", told=[(1, 0), (0, 0)], ways=["", ""])
    assert [(one.local_rank, one.local_world_size) for one, _ in found] == [(1, 2), (0, 2)]
    assert found[0][1].is_one_host
    found = found_places(server, "11", told=[(0, 1), (0, 1)], ways=["", ""])  # two agents on one host
    assert [(one.local_rank, one.local_world_size) for one, _ in found] == [(0, 1), (0, 1)]


def test_interfaces_are_those_that_lead_to_the_store_or_from_its_host_to_another(server):
    environs: list[dict[str, str]] = [{}, {}, {"NCCL_SOCKET_IFNAME": "ib"}]
    found = found_places(server, "122", ways=["", "10.0.0.2", "10.0.0.2"], addresses=["10.0.0.1"], environs=environs)
    assert environs[0] == environs[1] == {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "=eth1"}
    assert environs[2] == {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "ib"}
    assert found[0][1].addresses == ("10.0.0.1", "10.0.0.2", "10.0.0.2")


@pytest.mark.parametrize(
    ("given", "ways", "expected"),
    [
        ("", ["", ""], "on node-1: no way leads to them (the store is at 'store'; interfaces here: lo (127.0.0.1)"),
        ("", ["10.0.0.9", "10.0.0.2"], "on node-1: the way to them begins at 10.0.0.9, which no interface has"),
        ("lo", ["10.0.0.1", "10.0.0.2"], "on node-1: GLOO_SOCKET_IFNAME='lo' is the loopback"),
        ("^lo", ["10.0.0.1", "10.0.0.2"], "on node-1: GLOO_SOCKET_IFNAME='^lo': gloo takes names as they are"),
        ("ib0", ["10.0.0.1", "10.0.0.2"], "on node-1: GLOO_SOCKET_IFNAME='ib0': there is none; interfaces here: lo"),
    ],
)  # fmt: skip
def test_a_host_that_has_no_way_is_named_on_all_ranks(server, given, ways, expected):
    environs = [{"GLOO_SOCKET_IFNAME": given} if given else {}, {"GLOO_SOCKET_IFNAME": "eth1"}]
    for error in found_places(server, "12", ways=ways, addresses=["", ""], environs=environs):
        assert isinstance(error, SMPConfigError) and expected in str(error), error


def test_what_is_set_counts(server):
    environs = [{"GLOO_SOCKET_IFNAME": "lo,eth1"}, {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "ib"}]
    found = found_places(server, "12", ways=["", ""], environs=environs, addresses=["", ""])
    assert environs[0] == {"GLOO_SOCKET_IFNAME": "lo,eth1", "NCCL_SOCKET_IFNAME": "=lo,eth1"}
    assert environs[1] == {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "ib"}
    assert found[0][1].addresses == ("10.0.0.1", "10.0.0.2")


def test_ways_of_this_machine():
    for host in ("", "localhost", "127.0.0.1", "no-such-host.invalid"):
        assert interfaces.address_towards(host) == ""
    assert "127.0.0.1" in [address for found in interfaces._interfaces().values() for address in found]


def test_errors_name_the_hosts():
    several = Places(("1", "2"), ("node-a", "node-b"), ("10.0.0.1", ""))
    with pytest.raises(
        WaitTimeoutError, match=r"late\nThe hosts: global rank 0 on node-a \(10.0.0.1\); global rank 1 on"
    ):
        with several.named():
            raise WaitTimeoutError("late")
    with pytest.raises(WaitTimeoutError, match=r"^late$"):
        with Places.of_one_host(2).named():
            raise WaitTimeoutError("late")
    many = Places(tuple(map(str, range(20))), tuple(f"n{number}" for number in range(20)), ("",) * 20)
    assert many.described().endswith("global rank 7 on n7, and 12 more hosts")


def test_each_hears_what_all_say(server):
    halls = together(*(lambda rank=rank: hold(server, rank, {**JOB, "world size": "3"}) for rank in range(3)))

    def tell(rank):
        return told_by_all(halls[rank], ProcessIdentity(rank, 3, -1, 0, "x"), "name", {"rank": rank}, 60)

    assert (
        together(*(lambda rank=rank: tell(rank) for rank in range(3))) == [[{"rank": 0}, {"rank": 1}, {"rank": 2}]] * 3
    )


# The address of the store


def test_steps_of_slurm_have_ports_of_their_own():
    def address(step, environ=(), parameters=None):
        identity = ProcessIdentity(1, 4, 1, 2, "Slurm", step)
        environ = {"SLURM_STEP_NODELIST": "n[3-4]", **dict(environ)}
        return rendezvous._address(load_config(parameters or {}, environ), identity, environ)

    found = address("1234.1")
    assert (found.host, found.port) == ("n3", 20000 + 1234 * 31 + 1)
    assert str(found) == (
        "n3:58255 (MASTER_ADDR is not set, and this is the first node of Slurm's list; the port of Slurm's job and "
        "step 1234.1)"
    )
    ports = {rendezvous.port_of_step(f"{job}.{step}") for job in range(100000, 100100) for step in range(8)}
    assert len(ports) == 800 and min(ports) >= 20000 and max(ports) < 60000
    assert address("1234.4294967290").port == 20000 + (1234 * 31 + 4294967290) % 40000
    assert address("1234.1", {"MASTER_PORT": "7000"}).port == 7000
    assert address("1234.1", (), {"ddp": True, "ddp_port": 7001}).port == 7001
    assert address("").port == 7777
    assert str(address("", {"MASTER_ADDR": "fd77::1"})) == "[fd77::1]:7777"


def test_task_0_on_another_node_than_the_first_is_said_at_once():
    identity = ProcessIdentity(0, 4, 0, 2, "Slurm", "1234.1")
    environ = {"SLURM_STEP_NODELIST": "n[3-4]", "SLURM_NODEID": "1"}
    with pytest.raises(SMPConfigError, match=r"task 0 of the step 1234.1 is not on the first node, n3, but on"):
        rendezvous._address(load_config({}, environ), identity, environ)


def test_a_port_in_use_is_named_with_its_host():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with pytest.raises(
            CommunicationError, match=rf"rank 0 of 2 \(from PMI, on .*\) cannot serve the store at 127.0.0.1:{port}"
        ):
            rendezvous.make_store(load_config({}, environ), ProcessIdentity(0, 2, 0, 1, "PMI"), environ)
    config = load_config({"timeout_seconds": 1}, environ)
    with pytest.raises(
        CommunicationError, match=rf"rank 1 of 2 \(from PMI, on .*\) cannot reach the store at 127.0.0.1:{port}"
    ):
        rendezvous.make_store(config, ProcessIdentity(1, 2, 0, 1, "PMI"), environ)
