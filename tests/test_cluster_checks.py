"""What is checked of a job for any cluster before it is submitted, and what instance types have."""

import pytest

from modelparallel.errors import LaunchError, SMPConfigError
from modelparallel.launch.clusters.checks import (
    check_devices_per_node,
    check_instance_type,
    check_locations,
    check_name,
    check_shape,
    check_texts,
    clock,
    parse_duration,
)
from modelparallel.launch.clusters.description import ClusterJob, DataChannel
from modelparallel.launch.clusters.instances import (
    INSTANCES,
    devices_of,
    fabric_environment,
    instance_of,
    nearest_instance,
)

PARAMETERS = {"pipeline_parallel_degree": 2, "tensor_parallel_degree": 4, "ddp": True}


def job_of(nodes=1, processes=8, **values):
    return ClusterJob(
        name="j", entry_point="t.py", source_dir="/", num_nodes=nodes, processes_per_node=processes, **values
    )


def test_nodes_and_processes_against_the_degrees():
    check_shape(job_of(3, 8, parameters=PARAMETERS))
    check_shape(job_of(5, 7))
    with pytest.raises(SMPConfigError, match=r"job j, 3 nodes \* 4 processes = 12: .*12"):
        check_shape(job_of(3, 4, parameters=PARAMETERS))
    with pytest.raises(SMPConfigError, match=r"2 nodes \* 8 processes = 16: ddp: 16 processes hold 8 copies"):
        check_shape(job_of(2, 8, parameters={"pipeline_parallel_degree": 2}))
    with pytest.raises(SMPConfigError, match=r"^ddp: 8 processes"):
        check_shape(job_of(1, 8, parameters={"pipeline_parallel_degree": 2}))
    for nodes, processes, what in (
        (0, 1, "nodes"),
        (1, 0, "processes of a node"),
        (True, 1, "nodes"),
        (1.0, 1, "nodes"),
    ):
        with pytest.raises(LaunchError, match=f"number of {what} is"):
            check_shape(job_of(nodes, processes))


def test_devices_of_a_node():
    check_devices_per_node(job_of(processes=8), 8, "x")
    check_devices_per_node(job_of(processes=9, device="cpu"), 8, "x")
    check_devices_per_node(job_of(processes=9), None, "x")
    check_devices_per_node(job_of(processes=9, parameters={"ddp": True, "ddp_dist_backend": "gloo"}), 8, "x")
    with pytest.raises(LaunchError, match=r"9 processes on a node with 8 devices \(gpus_per_node of cluster 'gpu'\)"):
        check_devices_per_node(job_of(processes=9, parameters=PARAMETERS), 8, "gpus_per_node of cluster 'gpu'")


def test_instance_types():
    assert devices_of("ml.p4d.24xlarge") == devices_of("p4d.24xlarge") == devices_of("ml.p3.16xlarge") == 8
    assert devices_of("ml.g4dn.12xlarge") == devices_of("ml.g5.12xlarge") == 4 and devices_of("ml.c5.xlarge") == 0
    assert devices_of("ml.p9.xlarge") is None and instance_of("ml.p9.xlarge") is None
    assert nearest_instance("ml.p4d.24xlarg") == "ml.p4d.24xlarge" and nearest_instance("p4.24xlarge")[:2] == "p4"
    assert instance_of("ml.m4.10xlarge").num_cpus == 40 and instance_of("ml.c5.18xlarge").memory == 144
    assert instance_of("ml.g6e.48xlarge").memory == 1536 and instance_of("ml.m5.large").num_cpus == 2
    assert fabric_environment("ml.p4d.24xlarge") == {
        "FI_PROVIDER": "efa", "RDMAV_FORK_SAFE": "1", "FI_EFA_USE_DEVICE_RDMA": "1"
    }  # fmt: skip
    assert "FI_EFA_USE_DEVICE_RDMA" not in fabric_environment("ml.p3dn.24xlarge")
    assert fabric_environment("ml.p3.16xlarge") == fabric_environment("ml.p9.xlarge") == {}
    for name, row in INSTANCES.items():
        assert name == row.name and row.num_cpus >= 2 and row.memory > 0
        assert (row.device == "none") == (row.num_devices == 0) == (row.device_memory == 0) == (row.device_name == "")


