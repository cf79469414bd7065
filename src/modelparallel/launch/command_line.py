"""The command `modelparallel`.

    modelparallel run --nproc 8 --parameters '{"tensor_parallel_degree": 4, "ddp": true}' train.py --epochs 3

    modelparallel schedule --stages 4 --microbatches 8 --kind zero_bubble

    modelparallel explain modelparallel-jobs/train-2026-01-31-12-00-00-123

    modelparallel env

    modelparallel cluster-check --nproc 2

    modelparallel checkpoint inspect checkpoints

    modelparallel submit --cluster gpu --nodes 2 train.py --epochs 3

docs/launching.md has every option of the first and of the fifth, docs/schedules.md shows what the second prints,
docs/diagnosis.md the third and the fourth, docs/checkpoints.md the sixth, docs/clusters.md the last and those that
follow such a job.
"""

import math
import os
import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from modelparallel.config.reading import parse_parameters, validate_parameters
from modelparallel.errors import LaunchError, ScheduleError, SMPError
from modelparallel.job.node_lists import expand_nodes
from modelparallel.launch.channels import channel_options, input_channels
from modelparallel.launch.checkpoint_commands import checkpoint_app
from modelparallel.launch.cluster_commands import register
from modelparallel.launch.cluster_report import parse_sizes
from modelparallel.launch.devices import check_devices, resolve_device
from modelparallel.launch.explain import explain as explain_job
from modelparallel.launch.folder import JobFolder, default_folder, new_job_name
from modelparallel.launch.hosts import THIS_MACHINE, Hosts
from modelparallel.launch.job import run_job
from modelparallel.launch.mpi_hosts import parse_hosts, read_hostfile
from modelparallel.launch.node_command import node
from modelparallel.launch.node_place import NodePlace, PlaceOptions, find_place
from modelparallel.launch.node_run import JOIN_SECONDS, run_node
from modelparallel.launch.output import open_missing_descriptors
from modelparallel.launch.process_counts import fitting_counts, parse_process_counts
from modelparallel.launch.schedule_pictures import figures_text, grid_svg, grid_text
from modelparallel.launch.spec import Backend, JobSpec, check_script
from modelparallel.launch.stopping import stop
from modelparallel.launch.surroundings import surroundings
from modelparallel.pipeline.schedule.checks import check_schedule
from modelparallel.pipeline.schedule.making import make_schedule
from modelparallel.pipeline.schedule.timeline import simulate
from modelparallel.plan.schedule import SCHEDULE_KINDS, Chain
from modelparallel.version import __version__

