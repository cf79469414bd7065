"""Our request, run by the real training toolkit: two containers, mpirun over ssh, the seed's job on MNIST."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from clusters.hosts import some_hosts
from clusters.sagemaker_cloud import PORT
from clusters.toolkit import Container, Image, drivers, mount_points, need_sshd
from modelparallel.launch.clusters.sagemaker.logs import line_of
from scripts import ROOT, load_script

ROLE = "arn:aws:iam::123456789012:role/training"
EXAMPLES = ROOT / "examples" / "mnist"
SCRIPT = "train_tensor_pipeline_parallel"
PARAMETERS = {
    "microbatches": 4,
    "pipeline_parallel_degree": 2,
    "placement_strategy": "cluster",
    "tensor_parallel_degree": 2,
    "ddp": True,
}
DISTRIBUTION = {
    "smdistributed": {"modelparallel": {"enabled": True, "parameters": PARAMETERS}},
    "mpi": {
        "enabled": True,
        "processes_per_host": 2,
        "custom_mpi_options": "--mca btl_vader_single_copy_mechanism none ",
    },
}
STEPS, BATCH, SEED, RATE = 11, 16, 3, 0.5
#: Seconds for a whole job on a busy machine.
PATIENCE = 900
AFTER_A_FAILURE = 30.0


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """The data, and a copy with fewer digits to test on."""
    get_mnist = load_script("examples/mnist/get_mnist.py")
    try:
        raw = get_mnist.get_mnist(ROOT / "data")
    except Exception as error:  # no network, no index
        pytest.skip(f"MNIST cannot be fetched: {error}")
    folder = tmp_path_factory.mktemp("mnist") / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", 2000), ("t10k", 200)):
        for name, header, size in (("images-idx3", 16, 784), ("labels-idx1", 8, 1)):
            content = (raw / f"{part}-{name}-ubyte").read_bytes()
            head = content[:4] + count.to_bytes(4, "big") + content[8:header]
            (folder / f"{part}-{name}-ubyte").write_bytes(head + content[header : header + count * size])
    return folder.parent.parent


@pytest.fixture(scope="module")
def one_process(mnist):
    """The losses of rank 0's samples, of one process that trains on the batches of both data-parallel ranks."""
    module = load_script(f"examples/mnist/{SCRIPT}.py")
    dataset = module.load(str(mnist), is_train=True)
    half = len(dataset) // 2
    torch.manual_seed(SEED)
    model = module.Net()
    optimizer = torch.optim.Adadelta(model.parameters(), lr=RATE)
    losses = []
    for step in range(STEPS):
        parts = []
        for rank in range(2):
            samples = [dataset[rank * half + step * BATCH + i] for i in range(BATCH)]
            images, labels = torch.stack([image for image, _ in samples]), torch.tensor([label for _, label in samples])
            parts.append(F.nll_loss(model(images), labels))
        optimizer.zero_grad()
        (sum(parts) / 2).backward()
        optimizer.step()
        losses.append(parts[0].item())
    return losses


@contextmanager
def submitted(folder: Path, job: dict, cluster: dict) -> Iterator[tuple]:
    """(containers' hosts, image, what was sent, variables): the job was submitted to a cloud that the block has."""
    need_sshd()
    image = Image.make(folder / "image")
    fields = {
        "name": "seed-job-2",
        "entry_point": f"{SCRIPT}.py",
        "source_dir": str(EXAMPLES),
        "num_nodes": 2,
        "processes_per_node": 2,
        "instance_type": "ml.p3.16xlarge",
        "channels": {"training": "s3://bkt/mnist"},
        "arguments": ["--max-steps", str(STEPS), "--batch-size", str(BATCH), "--seed", str(SEED), "--lr", str(RATE)],
        "hyperparameters": {
            "max-steps": STEPS,
            "batch-size": BATCH,
            "seed": SEED,
            "lr": RATE,
            "mp_parameters": PARAMETERS,
        },
        "parameters": PARAMETERS,
    }
    given = {"job": {**fields, **job}, "cluster": {"role": ROLE, "image": "mp:1", "region": "us-west-2", **cluster}}
    (folder / "job.json").write_text(json.dumps(given))
    with some_hosts(names=["algo-1", "algo-2", "cloud"]) as (*hosts, cloud), mount_points():
        log = folder / "cloud.log"
        command = [image.programs / "python", Path(__file__).with_name("sagemaker_cloud.py"), cloud.address, folder]
        server = cloud.start(command, log=log, environ=image.variables())
        answer = folder / "request.json"
        await_file(answer, server, log)
        yield (
            hosts,
            image,
            json.loads(answer.read_text())["request"],
            {"AWS_ENDPOINT_URL": f"http://{cloud.address}:{PORT}"},
        )


