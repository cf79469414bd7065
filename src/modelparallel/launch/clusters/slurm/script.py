"""The sbatch file of a job: what users of Slurm would write themselves, to be read, edited and submitted by hand."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from modelparallel.errors import LaunchError
from modelparallel.job.preemption import EXIT_PREEMPTED
from modelparallel.launch.clusters.description import HOST_LOST_EXIT_CODE

#: Whether a job goes back into the queue: when its script has saved its state and left; "always": also when it has not
#: left shortly before its time is over.
Requeue = bool | Literal["always"]
Value = str | int | float | bool

#: Of the options of sbatch those that are keys of the cluster, or that the file depends on.
OWN_OPTIONS = {
    "nodes": "the number of nodes is instance_count, or --nodes",
    "ntasks": "each node has one task, which starts the processes",
    "ntasks-per-node": "each node has one task, which starts the processes",
    "ntasks-per-gpu": "each node has one task, which starts the processes",
    "job-name": "it is the name of the job",
    "partition": "it is a key of its own",
    "time": "it is a key of its own",
    "output": "it lies in the job's folder",
    "open-mode": "the output of a job that was requeued is appended",
    "signal": "it is the key signal_seconds",
    "requeue": "it is a key of its own",
    "no-requeue": "it is the key requeue",
    "cpus-per-task": "it is the key cpus_per_node",
    "array": "a job is one job",
    "parsable": "the command has it",
    "wait": "modelparallel wait waits",
    "wrap": "the file has a command",
    "chdir": "the code lies in the job's folder",
    "export": "it is the key env",
}
#: Before the end of its time a job that has not left goes back into the queue, if that is always to be done.
_LAST_SECONDS = 20
#: How long srun waits for the other nodes once one has ended: they end together, but one may still upload.
_WAIT_SECONDS = 600
#: With which a job goes back into the queue.
REQUEUED_EXIT_CODES = (EXIT_PREEMPTED, HOST_LOST_EXIT_CODE)
#: What srun has ended with, beside the description of the job; also if no agent came to say anything.
EXIT_CODE_FILE = "exit_code"
_OPTION = re.compile(r"[a-z][a-z0-9-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# What means something to Slurm's own reader of these lines, or to its patterns of file names.
_PLAIN = re.compile(r"[A-Za-z0-9_./:,@%+=\[\]~^*&|()!?{}-]+")
_NEVER = re.compile(r"[\x00-\x1f\x7f\"'\\`$]")
#: Neither quoted nor a pattern in `--output` and in the shell.
PLAIN_PATH = re.compile(r"/[A-Za-z0-9_./:,@+=~ -]*")


@dataclass(frozen=True)
class Script:
    """What stands in the file; `folder` is the job's own, on all nodes."""

    name: str
    folder: str
    num_nodes: int
    processes_per_node: int
    python: str
    partition: str = ""
    gpus_per_node: int | str | None = None
    cpus_per_node: int | None = None
    memory: str = ""
    time: str = ""
    signal_seconds: int = 120
    requeue: Requeue = True
    setup: Sequence[str] = ()
    container: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Value] = field(default_factory=dict)
    srun_extra: Mapping[str, Value] = field(default_factory=dict)


def sbatch_file(script: Script) -> str:
    """The whole file."""
    processes = f"{script.processes_per_node} process{'es' if script.processes_per_node > 1 else ''}"
    nodes = f"{script.num_nodes} node{'s' if script.num_nodes > 1 else ''}"
    parts = [
        "#!/bin/bash\n"
        f"# {script.name}: {nodes}, {processes} on each. By hand: sbatch {shlex.quote(f'{script.folder}/job.sbatch')}\n"
        + "".join(f"#SBATCH {option}\n" for option in _options(script))
    ]
    preparation = [f"export {name}={shlex.quote(value)}" for name, value in script.environment.items()]
    preparation += [line.rstrip("\n") for line in script.setup]
    if preparation:
        parts.append("\n".join(preparation) + "\n")
    parts += [_asking(script), _step(script), _end(script)]
    return "\n".join(parts)


def _options(script: Script) -> list[str]:
    """One option a line, the user's own after ours; of the same name the user's alone."""
    options: dict[str, Value] = {"job-name": script.name, "nodes": script.num_nodes, "ntasks-per-node": 1}
    if script.gpus_per_node and not {"gres", "gpus", "gpus-per-task"} & set(script.extra):
        options["gpus-per-node"] = script.gpus_per_node
    if script.cpus_per_node is not None:
        options["cpus-per-task"] = script.cpus_per_node
    if script.memory:
        options["mem"] = script.memory
    if script.time:
        options["time"] = script.time
    if script.partition:
        options["partition"] = script.partition
    options["chdir"] = script.folder
    options["output"] = f"{script.folder}/slurm-%j.out"
    options["open-mode"] = "append"
    options["requeue" if script.requeue else "no-requeue"] = True
    options["signal"] = f"B:USR1@{script.signal_seconds}"
    return [written_option(name, value) for name, value in {**options, **script.extra}.items() if value is not False]


