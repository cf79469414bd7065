"""How the processes of a job come together at a store.

[Note: the meeting] A store may be another's. Two jobs on one host may have been given the same port; a store of
torchrun's agent outlives the processes, and holds what those of earlier attempts have left. Who then reads an address
there connects to a process that is not of its job, or gone. So

1. global rank 0 writes a greeting: the marks of its job, a digest of its configuration, and a name of this meeting that
   nobody has used;
2. the others read it before they write anything. If it is of another job, or another process has come in the place of
   this rank, they stop there, and that job is not disturbed. Where processes can be started again at the same store,
   the greeting may be of an earlier attempt: they wait for a new one;
3. each says below the name of the meeting that it has come. When all have, rank 0 says so. All that the processes tell
   each other afterwards stands below that name.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from modelparallel.comm.lookout import Lookout
from modelparallel.comm.waits import watch
from modelparallel.errors import CommunicationError
from modelparallel.job.discovery import ProcessIdentity, has_own_marks

_GREETING = "modelparallel/greeting"
_ALL = "all"


@dataclass(frozen=True)
class Meeting:
    """What a process needs to meet the others of its job.

    Attributes:
        marks: tell the job from others; `discovery.job_marks`.
        settings: the configuration.
        place: of the store, for errors.
        is_of_rank_0: the process of global rank 0 serves the store, which therefore goes with it.
        is_own: nobody but the processes of this job reaches the store.
        seconds: the longest that they wait for each other.
    """

    store: dist.Store
    identity: ProcessIdentity
    marks: Mapping[str, str]
    settings: Mapping[str, Any]
    place: str
    is_of_rank_0: bool
    is_own: bool
    seconds: float
    lookout: Lookout

    def hold(self) -> dist.Store:
        """Wait until all processes of the job have come; the part of the store that is theirs. Collective over the
        world.

        Raises WaitTimeoutError, which names those that did not come in time, and CommunicationError where another job
        is at the store.
        """
        deadline = time.monotonic() + self.seconds
        if self.identity.global_rank == 0:
            return self._call(deadline)
        greeting: dict[str, Any] = {}
        while True:
            greeting = self._next_greeting(greeting, deadline)
            hall = dist.PrefixStore(f"modelparallel/{greeting['meeting']}", self.store)
            if self._takes_place(greeting, hall) and self._wait_in(hall, greeting, deadline):
                return hall

    def _call(self, deadline: float) -> dist.Store:
        if self.store.check([_GREETING]):
            left = self._greeting()
            if problem := self._other_job(left):
                raise self._refusal(left, problem)
        greeting = {
            "meeting": secrets.token_hex(8),
            "marks": dict(self.marks),
            "settings": _digest(self.settings),
            "process": _this_process(),
        }
        hall = dist.PrefixStore(f"modelparallel/{greeting['meeting']}", self.store)
        self.store.set(_GREETING, json.dumps(greeting))
        others = range(1, self.identity.world_size)

        def missing() -> Sequence[int]:
            return [rank for rank in others if not hall.check([str(rank)])]

        self._until(lambda: not others or hall.check([str(rank) for rank in others]), missing, deadline)
        hall.set(_ALL, "")
        return hall

    def _greeting(self) -> dict[str, Any]:
        text = self.store.get(_GREETING)
        try:
            greeting = json.loads(text)
            return {key: greeting[key] for key in ("meeting", "marks", "settings", "process")}
        except (ValueError, KeyError, TypeError) as error:
            raise CommunicationError(
                f"what was written at {self.place} is not of this library: {text[:80]!r}"
            ) from error

    def _next_greeting(self, last: dict[str, Any], deadline: float) -> dict[str, Any]:
        """Another greeting than the last one."""

        def has_come() -> bool:
            return self.store.check([_GREETING]) and (not last or self._greeting() != last)

        left = f"; what stands there is of {last['process']}, and of another attempt or job" if last else ""
        self._until(has_come, lambda: [0], deadline, left)
        return self._greeting()

    def _takes_place(self, greeting: dict[str, Any], hall: dist.Store) -> bool:
        """Say that this rank has come, if it is awaited in this meeting. Raises CommunicationError if it is another
        job's.
        """
        if problem := self._other_job(greeting):
            raise self._refusal(greeting, problem)
        if greeting["marks"].get("world size") != self.marks.get("world size"):
            return False
        own = str(self.identity.global_rank)
        there = hall.get(own).decode() if hall.check([own]) else ""
        if not there:
            there = hall.compare_set(own, "", _this_process()).decode()
            if there == _this_process():
                return True
        if self.is_of_rank_0 and there != _this_process():
            raise self._refusal(greeting, f"{there} is global rank {own} of that job")
        return False  # of an earlier attempt, or of an earlier session of this process

    def _wait_in(self, hall: dist.Store, greeting: dict[str, Any], deadline: float) -> bool:
        """Wait until all have come. False: the job starts again without this meeting."""
        is_all = False

        def is_over() -> bool:
            nonlocal is_all
            is_all = hall.check([_ALL])
            return is_all or self._greeting() != greeting

        def missing() -> Sequence[int]:
            return [rank for rank in range(1, self.identity.world_size) if not hall.check([str(rank)])] or [0]

        self._until(is_over, missing, deadline)
        return is_all

    def _other_job(self, greeting: dict[str, Any]) -> str:
        """What shows that a greeting is of another job; empty if nothing does."""
        marks = greeting["marks"]
        differing = [name for name in self.marks if name in marks and marks[name] != self.marks[name]]
        if not self.is_of_rank_0 and "world size" in differing:
            differing.remove("world size")  # of an earlier attempt with another number of processes
        if differing:
            return ", ".join(f"its {name} is {marks[name]}, and here {self.marks[name]}" for name in differing)
        is_known = self.is_own or (has_own_marks(self.marks) and has_own_marks(marks))
        if self.is_of_rank_0 and not is_known and greeting["settings"] != _digest(self.settings):
            return "its processes are configured differently"
        return ""  # what differs in the configuration of one job is found, and named, when all have met

    def _refusal(self, greeting: dict[str, Any], problem: str) -> CommunicationError:
        rank, size = self.identity.global_rank, self.identity.world_size
        return CommunicationError(
            f"global rank {rank} of {size} (from {self.identity.source}, {_this_process()}) has found another job at "
            f"{self.place}, of {greeting['process']}: {problem}. If it is another job, give each a port of its own "
            "(MASTER_PORT, or the parameter ddp_port); if not, start all processes anew, with the same variables and "
            "the same parameters of smp.init"
        )

    def _until(
        self, condition: Callable[[], bool], missing: Callable[[], Sequence[int]], deadline: float, left: str = ""
    ) -> None:
        def described(line: str, verb: str) -> str:
            rank = self.identity.global_rank
            return f"smp.init: global rank {rank} {verb} at {line} for the processes of the global ranks {missing()}"

        advice = (
            f", of {self.identity.world_size}: they did not come within {self.seconds:g} s (timeout_seconds, at most "
            f"300 for this) to {self.place}. They were not started, have failed, cannot reach it, or do something "
            f"else before smp.init; see their output{left}"
        )
        watch(condition, self.lookout, described, deadline - time.monotonic(), advice)


def told_by_all(
    store: dist.Store, identity: ProcessIdentity, name: str, value: Mapping[str, Any], seconds: float
) -> list[dict[str, Any]]:
    """What each process says, in the order of their ranks; names are used once. Collective over the world, which has
    met at the store.
    """
    rank, own = identity.global_rank, dist.PrefixStore(name, store)
    own.set(str(rank), json.dumps(value))
    limit = datetime.timedelta(seconds=seconds)
    if rank == 0:  # so that each asks for one key, and not for one of each
        keys = [str(other) for other in range(identity.world_size)]
        own.wait(keys, limit)
        own.set(_ALL, json.dumps([json.loads(own.get(key)) for key in keys]))
    own.wait([_ALL], limit)
    told: list[dict[str, Any]] = json.loads(own.get(_ALL))
    return told


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(settings), sort_keys=True, default=repr).encode()).hexdigest()
