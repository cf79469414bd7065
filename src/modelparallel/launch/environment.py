"""The launch contract: the environment and the arguments that a script finds (smp-config section 5).

Pure functions of the job: nothing here starts or changes anything.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from modelparallel.job.discovery import LAUNCHER_VARIABLE
from modelparallel.job.preemption import FILE_VARIABLE
from modelparallel.job.session import DEVICE_VARIABLE
from modelparallel.launch.attempts import MAX_RESTARTS_VARIABLE, RESTART_COUNT_VARIABLE
from modelparallel.launch.hosts import LOOPBACK
from modelparallel.launch.processes import JOB_VARIABLE
from modelparallel.launch.spec import JobSpec
from modelparallel.training.event_files import DIRECTORY_VARIABLE

INSTANCE_GROUP = "homogeneousCluster"

#: Rank variables of an outer launcher. They must not reach a process that learns its rank from mpirun.
OUTER_RANK_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "ROLE_NAME",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_USE_AGENT_STORE",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_MAX_RESTARTS",
    "TORCHELASTIC_ERROR_FILE",
)


def encode(value: Any) -> str:
    """A value as the toolkit puts it into a variable: strings as they are, None as "", the rest as sorted JSON."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def command_arguments(hyperparameters: Mapping[str, Any]) -> list[str]:
    """`--key value` for every hyperparameter, sorted; one dash for one letter; a dict as `k=v,k=v`."""
    arguments = []
    for key in sorted(hyperparameters):
        value = hyperparameters[key]
        if isinstance(value, Mapping):
            text = ",".join(f"{name}={value[name]}" for name in sorted(value))
        else:
            text = "" if value is None else str(value)
        arguments += [("-" if len(key) == 1 else "--") + key, text]
    return arguments


def resource_config(job: JobSpec) -> dict[str, Any]:
    """The hosts of the job, as resourceconfig.json has them."""
    hosts = list(job.hosts.names)
    group = {"instance_group_name": INSTANCE_GROUP, "instance_type": job.instance_type, "hosts": hosts}
    return {
        "current_host": job.hosts.name,
        "current_instance_type": job.instance_type,
        "current_group_name": INSTANCE_GROUP,
        "hosts": hosts,
        "instance_groups": [group],
        "network_interface_name": job.hosts.interface,
    }


def toolkit_environment(job: JobSpec) -> dict[str, str]:
    """All SM_* variables."""
    folder = job.folder
    resources = resource_config(job)
    hyperparameters = dict(job.hyperparameters)
    framework: dict[str, Any] = {"sagemaker_job_name": job.name, "sagemaker_program": job.script.name}
    if job.parameters is not None:
        framework |= {
            "sagemaker_mpi_enabled": True,
            "sagemaker_mpi_num_of_processes_per_host": job.num_here,
            "sagemaker_mpi_custom_mpi_options": job.custom_mpi_options,
        }
    entries: dict[str, Any] = {
        "hosts": resources["hosts"],
        "current_host": job.hosts.name,
        "network_interface_name": job.hosts.interface,
        # A rehearsed GPU is one process, so both devices give the number that the script expects.
        "num_gpus": job.num_here,
        "num_cpus": os.cpu_count() or 1,
        "num_neurons": 0,
        "current_instance_type": job.instance_type,
        "current_instance_group": INSTANCE_GROUP,
        "current_instance_group_hosts": resources["hosts"],
        "instance_groups": [INSTANCE_GROUP],
        "instance_groups_dict": {INSTANCE_GROUP: resources["instance_groups"][0]},
        "distribution_instance_groups": [],
        "is_hetero": False,
        "resource_config": resources,
        "input_data_config": {name: {"TrainingInputMode": "File"} for name in job.channels},
        "channels": sorted(job.channels),
        "hps": hyperparameters,
        "framework_params": framework,
        "user_entry_point": job.script.name,
        "user_args": list(job.arguments),
        "module_name": job.script.stem,
        # Scripts go up from here by dirname twice; with the slash at the end that is the job folder.
        "module_dir": f"{folder.code}/",
        "model_dir": str(folder.model),
        "input_dir": str(folder.input),
        "input_config_dir": str(folder.input_config),
        "output_dir": str(folder.output),
        "output_data_dir": str(folder.output_data),
        "output_intermediate_dir": str(folder.output_intermediate),
        "log_level": 20,
        "framework_module": "modelparallel.launch",
    }
    everything = {
        **entries,
        "channel_input_dirs": {name: str(folder.channel(name)) for name in job.channels},
        "hyperparameters": hyperparameters,
        "job_name": job.name,
        "is_master": job.hosts.current == 0,
        "master_hostname": job.hosts.names[0],
    }
    environment = {f"SM_{name.upper()}": encode(value) for name, value in entries.items()}
    environment["SM_TRAINING_ENV"] = encode(everything)
    for name in job.channels:
        environment[f"SM_CHANNEL_{name.upper()}"] = str(folder.channel(name))
    for name, value in hyperparameters.items():
        environment[f"SM_HP_{name.upper()}"] = encode(value)
    if job.parameters is not None:
        environment["SM_HP_MP_PARAMETERS"] = encode(dict(job.parameters))
    return environment


