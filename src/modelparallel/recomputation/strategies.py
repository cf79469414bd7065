"""Which children of an ``nn.Sequential`` are recomputed together (smp-api section 11)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from modelparallel.errors import SMPConfigError

_GROUP = re.compile(r"group_([1-9][0-9]*)")


def check_strategy(strategy: object) -> int | None:
    """The most children of a group; None: as many as are on one stage. Raises SMPConfigError (a ValueError)."""
    if strategy == "each":
        return 1
    if strategy == "contiguous":
        return None
    match = _GROUP.fullmatch(strategy) if isinstance(strategy, str) else None
    if match is None:
        raise SMPConfigError(
            f"strategy: expected 'each', 'contiguous' or 'group_x' with an integer x >= 1, got {strategy!r}"
        )
    return int(match[1])


def groups_of(homes: Sequence[frozenset[int]], strategy: str) -> list[range]:
    """The groups of children, as ranges of their indices.

    ``homes``: the stages of each child; a child without any (it has no weights) goes with those before it, one with
    several is alone. ``"each"``: every child alone; ``"contiguous"``: maximal runs of children on one stage;
    ``"group_x"``: those runs cut into pieces of at most x.
    """
    most = check_strategy(strategy)
    groups: list[range] = []
    start = 0
    home: frozenset[int] = frozenset()
    for index, there in enumerate(homes):
        is_other = len(there) > 1 or len(home) > 1 or bool(there and home and there != home)
        if index > start and (is_other or (most is not None and index - start >= most)):
            groups.append(range(start, index))
            if is_other:
                home = frozenset()
            start = index
        home = there or home
    if homes:
        groups.append(range(start, len(homes)))
    return groups
