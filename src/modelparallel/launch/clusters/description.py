"""What a job for other machines is, as data."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from modelparallel.errors import LaunchError
from modelparallel.errors.foreign_text import parse_json
from modelparallel.version import __version__

InputMode = Literal["File", "FastFile"]

#: Of all nodes of a job that has lost one: it may run well on others (sysexits calls this a temporary failure).
HOST_LOST_EXIT_CODE = 75
#: Changes when an older `modelparallel node` could not read a description any more.
FORMAT = 1
#: Known to the submitting machine alone, and of no use elsewhere.
HOME_FIELDS = ("source_dir", "dependencies", "distribution", "env_plain", "service_options")


@dataclass(frozen=True)
class DataChannel:
    """Where the data of a channel is: an absolute path, or a URL that fsspec opens (s3://, gs://, https://, ...).

    With the mode "FastFile" nothing is fetched: the script gets the location in SM_CHANNEL_URL_<NAME>.
    """

    location: str
    input_mode: InputMode = "File"

    @property
    def is_url(self) -> bool:
        """Whether it has to be fetched to be a file."""
        return "://" in self.location and not self.location.startswith("file://")


@dataclass(frozen=True)
class ClusterJob:
    """Everything that is decided before a job is submitted; equal for all kinds of clusters.

    Attributes:
        name: checked for the cluster by its `check`.
        source_dir: the code, a directory of the submitting machine; `entry_point` is relative to it.
        processes_per_node: equal on all nodes.
        arguments: the script's full command line.
        hyperparameters: what is published in SM_HPS and SM_HP_*, with `mp_parameters` if the job is model parallel.
        parameters: the checked model parallel parameters, None for a job that is not model parallel.
        secrets: the variable that the script finds -> where its value is, as the cluster takes it: `env:VAR`,
            `file:PATH`, `secret-name/key`, `aws-secretsmanager:ARN`. Never the value.
        requirements: a file of `source_dir` with packages to install on the nodes.
        dependencies: further directories or files that are put beside the code.
        distribution: as it was given to the estimator; None from the command line.
        instance_type: as given (`ml.p4d.24xlarge`); None where nobody said.
        max_seconds: after which the job is stopped; None: what the cluster allows.
        env_plain: the user has said that nothing in the environment and the arguments is a secret.
        checkpoints: where the job folder's `checkpoints` leads: an absolute path or a URL; None: the job folder.
        output: where the outputs go at the end, if not into the job folder: a URL or a path.
        service_options: further arguments of the estimator, by their names: role, image_uri, sagemaker_session,
            volume_size, subnets, ... A cluster takes those of its `service_arguments`, before its own keys.
    """

    name: str
    entry_point: str
    source_dir: Path
    num_nodes: int
    processes_per_node: int
    arguments: tuple[str, ...] = ()
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, Any] | None = None
    channels: Mapping[str, DataChannel] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict)
    requirements: str | None = None
    dependencies: tuple[Path, ...] = ()
    distribution: Mapping[str, Any] | None = None
    custom_mpi_options: str = ""
    instance_type: str | None = None
    device: str = "auto"
    max_seconds: float | None = None
    max_restarts: int = 0
    env_plain: bool = False
    checkpoints: str | None = None
    output: str | None = None
    service_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_processes(self) -> int:
        return self.num_nodes * self.processes_per_node


@dataclass(frozen=True)
class NodeDescription:
    """What a node is told, as `modelparallel node` reads it.

    Attributes:
        job: without what the submitting machine alone knows.
        folder: the job folder; every node's own, or one that all of them share.
        code: the code: a directory, an archive (pack_code), or a URL of an archive.
        file: where the description was read.
    """

    job: ClusterJob
    folder: Path
    code: str
    file: Path

    @property
    def secrets_file(self) -> Path:
        """Where the values of secrets are, if they were carried."""
        return self.file.parent / "secrets.env"


def node_description(job: ClusterJob, *, folder: str = "", code: str = "") -> str:
    """The file that `modelparallel node` reads on each node (job.json). It holds no value of a secret.

    Args:
        folder: where the job folder is on the nodes, an absolute path; default: the directory of the file.
        code: where the code is on the nodes: a directory, an archive, or a URL of one; default: `code` or
            `sourcedir.tar.gz` beside the file.
    """
    record = asdict(job)
    for name in HOME_FIELDS:
        record.pop(name, None)
    head = {"format": FORMAT, "version": __version__, "folder": folder, "code": code}
    return json.dumps({**head, **record}, indent=2, default=str) + "\n"


def read_node_description(path: Path) -> NodeDescription:
    """What `node_description` wrote. Raises `LaunchError` for anything else, and for what a newer version wrote."""
    try:
        values = parse_json(path.read_bytes())
    except OSError as error:
        raise LaunchError(f"the description of the job, {path}, cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise LaunchError(f"{path} is no description of a job: {error}") from error
    if not isinstance(values, dict) or "format" not in values:
        raise LaunchError(f"{path} is no description of a job: `modelparallel submit` writes them")
    version = values.pop("version", "another version")
    if values.pop("format") != FORMAT:
        raise LaunchError(
            f"{path} was written by modelparallel {version}, which this one ({__version__}) cannot read: install the "
            "same version on the nodes and where jobs are submitted"
        )
    folder, code = values.pop("folder", ""), values.pop("code", "")
    known = {field.name for field in fields(ClusterJob)} - set(HOME_FIELDS)
    if unknown := sorted(set(values) - known):
        raise LaunchError(
            f"{path}: {', '.join(unknown)}: not known to this version ({__version__}); modelparallel {version} wrote "
            "it: install the same version on the nodes and where jobs are submitted"
        )
    parent = Path(os.path.abspath(path)).parent
    try:
        if not isinstance(folder, str) or not isinstance(code, str):
            raise ValueError("folder and code are texts")
        job = TypeAdapter(ClusterJob).validate_python({**values, "source_dir": parent})
    except ValueError as error:  # pydantic's is one
        raise LaunchError(f"{path} is no description of a job: {error}") from error
    if not code:
        beside = parent / "code"
        # A link is one that a start of the job before this one has made, to where it had unpacked the archive.
        code = str(beside if beside.is_dir() and not beside.is_symlink() else parent / "sourcedir.tar.gz")
    return NodeDescription(job, parent / folder, code if "://" in code else str(parent / code), path)
