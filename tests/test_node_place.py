"""Which of several hosts this one is: the table of engines, what is missing, and what disagrees."""

import json

import pytest
from typer.testing import CliRunner

from modelparallel.errors import LaunchError
from modelparallel.launch.command_line import app
from modelparallel.launch.node_place import (
    NodePlace,
    PlaceOptions,
    engine_restarts,
    find_place,
    parse_meeting_point,
    parse_nodes,
    port_of,
)

SLURM = {
    "SLURM_JOB_ID": "42",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_NODEID": "1",
}


def place_of(environ, *, file=None, own_name="here", **options):
    return find_place(
        PlaceOptions(**{"nnodes": "auto", **options}),
        environ,
        default_job_id="train",
        own_name=own_name,
        list_hosts=lambda text: {"n[1-2]": ["n1", "n2"]}[text],
        resource_file=file,
    )


@pytest.fixture
def no_file(tmp_path):
    return tmp_path / "resourceconfig.json"


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (
            {
                "PET_NNODES": "3",
                "PET_NODE_RANK": "2",
                "PET_MASTER_ADDR": "job-0.job",
                "PET_MASTER_PORT": "29500",
                "PET_NPROC_PER_NODE": "8",
            },
            (3, 3, 2, "job-0.job", 29500, "train"),
        ),
        (
            {
                "PET_NNODES": "1:4",
                "PET_RDZV_ENDPOINT": "head:29400",
                "PET_RDZV_ID": "run-7",
                "PET_NPROC_PER_NODE": "gpu",
            },
            (1, 4, None, "head", 29400, "run-7"),
        ),
        (
            {"SM_HOSTS": '["algo-2","algo-1"]', "SM_CURRENT_HOST": "algo-2", "TRAINING_JOB_NAME": "job-1"},
            (2, 2, 1, "algo-1", 7777, "job-1"),
        ),
        (SLURM, (2, 2, 1, "n1", port_of("slurm-42.0"), "slurm-42.0")),
        (
            {
                "JOB_COMPLETION_INDEX": "1",
                "MODELPARALLEL_NNODES": "2",
                "MODELPARALLEL_MASTER": "train-1-0.train-1:29500",
            },
            (2, 2, 1, "train-1-0.train-1", 29500, "train"),
        ),
        (
            {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_TASK_ID": "sky-9"},
            (2, 2, 1, "10.0.0.1", port_of("sky-9"), "sky-9"),
        ),
        (
            {"DSTACK_NODE_RANK": "0", "DSTACK_NODES_NUM": "4", "DSTACK_MASTER_NODE_IP": "10.0.0.5"},
            (4, 4, 0, "10.0.0.5", port_of("train"), "train"),
        ),
        (
            {
                "AWS_BATCH_JOB_NODE_INDEX": "0",
                "AWS_BATCH_JOB_NUM_NODES": "3",
                "AWS_BATCH_JOB_MAIN_NODE_INDEX": "2",
                "AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS": "10.1.0.9",
                "AWS_BATCH_JOB_ID": "abc-1#0",
            },
            (3, 3, 1, "10.1.0.9", port_of("abc-1"), "abc-1"),
        ),
        (  # the main node is not told its own address
            {"AWS_BATCH_JOB_NODE_INDEX": "0", "AWS_BATCH_JOB_NUM_NODES": "2", "AWS_BATCH_JOB_ID": "abc-1#0"},
            (2, 2, 0, "here", port_of("abc-1"), "abc-1"),
        ),
        (
            {
                "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
                "MASTER_ADDR": "head",
            },
            (2, 2, 1, "head", port_of("train"), "train"),
        ),
        (
            {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "1", "MASTER_ADDR": "head"},
            (2, 2, 0, "head", port_of("train"), "train"),
        ),
        # srun --mpi=pmi2 sets PMI's, too, without the number on a host
        ({**SLURM, "PMI_RANK": "1", "PMI_SIZE": "2"}, (2, 2, 1, "n1", port_of("slurm-42.0"), "slurm-42.0")),
        # pods of a TrainJob are of an Indexed Job, too
        (
            {"JOB_COMPLETION_INDEX": "0", "PET_NNODES": "2", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "h"},
            (2, 2, 0, "h", port_of("train"), "train"),
        ),
    ],
)
def test_each_engine_says_where_a_node_is(environ, expected, no_file):
    place = place_of(environ, file=no_file)
    assert (place.least, place.most, place.node_rank, place.host, place.port, place.job_id) == expected


