"""Counting operations while the user's body runs: floating-point operations, and storages seen."""

from __future__ import annotations

import itertools
import logging
import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from modelparallel.torch_compat import TorchDispatchMode, flop_registry

LOGGER = logging.getLogger("modelparallel.partitioning")

aten = torch.ops.aten


class OperationCounter(TorchDispatchMode):
    """Calls ``report(count)`` with the floating-point operations of every operation that runs.

    A multiply-add counts two.     Matrix products, convolutions and attention are counted, elementwise work is not.
    """

    supports_higher_order_operators = True

    def __init__(self, report: Callable[[int], None]) -> None:
        super().__init__()
        self._report = report
        self._failed: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = getattr(func, "_overloadpacket", func)
        formula = _OWN_FORMULAS.get(packet) or flop_registry.get(packet)
        if formula is None:
            if isinstance(func, torch._ops.OpOverload) and func is not torch.ops.prim.device.default:
                # Under inference mode an operation such as `linear` arrives whole: look at what it is made of.
                with self:
                    parts = func.decompose(*args, **kwargs)
                if parts is not NotImplemented:
                    return parts
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        try:
            self._report(int(formula(*args, **kwargs, out_val=result)))
        except (
            Exception
        ) as error:  # the formulas are torch's and know few forms of arguments; an estimate may not stop a step
            if packet not in self._failed:
                self._failed.add(packet)
                LOGGER.warning("tracing: cannot count the operations of %s: %s: %s", func, type(error).__name__, error)
        return result


def storage_of(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """The tensor's storage, whose ``id`` stands for it while it lives; None for a tensor without one.

    Sparse tensors, lazy parameters and the wrappers of ``torch.vmap`` and ``torch.func`` have none.
    """
    if tensor.layout != torch.strided or torch.nn.parameter.is_lazy(tensor):
        return None
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


class StorageSet:
    """Storages met so far. Remembered by weak reference: a freed storage's address may serve a new one."""

    def __init__(self, tensors: Iterable[torch.Tensor] = ()) -> None:
        self._seen: dict[int, weakref.ref[Any]] = {}
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's storage is new here. A tensor without one storage (sparse, lazy) is never new."""
        if tensor.layout != torch.strided or torch.nn.parameter.is_lazy(tensor):
            return False
        storage = storage_of(tensor)
        if storage is None or tensor in self:
            return False
        self._seen[id(storage)] = weakref.ref(storage)
        return True

    def __contains__(self, tensor: torch.Tensor) -> bool:
        storage = storage_of(tensor)
        known = self._seen.get(id(storage))
        return storage is not None and known is not None and known() is storage


class Traffic:
    """Bytes that would travel between positions in the order of units, if every position were a stage of its own.

    Only tensors made from weights count: what is computed from the inputs alone is computed on every stage.
    """

    def __init__(self) -> None:
        # Storage -> a reference, and the first and last position that has it.
        self._storages: dict[int, tuple[weakref.ref[Any], int, int]] = {}
        self._crossings: list[tuple[int, int, int]] = []  # from position, to position, bytes

    def made(self, tensor: torch.Tensor, position: int) -> None:
        """``tensor`` was computed at ``position``."""
        storage = storage_of(tensor)
        if storage is not None and self._known(tensor) is None:
            self._storages[id(storage)] = (weakref.ref(storage), position, position)

    def used(self, tensor: torch.Tensor, position: int) -> bool:
        """``tensor`` is needed at ``position``; returns whether it was made from weights."""
        known = self._known(tensor)
        if known is None:
            return False
        reference, first, last = known
        size = tensor.nbytes
        if position < first:
            self._crossings.append((position, first, size))
        elif position > last:
            self._crossings.append((last, position, size))
        self._storages[id(storage_of(tensor))] = (reference, min(first, position), max(last, position))
        return True

    def cheapest_place(self, tensors: Iterable[torch.Tensor]) -> int | None:
        """The position where an operation on ``tensors`` needs the fewest bytes moved; the later one of several."""
        present = [(known[1], known[2], tensor.nbytes) for tensor in tensors if (known := self._known(tensor))]
        places = sorted({place for first, last, _ in present for place in (first, last)}, reverse=True)
        return min(
            places,
            key=lambda place: sum(size for first, last, size in present if not first <= place <= last),
            default=None,
        )

    def over_cuts(self, num_positions: int) -> list[int]:
        """The bytes over a cut after each position."""
        changes = [0] * (num_positions + 1)
        for start, end, size in self._crossings:
            changes[start] += size
            changes[end] -= size
        return list(itertools.accumulate(changes))[:num_positions]

    def _known(self, tensor: torch.Tensor) -> tuple[weakref.ref[Any], int, int] | None:
        storage = storage_of(tensor)
        known = self._storages.get(id(storage))
        return known if storage is not None and known is not None and known[0]() is storage else None


def _attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    """Two matrix products a head: scores, and their product with the values."""
    batch_and_heads = math.prod(query.shape[:-2])
    products = query.shape[-2] * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    return 2 * batch_and_heads * products


def _recurrent_flops(
    input: torch.Tensor, input_weight: torch.Tensor, hidden_weight: torch.Tensor, *args: Any, **kwargs: Any
) -> int:
    """One direction of one layer: every step multiplies both weights."""
    steps_and_batch = input.numel() // input.shape[-1]
    return 2 * steps_and_batch * (input_weight.numel() + hidden_weight.numel())


# Kernels of CPU builds for which torch has no formula.
_OWN_FORMULAS: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten.mkldnn_rnn_layer: _recurrent_flops,
}
