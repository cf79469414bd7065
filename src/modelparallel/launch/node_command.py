"""`modelparallel node JOB.json`: one node of a job that was submitted, whatever engine has started it there.

It prepares what the description names (code, channels, packages, secrets), takes part in the job with the other nodes
(node_run.py), sends the outputs to where they were wanted, and keeps FOLDER/status.json for those who ask when the
engine has forgotten the job.

The job folder is shared by the nodes, or each has its own: node_run.py finds out. What is fetched goes into the scratch
place of the node (node_scratch.py), which has one name on all of them.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, TextIO

import typer

from modelparallel.checkpoints.stores.file_streams import shown
from modelparallel.errors import LaunchError, SMPError
from modelparallel.job.node_lists import expand_nodes
from modelparallel.launch.clusters.description import NodeDescription, read_node_description
from modelparallel.launch.clusters.job_end import JobEnd, state_of, write_job_end
from modelparallel.launch.clusters.secrets import secrets_on_node, without_values
from modelparallel.launch.clusters.transfers import is_url
from modelparallel.launch.failures import JobInterrupted
from modelparallel.launch.folder import JobFolder
from modelparallel.launch.folder_mark import make_job_folder
from modelparallel.launch.node_outputs import CheckpointKeeper, is_shared, send_outputs
from modelparallel.launch.node_place import NodePlace, PlaceOptions, find_place
from modelparallel.launch.node_plan import shortened
from modelparallel.launch.node_preparation import bare_spec, prepared_spec
from modelparallel.launch.node_run import JOIN_SECONDS, run_node
from modelparallel.launch.node_scratch import held_scratch
from modelparallel.launch.output import open_missing_descriptors
from modelparallel.launch.signals import asked_by_signal, ended_by_signal
from modelparallel.launch.spec import JobResult, JobSpec
from modelparallel.launch.stopping import stop
from modelparallel.launch.supervision import RankMonitor

#: Exit code of a job of which nothing was started, and of one that has run well and whose outputs are not where they
#: were wanted.
USAGE_EXIT_CODE, OUTPUT_EXIT_CODE = 2, 1
FAULT_EXIT_CODE = 1
#: How long nodes wait for one that fetches data or installs packages.
PREPARE_SECONDS = 6 * 3600.0
#: For the script: where its checkpoints are kept, a URL or the `checkpoints` of the job folder.
CHECKPOINTS_VARIABLE = "MODELPARALLEL_CHECKPOINTS"


def node(
    description: Annotated[
        Path, typer.Argument(help="The description of the job; `modelparallel submit` writes it.", metavar="JOB.json")
    ],
) -> None:
    """Run this node's part of a submitted job; its cluster starts this on each node.

    Which of the nodes this is, the engine says (Slurm, SageMaker, Kubernetes, ...). The exit code is that of the job:
    of the process that failed first on any node, 124 after the time limit, 143 if the job was stopped, 85 if it was
    preempted and has saved, 2 if nothing was started.
    """
    open_missing_descriptors()
    try:
        result = run_description(read_node_description(description))
    except SMPError as error:
        stop(str(error), USAGE_EXIT_CODE)
    if result.exit_code != 0:
        stop(result.message, result.exit_code)


def run_description(told: NodeDescription, output: TextIO | None = None) -> JobResult:
    """Run this node's part of the job, to its end on all nodes, and send its outputs.

    Raises `LaunchError` if nothing was started, on any node.
    """
    place = find_place(
        PlaceOptions(nnodes=str(told.job.num_nodes)),
        os.environ,
        default_job_id=told.job.name,
        own_name=socket.gethostname(),
        list_hosts=expand_nodes,
    )
    return _SubmittedNode(told, place, output or sys.stdout).run()


class _SubmittedNode:
    """One node's part in a submitted job."""

    def __init__(self, told: NodeDescription, place: NodePlace, stream: TextIO) -> None:
        self._told, self._job, self._place, self._stream = told, told.job, place, stream
        self._node = place.node_rank or 0
        self._folder = JobFolder(told.folder)
        self._hide: Callable[[str], str] = str
        self._keeper: CheckpointKeeper | None = None
        self._has_folder = False
        self._started = time.time()

    def run(self) -> JobResult:
        """Run it, and write down how the job is and how it has ended."""
        monitor = RankMonitor()
        with ExitStack() as stack:
            try:
                stack.enter_context(ended_by_signal(monitor))
                # Also while data are fetched: a job may be preempted before it has begun.
                stack.enter_context(asked_by_signal(monitor))
                spec, problem = self._prepared(stack)
                result = self._run(spec, problem, monitor)
                self._write_down(self._end_of(result))
                result = self._sent(result)
            except (JobInterrupted, KeyboardInterrupt) as interruption:
                number = interruption.signal if isinstance(interruption, JobInterrupted) else signal.SIGINT
                name, host = signal.Signals(number).name, socket.gethostname()
                message = f"job {self._job.name} was stopped by {name} while {host} prepared it or sent its outputs"
                result = JobResult(128 + number, 0.0, self._folder, message=message, is_stopped=True)
            except SMPError as error:
                message = self._hide(str(error))
                self._write_down(JobEnd(self._job.name, "failed", USAGE_EXIT_CODE, message))
                raise LaunchError(message) from error
            except Exception as error:  # a fault of ours; who asks for the job must not be told that it runs
                reason = self._hide(f"{type(error).__name__}: {error}")
                self._write_down(JobEnd(self._job.name, "failed", FAULT_EXIT_CODE, reason))
                raise
            self._write_down(self._end_of(result))
            return result

    def _say(self, text: str) -> None:
        print(f"[launcher] {self._hide(text)}", file=self._stream, flush=True)

    def _prepared(self, stack: ExitStack) -> tuple[JobSpec, str]:
        """The job with all that it needs, and ""; or why this node cannot take part."""
        job, told = self._job, self._told
        try:
            # Who has submitted the job has put the description, and more, into a folder that nodes share.
            make_job_folder(told.folder, may_hold=told.folder == Path(os.path.abspath(told.file)).parent)
            self._has_folder = True
            if self._node == 0 and self._place.restart_count:
                self._folder.put_start_aside(self._place.restart_count)
            self._write_down(JobEnd(job.name, "running"))
            values = secrets_on_node(job.secrets, told.secrets_file, os.environ)
            self._hide = without_values(values)
            # What fetches data from here on finds its credentials where the script finds them.
            os.environ.update({**job.environment, **values})
            scratch = stack.enter_context(held_scratch(told, os.environ))
            return self._with_checkpoints(prepared_spec(told, values, scratch, self._say)), ""
        except SMPError as error:
            return bare_spec(told), self._hide(str(error))
        except JobInterrupted:
            raise
        except Exception as error:  # whatever it is, the others must not wait for this node
            self._say(traceback.format_exc())
            return bare_spec(told), self._hide(f"{type(error).__name__}: {error}")

    def _with_checkpoints(self, spec: JobSpec) -> JobSpec:
        place = self._job.checkpoints
        if place is not None and is_url(place):
            self._keeper = CheckpointKeeper(
                place, self._folder.checkpoints, lambda: not is_shared(self._folder, self._node), self._say
            )
            self._keeper.fetch()
        place = place or str(self._folder.checkpoints)
        return replace(spec, environment={CHECKPOINTS_VARIABLE: place, **spec.environment})

    def _run(self, spec: JobSpec, problem: str, monitor: RankMonitor) -> JobResult:
        if self._keeper is not None and not problem:
            self._keeper.start()
        return run_node(
            spec,
            self._place,
            self._stream,
            monitor,
            # What is shown is what the engine keeps, and `modelparallel logs --rank` chooses from.
            show_all=True,
            join_seconds=PREPARE_SECONDS if self._may_take_long else JOIN_SECONDS,
            problem=problem,
        )

    @property
    def _may_take_long(self) -> bool:
        """Whether some node may be busy for long before it joins the others."""
        job = self._job
        locations = [self._told.code, job.checkpoints or "", *(each.location for each in job.channels.values())]
        return job.requirements is not None or any(map(is_url, locations))

    def _sent(self, result: JobResult) -> JobResult:
        """The result, when checkpoints and outputs are where they were wanted; also of a job that has failed."""
        try:
            if self._keeper is not None:
                self._keeper.finish()
            if self._job.output is not None and not is_shared(self._folder, self._node):
                number = send_outputs(self._folder, self._job.output, self._node == 0)
                self._say(f"{number} files are in {shown(self._job.output)}")
        except LaunchError as error:
            message = f"{self._hide(str(error))}\nwhat was not sent is in {self._folder.root} on {socket.gethostname()}"
            if result.exit_code != 0:
                return replace(result, message=f"{message}\n{result.message}")
            message = f"job {self._job.name} has run to its end, but {message}"
            return replace(result, exit_code=OUTPUT_EXIT_CODE, message=message)
        return result

    # --- what is written down ---

    def _end_of(self, result: JobResult) -> JobEnd:
        failure, message = result.failure, self._hide(result.message)
        first_line = message.partition("\n")[0]
        if failure is None:
            return JobEnd(self._job.name, state_of(result.exit_code), result.exit_code, first_line)
        kept = {
            "rank": failure.global_rank,
            "host": failure.host,
            "summary": self._hide(failure.summary),
            "log": str(failure.log),
            "traceback": shortened(self._hide(failure.detail)),
        }
        reason = self._hide(failure.reason)
        return JobEnd(self._job.name, state_of(result.exit_code), result.exit_code, reason, kept)

    def _write_down(self, end: JobEnd) -> None:
        """Node 0 says how the job is."""
        if self._node != 0 or not self._has_folder:
            return
        starts, host = self._place.restart_count, socket.gethostname()
        try:
            write_job_end(self._told.folder, replace(end, started=self._started, starts=starts, node=host))
        except OSError as error:
            self._say(f"{self._told.folder} cannot be written to: {error.strerror}")
