"""Devices: what names CUDA becomes the CPU.

`torch.device("cuda", 3)` of a script is `torch.device("cpu")`, so whatever the device is handed to, libraries included,
does the right thing. A string or a number that names a CUDA device is mapped where the script hands it to torch.
"""

from typing import Any

import torch

CPU = torch.device("cpu")
_real_device = torch.device
_real_generator = torch.Generator


def names_cuda(value: Any) -> bool:
    """Whether the value asks for a CUDA device: "cuda", "cuda:1", a device, or a number (of an accelerator)."""
    if isinstance(value, str):
        return value == "cuda" or value.startswith("cuda:")
    if isinstance(value, _real_device):
        return value.type == "cuda"
    return type(value) is int


def mapped(value: Any) -> Any:
    """The CPU for anything that names CUDA; everything else as it is."""
    return CPU if names_cuda(value) else value


class _DeviceMeta(type):
    """Makes the stand-in behave as the type `torch.device` in isinstance, issubclass and comparisons."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, _real_device)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, _real_device) or type.__subclasscheck__(cls, subclass)

    def __eq__(cls, other: Any) -> bool:
        return other is cls or other is _real_device

    def __hash__(cls) -> int:
        return hash(_real_device)

    def __call__(cls, *args: Any, **kwargs: Any) -> torch.device:
        made = _real_device(*args, **kwargs)
        return CPU if made.type == "cuda" else made


class RehearsedDevice(metaclass=_DeviceMeta):
    """What a script sees as `torch.device`. It only makes real devices, and has no instances of its own."""


RehearsedDevice.__name__ = RehearsedDevice.__qualname__ = "device"
RehearsedDevice.__module__ = "torch"


class _GeneratorMeta(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, _real_generator)

    def __call__(cls, device: Any = "cpu") -> torch.Generator:
        return _real_generator(device=mapped(device))


class RehearsedGenerator(metaclass=_GeneratorMeta):
    """What a script sees as `torch.Generator`: its generators are generators of the CPU."""
