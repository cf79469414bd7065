"""A partition plan as text: the short table, and the report that is logged before training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelparallel.plan.partition import PartitionPlan, StageFigures


def table(plan: PartitionPlan) -> str:
    """Per stage its parameters, bytes, shares of memory and compute, and its modules."""
    rows: list[Sequence[str]] = [("stage", "parameters", "bytes", "memory", "compute", "modules")]
    for stage in range(plan.num_stages):
        cells = ["-"] * 4
        if plan.figures:
            figures = plan.figures[stage]
            cells = [
                f"{figures.num_parameters:,}",
                readable_bytes(figures.parameter_bytes),
                f"{figures.memory_share:.1%}",
                _share(figures.compute_share),
            ]
        rows.append((str(stage), *cells, _contents(plan, stage)))
    return _aligned(rows)


def report(plan: PartitionPlan, predicted_bubble: float | None = None) -> str:
    """The table with FLOPs, activations and memory, then lines about balance, traffic and waiting."""
    if not plan.figures or not plan.figures[0].in_flight:
        return "\n".join([table(plan), *_remarks(plan, predicted_bubble)])
    rows: list[Sequence[str]] = [
        ("stage", "parameters", "bytes", "FLOPs", "compute", "activations", "memory", "modules")
    ]
    for stage, figures in enumerate(plan.figures):
        rows.append(
            (
                str(stage),
                f"{figures.num_parameters:,}",
                readable_bytes(figures.parameter_bytes),
                "-" if figures.compute_share is None else _readable_count(figures.flops),
                _share(figures.compute_share),
                _activations(figures),
                f"{readable_bytes(figures.memory_bytes)} ({figures.memory_share:.1%})",
                _contents(plan, stage),
            )
        )
    return "\n".join([_aligned(rows), *_remarks(plan, predicted_bubble)])


def readable_bytes(count: float) -> str:
    """`1536` is `1.5 KiB`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{int(size)} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _remarks(plan: PartitionPlan, predicted_bubble: float | None) -> list[str]:
    lines = []
    shares = [figures.compute_share for figures in plan.figures if figures.compute_share is not None]
    if len(shares) == plan.num_stages > 1:
        slowest = max(range(plan.num_stages), key=shares.__getitem__)
        waiting = 1 - 1 / (plan.num_stages * shares[slowest])
        lines.append(
            f"balance: stage {slowest} has the most compute, {shares[slowest]:.1%}; beside it the stages idle "
            f"{waiting:.1%} of their time"
        )
    if plan.traffic:
        channels = ", ".join(f"{source} -> {target} {readable_bytes(n)}" for source, target, n in plan.traffic)
        cuts = ", ".join(f"{cut}|{cut + 1} {readable_bytes(count)}" for cut, count in enumerate(plan.bytes_over_cuts()))
        lines.append(f"traffic of a microbatch's forward: {channels}; over the cuts: {cuts}")
    if predicted_bubble is not None:
        lines.append(f"predicted bubble: {predicted_bubble:.1%} of the time of the stages")
    return lines


def _activations(figures: StageFigures) -> str:
    """Microbatches in flight times the bytes of one; of several pieces the sum."""
    if not figures.activation_bytes:
        return "-"
    if len(figures.in_flight) == 1:
        return f"{figures.in_flight[0]} x {readable_bytes(figures.activation_bytes)}"
    held = readable_bytes(figures.memory_bytes - figures.state_bytes)
    return f"{held} ({'+'.join(map(str, figures.in_flight))} in flight)"


def _contents(plan: PartitionPlan, stage: int) -> str:
    """The modules and tensors of a stage; of several pieces with a bar between them."""
    pieces: list[list[str]] = [[]]
    for name, home in plan.modules:
        if home == stage:
            pieces[-1].append(name)
        elif pieces[-1] and plan.virtual_degree > 1:
            pieces.append([])
    tensors = [name for name, home in plan.tensors if home == stage]
    pieces[-1].extend(tensors)
    return " | ".join(", ".join(_runs(names)) for names in pieces if names)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned to the right; the last one, the modules, to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=True)), row[-1]]).rstrip()
        for row in rows
    )


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _readable_count(count: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if count < 1000:
            return f"{count:.1f} {unit}" if unit else f"{int(count)}"
        count /= 1000
    return f"{count:.1f} P"


def _runs(names: Iterable[str]) -> list[str]:
    """Names with runs of consecutive list elements folded: ``h.0, h.1, h.2`` is ``h.0..2``."""
    folded: list[list[Any]] = []
    for name in names:
        prefix, _, last = name.rpartition(".")
        index = int(last) if last.isdecimal() else None
        if folded and index is not None and folded[-1][0] == prefix and folded[-1][2] == index - 1:
            folded[-1][2] = index
        else:
            folded.append([prefix, last, index] if index is not None else [prefix, last, None])
    result = []
    for prefix, first, end in folded:
        text = f"{prefix}.{first}" if prefix else str(first)
        text = text or "(the whole model)"
        result.append(text if end is None or str(end) == first else f"{text}..{end}")
    return result
