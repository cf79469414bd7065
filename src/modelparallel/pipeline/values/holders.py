"""Objects that hold values of the step in attributes and go into placed modules: Hugging Face caches that glue has
filled (prefix tuning), contexts of a script's own. The home gets a copy with its values in their places.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from modelparallel import trees
from modelparallel.pipeline.values.stage_tensor import StageTensor


def held_values(value: Any) -> list[StageTensor]:
    """The values of the step in an object's attributes, and in those of objects in it; none in a module or function."""
    values: dict[int, StageTensor] = {}
    pending, seen = [value], set()
    while pending:
        part = pending.pop()
        if isinstance(part, StageTensor):
            values[id(part)] = part
        elif id(part) not in seen:
            seen.add(id(part))
            if trees.is_container(part):
                pending.extend(child for _, child in trees.children(part))
            elif is_looked_into(part):
                pending.extend(vars(part).values())
    return list(values.values())


def with_values(value: Any, locals_: Mapping[int, torch.Tensor]) -> Any:
    """A copy of the object with other tensors in the place of its values; what holds none is not copied."""
    made: dict[int, Any] = {}

    def copied(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            return locals_.get(id(part), part)
        if trees.is_container(part):
            pairs = trees.children(part)
            parts = {key: copied(child) for key, child in pairs}
            return part if all(parts[key] is child for key, child in pairs) else trees.rebuild(part, parts)
        if not is_looked_into(part):
            return part
        if id(part) not in made:
            result = made[id(part)] = copy.copy(part)
            result.__dict__.update({name: copied(child) for name, child in vars(part).items()})
        return made[id(part)]

    return copied(value)


def is_looked_into(value: Any) -> bool:
    """Whether attributes of ``value`` are looked into: not those of a tensor, a module or a function."""
    if isinstance(value, (torch.Tensor, nn.Module)) or callable(value):
        return False
    return type(getattr(value, "__dict__", None)) is dict


def is_decoder_cache(value: object) -> bool:
    """Whether ``value`` is an object in which layers of a Hugging Face decoder keep keys and values."""
    kind = type(value)
    return kind.__name__.endswith("Cache") and kind.__module__.split(".")[0] == "transformers"
