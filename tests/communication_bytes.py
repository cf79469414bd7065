"""Count the bytes that this process sends, by a dispatch mode that sees the operations of torch.distributed."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class CountSentBytes(TorchDispatchMode):
    """``by_operation``: bytes sent, by the name of the operation; messages of at most ``ignored_bytes`` are left out
    (the tiny ones that agree on row counts and seeds).
    """

    def __init__(self, ignored_bytes: int = 600) -> None:
        super().__init__()
        self.by_operation: Counter[str] = Counter()
        self.num_tiny = 0
        self._ignored_bytes = ignored_bytes

    @property
    def total(self) -> int:
        return sum(self.by_operation.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            size = _bytes_sent(name, args)
            if size > self._ignored_bytes:
                self.by_operation[name] += size
            else:
                self.num_tiny += size > 0
        return func(*args, **(kwargs or {}))


def _bytes_sent(name: str, args: Any) -> int:
    """The library itself only sends; a collective of torch that it does not use on CPUs would be an error here."""
    if name == "send":
        return sum(tensor.numel() * tensor.element_size() for tensor in args[0])
    if name in ("recv_", "recv_any_source_", "barrier"):
        return 0
    raise AssertionError(f"an operation of torch.distributed that is not counted: {name}")
