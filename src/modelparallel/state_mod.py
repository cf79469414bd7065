"""``smp.state``: what client code reads of the library's state (smp-api sections 1 and 18).

It only looks through to the session; nothing is kept here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from modelparallel import runtime, session
from modelparallel.nn.huggingface import translations_of

if TYPE_CHECKING:
    from modelparallel.parameter_table import Config


class ModuleManager:
    """``smp.state.module_manager``."""

    @property
    def translate_functions(self) -> list[tuple[Callable[..., Any], Callable[..., Any]]]:
        """Pairs ``(smp_to_hf, hf_to_smp)`` of the families of transformers that were replaced in the current model: of
        several wrapped ones the last that has any.

        Each translates the state dict of the whole model and leaves what it does not know as it is; ``max_seq_len`` is
        their second argument. Empty if nothing of transformers was replaced.
        """
        models = runtime.current().models if session.is_initialized() else []
        return next((pairs for model in reversed(models) if (pairs := translations_of(model.module))), [])


class State:
    """The type of ``smp.state``."""

    module_manager = ModuleManager()

    @property
    def cfg(self) -> Config:
        """The effective configuration: one attribute for every parameter, at its default when unset."""
        return session.current().config


state = State()