app = typer.Typer(
    name="modelparallel",
    help="Tensor, pipeline and data parallel training for PyTorch.",
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(checkpoint_app)

#: Exit code of a command that stopped before any process was started.
USAGE_EXIT_CODE = 2


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """Tensor, pipeline and data parallel training for PyTorch."""
    if version:
        typer.echo(__version__)
        raise typer.Exit()


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)
def run(
    context: typer.Context,
    script: Annotated[str, typer.Argument(help="The training script; what follows it are its own arguments.")],
    nproc: Annotated[
        str | None,
        typer.Option(
            help="Number of processes, or a range: 4:8 starts with as many as fit, and after a failure may go on with "
            "fewer. Default: one per GPU; on the CPU, as many as the degrees need.",
            metavar="N|MIN:MAX",
        ),
    ] = None,
    backend: Annotated[str, typer.Option(help="elastic (torch's agent) or mpi (mpirun of Open MPI).")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu (rehearse CUDA on the CPU) or cuda.")] = "auto",
    parameters: Annotated[
        str | None, typer.Option(help="Model parallel parameters: JSON, or a file with JSON.", metavar="JSON|FILE")
    ] = None,
    channel: Annotated[
        list[str] | None, typer.Option(help="An input channel; may be repeated.", metavar="NAME=PATH")
    ] = None,
    job_dir: Annotated[
        Path | None, typer.Option(help="The job folder. Default: ./modelparallel-jobs/<script>-<time>.")
    ] = None,
    timeout: Annotated[float | None, typer.Option(min=0.1, help="Stop the job after so many seconds.")] = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="Start all processes again after a failure, up to so many times.")
    ] = 0,
    nnodes: Annotated[
        str | None,
        typer.Option(
            help="Number of hosts, each of which runs this command; a range may go on with fewer; auto: as the engine "
            "says (Slurm, SageMaker, Kubernetes, ...).",
            metavar="N|MIN:MAX|auto",
        ),
    ] = None,
    node_rank: Annotated[int | None, typer.Option(help="Which of the hosts this is, from 0.")] = None,
    rendezvous: Annotated[
        str | None, typer.Option(help="The host of node 0 as the others reach it.", metavar="HOST[:PORT]")
    ] = None,
    job_id: Annotated[str | None, typer.Option(help="What the job is called on all of its hosts.")] = None,
    hosts: Annotated[
        str | None, typer.Option(help="With --backend mpi: where mpirun starts how many.", metavar="HOST:N,...")
    ] = None,
    hostfile: Annotated[Path | None, typer.Option(help="The same from a file of Open MPI.")] = None,
    join_timeout: Annotated[
        float, typer.Option(min=1.0, help="Seconds in which the hosts have to come.")
    ] = JOIN_SECONDS,
    show: Annotated[
        str, typer.Option(help="Of several hosts: all, or first (rank 0 and who fails, from 9 ranks on).")
    ] = "first",
) -> None:
    """Run SCRIPT in several processes on this machine, or on this one of several hosts (--nnodes).

    The script runs in the current directory with its own arguments; each line of output begins with the rank. The exit
    code is that of the first failing process (of the last attempt, with --max-restarts), 124 after the timeout, 130
    after Ctrl-C, 2 if nothing was started.
    """
    open_missing_descriptors()
    try:
        place = _place(script, PlaceOptions(nnodes, node_rank, rendezvous, job_id))
        if show not in ("first", "all"):
            raise LaunchError(f"--show {show!r}: expected first or all")
        over = _mpi_hosts(hosts, hostfile)
        if over.sizes and place is not None:
            raise LaunchError("--hosts, --hostfile: mpirun starts the processes of all hosts; leave out --nnodes")
        nproc = nproc or (str(sum(over.sizes)) if over.sizes else None)
        job = _job(
            script, context.args, nproc, backend, device, parameters, channel or [], job_dir, timeout, place, over
        )
        job = replace(job, max_restarts=max_restarts)
        if place is None:
            result = run_job(job)
        else:
            result = run_node(job, place, show_all=show == "all", join_seconds=join_timeout)
    except SMPError as error:
        stop(str(error), USAGE_EXIT_CODE)
    if result.exit_code != 0:
        stop(result.message, result.exit_code)


