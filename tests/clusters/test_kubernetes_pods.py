"""What is rendered for Kubernetes runs: the hosts of the tests are the pods, with the variables of the controllers.

The tests are the kubelet: they mount what the pod mounts (by another path, since the machine has no such folders), and
start the container's command with its environment.
"""

import base64
import os
import re
import shutil
import signal
import sys
import time

import pytest
import yaml

import kubernetes_cases as cases
from clusters.hosts import some_hosts
from clusters.runs import PATIENCE, SCRIPT, check_run, ends_of
from modelparallel.launch.clusters.k8s.pod_logs import shown_line

NAME = "t1"
#: As the controllers name the pods, which is how others reach them: POD.SERVICE.
HOSTS = {"trainjob": "t1-node-0-{}.t1", "indexed-job": "t1-{}.t1"}
MOUNTS = ("/etc/modelparallel-peers", "/etc/modelparallel", "/modelparallel")
MOUNTED = re.compile(rf"(?<![\w/])(?:{'|'.join(MOUNTS)})(?=/)")
VALUES = {"wandb/key": "a-secret-value", "peers/secret": "0123456789abcdef0123456789abcdef"}
PARAMETERS = {"pipeline_parallel_degree": 2, "partitions": 2, "microbatches": 2, "ddp": True, "prescaled_batch": True}


@pytest.fixture
def code(tmp_path):
    folder = tmp_path / "code"
    folder.mkdir()
    shutil.copy(SCRIPT, folder / "train.py")
    return folder


def rendered(code, form, *arguments, **keys):
    """The container of a pod, and the files of its ConfigMap."""
    row = {"kind": "kubernetes", "image": "mp:1", "form": form, "python": sys.executable, **keys}
    job = cases.job(
        code,
        name=NAME,
        processes_per_node=1,
        arguments=arguments,
        hyperparameters={},
        parameters=PARAMETERS,
        channels={},
        device="cpu",
    )
    (text,) = cases.cluster(row).render(job).files.values()
    described, *_, made = yaml.safe_load_all(text)
    files = {name: content.encode() for name, content in described["data"].items()}
    files |= {name: base64.b64decode(content) for name, content in described["binaryData"].items()}
    if form == "indexed-job":
        (container,) = made["spec"]["template"]["spec"]["containers"]
        return container, files
    trainer = made["spec"]["trainer"]
    return {"command": trainer["command"] + trainer["args"], "env": trainer["env"]}, files


def set_by_controllers(form, index):
    if form == "indexed-job":
        return {"JOB_COMPLETION_INDEX": str(index)}
    return {
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "1",
        "PET_NODE_RANK": str(index),
        "PET_MASTER_ADDR": HOSTS[form].format(0),
        "PET_MASTER_PORT": "29400",
    }


def environment_of(container):
    values = {}
    for entry in container["env"]:
        source = entry.get("valueFrom", {})
        if "secretKeyRef" in source:
            reference = source["secretKeyRef"]
            values[entry["name"]] = VALUES[f"{reference['name']}/{reference['key']}"]
        elif "fieldRef" in source:
            values[entry["name"]] = ""  # an annotation that is not there
        else:
            values[entry["name"]] = entry["value"]
    return values


def start_pod(host, form, index, container, files, folder):
    """A pod, whose files are below a folder of its own: its process, and its log."""
    mounts = {path: folder / path.strip("/") for path in MOUNTS}
    for mounted in mounts.values():
        mounted.mkdir(parents=True)

    def moved(text):
        return MOUNTED.sub(lambda found: str(mounts[found[0]]), text)

    (mounts["/etc/modelparallel-peers"] / "secret").write_text(VALUES["peers/secret"])
    for name, content in files.items():
        is_text = name == "job.json"
        (mounts["/etc/modelparallel"] / name).write_bytes(moved(content.decode()).encode() if is_text else content)
    command = [moved(part) for part in container["command"]]
    environ = {**environment_of(container), **set_by_controllers(form, index)}
    log = folder / "log"
    return host.start(command, log=log, cwd=folder, environ=environ), log


