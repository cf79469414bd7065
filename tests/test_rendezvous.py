"""How processes meet: where stores listen, what a secret is, and that who does not know it is not listened to."""

import hmac
import os
import socket
import tempfile
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import modelparallel as smp
from launched_jobs import job_of, write_script
from modelparallel.comm import making
from modelparallel.comm.authentication import gather_json
from modelparallel.comm.making import gloo_group
from modelparallel.config import load_config
from modelparallel.errors import CommunicationError, DivergenceError, SMPConfigError
from modelparallel.job import rendezvous, session
from modelparallel.job.discovery import ProcessIdentity
from modelparallel.launch import rendezvous_port, run_job
from pool import RankFailure, run_ranks

TWO_HOSTS = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


class Evil:
    """What an attacker would like a rank to open."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (self.trace, "w")


def stranger(trace, knows_where):
    """Rank 1 belongs to somebody else, who speaks the library's protocol and sends pickles wherever pickles travel."""
    if dist.get_rank() == 0:
        smp.init({"pipeline_parallel_degree": 2})
        return
    if not knows_where:
        rendezvous._told_secret = lambda path, rank: b"a guess"

    def send_evil(value, group, default=None):
        dist.all_gather_object([None, None], Evil(trace), group=group.process_group)

    making.gather_json = send_evil  # type: ignore[attr-defined]  # what it imports
    hmac.compare_digest = lambda a, b: True  # it trusts everybody
    smp.init({"pipeline_parallel_degree": 2})


@pytest.mark.slow
def test_a_stranger_in_the_place_of_a_rank_is_not_listened_to(tmp_path):
    trace = tmp_path / "trace"
    first, _ = run_ranks(stranger, 2, str(trace), False, return_failures=True)
    assert isinstance(first.exception, CommunicationError)
    assert "took part as rank 1 in the process group" in str(first.exception)
    assert "does not know the secret of this job" in str(first.exception)
    assert not trace.exists()
    # One that does belong to the job, and tells what cannot be read, makes nobody open a pickle either.
    first, _ = run_ranks(stranger, 2, str(trace), True, return_failures=True)
    assert isinstance(first, RankFailure) and not trace.exists()


def later_groups():
    smp.init({"pipeline_parallel_degree": 2})
    made = session.current().made_groups
    assert len(made.secret) == 32
    if dist.get_rank() == 1:
        made.secret = b"another"
    with pytest.raises(CommunicationError, match="process group 'checkpoints"):
        gloo_group(session.current().groups.world, "checkpoints", made, 20.0)
    assert ("checkpoints", (0, 1)) not in made
    values = [1.5, "é", None, {"a": ["x" * (1 + 3000 * dist.get_rank())]}]
    assert [len(told[3]["a"][0]) for told in gather_json(values, session.current().groups.world)] == [1, 3001]
    assert not list(Path(tempfile.gettempdir()).glob("modelparallel-secret-*"))


def test_every_group_is_proved(tmp_path):
    run_ranks(later_groups, 2, environ={"TMPDIR": str(tmp_path)})


def with_own_files(files):
    if file := files[dist.get_rank()]:
        os.environ["MODELPARALLEL_SECRET_FILE"] = file
    try:
        smp.init({"pipeline_parallel_degree": 2})
    except Exception as error:
        return type(error), str(error)
    return session.current().made_groups.secret


def test_the_secret_of_several_hosts_is_given(tmp_path):
    files = []
    for name, text in (("same", "s" * 64), ("copy", "s" * 64), ("other", "o" * 64)):
        files.append(tmp_path / name)
        files[-1].write_text(text)
        files[-1].chmod(0o600)
    same, copy, other = map(str, files)
    first, second = run_ranks(with_own_files, 2, (same, copy), environ=TWO_HOSTS)
    assert first == second and len(first) == 32
    assert run_ranks(with_own_files, 2, ("", ""), environ=TWO_HOSTS) == [b"", b""]
    for pair in ((same, other), (same, ""), ("", same)):
        for kind, text in run_ranks(with_own_files, 2, pair, environ=TWO_HOSTS):
            assert kind is CommunicationError and "does not know the secret" in text