@app.command("cluster-check", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def cluster_check(
    context: typer.Context,
    sizes: Annotated[
        str | None, typer.Option(help="What is all-reduced, in bytes, separated by commas.", metavar="N,N,...")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the report as JSON into this file, too.")] = None,
) -> None:
    """Run one process per device and say whether they find each other, how fast they talk over each axis, and whether
    they are alike. The other options are those of `modelparallel run`: --nproc, --parameters, ...

    Exit code 1 if something has to be mended, else as with `run`. For other launchers, one process per device:
    python -m modelparallel.launch.cluster_check.
    """
    try:
        if sizes is not None:
            parse_sizes(sizes)
    except SMPError as error:
        stop(str(error), USAGE_EXIT_CODE)
    command = cast(Any, context.find_root().command).commands["run"]
    arguments = [*context.args, str(Path(__file__).with_name("cluster_check.py"))]
    arguments += [] if sizes is None else ["--sizes", sizes]
    arguments += [] if json is None else ["--json", str(json.absolute())]
    with command.make_context("run", arguments, parent=context.parent) as as_run:
        command.invoke(as_run)


@app.command()
def schedule(
    stages: Annotated[int, typer.Option(help="Number of pipeline stages.")],
    microbatches: Annotated[int, typer.Option(help="Number of microbatches of a step.")],
    kind: Annotated[str, typer.Option(help=f"One of {', '.join(SCHEDULE_KINDS)}.")] = "interleaved",
    virtual_stages: Annotated[int, typer.Option(help="How often a microbatch comes to each stage.")] = 1,
    active_microbatches: Annotated[
        int | None, typer.Option(help="The most live microbatches of a stage. Default: what the schedule needs.")
    ] = None,
    forward_cost: Annotated[float, typer.Option(help="Time of one forward.")] = 1.0,
    backward_cost: Annotated[float, typer.Option(help="Time for the gradients of the inputs.")] = 1.0,
    weight_cost: Annotated[float, typer.Option(help="Time for the gradients of the weights.")] = 1.0,
    message_delay: Annotated[float, typer.Option(help="Time from one stage to another.")] = 0.0,
    svg: Annotated[Path | None, typer.Option(help="Write the grid as a drawing into this file.")] = None,
    text: Annotated[bool, typer.Option("--text", help="Print the actions of every stage, too.")] = False,
) -> None:
    """Print a pipeline schedule as a grid over time; the last line has its bubble and its peak memory.

    Nothing runs: the times follow from the costs alone. Exit code 2 for values that are not possible.
    """
    try:
        if virtual_stages < 1:
            raise ScheduleError(f"--virtual-stages is {virtual_stages}: a microbatch comes to a stage once or more")
        if not (math.isfinite(message_delay) and message_delay >= 0):
            raise ScheduleError(f"--message-delay is {message_delay}: give a finite number, 0 or more")
        chain = Chain.looped(stages, virtual_stages, forward_cost, backward_cost, weight_cost)
        made = make_schedule(chain, microbatches, kind, active_microbatches)
        check_schedule(made, chain, active_microbatches)
        timeline = simulate(made, chain, message_delay)
        if svg is not None:
            try:
                svg.write_text(grid_svg(made, timeline), encoding="utf-8")
            except OSError as error:
                raise ScheduleError(f"cannot write the drawing {str(svg)!r}: {error.strerror}") from error
    except SMPError as error:
        stop(str(error), USAGE_EXIT_CODE)
    typer.echo(grid_text(made, timeline, width=shutil.get_terminal_size((120, 24)).columns))
    if text:
        typer.echo(made.to_text())
    typer.echo(figures_text(timeline))


@app.command()
def explain(
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="The job folder; `modelparallel run` prints it when a job starts. Of several hosts that share no "
            "files: the folders of all of them.",
            metavar="FOLDER...",
        ),
    ],
) -> None:
    """Say why a job failed: who failed first, who waited for whom, at which lines of the script.

    Reads what the ranks wrote down; nothing runs. Exit code 2 if no FOLDER holds a job.
    """
    try:
        text = explain_job(*map(JobFolder, folders))
    except SMPError as error:
        stop(str(error), USAGE_EXIT_CODE)
    typer.echo(text)


@app.command()
def env(
    parameters: Annotated[
        str | None, typer.Option(help="Model parallel parameters: JSON, or a file with JSON.", metavar="JSON|FILE")
    ] = None,
) -> None:
    """Print what a report of a fault needs: versions, devices, variables of launchers, configuration; no secrets.

    Nothing runs, and what cannot be found out is said in its place: the exit code is 0.
    """
    typer.echo(surroundings(parameters, os.environ))


register(app)
app.command()(node)


