"""Full checkpoints: the whole model in one file (smp-api section 14)."""

from __future__ import annotations

from typing import Any

from modelparallel.errors import NotBuiltError


def save_full(path: Any, tag: str, **arguments: Any) -> None:
    """Raises NotBuiltError: full checkpoints are not built yet."""
    raise NotBuiltError("smp.save_checkpoint(partial=False) is not built yet: save model.state_dict()")


def load_full(path: Any, tag: str | None, **arguments: Any) -> Any:
    """Raises NotBuiltError: full checkpoints are not built yet."""
    raise NotBuiltError("smp.resume_from_checkpoint(partial=False) is not built yet: use model.load_state_dict()")
