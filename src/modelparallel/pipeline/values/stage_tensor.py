"""StageTensor: a tensor of the step that came out of weights, known on every stage and present only where it is needed.

[Note: one program, many stages] Every stage runs the same Python code. A StageTensor carries what that code may look at
on any stage (shape, dtype, requires_grad, device) and the *home*, the stage that has computed it. Its local tensor is
there on the home, and on stages that it was sent to. All bookkeeping (home, places, aliases) is symbolic and equal on
all stages, since every stage takes its decisions from it.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch

from modelparallel.errors import StepUsageError
from modelparallel.pipeline.values.functions import traits_of
from modelparallel.torch_compat import DisableTorchFunctionSubclass
from modelparallel.torch_compat.private_parts import make_wrapper


def storage_address(tensor: torch.Tensor) -> int | None:
    """Where the memory of ``tensor`` begins; tensors of one address share memory. None where there is none to share."""
    if tensor.layout is not torch.strided or not tensor.numel():
        return None
    try:
        return int(tensor.untyped_storage().data_ptr())
    except (NotImplementedError, RuntimeError):  # a wrapper without memory of its own, as in torch.func.vmap
        return None


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a tensor of this shape that lies in memory row by row."""
    stride = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        stride[dim] = stride[dim + 1] * max(1, shape[dim + 1])
    return tuple(stride)


def last_element(offset: int, shape: Sequence[int], stride: Sequence[int]) -> int:
    """The last element in its storage of a tensor that begins at ``offset`` and is not empty."""
    return offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether a tensor of this shape and stride fills its storage without gaps or overlaps, in some order of its
    dimensions.
    """
    expected = 1
    for length, step in sorted(
        ((n, s) for n, s in zip(shape, stride, strict=True) if n != 1), key=lambda pair: pair[1]
    ):
        if length == 0:
            return True
        if step != expected:
            return False
        expected *= length
    return True


@dataclass(frozen=True, eq=False, init=False)
class TensorSpec:
    """What every stage knows of a tensor. Equal specs are one object, so that they are compared and hashed by identity:
    every operation's signature is made of them.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    device_type: str

    def __new__(
        cls, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, requires_grad: bool, device_type: str
    ) -> TensorSpec:
        key = (shape, stride, dtype, requires_grad, device_type)
        spec = _specs.get(key)
        if spec is not None:
            return spec
        with _making_specs:
            spec = _specs.get(key)
            if spec is None:
                spec = super().__new__(cls)
                spec.__dict__.update(zip(cls.__dataclass_fields__, key, strict=True))
                _specs[key] = spec
            return spec

    def __reduce__(self) -> Any:
        return TensorSpec, (self.shape, self.stride, self.dtype, self.requires_grad, self.device_type)

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad, tensor.device.type)

    @classmethod
    def of_gradient(cls, tensor: torch.Tensor) -> TensorSpec:
        """The spec of the gradient of ``tensor`` as it travels: row by row, whatever strides autograd gave it."""
        shape = tuple(tensor.shape)
        return cls(shape, contiguous_stride(shape), tensor.dtype, False, tensor.device.type)

    def describes(self, tensor: torch.Tensor) -> bool:
        """Whether this is the spec of ``tensor``; cheaper than making that."""
        return (
            tensor.shape == self.shape
            and tensor.dtype is self.dtype
            and tensor.requires_grad is self.requires_grad
            and tensor.stride() == self.stride
            and (tensor.is_cpu if self.device_type == "cpu" else tensor.device.type == self.device_type)
        )

    @cached_property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize


_making_specs = threading.Lock()
_specs: weakref.WeakValueDictionary[Hashable, TensorSpec] = weakref.WeakValueDictionary()


class AliasGroup:
    """The StageTensors of one program that share storage: writing to one makes the copies of all others on other stages
    old.
    """

    def __init__(self) -> None:
        self._members: list[weakref.ref[StageTensor]] = []
        self._size_to_prune = _FIRST_PRUNING

    def add(self, tensor: StageTensor) -> None:
        self._members.append(weakref.ref(tensor))
        if len(self._members) >= self._size_to_prune:  # views come and go, the group may stay
            self._members = [member for member in self._members if member() is not None]
            self._size_to_prune = max(_FIRST_PRUNING, 2 * len(self._members))

    def others(self, tensor: StageTensor) -> list[StageTensor]:
        alive = [member for ref in self._members if (member := ref()) is not None]
        return [member for member in alive if member is not tensor]


