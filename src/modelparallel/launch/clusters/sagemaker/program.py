"""How a container starts the job: by its training toolkit, which reads hyperparameters, or by our own node command.

The toolkit (sagemaker-training, in the ready-made images) fetches the code, turns hyperparameters into `--key value`
and starts the processes by mpirun or torchrun. An image without it is started with `modelparallel node`, which does the
same from job.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from modelparallel.errors import LaunchError
from modelparallel.launch.clusters.description import ClusterJob
from modelparallel.launch.clusters.instances import devices_of
from modelparallel.launch.clusters.sagemaker.options import ServiceOptions

#: The channel of the code, where the container has to find it as a file.
CODE_CHANNEL = "code"
CODE_FOLDER = f"/opt/ml/input/data/{CODE_CHANNEL}"
ARCHIVE = "sourcedir.tar.gz"
DESCRIPTION = "job.json"
MP_PARAMETERS = "mp_parameters"
#: Hyperparameters of the toolkit itself.
TOOLKIT_PREFIX = "sagemaker_"
_TORCH_DISTRIBUTED = ("torch_distributed", "pytorchddp")


def toolkit_hyperparameters(
    job: ClusterJob, options: ServiceOptions, code_url: str, region: str, instance_type: str | None
) -> dict[str, str]:
    """All hyperparameters of a job for the training toolkit, each as JSON, in the order of the cloud's SDK.

    Raises `LaunchError` for arguments of the script that are no hyperparameters.
    """
    values: dict[str, Any] = script_hyperparameters(job)
    values |= {
        "sagemaker_submit_directory": f"{CODE_FOLDER}/{ARCHIVE}" if options.enable_network_isolation else code_url,
        "sagemaker_program": job.entry_point,
        "sagemaker_container_log_level": options.container_log_level,
        "sagemaker_job_name": job.name,
        "sagemaker_region": region,
        **_start_of_processes(job, instance_type),
    }
    return {name: json.dumps(value) for name, value in values.items()}


def script_hyperparameters(job: ClusterJob) -> dict[str, Any]:
    """What the script gets as `--key value`: the hyperparameters, or the command line that was given in their place."""
    given = {name: value for name, value in job.hyperparameters.items() if name != MP_PARAMETERS}
    if given or not job.arguments:
        return given
    return {name: value for name, value in _pairs(job.arguments) if name != MP_PARAMETERS}


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """`--key value` of a command line."""
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        key = option[2:] if option.startswith("--") else option[1:] if len(option) == 2 and option[0] == "-" else ""
        key, is_joined, value = key.partition("=")
        if not key or (not is_joined and (not rest or rest[0].startswith("--"))):
            raise LaunchError(
                f"argument {option!r} of the script: the training toolkit passes `--key value` alone, of every option "
                'once; write it so, or set container = "own", which starts the script with the command line as it is'
            )
        yield key, value if is_joined else rest.pop(0)


def _start_of_processes(job: ClusterJob, instance_type: str | None) -> dict[str, Any]:
    """How many processes the toolkit starts on a node, and by what."""
    distribution = job.distribution
    if distribution is None and job.num_processes > 1:
        # From the command line: the number of processes is what is said.
        distribution = {"mpi": {"enabled": True}}
    if distribution is None:
        return {}
    values: dict[str, Any] = {}
    by_torch = any(_is_enabled(distribution, name) for name in _TORCH_DISTRIBUTED)
    if not by_torch:
        values |= {
            "sagemaker_mpi_enabled": True,
            "sagemaker_mpi_num_of_processes_per_host": job.processes_per_node,
            "sagemaker_mpi_custom_mpi_options": job.custom_mpi_options,
        }
    if job.parameters is not None:
        values |= {MP_PARAMETERS: _as_given(job), "sagemaker_distributed_dataparallel_enabled": False}
    if by_torch:
        values["sagemaker_torch_distributed_enabled"] = True
        # Without this it is one for each accelerator that the container has.
        if job.processes_per_node != max(devices_of(instance_type or "") or 0, 1):
            values["sagemaker_mpi_num_of_processes_per_host"] = job.processes_per_node
    if instance_type is not None and (by_torch or job.parameters is not None):
        values["sagemaker_instance_type"] = instance_type
    return values


def _is_enabled(distribution: Mapping[str, Any], name: str) -> bool:
    section = distribution.get(name)
    return isinstance(section, Mapping) and bool(section.get("enabled"))


def _as_given(job: ClusterJob) -> dict[str, Any]:
    """The model parallel parameters, by the names that the launch file used for them."""
    parameters = dict(job.parameters or {})
    try:
        given = (job.distribution or {})["smdistributed"]["modelparallel"]["parameters"]
    except (KeyError, TypeError):
        return parameters
    if not isinstance(given, Mapping):
        return parameters
    # The checked values have both names of the pipeline degree.
    return {name: parameters.get(name, value) for name, value in given.items()}
