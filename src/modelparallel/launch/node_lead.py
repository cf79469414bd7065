"""Node 0's part in a job of several hosts: it gathers them, says who takes part, and how each attempt ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from modelparallel.config.reading import validate_parameters
from modelparallel.errors import LaunchError
from modelparallel.job.preemption import EXIT_PREEMPTED
from modelparallel.launch.attempts import Attempt
from modelparallel.launch.job import preempted_message
from modelparallel.launch.node_plan import (
    AttemptVerdict,
    End,
    Loss,
    Offer,
    Outcome,
    Plan,
    choose_members,
    outcome_of,
)
from modelparallel.launch.node_store import NodeStore
from modelparallel.launch.spec import JobSpec

#: Seconds in which more hosts than the least may still come, after the last one.
LAST_CALL_SECONDS = 30.0
#: After a failure each host has so long to come to its end, while it shows that it is there.
SETTLE_SECONDS = 60.0
#: How long node 0 serves the others after the end.
LEAVE_SECONDS = 10.0
POLL_SECONDS = 0.05
_SAY_SECONDS = 15.0


class Lead:
    """What node 0 knows of the others."""

    def __init__(self, store: NodeStore, job: JobSpec) -> None:
        self._store = store
        self._place = store.place
        self._nodes: list[int] = []
        self._num_heard = 0
        self._last_arrival = time.monotonic()
        # Checked before; a script without parameters decides by itself.
        self._config = None if job.parameters is None else validate_parameters(job.parameters, num_processes=None)

    def gather(self, seconds: float, say: Callable[[str], None]) -> tuple[list[Offer], Plan]:
        """Wait for the hosts to come, and choose; raises `LaunchError`."""
        deadline, say_at = time.monotonic() + seconds, time.monotonic() + _SAY_SECONDS
        while True:
            offers = self._offers(1)
            if problems := [f"{offer.host} (node {offer.node}): {offer.error}" for offer in offers if offer.error]:
                raise LaunchError("; ".join(problems))
            is_late = time.monotonic() >= deadline
            is_called = time.monotonic() >= self._last_arrival + LAST_CALL_SECONDS
            if len(offers) >= self._place.most or (len(offers) >= self._place.least and (is_late or is_called)):
                try:
                    return offers, self.chosen(offers)
                except LaunchError:
                    if is_late or len(offers) >= self._place.most:
                        raise
            elif is_late:
                raise LaunchError(self._missing(offers, seconds))
            if time.monotonic() >= say_at:
                say_at = time.monotonic() + 4 * _SAY_SECONDS
                say(f"{self._missing(offers, None)}; waiting")
            time.sleep(POLL_SECONDS)

    def gather_again(self, number: int, seconds: float) -> Plan:
        """Wait for what those that are left bring to another attempt, and choose; raises `LaunchError`."""
        deadline = time.monotonic() + seconds
        while True:
            offers = self._offers(number)
            told = {offer.node for offer in offers}
            waited_for = [node for node in self._nodes if node not in told and not self._is_away(node)]
            if not waited_for:
                break
            if time.monotonic() >= deadline:
                if self._place.least == self._place.most:
                    raise LaunchError(f"nodes {waited_for} did not say within {seconds:.0f} s what they can start")
                break
            time.sleep(POLL_SECONDS)
        problems = [f"{offer.host} (node {offer.node}): {offer.error}" for offer in offers if offer.error]
        usable = [offer for offer in offers if not offer.error]
        if problems and (self._place.least == self._place.most or len(usable) < self._place.least):
            raise LaunchError("; ".join(problems))
        return self.chosen(usable)

    def chosen(self, offers: Sequence[Offer]) -> Plan:
        """The plan of an attempt with these hosts; raises `LaunchError`."""
        place = self._place
        members = choose_members(offers, place.least, place.most, self._config, may_shrink=place.least != place.most)
        seen = {offer.node: offer.first_address for offer in offers}
        return Plan(members, next((seen[member.node] for member in members if seen[member.node]), ""))

    def settle(
        self, number: int, plan: Plan, own_end: End, max_restarts: int, name: str, started: float
    ) -> AttemptVerdict:
        """Wait until every host has come to its end, or is lost, and say how the attempt ended."""
        ends, losses = self._ends(number, plan, own_end)
        seconds = self._store.now() - started
        outcome = outcome_of(ends, losses)
        is_fixed = self._place.least == self._place.most
        has_restart = outcome.exit_code != 0 and not outcome.is_stopped and number <= max_restarts
        message = _message(outcome, name, plan, seconds)
        if has_restart and losses and is_fixed:
            has_restart = False
            message = (
                f"the job is not started again: all of its {self._place.most} nodes are needed (with --nnodes "
                f"MIN:{self._place.most} it would go on with fewer)\n{message}"
            )
        first_rank = None if outcome.failure is None else outcome.failure.global_rank
        reason = outcome.reason if outcome.exit_code else ""
        attempt = Attempt(number, sum(plan.sizes), started, seconds, outcome.exit_code, first_rank, reason)
        return AttemptVerdict(outcome, attempt, message, has_restart)

    def see_off(self) -> None:
        """Serve the others until they have read what they need, and have left."""
        deadline = time.monotonic() + LEAVE_SECONDS
        while time.monotonic() < deadline:
            self._arrivals()
            if all(self._has_left(node) for node in self._nodes if node):
                return
            time.sleep(POLL_SECONDS)

    def _has_left(self, node: int) -> bool:
        return self._store.value(f"left/{node}") is not None

    def _is_away(self, node: int) -> bool:
        return self._store.is_lost(node) or self._has_left(node)

    def lost(self, number: int, plan: Plan) -> list[Loss]:
        """The members that have vanished before their processes had come to their end in the attempt."""
        return [
            Loss(member, self._store.now() - self._store.silence(member.node), self._store.how_lost(member.node))
            for member in plan.members
            # Asked of all from the beginning: what a node has said shortly before it vanished is known then.
            if member.node
            and self._store.value(f"end/{number}/{member.node}") is None
            and self._store.is_lost(member.node)
        ]

    def _ends(self, number: int, plan: Plan, own_end: End) -> tuple[list[End], list[Loss]]:
        deadline: float | None = None
        while True:
            ends = {0: own_end}
            for member in plan.members:
                if member.node and (record := self._store.value(f"end/{number}/{member.node}")) is not None:
                    ends[member.node] = End.from_json(record)
            losses = [loss for loss in self.lost(number, plan) if loss.member.node not in ends]
            away = {loss.member.node for loss in losses}
            missing = [member for member in plan.members if member.node not in ends and member.node not in away]
            if not missing:
                return list(ends.values()), losses
            is_failing = losses or any(end.exit_code for end in ends.values())
            if deadline is None and (is_failing or self._store.value(f"trouble/{number}") is not None):
                deadline = time.monotonic() + SETTLE_SECONDS
                self._store.put(f"trouble/{number}", 0)
            if deadline is not None and time.monotonic() >= deadline:
                silent = [member for member in missing if self._store.silence(member.node) > SETTLE_SECONDS / 4]
                if not silent:
                    how = f"it did not come to its end within {SETTLE_SECONDS:.0f} s of a failure"
                    late = [Loss(member, self._store.now(), how) for member in missing]
                    return list(ends.values()), losses + late
            time.sleep(POLL_SECONDS)

    def _offers(self, number: int) -> list[Offer]:
        self._arrivals()
        records = [self._store.value(f"offers/{number}/{node}") for node in self._nodes]
        offers = [Offer(**record) for record in records if record is not None]
        return sorted(offers, key=lambda offer: offer.node)

    def _arrivals(self) -> None:
        while (node := self._store.value(f"joined/{self._num_heard + 1}")) is not None:
            self._num_heard += 1
            self._nodes.append(node)
            if node:
                self._store.follow(node)
            self._last_arrival = time.monotonic()

    def _missing(self, offers: Sequence[Offer], seconds: float | None) -> str:
        place = self._place
        there = ", ".join(f"{offer.host} (node {offer.node})" for offer in offers) or "none"
        away = sorted(set(range(place.most)) - {offer.node for offer in offers})
        nodes = str(place.most) if place.least == place.most else f"{place.least} to {place.most}"
        named = f"; missing: node {', '.join(map(str, away[:8]))}" if place.node_rank is not None else ""
        within = "" if seconds is None else f" within {seconds:.0f} s"
        return f"{len(offers)} of {nodes} nodes have come to {place.host}:{place.port}{within}: {there}{named}"


def _message(outcome: Outcome, name: str, plan: Plan, seconds: float) -> str:
    if outcome.exit_code == 0:
        return ""
    if outcome.failure is not None:
        return outcome.failure.render(sum(plan.sizes), seconds)
    if outcome.exit_code == EXIT_PREEMPTED:
        return preempted_message(name, seconds)
    if outcome.is_stopped:
        return outcome.reason
    return f"job {name} failed after {seconds:.1f} s: {outcome.reason}"
