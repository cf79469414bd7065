"""``smp.DistributedModel`` and its parts."""

from modelparallel.model.wrapper import DistributedModel

__all__ = ["DistributedModel"]
