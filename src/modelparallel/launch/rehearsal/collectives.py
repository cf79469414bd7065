"""torch.distributed of a script that names NCCL or CUDA: gloo and the CPU."""

import functools
import re
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from modelparallel.launch.rehearsal.devices import names_cuda
from modelparallel.launch.rehearsal.mapping import Installation


def _backend(value: Any) -> Any:
    """`nccl` -> `gloo`; in `cpu:gloo,cuda:nccl` only what is for the CPU counts."""
    if not isinstance(value, str):
        return value
    if ":" in value:
        return ",".join(part for part in value.split(",") if part.startswith("cpu:")) or "gloo"
    return re.sub("nccl", "gloo", value, flags=re.IGNORECASE)


def _with_backend(original: Callable[..., Any], position: int) -> Callable[..., Any]:
    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        if len(args) > position:
            args = (*args[:position], _backend(args[position]), *args[position + 1 :])
        elif "backend" in kwargs:
            kwargs["backend"] = _backend(kwargs["backend"])
        # A device that a group is bound to can only be an accelerator.
        kwargs.pop("device_id", None)
        return original(*args, **kwargs)

    return function


def _device_mesh(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def function(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return original("cpu" if names_cuda(device_type) else device_type, *args, **kwargs)

    return function


def _true() -> bool:
    return True


def install(installation: Installation) -> None:
    if not dist.is_available():
        return
    add = installation.module_name
    add(dist, "init_process_group", _with_backend(dist.init_process_group, 0), "backend nccl: gloo; no `device_id`")
    add(dist, "new_group", _with_backend(dist.new_group, 2), "backend nccl: gloo; no `device_id`")
    add(dist, "is_nccl_available", _true, "True")
    import torch.distributed.device_mesh as device_mesh

    for module in (dist, device_mesh):
        add(module, "init_device_mesh", _device_mesh(device_mesh.init_device_mesh), "a mesh of CUDA: of the CPU")
