"""Random numbers that all ranks of a group draw alike, although their generators stand at different places.

Each tensor-parallel rank has samples of its own, so its default generators are seeded and used by itself. Where the
ranks work on one tensor together, a mask that they all apply comes from a generator that starts at a seed of the first
rank; what each applies to its own slice alone comes from that seed and its rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from modelparallel.comm.collectives.started import exchange_integers
from modelparallel.torch_compat.generators import default_generator

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group

_MASK = (1 << 62) - 1


def agreed_seed(group: Group) -> int:
    """A fresh number from the default CPU generator of the group's first rank; every rank draws one. Collective."""
    seed = int(torch.randint(_MASK, ()))
    return exchange_integers((seed,), group, "a random seed")[0][0]


def derived_seed(seed: int, *what: int) -> int:
    """A number that follows from ``seed`` and ``what``, the same in every process."""
    return hash((seed, *what)) & _MASK  # the hash of a tuple of ints is the same everywhere, and well mixed


def generator_of(seed: int, device: torch.device) -> torch.Generator:
    """A generator of its own that starts at ``seed``."""
    return torch.Generator(device=device).manual_seed(seed)


@contextmanager
def default_generator_at(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, the default generator of ``device`` starts at ``seed``; afterwards it is where it was."""
    generator = default_generator(device)
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)
