"""The partition plan: which stage is the home of which module, as frozen data.

A plan is made by :mod:`modelparallel.partitioning` and read by everything that must know where a weight lives: the
engine, the parameter table, the optimizer, checkpoints. It names *units* (the finest modules that are placed) and
the few tensors that belong to a module above all units. Names are those of ``module.named_modules()`` and
``module.named_parameters()`` of the user's own module; the root module is called ``""``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from modelparallel.errors import PartitionError
from modelparallel.errors.foreign_text import parse_json

FORMAT_VERSION = 1
_MAX_NAMED = 8


@dataclass(frozen=True)
class StageFigures:
    """What one stage holds and does; sizes are in bytes, shares are fractions of the whole model.

    Attributes:
        compute_share: of forward and backward; None if nothing was traced.
        flops: floating-point operations of one microbatch's forward.
        state_bytes: parameters, gradients, optimizer state and buffers.
        activation_bytes: kept of one microbatch for its backward.
        in_flight: for each piece of the model on this stage, how many microbatches' activations it holds at most;
            empty in plans of older versions.
        memory_bytes: state and activations in flight.
    """

    num_parameters: int
    parameter_bytes: int
    memory_share: float
    compute_share: float | None
    flops: int = 0
    state_bytes: int = 0
    activation_bytes: int = 0
    in_flight: tuple[int, ...] = ()
    memory_bytes: int = 0


@dataclass(frozen=True)
class PartitionPlan:
    """The home stage of every unit and of every tensor above the units.

    Two plans are equal when they place everything alike; where they come from and their figures do not count.

    Attributes:
        num_stages: the pipeline degree the plan is for.
        modules: (module name, stage), in execution order (module order where nothing was traced).
        tensors: (full tensor name, stage) of the parameters and changing buffers owned by modules above all units.
        copies: (module or tensor, stages) of further stages that hold a tied copy, since modules there call or read it.
        origin: how the plan was made: ``"traced"``, ``"sizes"``, ``"manual"``, ``"loaded"``, or ``"as model 0"``.
        figures: one entry per stage, or empty.
        virtual_degree: pieces of the model on each stage.
        costs: (unit, its share of the work of the model's forward); empty if nothing was traced.
        backward_costs: (unit, work of the gradients of its inputs, work of the gradients of its weights), in the same
            measure: 1.0 is the forward of the whole model.
        traffic: (from stage, to stage, bytes) of what one microbatch's forward sends; as much comes back in the
            backward, where gradients are needed.
    """

    num_stages: int
    modules: tuple[tuple[str, int], ...]
    tensors: tuple[tuple[str, int], ...] = ()
    copies: tuple[tuple[str, tuple[int, ...]], ...] = ()
    origin: str = field(default="manual", compare=False)
    figures: tuple[StageFigures, ...] = field(default=(), compare=False)
    virtual_degree: int = field(default=1, compare=False)
    costs: tuple[tuple[str, float], ...] = field(default=(), compare=False)
    backward_costs: tuple[tuple[str, float, float], ...] = field(default=(), compare=False)
    traffic: tuple[tuple[int, int, int], ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        entries = (*self.modules, *self.tensors)
        for name, stage in entries:
            if not 0 <= stage < self.num_stages:
                raise PartitionError(
                    f"{_quoted(name)} is placed on stage {stage}, but the plan has stages 0 to {self.num_stages - 1}"
                )
        for name, count in Counter(name for name, _ in entries).items():
            if count > 1:
                raise PartitionError(f"{_quoted(name)} is placed {count} times in the partition plan")

    @cached_property
    def _stage_of_entry(self) -> Mapping[str, int]:
        return dict(self.modules)

    @cached_property
    def _stage_of_tensor(self) -> Mapping[str, int]:
        return dict(self.tensors)

    @cached_property
    def _stages_of_copies(self) -> Mapping[str, tuple[int, ...]]:
        return dict(self.copies)

    @property
    def work(self) -> dict[str, tuple[float, float, float]]:
        """For every unit the work of its forward, of the gradients of its inputs, and of those of its weights."""
        gradients = {name: (inputs, weights) for name, inputs, weights in self.backward_costs}
        return {name: (forward, *gradients.get(name, (forward, forward))) for name, forward in self.costs}

    def unit_of(self, name: str) -> str | None:
        """The unit that is the module ``name`` or contains it; None for a module above or outside all units."""
        for candidate in _enclosing(name):
            if candidate in self._stage_of_entry:
                return candidate
        return None

    def home_of_module(self, name: str) -> int | None:
        """The home stage of the module ``name``.

        None for a module that has no home: one above the units (even when all its units share a stage), or without
            weights.
        """
        unit = self.unit_of(name)
        return None if unit is None else self._stage_of_entry[unit]

    def home_of_tensor(self, name: str) -> int | None:
        """The home stage of the parameter or buffer with this full name; None for a constant that every stage keeps."""
        if name in self._stage_of_tensor:
            return self._stage_of_tensor[name]
        return self.home_of_module(name.rpartition(".")[0])

    def copies_of(self, name: str) -> tuple[int, ...]:
        """The further stages that hold a tied copy of the module, parameter or buffer with this full name."""
        places = (self._stages_of_copies.get(entry, ()) for entry in _enclosing(name))
        return next((stages for stages in places if stages), ())

    def modules_on(self, stage: int) -> tuple[str, ...]:
        """The names of the units on ``stage``, in execution order."""
        return tuple(name for name, home in self.modules if home == stage)

    def bytes_over_cuts(self) -> tuple[int, ...]:
        """For every boundary between two neighbouring stages, what one microbatch's forward sends across, both ways.

        What stage 0 sends to stage 2 crosses two boundaries.
        """
        return tuple(
            sum(count for source, target, count in self.traffic if min(source, target) <= cut < max(source, target))
            for cut in range(self.num_stages - 1)
        )

    def check(
        self,
        parameter_names: Iterable[str],
        *,
        module_names: Iterable[str] | None = None,
        buffer_names: Iterable[str] = (),
    ) -> None:
        """Every parameter is placed exactly once, or :class:`PartitionError`; with ``module_names`` nothing else is.

        Args:
            parameter_names: as from ``named_parameters()`` of the user's module.
            module_names: as from ``named_modules()``; None leaves out the search for entries that the model does not
                have.
            buffer_names: as from ``named_buffers()``; only used with ``module_names``.
        """
        parameters = list(parameter_names)
        problems = []
        missing = [name for name in parameters if self.home_of_tensor(name) is None]
        if missing:
            problems.append(f"no stage for {_some(missing, 'parameter')}")
        twice = []
        for name in parameters:
            owner = name.rpartition(".")[0]
            places = [entry for entry in _enclosing(owner) if entry in self._stage_of_entry]
            if len(places) + (name in self._stage_of_tensor) > 1:
                twice.append(name)
        if twice:
            problems.append(f"more than one entry for {_some(twice, 'parameter')}")
        if module_names is not None:
            known = set(module_names)
            unknown = [name for name, _ in self.modules if name not in known]
            if unknown:
                problems.append(f"the model has no {_some(unknown, 'module')}")
            known_tensors = {*parameters, *buffer_names}
            unknown = [name for name, _ in self.tensors if name not in known_tensors]
            if unknown:
                problems.append(f"the model has no {_some(unknown, 'tensor')}")
        if problems:
            raise PartitionError(
                f"the partition plan ({self.origin}) does not fit the model: {'; '.join(problems)}. "
                "Make a new plan (without load_partition) or use the model that the plan was made for"
            )

    def to_json(self) -> str:
        """The plan as JSON text; :meth:`from_json` reads it back."""
        content = {
            "format": "modelparallel partition plan",
            "version": FORMAT_VERSION,
            "num_stages": self.num_stages,
            "origin": self.origin,
            "modules": [list(entry) for entry in self.modules],
            "tensors": [list(entry) for entry in self.tensors],
            "copies": [[name, list(stages)] for name, stages in self.copies],
            "figures": [vars(figures) for figures in self.figures],
            "virtual_degree": self.virtual_degree,
            "costs": [list(entry) for entry in self.costs],
            "backward_costs": [list(entry) for entry in self.backward_costs],
            "traffic": [list(entry) for entry in self.traffic],
        }
        return json.dumps(content, indent=1)

    @classmethod
    def from_json(cls, text: str) -> PartitionPlan:
        """The plan that :meth:`to_json` wrote; :class:`PartitionError` for any other text."""
        try:
            content: dict[str, Any] = parse_json(text)
            if content["version"] != FORMAT_VERSION:
                raise PartitionError(
                    f"partition plan of version {content['version']!r}; this version reads {FORMAT_VERSION} only"
                )
            return cls(
                num_stages=int(content["num_stages"]),
                modules=tuple((str(name), int(stage)) for name, stage in content["modules"]),
                tensors=tuple((str(name), int(stage)) for name, stage in content["tensors"]),
                copies=tuple((str(name), tuple(map(int, stages))) for name, stages in content.get("copies", ())),
                origin=str(content["origin"]),
                figures=tuple(
                    StageFigures(**{**figures, "in_flight": tuple(figures.get("in_flight", ()))})
                    for figures in content.get("figures", ())
                ),
                virtual_degree=int(content.get("virtual_degree", 1)),
                costs=tuple((str(name), float(share)) for name, share in content.get("costs", ())),
                backward_costs=tuple(
                    (str(name), float(inputs), float(weights))
                    for name, inputs, weights in content.get("backward_costs", ())
                ),
                traffic=tuple(
                    (int(source), int(target), int(count)) for source, target, count in content.get("traffic", ())
                ),
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise PartitionError(f"this is not a partition plan: {type(error).__name__}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the plan to the file ``path`` as JSON; one process writes, the directory is made."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> PartitionPlan:
        """The plan stored in the file ``path``; :class:`PartitionError` if there is none."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise PartitionError(f"cannot read the partition plan {str(path)!r}: {error}") from error
        try:
            return cls.from_json(text)
        except PartitionError as error:
            raise PartitionError(f"{str(path)!r}: {error}") from error

    def table(self) -> str:
        """A readable table: per stage its parameters, bytes, shares of memory and compute, and its modules."""
        return _table(self)

    def report(self, predicted_bubble: float | None = None) -> str:
        """A longer table, with FLOPs, activations and memory, and what travels between the stages.

        Args:
            predicted_bubble: the share of the time in which the stages are expected to wait, if it is known.
        """
        return _report(self, predicted_bubble)


def _enclosing(name: str) -> list[str]:
    """``name`` and the names of all modules around it, innermost first, the root ``""`` last."""
    parts = name.split(".") if name else []
    return [".".join(parts[:length]) for length in range(len(parts), -1, -1)]


def _quoted(name: str) -> str:
    return repr(name) if name else "the root module"


def _some(names: list[str], noun: str) -> str:
    """``"parameters 'a', 'b' and 3 more"``."""
    shown = ", ".join(_quoted(name) for name in names[:_MAX_NAMED])
    rest = len(names) - _MAX_NAMED
    return f"{noun}{'s' if len(names) > 1 else ''} {shown}{f' and {rest} more' if rest > 0 else ''}"


# ----------------------------------------------------------------------------------------------------------------------
# A plan as text: the short table, and the report that is logged before training


def _table(plan: PartitionPlan) -> str:
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


def _report(plan: PartitionPlan, predicted_bubble: float | None = None) -> str:
    """The table with FLOPs, activations and memory, then lines about balance, traffic and waiting."""
    if not plan.figures or not plan.figures[0].in_flight:
        return "\n".join([_table(plan), *_remarks(plan, predicted_bubble)])
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
