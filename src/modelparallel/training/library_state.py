"""``smp.state``: what client code reads of the library's state (smp-api sections 1 and 18).

It only looks through to the session; nothing is kept here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from modelparallel.job import session
from modelparallel.nn.huggingface import translations_of
from modelparallel.training import runtime

if TYPE_CHECKING:
    from modelparallel.config.table import Config


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


def get_distribution_axis(param: torch.Tensor) -> int | None:
    """The tensor dim along which ``param`` is sliced over the tensor-parallel ranks; None when it is not sliced.

    Local call, for a parameter or buffer of a model wrapped by ``smp.DistributedModel``. Raises
    ``NotInitializedError`` before ``smp.init()``. See smp-api section 18.
    """
    row = runtime.current().index.row_of(param)
    return None if row is None or row.split is None else row.split.dim


def rmsg(message: object) -> str:
    """``message`` as text with the ranks of this process in front, for debug prints. Local call."""
    current = session.current()
    global_rank = current.identity.global_rank
    at = current.topology.coordinates(global_rank)
    return f"[rank {global_rank}, pp {at.pp_rank}, tp {at.tp_rank}, rdp {at.rdp_rank}] {message}"
