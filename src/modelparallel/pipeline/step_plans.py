"""The plans of the kinds of steps: made from the discovery step of each, equal on all stages."""

from __future__ import annotations

import json
import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from modelparallel.comm.groups import Group
from modelparallel.comm.stages.transport import MessageKind, MessageName, StageTransport
from modelparallel.pipeline.lockstep import IN_TURN, is_same_on_all
from modelparallel.pipeline.program.program import Program
from modelparallel.pipeline.schedule.chains import StepPlan, WayRecorder, Work, build_chain, with_local_waits
from modelparallel.pipeline.schedule.checks import check_schedule
from modelparallel.pipeline.schedule.making import make_schedule
from modelparallel.pipeline.side_doors.ledger import LedgerEntry, compare
from modelparallel.plan.schedule import BACKWARD_FIRST

_PLAN = MessageName(MessageKind.PLAN, 0, 0)
_END = MessageName(MessageKind.PLAN, 0, 1)
_WHAT = "what the stages know of the step's plan"
_DONE = "that the hooks in the backward have kept nothing"
#: A kind of step whose programs have left its plan so often runs in discovery order from then on.
_MAX_MISSES = 3
#: The planned step in which predicted and measured waiting are compared: by then caches are warm.
_COMPARED_RUN = 3

logger = logging.getLogger("modelparallel.pipeline")


@dataclass(frozen=True)
class StepCounts:
    """How many steps have run in which way, for tests and reports.

    Attributes:
        discovered: the first of their kind, in discovery order, written down.
        planned: by the plan, to the end.
        left: begun by the plan; some program has gone another way.
        unplanned: later steps of a kind that stays in discovery order.
    """

    discovered: int = 0
    planned: int = 0
    left: int = 0
    unplanned: int = 0


@dataclass(frozen=True)
class _Findings:
    """What one stage tells the others of a discovery step: see :class:`WayRecorder`."""

    waits: tuple[tuple[int, int], ...]
    carries_state: bool
    costs: Mapping[int, Work]
    ledger: tuple[LedgerEntry, ...]

    def to_bytes(self) -> bytes:
        """For a message."""
        return json.dumps([self.waits, self.carries_state, list(self.costs.items()), self.ledger]).encode()

    @staticmethod
    def from_bytes(data: bytes) -> _Findings:
        """What :meth:`to_bytes` gave."""
        waits, carries_state, costs, ledger = json.loads(data)
        works = {place: tuple(work) for place, work in costs}
        return _Findings(tuple(map(tuple, waits)), carries_state, works, tuple(map(tuple, ledger)))


