"""``p.grad`` of a parameter that is shared out: a tensor of the parameter's shape, of which this rank has its range.

[Note: shown gradients] The final gradient of a shared-out parameter is that of its shard, and nobody has the whole. A
script looks for it at ``p.grad``: it clears it, scales it, clips it, puts another one there. So ``p.grad`` is a tensor
without memory that stands for the shards of all ranks. What works on each element by itself works on this rank's
elements, as it does on the others' on theirs; what needs the whole (a norm, a sum, an index) raises, since each rank
would get a number of its own. Before a local gradient is added to it, it becomes an ordinary tensor with zeros where
other ranks have their range (``as_addend``): the sum over the ranks is then right whatever is done in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from modelparallel.errors import UnsupportedError
from modelparallel.torch_compat import current_backward_id, no_torch_function
from modelparallel.torch_compat.private_parts import make_wrapper, schema_of

if TYPE_CHECKING:
    from torch import nn

_aten = torch.ops.aten
#: Works on each element by itself, though torch does not say so of them.
_ELEMENTWISE = {"zero_", "fill_", "copy_", "clone", "_to_copy", "zero", "fill", "masked_fill_", "lift_fresh"}
_ALIASES = {"detach", "alias"}


class ShardGradient(torch.Tensor):
    """The gradient of the parameter ``name``, of which this rank has the elements ``start`` to ``stop``.

    They are in ``shard.grad`` (the gradient that stays with the shard), or for a result of arithmetic in ``own``.
    ``shard`` and ``own`` are None where this rank has no element of it.
    """

    parameter_name: str
    start: int
    stop: int
    _shard: nn.Parameter | None
    _own: torch.Tensor | None

    __torch_function__ = no_torch_function  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        name: str,
        shape: torch.Size,
        start: int,
        stop: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        shard: nn.Parameter | None = None,
        own: torch.Tensor | None = None,
    ) -> ShardGradient:
        made: ShardGradient = make_wrapper(cls, shape, dtype=dtype, device=device)
        made.parameter_name, made.start, made.stop, made._shard, made._own = name, start, stop, shard, own
        return made

    def __init__(self, *unused: Any, **also_unused: Any) -> None:
        super().__init__()

    @property
    def is_taken(self) -> bool:
        """Whether somebody has taken the gradient away from the shard (``zero_grad`` of the inner optimizer)."""
        return self._shard is not None and self._shard.grad is None

    @property
    def data(self) -> torch.Tensor:
        return torch.Tensor.detach(self)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        with torch.no_grad():  # torch would put it in the place of the memory that there is not
            self.copy_(value)

    def to_local(self) -> torch.Tensor:
        """This rank's elements, in the shape of the shard; the memory itself."""
        if self._shard is not None and self._shard.grad is not None:
            return self._shard.grad
        if self._own is not None:
            return self._own
        return torch.zeros(self.stop - self.start, dtype=self.dtype, device=self.device)

    def as_addend(self, divisor: float) -> torch.Tensor | None:
        """An ordinary tensor whose sum over the ranks, divided by ``divisor``, is this gradient, and which the shard
        gives up; None where this rank has nothing of it.
        """
        if self.stop == self.start or self.is_taken:
            return None
        whole = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        torch.mul(self.to_local().reshape(-1), divisor, out=whole.view(-1)[self.start : self.stop])
        if self._shard is not None:
            self._shard.grad = None
        return whole

    def of_same_range(self, own: torch.Tensor) -> ShardGradient:
        """``own`` holds these elements of something of the same shape."""
        return ShardGradient(
            self.parameter_name, self.shape, self.start, self.stop, dtype=own.dtype, device=own.device, own=own
        )  # fmt: skip

    def part_of(self, tensor: torch.Tensor, what: object) -> torch.Tensor:
        """The same elements of an operand, which every rank has whole."""
        if isinstance(tensor, ShardGradient):
            if (tensor.shape, tensor.start, tensor.stop) != (self.shape, self.start, self.stop):
                raise _refusal(self, what)
            return tensor.to_local()
        if tensor.ndim == 0:
            return tensor
        if torch.broadcast_shapes(tensor.shape, self.shape) != self.shape:
            raise _refusal(self, what)
        return part_of_whole(tensor.broadcast_to(self.shape), self.start, self.stop).view(self.to_local().shape)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        name = schema_of(func).name.partition("::")[2]
        faces = [value for value in _flat((args, kwargs)) if isinstance(value, ShardGradient)]
        face = faces[0]
        if current_backward_id() != -1:
            raise _refusal(face, f"{name} inside a backward")
        if name in _ALIASES:
            return face.of_same_range(face.to_local().detach())
        if name.startswith("_foreach_"):
            return _run_each(func, name, args, kwargs)
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        if name.endswith("_like"):
            return func(_whole_of(face), *args[1:], **kwargs)
        if is_random and name.endswith("_"):
            return _fill(face, func(_whole_of(face), *args[1:], **kwargs))
        if name not in _ELEMENTWISE and torch.Tag.pointwise not in func.tags:
            raise _refusal(face, name)
        return _run(func, name, args, kwargs, face)

    def __repr__(self, **unused: Any) -> str:  # type: ignore[override]
        return f"ShardGradient(elements {self.start} to {self.stop} of '{self.parameter_name}': {self.to_local()!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardGradient:
        return self.of_same_range(self.to_local().clone())

    def tolist(self) -> Any:
        """Refused; torch would name neither parameter nor reason."""
        raise _refusal(self, "tolist")

    def numpy(self, **unused: Any) -> Any:
        """Refused, likewise."""
        raise _refusal(self, "numpy")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise _refusal(self, "pickling")


