"""Conversions of modules (``module.to``, ``half``, ``cuda``), seen before torch goes through their tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def intercepted_conversions(is_done: Callable[[nn.Module, Callable[[Any], Any]], bool]) -> Iterator[None]:
    """Ask ``is_done(module, function on a tensor)`` first; torch converts the module if it says no."""
    original: Callable[..., nn.Module] = nn.Module._apply

    def apply(self: nn.Module, fn: Callable[[Any], Any], *args: Any, **kwargs: Any) -> nn.Module:
        return self if is_done(self, fn) else original(self, fn, *args, **kwargs)

    nn.Module._apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = original  # type: ignore[method-assign]
