"""Containers of SageMaker without SageMaker: the real training toolkit, started from the request that we would send.

The service's part is done here: it makes /opt/ml from the request (hyperparameters.json, resourceconfig.json,
inputdataconfig.json, the data of the channels), sets the variables of the image and runs its entry point. A container
is a host of hosts.py with files and processes of its own. The image has the toolkit in an environment of its own
(`toolkit_environment`), whose packages are laid over those of the tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from clusters.hosts import Host
from scripts import ROOT

REQUIREMENTS = ("sagemaker-training==5.1.4", "moto[server]", "boto3>=1.44", "retrying")
#: Its other requirements are those of a serving stack.
REQUIREMENTS_ALONE = ("sagemaker-pytorch-training==3.0.0",)
#: The SDK of today, whose drivers travel with the job; of its package the files alone are needed.
DRIVERS = "sagemaker-train==1.27.0"
FRAMEWORK = "sagemaker_pytorch_container.training:main"
FOLDER_VARIABLE = "MODELPARALLEL_TEST_TOOLKIT"

# What the interpreter of a rank does first, in our image: it has no GPU, so it rehearses (our own launcher does that
# itself), and floats are printed with all the digits that a comparison needs.
_SITE = """
import os, sys
if "OMPI_COMM_WORLD_RANK" in os.environ or "LOCAL_RANK" in os.environ:
    import torch
    if "TEST_DEVICES" in os.environ:
        from modelparallel.launch import rehearsal
        places = ["/opt/ml/code", "/opt/ml/input/data/code"]
        rehearsal.start(script_directories=places, num_devices=int(os.environ["TEST_DEVICES"]))

    class Exact(float):
        def __format__(self, spec):
            return super().__format__(spec.replace(".4f", ".10f"))

    item = torch.Tensor.item
    torch.Tensor.item = lambda self: Exact(item(self)) if self.is_floating_point() else item(self)
"""
# Open MPI 5 wants two dashes before long options, and calls its agent prted; the toolkit knows Open MPI 4, which took
# one, and waits for orted.
_MPIRUN = """#!/bin/bash
arguments=()
for argument in "$@"; do
  case "$argument" in -bind-to|-map-by|-mca) argument="-$argument";; esac
  arguments+=("$argument")
done
exec "{real}/mpirun" --prtemca prte_launch_agent "{image}/orted" "${{arguments[@]}}"
"""
_START = """
set -e
mount --bind "$TEST_ROOT/ml" /opt/ml
mount --bind "$TEST_ROOT/environment" /etc/environment
mount --bind "$TEST_ROOT/ssh" /root/.ssh
mount -t tmpfs -o mode=755 none /run
mkdir -p /run/sshd
exec "$@"
"""


def toolkit_environment() -> Path:
    """The `bin` folder of an environment with the toolkit. Made once; skips the test if it cannot be made."""
    folder = Path(os.environ.get(FOLDER_VARIABLE) or Path(sys.prefix) / "sagemaker-toolkit")
    stamp, programs = folder / ".stamp", folder / "bin"
    wanted = "\n".join((*REQUIREMENTS, *REQUIREMENTS_ALONE))
    if stamp.is_file() and stamp.read_text() == wanted:
        return programs
    venv.create(folder, clear=True, with_pip=True)
    library = subprocess.run(
        [programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    (Path(library) / "tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [programs / "python", "-m", "pip", "-q", "install", "--disable-pip-version-check"]
    for command in ([*pip, *REQUIREMENTS], [*pip, "--no-deps", *REQUIREMENTS_ALONE]):
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"the training toolkit cannot be installed: {result.stderr.strip()[-500:]}")
    stamp.write_text(wanted)
    return programs


def drivers(folder: Path, entry_script: str, processes: int) -> Path:
    """The channel `sm_drivers` that ModelTrainer would send for `Torchrun(process_count_per_node=...)`."""
    pip = [
        toolkit_environment() / "python",
        "-m",
        "pip",
        "-q",
        "download",
        "--no-deps",
        "-d",
        folder / "wheel",
        DRIVERS,
    ]
    result = subprocess.run(pip, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"{DRIVERS} cannot be fetched: {result.stderr.strip()[-300:]}")
    (wheel,) = (folder / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "package")
    package = folder / "package" / "sagemaker" / "train"
    channel = folder / "sm_drivers"
    shutil.copytree(package / "container_drivers", channel)
    scope: dict[str, Any] = {}
    exec((package / "templates.py").read_text(), scope)
    driver = scope["EXEUCTE_DISTRIBUTED_DRIVER"].format(driver_name="Torchrun", driver_script="torchrun_driver.py")
    script = scope["TRAIN_SCRIPT_TEMPLATE"].format(
        working_dir="cd /opt/ml/input/data/code \n", install_requirements="", execute_driver=driver
    )
    (channel / "sm_train.sh").write_text(script)
    (channel / "sourcecode.json").write_text(json.dumps({"entry_script": entry_script}))
    (channel / "distributed.json").write_text(json.dumps({"process_count_per_node": processes}))
    return channel


def need_sshd() -> None:
    """The toolkit starts mpirun's agents by ssh. Skips the test if there is no server, and none can be installed."""
    if Path("/usr/sbin/sshd").exists():
        return
    command = ["apt-get", "-o", "DPkg::Lock::Timeout=600", "install", "-y", "--no-install-recommends", "openssh-server"]
    if shutil.which("apt-get") is None:
        pytest.skip("/usr/sbin/sshd is missing, and there is no apt-get")
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if result.returncode:
        pytest.skip(f"openssh-server cannot be installed: {result.stderr.strip()[-300:]}")


