"""What is wrong with a job for any cluster: checked before anything is submitted. Pure; each kind adds its own."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any

from modelparallel.config.reading import validate_parameters
from modelparallel.errors import LaunchError, SMPConfigError
from modelparallel.launch.clusters.description import ClusterJob
from modelparallel.launch.clusters.instances import PREFIX, instance_of, nearest_instance

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_TIME = "use seconds (3600), units (90m, 4h, 2d, 1d12h) or [days-]hours:minutes:seconds (24:00:00, 1-12:00:00)"


def check_shape(job: ClusterJob) -> None:
    """The number of processes against the degrees. Raises `LaunchError` and `SMPConfigError`."""
    for what, count in (("nodes", job.num_nodes), ("processes of a node", job.processes_per_node)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise LaunchError(f"job {job.name}: the number of {what} is {count!r}: at least 1 is needed")
    if job.parameters is None:
        return
    try:
        validate_parameters(job.parameters, num_processes=job.num_processes)
    except SMPConfigError as error:
        if job.num_nodes == 1:
            raise
        product = f"{job.num_nodes} nodes * {job.processes_per_node} processes = {job.num_processes}"
        raise SMPConfigError(f"job {job.name}, {product}: {error}") from error


def check_devices_per_node(job: ClusterJob, available: int | None, where: str) -> None:
    """At most one process for each device of a node.

    Args:
        available: devices of a node; None or 0: not known, or none, and nothing is checked.
        where: who says so: `gpus_per_node of cluster 'gpu'`.
    """
    if not available or job.device == "cpu" or job.processes_per_node <= available:
        return
    if job.parameters is not None and validate_parameters(job.parameters, num_processes=None).shares_devices:
        return
    raise LaunchError(
        f"job {job.name}: {job.processes_per_node} processes on a node with {available} devices ({where}): at most one "
        f"process per device; set processes_per_host (--nproc) to {available} or fewer, let processes share devices "
        "(parameters ddp and ddp_dist_backend 'gloo'), or rehearse on the CPU with device cpu"
    )


def check_instance_type(job: ClusterJob) -> str | None:
    """Whether the instance type has a device for each process; returns a warning for one that is not known.

    Raises `LaunchError` for too few devices, and for devices that torch's CUDA cannot use.
    """
    if job.instance_type is None or not job.instance_type.startswith(PREFIX):
        return None
    instance = instance_of(job.instance_type)
    if instance is None:
        return (
            f"instance type {job.instance_type} is not known here (the nearest is "
            f"{nearest_instance(job.instance_type)}): whether it has {job.processes_per_node} devices is not checked"
        )
    if instance.device == "neuron" and job.device != "cpu":
        raise LaunchError(
            f"instance type {job.instance_type} has {instance.device_name} accelerators, which need their own torch: "
            "use a type with NVIDIA GPUs (ml.p4d.24xlarge, ml.g5.48xlarge, ...), or device cpu"
        )
    if instance.device == "none" and job.device == "cuda":
        raise LaunchError(
            f"instance type {job.instance_type} has no GPU, and the job wants device cuda: choose another"
        )
    check_devices_per_node(job, instance.num_devices, f"instance type {job.instance_type}")
    return None


def check_name(name: Any, pattern: str, rule: str, what: str = "job name") -> str:
    """The name, if the engine can take it: the whole of it has to match. Raises `LaunchError` with the rule."""
    if not isinstance(name, str) or re.fullmatch(pattern, name) is None:
        raise LaunchError(f"{what} {name!r}: {rule}")
    return name


def check_texts(texts: Mapping[str, str], what: str, *, most: int, longest: int, longest_name: int = 256) -> None:
    """How many texts there are (hyperparameters, variables), and how long each is as it is sent."""
    if len(texts) > most:
        raise LaunchError(f"{len(texts)} {what}s are more than the {most} that can be sent: put some into a file")
    for name, text in texts.items():
        if len(text) > longest:
            raise LaunchError(
                f"{what} {name!r} has {len(text)} characters, more than the {longest} that can be sent: put it into a "
                "file of source_dir"
            )
        if len(name) > longest_name:
            raise LaunchError(f"{what} {name[:40]!r}...: its name has {len(name)} characters, at most {longest_name}")


def check_locations(job: ClusterJob, *, shares_folders: bool, remedy: str) -> None:
    """Channels, checkpoints and outputs must lie where the nodes can reach them.

    Args:
        shares_folders: whether paths of the submitting machine, or of the cluster, are there on all nodes.
        remedy: what a user of this cluster does about a local path.
    """
    places = {f"channel {name!r}": channel.location for name, channel in job.channels.items()}
    places |= {"checkpoints": job.checkpoints or "", "output": job.output or ""}
    for what, location in places.items():
        if not location or ("://" in location and not location.startswith("file://")):
            continue
        path = location.removeprefix("file://")
        if not os.path.isabs(path):
            raise LaunchError(
                f"job {job.name}: {what}: {location!r} is no absolute path: nodes have no current directory"
            )
        if not shares_folders:
            raise LaunchError(
                f"job {job.name}: {what}: {location} is a path of this machine, which nodes do not see: {remedy}"
            )
    for name, channel in job.channels.items():
        if channel.input_mode == "FastFile" and not channel.is_url:
            raise LaunchError(
                f"job {job.name}: channel {name!r}: input mode FastFile is for URLs, and {channel.location} is a path, "
                "which is never copied: leave the mode out"
            )


def parse_duration(value: Any, what: str) -> float:
    """Seconds of `3600`, "90m", "4h", "1d12h", "24:00:00" or "1-12:00:00". Raises `LaunchError`."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    elif isinstance(value, str):
        seconds = _seconds_of(value.strip().lower())
    else:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise LaunchError(f"{what}: {value!r} is no time: {_TIME}")
    return seconds


def _seconds_of(text: str) -> float:
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    if match := re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", text):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
    if re.fullmatch(r"(\d+(\.\d+)?[smhd])+", text):
        return sum(float(number) * _UNITS[unit] for number, _, unit in re.findall(r"(\d+(\.\d+)?)([smhd])", text))
    return math.nan


def clock(seconds: float) -> str:
    """Seconds as `[days-]hours:minutes:seconds`, rounded up."""
    whole = math.ceil(seconds)
    days, rest = divmod(whole, 86400)
    text = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days}-{text}" if days else text
