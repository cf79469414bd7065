"""What the launcher of node 0 decides for all hosts of a job: who takes part in an attempt, and how it ended.

Pure functions of what the hosts have said; see [Note: nodes] in node_store.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from modelparallel.config.table import Config
from modelparallel.errors import LaunchError, SMPConfigError
from modelparallel.job.preemption import EXIT_PREEMPTED
from modelparallel.launch.attempts import Attempt
from modelparallel.launch.clusters.description import HOST_LOST_EXIT_CODE
from modelparallel.launch.failures import Candidate, RankFailure

#: A traceback is passed on up to this size; the beginning goes first, since the end names the error.
MAX_DETAIL_BYTES = 16 << 10


@dataclass(frozen=True)
class Offer:
    """What a host brings to an attempt, or why it cannot.

    `first_address` is the address at which it has reached node 0; "" on node 0.
    """

    node: int
    host: str
    num_processes: int
    first_address: str = ""
    parameters: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class Member:
    """A host that takes part in an attempt, with so many processes."""

    node: int
    host: str
    num_processes: int


@dataclass(frozen=True)
class Plan:
    """Who takes part in an attempt, in the order of their ranks; or why nothing is started."""

    members: tuple[Member, ...]
    first_address: str = ""
    error: str = ""

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(member.num_processes for member in self.members)

    def place_of(self, node: int) -> int | None:
        """The place of a node among the members; None if it does not take part."""
        return next((place for place, member in enumerate(self.members) if member.node == node), None)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Plan:
        members = tuple(Member(**member) for member in record["members"])
        return Plan(members, record["first_address"], record["error"])


@dataclass(frozen=True)
class End:
    """How an attempt ended on one host. `time` is that of the failure or of the stop, by the clock of node 0; `stop` is
    why it was stopped from outside, "" if it was not.
    """

    node: int
    exit_code: int
    time: float = 0.0
    stop: str = ""
    message: str = ""
    candidate: Candidate | None = None

    def to_json(self) -> dict[str, Any]:
        record = asdict(self)
        if self.candidate is not None:
            record["candidate"]["failure"] = _failure_record(self.candidate.failure)
        return record

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> End:
        candidate = record["candidate"]
        if candidate is not None:
            candidate = Candidate(candidate["is_consequence"], candidate["time"], _failure_of(candidate["failure"]))
        return End(**{**record, "candidate": candidate})


@dataclass(frozen=True)
class Loss:
    """A host that has vanished: the time at which it was last heard of, and what is known."""

    member: Member
    time: float
    how: str

    @property
    def text(self) -> str:
        return f"host {self.member.host} (node {self.member.node}) was lost: {self.how}"


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended on all hosts: what came first, in one line and as a failure, and the exit code."""

    exit_code: int
    reason: str = ""
    is_stopped: bool = False
    failure: RankFailure | None = None


@dataclass(frozen=True)
class AttemptVerdict:
    """What node 0 says of an attempt, for all hosts to show; whether the job is started again."""

    outcome: Outcome
    attempt: Attempt
    message: str
    has_restart: bool = False

    def to_json(self) -> dict[str, Any]:
        record = asdict(self)
        if self.outcome.failure is not None:
            record["outcome"]["failure"] = _failure_record(self.outcome.failure)
        return record

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> AttemptVerdict:
        failure = record["outcome"]["failure"]
        failure = None if failure is None else _failure_of(failure)
        outcome = Outcome(**{**record["outcome"], "failure": failure})
        return AttemptVerdict(outcome, Attempt(**record["attempt"]), record["message"], record["has_restart"])


def _failure_record(failure: RankFailure) -> dict[str, Any]:
    return {**asdict(failure), "log": str(failure.log), "detail": shortened(failure.detail)}


def _failure_of(record: Mapping[str, Any]) -> RankFailure:
    return RankFailure(**{**record, "log": Path(record["log"])})


def shortened(detail: str) -> str:
    """The end of a text that is longer than what is passed on."""
    data = detail.encode()
    if len(data) <= MAX_DETAIL_BYTES:
        return detail
    return "(the beginning is in the log)\n..." + data[-MAX_DETAIL_BYTES:].decode(errors="ignore")


