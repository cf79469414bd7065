"""The process groups of this process: one torch process group per set of ranks that communicates.

Made once, by `smp.init`, from the topology (making.py). Parts of the library receive a `Group` (or `Groups`) as an
argument.
"""

from dataclasses import dataclass, field, replace

import torch.distributed as dist

from modelparallel.comm.lookout import Lookout
from modelparallel.config.topology import GroupKind


@dataclass(frozen=True)
class Group:
    """The caller's own instance of a kind of group.

    `ranks` are the global ranks of its members, ascending; `rank_in_group` is the caller's position among them.
    `process_group` carries CPU tensors (gloo), and CUDA tensors (NCCL) where the job runs on GPUs; a group of one has a
    real process group, too. No wait in the group is longer than `timeout_seconds`. `layer` is the layer that works on
    it, for errors: each has its own copy (`of_layer`). `lookout` knows what the others are doing.
    """

    kind: GroupKind
    ranks: tuple[int, ...]
    rank_in_group: int
    process_group: dist.ProcessGroup
    timeout_seconds: float = field(default=600.0, compare=False)
    layer: str = field(default="", compare=False)
    lookout: Lookout | None = field(default=None, compare=False, repr=False)
    _copies: dict[str, "Group"] = field(default_factory=dict, compare=False, repr=False)

    @property
    def size(self) -> int:
        """The number of members."""
        return len(self.ranks)

    def of_layer(self, layer: str) -> "Group":
        """The same group, for a layer of this full name."""
        own = self._copies.get(layer)
        if own is None:
            own = self._copies[layer] = replace(self, layer=layer, _copies={})
        return own


@dataclass(frozen=True)
class Groups:
    """The caller's instance of every kind of group.

    `pipeline_process_group` and `message_process_group` span the world, are gloo, and each belong to one part: the
    messages between the stages, and the object messages of scripts (and what the lookout asks, by a tag of its own). So
    neither can take what was sent to the other.
    """

    world: Group
    tp: Group
    pp: Group
    rdp: Group
    dp: Group
    mp: Group
    pipeline_process_group: dist.ProcessGroup
    message_process_group: dist.ProcessGroup

    def of(self, kind: GroupKind) -> Group:
        """The caller's group of this kind."""
        group: Group = getattr(self, kind.value)
        return group
