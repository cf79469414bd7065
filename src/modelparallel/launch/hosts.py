"""The hosts of a job, as its processes are told of them."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


@dataclass(frozen=True)
class Hosts:
    """The hosts whose processes train together, in the order of their ranks; `current` is this one's place.

    Attributes:
        sizes: how many processes each of them has; empty for a job of this machine alone.
        address: of global rank 0, as all ranks reach it (MASTER_ADDR).
        interface: the network interface of this host that leads to the others.
        variables: those by which gloo and NCCL are told of it.
    """

    names: tuple[str, ...]
    current: int
    address: str
    interface: str
    sizes: tuple[int, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.names[self.current]

    @property
    def first_rank(self) -> int:
        """The global rank of the first process of this host."""
        return sum(self.sizes[: self.current])


#: The only host of a job of one machine, by the name that scripts know.
THIS_MACHINE = Hosts(("algo-1",), 0, "127.0.0.1", LOOPBACK)