def written_option(name: str, value: Value) -> str:
    """`--name=value`, or `--name` for True and "", as the reader of #SBATCH lines and a shell take it."""
    if value is True or value == "":
        return f"--{name}"
    text = str(value)
    return f"--{name}={text}" if _PLAIN.fullmatch(text) else f'--{name}="{text}"'


def check_options(options: Mapping[str, Value], what: str, taken: Mapping[str, str]) -> None:
    """Raise `LaunchError` for an option whose name or value cannot stand in the file.

    Args:
        what: the key, for errors.
        taken: names that are refused, and why.
    """
    for name, value in options.items():
        if not _OPTION.fullmatch(name):
            raise LaunchError(
                f"{what}: {name!r} is no long option: write it without dashes before it, as {_hint(name)!r}"
            )
        if name in taken:
            raise LaunchError(f"{what}: {name}: {taken[name]}")
        if isinstance(value, str) and (found := _NEVER.search(value)):
            raise LaunchError(
                f"{what}: {name} = {value!r}: the character {found[0]!r} cannot stand in an option of Slurm"
            )


def check_variables(environment: Mapping[str, str], what: str) -> None:
    """Raise `LaunchError` for what no shell can export."""
    for name, value in environment.items():
        if not _VARIABLE.fullmatch(name):
            raise LaunchError(f"{what}: {name!r} is no name of a variable: letters, digits and '_', no digit first")
        if "\0" in value:
            raise LaunchError(f"{what}: {name}: a variable cannot have the character '\\0'")


def _hint(name: str) -> str:
    return re.sub(r"[^a-z0-9-]+", "-", name.strip("-").lower()).strip("-") or "account"


def _asking(script: Script) -> str:
    seconds = script.signal_seconds
    back = " Then it goes back into the queue." if script.requeue else ""
    lines = [
        f"# Slurm sends USR1 here {seconds} s before the time is over. The ranks are told, and a script that asks",
        f"# (smp.preemption_requested) saves and leaves with exit code {EXIT_PREEMPTED}.{back}",
    ]
    ask = 'scancel --signal=USR1 "$SLURM_JOB_ID"'
    if script.requeue != "always":
        return "\n".join([*lines, f"trap '{ask}' USR1", ""])
    rest = max(1, seconds - _LAST_SECONDS)
    lines += [
        f"# What has not left {rest} s later goes back as it is.",
        f"trap '{ask}; (sleep {rest}; scontrol requeue \"$SLURM_JOB_ID\") &' USR1",
        "",
    ]
    return "\n".join(lines)


def _step(script: Script) -> str:
    options: dict[str, Value] = {"mpi": "none"}
    if script.cpus_per_node is not None:
        options["cpus-per-task"] = script.cpus_per_node  # which a step does not inherit
    # The agents end together and say who failed first, which they could not if srun ended them at the first.
    options |= {"kill-on-bad-exit": 0, "wait": _WAIT_SECONDS, **script.srun_extra}
    words = [written_option(name, value) for name, value in options.items() if value is not False]
    output = f"--output={shlex.quote(f'{script.folder}/node_%t.log')} --open-mode=append"
    prefix = f"{script.container.strip()} " if script.container.strip() else ""
    description = shlex.quote(f"{script.folder}/job.json")
    return "\n".join(
        [
            "# One agent on each node, which starts the processes there.",
            f"srun {' '.join(words)} \\",
            f"    {output} \\",
            f"    {prefix}{shlex.quote(script.python)} -m modelparallel node {description} &",
            "step=$!",
            'while wait "$step"; kill -0 "$step" 2>/dev/null; do :; done  # a signal ends a wait',
            'wait "$step"; code=$?',
            "",
        ]
    )


def _end(script: Script) -> str:
    lines = [f'echo "$code" > {shlex.quote(f"{script.folder}/{EXIT_CODE_FILE}")}']
    if script.requeue:
        codes = "|".join(map(str, REQUEUED_EXIT_CODES))
        lines.append(
            f'case "$code" in {codes}) scontrol requeue "$SLURM_JOB_ID";; esac  # preempted, or a node was lost'
        )
    return "\n".join([*lines, 'exit "$code"', ""])