def await_file(path: Path, process, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert process.poll() is None, f"the cloud has ended: {log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, f"nothing was submitted: {log.read_text()[-3000:]}"
        time.sleep(0.1)


def run_containers(hosts, image, request, data, command, folder, code=0, **variables) -> list[str]:
    """What the containers print; all of them have to end with the code."""
    processes, logs = [], []
    for host in hosts:
        container = Container.make(host, image, request, data)
        logs.append(folder / f"{host.name}.log")
        processes.append(container.start(command, logs[-1], request, **variables))
    deadline = time.monotonic() + PATIENCE
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if any(process.poll() not in (None, code) for process in processes):
            # The service ends a job with the first container that fails; here the others may still say why.
            deadline = min(deadline, time.monotonic() + AFTER_A_FAILURE)
        time.sleep(0.2)
    codes = [process.poll() for process in processes]
    texts = [log.read_text(errors="replace") for log in logs]
    assert codes == [code, code], "\n".join(text[-6000:] for text in texts)
    return texts


def check_losses(text: str, expected: list[float]) -> None:
    found = {int(step): float(loss) for step, loss in re.findall(r"step +(\d+)  loss ([\d.]+)", text)}
    assert sorted(found) == [0, 10], text[-3000:]
    for step, loss in found.items():
        assert loss == pytest.approx(expected[step], rel=1e-5), (found, expected)


def test_seed_job_2_by_mpirun_over_ssh(tmp_path, mnist, one_process):
    job = {"distribution": DISTRIBUTION, "custom_mpi_options": DISTRIBUTION["mpi"]["custom_mpi_options"]}
    with submitted(tmp_path, job, {}) as (hosts, image, request, variables):
        texts = run_containers(
            hosts, image, request, {"training": mnist}, ["train"], tmp_path, TEST_DEVICES="2", **variables
        )
    assert "mpirun" in texts[0] and "orted" in texts[1].lower()
    check_losses(texts[0], one_process)


def test_seed_job_2_by_the_toolkits_torchrun(tmp_path, mnist, one_process):
    """`torch_distributed`, with the parameters of the model among the hyperparameters."""
    with submitted(tmp_path, {"distribution": {"torch_distributed": {"enabled": True}}}, {}) as given:
        hosts, image, request, variables = given
        assert request["HyperParameters"]["sagemaker_mpi_num_of_processes_per_host"] == "2"
        data = {"training": mnist}
        texts = run_containers(hosts, image, request, data, ["train"], tmp_path, TEST_DEVICES="2", **variables)
    assert "torchrun --nnodes 2 --nproc_per_node 2 --master_addr algo-1 --master_port 7777" in texts[0]
    check_losses(texts[0], one_process)


def test_seed_job_2_in_an_image_without_the_toolkit(tmp_path, mnist, one_process):
    with submitted(tmp_path, {}, {"container": "own"}) as (hosts, image, request, _):
        data = {"training": mnist, "code": tmp_path / "bkt" / "seed-job-2" / "source"}
        command = request["AlgorithmSpecification"]["ContainerEntrypoint"]
        texts = run_containers(hosts, image, request, data, command, tmp_path)
        # What the service uploads at the end.
        log = hosts[0].folder / "container" / "ml" / "logs" / "node_0" / "rank_0.log"
        assert "test accuracy" in log.read_text()
    check_losses(texts[0], one_process)
    ranks = [{int(line_of(line, 0)[0] or 0) for line in text.splitlines() if "rank" in line} for text in texts]
    assert ranks[0] <= {0, 1} and ranks[1] <= {0, 2, 3}


def test_failure_in_an_image_without_the_toolkit(tmp_path, mnist):
    """The code of the first failing process on both hosts, and the file that the service shows as FailureReason."""
    values = {"max-steps": "few", "mp_parameters": PARAMETERS}
    job = {"hyperparameters": values, "arguments": ["--max-steps", "few"]}
    with submitted(tmp_path, job, {"container": "own"}) as (hosts, image, request, _):
        data = {"training": mnist, "code": tmp_path / "bkt" / "seed-job-2" / "source"}
        command = request["AlgorithmSpecification"]["ContainerEntrypoint"]
        texts = run_containers(hosts, image, request, data, command, tmp_path, code=2)
        failures = [(host.folder / "container" / "ml" / "output" / "failure").read_text() for host in hosts]
    assert any("argument --max-steps: invalid int value: 'few'" in text for text in texts), texts
    said = [
        re.findall(r"rank (\d) of 4 on (algo-\d) failed first.*exited with code 2", text)
        for text in [*texts, *failures]
    ]
    assert len({first for found in said for first in found}) == 1 and all(said), (said, texts, failures)


def test_drivers_of_todays_sdk_by_torchrun(tmp_path, mnist, one_process):
    """ModelTrainer(distributed=Torchrun(process_count_per_node=2)): its drivers, from a channel, in an image without
    the toolkit."""
    with some_hosts(names=["algo-1", "algo-2"]) as hosts, mount_points():
        image = Image.make(tmp_path / "image")
        (tmp_path / "drivers").mkdir()
        channel = drivers(tmp_path / "drivers", f"{SCRIPT}.py", 2)
        data = {"training": mnist, "code": EXAMPLES, "sm_drivers": channel}
        hyperparameters = {
            "max-steps": STEPS,
            "batch-size": BATCH,
            "seed": SEED,
            "lr": RATE,
            "mp_parameters": PARAMETERS,
        }
        source = {"S3DataType": "S3Prefix", "S3Uri": "s3://bkt/x", "S3DataDistributionType": "FullyReplicated"}
        request = {
            "TrainingJobName": "seed-job-2",
            "HyperParameters": {name: json.dumps(value) for name, value in hyperparameters.items()},
            "AlgorithmSpecification": {"TrainingInputMode": "File"},
            "ResourceConfig": {"InstanceType": "ml.p3.16xlarge", "InstanceCount": 2},
            "InputDataConfig": [{"ChannelName": name, "DataSource": {"S3DataSource": source}} for name in data],
        }
        script = "/opt/ml/input/data/sm_drivers/sm_train.sh"
        command = ["bash", "-c", f"chmod +x {script} && {script}"]
        texts = run_containers(hosts, image, request, data, command, tmp_path, TEST_DEVICES="2")
    assert "torchrun --nnodes=2 --nproc_per_node=2 --master_addr=algo-1 --master_port=7777 --node_rank=0" in texts[0]
    check_losses(texts[0], one_process)
