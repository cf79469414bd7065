"""Which of several hosts this one is, how many there are, and where they meet: `modelparallel run --nnodes ...`.

Whatever started the command on every host has said so in variables of its own, or the user says it by options. All of
this is a table: one row for each engine, in the order in which they are asked. Two that disagree are an error, as are
too few words: a host that takes itself for another one would wait, or train alone.

Pure functions of options and environment, but for Slurm's `scontrol`, which is passed in.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TypeVar

from modelparallel.errors import LaunchError
from modelparallel.errors.foreign_text import parse_json

#: Says which row of the table counts, where two disagree; "none": the options alone.
SOURCE_VARIABLE = "MODELPARALLEL_NODE_SOURCE"
JOB_ID_VARIABLE = "MODELPARALLEL_JOB_ID"
#: What the service writes for the containers of a training job.
RESOURCE_FILE = Path("/opt/ml/input/config/resourceconfig.json")

_SAGEMAKER_PORT = 7777
_FIRST_PORT, _NUM_PORTS = 20000, 40000
#: From here on step ids of Slurm stand for the batch script, an interactive shell, or what is outside of steps.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
_MAX_JOB_ID = 128
_T = TypeVar("_T")


@dataclass(frozen=True)
class NodePlace:
    """The place of this host in a job of several.

    Attributes:
        source: who has said so, for messages.
        least: with how many nodes the job may run ...
        most: ... and with how many it is to run.
        node_rank: the number of this node; None if the nodes are numbered as they come (`least` < `most` only).
        host: the host of node 0, as the others reach it.
        port: where node 0 listens there.
        job_id: what the job is called by all of its nodes.
        node_names: the names of the nodes in their order, where the engine tells them.
        interface: the network interface that the engine names, or "".
        num_processes: how many processes the engine asks for on this node, or None.
        restart_count: how often the engine has started the job before.
    """

    source: str
    least: int
    most: int
    node_rank: int | None
    host: str
    port: int
    job_id: str
    node_names: tuple[str, ...] = ()
    interface: str = ""
    num_processes: int | None = None
    restart_count: int = 0


@dataclass(frozen=True)
class PlaceOptions:
    """What the user has said: `--nnodes`, `--node-rank`, `--rendezvous`, `--job-id`."""

    nnodes: str | None = None
    node_rank: int | None = None
    rendezvous: str | None = None
    job_id: str | None = None


@dataclass(frozen=True)
class _Found:
    """What one engine says; None for what it does not."""

    source: str
    least: int | None = None
    most: int | None = None
    node_rank: int | None = None
    host: str | None = None
    port: int | None = None
    job_id: str | None = None
    node_names: tuple[str, ...] = ()
    interface: str = ""
    num_processes: int | None = None

    @property
    def nodes(self) -> str:
        return str(self.most) if self.least == self.most else f"{self.least}:{self.most}"


@dataclass(frozen=True)
class _Surroundings:
    environ: Mapping[str, str]
    resource_file: Path
    list_hosts: Callable[[str], list[str]]
    own_name: str


def find_place(
    options: PlaceOptions,
    environ: Mapping[str, str],
    *,
    default_job_id: str,
    own_name: str,
    list_hosts: Callable[[str], list[str]],
    resource_file: Path = RESOURCE_FILE,
) -> NodePlace:
    """The place of this host.

    Args:
        default_job_id: what the job is called if nobody says.
        own_name: the name of this host.
        list_hosts: the names in a node list of Slurm.

    Raises `LaunchError` for what is missing, cannot be, or is said in two ways.
    """
    found = _ask_all(_Surroundings(environ, resource_file, list_hosts, own_name))
    said = _said(options, environ)
    for one, other in combinations((said, *found), 2):
        _check_agree(one, other)
    answers = [said, *found[:1]]
    source = " and ".join(answer.source for answer in answers if answer != _Found(answer.source)) or "nothing"
    least, most = _first(a.least for a in answers), _first(a.most for a in answers)
    if least is None or most is None:
        asked = "" if options.nnodes is None else f" {options.nnodes}"
        raise LaunchError(
            f"--nnodes{asked}: no engine says how many nodes this job has (looked for the variables of "
            f"{', '.join(row.source for row in _ROWS)}): give --nnodes N, --node-rank R and --rendezvous HOST:PORT on "
            "each host, or start the command by srun with one task per node (--ntasks-per-node=1)"
        )
    node_rank = _first(a.node_rank for a in answers)
    job_id = _checked_job_id(_first(a.job_id for a in answers) or default_job_id)
    host = _first(a.host for a in answers) or (environ.get("MASTER_ADDR") or None)
    port = _first(a.port for a in answers)
    if most == 1:
        node_rank, host = 0, host or own_name
    if node_rank is None and least == most:
        raise LaunchError(
            f"--nnodes {most}: which of the {most} nodes is this one? Add --node-rank R: 0 on the host of "
            f"--rendezvous, then 1 to {most - 1}"
        )
    if node_rank is not None and not 0 <= node_rank < most:
        raise LaunchError(f"node rank {node_rank} of {most} nodes ({source}): expected 0 to {most - 1}")
    if not host:
        raise LaunchError(
            f"--nnodes {most}: where do the nodes meet? Add --rendezvous HOST:PORT, the host of node 0 as the others "
            "reach it; without :PORT it follows from the job id"
        )
    return NodePlace(
        source,
        least,
        most,
        node_rank,
        host,
        port_of(job_id) if port is None else port,
        job_id,
        next((a.node_names for a in answers if a.node_names), ()),
        next((a.interface for a in answers if a.interface), ""),
        _first(a.num_processes for a in answers),
        engine_restarts(environ),
    )


def port_of(job_id: str) -> int:
    """The port at which the nodes of a job meet: the same on all of them, and for two jobs most likely another."""
    digest = hashlib.sha256(job_id.encode()).digest()
    return _FIRST_PORT + int.from_bytes(digest[:8], "big") % _NUM_PORTS


def engine_restarts(environ: Mapping[str, str]) -> int:
    """How often the engine has started this job before."""
    count = 0
    for name, first in (("SLURM_RESTART_COUNT", 0), ("JOBSET_RESTART_ATTEMPT", 0), ("AWS_BATCH_JOB_ATTEMPT", 1)):
        text = environ.get(name, "")
        count += max(0, int(text) - first) if text.isdigit() else 0
    return count


def parse_nodes(text: str, where: str = "--nnodes") -> tuple[int, int]:
    """The least and the most nodes of `2` or `2:4`. Raises `LaunchError`."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text.strip())
    if match is None:
        raise LaunchError(f"{where} {text!r}: expected a number of nodes, a range such as 2:4, or auto")
    least = int(match[1])
    most = least if match[2] is None else int(match[2])
    if not 1 <= least <= most:
        raise LaunchError(f"{where} {text}: expected at least 1 node, and the least first")
    return least, most


