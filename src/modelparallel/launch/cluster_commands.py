"""The commands that send jobs to clusters and follow them: submit, jobs, status, logs, wait, stop, attach.

A job is named `<cluster>/<name>`; its name alone is enough where one job has it. docs/clusters.md shows each kind.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from modelparallel.config.reading import parse_parameters, validate_parameters
from modelparallel.errors import LaunchError, SMPError
from modelparallel.errors.foreign_text import one_line
from modelparallel.launch.channels import channel_options
from modelparallel.launch.cluster_jobs import (
    check_job,
    chosen_cluster,
    cluster_channels,
    devices_per_node,
    say_what_has_no_effect,
)
from modelparallel.launch.clusters.checks import parse_duration
from modelparallel.launch.clusters.cluster import Cluster, JobRecord, JobStatus
from modelparallel.launch.clusters.cluster_file import FILE_VARIABLE, cluster_named
from modelparallel.launch.clusters.description import ClusterJob
from modelparallel.launch.clusters.records import list_records
from modelparallel.launch.clusters.secrets import secret_options
from modelparallel.launch.devices import checked_device
from modelparallel.launch.failures import JobFailedError
from modelparallel.launch.spec import check_script
from modelparallel.launch.stopping import stop as stop_command
from modelparallel.launch.submitted import NotEndedError, SubmittedJob, find_job, job_of, submit_job

#: Nothing was submitted, or there is no such job.
USAGE_EXIT_CODE = 2
#: The job was waited for, and the wait has ended before it: by --timeout, by Ctrl-C.
TIMEOUT_EXIT_CODE = 124
INTERRUPTED_EXIT_CODE = 130
#: Of so many jobs the state is asked at once, by `jobs`.
_ASKED_AT_ONCE = 8

_JobArgument = Annotated[str, typer.Argument(help="<cluster>/<name>, as `modelparallel jobs` lists it.", metavar="JOB")]
_Clusters = Annotated[
    Path | None,
    typer.Option("--clusters", help=f"The cluster file. Default: {FILE_VARIABLE}, ./, ~/.config/modelparallel/."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
    )(submit)
    for command in (jobs, status, logs, wait, stop, attach):
        app.command()(command)


@contextmanager
def _said() -> Iterator[None]:
    """Errors as the command line shows them, with the exit code."""
    try:
        yield
    except JobFailedError as error:
        stop_command(str(error), error.exit_code)
    except SMPError as error:
        stop_command(str(error), USAGE_EXIT_CODE)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from None


def submit(
    context: typer.Context,
    script: Annotated[str, typer.Argument(help="The training script; what follows it are its own arguments.")],
    cluster: Annotated[str, typer.Option(help="A cluster of the cluster file, or a kind: slurm, ...", metavar="NAME")],
    nodes: Annotated[int, typer.Option(min=1, help="Number of machines.")] = 1,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, help="Processes of each machine. Default: one per device of the cluster's nodes."),
    ] = None,
    parameters: Annotated[
        str | None, typer.Option(help="Model parallel parameters: JSON, or a file with JSON.", metavar="JSON|FILE")
    ] = None,
    channel: Annotated[
        list[str] | None, typer.Option(help="An input channel: a path or a URL; may be repeated.", metavar="NAME=URL")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The job's name. Default: the script's and the time.")] = None,
    time: Annotated[
        str | None, typer.Option(help="Stop the job after so long: 4h, 90m, 24:00:00, seconds.", metavar="TIME")
    ] = None,
    max_restarts: Annotated[int, typer.Option(min=0, help="Start again after a failure, up to so many times.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu (ask for no GPU, and rehearse on the CPU) or cuda.")] = "auto",
    env: Annotated[
        list[str] | None, typer.Option("--env", help="A variable of the script; may be repeated.", metavar="NAME=VALUE")
    ] = None,
    env_plain: Annotated[bool, typer.Option("--env-plain", help="What looks like a secret is none.")] = False,
    secret: Annotated[
        list[str] | None,
        typer.Option(help="A variable whose value the cluster fetches: env:VAR, file:PATH, ...", metavar="NAME=REF"),
    ] = None,
    image: Annotated[str | None, typer.Option(help="The container image, where the cluster uses one.")] = None,
    requirements: Annotated[
        str | None, typer.Option(help="A file beside the script with packages to install on the nodes.")
    ] = None,
    source_dir: Annotated[Path | None, typer.Option(help="The code. Default: the script's directory.")] = None,
    checkpoints: Annotated[str | None, typer.Option(help="Where the checkpoints go: a path or a URL.")] = None,
    output: Annotated[str | None, typer.Option(help="Where the outputs go at the end: a path or a URL.")] = None,
    clusters: _Clusters = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be submitted, and stop.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end, and show the output.")] = False,
) -> None:
    """Send SCRIPT to a cluster.

    The name of the job, by which the other commands find it, is the last line. Exit code 2: nothing was submitted.
    """
    with _said():
        target = chosen_cluster(cluster, None, clusters)
        assert target is not None
        path, directory = _code(script, source_dir)
        per_node, published = _processes(target, nodes, nproc, parameters)
        job = ClusterJob(
            name=target.new_name(path.stem) if name is None else name,
            entry_point=str(path.relative_to(directory)),
            source_dir=directory,
            num_nodes=nodes,
            processes_per_node=per_node,
            arguments=tuple(context.args),
            hyperparameters={} if published is None else {"mp_parameters": published},
            parameters=published,
            channels=cluster_channels(channel_options(channel or [])),
            environment=_assignments(env or [], "--env"),
            secrets=secret_options(secret or []),
            env_plain=env_plain,
            requirements=requirements,
            device=checked_device(device),
            max_seconds=None if time is None else parse_duration(time, "--time"),
            max_restarts=max_restarts,
            checkpoints=checkpoints,
            output=output,
            service_options={} if image is None else {"image_uri": image},
        )
        if dry_run:
            check_job(target, job)
            typer.echo(target.render(job).text(), nl=False)
            return
        say_what_has_no_effect(target, job)
        submitted = submit_job(target, job)
        typer.echo(f"[launcher] submitted: {submitted.record.engine_id}; {submitted.record.folder}".rstrip("; "))
        typer.echo(submitted.address)
        if wait:
            submitted.wait(logs=True)


def jobs(
    cluster: Annotated[str | None, typer.Option(help="Only the jobs of this cluster.", metavar="NAME")] = None,
    clusters: _Clusters = None,
    as_json: _Json = False,
) -> None:
    """List the jobs that were submitted from here, and how they are."""
    with _said():
        if cluster is not None:
            cluster = cluster_named(cluster, clusters, os.environ).title
        records, problems = list_records(os.environ, cluster)
        records = records[::-1]
        told = [_told(record, status) for record, status in zip(records, _statuses(records), strict=True)]
        if as_json:
            typer.echo(json.dumps(told, indent=2))
        else:
            typer.echo(_table(told) if told else "no jobs")
        for problem in problems:
            typer.echo(problem, err=True)


def status(job: _JobArgument, as_json: _Json = False) -> None:
    """Say how a job is, and what it has been through."""
    with _said():
        found = find_job(job)
        now = found.status()
        if as_json:
            typer.echo(json.dumps(_told(found.record, now), indent=2))
            return
        for line in now.history:
            typer.echo(f"  {line}")
        code = "" if now.exit_code is None else f", exit code {now.exit_code}"
        typer.echo(f"{found.address}: {now.state}{code}" + (f" ({now.reason})" if now.reason else ""))


def logs(
    job: _JobArgument,
    rank: Annotated[int | None, typer.Option(min=0, help="Of this global rank only.")] = None,
    node: Annotated[int | None, typer.Option(min=0, help="Of this node only.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
) -> None:
    """Print what the ranks of a job have printed."""
    with _said():
        for line in find_job(job).logs(rank, node, follow):
            typer.echo(line)


def wait(
    job: _JobArgument,
    timeout: Annotated[float | None, typer.Option(min=0.1, help="Stop waiting after so many seconds.")] = None,
) -> None:
    """Wait for the end of a job.

    The exit code is the job's; 143 if it was stopped, 124 after --timeout, 130 after Ctrl-C.
    """
    with _said():
        _wait(find_job(job), timeout, logs=False)


def attach(job: _JobArgument) -> None:
    """Show the output of a job and wait for its end; Ctrl-C leaves the job running.

    JOB may also be what the engine calls it: slurm:1234, sagemaker:NAME, kubernetes:NAMESPACE/NAME.
    """
    with _said():
        _wait(find_job(job), None, logs=True)


def stop(job: _JobArgument) -> None:
    """End a job."""
    with _said():
        found = find_job(job)
        found.stop()
        typer.echo(f"{found.address}: asked to stop")


def _wait(job: SubmittedJob, timeout: float | None, *, logs: bool) -> None:
    try:
        job.wait(timeout, logs=logs)
    except NotEndedError as error:
        stop_command(str(error), TIMEOUT_EXIT_CODE)


def _told(record: JobRecord, status: JobStatus) -> dict[str, Any]:
    """A job as --json prints it."""
    return {
        "job": record.address,
        **asdict(status),
        "engine_id": record.engine_id,
        "submitted": record.submitted,
        "folder": record.folder,
        "model": record.model,
    }


def _table(told: Sequence[Mapping[str, Any]]) -> str:
    """Columns; names are whole, since they are copied."""
    rows = [("job", "state", "submitted", "engine's id", "reason")]
    for job in told:
        moment = f"{datetime.fromtimestamp(job['submitted']):%Y-%m-%d %H:%M}"
        rows.append((job["job"], job["state"], moment, job["engine_id"], one_line(job["reason"])))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _statuses(records: Sequence[JobRecord]) -> list[JobStatus]:
    """How the jobs are. A cluster that does not answer is not asked for each of its jobs."""
    silent: dict[str, str] = {}

    def ask(record: JobRecord) -> JobStatus:
        if record.cluster in silent:
            return JobStatus("unknown", silent[record.cluster])
        try:
            return job_of(record).status()
        except LaunchError as error:
            silent[record.cluster] = str(error).partition("\n")[0]
            return JobStatus("unknown", silent[record.cluster])
        except SMPError as error:  # the record is of another version
            return JobStatus("unknown", str(error).partition("\n")[0])

    pool = ThreadPoolExecutor(_ASKED_AT_ONCE, thread_name_prefix="jobs")
    try:
        return list(pool.map(ask, records))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _code(script: str, source_dir: Path | None) -> tuple[Path, Path]:
    """The script and the directory of the code."""
    path = Path(os.path.abspath(script))
    directory = path.parent if source_dir is None else Path(os.path.abspath(source_dir))
    if source_dir is not None and not path.exists():
        path = directory / script
    check_script(path, "script")
    if not path.is_relative_to(directory):
        raise LaunchError(f"script {path} is not below --source-dir {directory}: only that directory is sent")
    return path, directory


def _processes(
    cluster: Cluster, nodes: int, nproc: int | None, parameters: str | None
) -> tuple[int, dict[str, Any] | None]:
    """Processes of a node, and the checked parameters."""
    per_node = nproc or devices_per_node(cluster, None)
    if parameters is None:
        if per_node is None:
            raise LaunchError(f"--nproc is missing, and {cluster.title} does not say how many devices a node has")
        return per_node, None
    given = parse_parameters(parameters, "--parameters")
    config = validate_parameters(given, num_processes=None)
    if per_node is None:
        needed = config.pipeline_parallel_degree * config.tensor_parallel_degree
        per_node = -(-needed // nodes)
    config.check_world(per_node * nodes)
    published = {**given, **config.given}
    published["partitions"] = published["pipeline_parallel_degree"] = config.pipeline_parallel_degree
    return per_node, published


def _assignments(texts: list[str], option: str) -> dict[str, str]:
    """Each NAME=VALUE. Raises `LaunchError`."""
    values: dict[str, str] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise LaunchError(f"{option}: expected NAME=VALUE, got {text!r}")
        if name in values:
            raise LaunchError(f"{option}: {name!r} is given twice")
        values[name] = value
    return values