def unique_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names of hosts, each another one: two containers may have been given the same."""
    return tuple(
        name if names.count(name) == 1 else f"{name}-{names[: place + 1].count(name)}"
        for place, name in enumerate(names)
    )


def choose_members(
    offers: Sequence[Offer], least: int, most: int, config: Config | None, *, may_shrink: bool
) -> tuple[Member, ...]:
    """Who takes part: all, with all that they bring; with a range of nodes the most processes that fit the degrees.

    Args:
        offers: in the order of the nodes.
        may_shrink: a range was given, so that a host may take part with fewer processes than it brings, or not at all.

    Raises `LaunchError` if there is nothing that fits.
    """
    offers = offers[:most]
    names = unique_names([offer.host for offer in offers])
    told = ", ".join(f"{offer.num_processes} on {name}" for offer, name in zip(offers, names, strict=True))
    total = sum(offer.num_processes for offer in offers)
    if len(offers) < least:
        raise LaunchError(f"{len(offers)} of at least {least} nodes are there ({told or 'none'})")
    problem = ""
    counts = range(total, 0, -1) if may_shrink else (total,)
    for count in counts:
        if config is not None:
            try:
                config.check_world(count)
            except SMPConfigError as error:
                problem = str(error)
                continue
        members, left = [], count
        for offer, name in zip(offers, names, strict=True):
            size = min(left, offer.num_processes)
            left -= size
            if size:
                members.append(Member(offer.node, name, size))
        if len(members) < least:
            problem = problem or f"{count} processes are on {len(members)} nodes, and at least {least} are to take part"
            continue
        return tuple(members)
    fewer = " or fewer" if may_shrink else ""
    raise LaunchError(
        f"{total} processes{fewer} on {len(offers)} nodes ({told}) do not fit the parameters: {problem}. Change "
        "--nproc on the nodes, the number of nodes, or the degrees"
    )


def check_agreement(offers: Sequence[Offer]) -> list[str]:
    """Raise `LaunchError` if the hosts have been told different jobs; returns warnings."""
    first, *others = offers
    warnings = []
    for other in others:
        if first.parameters != other.parameters:
            ours, theirs = first.parameters or {}, other.parameters or {}
            differing = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
            told = ", ".join(f"{name}: {ours.get(name)!r} and {theirs.get(name)!r}" for name in differing[:3])
            raise LaunchError(
                f"{first.host} (node {first.node}) and {other.host} (node {other.node}) were given different "
                f"--parameters ({told or 'one has none'}): give the same on all nodes"
            )
        warnings += [
            f"warning: {other.host} has {name} {its}, {first.host} has {ours}"
            for name, ours in first.versions.items()
            if (its := other.versions.get(name)) != ours
        ]
    return warnings


def outcome_of(ends: Sequence[End], losses: Sequence[Loss]) -> Outcome:
    """What came first over all hosts, in the order: a failure of a process's own or a host that was lost, or a stop,
    whichever was earlier; then a preemption; then failures that follow from another's.
    """
    own: list[tuple[float, Outcome]] = [(loss.time, Outcome(HOST_LOST_EXIT_CODE, loss.text)) for loss in losses]
    following: list[tuple[float, Outcome]] = []
    for end in ends:
        if end.stop:
            own.append((end.time, Outcome(end.exit_code, end.stop, is_stopped=True)))
        if end.candidate is not None:
            failure = end.candidate.failure
            code = failure.process_exit_code or end.exit_code or 1
            target = following if end.candidate.is_consequence else own
            target.append((end.candidate.time, Outcome(code, failure.reason, failure=failure)))
    if own:
        return min(own, key=lambda item: item[0])[1]
    if any(end.exit_code == EXIT_PREEMPTED and end.candidate is None for end in ends):
        return Outcome(EXIT_PREEMPTED, "it was preempted", is_stopped=True)
    if following:
        return min(following, key=lambda item: item[0])[1]
    failed = next((end for end in ends if end.exit_code), None)
    return Outcome(0) if failed is None else Outcome(failed.exit_code, failed.message)
