"""``smp.amp``, a module path of the original API."""

from modelparallel.training.grad_scaler import GradScaler

__all__ = ["GradScaler"]
