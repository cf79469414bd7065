"""``smp.state``: what client code reads of the library's state (smp-api sections 1 and 18).

It only looks through to the session; nothing is kept here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from modelparallel import session

if TYPE_CHECKING:
    from modelparallel.parameter_table import Config


class ModuleManager:
    """``smp.state.module_manager``."""

    @property
    def translate_functions(self) -> list[tuple[Callable[..., Any], Callable[..., Any]]]:
        """Pairs ``(smp_to_hf, hf_to_smp)`` of the model families that were replaced as a whole: none is built yet."""
        return []


class State:
    """The type of ``smp.state``."""

    module_manager = ModuleManager()

    @property
    def cfg(self) -> Config:
        """The effective configuration: one attribute for every parameter, at its default when unset."""
        return session.current().config


state = State()
