"""Mixed precision of CUDA: autocast of the CPU, and a gradient scaler that really scales.

Without a dtype a CUDA autocast computes in float16 and a CPU autocast in bfloat16, the type that the CPU is made for;
the rehearsal takes bfloat16 then. A dtype that the script names is used as it is.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.amp
import torch.cuda.amp

from modelparallel.launch.rehearsal.devices import names_cuda
from modelparallel.launch.rehearsal.mapping import Installation


class RehearsedAutocast(torch.autocast):
    """Stands for torch.autocast and torch.amp.autocast."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if names_cuda(device_type) else device_type, *args, **kwargs)


class RehearsedCudaAutocast(torch.autocast):
    """Stands for torch.cuda.amp.autocast."""

    def __init__(self, enabled: bool = True, dtype: torch.dtype | None = None, cache_enabled: bool = True) -> None:
        super().__init__("cpu", dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)


class RehearsedGradScaler(torch.cuda.amp.GradScaler):
    """Stands for torch.amp.GradScaler; the scaler of the CPU."""

    def __init__(self, device: str = "cuda", *args: Any, **kwargs: Any) -> None:
        torch.amp.GradScaler.__init__(self, "cpu" if names_cuda(device) else device, *args, **kwargs)


class RehearsedCudaGradScaler(torch.cuda.amp.GradScaler):
    """Stands for torch.cuda.amp.GradScaler."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        torch.amp.GradScaler.__init__(self, "cpu", *args, **kwargs)


def _cpu_answer(original: Callable[[str], Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def function(device_type: str = "cuda") -> Any:
        return original("cpu" if names_cuda(device_type) else device_type)

    return function


def _custom(original: Callable[..., Any]) -> Callable[..., Any]:
    """torch.amp.custom_fwd and custom_bwd."""

    @functools.wraps(original)
    def decorator(*args: Any, **kwargs: Any) -> Any:
        if names_cuda(kwargs.get("device_type", "cuda")):
            kwargs["device_type"] = "cpu"
        return original(*args, **kwargs)

    return decorator


def _gpu_dtype() -> torch.dtype:
    return torch.get_autocast_dtype("cpu")


def install(installation: Installation) -> None:
    add = installation.module_name
    add(torch, "autocast", RehearsedAutocast, "autocast of the CPU; without a dtype in bfloat16")
    add(torch.amp, "autocast", RehearsedAutocast, "autocast of the CPU; without a dtype in bfloat16")
    add(torch.cuda.amp, "autocast", RehearsedCudaAutocast, "autocast of the CPU; without a dtype in bfloat16")
    add(torch.amp, "GradScaler", RehearsedGradScaler, "the gradient scaler of the CPU")
    add(torch.cuda.amp, "GradScaler", RehearsedCudaGradScaler, "the gradient scaler of the CPU")
    for module in (torch.amp, torch.cuda.amp):
        add(module, "custom_fwd", _custom(torch.amp.custom_fwd), "with the autocast of the CPU")
        add(module, "custom_bwd", _custom(torch.amp.custom_bwd), "with the autocast of the CPU")
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        add(torch, name, _cpu_answer(getattr(torch, name)), "the answer for the CPU")
    add(torch, "get_autocast_gpu_dtype", _gpu_dtype, "the answer for the CPU")
