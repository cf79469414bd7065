"""What a node needs before it can take part in a submitted job: its code, its data, its packages."""

from __future__ import annotations

import os
import posixpath
import shutil
import socket
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from modelparallel.config.reading import validate_parameters
from modelparallel.errors import LaunchError
from modelparallel.launch.channels import check_channel_names
from modelparallel.launch.clusters.description import DataChannel, NodeDescription
from modelparallel.launch.clusters.transfers import fetch, is_url
from modelparallel.launch.devices import check_devices, resolve_device
from modelparallel.launch.fetched_channels import URL_VARIABLE
from modelparallel.launch.folder import JobFolder
from modelparallel.launch.node_requirements import environment_with, install_requirements
from modelparallel.launch.node_scratch import NodeScratch
from modelparallel.launch.spec import JobSpec, check_script
from modelparallel.plan.partition import readable_bytes

_ARCHIVES = (".tar.gz", ".tgz", ".tar")


def bare_spec(told: NodeDescription) -> JobSpec:
    """The job as this node runs it, before anything of it is there."""
    job, code = told.job, told.folder / "code"
    return JobSpec(
        name=job.name,
        script=code / job.entry_point,
        source_dir=code,
        working_directory=code,
        folder=JobFolder(told.folder),
        num_processes=job.processes_per_node,
        backend="elastic",
        device="cpu",
        arguments=job.arguments,
        hyperparameters=job.hyperparameters,
        parameters=job.parameters,
        custom_mpi_options=job.custom_mpi_options,
        environment=job.environment,
        instance_type=job.instance_type or "local",
        preferred_port=int((job.parameters or {}).get("ddp_port", 7777)),
        timeout=job.max_seconds,
        max_restarts=job.max_restarts,
    )


def prepared_spec(
    told: NodeDescription, secrets: Mapping[str, str], scratch: NodeScratch, say: Callable[[str], None]
) -> JobSpec:
    """The job, when all that it needs is on this node.

    Args:
        secrets: their values, for the environment of the processes.

    Raises `LaunchError`, which names what is missing and this node.
    """
    job = told.job
    device, available = resolve_device(job.device)
    config = None if job.parameters is None else validate_parameters(job.parameters, num_processes=None)
    check_devices(job.processes_per_node, device, 0 if config is not None and config.shares_devices else available)
    code = code_folder(told, scratch, say)
    check_script(code / job.entry_point)
    check_channel_names(job.channels)
    channels = {
        name: channel_folder(name, channel, scratch, say)
        for name, channel in job.channels.items()
        if not (channel.is_url and channel.input_mode == "FastFile")
    }
    environment = {**job.environment, **secrets}
    for name, channel in job.channels.items():
        if channel.is_url:
            environment[f"{URL_VARIABLE}{name.upper()}"] = channel.location
    outer = {**os.environ, **environment}
    if job.requirements is not None:
        env = install_requirements(code, job.requirements, told.folder, say)
        environment |= environment_with(env, outer)
    if posixpath.dirname(posixpath.normpath(job.entry_point)):
        # Dependencies lie at the root of the code, and Python looks beside the script only.
        paths = (environment.get("PYTHONPATH", outer.get("PYTHONPATH")), str(code))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return replace(
        bare_spec(told),
        script=code / job.entry_point,
        source_dir=code,
        working_directory=code,
        device=device,
        channels=channels,
        environment=environment,
        checkpoints=Path(job.checkpoints) if job.checkpoints and not is_url(job.checkpoints) else None,
    )


def code_folder(told: NodeDescription, scratch: NodeScratch, say: Callable[[str], None]) -> Path:
    """The directory of the code: where it is, or unpacked from the archive that is there or behind a URL."""
    if "://" in told.code:

        def fetch_and_unpack(target: Path) -> None:
            package = target.with_name(".package")
            shutil.rmtree(package, ignore_errors=True)
            say(f"fetching the code from {told.code}")
            fetch(told.code, package, "the code of the job")
            try:
                unpack(_only_file(package, told.code), target)
            finally:
                shutil.rmtree(package, ignore_errors=True)

        return scratch.once("code", told.code, fetch_and_unpack)
    path = Path(told.code)
    if path.is_dir():
        return path
    if not path.exists():
        raise LaunchError(f"the code of the job is not on {socket.gethostname()}: {path} does not exist: {_SHARED}")
    status = path.stat()
    return scratch.once("code", f"{path} {status.st_size} {status.st_mtime_ns}", lambda target: unpack(path, target))


def channel_folder(name: str, channel: DataChannel, scratch: NodeScratch, say: Callable[[str], None]) -> Path:
    """Where the data of a channel are on this node: at the path that all nodes see, or fetched."""
    if not channel.is_url:
        path = Path(channel.location.removeprefix("file://"))
        if not path.exists():
            raise LaunchError(f"channel {name!r}: {path} does not exist on {socket.gethostname()}: {_SHARED}")
        return path

    def fetch_data(target: Path) -> None:
        say(f"channel {name!r}: fetching {channel.location}")
        size = fetch(channel.location, target, f"channel {name!r} on {socket.gethostname()}")
        say(f"channel {name!r}: {readable_bytes(size)} are there")

    return scratch.once(f"channel_{name}", channel.location, fetch_data)


_SHARED = "give a path that all nodes see, or a URL that they can fetch (s3://, gs://, https://, ...)"


def unpack(archive: Path, target: Path) -> None:
    """Unpack the code into a new directory, whole or not at all. Raises `LaunchError` for what leads out of it."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.mkdir()
        with tarfile.open(archive) as file:
            members = file.getmembers()
            for member in members:
                _check_member(member, archive)
            # Interpreters that have it warn without; the members were checked.
            options: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            file.extractall(partial, members, **options)
        partial.rename(target)
    except (OSError, tarfile.TarError, EOFError) as error:
        raise LaunchError(f"the code {archive} cannot be unpacked into {target}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_member(member: tarfile.TarInfo, archive: Path) -> None:
    """Only what pack_code writes: files, folders, and links that stay inside."""
    places = [member.name]
    if member.issym():
        places.append(posixpath.join(posixpath.dirname(member.name), member.linkname))
    elif not (member.isfile() or member.isdir()):
        raise LaunchError(f"the code {archive} has {member.name!r}, which is neither a file, a folder nor a link")
    for place in places:
        if posixpath.isabs(place) or posixpath.normpath(place).split("/")[0] == "..":
            raise LaunchError(f"the code {archive} has {member.name!r}, which leads out of it: pack it again")


def _only_file(folder: Path, url: str) -> Path:
    files = [path for path in folder.rglob("*") if path.is_file()]
    if len(files) != 1 or not files[0].name.endswith(_ARCHIVES):
        raise LaunchError(f"the code of the job: {url} is no archive ({', '.join(_ARCHIVES)})")
    return files[0]
