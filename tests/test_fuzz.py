"""Random programs under random schedules equal one process. ``make fuzz`` runs more of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from engine_runs import Outcome, compare
from fuzz_programs import COMPOUND_OPS, OPS, STATE_OPS, UNITS, Op, Program, Step, run_programs
from pool import run_ranks

#: How many sets of programs; a set has PROGRAMS_PER_SET programs in one set of processes.
NUM_SETS = int(os.environ.get("FUZZ_SETS", "5"))
PROGRAMS_PER_SET = 8
SEED = os.environ.get("FUZZ_SEED", "")


@dataclass(frozen=True)
class Layout:
    """What a set of processes has in common."""

    num_stages: int = 2
    kind: str = "interleaved"
    num_microbatches: int = 2
    active_microbatches: int = 2
    is_placed: bool = True
    push_limit_bytes: int = 1 << 20

    def parameters(self) -> dict[str, Any]:
        placing = {"auto_partition": False, "default_partition": 0} if self.is_placed else {}
        return {
            "pipeline_parallel_degree": self.num_stages, "microbatches": self.num_microbatches,
            "pipeline": self.kind, "active_microbatches": self.active_microbatches,
            "push_limit_bytes": self.push_limit_bytes, "timeout_seconds": 20, **placing,
        }  # fmt: skip


def indices(most: int) -> Any:
    return st.integers(0, most)


@st.composite
def ops(draw: Any, max_size: int = 9, *, is_compound_allowed: bool = True) -> tuple[Op, ...]:
    """Mostly what does something; state that outlives the microbatch is rare."""
    simple = [name for name in OPS if name not in (*STATE_OPS, *COMPOUND_OPS, "unit")]
    kinds = ["unit"] * 8 + simple * 2
    if is_compound_allowed:
        kinds += [*COMPOUND_OPS * 2, *STATE_OPS]
    made = []
    for _ in range(draw(st.integers(1, max_size))):
        kind = draw(st.sampled_from(kinds))
        inner = draw(ops(3, is_compound_allowed=False)) if kind in COMPOUND_OPS else ()
        since = draw(st.sampled_from([0, 0, 0, 2])) if kind in STATE_OPS and kind != "count" else 0
        # Of the values, those made last are the interesting ones.
        a = draw(st.integers(-3, 2))
        made.append(Op(kind, a, draw(st.integers(-3, 1)), draw(indices(19)), since, inner))
    return tuple(made)


STEPS = st.builds(
    Step,
    mode=st.sampled_from(["train"] * 6 + ["forward", "eval", "no_grad", "inference"]),
    num_samples=st.sampled_from([4, 4, 4, 1, 2, 3, 5, 7]),
    length=st.sampled_from([2, 2, 2, 3]),
)
PROGRAMS = st.builds(
    Program,
    seed=indices(999),
    units=st.lists(st.sampled_from(list(UNITS)), min_size=1, max_size=5).map(tuple),
    inner_units=st.lists(st.sampled_from(list(UNITS)), min_size=1, max_size=2).map(tuple),
    homes=st.lists(indices(3), min_size=1, max_size=6).map(tuple),
    ops=ops(),
    inner_ops=ops(4),
    steps=st.lists(STEPS, min_size=2, max_size=6).map(tuple),
    frozen=st.one_of(st.just(()), st.lists(indices(4), max_size=2).map(tuple)),
    output=indices(3),
    num_losses=st.integers(1, 2),
)
LAYOUTS = st.builds(
    Layout,
    num_stages=st.sampled_from([2, 2, 3, 4]),
    kind=st.sampled_from(["interleaved", "zero_bubble", "simple"]),
    num_microbatches=st.integers(1, 5),
    active_microbatches=st.integers(1, 5),
    is_placed=st.sampled_from([True, True, True, False]),
    push_limit_bytes=st.sampled_from([0, 64, 1 << 20]),
)


def expected_of(layout: Layout, programs: Sequence[Program]) -> dict[int, Outcome]:
    """What one process gives, by number. A program that is an error there (autograd forbids some writing in place) is
    left out.
    """
    single = Layout(1, num_microbatches=layout.num_microbatches).parameters()
    found: dict[int, Outcome] = run_ranks(run_programs, 1, dict(enumerate(programs)), False, parameters=single)[0]
    return {number: outcome for number, outcome in found.items() if not outcome.error}


def run(layout: Layout, programs: Mapping[int, Program]) -> list[dict[int, Outcome]]:
    """Per rank the outcomes by number."""
    return run_ranks(
        run_programs, layout.num_stages, programs, layout.is_placed, parameters=layout.parameters(), timeout=150
    )


def is_documented(layout: Layout, program: Program, outcomes: Sequence[Outcome]) -> bool:
    """Whether an error is one that docs/engine.md announces, and that cannot be told from the program alone."""
    texts = " ".join(outcome.error for outcome in outcomes)
    if not layout.is_placed and "that can be placed separately" in texts:
        return True  # modules that are not called cannot be placed
    is_about_state = "that is kept outside the step is written to" in texts or "a value of microbatch" in texts
    return program.has_late_state and is_about_state


def check(layout: Layout, programs: Sequence[Program]) -> dict[int, Outcome]:
    """Compare with one process; returns the outcomes of pp_rank 0."""
    expected = expected_of(layout, programs)
    found: dict[int, Outcome] = {}
    while left := {number: programs[number] for number in expected if number not in found}:
        ranks = run(layout, left)
        for number, program in left.items():
            parts = [rank[number] for rank in ranks]
            found[number] = parts[0]
            try:
                compare("it", parts, expected[number])
            except AssertionError as error:
                if is_documented(layout, program, parts):
                    break  # the others once more, in other processes
                raise AssertionError(f"{layout!r},\n{program!r}\n{error}") from error
    return found


@settings(
    max_examples=NUM_SETS,
    deadline=None,
    derandomize=not SEED,
    database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink] if SEED else [Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(layout=LAYOUTS, programs=st.lists(PROGRAMS, min_size=PROGRAMS_PER_SET, max_size=PROGRAMS_PER_SET))
def test_random_programs_equal_one_process(layout: Layout, programs: list[Program]) -> None:
    check(layout, programs)