def test_sagemaker_is_known_by_its_file_where_no_variables_are_set(no_file):
    content = {"current_host": "algo-2", "hosts": ["algo-1", "algo-2"], "network_interface_name": "ethwe"}
    no_file.write_text(json.dumps(content))
    place = place_of({}, file=no_file)
    assert place == NodePlace("SM_* (SageMaker)", 2, 2, 1, "algo-1", 7777, "train", ("algo-1", "algo-2"), "ethwe")
    no_file.write_text(json.dumps({**content, "current_host": "algo-3"}))
    with pytest.raises(LaunchError, match="'algo-3' is not among the hosts algo-1, algo-2"):
        place_of({}, file=no_file)
    no_file.write_text("{}")
    with pytest.raises(LaunchError, match=r"resourceconfig.json does not name the hosts"):
        place_of({}, file=no_file)


def test_options_say_it_where_no_engine_does(no_file):
    place = place_of({}, file=no_file, nnodes="2", node_rank=1, rendezvous="node-a:29500", job_id="mine")
    assert place == NodePlace("options", 2, 2, 1, "node-a", 29500, "mine")
    same = place_of({"MASTER_ADDR": "node-a"}, file=no_file, nnodes="2", node_rank=0)
    assert (same.host, same.port, same.job_id) == ("node-a", port_of("train"), "train")
    elastic = place_of({}, file=no_file, nnodes="1:3", rendezvous="[fd77::1]:29500")
    assert (elastic.least, elastic.most, elastic.node_rank, elastic.host) == (1, 3, None, "fd77::1")
    alone = place_of({}, file=no_file, nnodes="1")
    assert (alone.most, alone.node_rank, alone.host) == (1, 0, "here")


def test_options_fill_in_what_an_engine_leaves_open(no_file):
    place = place_of(SLURM, file=no_file, nnodes="1:2", rendezvous="ib-n1", job_id="mine")
    assert (place.least, place.most, place.node_rank, place.host, place.job_id) == (1, 2, 1, "ib-n1", "mine")
    assert place.source == "options and SLURM_*"
    assert place.node_names == ("n1", "n2")


@pytest.mark.parametrize(
    ("environ", "options", "message"),
    [
        ({}, {}, r"no engine says how many nodes .* give --nnodes N, --node-rank R and --rendezvous HOST:PORT"),
        ({}, {"nnodes": "2", "rendezvous": "a"}, r"which of the 2 nodes is this one\? Add --node-rank R"),
        ({}, {"nnodes": "2", "node_rank": 0}, r"where do the nodes meet\? Add --rendezvous HOST:PORT"),
        ({}, {"nnodes": "2", "node_rank": 2, "rendezvous": "a"}, r"node rank 2 of 2 nodes .* expected 0 to 1"),
        ({}, {"nnodes": "2", "node_rank": -1, "rendezvous": "a"}, r"--node-rank -1"),
        ({}, {"nnodes": "two"}, r"--nnodes 'two': expected a number of nodes, a range such as 2:4, or auto"),
        ({}, {"nnodes": "3:2"}, r"--nnodes 3:2: .* the least first"),
        ({}, {"nnodes": "2", "node_rank": 0, "rendezvous": "a:99999"}, r"--rendezvous 'a:99999'"),
        ({}, {"nnodes": "2", "node_rank": 0, "rendezvous": "a", "job_id": "a b"}, r"job id 'a b'"),
        (SLURM, {"nnodes": "3"}, r"options and SLURM_\* disagree: 3 and 2 nodes: .*MODELPARALLEL_NODE_SOURCE"),
        (SLURM, {"node_rank": 0}, r"options and SLURM_\* disagree: this is node 0 or node 1"),
        (
            {**SLURM, "PET_NNODES": "4", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "h"},
            {},
            r"PET_\* \(torchrun, Kubeflow\) and SLURM_\* disagree: 4 and 2 nodes",
        ),
        (
            {**SLURM, "DSTACK_NODE_RANK": "0", "DSTACK_NODES_NUM": "2"},
            {},
            r"SLURM_\* and DSTACK_\* disagree: this is node 1 or node 0",
        ),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, {}, r"Slurm has started 2\(x2\) tasks .*--ntasks-per-node=1"),
        ({**SLURM, "SLURM_NODEID": "x"}, {}, r"environment variable SLURM_NODEID: expected a number, got 'x'"),
        # the batch script itself runs once
        ({**SLURM, "SLURM_STEP_ID": "4294967291"}, {}, r"no engine says .* srun with one task per node"),
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
            {},
            r"mpirun has started 2 processes on this node .* ppr:1:node",
        ),
        (SLURM, {"job_id": "x" * 200}, r"job id"),
        ({"SM_HOSTS": "algo-1", "SM_CURRENT_HOST": "algo-1"}, {}, r"SM_HOSTS: expected a list of host names as JSON"),
        (
            {"MODELPARALLEL_NODE_SOURCE": "slrum"},
            {},
            r"MODELPARALLEL_NODE_SOURCE: 'slrum': expected torchrun, sagemaker",
        ),
    ],
)
def test_what_is_missing_or_said_in_two_ways_is_an_error(environ, options, message, no_file):
    with pytest.raises(LaunchError, match=message):
        place_of(environ, file=no_file, **options)