def part_of_whole(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """The flat elements ``start`` to ``stop``; a view if it can be."""
    return tensor.detach().reshape(-1)[start:stop]


def _run(func: Any, name: str, args: Any, kwargs: Any, face: ShardGradient) -> Any:
    target = kwargs.get("out", args[0] if args else None)
    if schema_of(func).is_mutable and not isinstance(target, ShardGradient):
        raise _refusal(face, f"{name} into a tensor that every rank has whole")

    def local(value: Any) -> Any:
        return face.part_of(value, name) if isinstance(value, torch.Tensor) else value

    result = func(*_mapped(local, args), **_mapped(local, kwargs))
    if schema_of(func).is_mutable:
        return target
    return face.of_same_range(result) if isinstance(result, torch.Tensor) else result


def _run_each(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """A ``_foreach_`` operation: the lists go on in step, each place for itself."""
    base = name.removeprefix("_foreach_")
    first = next(value for value in _flat((args, kwargs)) if isinstance(value, ShardGradient))
    packet = getattr(_aten, base, None)
    is_known = packet is not None and any(
        torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()
    )
    targets = args[0]
    if base not in _ELEMENTWISE and not is_known:
        raise _refusal(first, name)
    lists = [value for value in args if isinstance(value, list | tuple) and len(value) == len(targets)]
    face_at = [
        next((values[place] for values in lists if isinstance(values[place], ShardGradient)), None)
        for place in range(len(targets))
    ]
    for face, target in zip(face_at, targets, strict=True):
        if face is not None and schema_of(func).is_mutable and not isinstance(target, ShardGradient):
            raise _refusal(face, f"{name} into a tensor that every rank has whole")

    def local(value: Any) -> Any:
        if not isinstance(value, list | tuple) or len(value) != len(targets):
            return value
        return [
            face.part_of(item, name) if face is not None and isinstance(item, torch.Tensor) else item
            for item, face in zip(value, face_at, strict=True)
        ]

    result = func(*[local(value) for value in args], **kwargs)
    if result is None:
        return None
    return [item if face is None else face.of_same_range(item) for item, face in zip(result, face_at, strict=True)]


def _whole_of(face: ShardGradient) -> torch.Tensor:
    return torch.empty(face.shape, dtype=face.dtype, device=face.device)


def _fill(face: ShardGradient, whole: torch.Tensor) -> ShardGradient:
    """All numbers are drawn on every rank, as in one process."""
    face.to_local().copy_(face.part_of(whole, "copy_"))
    return face


def _flat(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _flat(item)]
    return [leaf for item in value.values() for leaf in _flat(item)] if isinstance(value, dict) else [value]


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_mapped(function, item) for item in value)
    if isinstance(value, dict):
        return {key: _mapped(function, item) for key, item in value.items()}
    return function(value)


def _refusal(face: ShardGradient, what: object) -> UnsupportedError:
    return UnsupportedError(
        f"{what}: the gradient of '{face.parameter_name}' is shared out among the data-parallel ranks "
        f"(shard_optimizer_state); this rank has elements {face.start} to {face.stop} of {face.numel()}, so that what "
        "works on each element by itself (mul_, add_, clamp_, zero_, = None, ...) is all that can be done with it: for "
        "the norm of the gradient use smp.clip_grad_norm_(model, float('inf')), else leave shard_optimizer_state out"
    )
