"""What the stages have computed with beside the values of the step: compared once, in the first step of each kind.

[Note: ledger] Glue takes an ordinary tensor or a number for one that every stage has. It is not if it left a module by
a way that nobody saw (a global of another module, an object of a library), or if it depends on the rank. In the first
step of a kind every stage writes down what its operations were given, and before the backward begins the stages
compare: a difference is an error, not a wrong number.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from modelparallel import trees
from modelparallel.comm.event_log import user_code_line
from modelparallel.errors import DivergenceError
from modelparallel.pipeline.values.stage_tensor import StageTensor

#: (what was computed and where in the script, a digest of what it was given, whether other stages may not compute it).
LedgerEntry = tuple[str, int, bool]

_MOST_ELEMENTS = 1 << 18  # of a larger tensor a part is looked at


class Ledger:
    """The ledger of one program of the first step of a kind."""

    def __init__(self) -> None:
        self.entries: list[LedgerEntry] = []

    def note(self, what: str, values: Iterable[Any], *, written: int | None = None, may_be_alone: bool = False) -> None:
        """``values``: the arguments of an operation; ``written``: which of them it fills: that may hold anything.
        ``may_be_alone``: it may stand behind ``if smp.rank() == 0``.
        """
        digest = 0
        for index, value in enumerate(values):
            if index != written:
                digest = _digest(value, digest)
        if digest:
            self.entries.append((f"{what} at {user_code_line()}", digest, may_be_alone))

    def note_known(self, what: str, values: Sequence[Any], result: Any) -> None:
        """``result``: of an operation that each stage may do by itself, as often as it likes. It remembers what it was
        made with, which counts where it is given to others, to the backward or to the caller of the step.
        """
        digest = zlib.crc32(f"{what} at {user_code_line()}".encode())
        for value in values:
            digest = _digest(value, digest)
        for leaf in trees.leaves(result):
            if isinstance(leaf, StageTensor):
                leaf.made_with = digest


def _digest(value: Any, digest: int) -> int:
    kind = type(value)
    if kind is StageTensor:
        return zlib.crc32(value.made_with.to_bytes(4), digest) if value.made_with else digest
    if kind is str or value is None:
        return digest
    if kind in (int, float, complex, bool):
        return zlib.crc32(repr(value).encode(), digest)
    if not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter):
        return digest
    if value.layout is not torch.strided or value.is_meta or not value.numel():
        return digest
    flat = value.detach().reshape(-1)
    flat = flat[:: -(-flat.numel() // _MOST_ELEMENTS)].contiguous().cpu()
    try:
        return zlib.crc32(flat.view(torch.uint8).numpy().tobytes(), digest)
    except (RuntimeError, TypeError):  # a kind of tensor that has no plain memory
        return digest


def compare(ledgers: Mapping[int, Sequence[LedgerEntry]]) -> None:
    """Raises DivergenceError if an operation was given other numbers on one stage than on another."""
    first_stage = min(ledgers)
    for stage, entries in sorted(ledgers.items()):
        for own, other in _pairs(ledgers[first_stage], entries):
            if own[1] == other[1]:
                continue
            raise DivergenceError(
                f"{other[0]} is given a number or an ordinary tensor that is another one on pp_rank {stage} than on "
                f"pp_rank {first_stage}. Either it depends on the rank, or it came out of a module other than by its "
                "return value: that code runs on the module's pp_rank alone. Return it from the module, keep it in an "
                "attribute of the module (self.name = value), or take it in a hook of the module: those are followed"
            )


def _pairs(first: Sequence[LedgerEntry], second: Sequence[LedgerEntry]) -> Iterator[tuple[LedgerEntry, LedgerEntry]]:
    """The entries of two stages for the same operations, first the entries that other stages speak of."""
    alone = [_by_place(side) for side in (first, second)]
    for what in [what for what in alone[0] if what in alone[1]]:
        if len(alone[0][what]) == len(alone[1][what]):
            yield from zip(alone[0][what], alone[1][what], strict=True)
    yield from zip(*([entry for entry in side if not entry[2]] for side in (first, second)), strict=False)


def _by_place(entries: Sequence[LedgerEntry]) -> dict[str, list[LedgerEntry]]:
    entries_at: dict[str, list[LedgerEntry]] = {}
    for entry in entries:
        if entry[2]:
            entries_at.setdefault(entry[0], []).append(entry)
    return entries_at
