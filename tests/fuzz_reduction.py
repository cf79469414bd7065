"""Makes a failing program smaller, step by step, so that it can be pasted into the list of regressions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from fuzz_programs import Op, Program, Step

#: Fields that are tuples, and how few entries they may have.
_LISTS = {"steps": 1, "ops": 0, "inner_ops": 0, "units": 1, "inner_units": 1, "homes": 1, "frozen": 0}


def without_each(entries: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """The entries without one of them, for each."""
    for index in range(len(entries)):
        yield entries[:index] + entries[index + 1 :]


def smaller_programs(program: Program) -> Iterator[Program]:
    """Programs that do a little less."""
    for name, least in _LISTS.items():
        entries = getattr(program, name)
        if len(entries) > least:
            for fewer in without_each(entries):
                yield replace(program, **{name: fewer})
    for name in ("ops", "inner_ops"):
        entries = getattr(program, name)
        for index, op in enumerate(entries):
            for instead in smaller_ops(op):
                yield replace(program, **{name: entries[:index] + instead + entries[index + 1 :]})
    for index, step in enumerate(program.steps):
        for simpler in (Step(step.mode), replace(step, mode="train")):
            if simpler != step:
                yield replace(program, steps=(*program.steps[:index], simpler, *program.steps[index + 1 :]))
    for name, value in (("num_losses", 1), ("output", 0)):
        if getattr(program, name) != value:
            yield replace(program, **{name: value})


def smaller_ops(op: Op) -> Iterator[tuple[Op, ...]]:
    """What may stand for one operation."""
    if op.inner:
        yield op.inner
        for fewer in without_each(op.inner):
            yield (replace(op, inner=fewer),)


def smaller_layouts(layout: Any) -> Iterator[Any]:
    """Fewer stages and microbatches, the default schedule."""
    for name, values in (("num_stages", (2,)), ("num_microbatches", (1, 2)), ("kind", ("interleaved",))):
        for value in values:
            if value != getattr(layout, name) and (name == "kind" or value < getattr(layout, name)):
                yield replace(layout, **{name: value})


def reduced(layout: Any, program: Program, fails: Callable[[Any, Program], bool]) -> tuple[Any, Program]:
    """The smallest failing pair that is found by leaving out one thing after another."""
    while True:
        candidates = [(smaller, program) for smaller in smaller_layouts(layout)]
        candidates += [(layout, smaller) for smaller in smaller_programs(program)]
        found = next((candidate for candidate in candidates if fails(*candidate)), None)
        if found is None:
            return layout, program
        layout, program = found
