"""The parts of a row of the cluster file that are more than one value: volumes and tolerations."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from modelparallel.launch.clusters.k8s.names import check_object_name, quantity

_SOURCES = ("claim", "config_map", "secret", "nfs", "host_path", "scratch")


class Volume(BaseModel):
    """A directory of the containers: `{claim = "data", path = "/data"}`. One of the sources is given.

    Attributes:
        path: where it is in the containers.
        claim: a PersistentVolumeClaim of the namespace. With more than one node it has to be ReadWriteMany (or
            ReadOnlyMany, with `read_only`).
        config_map, secret: an object of the namespace, a file for each key.
        nfs: `server:/path`.
        host_path: a directory of the machine, as administrators allow it.
        scratch: an empty directory of each node that goes with the pod; its size (`500Gi`), or "" for no limit.
        sub_path: the part of the volume that is mounted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    claim: str | None = None
    config_map: str | None = None
    secret: str | None = None
    nfs: str | None = None
    host_path: str | None = None
    scratch: str | None = None
    sub_path: str = ""
    read_only: bool = False

    @field_validator("path")
    @classmethod
    def _is_directory(cls, path: str) -> str:
        return check_path(path, "path")

    @model_validator(mode="after")
    def _has_one_source(self) -> Volume:
        given = [name for name in _SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"volume at {self.path}: expected one of {', '.join(_SOURCES)}, got {given or 'none'}")
        for name in ("claim", "config_map", "secret"):
            if (value := getattr(self, name)) is not None:
                check_object_name(value, f"volume at {self.path}: {name}")
        if self.nfs is not None and not re.fullmatch(r"[^:/\s]+:/\S*", self.nfs):
            raise ValueError(f"volume at {self.path}: nfs {self.nfs!r}: expected server:/path")
        if self.host_path is not None:
            check_path(self.host_path, f"volume at {self.path}: host_path")
        if self.scratch:
            quantity(self.scratch, f"volume at {self.path}: scratch")
        if self.sub_path.startswith("/") or ".." in self.sub_path.split("/"):
            raise ValueError(f"volume at {self.path}: sub_path {self.sub_path!r}: expected a path inside the volume")
        return self

    @property
    def is_kept(self) -> bool:
        """Whether what is written there outlives the pod."""
        return not self.read_only and (self.claim or self.nfs or self.host_path) is not None

    def source(self) -> dict[str, Any]:
        """The volume, without its name, as a pod has it."""
        if self.claim is not None:
            return {"persistentVolumeClaim": {"claimName": self.claim} | ({"readOnly": True} if self.read_only else {})}
        if self.config_map is not None:
            return {"configMap": {"name": self.config_map}}
        if self.secret is not None:
            return {"secret": {"secretName": self.secret}}
        if self.nfs is not None:
            server, _, path = self.nfs.partition(":")
            return {"nfs": {"server": server, "path": path} | ({"readOnly": True} if self.read_only else {})}
        if self.host_path is not None:
            return {"hostPath": {"path": self.host_path}}
        return {"emptyDir": {"sizeLimit": self.scratch} if self.scratch else {}}

    def mount(self, name: str) -> dict[str, Any]:
        """Where the container finds the volume of that name."""
        mount: dict[str, Any] = {"name": name, "mountPath": self.path}
        if self.sub_path:
            mount["subPath"] = self.sub_path
        if self.read_only:
            mount["readOnly"] = True
        return mount


class Toleration(BaseModel):
    """A taint of machines that the pods accept: `{key = "nvidia.com/gpu", operator = "Exists"}`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str = ""
    operator: Literal["Equal", "Exists"] = "Equal"
    value: str = ""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""

    @model_validator(mode="after")
    def _fits(self) -> Toleration:
        if self.operator == "Exists" and self.value:
            raise ValueError(f"toleration {self.key!r}: operator 'Exists' takes no value, got {self.value!r}")
        if self.operator == "Equal" and not self.key:
            raise ValueError('toleration without a key: only operator = "Exists" accepts every taint')
        return self

    def record(self) -> dict[str, str]:
        """As a pod has it."""
        return {name: value for name, value in self.model_dump().items() if value}


def check_path(path: str, what: str) -> str:
    """An absolute path of a container. Raises `ValueError`."""
    if not path.startswith("/") or path == "/" or ":" in path or ".." in path.split("/"):
        raise ValueError(f"{what} {path!r}: expected an absolute path, without ':' and '..'")
    return path.rstrip("/")


def is_below(path: str, directory: str) -> bool:
    """Whether an absolute path is that directory or in it."""
    return path == directory or path.startswith(directory + "/")