def test_what_can_be_a_secret(tmp_path):
    made, path = rendezvous._new_secret()
    try:
        assert rendezvous._told_secret(path, 1) == made
        assert Path(path).stat().st_mode & 0o777 == 0o600
        (tmp_path / "link").symlink_to(path)
        (tmp_path / "directory").mkdir()
        os.mkfifo(tmp_path / "fifo")
        (tmp_path / "open").write_bytes(Path(path).read_bytes())
        (tmp_path / "open").chmod(0o640)
        for name in ("link", "directory", "fifo", "open", "missing"):
            with pytest.raises(CommunicationError, match="cannot read"):
                rendezvous._told_secret(str(tmp_path / name), 1)
            with pytest.raises(SMPConfigError, match=r"MODELPARALLEL_SECRET_FILE.*chmod 600"):
                rendezvous._given_secret(str(tmp_path / name))
        for content in (b"", b"modelparallel secret 00\n", Path(path).read_bytes() * 2, b"\xff" * 100):
            (tmp_path / "private").write_bytes(content)
            (tmp_path / "private").chmod(0o600)
            with pytest.raises(CommunicationError, match="not a secret that a rank 0 has written"):
                rendezvous._told_secret(str(tmp_path / "private"), 1)
        (tmp_path / "private").write_bytes(b"short")
        with pytest.raises(SMPConfigError, match="holds 5 bytes"):
            rendezvous._given_secret(str(tmp_path / "private"))
    finally:
        os.unlink(path)


def listeners(port):
    """The addresses at which anybody listens at a port, as /proc/net has them."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if not os.path.exists(table):
            continue
        for line in Path(table).read_text().splitlines()[1:]:
            address, _, number = line.split()[1].partition(":")
            if line.split()[3] == "0A" and int(number, 16) == port:
                found.add(address)
    return found


@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="reads /proc")
@pytest.mark.parametrize("host", ["", "127.0.0.1", "192.0.2.1"])  # the last is nobody's
def test_a_store_of_one_machine_listens_at_loopback(host):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environ = {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
    config, stores = load_config({}, {}), {}

    def make(rank):
        identity = ProcessIdentity(rank, 2, rank, 2, "Open MPI")
        stores[rank] = rendezvous.make_store(config, identity, environ).store

    threads = [threading.Thread(target=make, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    stores[1].set("key", "value")
    assert stores[0].get("key") == b"value"
    assert listeners(port) == {"0100007F"}


LOOKING = """
    import os, pathlib
    from modelparallel.job.discovery import discover_process
    assert discover_process(os.environ).world_size == 2
    port = int(os.environ["MASTER_PORT"])
    lines = [line.split() for line in pathlib.Path("/proc/net/tcp").read_text().splitlines()[1:]]
    mine = [line[1] for line in lines if line[3] == "0A" and line[1].endswith(f":{port:04X}")]
    print("listening", [address.split(":")[0] for address in mine])
    number, _, path = os.environ["MODELPARALLEL_STORE"].partition(":")
    assert int(number) == port
    print("mode", oct(os.stat(os.path.dirname(path)).st_mode & 0o777))
"""


@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="reads /proc")
@pytest.mark.parametrize("backend", ["elastic", "mpi"])
def test_a_job_of_the_launcher_has_its_store_in_a_folder_of_its_own(tmp_path, backend, monkeypatch):
    monkeypatch.setenv("MODELPARALLEL_LAUNCHER", "slurm")  # the user's word about what has started the launcher
    result = run_job(job_of(tmp_path, write_script(tmp_path, LOOKING), backend=backend))
    assert result.exit_code == 0, result.message
    # The agent's, for scripts that call init_process_group themselves; nothing without an agent.
    seen = "listening ['0100007F']" if backend == "elastic" else "listening []"
    for rank in range(2):
        assert result.folder.rank_log(rank).read_text().splitlines() == [seen, "mode 0o700"]


def test_the_file_of_a_store_goes_with_the_attempt(tmp_path, monkeypatch):
    for in_memory, is_there in ((str(tmp_path), True), (str(tmp_path / "missing"), False)):
        monkeypatch.setattr(rendezvous_port, "_IN_MEMORY", in_memory)
        with rendezvous_port.store_file(tmp_path / "otherwise") as path:
            assert (path.name == "store") is is_there
            assert not is_there or path.parent.stat().st_mode & 0o777 == 0o700
            path.write_text("x")
        assert not path.exists() and list(tmp_path.iterdir()) == []


def differing_settings():
    smp.init({"pipeline_parallel_degree": 2, "microbatches": 2 + dist.get_rank()})


def test_settings_are_still_compared():
    failures = run_ranks(differing_settings, 2, return_failures=True)
    for failure in failures:
        assert isinstance(failure.exception, DivergenceError)
        assert "microbatches: 2 on rank 0, 3 on rank 1" in str(failure.exception)


def test_tensors_are_not_json():
    with pytest.raises(TypeError):
        gather_json(torch.ones(1), None)
