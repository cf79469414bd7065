"""The first thing to run on a new cluster: do the ranks find each other, how fast do they talk, are they alike?

    modelparallel cluster-check --nproc 2                                           on this machine
    torchrun --nnodes 2 ... -m modelparallel.launch.cluster_check                   by any launcher, one per device
    srun -N2 --ntasks-per-node=8 python -m modelparallel.launch.cluster_check

Every process of the job runs this; rank 0 prints the report. It uses the library's own meeting, groups and waits, so
that what fails here would fail in training, with the same words.
"""

import sys
from pathlib import Path

# Started by path, Python puts this file's directory first; its neighbours must not be importable as top-level modules.
if __name__ == "__main__" and sys.path and Path(sys.path[0]) == Path(__file__).parent:
    del sys.path[0]

import argparse
import json
import os
import platform
import socket
import statistics
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from modelparallel.comm.collectives.started import exchange_integers, start_all_reduce
from modelparallel.comm.groups import Group
from modelparallel.config.reading import ENVIRONMENT_KEY, parse_parameters
from modelparallel.config.topology import CommGroup, GroupKind, RankType
from modelparallel.errors import SMPError
from modelparallel.job import messages, session
from modelparallel.job.discovery import discover_process
from modelparallel.job.private_files import write_private
from modelparallel.launch.cluster_report import Clock, ClusterReport, RankFacts, Reduction, parse_sizes
from modelparallel.training import runtime
from modelparallel.version import __version__

