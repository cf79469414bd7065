"""``smp.utils``, a module path of the original API."""

from modelparallel.training.library_state import get_distribution_axis, rmsg

__all__ = ["get_distribution_axis", "rmsg"]
