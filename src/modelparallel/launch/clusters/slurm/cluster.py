"""The kind `slurm` of clusters."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator

from modelparallel.errors import LaunchError
from modelparallel.job.discovery import LAUNCHER_VARIABLES
from modelparallel.job.private_files import write_private
from modelparallel.launch.clusters.checks import (
    check_devices_per_node,
    check_locations,
    check_name,
    clock,
    parse_duration,
)
from modelparallel.launch.clusters.cluster import Cluster, JobRecord, JobStatus, Rendered
from modelparallel.launch.clusters.description import ClusterJob, node_description
from modelparallel.launch.clusters.instances import devices_of
from modelparallel.launch.clusters.interrupts import engine_asked
from modelparallel.launch.clusters.job_end import read_job_end
from modelparallel.launch.clusters.log_files import check_rank, followed_lines, rank_logs
from modelparallel.launch.clusters.packing import copy_code
from modelparallel.launch.clusters.secrets import FILE_NAME as SECRETS_FILE
from modelparallel.launch.clusters.secrets import check_secrets, masked_secrets, secret_values, write_secrets
from modelparallel.launch.clusters.slurm.commands import (
    accounted_status,
    ask,
    check_tools,
    known_status,
    outer_variables,
)
from modelparallel.launch.clusters.slurm.script import (
    EXIT_CODE_FILE,
    OWN_OPTIONS,
    PLAIN_PATH,
    REQUEUED_EXIT_CODES,
    Requeue,
    Script,
    Value,
    check_options,
    check_variables,
    sbatch_file,
)

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_NAME_RULE = "use letters, digits, '.', '_' and '-', a letter or digit first, at most 100 characters"
_OWN_SRUN_OPTIONS = {
    "output": "it lies in the job's folder",
    "label": "each node has a file of its own, and each line its rank",
    "nodes": "all nodes of the job take part",
    "ntasks": "each node has one task, which starts the processes",
    "ntasks-per-node": "each node has one task, which starts the processes",
    "open-mode": "the output of a job that was requeued is appended",
}
#: Between two looks at the logs of a job that is followed.
_LOG_SECONDS = 1.0
#: Between two questions to Slurm's daemon, which all users of the cluster share.
_ASK_SECONDS = 10.0
#: What a node shows of its ranks, whose logs have all of it.
_SHOWN_BY_NODE = re.compile(r"\[node \d+\] \[(?:\S+ )?rank \d+\]")


class Slurm(Cluster):
    """A cluster that Slurm manages; jobs are submitted from a login node, and their folder is seen by all nodes.

    Attributes:
        folder: an absolute path that this machine and all nodes see, in which each job gets a folder of its own.
        partition: "" is the cluster's default.
        gpus_per_node: 8, or with the type that Slurm knows, "a100:8".
        cpus_per_node: cores of a node for the job's processes; without it Slurm gives one core, or what its own
            settings give for each GPU.
        memory: of each node, as Slurm writes it: "200G"; "0" is all.
        time: "24:00:00", "1-12:00:00", "4h" or seconds; a job's own limit comes first. "": that of the partition.
        setup: lines of shell for each job, before its processes are started: modules, ulimit, ...
        python: what runs on the nodes, with this library in its environment; "": the Python that submits, or with a
            container, `python`.
        container: stands before the command on each node: "apptainer exec --nv /shared/mp.sif".
        signal_seconds: how long before the end of its time the script is asked to save and leave.
        requeue: whether a job that has saved and left goes back into the queue, and one whose node has failed;
            "always": also one that is still there shortly before the end of its time.
        extra: further options of sbatch, without dashes: {account = "ml", exclusive = ""}.
        srun_extra: further options of srun: {container-image = "...", cpu-bind = "none"}.
        env: variables of all jobs.
    """

    kind: ClassVar[str] = "slurm"
    max_name_length: ClassVar[int] = 100
    service_arguments: ClassVar[tuple[str, ...]] = ()

    folder: str = ""
    partition: str = ""
    gpus_per_node: int | str | None = None
    cpus_per_node: int | None = Field(default=None, ge=1)
    memory: str = ""
    time: str | float = ""
    setup: tuple[str, ...] = ()
    python: str = ""
    container: str = ""
    signal_seconds: int = Field(default=120, ge=1, le=65535)
    requeue: Requeue = True
    extra: dict[str, Value] = Field(default_factory=dict)
    srun_extra: dict[str, Value] = Field(default_factory=dict)
    env: dict[str, str] = Field(default_factory=dict)

    @field_validator("gpus_per_node")
    @classmethod
    def _is_count_of_gpus(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, str) and not re.fullmatch(r"([A-Za-z0-9_.-]+:)?[0-9]+", value):
            raise ValueError('expected a number of GPUs, or a type and a number ("a100:8")')
        if isinstance(value, int) and value < 0:
            raise ValueError("expected a number of GPUs, 0 or more")
        return value

    @property
    def devices_per_node(self) -> int | None:
        """GPUs of each node."""
        return None if self.gpus_per_node is None else int(str(self.gpus_per_node).rpartition(":")[2])

    def check(self, job: ClusterJob) -> None:
        """See `Cluster`; local."""
        what = f"cluster {self.title!r}"
        check_name(job.name, _NAME, _NAME_RULE)
        if not self.folder:
            raise LaunchError(f"{what}: folder is missing: give a folder that this machine and all nodes see")
        if not PLAIN_PATH.fullmatch(self.folder):
            raise LaunchError(
                f"{what}: folder {self.folder!r}: give an absolute path of letters, digits, spaces and "
                "_ . / : , @ + = ~ - (others mean something to Slurm in the name of a file)"
            )
        for key in ("python", "container", "partition", "memory"):
            if found := re.search(r"[\x00-\x1f\x7f]", getattr(self, key)):
                raise LaunchError(f"{what}: {key}: the character {found[0]!r} cannot stand there")
        check_options({"partition": self.partition, "mem": self.memory}, what, {})
        check_options(self.extra, f"{what}: extra", OWN_OPTIONS)
        check_options(self.srun_extra, f"{what}: srun_extra", _OWN_SRUN_OPTIONS)
        check_variables(self.env, f"{what}: env")
        check_variables(job.environment, f"job {job.name}: environment")
        if any("\0" in line for line in self.setup):
            raise LaunchError(f"{what}: setup: a line has the character '\\0'")
        seconds = self._seconds(job)
        if seconds is not None and self.requeue and seconds <= self.signal_seconds:
            raise LaunchError(
                f"job {job.name}: its time of {clock(seconds)} is not longer than "
                f"signal_seconds={self.signal_seconds} of {what}, so that it would be asked to leave when it starts: "
                "give it more time, or signal_seconds less"
            )
        check_devices_per_node(job, self._gpus(job), f"gpus_per_node of {what}")
        check_secrets(job, ("env", "file"))
        check_locations(job, shares_folders=True, remedy="")

    def render(self, job: ClusterJob) -> Rendered:
        """See `Cluster`; local."""
        self.check(job)
        root = self._root(job)
        files = {
            str(root / "job.sbatch"): sbatch_file(self._script(job)),
            str(root / "job.json"): node_description(job),
        }
        if job.secrets:
            files[str(root / SECRETS_FILE)] = masked_secrets(job)
        return Rendered(files, command=_submission(root))

    def check_access(self, job: ClusterJob) -> None:
        """See `Cluster`; local."""
        what = f"cluster {self.title!r}"
        check_tools(("sbatch", "scontrol", "scancel"))
        parent = Path(self.folder)
        there = next((path for path in (parent, *parent.parents) if path.exists()), parent)
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise LaunchError(f"{what}: folder {self.folder}: {there} is no folder that you can write to")
        if os.path.lexists(self._root(job)):
            raise LaunchError(
                f"job name {job.name!r} is in use: {self._root(job)} exists: choose another name, or remove it"
            )
        secret_values(job, os.environ)

    def submit(self, job: ClusterJob) -> JobRecord:
        """See `Cluster`; local."""
        rendered = self.render(job)
        root = self._root(job)
        try:
            root.parent.mkdir(parents=True, exist_ok=True)
            root.mkdir(mode=0o700)
        except OSError as error:
            raise LaunchError(f"the folder {root} of the job cannot be made: {error.strerror}") from error
        try:
            copy_code(job, root / "code", jobs=root.parent)
            if job.secrets:
                write_secrets(root / SECRETS_FILE, secret_values(job, os.environ))
            for path, text in rendered.files.items():
                if Path(path).name != SECRETS_FILE:
                    write_private(Path(path), text)
            of_secrets = [ref.partition(":")[2] for ref in job.secrets.values() if ref.startswith("env:")]
            variables = outer_variables(os.environ, {*LAUNCHER_VARIABLES, *of_secrets, *job.secrets})
            with engine_asked():
                engine_id = ask(_submission(root), variables).strip().partition(";")[0]
                if not re.fullmatch(r"\d+", engine_id):
                    raise LaunchError(f"sbatch answered {engine_id!r}, which is no number of a job")
        except BaseException as error:
            # Nothing was submitted, and nothing is left of it: the code is where it came from.
            shutil.rmtree(root, ignore_errors=True)
            if isinstance(error, OSError):
                raise LaunchError(f"the folder {root} of the job cannot be written: {error.strerror}") from error
            raise
        return JobRecord(
            name=job.name,
            cluster=self.title,
            kind=self.kind,
            settings=self.model_dump(mode="json", exclude_defaults=True),
            engine_id=engine_id,
            folder=str(root),
            submitted=time.time(),
            digest=rendered.digest(),
        )

    def adopt(self, engine_id: str) -> JobRecord:
        """See `Cluster`; local: the folder is where the job's output is."""
        text = ask(["scontrol", "show", "job", "--oneliner", engine_id])
        name = re.search(r"\bJobName=(\S*)", text)
        output = re.search(r"\bStdOut=(.*?)(?: \w+=|$)", text.strip())
        folder = "" if output is None else os.path.dirname(output[1])
        if not (Path(folder) / "job.json").is_file():
            folder = ""
        return JobRecord(engine_id if name is None else name[1], self.title, self.kind, {}, engine_id, folder, 0.0, "")

    def status(self, record: JobRecord) -> JobStatus:
        """See `Cluster`; local."""
        check_tools(("scontrol",))
        status = known_status(record.engine_id) or accounted_status(record.engine_id) or _left_status(record)
        if status.state == "failed" and (why := _first_failure(record)):
            return JobStatus("failed", f"{status.reason}: {why}", status.exit_code, status.history)
        return status

    def logs(
        self, record: JobRecord, *, rank: int | None = None, node: int | None = None, follow: bool = False
    ) -> Iterator[str]:
        """See `Cluster`; local."""
        root = Path(record.folder)
        if not record.folder or not root.is_dir():
            raise LaunchError(
                f"job {record.address}: its folder {record.folder or '(not known)'} is not there: logs are read from it"
            )
        description = _json(root / "job.json")
        num_nodes = description.get("num_nodes")
        num_processes = None if num_nodes is None else num_nodes * description["processes_per_node"]
        check_rank(rank, num_processes, record.name)
        if node is not None and num_nodes is not None and not 0 <= node < num_nodes:
            raise LaunchError(f"node {node}: job {record.name} has the nodes 0..{num_nodes - 1}")

        def find() -> dict[str, Path]:
            found: dict[str, Path] = {}
            if rank is None:
                # Each node says who failed first over all of them.
                found[f"[node {node or 0}] "] = root / f"node_{node or 0}.log"
                if node is None and (outputs := sorted(root.glob("slurm-*.out"))):
                    found["[slurm] "] = outputs[-1]
            per_node = description.get("processes_per_node") or 1
            for global_rank, (path, of_node) in sorted(rank_logs(root).items()):
                own_node = global_rank // per_node if of_node is None else of_node
                if rank in (None, global_rank) and node in (None, own_node):
                    found[f"[rank {global_rank}] "] = path
            return found

        lines = followed_lines(find, self._asked_for_end(record), follow=follow, seconds=_LOG_SECONDS)
        return (line for line in lines if not _SHOWN_BY_NODE.match(line))

    def stop(self, record: JobRecord) -> None:
        """See `Cluster`; local."""
        check_tools(("scancel",))
        ask(["scancel", record.engine_id])

    def _asked_for_end(self, record: JobRecord) -> Callable[[], bool]:
        """Whether the job is over; asks Slurm now and then only."""
        asked_at = -math.inf

        def is_over() -> bool:
            nonlocal asked_at
            if time.monotonic() < asked_at + _ASK_SECONDS:
                return False
            status = self.status(record)
            asked_at = time.monotonic()
            return status.is_final or status.state == "unknown"

        return is_over

    def _root(self, job: ClusterJob) -> Path:
        return Path(self.folder) / job.name

    def _seconds(self, job: ClusterJob) -> float | None:
        if job.max_seconds is not None:
            return parse_duration(job.max_seconds, f"job {job.name}: its time")
        if self.time == "":
            return None
        return parse_duration(self.time, f"cluster {self.title!r}: time")

    def _gpus(self, job: ClusterJob) -> int | None:
        """GPUs of a node: those of the cluster, else of the instance type that the job was written for."""
        if self.gpus_per_node is not None or job.instance_type is None:
            return self.devices_per_node
        return devices_of(job.instance_type)

    def _script(self, job: ClusterJob) -> Script:
        seconds = self._seconds(job)
        wanted: int | str | None = self.gpus_per_node if self.gpus_per_node is not None else self._gpus(job)
        if job.device == "cpu":
            wanted = None
        return Script(
            name=job.name,
            folder=str(self._root(job)),
            num_nodes=job.num_nodes,
            processes_per_node=job.processes_per_node,
            python=self.python or ("python" if self.container else sys.executable),
            partition=self.partition,
            gpus_per_node=wanted,
            cpus_per_node=self.cpus_per_node,
            memory=self.memory,
            time="" if seconds is None else clock(seconds),
            signal_seconds=self.signal_seconds,
            requeue=self.requeue,
            setup=self.setup,
            container=self.container,
            environment=self.env,
            extra=self.extra,
            srun_extra=self.srun_extra,
        )


def _submission(root: Path) -> tuple[str, ...]:
    return "sbatch", "--parsable", str(root / "job.sbatch")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _left_status(record: JobRecord) -> JobStatus:
    """What the job itself has written down at its end: its first agent, or the file that Slurm has run."""
    end = read_job_end(Path(record.folder)) if record.folder else None
    if end is not None and end.status.is_final:
        return end.status
    try:
        code = int((Path(record.folder or os.devnull) / EXIT_CODE_FILE).read_text(encoding="ascii"))
    except (OSError, ValueError):
        code = None
    # That of a job that was requeued is of its start before.
    if code is None or (code in REQUEUED_EXIT_CODES and end is not None and end.state == "running"):
        heard = (
            "" if end is None else f"; it was {end.state} when it was last heard of, on {end.node or 'its first node'}"
        )
        return JobStatus("unknown", f"Slurm has forgotten it, and it has left no word of its end{heard}")
    return JobStatus("succeeded" if code == 0 else "failed", "" if code == 0 else f"exit code {code}", code)


def _first_failure(record: JobRecord) -> str:
    """What the job itself says of its failure, if it can be read from here."""
    end = read_job_end(Path(record.folder)) if record.folder else None
    return end.reason if end is not None and end.state == "failed" else ""
