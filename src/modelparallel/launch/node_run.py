"""Running one node of a job of several hosts; see [Note: nodes] in node_store.py.

offers/1/K of each host, plan/1 of node 0          who takes part; one error on all of them if nothing fits
prepared/K of each host, go of node 0              nothing was started so far
trouble/1 of whoever sees a failure first          the others stop
end/1/K of each host, verdict/1 of node 0          what every host shows
offers/2/K, plan/2, ...                            if the job is started again
left/K of each host                                node 0 serves the keys until then
"""

from __future__ import annotations

import os
import platform
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from typing import Any, TextIO

from modelparallel.errors import LaunchError
from modelparallel.job import interfaces
from modelparallel.job.rendezvous import SECRET_VARIABLE
from modelparallel.launch.attempts import Attempt, write_attempts
from modelparallel.launch.clusters.description import HOST_LOST_EXIT_CODE
from modelparallel.launch.environment import job_environment, package_version
from modelparallel.launch.failures import JobInterrupted
from modelparallel.launch.fetched_channels import local_channels
from modelparallel.launch.folder import checked_job_name
from modelparallel.launch.hosts import LOOPBACK, Hosts
from modelparallel.launch.job import (
    LEAVE_SECONDS,
    ProcessesEnded,
    concluded,
    describe,
    notices,
    possible_start,
    run_job,
    run_processes,
)
from modelparallel.launch.node_folder import first_folder, other_folder
from modelparallel.launch.node_lead import POLL_SECONDS, SETTLE_SECONDS, Lead
from modelparallel.launch.node_place import NodePlace
from modelparallel.launch.node_plan import (
    AttemptVerdict,
    End,
    Offer,
    Outcome,
    Plan,
    check_agreement,
)
from modelparallel.launch.node_store import LOST_SECONDS, NodeStore, joined_store
from modelparallel.launch.processes import guarded
from modelparallel.launch.signals import asked_by_signal, ended_by_signal
from modelparallel.launch.spec import JobResult, JobSpec, check_script
from modelparallel.launch.supervision import RankMonitor

#: Seconds that the hosts of a job have to come.
JOIN_SECONDS = 600.0
#: Seconds in which a host prepares its folder, and in which it says what it brings to another attempt.
_PREPARE_SECONDS = 120.0
_OFFER_SECONDS = LEAVE_SECONDS + 180.0
#: The agents of all hosts meet within so many seconds once all launchers have agreed to start them.
_AGENT_SECONDS = 120.0
#: With more ranks than this only rank 0 and the failing one are shown.
_MOST_SHOWN = 8
_LINES_OF_FAILING = 100
_LOOPBACK_ADDRESS = "127.0.0.1"


def run_node(
    job: JobSpec,
    place: NodePlace,
    output: TextIO | None = None,
    monitor: RankMonitor | None = None,
    *,
    show_all: bool = False,
    join_seconds: float = JOIN_SECONDS,
    problem: str = "",
) -> JobResult:
    """Run the processes of this host, together with those of the others, and say how the job ended on all of them.

    Called on each host of the job, with a job that differs in nothing but the number of processes, and the folder if
    the hosts share no files. If the default folder is given, it gets the name that the job has on node 0. All hosts
    return the same exit code, and the failure that was first over all of them.

    Args:
        job: what to run here; `num_processes` are those of this host.
        place: which of the hosts this is, and where they meet.
        output: where the output of the processes goes, each line prefixed by host and rank; None: stdout.
        monitor: watches the ranks, and can be asked from another thread to stop the job.
        show_all: show the output of all ranks, also if they are more than eight.
        join_seconds: how long the hosts wait for each other at the beginning.
        problem: why this host cannot take part; then the others are told, and nothing is started on any.

    Raises:
        LaunchError: the job could not be started; nothing was started on any host.
    """
    if problem and place.most == 1:
        raise LaunchError(problem)
    if not problem:
        check_script(job.script)
    checked_job_name(job.name)
    if place.most > 1:
        local_channels(job)  # what is wrong is said before the hosts wait for each other
    job = replace(job, earlier_starts=place.restart_count)
    if place.most == 1:
        return run_job(job, output, monitor)
    if job.backend != "elastic":
        raise LaunchError(
            f"--nnodes {place.most} with backend {job.backend}: mpirun starts the processes of all hosts from one of "
            "them: run there `modelparallel run --backend mpi --hosts HOST:N,...`, or use backend elastic on each host"
        )
    if place.least != place.most and job.parameters is None:
        raise LaunchError(
            f"--nnodes {place.least}:{place.most}: a range needs --parameters, which say which numbers of processes "
            """fit the model: add it ('{"ddp": true}' for copies of a whole model), or give one number"""
        )
    stream = output or sys.stdout

    def say(text: str) -> None:
        print(f"[launcher] {text}", file=stream, flush=True)

    monitor = monitor or RankMonitor()
    with asked_by_signal(monitor), ended_by_signal(monitor), ExitStack() as stack:
        try:
            store = stack.enter_context(joined_store(place, join_seconds, say))
            return _NodeRun(job, store, stream, monitor, say, show_all, join_seconds).run(stack, problem)
        except (JobInterrupted, KeyboardInterrupt) as interruption:
            number = interruption.signal if isinstance(interruption, JobInterrupted) else signal.SIGINT
            message = f"job {job.name} was stopped by {signal.Signals(number).name} before it was started here"
            return JobResult(128 + number, 0.0, job.folder, message=message, is_stopped=True)


