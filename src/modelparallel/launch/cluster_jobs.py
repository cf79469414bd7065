"""From what a user has said, to the estimator or on the command line, to a job for a cluster."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

from modelparallel.config.reading import nearest
from modelparallel.errors import LaunchError, NotBuiltError
from modelparallel.launch.channels import DEFAULT_CHANNEL, check_channel_names, local_path
from modelparallel.launch.clusters.checks import check_shape
from modelparallel.launch.clusters.cluster import Cluster
from modelparallel.launch.clusters.cluster_file import cluster_named, kinds, make_cluster
from modelparallel.launch.clusters.description import ClusterJob, DataChannel, InputMode
from modelparallel.launch.clusters.instances import devices_of
from modelparallel.launch.clusters.secrets import check_plain

logger = logging.getLogger("modelparallel.launch")

LOCAL_INSTANCE_TYPES = {None: "auto", "local": "auto", "local_cpu": "cpu", "local_gpu": "cuda"}
_CLOUD_PREFIX = "ml."
#: The service option with those inputs of `fit` that are more than a location.
INPUTS = "inputs"


def chosen_cluster(
    cluster: Cluster | str | None, instance_type: str | None, clusters_file: str | os.PathLike[str] | None = None
) -> Cluster | None:
    """Where the job is to run; None: on this machine.

    Args:
        cluster: one of `modelparallel.launch.Slurm(...)`, ..., or a name in the cluster file.
        instance_type: `local*`, `ml.*` (SageMaker), `slurm`, `slurm:NAME`, ..., or a name in the cluster file. With
            ``cluster`` it is the machine that a cloud launch file was written for: it says how many devices a host has.
        clusters_file: instead of the one that is found.

    Raises `LaunchError` for a name that nobody knows, with the nearest and the list.
    """
    if isinstance(cluster, Cluster):
        return cluster
    if cluster is not None:
        if not isinstance(cluster, str):
            raise LaunchError(f"cluster: expected a name or Slurm(...), SageMaker(...), ..., got {cluster!r}")
        return cluster_named(cluster, clusters_file, os.environ)
    if instance_type in LOCAL_INSTANCE_TYPES:
        return None
    if not isinstance(instance_type, str):
        raise LaunchError(f"instance_type: expected a name like 'local', got {instance_type!r}")
    if instance_type.startswith(_CLOUD_PREFIX):
        return make_cluster("", {"kind": "sagemaker"}, f"instance_type {instance_type!r}")
    try:
        return cluster_named(instance_type, clusters_file, os.environ)
    except LaunchError as error:
        if instance_type.partition(":")[0] in kinds():
            raise
        local = [name for name in LOCAL_INSTANCE_TYPES if name is not None]
        hint = nearest(instance_type, local)
        raise LaunchError(
            f"instance_type {instance_type!r} is none of {', '.join(local)} (did you mean {hint!r}?), no instance type "
            f"of SageMaker ({_CLOUD_PREFIX}*), and no cluster: {error}"
        ) from error


def devices_per_node(cluster: Cluster, instance_type: str | None) -> int | None:
    """Accelerators of each node: of the instance type, where a launch file names one, else of the cluster's keys."""
    if instance_type is not None and instance_type.startswith(_CLOUD_PREFIX):
        devices = devices_of(instance_type)
        if devices is not None:
            return devices
    return cluster.devices_per_node


def input_objects(inputs: Any) -> dict[str, Any]:
    """The inputs of `fit` that are objects of the cloud SDK (`TrainingInput`, `FileSystemInput`), by channel."""
    named = inputs if isinstance(inputs, Mapping) else {DEFAULT_CHANNEL: inputs}
    return {name: value for name, value in named.items() if isinstance(getattr(value, "config", None), Mapping)}


def cluster_channels(inputs: Any, input_mode: str | None = None, whole: Collection[str] = ()) -> dict[str, DataChannel]:
    """The channels of `fit(inputs)` for a cluster: absolute paths and URLs, not looked at.

    Args:
        inputs: a location (the channel `training`), a dict of them, or of objects with a `config` as the cloud SDK's
            `TrainingInput` has it.
        input_mode: of channels that do not say their own: "File" (default) or "FastFile".
        whole: channels whose objects the cluster takes as they are, so that they need not be in S3.

    Raises `LaunchError` for anything else.
    """
    if inputs is None:
        return {}
    if not isinstance(inputs, Mapping):
        inputs = {DEFAULT_CHANNEL: inputs}
    check_channel_names(inputs)
    return {
        name: _channel(location, f"channel {name!r}", input_mode, name in whole) for name, location in inputs.items()
    }


def _channel(location: Any, what: str, input_mode: str | None, is_whole: bool) -> DataChannel:
    config = getattr(location, "config", None)
    if isinstance(config, Mapping):
        disk = config.get("DataSource", {}).get("FileSystemDataSource")
        if disk is not None and is_whole:
            return DataChannel(f"{disk['FileSystemType'].lower()}://{disk['FileSystemId']}{disk['DirectoryPath']}")
        try:
            location, input_mode = config["DataSource"]["S3DataSource"]["S3Uri"], config.get("InputMode") or input_mode
        except (KeyError, TypeError) as error:
            raise LaunchError(
                f"{what}: {location!r} names no location in S3 (DataSource, S3DataSource, S3Uri)"
            ) from error
    mode = input_mode or "File"
    if mode == "Pipe":
        raise NotBuiltError(f"{what}: input_mode 'Pipe' is not built: use 'FastFile', which reads as the script asks")
    if mode not in ("File", "FastFile"):
        raise LaunchError(f"{what}: input_mode {mode!r}: expected 'File' or 'FastFile'")
    text = os.fspath(location) if isinstance(location, str | os.PathLike) else location
    if isinstance(text, str) and "://" in text and not text.startswith("file://"):
        return DataChannel(text, cast(InputMode, mode))
    return DataChannel(str(local_path(location, what, must_exist=False)), cast(InputMode, mode))


def check_job(cluster: Cluster, job: ClusterJob) -> None:
    """Raise `LaunchError` or `SMPConfigError` for what cannot work anywhere, or on this cluster."""
    check_shape(job)
    check_plain(job, allowed=job.env_plain)
    cluster.check(job)


def say_what_has_no_effect(cluster: Cluster, job: ClusterJob) -> None:
    """Name once, in the log, the arguments of the estimator on which this kind of cluster does not act."""
    idle = sorted(name for name in job.service_options if name not in cluster.service_arguments)
    if idle:
        logger.info("accepted without effect on %s: %s", cluster.title, ", ".join(idle))


def checkpoint_location(url: str | None, path: str | os.PathLike[str] | None) -> str | None:
    """Where the checkpoints of a job are kept: the URL, else the path; a path below /opt/ml is the job folder's own."""
    if url is not None:
        return str(url)
    if path is None or in_container(path):
        return None
    return str(local_path(path, "checkpoint_local_path", must_exist=False))


def in_container(path: str | os.PathLike[str]) -> bool:
    """Whether the path is of a training container, and so a place in the job folder here."""
    return Path(path) == Path("/opt/ml") or Path("/opt/ml") in Path(path).parents
