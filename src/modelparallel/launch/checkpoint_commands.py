"""The commands `modelparallel checkpoint inspect|verify|convert` (docs/checkpoints.md)."""

import json
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any

import torch
import typer

from modelparallel.checkpoints.huggingface.safetensors_files import MAX_SHARD_SIZE
from modelparallel.checkpoints.stores.file_streams import shown
from modelparallel.checkpoints.tools.catalogue import ListedCheckpoint, checkpoints_in, find
from modelparallel.checkpoints.tools.conversion import convert_to_full, convert_to_safetensors
from modelparallel.checkpoints.tools.inspection import Description, describe
from modelparallel.checkpoints.tools.verification import verify as verify_checkpoint
from modelparallel.errors import CheckpointNotFoundError, SMPConfigError, SMPError
from modelparallel.errors.foreign_text import one_line, printable
from modelparallel.launch.stopping import stop
from modelparallel.plan.partition import readable_bytes

checkpoint_app = typer.Typer(
    name="checkpoint",
    help="Look into checkpoints, check that they are whole, convert them: without GPUs, in one process.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

#: Exit code of `verify` for a checkpoint that is not whole, and of the others when they cannot do their work.
FAILED, USAGE = 1, 2
_NUM_SHOWN = 20

PathArgument = Annotated[
    str, typer.Argument(help="A folder of checkpoints, or one checkpoint's folder or file; a local path or a URL.")
]
TagOption = Annotated[
    str | None,
    typer.Option(help="Which checkpoint of the folder. Default: the one that its file `newest` names.", metavar="TAG"),
]


@checkpoint_app.command()
def inspect(
    path: PathArgument,
    tag: TagOption = None,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List all tensors and objects, not the first few.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all tensors.")] = False,
) -> None:
    """Print what is in a checkpoint, and which others lie beside it. Nothing is loaded.

    Exit code 2 if there is none, or it cannot be read.
    """
    try:
        beside, unfinished = checkpoints_in(path) if tag is None else ([], [])
        try:
            checkpoint = find(path, tag)
        except CheckpointNotFoundError:
            if not (beside or unfinished):
                raise
            checkpoint = None
    except SMPError as error:
        stop(printable(str(error)), USAGE)
    description, failure = None, ""
    try:
        description = None if checkpoint is None else describe(checkpoint)
    except SMPError as error:  # what lies beside it is shown all the same
        failure = str(error)
    if as_json:
        typer.echo(json.dumps(_as_json(beside, unfinished, description), indent=1))
    else:
        _show("\n".join(_listing(path, beside, unfinished, checkpoint)), nl=bool(beside or unfinished))
        if description is not None:
            _show("\n".join(_described(description, None if tensors else _NUM_SHOWN)))
    if failure:
        stop(printable(failure), USAGE)


@checkpoint_app.command()
def verify(path: PathArgument, tag: TagOption = None) -> None:
    """Read every file of a checkpoint and compare it with what was written.

    Exit code 0 if it is whole, 1 if not (each file that is missing, cut off or changed is named), 2 if there is none.
    """
    try:
        checkpoint = find(path, tag)
        verdict = verify_checkpoint(checkpoint)
    except SMPError as error:
        stop(printable(str(error)), USAGE)
    _show(f"{verdict.place} ({verdict.kind}): {verdict.num_files} files, {readable_bytes(verdict.num_bytes)}")
    for text in verdict.limits:
        _show(f"note: {text}")
    for problem in verdict.problems:
        _show(f"problem: {problem}")
    if verdict.problems:
        stop(f"not whole: {len(verdict.problems)} problem{'s' if len(verdict.problems) > 1 else ''}", FAILED)
    typer.echo("no problem found" if verdict.limits else "whole")


@checkpoint_app.command()
def convert(
    path: PathArgument,
    destination: Annotated[str, typer.Argument(help="The file (full) or the folder (safetensors) to write, or a URL.")],
    to: Annotated[str, typer.Option(help="full: one file of torch.save; or safetensors.", metavar="full|safetensors")],
    tag: TagOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at DESTINATION.")] = False,
    model_only: Annotated[bool, typer.Option("--model-only", help="full: leave the optimizer out.")] = False,
    config: Annotated[
        str | None,
        typer.Option(help="safetensors: a config.json of transformers, or a folder with it and a tokenizer, to copy."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="safetensors: float32, bfloat16 or float16; taken from fp32 masters if there are some."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="safetensors: of one file, as 5GB.")] = MAX_SHARD_SIZE,
    keep_names: Annotated[
        bool, typer.Option("--keep-names", help="Keep the names of distributed layers, instead of transformers'.")
    ] = False,
    model_index: Annotated[int | None, typer.Option(help="Which of several models, from 0.")] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not compare the digests first.")] = False,
    trust_pickles: Annotated[
        bool, typer.Option("--trust-pickles", help="Open any object in it; it can then run any code.")
    ] = False,
) -> None:
    """Write a checkpoint in another form: a partial one as a full one, or as safetensors; a full one as safetensors.

    DESTINATION is complete or untouched at every moment. Exit code 2 if it exists, or PATH is not whole.
    """
    try:
        arguments: dict[str, Any] = {
            "tag": tag,
            "overwrite": overwrite,
            "translate": not keep_names,
            "model_index": model_index,
            "verify": not no_verify,
            "trust_pickles": trust_pickles,
        }
        if to == "full" and (config is None and dtype is None):
            done = convert_to_full(path, destination, model_only=model_only, **arguments)
        elif to == "safetensors":
            arguments.update(config=config, dtype=_dtype(dtype), max_shard_size=max_shard_size)
            done = convert_to_safetensors(path, destination, **arguments)
        else:
            raise SMPConfigError(
                "--config and --dtype are for --to safetensors"
                if to == "full"
                else f"--to {to}: expected full or safetensors"
            )
    except SMPError as error:
        stop(printable(str(error)), USAGE)
    beside = ", and the optimizer's state beside it" if done.has_optimizer else ""
    _show(f"{done.destination}: {done.num_tensors} tensors, {readable_bytes(done.num_bytes)}{beside}")
    _show(f"names: {done.names}")


# What `inspect` prints


def _listing(
    path: str, beside: list[ListedCheckpoint], unfinished: list[str], chosen: ListedCheckpoint | None
) -> list[str]:
    if not beside and not unfinished:
        return []
    width = max((len(one.name) for one in beside), default=0)
    lines = [f"in {shown(path)}:"]
    for one in beside:
        state = {None: "no record", True: "complete", False: f"NOT COMPLETE: {one.problem}"}[one.is_complete]
        steps = one.record.facts.get("num_steps") if one.record is not None else None
        parts = [
            one.kind,
            *([_time(one.record.time)] if one.record is not None else []),
            *([f"step {steps}"] if steps is not None else []),
            state,
        ]
        mark = "*" if chosen is not None and one.name == chosen.name else " "
        lines.append(one_line(f" {mark} {one.name:<{width}}  {', '.join(parts)}"))
    lines += [f"   {one_line(name)}  being written, or broken off" for name in unfinished]
    if beside and chosen is None:
        lines.append("no file `newest`: give a --tag to see one of them")
    return [*lines, ""]


def _described(what: Description, limit: int | None) -> list[str]:
    complete = {None: "no completion record", True: "complete (sizes; `verify` compares checksums)", False: ""}
    lines = [
        f"{what.place}",
        f"  kind: {what.kind}, {complete[what.is_complete] or f'NOT COMPLETE: {what.problem}'}",
    ]
    facts = dict(what.facts)
    if what.time is not None:
        lines.append(f"  saved: {_time(what.time)} by modelparallel {facts.get('modelparallel', '?')}, "
                     f"torch {facts.get('torch', '?')}")  # fmt: skip
    if "num_steps" in facts:
        lines.append(f"  steps: {facts['num_steps']}")
    if what.num_processes is not None:
        shape = facts.get("shape", {})
        axes = "".join(f", {axis} {count}" for axis, count in shape.items())
        if shape:
            axes += f", dp {shape.get('tp', 1) * shape.get('rdp', 1)}"
        sharding = facts.get("sharded_data_parallel_degree") or 1
        lines.append(
            f"  processes: {what.num_processes}{axes}" + (f", sharded over {sharding}" if sharding > 1 else "")
        )
    lines.append(f"  files: {len(what.files)}, {readable_bytes(sum(what.files.values()))}")
    lines += [f"    {one_line(name)}  {readable_bytes(size)}" for name, size in sorted(what.files.items())]
    for part, (number, elements, num_bytes) in what.totals().items():
        lines.append(f"  {part}: {number} tensors, {elements:,} elements, {readable_bytes(num_bytes)}")
    if what.num_random_states or what.num_data_loaders:
        lines.append(f"  random states: {what.num_random_states}, data loaders: {what.num_data_loaders}")
    if what.user_content is not None:
        content = what.user_content
        if isinstance(content, dict):
            content = ", ".join(f"{key} ({kind})" for key, kind in content.items())
        lines.append(f"  user content: {one_line(content)}")
    rows = [
        f"    {one_line(one.name)}  {list(one.shape)} {one.dtype} {readable_bytes(one.num_bytes)}"
        + (f" in {one.num_pieces} pieces" if one.num_pieces > 1 else "")
        for one in what.tensors
    ]
    lines += _limited("tensors", rows, limit)
    return lines + _limited("objects", [f"    {one_line(name)}" for name in what.objects], limit)


def _limited(noun: str, rows: list[str], limit: int | None) -> list[str]:
    if not rows:
        return []
    shown_rows = rows if limit is None else rows[:limit]
    rest = len(rows) - len(shown_rows)
    return [f"  {noun}:", *shown_rows, *([f"    and {rest} more (--tensors shows all)"] if rest else [])]


def _as_json(beside: list[ListedCheckpoint], unfinished: list[str], what: Description | None) -> dict[str, Any]:
    return {
        "checkpoints": [
            {
                "name": one.name,
                "kind": one.kind,
                "is_complete": one.is_complete,
                "problem": one.problem,
                "time": one.record.time if one.record is not None else None,
                "num_steps": one.record.facts.get("num_steps") if one.record is not None else None,
            }
            for one in beside
        ],
        "unfinished": unfinished,
        "checkpoint": None
        if what is None
        else {
            **asdict(what),
            "totals": {
                part: {"tensors": number, "elements": elements, "bytes": num_bytes}
                for part, (number, elements, num_bytes) in what.totals().items()
            },
        },
    }


def _show(text: str, nl: bool = True) -> None:
    """Print what stands in files: nothing of it may reach the terminal as a command."""
    typer.echo(printable(text), nl=nl)


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise SMPConfigError(f"--dtype {name}: expected float32, bfloat16, float16 or float64")
    return dtype


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")