def test_one_source_can_be_made_to_count(no_file):
    both = {**SLURM, "PET_NNODES": "4", "PET_NODE_RANK": "3", "PET_MASTER_ADDR": "h"}
    assert place_of({**both, "MODELPARALLEL_NODE_SOURCE": "slurm"}, file=no_file).most == 2
    assert place_of({**both, "MODELPARALLEL_NODE_SOURCE": "torchrun"}, file=no_file).most == 4
    said = {"nnodes": "3", "node_rank": 2, "rendezvous": "a"}
    assert place_of({**both, "MODELPARALLEL_NODE_SOURCE": "none"}, file=no_file, **said).source == "options"


def test_the_port_follows_from_the_job_id_alone():
    assert port_of("slurm-42.0") == 29165 == port_of("slurm-42.0")  # on every host and in every run
    ports = {port_of(f"job-{number}") for number in range(1000)}
    assert len(ports) > 980 and min(ports) >= 20000 and max(ports) < 60000


def test_restarts_of_engines_are_added_up():
    assert engine_restarts({}) == 0
    assert engine_restarts({"SLURM_RESTART_COUNT": "2", "JOBSET_RESTART_ATTEMPT": "1"}) == 3
    assert engine_restarts({"AWS_BATCH_JOB_ATTEMPT": "1"}) == 0  # the first one
    assert engine_restarts({"AWS_BATCH_JOB_ATTEMPT": "3"}) == 2


def test_forms_of_numbers_and_addresses():
    assert parse_nodes(" 4 ") == (4, 4) and parse_nodes("2:4") == (2, 4)
    assert parse_meeting_point("host") == ("host", None)
    assert parse_meeting_point("10.0.0.1:80") == ("10.0.0.1", 80)
    assert parse_meeting_point("fd77::1") == ("fd77::1", None)
    assert parse_meeting_point("[fd77::1]:80") == ("fd77::1", 80)
    for wrong in ("", "a:b", "a:0", "http://a:80", "a b"):
        with pytest.raises(LaunchError, match="expected HOST or HOST:PORT"):
            parse_meeting_point(wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--node-rank", "1"], "--node-rank: only with --nnodes N"),
        (["--rendezvous", "a", "--job-id", "j"], "--rendezvous, --job-id: only with --nnodes N"),
        (["--nnodes", "2", "--node-rank", "0"], "where do the nodes meet?"),
        (["--nnodes", "2", "--node-rank", "0", "--rendezvous", "a", "--nproc", "1:2"], "give one number for this host"),
        (["--nnodes", "2", "--node-rank", "0", "--rendezvous", "a", "--show", "some"], "expected first or all"),
        (
            ["--nnodes", "2", "--node-rank", "0", "--rendezvous", "a", "--backend", "mpi"],
            "--backend mpi --hosts HOST:N",
        ),
        (["--hosts", "a:1,b:1"], "add --backend mpi, or use --nnodes"),
        (["--backend", "mpi", "--hosts", "a:1,b:1", "--nproc", "3"], "the hosts have 2 processes in all"),
        (["--backend", "mpi", "--hosts", "a:1", "--hostfile", "f"], "--hosts and --hostfile: give one of them"),
        (
            ["--backend", "mpi", "--hosts", "a:1", "--nnodes", "2", "--node-rank", "0", "--rendezvous", "a"],
            "leave out --nnodes",
        ),
    ],
)
def test_options_that_do_not_go_together(options, message, tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    script.write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["run", "--device", "cpu", *options, str(script)])
    assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.py"]