def own_name(place: NodePlace, node: int) -> str:
    """The name of this host: as the engine knows it, else as the host does."""
    if node < len(place.node_names):
        return place.node_names[node]
    return socket.gethostname().partition(".")[0] or f"node-{node}"


class _NodeRun:
    """One host's part in a job."""

    def __init__(
        self,
        job: JobSpec,
        store: NodeStore,
        stream: TextIO,
        monitor: RankMonitor,
        say: Callable[[str], None],
        show_all: bool,
        join_seconds: float,
    ) -> None:
        self._job = job
        self._store = store
        self._node = store.joined.node
        self._lead = Lead(store, job) if self._node == 0 else None
        self._stream = stream
        self._monitor = monitor
        self._say = say
        self._shows_all = show_all
        self._join_seconds = join_seconds
        self._own_name = own_name(store.place, self._node)
        self._is_shared = False
        self._own_attempts: list[Attempt] = []
        self._ended_by_others: float | None = None

    def run(self, stack: ExitStack, problem: str) -> JobResult:
        """Take part from the beginning to the end."""
        attempts: list[Attempt] = []
        try:
            plan = self._begin(stack, problem)
            started, number = time.monotonic(), 1
            while True:
                verdict = self._run_attempt(number, plan)
                attempts.append(verdict.attempt)
                if self._job.max_restarts and not (self._is_shared and self._node):
                    write_attempts(self._job.folder, attempts)
                if not verdict.has_restart:
                    break
                number += 1
                try:
                    plan = self._next_plan(number, verdict)
                except LaunchError as error:
                    verdict = replace(verdict, message=f"{error}\n{verdict.message}")
                    break
        finally:
            self._leave()
        outcome = verdict.outcome
        result = JobResult(
            outcome.exit_code,
            0.0,
            self._job.folder,
            outcome.failure,
            verdict.message,
            outcome.is_stopped,
        )
        return concluded(self._job, result, attempts, time.monotonic() - started, self._monitor)

    # --- before anything is started ---

    def _begin(self, stack: ExitStack, problem: str) -> Plan:
        """All hosts agree on what is started, and prepare their folders. Raises `LaunchError` on all of them."""
        self._store.put(f"offers/1/{self._node}", asdict(self._offer(problem)))
        warnings: list[str] = []
        if self._lead is not None:
            try:
                offers, plan = self._lead.gather(self._join_seconds, self._say)
                warnings = check_agreement(offers)
                self._job, told = first_folder(stack, self._job)
            except LaunchError as error:
                self._store.put("plan/1", Plan((), error=str(error)).to_json())
                raise
            self._store.put("folder", told)
            self._store.put("plan/1", plan.to_json())
        else:
            plan = self._told_plan(1, self._join_seconds + _PREPARE_SECONDS)
            try:
                told = self._await("folder", _PREPARE_SECONDS)
                self._job, self._is_shared = other_folder(stack, self._job, self._node, told)
                self._check_network(plan)
            except LaunchError as error:
                self._store.put(f"prepared/{self._node}", {"problem": str(error)})
                raise
            self._store.put(f"prepared/{self._node}", {"problem": "", "is_shared": self._is_shared})
        if self._lead is not None:
            self._store.put("go", self._all_prepared(plan))
        go = self._await("go", 2 * _PREPARE_SECONDS)
        if go["problem"]:
            raise LaunchError(go["problem"])
        if go["has_secret"] and SECRET_VARIABLE not in os.environ:
            if self._node and not self._is_shared:  # it has come later
                raise LaunchError(
                    f"the other nodes share the job folder {told['root']}, and this one does not see it: mount it "
                    f"here, or set {SECRET_VARIABLE} to a file with the same secret on all nodes"
                )
            secret = {SECRET_VARIABLE: str(self._job.folder.secret_file)}
            self._job = replace(self._job, environment={**secret, **self._job.environment})
        stack.enter_context(guarded(self._job.folder.description))
        self._monitor.attach(self._job.folder, self._stream, self._job.timeout)
        stack.callback(self._monitor.detach)
        self._say = self._monitor.say
        for line in (self._opening_line(plan), *notices(self._job), *warnings):
            self._say(line)
        return plan

    def _offer(self, error: str = "") -> Offer:
        return Offer(
            self._node,
            self._own_name,
            self._job.num_processes,
            self._store.joined.first_address,
            self._job.parameters,
            {"torch": package_version("torch"), "Python": platform.python_version()},
            error,
        )

    def _all_prepared(self, plan: Plan) -> dict[str, Any]:
        """Node 0: whether all that take part could make their folders, or else why not; whether they share a secret."""
        has_secret = True
        for member in plan.members:
            if member.node == 0:
                try:
                    self._check_network(plan)
                except LaunchError as error:
                    return {"problem": f"{member.host} (node 0): {error}"}
            else:
                told = self._await(f"prepared/{member.node}", _PREPARE_SECONDS)
                if told["problem"]:
                    return {"problem": f"{member.host} (node {member.node}): {told['problem']}"}
                has_secret = has_secret and told["is_shared"]
        return {"problem": "", "has_secret": has_secret}

    def _check_network(self, plan: Plan) -> None:
        own_place = plan.place_of(self._node)
        if own_place is not None:
            self._hosts(plan, own_place)

    def _told_plan(self, number: int, seconds: float) -> Plan:
        plan = Plan.from_json(self._await(f"plan/{number}", seconds))
        if plan.error:
            raise LaunchError(plan.error)
        return plan

    def _await(self, key: str, seconds: float) -> Any:
        """What is said under the key. Raises `LaunchError` if nobody says it in time."""
        deadline = time.monotonic() + seconds
        while (value := self._store.value(key)) is None:
            if self._store.is_lost(0):
                raise LaunchError(f"node 0 was lost before the job was started: {self._store.how_lost(0)}")
            if time.monotonic() >= deadline:
                raise LaunchError(
                    f"node {self._node} has waited {seconds:.0f} s for {key!r} of another node: look at its output"
                )
            time.sleep(POLL_SECONDS)
        return value

    def _opening_line(self, plan: Plan) -> str:
        hosts = ", ".join(f"{member.num_processes} on {member.host}" for member in plan.members)
        own = plan.place_of(self._node)
        here = "this node is a spare" if own is None else f"this is node {self._node}"
        return (
            f"job {self._job.name}: {sum(plan.sizes)} processes ({hosts}) by {self._job.backend} on "
            f"{self._job.device}; {here}; folder {self._job.folder.root}"
        )

    # --- an attempt ---

    def _run_attempt(self, number: int, plan: Plan) -> AttemptVerdict:
        own_place, started = plan.place_of(self._node), self._store.now()
        end = End(self._node, 0)
        if own_place is not None:
            self._ended_by_others = None
            job = replace(self._job, num_processes=plan.sizes[own_place], hosts=self._hosts(plan, own_place))
            ended = self._run_processes(number, plan, job)
            end = self._end_of(job, ended, self._store.now() - started)
            self._keep_own(number, job, end)
            self._store.put(f"end/{number}/{self._node}", end.to_json())
            if end.exit_code:
                self._store.put(f"trouble/{number}", self._node)
        verdict = self._verdict(number, plan, end, started)
        if own_place is not None:
            self._show_failing(job, verdict.outcome)
        return verdict

    def _hosts(self, plan: Plan, own_place: int) -> Hosts:
        joined = self._store.joined
        address = joined.first_address or plan.first_address or _LOOPBACK_ADDRESS
        names = tuple(member.host for member in plan.members)
        if len(names) == 1:
            return Hosts(names, own_place, address, LOOPBACK, plan.sizes, {interfaces.GLOO_VARIABLE: LOOPBACK})
        surroundings = {**os.environ, **self._job.environment}
        choice = interfaces.choose(joined.own_address or plan.first_address, surroundings, address)
        if choice.problem:
            raise LaunchError(f"by which network are the other hosts reached? {choice.problem}")
        chosen = {**surroundings, **choice.variables}[interfaces.GLOO_VARIABLE]
        return Hosts(names, own_place, address, chosen.partition(",")[0], plan.sizes, choice.variables)

    def _run_processes(self, number: int, plan: Plan, job: JobSpec) -> ProcessesEnded:
        from torch.distributed import PrefixStore

        from modelparallel.launch import agent_meeting, elastic_backend  # import torch's agent, which takes a second

        port = self._store.place.port
        describe(job, self._store.joined.clock_ahead)
        environment = job_environment(job, port, restart_count=number - 1)
        shown = None if self._shows_all or job.world_size <= _MOST_SHOWN else (0,)
        self._monitor.start(job.ranks, host=job.hosts.name, shown=shown, look=self._look(number, plan, job))

        def backend() -> tuple[int, dict[int, int]]:
            try:
                keys = PrefixStore(f"agents/{number}", self._store.connect(_AGENT_SECONDS))
                name = self._store.place.job_id
                meeting = agent_meeting.AgentMeeting(
                    name, keys, job.hosts.current, len(plan.members), job.hosts.address, port
                )
                with ended_by_signal(self._monitor):
                    return elastic_backend.run(job, environment, meeting)
            except RuntimeError as error:  # of the store, as torch raises them
                self._say(f"torch's agent has failed: {error}")
                return 1, {}

        return run_processes(job, self._monitor, backend)

    def _look(self, number: int, plan: Plan, job: JobSpec) -> Callable[[], bool]:
        """Whether the attempt has failed elsewhere; tells the others of failures here."""
        key = f"trouble/{number}"

        def look() -> bool:
            if self._ended_by_others is not None:
                return True
            monitor = self._monitor
            trouble = self._store.value(key)
            if trouble is None and (monitor.has_failure() or monitor.stop_reason is not None):
                if not all(job.folder.finished_file(rank).exists() for rank in job.ranks):
                    self._store.put(key, self._node)
                return False
            lost = self._store.is_lost(0) if self._lead is None else bool(self._lead.lost(number, plan))
            if lost or (trouble is not None and trouble != self._node):
                self._ended_by_others = time.time()
                if trouble is None:
                    self._store.put(key, self._node)
            return self._ended_by_others is not None

        return look

    def _end_of(self, job: JobSpec, ended: ProcessesEnded, seconds: float) -> End:
        """How the attempt ended here, by the clock of node 0."""
        ahead, host = self._store.joined.clock_ahead, job.hosts.name
        if ended.stop:
            moment = min([time.time(), *self._monitor.deaths.values()]) - ahead
            stop = f"job {job.name} was stopped on {host} {ended.stop_text(seconds)}"
            return End(self._node, ended.exit_code, moment, stop)
        candidate = ended.first
        if candidate is not None:
            follows = self._ended_by_others is not None and candidate.time >= self._ended_by_others
            candidate = replace(
                candidate,
                is_consequence=candidate.is_consequence or follows,
                time=candidate.time - ahead,
                failure=replace(candidate.failure, host=host),
            )
        message = f"its processes on {host} failed (exit code {ended.exit_code}); see {job.folder.logs}"
        return End(self._node, ended.exit_code, message=message, candidate=candidate)

    def _keep_own(self, number: int, job: JobSpec, end: End) -> None:
        """Remember what this host needs to choose its devices for another attempt."""
        rank = None if end.candidate is None else end.candidate.failure.global_rank - job.hosts.first_rank
        if end.candidate is not None and end.candidate.is_consequence:
            rank = None
        self._own_attempts.append(Attempt(number, job.num_processes, 0.0, 0.0, end.exit_code, rank, "", job.devices))

    def _verdict(self, number: int, plan: Plan, end: End, started: float) -> AttemptVerdict:
        """What node 0 says; what is known here, if node 0 is lost or this launcher is told to stop."""
        moment, reason, code, is_stopped = self._store.now(), "", 1, False
        try:
            if self._lead is not None:
                verdict = self._lead.settle(number, plan, end, self._job.max_restarts, self._job.name, started)
                self._store.put(f"verdict/{number}", verdict.to_json())
                return verdict
            ended_at: float | None = None
            while (record := self._store.value(f"verdict/{number}")) is None:
                if ended_at is None and (end.exit_code or self._store.value(f"trouble/{number}") is not None):
                    ended_at = time.monotonic()
                if self._store.is_lost(0):
                    code = HOST_LOST_EXIT_CODE
                    reason = f"host {plan.members[0].host} (node 0) was lost: {self._store.how_lost(0)}"
                    break
                if ended_at is not None and time.monotonic() > ended_at + 2 * SETTLE_SECONDS + LOST_SECONDS:
                    reason = f"host {plan.members[0].host} (node 0) does not say how the attempt ended"
                    break
                time.sleep(POLL_SECONDS)
            else:
                return AttemptVerdict.from_json(record)
        except (JobInterrupted, KeyboardInterrupt) as interruption:
            number_of_signal = interruption.signal if isinstance(interruption, JobInterrupted) else signal.SIGINT
            code, is_stopped = 128 + number_of_signal, True
            name = signal.Signals(number_of_signal).name
            reason = f"job {self._job.name} was stopped by {name} while this node waited for the others"
            if plan.place_of(self._node) is not None:  # the job goes on without a spare
                self._store.put(f"trouble/{number}", self._node)
        if end.stop:
            code, is_stopped, reason = end.exit_code, True, end.stop
        seconds = self._store.now() - started
        attempt = Attempt(number, sum(plan.sizes), moment, seconds, code, None, reason)
        verdict = AttemptVerdict(Outcome(code, reason, is_stopped), attempt, reason)
        if self._lead is not None:
            self._store.put(f"verdict/{number}", verdict.to_json())
        return verdict

    def _show_failing(self, job: JobSpec, outcome: Outcome) -> None:
        """The end of the output of the rank that failed first, if it is of this host and was not shown."""
        failure = outcome.failure
        if failure is None or failure.global_rank not in job.ranks or failure.global_rank == 0:
            return
        if not self._shows_all and job.world_size > _MOST_SHOWN:
            self._monitor.show_end(failure.global_rank, _LINES_OF_FAILING)

    # --- another attempt, and the end ---

    def _next_plan(self, number: int, verdict: AttemptVerdict) -> Plan:
        """Agree on another attempt. Raises `LaunchError` if there is none."""
        self._say(f"attempt {number} of {self._job.max_restarts + 1} after: {verdict.attempt.reason}")
        problem = ""
        try:
            if self._own_attempts and self._own_attempts[-1].number == number - 1:
                used = self._own_attempts[-1].num_processes
                is_range = self._store.place.least != self._store.place.most
                counts = range(used, 0, -1) if is_range else (used,)
                start = possible_start(self._job, counts, self._own_attempts)
                if start.why:
                    self._say(f"{start.num_processes} processes on this node (there were {used}): {start.why}")
                self._job = replace(self._job, num_processes=start.num_processes, devices=start.devices)
            self._job.folder.put_aside(number - 1)
        except LaunchError as error:
            problem = str(error)
        except KeyboardInterrupt:
            problem = "it was stopped by SIGINT"
        self._store.put(f"offers/{number}/{self._node}", asdict(self._offer(problem)))
        if self._lead is not None:
            try:
                plan = self._lead.gather_again(number, _OFFER_SECONDS)
            except LaunchError as error:
                plan = Plan((), error=str(error))
            self._store.put(f"plan/{number}", plan.to_json())
        plan = self._told_plan(number, _OFFER_SECONDS + _PREPARE_SECONDS)
        self._say(self._opening_line(plan))
        return plan

    def _leave(self) -> None:
        self._store.put(f"left/{self._node}", True)
        if self._lead is not None:
            with suppress(JobInterrupted, KeyboardInterrupt):  # the others have to do without; how it ended is known
                self._lead.see_off()
