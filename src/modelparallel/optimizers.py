"""``smp.optimizers``, a module path of the original API."""

from modelparallel.optimizer.fused import FusedAdam, FusedLAMB, FusedLamb, FusedNovoGrad, Norms

__all__ = ["FusedAdam", "FusedLAMB", "FusedLamb", "FusedNovoGrad", "Norms"]
