"""``smp.save_checkpoint``: the full half; the partial one is written elsewhere."""

from __future__ import annotations

from typing import Any

from modelparallel.checkpoints.full import save_full
from modelparallel.errors import UnsupportedError


def save_checkpoint(
    path: str,
    tag: str,
    partial: bool = True,
    model: Any = None,
    optimizer: Any = None,
    user_content: Any = None,
    translate_if_full: bool = True,
    num_kept_partial_checkpoints: int | None = None,
    *,
    full_optimizer: bool = False,
) -> None:
    """Write a checkpoint; collective over the world."""
    if partial:
        raise UnsupportedError("smp.save_checkpoint(partial=True) is not built here: pass partial=False")
    save_full(
        path,
        tag,
        model=model,
        optimizer=optimizer if full_optimizer else None,
        user_content=user_content,
        translate_if_full=translate_if_full,
    )
