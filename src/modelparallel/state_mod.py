"""``smp.state_mod``, a module path of the original API."""

from modelparallel.training.library_state import ModuleManager, State, state

__all__ = ["ModuleManager", "State", "state"]
