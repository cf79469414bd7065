"""Random scripts with side doors (fuzz_side_doors.py) equal one process or say why not. ``make fuzz`` runs more."""

from __future__ import annotations

import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from fuzz_reduction import without_each
from fuzz_side_doors import OPTIMIZERS, source
from side_door_programs import BLOCKS, Door, Layout, Program, Step
from side_door_runs import Verdict, printed, verdicts
from side_doors import DOORS

NUM_CASES = int(os.environ.get("FUZZ_SIDE_DOORS", "6"))
CASES_PER_SET = 6
SEED = os.environ.get("FUZZ_SEED", "")

LAYOUTS = [
    *[(Layout(2), 8), (Layout(3), 3), (Layout(2, copies=2), 2), (Layout(1, tensor_parallel=2), 2)],
    *[(Layout(2, tensor_parallel=2), 1), (Layout(1, copies=2), 1), (Layout(1, copies=2, sharding="parameters"), 1)],
    *[(Layout(2, copies=2, sharding="parameters"), 1), (Layout(1, copies=2, sharding="optimizer"), 2)],
    (Layout(2, copies=2, sharding="optimizer"), 1),
]


#: (date, where, what a script holds, why): scripts that are not made. They are counted and printed, and the list is to
#: become empty, but for what a rank gives by contract.
EXCLUDED: list[tuple[str, Callable[[Layout], bool], str, str]] = [
    (
        "by contract", lambda layout: layout.tensor_parallel > 1,
        r"for p in (net\.parameters\(\)|listed\d)|norm \d|square\(\)\.sum\(\) for p in|deepcopy\(net\)\n",
        "the parameters of a split layer are a rank's slices",
    ),
    (
        "by contract", lambda layout: layout.tensor_parallel > 1,
        "(?s)" + "|".join(rf"^(?!.*DistributedModel\(copy{i}).*zip\(copy{i}\." for i in range(10)),
        "a whole copy that is zipped with a rank's slices: torch names the shapes",
    ),
    (
        "by contract", lambda layout: layout.num_stages > 1, r"_foreach_mul_",
        "torch's functions on lists refuse an empty one, which a stage without weights has",
    ),
    (
        "by contract", lambda layout: layout.num_stages > 1, r"slope \d|post_accumulate",
        "gradients are on the stage that holds the weight, and None elsewhere",
    ),
    (
        "by contract", lambda layout: layout.num_stages > 1,
        "(?s)" + "|".join(
            rf"^(?!.*DistributedModel\(copy{i}).*zip\(copy{i}\.parameters\(\), model\." for i in range(10)
        ) + r"|^(?!.*DistributedModel\(copy).*\]\.lerp_|late\d = \[p\.detach",
        "model.parameters() gives what the rank holds: a plain list that is zipped with it has another length",
    ),
    (
        "by contract", lambda layout: layout.is_recomputed, r"total\d|KeepCount|KeepList|KeepAverage|KeepBuffer",
        "a recomputed module runs twice, and its hooks, as with torch.utils.checkpoint",
    ),
    (
        "by contract", lambda layout: layout.num_batches > 1, r"KeepBuffer",
        "buffers of copies are those of the first one, as with torch's DDP",
    ),
]  # fmt: skip


def exclusion(layout: Layout, text: str) -> str:
    """Why a script is not made, or nothing."""
    return next((why for _, where, part, why in EXCLUDED if where(layout) and re.search(part, text)), "")


def make_layout(rng: random.Random) -> Layout:
    layout = rng.choices([entry for entry, _ in LAYOUTS], [weight for _, weight in LAYOUTS])[0]
    layout = replace(layout, num_microbatches=rng.choice([1, 2, 2, 3]))
    if layout.num_stages > 1:
        layout = replace(layout, schedule=rng.choice(["interleaved", "interleaved", "simple", "zero_bubble"]))
        if rng.random() < 0.7:
            layout = replace(layout, homes=tuple(rng.randrange(3) for _ in range(rng.randint(2, 5))))
        elif layout.num_stages == 2 and rng.random() < 0.3:
            layout = replace(layout, virtual=2)
    return replace(layout, is_recomputed=rng.random() < 0.15)


def make_program(rng: random.Random) -> Program:
    net = rng.choice(["list", "sequential", "dict", "nested", "twice", "residual", "tied"])
    blocks = [rng.choice(["linear", "mlp", "res", "res", "deep", "norm", "gelu"]) for _ in range(rng.randint(2, 4))]
    keepers = [name for name in BLOCKS if name.startswith("keep")]
    kinds = [rng.choice(list(DOORS)) for _ in range(rng.randint(1, 3))]
    if "keeper_read" in kinds:
        blocks[rng.randrange(len(blocks))] = rng.choice(keepers)
    doors = [Door(kind, rng.randrange(60), rng.randrange(1000), rng.randrange(2)) for kind in kinds]
    steps = [
        Step("eval" if rng.random() < 0.2 else "train", rng.choice([6, 6, 8, 7, 9])) for _ in range(rng.randint(2, 4))
    ]
    steps[0] = replace(steps[0], mode="train") if rng.random() < 0.8 else steps[0]
    return Program(
        rng.randrange(1000), net, tuple(blocks), tuple(doors), tuple(steps), rng.randrange(len(OPTIMIZERS)),
        rng.random() < 0.7,
    )  # fmt: skip


