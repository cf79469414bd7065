"""Counting operations while the user's body runs: floating-point operations, and storages seen."""

from __future__ import annotations

import logging
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from modelparallel import trees
from modelparallel.partitioning.costs import OPERATIONS_PER_CALL, UnitCosts, tensor_bytes
from modelparallel.torch_compat import flop_registry
from modelparallel.torch_compat.functions import DispatchMode
from modelparallel.torch_compat.private_parts import (
    CPU_FLASH_ATTENTION,
    UNSAFE_VIEWS,
    is_operation,
    packet_of,
    schema_of,
)

LOGGER = logging.getLogger("modelparallel.partitioning")

aten = torch.ops.aten


class OperationCounter(DispatchMode):
    """Calls ``report(flops, moved_bytes)`` for every operation that runs.

    Matrix products, convolutions and attention count by their floating-point operations (a multiply-add is two), all
    others by the bytes that they read and write.
    """

    supports_higher_order_operators = True

    def __init__(self, report: Callable[[int, int], None]) -> None:
        super().__init__()
        self._report = report
        self._failed: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = packet_of(func)
        formula = _OWN_FORMULAS.get(packet) or flop_registry.get(packet)
        if formula is None:
            if is_operation(func) and func is not torch.ops.prim.device.default:
                # Under inference mode an operation such as `linear` arrives whole: look at what it is made of.
                with self:
                    parts = func.decompose(*args, **kwargs)
                if parts is not NotImplemented:
                    return parts
            result = func(*args, **kwargs)
            self._report(0, _moved_bytes(func, (args, kwargs), result))
            return result
        result = func(*args, **kwargs)
        try:
            self._report(int(formula(*args, **kwargs, out_val=result)), 0)
        except (
            Exception
        ) as error:  # the formulas are torch's and know few forms of arguments; an estimate may not stop a step
            if packet not in self._failed:
                self._failed.add(packet)
                LOGGER.warning("tracing: cannot count the operations of %s: %s: %s", func, type(error).__name__, error)
        return result


def work_of_call(
    function: Callable[..., Any], args: Any, kwargs: Any, parameters: Iterable[torch.Tensor]
) -> tuple[Any, tuple[float, float, float]]:
    """Call ``function``; (its output, its work: of the forward, of the input gradients, of the weight gradients).

    ``parameters``: those that the function may use.
    """
    flops = moved_bytes = 0

    def add(more_flops: int, more_bytes: int) -> None:
        nonlocal flops, moved_bytes
        flops += more_flops
        moved_bytes += more_bytes

    with OperationCounter(add):
        output = function(*args, **kwargs)
    has_gradient = any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in trees.leaves(output))
    trainable_bytes = sum(tensor_bytes(parameter) for parameter in parameters if parameter.requires_grad)
    needs_input_gradient = has_gradient and any(
        isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in trees.leaves((args, kwargs))
    )
    costs = UnitCosts(
        "",
        num_parameters=0,
        parameter_bytes=0,
        trainable_bytes=trainable_bytes,
        buffer_bytes=0,
        flops=flops + OPERATIONS_PER_CALL,
        moved_bytes=moved_bytes,
        needs_weight_gradient=has_gradient and trainable_bytes > 0,
        needs_input_gradient=needs_input_gradient,
    )
    return output, (costs.forward, costs.input_gradient, costs.weight_gradient)


def _moved_bytes(func: Any, arguments: Any, result: Any) -> int:
    """What an operation reads and writes; nothing for one that only looks at a tensor in another way."""
    returns = getattr(schema_of(func), "returns", ())
    packet = packet_of(func)
    is_view = any(value.alias_info is not None and not value.alias_info.is_write for value in returns)
    if is_view or packet in UNSAFE_VIEWS:
        return 0
    written = sum(_num_bytes(leaf) for leaf in trees.leaves(result))
    if packet in _ROW_READERS:
        return 2 * written
    return written + sum(_num_bytes(leaf) for leaf in trees.leaves(arguments))


def _num_bytes(leaf: Any) -> int:
    return leaf.nbytes if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided else 0


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
    """Who makes and who uses which tensor, by the position of the unit in the order of first calls.

    Only tensors made from weights count: what is computed from the inputs alone is computed on every stage.
    """

    def __init__(self) -> None:
        # Storage -> a reference, its positions (the maker first), and the bytes of the largest view that was used.
        self._storages: dict[int, tuple[weakref.ref[Any], _Travels]] = {}
        self._travels: list[_Travels] = []

    def made(self, tensor: torch.Tensor, position: int) -> None:
        """``tensor`` was computed at ``position``."""
        storage = storage_of(tensor)
        if storage is not None and self._known(tensor) is None:
            travels = _Travels([position])
            self._storages[id(storage)] = (weakref.ref(storage), travels)
            self._travels.append(travels)

    def used(self, tensor: torch.Tensor, position: int) -> bool:
        """``tensor`` is needed at ``position``; returns whether it was made from weights."""
        known = self._known(tensor)
        if known is None:
            return False
        if position not in known.positions:
            known.positions.append(position)
        if position != known.positions[0]:
            known.num_bytes = max(known.num_bytes, tensor.nbytes)
        return True

    def cheapest_place(self, tensors: Iterable[torch.Tensor]) -> int | None:
        """The position where an operation on ``tensors`` needs the fewest bytes moved; the later one of several."""
        present = [
            (min(known.positions), max(known.positions), tensor.nbytes)
            for tensor in tensors
            if (known := self._known(tensor))
        ]
        places = sorted({place for first, last, _ in present for place in (first, last)}, reverse=True)
        return min(
            places,
            key=lambda place: sum(size for first, last, size in present if not first <= place <= last),
            default=None,
        )

    def flows(self) -> dict[tuple[int, ...], int]:
        """Bytes by the positions that have them, the maker first."""
        sums: Counter[tuple[int, ...]] = Counter()
        for travels in self._travels:
            if travels.num_bytes:
                sums[tuple(travels.positions)] += travels.num_bytes
        return dict(sums)

    def _known(self, tensor: torch.Tensor) -> _Travels | None:
        storage = storage_of(tensor)
        known = self._storages.get(id(storage))
        return known[1] if storage is not None and known is not None and known[0]() is storage else None


@dataclass
class _Travels:
    positions: list[int]
    num_bytes: int = 0


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


# They read as much as they write, however large the tensor is that they read from.
_ROW_READERS = {aten.embedding, aten.index, aten.index_select, aten.gather}

# Kernels of CPU builds for which torch has no formula.
_OWN_FORMULAS: dict[Any, Callable[..., int]] = {
    CPU_FLASH_ATTENTION: _attention_flops,
    aten.mkldnn_rnn_layer: _recurrent_flops,
}