class StepPlans:
    """See the head of this file. ``schedule_kind`` as the configuration's ``pipeline``; ``active_microbatches``: the
    most that may be in flight.
    """

    def __init__(self, schedule_kind: str, active_microbatches: int | None) -> None:
        self._schedule_kind = schedule_kind
        self._active_microbatches = active_microbatches
        self._plans: dict[Hashable, StepPlan | None] = {}  # None: discovery order
        self._num_misses: dict[Hashable, int] = {}
        self._num_runs: dict[Hashable, int] = {}
        #: The ranks of this stage in all pipelines that run in lockstep, see lockstep.py; None: there is one.
        self.lockstep_group: Group | None = None
        #: Whether the first stage writes what is planned and measured to the log.
        self.are_logged = True
        #: How the steps so far have run; equal on all stages.
        self.counts = StepCounts()

    def __len__(self) -> int:
        return len(self._plans)

    @property
    def has_backward(self) -> bool:
        """Whether steps may run backwards at all."""
        return self._schedule_kind != "_only_forward"

    def clear(self) -> None:
        """Forget all plans."""
        self._plans.clear()
        self._num_misses.clear()
        self._num_runs.clear()

    @property
    def last(self) -> StepPlan | None:
        """The plan that was made last, for reports; None: discovery order."""
        return next(reversed(self._plans.values()), None)

    def get(self, kind: Hashable) -> StepPlan | None:
        """The plan for steps of this kind; None: discovery order."""
        return self._plans.get(kind)

    def limit_of(self, plan: StepPlan | None, num_microbatches: int) -> int:
        """How many microbatches may be under way on a stage that does not follow ``plan`` (any more)."""
        is_limited = plan is not None and plan.schedule.kind in BACKWARD_FIRST
        return self._active_microbatches if is_limited and self._active_microbatches else num_microbatches

    def kinds(self) -> tuple[Hashable, ...]:
        """The kinds of steps that have run."""
        return tuple(self._plans)

    def is_open(self, kind: Hashable) -> bool:
        """Whether no such step has run yet."""
        return kind not in self._plans

    def note_run(self, kind: Hashable, *, has_left: bool) -> None:
        """A step that was not the first of its kind is over; ``has_left``: some program has gone another way than
        planned, which all stages have seen.
        """
        if self._plans.get(kind) is None:
            self.counts = replace(self.counts, unplanned=self.counts.unplanned + 1)
        elif not has_left:
            self.counts = replace(self.counts, planned=self.counts.planned + 1)
        else:
            self.counts = replace(self.counts, left=self.counts.left + 1)
            misses = self._num_misses[kind] = self._num_misses.get(kind, 0) + 1
            if misses >= _MAX_MISSES and self.lockstep_group is None:  # the other pipelines may have had fewer
                self._plans[kind] = None

    def note_discovery(
        self, kind: Hashable, programs: Sequence[Program], costs: Mapping[str, Work], transport: StageTransport
    ) -> StepPlan | None:
        """The forwards of the first step of this kind have run: make its plan. Collective over the pipeline."""
        self.counts = replace(self.counts, discovered=self.counts.discovered + 1)
        recorders = [program.tracker for program in programs if isinstance(program.tracker, WayRecorder)]
        carries_state = any(program.carries_state for program in programs)
        # The last one is like those of later steps: the first also reads what it finds the structure of results with.
        ledger = programs[-1].ledger
        own = _Findings(
            recorders[-1].local_waits(),
            carries_state,
            recorders[-1].costs,
            () if ledger is None else tuple(ledger.entries),
        )
        for peer in transport.peers():
            transport.send_object(peer, _PLAN, own.to_bytes(), _WHAT)
        told = {peer: _Findings.from_bytes(transport.receive_object(peer, _PLAN, _WHAT)) for peer in transport.peers()}
        told[transport.stage] = own
        compare({stage: findings.ledger for stage, findings in told.items()})
        counted = {position: work for findings in told.values() for position, work in findings.costs.items()}
        plan = self._made(programs, recorders, told, costs, counted, transport.num_stages)
        if self.lockstep_group is not None and not is_same_on_all(self.lockstep_group, _described(plan)):
            plan = self._made(programs, recorders, told, {}, {}, transport.num_stages)
            if not is_same_on_all(self.lockstep_group, _described(plan)):
                plan = None
        if self.lockstep_group is not None and plan is not None and not plan.chain.is_straight:
            plan = None
            if transport.stage == 0 and self.are_logged:
                logger.warning(IN_TURN)
        self._plans[kind] = plan
        if plan is None:
            return None
        transport.open_channels(plan.moves)
        if transport.stage == 0 and self.are_logged:
            logger.info("Pipeline schedule: %s", plan.description())
        return plan

    def _made(
        self,
        programs: Sequence[Program],
        recorders: Sequence[WayRecorder],
        told: Mapping[int, _Findings],
        costs: Mapping[str, Work],
        counted: Mapping[int, Work],
        num_stages: int,
    ) -> StepPlan | None:
        """The plan; None where the microbatches do not go one way, or cannot take turns."""
        ways = [tuple(entry for entry in recorder.common() if entry[0] != "C") for recorder in recorders]
        if any(way != ways[0] for way in ways):
            return None
        recorded = with_local_waits(recorders[-1].common(), {stage: findings.waits for stage, findings in told.items()})
        chain, starts, entries = build_chain(recorded, num_stages, costs, counted)
        if any(findings.carries_state for findings in told.values()) and not chain.is_straight:
            # A microbatch leaves something behind that the next one finds, so they cannot take turns.
            return None
        schedule_kind = self._schedule_kind
        if not self.has_backward or not any(program.has_root for program in programs):
            schedule_kind = "forward_only"
        schedule = make_schedule(chain, len(programs), schedule_kind, self._active_microbatches)
        check_schedule(schedule, chain, self._active_microbatches)
        return StepPlan(entries, starts, chain, schedule)

    @staticmethod
    def meet(transport: StageTransport) -> None:
        """After the first step of a kind, whose hooks may have failed on one stage: nobody goes on alone.

        Collective over the pipeline.
        """
        for peer in transport.peers():
            transport.send_object(peer, _END, b"done", _DONE)
        for peer in transport.peers():
            transport.receive_object(peer, _END, _DONE)

    def compare(
        self, kind: Hashable, programs: Sequence[Program], waiting_share: float, transport: StageTransport
    ) -> None:
        """Once for each plan, after some steps: say how much the stages really wait. Collective over the pipeline.

        ``waiting_share``: the part of this step's forwards and backwards in which this stage waited for others.
        """
        plan = self._plans.get(kind)
        if plan is None or any(program.tracker.has_left for program in programs):
            return
        runs = self._num_runs[kind] = self._num_runs.get(kind, 0) + 1
        if runs != _COMPARED_RUN:
            return
        if transport.stage != 0:
            transport.send_object(0, _PLAN, json.dumps(waiting_share).encode(), _WHAT)
            return
        shares = [waiting_share]
        shares += [json.loads(transport.receive_object(peer, _PLAN, _WHAT)) for peer in transport.peers()]
        if not self.are_logged:
            return
        predicted = plan.idle_shares()
        logger.info(
            "Pipeline schedule, after %d steps: the stages wait %s of their time (predicted: %s)",
            runs,
            ", ".join(f"{share:.0%}" for share in shares),
            ", ".join(f"{share:.0%}" for share in predicted),
        )


def _described(plan: StepPlan | None) -> str:
    return "" if plan is None else str(plan.schedule.actions)