def _place(script: str, options: PlaceOptions) -> NodePlace | None:
    """Which of several hosts this is; None for a job of this machine alone."""
    if options.nnodes is None:
        given = {"--node-rank": options.node_rank, "--rendezvous": options.rendezvous, "--job-id": options.job_id}
        if names := [name for name, value in given.items() if value is not None]:
            raise LaunchError(f"{', '.join(names)}: only with --nnodes N, the number of hosts that run this command")
        return None
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(script).stem) or "job"
    own_name = socket.gethostname()
    return find_place(options, os.environ, default_job_id=name, own_name=own_name, list_hosts=expand_nodes)


def _mpi_hosts(hosts: str | None, hostfile: Path | None) -> Hosts:
    if hosts is not None and hostfile is not None:
        raise LaunchError("--hosts and --hostfile: give one of them")
    if hosts is not None:
        return parse_hosts(hosts)
    return THIS_MACHINE if hostfile is None else read_hostfile(hostfile)


def _job(
    script: str,
    arguments: list[str],
    nproc: str | None,
    backend: str,
    device: str,
    parameters: str | None,
    channels: list[str],
    job_dir: Path | None,
    timeout: float | None,
    place: NodePlace | None = None,
    over: Hosts = THIS_MACHINE,
) -> JobSpec:
    path = Path(os.path.abspath(script))
    check_script(path, "script")
    chosen_backend = backend or os.environ.get("MODELPARALLEL_BACKEND") or "elastic"
    if chosen_backend not in ("elastic", "mpi"):
        raise LaunchError(f"--backend {chosen_backend!r}: expected elastic or mpi")
    if over.sizes and chosen_backend != "mpi":
        raise LaunchError(f"--hosts, --hostfile with backend {chosen_backend}: add --backend mpi, or use --nnodes")
    chosen_device, available = resolve_device(device)
    available = 0 if over.sizes else available  # of this host; mpirun's may have others
    published: dict[str, Any] | None = None
    least, most = (0, 0) if nproc is None else parse_process_counts(nproc)
    if place is not None:
        if least != most:
            raise LaunchError(f"--nproc {nproc} with --nnodes: give one number for this host, and a range of hosts")
        least = most = most or place.num_processes or 0
    if over.sizes and (least, most) != (sum(over.sizes),) * 2:
        raise LaunchError(f"--nproc {nproc}: the hosts have {sum(over.sizes)} processes in all: leave out --nproc")
    num_processes = most or available or 1
    fewer: list[int] = []
    if parameters is None and least != most:
        raise LaunchError(
            f"--nproc {nproc}: a range needs --parameters, which say which numbers of processes fit the model: add it "
            """('{"ddp": true}' for copies of a whole model), or give one number"""
        )
    if parameters is not None:
        given = parse_parameters(parameters, "--parameters")
        config = validate_parameters(given, num_processes=None)
        available = 0 if config.shares_devices else available
        degrees = config.pipeline_parallel_degree * config.tensor_parallel_degree
        num_processes = most or available or math.ceil(degrees / (1 if place is None else place.most))
        if least != most:
            num_processes, *fewer = fitting_counts(config, least, most, available, f"--nproc {nproc}")
        if place is None or place.most == 1:  # else node 0 checks the sum
            config.check_world(num_processes)
        published = {**given, **config.given}
        published["partitions"] = published["pipeline_parallel_degree"] = config.pipeline_parallel_degree
    check_devices(num_processes, chosen_device, available)
    name = new_job_name(path.stem)
    return JobSpec(
        name=name,
        script=path,
        source_dir=path.parent,
        working_directory=Path.cwd(),
        folder=default_folder(name) if job_dir is None else JobFolder(Path(os.path.abspath(job_dir))),
        num_processes=num_processes,
        backend=cast(Backend, chosen_backend),
        device=chosen_device,
        arguments=tuple(arguments),
        hyperparameters={} if published is None else {"mp_parameters": published},
        parameters=published,
        channels=input_channels(channel_options(channels)),
        preferred_port=int((published or {}).get("ddp_port", 7777)),
        timeout=timeout,
        fewer_processes=tuple(fewer),
        hosts=over,
    )