def parse_meeting_point(text: str, where: str = "--rendezvous") -> tuple[str, int | None]:
    """Host and port of `host`, `host:port`, `[address]:port` or an IPv6 address. Raises `LaunchError`."""
    text = text.strip()
    try:
        return str(ipaddress.IPv6Address(text)), None
    except ValueError:
        pass
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([A-Za-z0-9._-]+))(?::(\d{1,5}))?", text)
    port = None if match is None or match[3] is None else int(match[3])
    if match is None or (port is not None and not 0 < port < 65536):
        raise LaunchError(f"{where} {text!r}: expected HOST or HOST:PORT, such as node-a:29500 or [fd00::1]:29500")
    return match[1] or match[2], port


def _said(options: PlaceOptions, environ: Mapping[str, str]) -> _Found:
    least = most = None
    if options.nnodes is not None and options.nnodes != "auto":
        least, most = parse_nodes(options.nnodes)
    host, port = (None, None) if options.rendezvous is None else parse_meeting_point(options.rendezvous)
    if options.node_rank is not None and options.node_rank < 0:
        raise LaunchError(f"--node-rank {options.node_rank}: node ranks begin at 0")
    return _Found(
        "options", least, most, options.node_rank, host, port, options.job_id or environ.get(JOB_ID_VARIABLE) or None
    )


def _ask_all(around: _Surroundings) -> list[_Found]:
    chosen = around.environ.get(SOURCE_VARIABLE, "").strip()
    names = [row.name for row in _ROWS]
    if chosen and chosen not in (*names, "none"):
        raise LaunchError(f"environment variable {SOURCE_VARIABLE}: {chosen!r}: expected {', '.join(names)} or none")
    answers = (row.ask(around) for row in _ROWS if chosen in ("", row.name))
    return [answer for answer in answers if answer is not None]


