"""docs/benchmarks.md, generated from the results file: `python -m bench.report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.cases import CASES
from bench.cases.case import Case
from bench.harness import RESULTS_FILE, Result, read_results

REPORT_FILE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
NOTES_FILE = Path(__file__).with_name("notes.md")

INTRODUCTION = """# Benchmarks

Generated from `bench/results.json` by `make bench` (`make bench ONLY=name` for one, `QUICK=1` for a few pairs only); do
not edit. The remarks come from `bench/notes.md`.

A benchmark and its peer run in turn in the same processes (ours, peer, ours, peer, ...), with one thread per process.
The ratio is ours / peer: the median over the pairs, with its 95% bootstrap interval; below 1 we are faster. "Within
noise" means that the median is above the target and the interval contains it.
"""


def format_ratio(result: Result) -> str:
    """Median and interval."""
    if result.ratio_median is None:
        return "-"
    if result.ratio_low is None:
        return f"{result.ratio_median:.3f}"
    return f"{result.ratio_median:.3f} [{result.ratio_low:.3f}, {result.ratio_high:.3f}]"


def format_result(result: Result) -> str:
    """One line for the terminal."""
    peer = "" if result.peer is None else f", peer {result.peer:g}"
    return (
        f"{result.name}: ours {result.ours:g}{peer} {result.unit}, ratio {format_ratio(result)}, {result.pairs} pairs, "
        f"target {result.target}: {result.verdict}"
    )


def case_of(result: Result) -> Case | None:
    """The benchmark that made the result: the one with the longest name that the result's name begins with."""
    fitting = [case for case in CASES.values() if result.name == case.name or result.name.startswith(case.name + "_")]
    return max(fitting, key=lambda case: len(case.name), default=None)


def report(results: Sequence[Result], notes: str) -> str:
    """The whole document."""
    lines = [
        INTRODUCTION,
        "| benchmark | ours | peer | unit | ratio | pairs | target | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        peer = "-" if result.peer is None else f"{result.peer:g}"
        lines.append(
            f"| {result.name} | {result.ours:g} | {peer} | {result.unit} | {format_ratio(result)} | {result.pairs} "
            f"| {result.target} | {result.verdict} |"
        )
    lines += ["", "## What is compared", ""]
    described = {case.name: case for result in results if (case := case_of(result)) is not None}
    lines += [f"- `{case.name}`: {case.description}" for case in described.values()]
    lines += ["", "## Machines", ""]
    machines = sorted({result.machine for result in results})
    for name in machines:
        members = ", ".join(f"`{result.name}`" for result in results if result.machine == name)
        lines.append(f"- {name}: {members}")
    if notes:
        lines += ["", "## Remarks", "", notes.strip()]
    return "\n".join(lines) + "\n"


def current_report() -> str:
    """The document that belongs to the results file as it is."""
    notes = NOTES_FILE.read_text() if NOTES_FILE.exists() else ""
    return report(read_results(RESULTS_FILE), notes)


def write_report() -> None:
    """Write docs/benchmarks.md."""
    REPORT_FILE.parent.mkdir(exist_ok=True)
    REPORT_FILE.write_text(current_report())


if __name__ == "__main__":
    write_report()
