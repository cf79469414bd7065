"""``smp.patches.checkpoint``: the same functions as ``smp.checkpoint`` and ``smp.checkpoint_sequential``."""

from modelparallel.stepping.recomputed import checkpoint, checkpoint_sequential

__all__ = ["checkpoint", "checkpoint_sequential"]