def _check_agree(one: _Found, other: _Found) -> None:
    """Raise for two that name other numbers; a range agrees with all that it holds."""
    advice = (
        f"run where only one of them is set, or say which counts by {SOURCE_VARIABLE} "
        f"({', '.join(row.name for row in _ROWS)}, or none for the options alone)"
    )
    is_said = None not in (one.most, other.most)
    if is_said and max(one.least or 0, other.least or 0) > min(one.most or 0, other.most or 0):
        raise LaunchError(f"{one.source} and {other.source} disagree: {one.nodes} and {other.nodes} nodes: {advice}")
    if None not in (one.node_rank, other.node_rank) and one.node_rank != other.node_rank:
        raise LaunchError(
            f"{one.source} and {other.source} disagree: this is node {one.node_rank} or node {other.node_rank}: "
            f"{advice}"
        )


def _torchrun(around: _Surroundings) -> _Found | None:
    environ = around.environ
    if "PET_NNODES" not in environ:
        return None
    least, most = parse_nodes(environ["PET_NNODES"], "environment variable PET_NNODES")
    host, port = environ.get("PET_MASTER_ADDR") or None, _number(environ, "PET_MASTER_PORT")
    if host is None and environ.get("PET_RDZV_ENDPOINT"):
        host, port = parse_meeting_point(environ["PET_RDZV_ENDPOINT"], "environment variable PET_RDZV_ENDPOINT")
    each = environ.get("PET_NPROC_PER_NODE", "")
    return _Found(
        "PET_* (torchrun, Kubeflow)",
        least,
        most,
        _number(environ, "PET_NODE_RANK"),
        host,
        port,
        environ.get("PET_RDZV_ID") or None,
        num_processes=int(each) if each.isdigit() and int(each) else None,
    )


def _sagemaker(around: _Surroundings) -> _Found | None:
    environ = around.environ
    interface = environ.get("SM_NETWORK_INTERFACE_NAME", "")
    if "SM_HOSTS" in environ and "SM_CURRENT_HOST" in environ:
        where = "environment variable SM_HOSTS"
        hosts, current = _host_list(environ["SM_HOSTS"], where), environ["SM_CURRENT_HOST"]
    else:
        where = str(around.resource_file)
        try:
            content = parse_json(around.resource_file.read_bytes())
            hosts, current = _host_list(json.dumps(content["hosts"]), where), str(content["current_host"])
            interface = interface or str(content.get("network_interface_name", ""))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LaunchError(f"{where} does not name the hosts of this job ({error!r})") from error
    if current not in hosts:
        raise LaunchError(f"{where}: {current!r} is not among the hosts {', '.join(hosts)}")
    return _Found(
        "SM_* (SageMaker)",
        len(hosts),
        len(hosts),
        hosts.index(current),
        hosts[0],
        _SAGEMAKER_PORT,
        environ.get("TRAINING_JOB_NAME") or environ.get("SAGEMAKER_JOB_NAME") or None,
        tuple(hosts),
        interface,
    )


def _host_list(text: str, where: str) -> list[str]:
    try:
        hosts = parse_json(text)
    except ValueError:
        hosts = None
    if not isinstance(hosts, list) or not hosts or not all(isinstance(host, str) and host for host in hosts):
        raise LaunchError(f"{where}: expected a list of host names as JSON, got {text!r}")
    return sorted(hosts)


def _slurm(around: _Surroundings) -> _Found | None:
    environ = around.environ
    step = environ.get("SLURM_STEP_ID") or environ.get("SLURM_STEPID") or ""
    # A batch script, or a shell of salloc, runs once, wherever its other nodes are.
    if not step.isdigit() or int(step) >= _FIRST_SPECIAL_STEP:
        return None
    each = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or "1"
    counts = {int(count) for count in re.findall(r"(?:^|,)\s*(\d+)", each)}
    if counts != {1}:
        raise LaunchError(
            f"Slurm has started {each} tasks on the nodes of this step: start one on each "
            "(srun --ntasks-per-node=1); `modelparallel run` starts the processes of a node itself (--nproc)"
        )
    nodes = _number(environ, "SLURM_STEP_NUM_NODES") or _number(environ, "SLURM_NNODES")
    listed = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    names = tuple(around.list_hosts(listed)) if listed else ()
    return _Found(
        "SLURM_*",
        nodes,
        nodes,
        _number(environ, "SLURM_NODEID"),
        names[0] if names else None,
        None,
        f"slurm-{environ.get('SLURM_JOB_ID', '0')}.{step}",
        names if len(names) == nodes else (),
    )