@contextmanager
def mount_points() -> Iterator[None]:
    """Folders that containers have files of their own at; those that the machine did not have are gone after it."""
    made = [path for path in ("/opt/ml", "/root/.ssh") if not os.path.isdir(path)]
    for path in made:
        os.mkdir(path)
    try:
        yield
    finally:
        for path in made:
            with suppress(OSError):
                os.rmdir(path)


@dataclass
class Image:
    """What all containers of a job have in common: programs, keys, variables."""

    folder: Path
    programs: Path

    @staticmethod
    def make(folder: Path) -> Image:
        image = Image(folder, toolkit_environment())
        folder.mkdir()
        real = Path(sys.executable).parent
        if not (real / "prted").exists():
            pytest.skip("Open MPI 5 is not installed beside the interpreter (extra mpi)")
        (folder / "orted").symlink_to(real / "prted")
        (folder / "mpirun").write_text(_MPIRUN.format(real=real, image=folder))
        (folder / "mpirun").chmod(0o755)
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(_SITE)
        key = folder / "id_ed25519"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        return image

    def variables(self) -> dict[str, str]:
        paths = [str(self.folder), str(self.programs), str(Path(sys.executable).parent), os.environ["PATH"]]
        return {
            "PATH": os.pathsep.join(paths),
            "PYTHONPATH": os.pathsep.join([str(self.folder / "site"), str(ROOT / "src")]),
            "SAGEMAKER_TRAINING_MODULE": FRAMEWORK,
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-west-2",
            "AWS_REGION": "us-west-2",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@dataclass
class Container:
    """One instance of a training job."""

    host: Host
    image: Image
    root: Path

    @property
    def output(self) -> Path:
        """What is left in /opt/ml/output."""
        return self.root / "ml" / "output"

    @staticmethod
    def make(host: Host, image: Image, request: Mapping[str, Any], data: Mapping[str, Path]) -> Container:
        """The container as the service makes it.

        Args:
            data: what lies at the locations of the channels, by channel.
        """
        container = Container(host, image, host.folder / "container")
        hosts = [f"algo-{number + 1}" for number in range(request["ResourceConfig"]["InstanceCount"])]
        kind = request["ResourceConfig"]["InstanceType"]
        group = {"instance_group_name": "homogeneousCluster", "instance_type": kind, "hosts": hosts}
        channels = {
            channel["ChannelName"]: {
                "TrainingInputMode": channel.get("InputMode", request["AlgorithmSpecification"]["TrainingInputMode"]),
                "S3DistributionType": channel["DataSource"]["S3DataSource"]["S3DataDistributionType"],
                "RecordWrapperType": "None",
            }
            for channel in request.get("InputDataConfig", ())
        }
        files = {
            "hyperparameters": request.get("HyperParameters", {}),
            "resourceconfig": {
                "current_host": host.name,
                "hosts": hosts,
                "network_interface_name": "eth0",
                "current_instance_type": kind,
                "current_group_name": "homogeneousCluster",
                "instance_groups": [group],
            },
            "inputdataconfig": channels,
        }
        base = container.root / "ml"
        for name in ("input/config", "input/data", "model", "output/data", "code"):
            (base / name).mkdir(parents=True)
        for name, content in files.items():
            (base / "input" / "config" / f"{name}.json").write_text(json.dumps(content))
        assert set(data) == set(channels), "every channel has its data"
        for name, source in data.items():
            shutil.copytree(source, base / "input" / "data" / name)
        ssh = container.root / "ssh"
        ssh.mkdir(mode=0o700)
        shutil.copy(image.folder / "id_ed25519", ssh / "id_ed25519")
        shutil.copy(image.folder / "id_ed25519.pub", ssh / "authorized_keys")
        (ssh / "config").write_text("StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n")
        (container.root / "environment").write_text("")
        return container

    def start(self, command: list[str], log: Path, request: Mapping[str, Any], **variables: str) -> subprocess.Popen:
        """Run a command in the container, with its own files and processes."""
        environ = {
            **self.image.variables(),
            "TRAINING_JOB_NAME": request["TrainingJobName"],
            **request.get("Environment", {}),
            **variables,
            "TEST_ROOT": str(self.root),
        }
        spaces = ["unshare", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
        return self.host.start([*spaces, "sh", "-c", _START, "sh", *command], log=log, cwd="/", environ=environ)
