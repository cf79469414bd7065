"""Random programs under random schedules equal one process. ``make fuzz`` runs more of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from engine_runs import Outcome, compare
from fuzz_programs import COMPOUND_OPS, OPS, STATE_OPS, UNITS, Op, Program, Step, run_programs
from fuzz_reduction import reduced
from pool import RankError, run_ranks

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
        if kind == "region":
            inner = tuple(op for op in inner if op.kind != "log")
        since = draw(st.sampled_from([0, 0, 0, 2])) if kind in STATE_OPS and kind != "count" else 0
        # Of the values, those made last are the interesting ones.
        a = draw(st.integers(-3, 2))
        made.append(Op(kind, a, draw(st.integers(-3, 1)), draw(indices(19)), since, inner))
    return tuple(made)


STEPS = st.builds(
    Step,
    mode=st.sampled_from(["train"] * 12 + ["forward", "eval", "no_grad", "inference"]),
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
    steps=st.lists(STEPS, min_size=4, max_size=7).map(tuple),
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
    is_placed=st.sampled_from([True, True, True, True, False]),
    push_limit_bytes=st.sampled_from([0, 64, 1 << 20]),
).map(lambda layout: layout if layout.is_placed else replace(layout, num_stages=2))


def expected_of(layout: Layout, programs: Sequence[Program]) -> dict[int, Outcome]:
    """What one process gives, by number. A program that is an error there (autograd forbids some writing in place) is
    left out.
    """
    single = Layout(1, num_microbatches=layout.num_microbatches).parameters()
    found: dict[int, Outcome] = run_ranks(run_programs, 1, dict(enumerate(programs)), False, parameters=single)[0]
    return {number: outcome for number, outcome in found.items() if not outcome.error}


def run(layout: Layout, programs: Mapping[int, Program]) -> list[dict[int, Outcome]]:
    """Per rank the outcomes by number."""
    return run_ranks(run_programs, layout.num_stages, programs, layout.is_placed, parameters=layout.parameters())


def is_documented(layout: Layout, program: Program, outcomes: Sequence[Outcome]) -> bool:
    """Whether an error is one that docs/engine.md announces, and that cannot be told from the program alone."""
    texts = " ".join(outcome.error for outcome in outcomes)
    if not layout.is_placed and "that can be placed separately" in texts:
        return True  # modules that are not called cannot be placed
    if "changes its buffers (running statistics) and is called again" in texts:
        return any(op.kind in COMPOUND_OPS for op in (*program.ops, *program.inner_ops))
    if "an input of a region of torch.utils.checkpoint was written to in place" in texts:
        return "region" in {op.kind for op in (*program.ops, *program.inner_ops)}  # as with torch's own
    if "is recomputed (activation checkpointing) writes values to a tensor from outside of it" in texts:
        # A model inside a region writes to its buffers.
        return "region" in {op.kind for op in program.ops} and bool(
            {op.kind for op in program.inner_ops} & {*STATE_OPS}
        )
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


def first_failure(layout: Layout, programs: Sequence[Program]) -> tuple[Layout, Program] | None:
    """The first program of a set that fails, made small; None if all are right."""
    try:
        check(layout, programs)
    except (AssertionError, RankError):
        for program in programs:
            if fails(layout, program):
                return reduced(layout, program, fails)
        raise  # only together
    return None


def fails(layout: Layout, program: Program) -> bool:
    """Whether the program is wrong, alone in its processes."""
    try:
        check(layout, [program])
    except (AssertionError, RankError):
        return True
    return False


@settings(
    max_examples=NUM_SETS,
    deadline=None,
    derandomize=not SEED,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(layout=LAYOUTS, programs=st.lists(PROGRAMS, min_size=PROGRAMS_PER_SET, max_size=PROGRAMS_PER_SET, unique=True))
def random_programs(layout: Layout, programs: list[Program]) -> None:
    if not SEED:
        check(layout, programs)
    elif failure := first_failure(layout, programs):
        print(f"\na regression for tests/test_fuzz.py:\n{failure!r}\n", flush=True)
        check(failure[0], [failure[1]])
        raise AssertionError(f"failed, and was right when it ran once more: {failure}")


def test_random_programs_equal_one_process() -> None:
    (seed(int(SEED))(random_programs) if SEED else random_programs)()


def test_a_wrong_program_is_made_small() -> None:
    """What the reduction leaves of a program that fails because of two of its operations together."""
    program = Program(
        units=("linear", "block", "tied"),
        ops=(Op("noise"), Op("choose", inner=(Op("unit"), Op("count", k=1), Op("log"))), Op("keep", k=3), Op("unit")),
        steps=(Step(), Step("eval", 7), Step()),
        num_losses=2,
    )

    def is_wrong(layout: Layout, program: Program) -> bool:
        kinds = [op.kind for entry in program.ops for op in (entry, *entry.inner)]
        return "count" in kinds and "keep" in kinds and layout.num_microbatches > 1 and len(program.steps) > 1

    layout, small = reduced(Layout(4, "simple", 5), program, is_wrong)
    assert (layout.num_stages, layout.kind, layout.num_microbatches) == (2, "interleaved", 2)
    assert small.ops == (Op("count", k=1), Op("keep", k=3)) and small.steps == (Step(), Step())
    assert len(small.units) == 1 and small.num_losses == 1


# Programs that once went wrong; failures of `make fuzz` go here.
REGRESSIONS: dict[str, tuple[Layout, Program]] = {
    "view_made_under_no_grad": (
        Layout(),
        Program(ops=(Op("unit", -1, 0, 1), Op("clone_write", -1, 0, 11)), inner_units=("batch_norm",), steps=(Step(),)),
    ),
    "buffer_assigned_without_a_trace": (
        Layout(push_limit_bytes=64),
        Program(units=("sequential",), ops=(Op("unit", -1, -3, 18), Op("into_buffer", -1, -3, 3))),
    ),
    "input_written_to_in_the_trace": (
        Layout(num_microbatches=1, is_placed=False),
        Program(seed=317, units=("writes", "batch_norm"), inner_units=("dict",), ops=(Op("unit", 0, -1, 1),)),
    ),
    "input_written_to_under_inference_mode": (
        Layout(num_stages=3, kind="zero_bubble"),
        Program(units=("no_bias", "tied"), homes=(2, 1), ops=(Op("write", 0, 0, 6),), steps=(Step("inference", 7),)),
    ),
}


REGRESSIONS["statistics_of_a_module_called_in_two_visits"] = (
    Layout(num_stages=3, active_microbatches=5),
    Program(
        units=("tied", "batch_norm"), inner_units=("block", "rows"), homes=(1, 3, 2, 0, 3), output=3,
        ops=(Op("unit", 1, -2, 9), Op("known", 2, -3, 2), Op("unit", 0, -1, 17)),
        steps=(Step(), Step(num_samples=7)),
    ),
)  # fmt: skip


def test_regressions() -> None:
    for layout, program in REGRESSIONS.values():
        assert check(layout, [program])[0].error == ""