def smaller_layouts(layout: Layout) -> Iterator[Layout]:
    for name, value in (
        ("num_stages", 2), ("num_microbatches", 1), ("num_microbatches", 2), ("schedule", "interleaved"),
        ("virtual", 1), ("is_recomputed", False), ("copies", 1), ("tensor_parallel", 1), ("sharding", ""),
        ("homes", (0, 1)),
    ):  # fmt: skip
        current = getattr(layout, name)
        is_less = current > value if isinstance(value, int) else current not in (value, ())
        if is_less and not (layout.sharding and name == "copies"):
            yield replace(layout, **{name: value})


def smaller_programs(program: Program) -> Iterator[Program]:
    for name, least in (("doors", 0), ("steps", 1), ("blocks", 1)):
        entries = getattr(program, name)
        if len(entries) > least:
            for fewer in without_each(entries):
                yield replace(program, **{name: fewer})
    for index, name in enumerate(program.blocks):
        for instead in ("linear", "res"):
            if name not in ("linear", instead):
                yield replace(program, blocks=(*program.blocks[:index], instead, *program.blocks[index + 1 :]))
    for index, step in enumerate(program.steps):
        if step != Step():
            yield replace(program, steps=(*program.steps[:index], Step(), *program.steps[index + 1 :]))
    for name, value in (("net", "list"), ("optimizer", 1), ("seed", 0), ("is_guarded", True)):
        if getattr(program, name) != value:
            yield replace(program, **{name: value})


def verdict_of(layout: Layout, program: Program) -> str:
    return verdicts(layout, [source(layout, program)])[0].kind


def reduced(layout: Layout, program: Program, kind: str) -> tuple[Layout, Program]:
    """The smallest pair found that still ends with a verdict of this kind; smaller programs are tried all at once."""
    while True:
        for fewer in smaller_layouts(layout):
            if verdict_of(fewer, program) == kind:
                layout = fewer
                break
        else:
            candidates = list(smaller_programs(program))
            found = verdicts(layout, [source(layout, candidate) for candidate in candidates])
            wrong = [candidate for candidate, verdict in zip(candidates, found, strict=True) if verdict.kind == kind]
            smallest = next((candidate for candidate in wrong if verdict_of(layout, candidate) == kind), None)
            if smallest is None:
                return layout, program
            program = smallest


def run_cases(seed: int, num_cases: int, counts: Counter[str]) -> Iterator[tuple[Layout, Program, Verdict]]:
    """The programs that differ, raise an unclear error or hang; all are counted by verdict."""
    rng = random.Random(seed)
    num_done = 0
    while num_done < num_cases:
        layout = make_layout(rng)
        programs: list[Program] = []
        while len(programs) < min(CASES_PER_SET, num_cases - num_done):
            program = make_program(rng)
            if why := exclusion(layout, source(layout, program)):
                counts["excluded: " + why] += 1
            else:
                programs.append(program)
        for program, verdict in zip(programs, verdicts(layout, [source(layout, p) for p in programs]), strict=True):
            counts[verdict.kind] += 1
            num_done += verdict.kind != "invalid"
            if verdict.kind not in ("equal", "named", "invalid"):
                yield layout, program, verdict


def check_cases(seed: int, num_cases: int) -> None:
    counts: Counter[str] = Counter()
    failures = list(run_cases(seed, num_cases, counts))
    print(f"side doors, seed {seed}: {dict(counts)}")
    for layout, program, verdict in failures[:3]:
        print(f"\n{verdict.kind}: {verdict.text}\n{printed(*reduced(layout, program, verdict.kind))}", flush=True)
    assert not failures, f"{len(failures)} of {num_cases}: " + "\n".join(
        f"{verdict.kind}: {verdict.text}" for *_, verdict in failures[:3]
    )
    assert counts["equal"] >= 0.6 * num_cases, f"most scripts are to run, not to be refused: {dict(counts)}"


def test_random_side_doors_equal_one_process() -> None:
    check_cases(int(SEED or "7"), NUM_CASES)


def test_a_wrong_script_is_found_and_made_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a script that is said to be wrong, what is not needed is left out."""
    layout = Layout(1, num_microbatches=2, is_recomputed=True)
    doors = (Door("hook_replaces", 3, 5), Door("edits", 0, 0), Door("modes", 1, 1))
    program = Program(3, "dict", ("mlp", "res", "linear"), doors, (Step("eval"), Step(), Step("train", 9)), 2)

    def judged(layout: Layout, texts: list[str]) -> list[Verdict]:
        return [Verdict("different" if "p.grad.mul_(0.5)" in text else "equal") for text in texts]

    monkeypatch.setattr(sys.modules[__name__], "verdicts", judged)
    small, least = reduced(layout, program, "different")
    assert small == Layout(1, num_microbatches=1)
    assert least == Program(doors=(Door("edits", 0, 0),), blocks=least.blocks, steps=least.steps, optimizer=1)
    assert len(least.blocks) == len(least.steps) == 1
    assert "p.grad.mul_(0.5)" in printed(small, least)


def test_a_silent_difference_is_seen() -> None:
    """A script whose value depends on the rank, and one that writes to what another rank does not see."""
    text = source(Layout(2), Program())
    wrong = text.replace('    see("weights"', "    see('mine', smp.pp_rank())\n    see(\"weights\"")
    raised = text.replace('    see("weights"', "    raise KeyError('mine')\n    see(\"weights\"")
    assert wrong != text
    found = verdicts(Layout(2), [text, wrong, raised.replace("raise", "if smp.pp_size() > 1: raise")])
    assert [verdict.kind for verdict in found] == ["equal", "different", "raw"], found
