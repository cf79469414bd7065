"""Requests to put something on a CUDA device: factories, `.to`, `.cuda`, `pin_memory`, `torch.load`, modules."""

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from modelparallel.launch.rehearsal.callers import ScriptCode
from modelparallel.launch.rehearsal.devices import CPU, RehearsedDevice, RehearsedGenerator, mapped, names_cuda
from modelparallel.launch.rehearsal.mapping import Installation, MappedName

#: Functions of torch that make a tensor on the device they are told.
FACTORIES = (
    "arange",
    "as_tensor",
    "asarray",
    "bartlett_window",
    "blackman_window",
    "empty",
    "empty_like",
    "empty_strided",
    "eye",
    "full",
    "full_like",
    "hamming_window",
    "hann_window",
    "kaiser_window",
    "linspace",
    "logspace",
    "normal",
    "ones",
    "ones_like",
    "rand",
    "rand_like",
    "randint",
    "randint_like",
    "randn",
    "randn_like",
    "randperm",
    "range",
    "scalar_tensor",
    "sparse_coo_tensor",
    "sparse_csr_tensor",
    "tensor",
    "tril_indices",
    "triu_indices",
    "zeros",
    "zeros_like",
)
NEW_METHODS = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")


def install(installation: Installation) -> None:
    """Map all of them."""
    add = installation.module_name
    add(torch, "device", RehearsedDevice, "makes the CPU device where CUDA is named")
    add(torch, "Generator", RehearsedGenerator, "makes a generator of the CPU where CUDA is named")
    for name in FACTORIES:
        if hasattr(torch, name):
            add(torch, name, _factory(getattr(torch, name)), "`device` that names CUDA: the CPU")
    add(torch, "load", _load(torch.load), "`map_location` that names CUDA, or none: the CPU")
    add(torch, "set_default_device", _first_mapped(torch.set_default_device), "CUDA: the CPU")
    add(
        torch,
        "set_default_tensor_type",
        _tensor_type_mapped(torch.set_default_tensor_type),
        "a type of torch.cuda: the same type of torch",
    )
    _install_tensor_methods(installation)
    installation.method(nn.Module, "to", _to, "to a CUDA device: to the CPU")
    installation.method(nn.Module, "cuda", _cuda, "the module as it is")
    installation.method(nn.Module, "to_empty", _device_argument, "`device` that names CUDA: the CPU")
    _install_module_constructors(installation)


def _install_tensor_methods(installation: Installation) -> None:
    method = functools.partial(installation.method, torch.Tensor)
    method("to", _to, "to a CUDA device: to the CPU")
    method("cuda", _cuda, "the tensor as it is")
    method("pin_memory", _pin_memory, "the tensor as it is")
    method("type", _type, "a type of torch.cuda: the same type of torch")
    method("record_stream", _record_stream, "does nothing")
    for name in NEW_METHODS:
        method(name, _device_argument, "`device` that names CUDA: the CPU")
    for storage in (torch.UntypedStorage, torch.TypedStorage):
        installation.method(storage, "cuda", _cuda, "the storage as it is")


def _install_module_constructors(installation: Installation) -> None:
    """`nn.Linear(4, 4, device="cuda")` and its like: constructors of torch.nn that take a device."""
    for name in sorted(vars(nn)):
        owner = getattr(nn, name)
        if not (inspect.isclass(owner) and issubclass(owner, nn.Module)) or "__init__" not in vars(owner):
            continue
        if "device" in inspect.signature(owner.__init__).parameters:
            constructor = _constructor(vars(owner)["__init__"], installation.script)
            setattr(owner, "__init__", constructor)  # noqa: B010 (mypy refuses the plain assignment)
    installation.names.append(MappedName("torch.nn.*.__init__", "`device` that names CUDA: the CPU"))


def _constructor(original: Callable[..., None], script: ScriptCode) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        if names_cuda(kwargs.get("device")) and script.owns(sys._getframe(1)):
            kwargs["device"] = CPU
        original(self, *args, **kwargs)

    return __init__


def _factory(original: Callable[..., Any]) -> Callable[..., Any]:
    """The form that the script gets; whoever has it is the script, so no caller is looked at."""

    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = mapped(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return original(*args, **kwargs)

    return factory


def _first_mapped(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def function(device: Any) -> Any:
        return original(mapped(device))

    return function


def _load(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        if map_location is None or names_cuda(map_location):
            map_location = CPU
        elif isinstance(map_location, Mapping):
            map_location = {source: mapped(target) for source, target in map_location.items()}
        return original(f, map_location, *args, **kwargs)

    return load


def plain_tensor_type(value: Any) -> Any:
    """`torch.cuda.FloatTensor`, the type or its name, as the type of the CPU."""
    name = value if isinstance(value, str) else f"{getattr(value, '__module__', '')}.{getattr(value, '__name__', '')}"
    if not name.startswith("torch.cuda."):
        return value
    return "torch." + name.removeprefix("torch.cuda.")


def _tensor_type_mapped(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def function(tensor_type: Any) -> Any:
        return original(plain_tensor_type(tensor_type))

    return function


# Methods. Each gets the original and the script first. What does not name CUDA goes straight on; only then does it
# matter who asks: a library that asks for CUDA gets torch's own answer.


def _to(original: Callable[..., Any], script: ScriptCode, instance: Any, *args: Any, **kwargs: Any) -> Any:
    if args and names_cuda(args[0]):
        if script.asks_through(sys._getframe(1)):
            return original(instance, CPU, *args[1:], **kwargs)
    elif kwargs and names_cuda(kwargs.get("device")) and script.asks_through(sys._getframe(1)):
        kwargs["device"] = CPU
    return original(instance, *args, **kwargs)


def _cuda(original: Callable[..., Any], script: ScriptCode, instance: Any, *args: Any, **kwargs: Any) -> Any:
    if script.asks_through(sys._getframe(1)):
        return instance
    return original(instance, *args, **kwargs)


def _pin_memory(original: Callable[..., Any], script: ScriptCode, instance: Any, *args: Any, **kwargs: Any) -> Any:
    if script.asks_through(sys._getframe(1)):
        return instance
    return original(instance, *args, **kwargs)


def _record_stream(original: Callable[..., Any], script: ScriptCode, instance: Any, stream: Any) -> None:
    if not script.owns(sys._getframe(1)):
        original(instance, stream)


def _type(original: Callable[..., Any], script: ScriptCode, instance: Any, *args: Any, **kwargs: Any) -> Any:
    if args and script.owns(sys._getframe(1)):
        args = (plain_tensor_type(args[0]), *args[1:])
    return original(instance, *args, **kwargs)


def _device_argument(original: Callable[..., Any], script: ScriptCode, instance: Any, *args: Any, **kwargs: Any) -> Any:
    if names_cuda(kwargs.get("device")) and script.asks_through(sys._getframe(1)):
        kwargs["device"] = CPU
    return original(instance, *args, **kwargs)