def job_environment(
    job: JobSpec, port: int, outer: Mapping[str, str] | None = None, *, restart_count: int = 0
) -> dict[str, str]:
    """Every variable that the launcher sets for the processes of a job, over those of its own environment.

    `restart_count`: how often this launcher has started the job before.
    """
    outer = os.environ if outer is None else outer
    environment = {
        # One process per core is the rule in training; torchrun has the same default of one thread.
        "OMP_NUM_THREADS": outer.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // job.num_here))),
        **_interfaces(job, outer),
        **mpi_exports(job.custom_mpi_options),
        **job.environment,
        **toolkit_environment(job),
        "CURRENT_HOST": job.hosts.name,
        "SAGEMAKER_BASE_DIR": str(job.folder.root),
        "SAGEMAKER_JOB_NAME": job.name,
        "SAGEMAKER_REGION": outer.get("SAGEMAKER_REGION") or outer.get("AWS_REGION") or "local",
        "TRAINING_JOB_NAME": job.name,
        "SM_DLC_TORCH_VERSION": package_version("torch"),
        "MASTER_ADDR": job.hosts.address,
        "MASTER_PORT": str(port),
        JOB_VARIABLE: str(job.folder.description),
        DIRECTORY_VARIABLE: str(job.folder.events),
        FILE_VARIABLE: str(job.folder.preemption_file),
        RESTART_COUNT_VARIABLE: str(job.earlier_starts + restart_count),
        MAX_RESTARTS_VARIABLE: str(job.max_restarts),
    }
    if job.devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(job.devices)
    if LAUNCHER_VARIABLE in outer:  # it chose among the variables of this process, not among those of the ranks
        environment[LAUNCHER_VARIABLE] = "mpi" if job.backend == "mpi" else "torchrun"
    environment[DEVICE_VARIABLE] = job.device  # what was asked for outranks what this process was started with
    if job.device == "cpu":
        # The CPU was chosen on a machine that may have GPUs: libraries must not find them.
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def _interfaces(job: JobSpec, outer: Mapping[str, str]) -> dict[str, str]:
    """The network interface that gloo, and between hosts NCCL, takes; what the user has set counts."""
    if job.hosts.sizes:
        return {name: value for name, value in job.hosts.variables.items() if not outer.get(name)}
    return {"GLOO_SOCKET_IFNAME": outer.get("GLOO_SOCKET_IFNAME", LOOPBACK)}


def mpi_exports(custom_mpi_options: str) -> dict[str, str]:
    """The variables that mpirun options set; they count for every backend."""
    from modelparallel.launch.mpi_options import parse_mpi_options

    return dict(parse_mpi_options(custom_mpi_options).exports)


def worker_command(job: JobSpec) -> Sequence[str]:
    """The command line of one process, without the interpreter."""
    from modelparallel.launch import worker

    return [os.path.abspath(worker.__file__), str(job.script), *job.arguments]


def interpreter() -> str:
    return sys.executable


def package_version(name: str) -> str:
    """The version of an installed package, without what stands behind a plus; "" if it is not known."""
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:  # torch that was built in place
        return ""