_FIRST_PRUNING = 64


class TensorOwner(Protocol):
    """What values, and what looks at them, need of the program that they belong to (:class:`Program`)."""

    device: torch.device
    device_type: str
    microbatch: int

    @property
    def engine(self) -> object:
        """The engine that runs the program: values of one engine may meet."""
        ...

    def check_open(self) -> None:
        """Raises StepUsageError after the end of the step."""
        ...

    def resolve(self, leaf: Any) -> Any:
        """An argument as the program sees it: parameters and what has become a value as StageTensors."""
        ...

    def glue(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run an operation where its data is."""
        ...


class StageTensor(torch.Tensor):
    """See the note at the top of this file. Made by the engine only."""

    program: TensorOwner
    spec: TensorSpec
    home: int
    places: set[int]
    local: torch.Tensor | None
    is_pinned_home: bool = False  # a parameter or stateful buffer: operations go to it
    known_value: Callable[[], torch.Tensor] | None = None  # a detached value that this stage may read without a message
    stale_reason: str | None = None
    made_with: int = 0  # see Ledger.note_known
    born: int = 0  # how many events there were before
    is_leaf_of_user: bool = False  # it was made to require a gradient, and is the result of nothing that does
    _aliases: AliasGroup | None = None  # made when first asked for: most values share memory with no other

    @staticmethod
    def __new__(
        cls,
        program: TensorOwner,
        spec: TensorSpec,
        home: int,
        local: torch.Tensor | None,
        aliases: AliasGroup | None = None,
    ) -> StageTensor:
        device = program.device if spec.device_type == program.device_type else torch.device(spec.device_type)
        result: StageTensor = make_wrapper(cls, spec.shape, strides=spec.stride, dtype=spec.dtype, device=device)
        result.program = program
        result.spec = spec
        result.home = home
        result.places = {home}
        result.local = local
        if aliases is not None:
            result._aliases = aliases
            aliases.add(result)
        return result

    @property
    def aliases(self) -> AliasGroup:
        """The values that share memory with this one, itself included."""
        if self._aliases is None:
            self._aliases = AliasGroup()
            self._aliases.add(self)
        return self._aliases

    def sharing(self) -> list[StageTensor]:
        """The other values that share memory with this one."""
        return [] if self._aliases is None else self._aliases.others(self)

    def mark_requires_grad(self) -> None:
        if not self.spec.requires_grad:
            self.spec = replace(self.spec, requires_grad=True)

    def mark_stale(self, reason: str) -> None:
        """The value is old and cannot be made current: reading it stops with ``reason``."""
        self.stale_reason = reason

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if traits_of(func).is_metadata:
            with DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        owner = next(tensor for tensor in _stage_tensors(args, kwargs))
        return owner.program.glue(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise StepUsageError(
            f"{func} reached a value that is spread over the pipeline stages without being intercepted. Please report "
            "it with the model; "
            "a module of your own around this operation (with weights, or placed by smp.set_partition) works around it"
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        shape = "x".join(str(length) for length in self.spec.shape)
        return f"StageTensor({shape} {self.spec.dtype}, home={self.home})"

    def __format__(self, format_spec: str) -> str:
        if not self.spec.shape:
            return format(self.item(), format_spec)
        return repr(self)

    def __copy__(self) -> Any:
        return self.detach()  # torch's own copy shares the memory and starts a graph of its own, too

    def __deepcopy__(self, memo: Any) -> Any:
        return self.program.glue(torch.clone, (self.detach(),), {})

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise StepUsageError(
            "a value of the step that is spread over the pipeline stages cannot be pickled or saved inside smp.step: "
            "return it from the "
            "step function and save the result"
        )


def _stage_tensors(args: Any, kwargs: Any) -> list[StageTensor]:
    values: list[StageTensor] = []
    pending = [*args, *kwargs.values()]
    for value in pending:
        if isinstance(value, StageTensor):
            values.append(value)
        elif isinstance(value, (list, tuple)):
            pending.extend(value)
        elif isinstance(value, dict):
            pending.extend(value.values())
    return values
