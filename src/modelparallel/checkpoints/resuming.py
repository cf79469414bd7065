"""``smp.resume_from_checkpoint``: the full half; the partial one is written elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modelparallel import session
from modelparallel.checkpoints.full import load_full
from modelparallel.checkpoints.storage import Store
from modelparallel.checkpoints.user_content import Allowed
from modelparallel.errors import UnsupportedError


def resume_from_checkpoint(
    path: str,
    tag: str | None = None,
    partial: bool = True,
    strict: bool = True,
    load_optimizer: bool = True,
    load_sharded_optimizer_state: bool = True,
    translate_function: Any = None,
    *,
    allowed_types: Sequence[Allowed] = (),
    trust_pickles: bool = False,
) -> Any:
    """Load a checkpoint; collective over the world."""
    if partial:
        raise UnsupportedError("smp.resume_from_checkpoint(partial=True) is not built here: pass partial=False")
    models = session.current().models
    runtime: Any = session.current().runtime
    optimizers = runtime.live_optimizers()
    if tag is None:
        tag = Store.of(path).read("newest").decode().strip()
    return load_full(
        path,
        tag,
        model=models[-1] if models else None,
        optimizer=optimizers[-1] if optimizers and load_optimizer else None,
        strict=strict,
        translate_function=translate_function,
        allowed_types=allowed_types,
        trust_pickles=trust_pickles,
    )
