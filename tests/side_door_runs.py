"""Run scripts of fuzz_side_doors.py on plain torch and on the library, and judge what came out.

``python tests/side_door_runs.py script.py`` does it for a script that was printed by the fuzz.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine_runs import assert_equal_results
from fuzz_side_doors import source
from logs import logged_lines
from parity import assert_parity
from plain_smp import PlainSmp, readable
from pool import RankError, run_ranks
from side_door_programs import Layout, Program


@dataclass
class Seen:
    """What a script looked at on one rank, in order; ``error``: class and text, ``is_ours``: one of our classes."""

    values: list[tuple[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    error: str = ""
    is_ours: bool = False
    trace: str = ""


def run_script(text: str, num_microbatches: int, *, is_plain: bool) -> Seen:
    import modelparallel
    from modelparallel.errors import SMPError

    smp: Any = PlainSmp(num_microbatches) if is_plain else modelparallel
    seen, handles = Seen(), list[Any]()
    namespace: dict[str, Any] = {"__name__": "side_door"}
    before = torch.get_default_dtype()
    try:
        with logged_lines(logging.WARNING) as logged, warnings.catch_warnings(record=True) as caught:
            exec(compile(text, "<script>", "exec"), namespace)
            namespace["smp"] = smp
            namespace["program"](smp, lambda name, value: seen.values.append((name, readable(value))), handles)
    except Exception as error:
        seen.error, seen.is_ours = f"{type(error).__name__}: {error}", isinstance(error, SMPError)
        seen.trace = traceback.format_exc()
    finally:
        seen.warnings += [*logged, *(str(warning.message) for warning in caught)]
        torch.set_default_dtype(before)
        for handle in handles:
            handle.remove()
    return seen


def run_scripts(texts: Sequence[str], num_microbatches: int, is_plain: bool) -> list[Seen]:
    """The body of a rank: one script after another, until one ends with an error on some rank."""
    apart = dist.new_group()
    found = []
    for text in texts:
        found.append(run_script(text, num_microbatches, is_plain=is_plain))
        has_failed = torch.tensor(float(bool(found[-1].error)))
        dist.all_reduce(has_failed, group=apart)
        if has_failed > 0 and not is_plain:
            break
    return found


@dataclass
class Verdict:
    """``kind``: "equal", "named" (an error that names the cause), "raw" (any other), "different" (in silence), "hang",
    or "invalid" (an error in one process, too).
    """

    kind: str
    text: str = ""
    pattern: str = ""


#: An error counts as an answer if its text says what is wrong and what to write: names of what it speaks of, and a way
#: out. Each entry: what the text must hold.
NAMED = [
    r"a value of microbatch \d+.* is used in microbatch \d+",
    r"a value of smp.step is used after the step has ended",
    r"that is kept outside the step is written to",
    r"that is recomputed \(activation checkpointing\) writes values to a tensor from outside of it",
    r"parameter '.*' has requires_grad=\w+ on pp_rank",
    r"that can be placed separately",
    r"'.*' lives on pp_rank \d+ and is",
    r"'.*' was made the parameter '.*' after the partition",
    r"copy.deepcopy of a smp.DistributedModel",
    r"the gradient of '.*' is shared out among the data-parallel ranks",
    r"parameter '.*' was put into the model after it was wrapped",
    r"was taken out of the model, or replaced, after it was sharded",
    r"tensor parallelism has cut the two differently",
    r"is read from a tensor whose value is in parts on several ranks",
    r", while other microbatches are under way",
    r"would pair the wrong ones",
    r"is read between the modules while microbatches take turns",
    r"modules that share a parameter must be on one partition",
    r"has full backward hooks",
    r"a hook in the backward of .* keeps something",
    r"is given a number or an ordinary tensor that is another one on pp_rank",
    r"is used inside a module that runs on pp_rank \d+ and was not given it",
]

#: Errors of torch itself that name the cause, where shards are met in code outside of the model (docs say so).
NAMED_BY_TORCH = [r"got mixed torch.Tensor and DTensor", r"FSDP does not support deepcopy. Please use state dict"]


def judge(layout: Layout, ranks: Sequence[Seen], expected: Sequence[Seen]) -> Verdict:
    """Compare every rank with its copy of the plain program; an error must come before the first wrong number."""
    if any(member.error for member in expected):
        return Verdict("invalid", expected[0].error)
    leaves = torch.utils._pytree.tree_leaves([value for member in expected for _, value in member.values])
    if not all(bool(leaf.isfinite().all()) for leaf in leaves if isinstance(leaf, torch.Tensor)):
        return Verdict("invalid", "it diverges")
    errors = [seen.error for seen in ranks if seen.error]
    try:
        for rank, seen in enumerate(ranks):
            wanted = expected[copy_of(layout, rank)]
            compare(layout, f"rank {rank}", seen, wanted, is_whole=not errors)
        compare_gradients(layout, ranks, expected[0])
    except AssertionError as error:
        return Verdict("different", f"{error}" + (f"\nand then {errors[0]}" if errors else ""))
    if not errors:
        return Verdict("equal")
    follows = ("CommunicationError", "WaitTimeoutError", "DivergenceError")
    first = min((seen for seen in ranks if seen.error), key=lambda seen: (seen.is_ours, seen.error.startswith(follows)))
    for seen in (first, *ranks):
        for pattern in NAMED:
            if seen.error and seen.is_ours and re.search(pattern, seen.error):
                return Verdict("named", seen.error, pattern)
        if first.error and not first.is_ours:
            break
    for pattern in NAMED_BY_TORCH:
        if layout.sharding == "parameters" and re.search(pattern, first.error):
            return Verdict("named", first.error, pattern)
    return Verdict("raw", first.error + "\n" + first.trace[-1500:])


def copy_of(layout: Layout, rank: int) -> int:
    """The copy whose batches a rank is fed: the default placement, D P T with the last one fastest."""
    per_copy = layout.num_stages * layout.tensor_parallel
    return rank // per_copy * layout.tensor_parallel + rank % layout.tensor_parallel


def compare(layout: Layout, where: str, seen: Seen, wanted: Seen, *, is_whole: bool) -> None:
    names = [name for name, _ in seen.values], [name for name, _ in wanted.values]
    if is_whole:
        assert names[0] == names[1], f"{where} looked at {names[0]}, one process at {names[1]}"
    for (name, value), (_, right) in zip(seen.values, wanted.values, strict=False):
        if name.startswith("gradients"):
            continue
        if name.startswith(("weights", "copy")):
            if where == "rank 0" or layout.copies * layout.tensor_parallel == 1:
                try:
                    assert_parity(value, right, dtype=torch.float64)
                except AssertionError as error:
                    raise AssertionError(f"{where}, {name}: {error}") from None
            continue
        assert_equal_results(value, right, f"{where}, {name}")


def compare_gradients(layout: Layout, ranks: Sequence[Seen], wanted: Seen) -> None:
    for index, (name, right) in enumerate(wanted.values):
        if not name.startswith("gradients") or any(len(seen.values) <= index for seen in ranks):
            continue
        found: dict[str, Any] = {}
        for seen in ranks:
            for key, value in seen.values[index][1].items():
                found[key] = value if found.get(key) is None else found[key]
        if layout.tensor_parallel > 1:  # slices
            found = {k: v for k, v in found.items() if v is None or right.get(k) is None or v.shape == right[k].shape}
            right = {key: value for key, value in right.items() if key in found}
        missing = [key for key in right if (right[key] is None) != (found.get(key) is None)]
        assert not missing, f"{name}: of {missing[0]} there is {found.get(missing[0])}, expected {right[missing[0]]}"
        right = {key: value for key, value in right.items() if value is not None}
        everything = [value.flatten() for value in wanted.values[index][1].values() if value is not None]
        if everything:  # what is small counts in proportion to all, also where slices are left out
            right["all"] = found["all"] = torch.cat(everything)
        found = {key: value for key, value in found.items() if value is not None}
        try:
            assert_parity(found, right, dtype=torch.float64)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def expected_of(layout: Layout, texts: Sequence[str]) -> list[list[Seen]]:
    """Per script what each copy sees on plain torch."""
    found = run_ranks(run_scripts, layout.num_batches, texts, layout.num_microbatches, True, timeout=120)
    return [list(copies) for copies in zip(*found, strict=True)]


def verdicts(layout: Layout, texts: Sequence[str]) -> list[Verdict]:
    expected = expected_of(layout, texts)
    found = [Verdict("invalid", copies[0].error) if copies[0].error else None for copies in expected]
    while left := [index for index, verdict in enumerate(found) if verdict is None]:
        try:
            ranks = run_ranks(
                run_scripts, layout.num_ranks, [texts[index] for index in left], layout.num_microbatches, False,
                parameters=layout.parameters(), timeout=150,
            )  # fmt: skip
        except RankError as error:
            if len(left) > 1:
                for index in left:  # each alone
                    found[index] = verdicts(layout, [texts[index]])[0]
                continue
            found[left[0]] = Verdict("hang" if "did not end" in str(error) else "raw", str(error)[:3000])
            continue
        for index, parts in zip(left, zip(*ranks, strict=True), strict=False):
            found[index] = judge(layout, parts, expected[index])
    return [verdict for verdict in found if verdict is not None]


def printed(layout: Layout, program: Program) -> str:
    """A script that shows the failure by itself."""
    parameters = layout.parameters()
    text = source(layout, program)
    return f'''"""{layout!r}

modelparallel run --nproc {layout.num_ranks} --parameters '{json.dumps(parameters)}' THIS prints what each rank sees;
python tests/side_door_runs.py THIS compares it with plain torch.
"""
{text}

if __name__ == "__main__":
    smp.init()
    program(smp, lambda name, value: print(smp.rank(), name, value, flush=True), [])
'''


if __name__ == "__main__":
    script = Path(sys.argv[1]).read_text()
    match = re.search(r'"""(Layout\(.*\))', script)
    assert match is not None, "the script's first line is no Layout(...)"
    verdict = verdicts(eval(match[1]), [script])[0]
    print(verdict.kind, verdict.text, sep="\n")