def start_pods(hosts, form, container, files, tmp_path):
    return [
        start_pod(host, form, index, container, files, tmp_path / f"pod-{index}") for index, host in enumerate(hosts)
    ]


def wait_for(log, text, started):
    deadline = time.monotonic() + PATIENCE
    while not (log.exists() and text in log.read_text()):
        assert time.monotonic() < deadline, "\n".join(log.read_text() for _, log in started)
        time.sleep(0.2)


@pytest.mark.parametrize("form", HOSTS)
def test_a_job_trains_in_its_pods(form, code, tmp_path):
    """Two nodes with a process each, pipeline over both: the losses of one process; secrets reach the script."""
    script = (code / "train.py").read_text()
    (code / "train.py").write_text(
        script + "\nprint('secret', os.environ['WANDB_API_KEY'][:8], 'level', os.environ['LEVEL'], flush=True)\n"
    )
    container, files = rendered(code, form, "--pp", "2", peer_secret="peers/secret")
    with some_hosts(names=[HOSTS[form].format(index) for index in (0, 1)]) as hosts:
        started = start_pods(hosts, form, container, files, tmp_path)
        check_run(started)
    for rank, (_, log) in enumerate(started):
        text = log.read_text()
        lines = [shown_line(line, rank, rank) for line in text.splitlines()]
        assert any(line and line.endswith(f"rank {rank} done") for line in lines), text
        assert "secret a-secret level 1" in text


def test_a_failure_ends_all_pods_with_its_exit_code(code, tmp_path):
    container, files = rendered(code, "indexed-job", "--pp", "2", "--fail", "1:1")
    with some_hosts(names=[HOSTS["indexed-job"].format(index) for index in (0, 1)]) as hosts:
        ends = ends_of(start_pods(hosts, "indexed-job", container, files, tmp_path))
    for exit_code, text in ends:
        assert exit_code == 1 and "ValueError: deliberate failure of the script" in text, text


def test_a_pod_that_is_made_again(code, tmp_path):
    """A pod is killed, and made again before the other has lost it: it waits for the other's end, and its successor."""
    mark = tmp_path / "second"
    endless = ["--steps", "99999", "--seconds", "0.2"]
    first_line = f"import os, sys; sys.argv += [] if os.path.exists({str(mark)!r}) else {endless}"
    (code / "train.py").write_text("\n".join([first_line, (code / "train.py").read_text()]))
    container, files = rendered(code, "indexed-job", "--pp", "2")
    with some_hosts(names=[HOSTS["indexed-job"].format(index) for index in (0, 1)]) as hosts:
        started = start_pods(hosts, "indexed-job", container, files, tmp_path)
        wait_for(started[0][1], "step 3 loss", started)
        os.killpg(started[1][0].pid, signal.SIGKILL)
        started[1][0].wait(PATIENCE)
        mark.touch()
        again = start_pod(hosts[1], "indexed-job", 1, container, files, tmp_path / "again-1")
        assert started[0][0].wait(PATIENCE) == 75, started[0][1].read_text()
        assert "(node 1) was lost" in started[0][1].read_text()
        check_run([start_pod(hosts[0], "indexed-job", 0, container, files, tmp_path / "again-0"), again])
        assert "is there already: waiting for the others to lose it" in again[1].read_text()


def test_one_process_in_each_pod_without_a_launcher(tmp_path):
    """As the Training Operator of Kubeflow 1 starts it: RANK and WORLD_SIZE, and nothing about the host."""
    with some_hosts(names=["train-master-0", "train-worker-0"]) as hosts:
        variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "train-master-0", "MASTER_PORT": "23456"}
        started = []
        for rank, host in enumerate(hosts):
            log = tmp_path / f"{rank}.log"
            command = [sys.executable, SCRIPT, "--pp", "2"]
            process = host.start(command, log=log, cwd=tmp_path, environ={**variables, "RANK": str(rank)})
            started.append((process, log))
        text = check_run(started)
    # Each is alone on its host: the first device is its own.
    assert text.count("local 0 of 1") == 2, text