def test_instance_types_against_processes():
    assert check_instance_type(job_of(instance_type="ml.p4d.24xlarge")) is None
    assert check_instance_type(job_of(instance_type="slurm:gpu", processes=99)) is None
    assert check_instance_type(job_of(instance_type="ml.c5.xlarge", processes=4)) is None  # a rehearsal
    assert check_instance_type(job_of(instance_type="ml.trn1.32xlarge", device="cpu")) is None
    assert "ml.p5.48xlarge): whether it has 8 devices" in check_instance_type(job_of(instance_type="ml.p5f.48xlarge"))
    for values, words in (
        ({"instance_type": "ml.g5.12xlarge"}, r"8 processes on a node with 4 devices \(instance type ml.g5.12xlarge\)"),
        ({"instance_type": "ml.trn1.32xlarge"}, "Trainium accelerators"),
        ({"instance_type": "ml.c5.xlarge", "device": "cuda"}, "has no GPU"),
    ):
        with pytest.raises(LaunchError, match=words):
            check_instance_type(job_of(**values))


def test_names_and_texts():
    assert check_name("a-1", "[a-z0-9-]{1,5}", "small letters") == "a-1"
    for name in ("a_b", "abcdef", "a-1\n", "", None):
        with pytest.raises(LaunchError, match=r"job name .*: small letters"):
            check_name(name, "[a-z0-9-]{1,5}", "small letters")
    check_texts({"a": "x" * 5}, "hyperparameter", most=1, longest=5)
    with pytest.raises(LaunchError, match="2 hyperparameters are more than the 1"):
        check_texts({"a": "", "b": ""}, "hyperparameter", most=1, longest=5)
    with pytest.raises(LaunchError, match="hyperparameter 'a' has 6 characters, more than the 5"):
        check_texts({"a": "x" * 6}, "hyperparameter", most=1, longest=5)
    with pytest.raises(LaunchError, match="its name has 300 characters"):
        check_texts({"a" * 300: ""}, "hyperparameter", most=1, longest=5)


def test_locations():
    job = job_of(
        channels={"train": DataChannel("/data"), "test": DataChannel("s3://b/x", "FastFile")}, output="gs://b/o"
    )
    check_locations(job, shares_folders=True, remedy="")
    with pytest.raises(LaunchError, match=r"channel 'train': /data is a path of this machine.*: upload it"):
        check_locations(job, shares_folders=False, remedy="upload it")
    for values, words in (
        ({"channels": {"a": DataChannel("data")}}, "channel 'a': 'data' is no absolute path"),
        ({"channels": {"a": DataChannel("file://data")}}, "no absolute path"),
        ({"checkpoints": "ck"}, "checkpoints: 'ck' is no absolute path"),
        ({"channels": {"a": DataChannel("/d", "FastFile")}}, "FastFile is for URLs"),
    ):
        with pytest.raises(LaunchError, match=words):
            check_locations(job_of(**values), shares_folders=True, remedy="")
    with pytest.raises(LaunchError, match="output: file:///o is a path"):
        check_locations(job_of(output="file:///o"), shares_folders=False, remedy="")


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(3600, 3600), ("90", 90), ("1.5h", 5400), ("90m", 5400), ("1d12h", 129600), ("24:00:00", 86400), ("0:00:05", 5),
     ("1-12:00:00", 129600), (" 4H ", 14400), (0.5, 0.5), ("120:00:00", 432000)],
)  # fmt: skip
def test_times(value, seconds):
    assert parse_duration(value, "time") == seconds
    assert parse_duration(clock(seconds), "time") == max(seconds, 1)


@pytest.mark.parametrize(
    "value", ["", "4 hours", "10:00", "1:99:00", "-5", 0, -1, True, None, "inf", float("nan"), "h"]
)
def test_wrong_times(value):
    with pytest.raises(LaunchError, match=r"--time: .* is no time: use seconds"):
        parse_duration(value, "--time")


def test_clocks():
    assert clock(86400) == "1-00:00:00" and clock(5400.2) == "01:30:01"
