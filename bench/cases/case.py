"""What a benchmark is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.harness import Result


@dataclass(frozen=True)
class Case:
    """A benchmark. ``measure(num_pairs)`` makes its results: one of the same name, or several that begin with it."""

    name: str
    #: What is compared with what, for the documents.
    description: str
    measure: Callable[[int], Sequence[Result]]
