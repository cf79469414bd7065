"""Tensors without storage: what is done to them is recorded, and done when they are placed (smp-api section 12).

[Note: deferred tensors] Inside `recording()` operations that make a tensor give a `DeferredTensor`. It says of itself
what the tensor would say (shape, dtype, device, strides), and has no memory: shapes are worked out on a meta tensor
inside it. Whatever is done with deferred tensors, also later and outside, is put on the tape (tape.py) and gives
deferred tensors again. An operation whose result is no tensor, or depends on values (``item()``, ``bool``, ``nonzero``,
printing), makes the values for that moment.

[Note: the stream of random numbers] A recorded operation that draws also draws at once, into a tensor of the same
layout that is freed again: so all that draws after it, deferred or not, sees the generator as it would have.

[Note: shapes only] In `shapes_only()` nothing is recorded and no value is ever made: an operation that needs one raises
ShapesOnlyError. A step body can be traced so on a model that does not fit the host.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from modelparallel import trees
from modelparallel.deferred.tape import (
    Constant,
    Handle,
    Operation,
    RandomState,
    Reference,
    StorageLayout,
    TapeStorage,
    needed_for,
    replay,
)
from modelparallel.errors import DeferredTensorError
from modelparallel.torch_compat import DisableTorchFunctionSubclass, dispatch_modes_off, swap_contents
from modelparallel.torch_compat.functions import DispatchMode
from modelparallel.torch_compat.generators import default_generator
from modelparallel.torch_compat.private_parts import ABOUT_SHAPES, make_wrapper, packet_of, schema_of, version_of

aten = torch.ops.aten

#: What is done inside the innermost context: nothing, recording, or working out shapes.
_OFF, _RECORD, _SHAPES = "off", "record", "shapes"

# They write every element of their first argument and read none of it.
_OVERWRITE = {
    aten.copy_, aten.zero_, aten.fill_, aten.normal_, aten.uniform_, aten.random_, aten.exponential_, aten.geometric_,
    aten.log_normal_, aten.cauchy_, aten.bernoulli_, aten.eye,
}  # fmt: skip
# How much they draw does not depend on the values of their arguments.
_DRAW_BY_SHAPE = {
    aten.normal_, aten.uniform_, aten.random_, aten.exponential_, aten.geometric_, aten.log_normal_, aten.cauchy_,
    aten.rand, aten.randn, aten.randint, aten.randperm, aten.rand_like, aten.randn_like, aten.randint_like,
    aten.native_dropout, aten.normal,
}  # fmt: skip
# They change how a tensor looks at its storage, and have a form that gives a new tensor.
_RESHAPE_IN_PLACE = {
    aten.t_.default: aten.t.default,
    aten.transpose_.default: aten.transpose.int,
    aten.squeeze_.default: aten.squeeze.default,
    aten.squeeze_.dim: aten.squeeze.dim,
    aten.squeeze_.dims: aten.squeeze.dims,
    aten.unsqueeze_.default: aten.unsqueeze.default,
    aten.as_strided_.default: aten.as_strided.default,
}
# Constants up to this size are copied when they are recorded; larger ones may not change until the replay.
_COPIED_BYTES = 1 << 16


class ShapesOnlyError(DeferredTensorError):
    """An operation needs values where only shapes are known."""


class DeferredTensor(torch.Tensor):
    """A tensor, or parameter, that gets its storage when it is placed."""

    waits_for_storage = True
    _inner: torch.Tensor
    _handle: Handle | None

    @staticmethod
    def __new__(  # type: ignore[misc]
        cls, data: torch.Tensor, requires_grad: bool = True, **attributes: Any
    ) -> torch.Tensor:
        """A parameter of ``data``: libraries make new parameters of a module by the class of the old ones."""
        return nn.Parameter(data, requires_grad)

    @classmethod
    def of(cls, inner: torch.Tensor, device: torch.device, handle: Handle | None) -> DeferredTensor:
        """The tensor that will be on ``device``, of the layout of the meta tensor ``inner``."""
        result: DeferredTensor = make_wrapper(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=device,
        )
        result._inner, result._handle = inner, handle
        return result

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]  # a new object at each look
            return _set_data(*args)
        if func in _OF_VALUES:
            args, kwargs = trees.map_leaves(lambda leaf: _value(leaf) if is_deferred(leaf) else leaf, (args, kwargs))
            return func(*args, **kwargs)
        with DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _dispatch(func, args, kwargs or {})

    def untyped_storage(self) -> torch.UntypedStorage:
        """The storage of the meta tensor: one for all that look at it, and no memory. (A method, since hooks on saved
        tensors run with ``__torch_function__`` switched off.)
        """
        return self._inner.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]
        with torch.no_grad():
            copied: torch.Tensor = self.clone()
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, self.requires_grad)
        copied.__dict__.update(_attributes(self))
        memo[id(self)] = copied
        return copied

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return repr(_value(self))


def is_deferred(value: object) -> bool:
    """Whether ``value`` is a tensor that waits for its storage."""
    return isinstance(value, DeferredTensor)


def stream_of(tensor: torch.Tensor) -> int:
    """A number for the places in the streams of random numbers that the values of a deferred tensor are drawn from."""
    handle = tensor._handle if isinstance(tensor, DeferredTensor) else None
    operations = [] if handle is None else needed_for([handle]).operations
    states = (each.random.state.numpy().tobytes() for each in operations if each.random is not None)
    return functools.reduce(lambda crc, state: zlib.crc32(state, crc), states, 0)


# Functions of torch that reach for the memory of a tensor, so that no operation arrives.
_OF_VALUES = {
    torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.__reduce_ex__, torch.Tensor.__repr__,
    torch.Tensor.__format__, torch.Tensor.storage, torch.Tensor.__dlpack__,
}  # fmt: skip


class _Mode(DispatchMode):
    """Sees the operations that make tensors out of nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class Deferring:
    """A context in which something other than usual is done; ``kind``: what. Use it once."""

    def __init__(self, kind: str) -> None:
        self.kind, self._mode = kind, _Mode()
        self._memory: torch.Tensor | None = None

    def __enter__(self) -> None:
        self._token = _context.set(self)
        self._mode.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._mode.__exit__(*exception)
        _context.reset(self._token)

    def scratch(self, like: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A tensor of the layout of ``like`` to draw into. On the CPU always in the same memory: if each had its own,
        what is allocated between them would keep the allocator from giving it back.
        """
        num_bytes = like.untyped_storage().nbytes()
        if device.type != "cpu":
            return torch.empty_strided(like.size(), like.stride(), dtype=like.dtype, device=device)
        if self._memory is None or num_bytes > self._memory.nbytes:
            self._memory = None  # first the old one goes
            self._memory = torch.empty(num_bytes, dtype=torch.uint8)
        return self._memory[:num_bytes].view(like.dtype).as_strided(like.size(), like.stride())


_context: ContextVar[Deferring | None] = ContextVar("smp_deferring", default=None)


def _current_kind() -> str:
    context = _context.get()
    return _OFF if context is None else context.kind


def recording(is_enabled: bool = True) -> Deferring:
    """A context: tensors made inside are deferred; with ``is_enabled=False`` they are not, whatever is around it."""
    return Deferring(_RECORD if is_enabled else _OFF)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Inside, whatever is done with deferred tensors gives shapes; nothing is recorded, and no value is made."""
    with Deferring(_SHAPES):
        yield


def is_unfilled(tensor: DeferredTensor) -> bool:
    """Whether values of ``tensor`` come from a parameter of the meta device that nothing has been written to."""
    return needed_for([_handle_of(tensor)]).is_unfilled


def storage_key(tensor: DeferredTensor) -> int:
    """Equal for deferred tensors that share their storage, while one of them lives."""
    return id(_handle_of(tensor).storage)


def real_values(tensors: list[DeferredTensor]) -> list[torch.Tensor]:
    """Real tensors of the same values, on their devices; the deferred ones stay what they are."""
    return replay([_handle_of(tensor) for tensor in tensors])


def uninitialised(like: torch.Tensor, device: torch.device) -> DeferredTensor:
    """A deferred tensor like ``like``, of which it is known that nothing was written to it."""
    inner = torch.empty_strided(like.size(), like.stride(), dtype=like.dtype, device="meta")
    keywords = {"dtype": like.dtype, "device": device}
    arguments = (tuple(like.size()), tuple(like.stride()))
    operation = Operation(
        aten.empty_strided.default, arguments, keywords, 1, torch.get_default_dtype(), is_uninitialised=True
    )
    storage = TapeStorage()
    storage.writers, storage.last = [operation], 1
    return DeferredTensor.of(inner, device, Handle(operation, 0, storage))


def become(tensor: torch.Tensor, new: torch.Tensor) -> None:
    """Give ``tensor`` (deferred or real) the class and contents of ``new``; the object stays the same one.

    Whether it is trained, its gradient, the hooks on it and attributes that a script has set are kept.
    """
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(new.detach(), tensor.requires_grad)
    elif new.requires_grad != tensor.requires_grad:
        new = new.detach().requires_grad_(tensor.requires_grad)
    new.__dict__.update(_attributes(tensor))
    grad, tensor.grad = tensor.grad, None
    hooks = {
        name: kept
        for name in ("_backward_hooks", "_post_accumulate_grad_hooks")
        if (kept := getattr(tensor, name, None))
    }
    swap_contents(tensor, new)
    for name, kept in hooks.items():
        setattr(tensor, name, kept)
    if grad is not None:
        tensor.grad = _value(grad) if isinstance(grad, DeferredTensor) else grad


def _attributes(tensor: torch.Tensor) -> dict[str, Any]:
    own = {"_inner", "_handle"} | ({"_is_param"} if isinstance(tensor, nn.Parameter) else set())
    return {name: value for name, value in tensor.__dict__.items() if name not in own}


def _set_data(tensor: torch.Tensor, new: torch.Tensor) -> None:
    """``tensor.data = new``."""
    if is_deferred(tensor) and isinstance(new, DeferredTensor):
        with DisableTorchFunctionSubclass():
            tensor.data = new
        tensor._inner, tensor._handle = new._inner, new._handle  # type: ignore[attr-defined]
    else:
        become(tensor, new.detach())


def _handle_of(tensor: DeferredTensor) -> Handle:
    if tensor._handle is None:
        raise ShapesOnlyError(
            f"a tensor of shape {tuple(tensor.shape)} was computed while the first step was traced, when the model had "
            "no storage, and has no value: do not keep results of a step function's body under smp.is_tracing()"
        )
    return tensor._handle


def _value(tensor: DeferredTensor) -> torch.Tensor:
    if _current_kind() == _SHAPES:
        raise ShapesOnlyError("the values of a tensor are read")
    value = real_values([tensor])[0]
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(value, tensor.requires_grad)
    return value.requires_grad_(tensor.requires_grad)


# What happens to an operation


def _dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    kind = _current_kind()
    leaves = [leaf for leaf in trees.leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    deferred = [leaf for leaf in leaves if isinstance(leaf, DeferredTensor)]
    if not deferred and (kind != _RECORD or leaves or not _makes_tensor(func, kwargs)):
        return func(*args, **kwargs)
    if func in _RESHAPE_IN_PLACE:
        _set_data(args[0], _dispatch(_RESHAPE_IN_PLACE[func], args, kwargs))
        return args[0]
    written = _written(func, args, kwargs)
    writes_real = any(not isinstance(tensor, DeferredTensor) for tensor in written)
    # Outside a context a tensor that exists makes it computing, not construction, unless it is written to a deferred
    # one.
    is_computing = kind == _OFF and not written and len(deferred) < len(leaves)
    if kind == _SHAPES and writes_real:
        # What the body keeps of its own: it is left as it is, since there is no value to write.
        return written[0] if len(schema_of(func).returns) == 1 else tuple(written)
    if not _gives_tensors(func) or writes_real or is_computing:
        if packet_of(func) in ABOUT_SHAPES:
            arguments, keywords = _inner((args, kwargs))
            with dispatch_modes_off():
                return func(*arguments, **keywords)
        return _on_values(func, args, kwargs, written)
    return _record(func, args, kwargs, leaves, written, kind)


def _makes_tensor(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the operation makes a tensor out of nothing, on a real device."""
    names = {argument.name for argument in schema_of(func).arguments}
    device = kwargs.get("device")
    is_meta = device is not None and torch.device(device).type == "meta"
    return "device" in names and _gives_tensors(func) and not is_meta


def _gives_tensors(func: Any) -> bool:
    returns = schema_of(func).returns
    return bool(returns) and all("Tensor" in str(value.type) for value in returns)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    tensors: list[torch.Tensor] = []
    for index, argument in enumerate(schema_of(func).arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = kwargs.get(argument.name, args[index] if index < len(args) else None)
        tensors.extend(leaf for leaf in trees.leaves([value]) if isinstance(leaf, torch.Tensor))
    return tensors


def _is_view(func: Any) -> bool:
    returns = schema_of(func).returns
    return bool(returns) and all(value.alias_info is not None and not value.alias_info.is_write for value in returns)


def _inner(arguments: Any) -> Any:
    """The arguments with meta tensors for tensors, and no device other than meta."""

    def meta(leaf: Any) -> Any:
        if isinstance(leaf, DeferredTensor):
            return leaf._inner
        if isinstance(leaf, torch.Tensor):
            return leaf.detach().to("meta") if leaf.device.type != "meta" else leaf
        if isinstance(leaf, torch.device):
            return torch.device("meta")
        return None if isinstance(leaf, torch.Generator) else leaf

    return trees.map_leaves(meta, arguments)


def _record(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    leaves: list[torch.Tensor],
    written: list[torch.Tensor],
    kind: str,
) -> Any:
    device = _device_of(func, kwargs, leaves)
    with dispatch_modes_off():
        inner_args, inner_kwargs = _inner((args, kwargs))
        if not leaves:
            inner_kwargs = {**inner_kwargs, "device": torch.device("meta")}
            inner_kwargs.pop("pin_memory", None)
        owners = {id(leaf._inner): leaf for leaf in leaves if isinstance(leaf, DeferredTensor)}
        shapes = {id(leaf): (leaf.size(), leaf.stride()) for leaf in written}
        try:
            result = func(*inner_args, **inner_kwargs)
        except (NotImplementedError, RuntimeError) as error:
            if not isinstance(error, NotImplementedError) and "data-dependent" not in str(error).lower():
                raise
            return _on_values(func, args, kwargs, written)
        if not leaves and isinstance(result, torch.Tensor) and result.numel() == 0:
            # Nothing to delay, and torch makes tensors around memory that exists (of files) by way of such.
            return func(*args, **kwargs)
    for leaf in written:
        assert isinstance(leaf, DeferredTensor)
        if shapes[id(leaf)] != (leaf._inner.size(), leaf._inner.stride()):
            raise DeferredTensorError(
                f"{func} changes the shape of a tensor in place, which cannot be recorded for a tensor whose "
                "initialisation is delayed: build a new tensor instead"
            )
    if device.type == "meta":
        return result
    if kind == _SHAPES:
        return _wrapped(result, owners, device, None, {})
    operation, storages = _operation(func, args, kwargs, leaves, written, device)
    return _wrapped(result, owners, device, operation, storages)


def _wrapped(
    result: Any,
    owners: dict[int, DeferredTensor],
    device: torch.device,
    operation: Operation | None,
    storages: dict[int, TapeStorage],
) -> Any:
    """Deferred tensors for what came out on the meta device; an argument that came out again is itself."""
    is_many = isinstance(result, list | tuple)
    outputs = []
    for index, output in enumerate(result if is_many else (result,)):
        if not isinstance(output, torch.Tensor):
            outputs.append(output)
        elif id(output) in owners:
            outputs.append(owners[id(output)])
        elif operation is None:
            outputs.append(DeferredTensor.of(output, device, None))
        else:
            key = id(output.untyped_storage())
            storage = storages.get(key)
            if storage is None:
                storage = storages[key] = TapeStorage()
                storage.writers.append(operation)
                storage.last = operation.number
                if output.nbytes == output.untyped_storage().nbytes():
                    operation.made[index] = StorageLayout(output.size(), output.stride(), output.dtype, device)
            outputs.append(DeferredTensor.of(output, device, Handle(operation, index, storage)))
    return type(result)(outputs) if is_many else outputs[0]


def _operation(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    leaves: list[torch.Tensor],
    written: list[torch.Tensor],
    device: torch.device,
) -> tuple[Operation, dict[int, TapeStorage]]:
    """The operation, on the tape of the storages that it uses; those storages, by the id of their meta storage."""
    handles = {id(leaf): _handle_of(leaf) for leaf in leaves if isinstance(leaf, DeferredTensor)}
    overwritten = None
    if packet_of(func) in _OVERWRITE and len(written) == 1:
        inner = written[0]._inner  # type: ignore[attr-defined]
        if inner.is_contiguous() and inner.nbytes == inner.untyped_storage().nbytes():
            overwritten = handles[id(written[0])].storage
    is_view = _is_view(func)

    def recorded(leaf: Any) -> Any:
        if isinstance(leaf, DeferredTensor):
            is_target = overwritten is not None and leaf is written[0]
            return Reference(handles[id(leaf)], is_read=not is_view and not is_target)
        if not isinstance(leaf, torch.Tensor):
            return leaf
        with dispatch_modes_off():
            if leaf.nbytes <= _COPIED_BYTES:
                return Constant(leaf.detach().clone(), None)
            # The tensor itself: here, below autograd, a detached one would not count what is written to it.
            return Constant(leaf, None if leaf.is_inference() else version_of(leaf))

    random = _draw(func, args, kwargs, device)
    number = 1 + max((handle.storage.last for handle in handles.values()), default=0)
    arguments, keywords = trees.map_leaves(recorded, (args, kwargs))
    operation = Operation(func, arguments, keywords, number, torch.get_default_dtype(), random, overwritten)
    storages: dict[int, TapeStorage] = {}
    for leaf in leaves:
        if isinstance(leaf, DeferredTensor):
            storage = handles[id(leaf)].storage
            storage.last = number
            storages[id(leaf._inner.untyped_storage())] = storage
            if any(leaf is target for target in written) and operation not in storage.writers[-1:]:
                storage.writers.append(operation)
    return operation, storages


def _device_of(func: Any, kwargs: dict[str, Any], leaves: list[torch.Tensor]) -> torch.device:
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    deferred = [leaf for leaf in leaves if isinstance(leaf, DeferredTensor)]
    # A number on the CPU (a 0-dim tensor) may meet tensors of any device.
    devices = [leaf.device for leaf in (*deferred, *leaves) if leaf.ndim] or [leaf.device for leaf in leaves]
    return devices[0] if devices else torch.device("cpu")


def _draw(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> RandomState | None:
    """If the operation draws: the state of its generator, which then goes on as if it had drawn."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return None
    given = next((leaf for leaf in trees.leaves((args, kwargs)) if isinstance(leaf, torch.Generator)), None)
    generator = default_generator(device) if given is None else given
    state = RandomState(device, given, generator.get_state())
    needs_values = packet_of(func) not in _DRAW_BY_SHAPE
    context = _context.get() or Deferring(_OFF)

    def scratch(leaf: Any) -> Any:
        if not isinstance(leaf, DeferredTensor):
            return leaf
        if needs_values:
            return real_values([leaf])[0]
        return context.scratch(leaf._inner, leaf.device)

    with dispatch_modes_off():
        arguments, keywords = trees.map_leaves(scratch, (args, kwargs))
        func(*arguments, **keywords)
    return state


def _on_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], written: list[torch.Tensor]) -> Any:
    """Run the operation on values made for the moment; what it writes to deferred tensors is put on the tape."""
    if _current_kind() == _SHAPES:
        raise ShapesOnlyError(f"{func} needs values")
    deferred = [leaf for leaf in trees.leaves((args, kwargs)) if isinstance(leaf, DeferredTensor)]
    values = dict(zip(map(id, deferred), real_values(deferred), strict=True))
    owners = {id(value): leaf for leaf in deferred if (value := values[id(leaf)]) is not None}
    with dispatch_modes_off():
        arguments, keywords = trees.map_leaves(lambda leaf: values.get(id(leaf), leaf), (args, kwargs))
        result = func(*arguments, **keywords)
    for leaf in written:
        if isinstance(leaf, DeferredTensor):
            _dispatch(aten.copy_.default, (leaf, values[id(leaf)]), {})
    return trees.map_leaves(lambda leaf: owners.get(id(leaf), leaf), result)