SIZES = (64 << 10, 1 << 20, 16 << 20)
SIZES_OF_GPUS = (1 << 20, 16 << 20, 256 << 20)
#: Unless the parameters say otherwise. A cluster that is as it should be needs seconds.
_OWN_PARAMETERS = {"timeout_seconds": 120.0}
#: How long each size is measured in each group, about, and how often at most.
_SECONDS, _MOST_ROUNDS = 0.3, 20
_CLOCK_ROUNDS = 8
_AXES = (GroupKind.WORLD, GroupKind.PP, GroupKind.TP, GroupKind.DP)
_PACKAGES = ("numpy", "transformers")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 if everything is as it should be, on rank 0 1 if not; 2 for wrong arguments."""
    parser = argparse.ArgumentParser(prog="python -m modelparallel.launch.cluster_check")
    parser.add_argument("--parameters", help="model parallel parameters: JSON, or a file with JSON; their axes count")
    parser.add_argument("--sizes", help="what is all-reduced, in bytes, separated by commas: 65536,1048576")
    parser.add_argument("--json", type=Path, help="where rank 0 writes the report as JSON")
    options = parser.parse_args(arguments)
    try:
        sizes = None if options.sizes is None else parse_sizes(options.sizes)
        given = {} if options.parameters is None else parse_parameters(options.parameters, "--parameters")
        identity = discover_process(os.environ)
    except SMPError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # Before anything can hang: who has come, and who has not.
    who = f"rank {identity.global_rank} of {identity.world_size}"
    print(f"{who} on {socket.gethostname()} (by {identity.source}) looks for the others", flush=True)
    is_given = bool(given) or ENVIRONMENT_KEY in os.environ
    runtime.init({**_OWN_PARAMETERS, **({} if is_given else {"ddp": True}), **given})
    if session.current().device.type == "cuda":
        torch.cuda.set_device(session.current().device)
    report = measured(sizes)
    if messages.rank() > 0:
        return 0
    print(report, flush=True)
    if options.json is not None:
        try:
            write_private(options.json, json.dumps(report.as_json(), indent=2) + "\n")
        except OSError as error:
            print(f"error: the report cannot be written to {options.json}: {error.strerror}", file=sys.stderr)
            return 1
    return 1 if report.problems() else 0


def measured(sizes: Sequence[int] | None = None) -> ClusterReport:
    """The report, equal on all ranks; after ``smp.init``. Collective over the world."""
    active = session.current()
    own = _facts()
    ranks = messages.told_by_all(own, CommGroup.WORLD, "cluster-check: what the ranks are")
    reductions: list[Reduction] = []
    for axis in _axes():
        group = active.groups.of(axis)
        messages.barrier()
        for size in sizes or (SIZES_OF_GPUS if own.nccl_interface else SIZES):
            reductions.append(_reduce(group, size))
    clocks = _clocks([facts.host for facts in ranks])
    told = messages.told_by_all((reductions, clocks), CommGroup.WORLD, "cluster-check: what was measured")
    return ClusterReport(
        tuple(ranks),
        _by_group([one for measurements, _ in told for one in measurements]),
        tuple(told[0][1]),
        may_share_devices=active.config.shares_devices,
    )


def _axes() -> list[GroupKind]:
    """Where there is something to reduce; an axis that is the whole world is measured once."""
    groups = session.current().groups
    world = groups.world.size
    own = [axis for axis in _AXES[1:] if 1 < groups.of(axis).size < world]
    whole = [axis for axis in _AXES[1:] if groups.of(axis).size == world > 1]
    return [*(whole[:1] or ([GroupKind.WORLD] if world > 1 else [])), *own]


def _reduce(group: Group, num_bytes: int) -> Reduction:
    """All groups of the axis at the same time, as in training. Collective over the group."""
    active = session.current()
    device = active.device if "nccl" in session.backend_for(active.config, active.device) else torch.device("cpu")
    purpose = f"cluster-check: the all-reduce of {num_bytes} bytes over the {group.kind} group"
    values = torch.full((num_bytes // 4,), float(group.rank_in_group + 1), device=device)

    def once(tensor: torch.Tensor) -> tuple[torch.Tensor, float]:
        start = time.perf_counter()
        total = start_all_reduce(tensor, group).wait(purpose)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return total, time.perf_counter() - start

    total, _ = once(values)
    is_right = bool((total == group.size * (group.size + 1) / 2).all())
    _, seconds = once(values)
    # The ranks do it equally often, and nobody begins while others still wait.
    slowest = max(row[0] for row in exchange_integers((int(seconds * 1e9),), group, purpose)) / 1e9
    rounds = max(3, min(_MOST_ROUNDS, round(_SECONDS / max(slowest, 1e-6))))
    times = [once(values)[1] for _ in range(rounds)]
    return Reduction(str(group.kind), group.ranks, num_bytes, statistics.median(times), is_right)


def _by_group(measurements: Sequence[Reduction]) -> tuple[Reduction, ...]:
    """What the members of a group have measured, as one: the slowest of them."""
    groups: dict[tuple[str, tuple[int, ...], int], list[Reduction]] = {}
    for one in measurements:
        groups.setdefault((one.axis, one.ranks, one.num_bytes), []).append(one)
    return tuple(
        Reduction(*key, max(one.seconds for one in members), all(one.is_right for one in members))
        for key, members in groups.items()
    )


def _clocks(hosts: Sequence[str]) -> list[Clock]:
    """The clock of each host beside that of rank 0's: asked with the shortest way there and back of several. Known on
    rank 0. Collective over the world.
    """
    first_ranks = {host: hosts.index(host) for host in hosts}
    own = messages.rank()
    clocks = [Clock(hosts[0], 0.0, 0.0)]
    for host, peer in list(first_ranks.items())[1:]:
        best = Clock(host, 0.0, float("inf"))
        for _ in range(_CLOCK_ROUNDS):
            if own == 0:
                sent = time.time()
                messages.send(None, peer, RankType.WORLD_RANK)
                there = messages.recv_from(peer, RankType.WORLD_RANK)
                back = time.time()
                if (uncertainty := (back - sent) / 2) < best.uncertainty:
                    best = Clock(host, there - (sent + back) / 2, uncertainty)
            elif own == peer:
                messages.recv_from(0, RankType.WORLD_RANK)
                messages.send(time.time(), 0, RankType.WORLD_RANK)
        clocks.append(best)
    return clocks


def _facts() -> RankFacts:
    active = session.current()
    device, has_nccl = active.device, "nccl" in session.backend_for(active.config, active.device)
    name, device_id = f"cpu: {platform.machine()}, {os.cpu_count()} cores", ""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, device_id = f"cuda: {properties.name}", str(getattr(properties, "uuid", device.index))
    return RankFacts(
        global_rank=active.identity.global_rank,
        host=socket.gethostname(),
        local_rank=active.identity.local_rank,
        launcher=active.identity.source,
        device=name,
        device_id=device_id,
        interface=_interface(),
        nccl_interface=os.environ.get("NCCL_SOCKET_IFNAME", "its own choice") if has_nccl else "",
        versions=_versions(has_nccl),
        parameters={name: value for name, value in active.config.given.items() if name not in _OWN_PARAMETERS},
    )


def _interface() -> str:
    """Where gloo listens: at an interface that is named, or at the address of the host's own name."""
    named = os.environ.get("GLOO_SOCKET_IFNAME")
    if named:
        return named
    try:
        return f"{socket.gethostbyname(socket.gethostname())} (by the host's name)"
    except OSError:
        return "the loopback (the host's name does not resolve)"


def _versions(has_nccl: bool) -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "modelparallel": __version__}
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
    if has_nccl:
        found["NCCL"] = ".".join(map(str, _nccl_version()))
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _nccl_version() -> tuple[Any, ...]:
    found: Any = torch.cuda.nccl.version()
    return found if isinstance(found, tuple) else (found,)


if __name__ == "__main__":
    sys.exit(main())
