"""The hosts that mpirun is to use, and what their processes are told."""

import pytest

from launched_jobs import job_of, write_script
from modelparallel.errors import LaunchError
from modelparallel.launch.environment import job_environment
from modelparallel.launch.hosts import Hosts
from modelparallel.launch.mpi_hosts import parse_hosts, read_hostfile
from modelparallel.launch.mpi_options import mpirun_arguments, parse_mpi_options

TWO = Hosts(("node-a", "node-b"), 0, "node-a", "", (8, 4))


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("a:8,b:4", [("a", 8), ("b", 4)]),
        ("a, 10.0.0.2:2", [("a", 1), ("10.0.0.2", 2)]),
        ("[fd77::1]:2", [("fd77::1", 2)]),
    ],
)
def test_hosts_of_an_option(text, pairs):
    hosts = parse_hosts(text)
    assert list(zip(hosts.names, hosts.sizes, strict=True)) == pairs and hosts.address == pairs[0][0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read ''"),
        ("a:8,,b:8", "cannot read ''"),
        ("a:x", "cannot read 'a:x'"),
        ("a:2,a:2", "a stands there twice"),
        ("a:0", "a has no process"),
    ],
)
def test_hosts_that_cannot_be(text, message):
    with pytest.raises(LaunchError, match=message):
        parse_hosts(text)


def test_hosts_of_a_file(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# our hosts\nnode-a slots=8  # the first\n\nnode-b:4\nnode-c slots = 2 max_slots=4\nnode-d\n")
    hosts = read_hostfile(path)
    assert (hosts.names, hosts.sizes) == (("node-a", "node-b", "node-c", "node-d"), (8, 4, 2, 1))
    path.write_text("node-a slots=8\nnode-b slots=many\n")
    with pytest.raises(LaunchError, match=r"hosts, line 2: cannot read 'node-b slots=many'"):
        read_hostfile(path)
    with pytest.raises(LaunchError, match="cannot be read"):
        read_hostfile(tmp_path / "nothing")
    path.write_text("# none\n")
    with pytest.raises(LaunchError, match="no host is named"):
        read_hostfile(path)


def test_the_environment_names_all_hosts_and_leaves_the_network_to_each(tmp_path):
    job = job_of(tmp_path, write_script(tmp_path, "pass"), num_processes=12, backend="mpi", hosts=TWO)
    environment = job_environment(job, 23456, {})
    assert environment["SM_HOSTS"] == '["node-a","node-b"]' and environment["SM_CURRENT_HOST"] == "node-a"
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("node-a", "23456")
    assert environment["SM_NUM_GPUS"] == "8" and "GLOO_SOCKET_IFNAME" not in environment
    assert (job.ranks, job.world_size) == (range(12), 12)
    arguments = mpirun_arguments(12, parse_mpi_options(""), environment, TWO)
    assert arguments[:4] == ["-n", "12", "--host", "node-a:8,node-b:4"]


def test_the_environment_of_one_node_of_several(tmp_path):
    variables = {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "=eth1"}
    hosts = Hosts(("node-a", "node-b"), 1, "10.0.0.1", "eth1", (1, 2), variables)
    job = job_of(tmp_path, write_script(tmp_path, "pass"), num_processes=2, hosts=hosts, earlier_starts=3)
    environment = job_environment(job, 23456, {"NCCL_SOCKET_IFNAME": "ib0"}, restart_count=1)
    assert job.ranks == range(1, 3) and job.world_size == 3
    assert environment["GLOO_SOCKET_IFNAME"] == "eth1" and "NCCL_SOCKET_IFNAME" not in environment
    assert environment["SM_CURRENT_HOST"] == environment["CURRENT_HOST"] == "node-b"
    assert environment["SM_NETWORK_INTERFACE_NAME"] == "eth1" and environment["MASTER_ADDR"] == "10.0.0.1"
    assert environment["MODELPARALLEL_RESTART_COUNT"] == "4"
    assert '"is_master":false' in environment["SM_TRAINING_ENV"]


@pytest.mark.parametrize(("backend", "said"), [("elastic", "torchrun"), ("mpi", "mpi")])
def test_ranks_count_the_variables_of_who_has_started_them(tmp_path, backend, said):
    job = job_of(tmp_path, write_script(tmp_path, "pass"), backend=backend)
    assert job_environment(job, 1, {"MODELPARALLEL_LAUNCHER": "none"})["MODELPARALLEL_LAUNCHER"] == said
    assert "MODELPARALLEL_LAUNCHER" not in job_environment(job, 1, {})
