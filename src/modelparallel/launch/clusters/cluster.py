"""What a kind of cluster has to offer: a row of a cluster file that can render, submit, follow and stop a job."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from modelparallel.errors import LaunchError
from modelparallel.launch.clusters.description import ClusterJob

State = Literal["pending", "running", "succeeded", "failed", "stopped", "unknown"]
#: The states that a job does not leave any more.
FINAL_STATES = ("succeeded", "failed", "stopped")


@dataclass(frozen=True)
class Rendered:
    """What is about to be submitted, all of it; what `--dry-run` prints.

    Attributes:
        files: path -> text, in the order in which they are written; for Slurm below the job's folder.
        requests: (name of the call, its body): what is sent to a service.
        command: what is run to submit, `()` if a request does.
    """

    files: Mapping[str, str] = field(default_factory=dict)
    requests: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    command: tuple[str, ...] = ()

    def text(self) -> str:
        """Readable, and complete: each file, each request as JSON, the command."""
        parts = [f"# {path}\n{text.rstrip()}\n" for path, text in self.files.items()]
        parts += [f"# {name}\n{json.dumps(body, indent=2, default=str)}\n" for name, body in self.requests]
        if self.command:
            parts.append("# " + " ".join(self.command) + "\n")
        return "\n".join(parts)

    def digest(self) -> str:
        """Tells two renderings apart."""
        return hashlib.sha256(self.text().encode()).hexdigest()


@dataclass(frozen=True)
class JobRecord:
    """A submitted job, as another shell finds it again; holds no secret.

    Attributes:
        cluster: the name of the cluster, as the user wrote it, or its kind.
        settings: the cluster's row of the cluster file, so that the job is found although the file has changed.
        engine_id: what the engine calls the job: `1234`, the training job's name, `namespace/name`.
        folder: where logs and outputs are, if the submitting machine can see them: a path or a URL; else "".
        submitted: in seconds since 1970.
        digest: of what was rendered.
        model: where the script's model is found after the job: a path or a URL; "" if nobody knows.
    """

    name: str
    cluster: str
    kind: str
    settings: Mapping[str, Any]
    engine_id: str
    folder: str
    submitted: float
    digest: str
    model: str = ""

    @property
    def address(self) -> str:
        """How the commands call the job: `<cluster>/<name>`."""
        return f"{self.cluster}/{self.name}"


@dataclass(frozen=True)
class JobStatus:
    """How a job is now.

    Attributes:
        reason: why it waits, or failed, in the engine's own words: `Resources`, `DownloadingTrainingImage`, ...
        exit_code: of the job, where it is known and the job has ended.
        history: earlier states with their times, a line each, where the engine keeps them.
    """

    state: State
    reason: str = ""
    exit_code: int | None = None
    history: tuple[str, ...] = ()

    @property
    def is_final(self) -> bool:
        return self.state in FINAL_STATES


class Cluster(BaseModel, ABC):
    """A cluster that jobs can be submitted to; the fields of a subclass are its keys in `modelparallel.toml`.

    `check` and `render` are pure: they neither start nor write anything and need no access to the cluster.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: The word for it: `kind = "slurm"`.
    kind: ClassVar[str]

    #: What a name that is made from the script's may have: most characters, and whether capitals.
    max_name_length: ClassVar[int] = 63
    has_capital_names: ClassVar[bool] = True

    #: The arguments of the estimator that it finds in `ClusterJob.service_options` and acts on.
    service_arguments: ClassVar[tuple[str, ...]] = ()

    #: The name in the cluster file; "" for an object made in Python.
    name: str = Field(default="", exclude=True)

    @property
    def title(self) -> str:
        """What the user calls it: its name, else its kind."""
        return self.name or self.kind

    def new_name(self, base: str, now: datetime | None = None) -> str:
        """A job name that this kind takes: ``base``, without what is not allowed, and the time."""
        now = now or datetime.now()
        end = f"{now:%Y-%m-%d-%H-%M-%S}-{now.microsecond // 1000:03d}"
        base = re.sub(r"[^A-Za-z0-9]+", "-", str(base))[: self.max_name_length - len(end) - 1].strip("-") or "job"
        return f"{base if self.has_capital_names else base.lower()}-{end}"

    def with_session(self, session: Any) -> Cluster:
        """The same cluster, asked through a session of the cloud's SDK; other kinds than SageMaker need none."""
        return self

    @property
    def devices_per_node(self) -> int | None:
        """Accelerators of each node, where the cluster's own keys say it."""
        return None

    @abstractmethod
    def check(self, job: ClusterJob) -> None:
        """Raise `LaunchError` or `SMPConfigError` for what cannot work: a name, a value, something that is missing."""

    @abstractmethod
    def render(self, job: ClusterJob) -> Rendered:
        """All that will be submitted. Raises what `check` raises."""

    @abstractmethod
    def check_access(self, job: ClusterJob) -> None:
        """What can only be asked of the cluster, just before `submit`: its tool, credentials, whether the name is free.

        Raises `LaunchError`. Not called by --dry-run.
        """

    @abstractmethod
    def submit(self, job: ClusterJob) -> JobRecord:
        """Pack the code of the job, write its files, send its request. Raises `LaunchError` with the engine's text."""

    @abstractmethod
    def status(self, record: JobRecord) -> JobStatus:
        """How it is. A job that the engine has forgotten and that left nothing is "unknown"; never raises for that."""

    @abstractmethod
    def logs(
        self, record: JobRecord, *, rank: int | None = None, node: int | None = None, follow: bool = False
    ) -> Iterator[str]:
        """Lines of the job's output, `[rank 3] ...`, of all ranks if none is named; with `follow` to its end."""

    def adopt(self, engine_id: str) -> JobRecord:
        """A record of a job that was submitted elsewhere, by what the engine calls it.

        Raises `LaunchError` if the engine does not know it.
        """
        raise LaunchError(f"{self.kind}:{engine_id}: jobs that were submitted elsewhere cannot be followed here")

    @abstractmethod
    def stop(self, record: JobRecord) -> None:
        """Ask the engine to end the job; done when the engine has accepted it."""
