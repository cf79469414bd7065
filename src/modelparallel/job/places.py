"""Where the processes of a job are: which of them share a host, and by which interfaces the hosts reach each other.

Found out once all have met, by what each tells. Local ranks are counted here only where the launcher has not said
them: a guessed one is a GPU of another process.
"""

from __future__ import annotations

import contextlib
import os
import socket
import uuid
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from modelparallel.errors import CommunicationError, SMPConfigError
from modelparallel.job import interfaces
from modelparallel.job.discovery import ProcessIdentity
from modelparallel.job.meeting import told_by_all

_MOST_NAMED = 8


@dataclass(frozen=True)
class Places:
    """By global rank: what tells its host from others, the host's name, and the address that others reach it by
    ("" where that is not known, or there is one host).
    """

    machines: tuple[str, ...]
    names: tuple[str, ...]
    addresses: tuple[str, ...]

    @classmethod
    def of_one_host(cls, world_size: int) -> Places:
        """All processes are here, as their launcher has said."""
        return cls(("",) * world_size, (socket.gethostname(),) * world_size, ("",) * world_size)

    @property
    def is_one_host(self) -> bool:
        """Whether all processes share this host."""
        return len(set(self.machines)) == 1

    def described(self) -> str:
        """Which ranks are on which host, for errors."""
        lines = []
        for machine in dict.fromkeys(self.machines):
            ranks = [rank for rank, other in enumerate(self.machines) if other == machine]
            address = self.addresses[ranks[0]]
            is_run = len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1
            listed = f"{ranks[0]} to {ranks[-1]}" if is_run else ", ".join(map(str, ranks))
            several = "ranks" if len(ranks) > 1 else "rank"
            lines.append(f"global {several} {listed} on {self.names[ranks[0]]}{f' ({address})' if address else ''}")
        left = f", and {len(lines) - _MOST_NAMED} more hosts" if len(lines) > _MOST_NAMED else ""
        return "; ".join(lines[:_MOST_NAMED]) + left

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Let errors of what the processes of several hosts do together name the hosts."""
        try:
            yield
        except CommunicationError as error:
            if self.is_one_host:
                raise
            raise type(error)(f"{error}\nThe hosts: {self.described()}") from error.__cause__


def find_places(
    store: dist.Store,
    identity: ProcessIdentity,
    environ: MutableMapping[str, str],
    store_host: str,
    seconds: float,
    *,
    may_choose: bool,
) -> tuple[ProcessIdentity, Places]:
    """(who this process is, with its place on its host; where all are). Collective over the world, which has met.

    On several hosts the interfaces are chosen, and set in ``environ``, unless they were; ``may_choose``: no group of
    processes exists yet. Raises `SMPConfigError`, on all ranks, where a host has none that leads to the others.

    Args:
        store_host: as this process reaches the store; empty if that is not known.
    """
    address = interfaces.address_towards(store_host)
    own: dict[str, Any] = {"machine": _machine(), "name": socket.gethostname(), "address": address}
    told = told_by_all(store, identity, "places", own, seconds)
    places = Places(*(tuple(record[key] for record in told) for key in ("machine", "name", "address")))
    mates = [rank for rank, machine in enumerate(places.machines) if machine == own["machine"]]
    if not identity.is_host_known:
        local_rank = identity.local_rank if identity.local_rank >= 0 else mates.index(identity.global_rank)
        identity = replace(identity, local_rank=local_rank, local_world_size=len(mates))
    if places.is_one_host:
        return identity, places
    if not address:  # the store is here: another host will do
        others = [other for rank, other in enumerate(places.addresses) if rank not in mates and other]
        address = interfaces.address_towards(others[0]) if others else ""
    choice = interfaces.choose(address, environ, store_host) if may_choose else interfaces.Choice(address)
    told = told_by_all(store, identity, "interfaces", {"address": choice.address, "problem": choice.problem}, seconds)
    places = replace(places, addresses=tuple(record["address"] for record in told))
    problems = {
        f"{places.names[rank]}: {record['problem']}": None for rank, record in enumerate(told) if record["problem"]
    }
    if problems:
        raise SMPConfigError(f"the hosts of this job cannot reach each other: on {'; on '.join(problems)}")
    choice.take(environ, is_said=identity.global_rank == 0)
    return identity, places


def _machine() -> str:
    """What the processes of a host have in common, and with no process of another host: the kernel that runs, and, as
    containers share that, their network and the name that they know.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        network = str(os.stat("/proc/self/ns/net").st_ino)
    except OSError:  # not Linux
        boot, network = str(uuid.getnode()), ""
    return f"{boot} {network} {socket.gethostname()}"