def _kubernetes(around: _Surroundings) -> _Found | None:
    environ = around.environ
    if "JOB_COMPLETION_INDEX" not in environ or "MODELPARALLEL_NNODES" not in environ:
        return None
    least, most = parse_nodes(environ["MODELPARALLEL_NNODES"], "environment variable MODELPARALLEL_NNODES")
    host, port = None, None
    if environ.get("MODELPARALLEL_MASTER"):
        host, port = parse_meeting_point(environ["MODELPARALLEL_MASTER"], "environment variable MODELPARALLEL_MASTER")
    return _Found("an Indexed Job", least, most, _number(environ, "JOB_COMPLETION_INDEX"), host, port)


def _skypilot(around: _Surroundings) -> _Found | None:
    environ = around.environ
    if "SKYPILOT_NODE_RANK" not in environ:
        return None
    addresses = environ.get("SKYPILOT_NODE_IPS", "").split()
    nodes = _number(environ, "SKYPILOT_NUM_NODES") or len(addresses) or None
    return _Found(
        "SKYPILOT_*",
        nodes,
        nodes,
        _number(environ, "SKYPILOT_NODE_RANK"),
        addresses[0] if addresses else None,
        None,
        environ.get("SKYPILOT_TASK_ID") or None,
    )


def _dstack(around: _Surroundings) -> _Found | None:
    environ = around.environ
    if "DSTACK_NODE_RANK" not in environ:
        return None
    nodes = _number(environ, "DSTACK_NODES_NUM")
    return _Found(
        "DSTACK_*",
        nodes,
        nodes,
        _number(environ, "DSTACK_NODE_RANK"),
        environ.get("DSTACK_MASTER_NODE_IP") or None,
        None,
        environ.get("DSTACK_RUN_NAME") or None,
    )


def _aws_batch(around: _Surroundings) -> _Found | None:
    environ = around.environ
    index, nodes = _number(environ, "AWS_BATCH_JOB_NODE_INDEX"), _number(environ, "AWS_BATCH_JOB_NUM_NODES")
    if index is None or nodes is None:
        return None
    main = _number(environ, "AWS_BATCH_JOB_MAIN_NODE_INDEX") or 0
    # The address of the main node is told to the others only.
    host = environ.get("AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS") or (around.own_name if index == main else None)
    job_id = environ.get("AWS_BATCH_JOB_ID", "").partition("#")[0]
    return _Found("AWS_BATCH_*", nodes, nodes, (index - main) % nodes, host, None, job_id or None)


def _mpi(around: _Surroundings) -> _Found | None:
    environ = around.environ
    for rank, size, each, source in (
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_*"),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS", "PMI_*"),
    ):
        nodes, local = _number(environ, size), _number(environ, each)
        if nodes is None or rank not in environ:
            continue
        if nodes > 1 and local is None and "SLURM_STEP_ID" in environ:
            continue  # srun --mpi=pmi2: Slurm's own variables say how many there are on a node
        if nodes > 1 and local != 1:
            raise LaunchError(
                f"mpirun has started {'an unknown number of' if local is None else local} processes on this node "
                f"({each}): start one on each (mpirun --map-by ppr:1:node); `modelparallel run` starts the processes "
                "of a node itself (--nproc)"
            )
        return _Found(source, nodes, nodes, _number(environ, rank))
    return None


@dataclass(frozen=True)
class _Row:
    name: str
    source: str
    ask: Callable[[_Surroundings], _Found | None]


_ROWS = (
    _Row("torchrun", "torchrun and Kubeflow (PET_NNODES)", _torchrun),
    _Row("sagemaker", "SageMaker (SM_HOSTS)", _sagemaker),
    _Row("slurm", "a step of Slurm (SLURM_STEP_ID)", _slurm),
    _Row("kubernetes", "an Indexed Job (JOB_COMPLETION_INDEX with MODELPARALLEL_NNODES)", _kubernetes),
    _Row("skypilot", "SkyPilot", _skypilot),
    _Row("dstack", "dstack", _dstack),
    _Row("aws-batch", "AWS Batch", _aws_batch),
    _Row("mpi", "mpirun", _mpi),
)


def _number(environ: Mapping[str, str], key: str) -> int | None:
    text = environ.get(key, "").strip()
    if not text:
        return None
    if not text.isdigit():
        raise LaunchError(f"environment variable {key}: expected a number, got {text!r}")
    return int(text)


def _first(values: Iterable[_T | None]) -> _T | None:
    return next((value for value in values if value is not None), None)


def _checked_job_id(text: str) -> str:
    if not re.fullmatch(r"[\x21-\x7e]+", text) or len(text) > _MAX_JOB_ID:
        raise LaunchError(f"job id {text!r}: use up to {_MAX_JOB_ID} printable characters without blanks")
    return text
