"""What layers have kept in a Hugging Face cache at their homes, as the code after the model meets it.

[Note: left behind] With ``use_cache=True``, their default, decoders make a cache in every forward, and each layer keeps
its keys and values there, at its home alone. In training nobody looks at it again, so it is not worth a message.
Whoever does look would find numbers that no other stage has. So once the model has returned, one object stands in the
place of all tensors that are left in its caches, on every stage, and refuses whatever is done with it.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn

from modelparallel import trees
from modelparallel.errors import UnsupportedError
from modelparallel.pipeline.program.program import Program
from modelparallel.pipeline.values.holders import is_looked_into
from modelparallel.pipeline.values.stage_tensor import StageTensor


class LeftBehind(torch.Tensor):
    """Stands for tensors that are at the homes of the layers that have made them."""

    reason: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        leaves = trees.leaves((list(args), kwargs or {}))
        raise UnsupportedError(next(leaf.reason for leaf in leaves if isinstance(leaf, LeftBehind)))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"<{self.reason.split(':')[0]}>"

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise UnsupportedError(self.reason)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UnsupportedError(self.reason)


def leave_behind(program: Program) -> None:
    """The model has returned: let go of what its layers keep in caches."""
    if program.filled:
        with program.engine.natively():
            for cache, layer, home in program.filled.values():
                _leave(cache, layer, home)
        program.filled.clear()


def _leave(cache: Any, layer: str, home: int) -> None:
    """``layer``: the first one that was given it."""
    left = torch.empty(0).as_subclass(LeftBehind)
    left.reason = (
        f"{layer} and the layers after it have kept tensors in a {type(cache).__name__}, each at its home "
        f"(this one on pp_rank {home}): with pipelining no other stage has them, so the cache cannot be read, "
        "returned from the step or given to another forward. Take keys and values in forward hooks of the modules that "
        "make them, return only what you need of the model's output, or switch the cache off (use_cache=False)"
    )
    seen: set[int] = set()

    def without(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            return part if isinstance(part, (StageTensor, nn.Parameter)) else left
        if isinstance(part, tuple):
            return trees.rebuild(part, {key: without(child) for key, child in trees.children(part)})
        if id(part) not in seen and (isinstance(part, (list, dict)) or is_looked_into(part)):
            seen.add(id(part))
            content = part if isinstance(part, (list, dict)) else vars(part)
            pairs = enumerate(content) if isinstance(content, list) else content.items()
            for key, child in list(pairs):
                content[key] = without(child)
        return part

    without(cache)
