"""The keys of a row with `kind = "kubernetes"`, and what can be wrong in them and in a job for it. Pure."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from modelparallel.errors import LaunchError
from modelparallel.launch.clusters.checks import check_devices_per_node, check_instance_type, check_shape
from modelparallel.launch.clusters.cluster import Cluster
from modelparallel.launch.clusters.description import ClusterJob
from modelparallel.launch.clusters.instances import instance_of
from modelparallel.launch.clusters.k8s.names import (
    check_image,
    check_label_key,
    check_label_name,
    check_label_value,
    check_labels,
    check_object_name,
    check_variable,
    parse_secret,
    quantity,
)
from modelparallel.launch.clusters.k8s.volumes import Toleration, Volume, check_path, is_below
from modelparallel.launch.clusters.packing import ARCHIVE_NAME
from modelparallel.launch.clusters.secrets import check_plain, check_secret_name, looks_secret

logger = logging.getLogger("modelparallel.launch")

#: Where the containers find the description of the job and its code.
DESCRIPTION_FOLDER = "/etc/modelparallel"
#: Below it are the job folders of nodes that share none.
OWN_FOLDER = "/modelparallel"
SHARED_MEMORY = "/dev/shm"
#: Resources of which one is one device of a process.
_DEVICES = ("nvidia.com/gpu", "amd.com/gpu")
_MIG_PREFIX = "nvidia.com/mig-"
#: Resources that can be had in parts; of all others only whole ones.
_DIVISIBLE = ("cpu", "memory", "ephemeral-storage")
#: What the Trainer sets itself, and refuses in a TrainJob.
_RESERVED_PREFIX = "PET_"
#: Less memory than this is a slip of the unit: "64m" is 0.064 bytes.
_LEAST_BYTES = 1 << 20
#: A secret that the node command fetches itself, and Kubernetes does not know.
_FETCHED = "aws-secretsmanager:"
STOCK_RUNTIME = "torch-distributed"


class KubernetesSettings(Cluster):
    """The keys of a row with `kind = "kubernetes"`, which `Kubernetes` explains; checks of them and of jobs."""

    kind: ClassVar[str] = "kubernetes"
    #: After it come, at most, -node-0-9999-abcde.
    max_name_length: ClassVar[int] = 45
    has_capital_names: ClassVar[bool] = False
    service_arguments: ClassVar[tuple[str, ...]] = ("image_uri",)

    form: Literal["trainjob", "indexed-job"] = "trainjob"
    namespace: str = ""
    context: str = ""
    runtime: str = "torch-distributed"
    runtime_kind: Literal["ClusterTrainingRuntime", "TrainingRuntime"] = "ClusterTrainingRuntime"
    image: str = ""
    image_pull_policy: Literal["", "Always", "IfNotPresent", "Never"] = ""
    image_pull_secret: str = ""
    python: str = "python"
    setup: tuple[str, ...] = ()
    code: str = ""
    folder: str = ""
    queue: str = ""
    queue_priority: str = ""
    volumes: tuple[Volume, ...] = ()
    shm: str = ""
    resources: Mapping[str, str | int | float] = {}
    requests: Mapping[str, str | int | float] = {}
    secrets: Mapping[str, str] = {}
    peer_secret: str = ""
    env: Mapping[str, str] = {}
    image_paths: tuple[str, ...] = ()
    node_selector: Mapping[str, str] = {}
    tolerations: tuple[Toleration, ...] = ()
    affinity: Mapping[str, Any] = {}
    service_account: str = ""
    priority_class: str = ""
    host_network: bool = False
    labels: Mapping[str, str] = {}
    annotations: Mapping[str, str] = {}
    pod_labels: Mapping[str, str] = {}
    pod_annotations: Mapping[str, str] = {}
    pod_security_context: Mapping[str, Any] = {}
    security_context: Mapping[str, Any] = {}
    grace_seconds: int = Field(default=120, ge=0)
    ttl_seconds: int | None = Field(default=None, ge=0)
    port: int = Field(default=29500, ge=1024, le=65535)

    @property
    def devices_per_node(self) -> int | None:
        found = [
            int(quantity(number, name))
            for name, number in self.resources.items()
            if name in _DEVICES or name.startswith(_MIG_PREFIX)
        ]
        return sum(found) or None

    def devices_on_each_node(self, job: ClusterJob) -> int:
        """Devices that each pod asks for: as `resources` say, else as the instance type of a cloud launch file has."""
        if self.devices_per_node is None and job.instance_type is not None and job.device != "cpu":
            instance = instance_of(job.instance_type)
            return instance.num_devices if instance is not None and instance.device == "cuda" else 0
        return self.devices_per_node or 0

    @property
    def job_parent(self) -> str:
        """The directory in which the job folder is made, in the containers."""
        return self.folder or OWN_FOLDER

    def code_of(self, job: ClusterJob) -> str:
        """Where the nodes find the code, if not beside the description; a URL is where it is uploaded."""
        return f"{self.code}/{job.name}/{ARCHIVE_NAME}" if "://" in self.code else self.code

    @property
    def mounted(self) -> tuple[str, ...]:
        """Where the containers have something of the cluster's row."""
        own = () if self.folder else (OWN_FOLDER,)
        shared = (SHARED_MEMORY,) if self.mounts_shared_memory else ()
        return (*(volume.path for volume in self.volumes), DESCRIPTION_FOLDER, *own, *shared)

    @property
    def mounts_shared_memory(self) -> bool:
        """Whether /dev/shm is mounted by us, and not by one of `volumes`."""
        return bool(self.shm) or all(volume.path != SHARED_MEMORY for volume in self.volumes)

    def new_name(self, base: str, now: datetime | None = None) -> str:
        name = super().new_name(base, now)
        return name if name[0].isalpha() else f"job-{name}"[: self.max_name_length]

    @field_validator("namespace")
    @classmethod
    def _is_namespace(cls, text: str) -> str:
        return check_label_name(text, "namespace") if text else text

    @field_validator("image")
    @classmethod
    def _is_image(cls, text: str) -> str:
        return check_image(text, "image") if text else text

    @field_validator("runtime", "image_pull_secret", "service_account", "priority_class", "queue_priority")
    @classmethod
    def _is_object(cls, text: str, info: ValidationInfo) -> str:
        return check_object_name(text, info.field_name or "") if text else text

    @field_validator("queue")
    @classmethod
    def _is_queue(cls, text: str) -> str:
        return check_label_value(text, "queue")

    @field_validator("folder", "code")
    @classmethod
    def _is_place(cls, text: str, info: ValidationInfo) -> str:
        if info.field_name == "code" and "://" in text:
            return text.rstrip("/")
        return check_path(text, info.field_name or "") if text else text

    @field_validator("image_paths")
    @classmethod
    def _are_paths(cls, paths: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_path(path, "image_paths") for path in paths)

    @field_validator("shm")
    @classmethod
    def _is_size(cls, text: str) -> str:
        if text:
            quantity(text, "shm")
        return text

    @field_validator("resources", "requests")
    @classmethod
    def _are_quantities(cls, given: Mapping[str, Any], info: ValidationInfo) -> Mapping[str, str]:
        for name, number in given.items():
            check_label_key(name, f"{info.field_name}:")
            value = quantity(number, f"{info.field_name} {name}:")
            if name not in _DIVISIBLE and value.denominator != 1:
                raise ValueError(f"{info.field_name} {name}: {number!r}: expected a whole number")
            if name in ("memory", "ephemeral-storage") and value < _LEAST_BYTES:
                raise ValueError(f"{info.field_name} {name}: {number!r} is {float(value):g} bytes: give a unit, 64Gi")
        return {name: str(number) for name, number in given.items()}

    @field_validator("labels", "pod_labels", "node_selector")
    @classmethod
    def _are_labels(cls, labels: Mapping[str, str], info: ValidationInfo) -> Mapping[str, str]:
        check_labels(labels, f"{info.field_name}:")
        return labels

    @field_validator("annotations", "pod_annotations")
    @classmethod
    def _are_annotations(cls, given: Mapping[str, str], info: ValidationInfo) -> Mapping[str, str]:
        for key in given:
            check_label_key(key, f"{info.field_name}:")
        return given

    @field_validator("secrets")
    @classmethod
    def _are_secrets(cls, secrets: Mapping[str, str]) -> Mapping[str, str]:
        for variable, reference in secrets.items():
            parse_secret(reference, f"secrets: {check_variable(variable, 'secrets:')}:")
        return secrets

    @field_validator("peer_secret")
    @classmethod
    def _is_secret(cls, text: str) -> str:
        if text:
            parse_secret(text, "peer_secret")
        return text

    @field_validator("env")
    @classmethod
    def _are_variables(cls, variables: Mapping[str, str]) -> Mapping[str, str]:
        for name in variables:
            check_variable(name, "env:")
            if name.startswith(_RESERVED_PREFIX):
                raise ValueError(f"env: {name}: the Trainer sets {_RESERVED_PREFIX}* itself: remove it")
            if why := looks_secret(name, variables[name]):
                raise ValueError(f"env: {name} looks like a secret ({why}): make a Secret of it, named in secrets")
        return variables

    @model_validator(mode="after")
    def _fit(self) -> KubernetesSettings:
        taken: dict[str, int] = {}
        for path in self.mounted:
            taken[path] = taken.get(path, 0) + 1
            if taken[path] > 1:
                raise ValueError(f"volumes: {path} is mounted twice, by another volume, shm or the launcher itself")
        if self.folder and not any(is_below(self.folder, volume.path) for volume in self.volumes if volume.is_kept):
            raise ValueError(
                f"folder: {self.folder} is on no volume that keeps what is written: add one of "
                "claim, nfs, host_path to volumes, mounted there or above"
            )
        memory = self.resources.get("memory")
        if self.shm and memory and quantity(self.shm, "shm") > quantity(memory, "memory"):
            raise ValueError(f"shm: {self.shm} is more than the container's memory, {memory}, of which it is a part")
        for name, number in self.requests.items():
            most = self.resources.get(name)
            if most is not None and quantity(number, name) > quantity(most, name):
                raise ValueError(f"requests {name}: {number} is more than resources {name}: {most}")
        if self.form == "trainjob":
            for name in ("image_pull_policy", "priority_class", "host_network", "ttl_seconds"):
                if getattr(self, name) not in ("", False, None):
                    raise ValueError(
                        f"{name}: a TrainJob cannot set it: it belongs into the runtime {self.runtime!r}; "
                        'or use form = "indexed-job"'
                    )
        return self

    def image_of(self, job: ClusterJob) -> str:
        """The image of the job's containers; "" for that of the runtime."""
        return str(job.service_options.get("image_uri") or self.image)

    def check(self, job: ClusterJob) -> None:
        check_shape(job)
        check_devices_per_node(job, self.devices_per_node, f"resources of {self.title}")
        if warning := check_instance_type(job):
            logger.warning("%s: %s", self.title, warning)
        check_plain(job)
        for name in job.secrets:
            check_secret_name(name, job)
        try:
            self._check(job)
        except ValueError as error:
            raise LaunchError(f"{self.title}: job {job.name}: {error}") from error

    def _check(self, job: ClusterJob) -> None:
        check_label_name(job.name, "the name", begins_with_letter=True)
        if len(job.name) > self.max_name_length:
            raise ValueError(
                f"the name has {len(job.name)} characters: at most {self.max_name_length}, "
                "as the names of pods are made of it"
            )
        self._check_image(job)
        if job.device == "cuda" and not self.devices_on_each_node(job):
            raise ValueError(f'device "cuda", and resources name no device: add resources = {{"{_DEVICES[0]}" = N}}')
        for variable, reference in {**self.secrets, **job.secrets}.items():
            if not is_fetched(reference):
                parse_secret(reference, f"secret {variable}:")
            if variable in self.env or variable in job.environment:
                raise ValueError(f"{variable} is both a secret and a plain variable: leave out one of them")
        for what, place in self._places(job):
            self._check_place(what, place)
        if job.max_seconds is not None and not 1 <= job.max_seconds < 1 << 31:
            raise ValueError(f"its longest time is {job.max_seconds} s: expected 1 s or more")

    def _check_image(self, job: ClusterJob) -> None:
        if image := self.image_of(job):
            check_image(image, "image")
        elif self.form == "indexed-job" or (self.runtime == STOCK_RUNTIME and not self.setup):
            raise ValueError(
                "image is missing: name one with torch and modelparallel in it (image = ..., --image, image_uri); "
                "docs/clusters.md has a Dockerfile"
            )

    def _places(self, job: ClusterJob) -> Iterator[tuple[str, str]]:
        yield from ((f"channel {name!r}", channel.location) for name, channel in job.channels.items())
        if job.checkpoints is not None:
            yield "checkpoints", job.checkpoints
        if job.output is not None:
            yield "output", job.output

    def _check_place(self, what: str, place: str) -> None:
        """A path has to exist in the pods: on a volume; and outlive them, if the job writes there."""
        if "://" in place and not place.startswith("file://"):
            return
        path = place.removeprefix("file://")
        is_written = not what.startswith("channel")
        volumes = [volume for volume in self.volumes if volume.is_kept or not is_written]
        known = [volume.path for volume in volumes] + ([] if is_written else list(self.image_paths))
        if not any(is_below(path, directory) for directory in known):
            raise ValueError(
                f"{what}: {path} is a path of this machine, and in the pods there is only what volumes mount "
                f"({', '.join(known) or 'none that would do'}): add a volume, or give a URL (s3://, gs://, ...)"
                + ("" if is_written else ", or name a directory of the image in image_paths")
            )


def is_fetched(reference: str) -> bool:
    """Whether the node command fetches a secret itself, from a service."""
    return reference.startswith(_FETCHED)
