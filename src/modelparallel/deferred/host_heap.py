"""Give memory of the host that was freed back to the system.

[Note: holes in the heap] glibc serves tensors of up to 32 MiB from the heap, and returns what is freed there only from
its end. While a model is placed, large tensors are made that live for a moment, and small ones that stay come to lie
between them: in the worst case the process keeps as much memory as the whole model, of which it holds a share.
``malloc_trim`` returns the pages of the holes as well.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

# Small enough to not count beside a model, and large enough that a walk over the heap does not count in time.
_EVERY_BYTES = 8 * 1024 * 1024


def _find_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library, whose allocator is its own affair
        return None


_trim = _find_trim()


def trim_heap() -> None:
    """Return the pages of freed memory to the system, where the C library can."""
    if _trim is not None:
        _trim(0)


class FreedMemory:
    """Counts what was freed on the host, and trims the heap each time that it is some megabytes."""

    def __init__(self) -> None:
        self._num_bytes = 0

    def add(self, tensor: torch.Tensor) -> None:
        """``tensor`` is freed now, or soon."""
        if tensor.device.type == "cpu":
            self._num_bytes += tensor.numel() * tensor.element_size()

    def trim_if_much(self) -> None:
        """Trim the heap if it is worth it."""
        if self._num_bytes >= _EVERY_BYTES:
            self._num_bytes = 0
            trim_heap()
