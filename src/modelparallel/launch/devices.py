"""Which device the processes of a job use, decided before any of them starts; and which still work after a failure."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Literal

from modelparallel.errors import LaunchError
from modelparallel.job.session import DEVICE_VARIABLE

Device = Literal["cpu", "cuda"]

#: Names the devices that a process may see, to CUDA.
VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"
#: Seconds that the devices have to answer. Most of them pass with the import of torch and the start of CUDA.
_PROBE_SECONDS = 120.0
_PROBE = "import torch; assert torch.ones(1, device='cuda:0').sum().item() == 1"


def num_gpus() -> int:
    """CUDA devices that this process sees."""
    import torch

    return torch.cuda.device_count()


def resolve_device(asked: str) -> tuple[Device, int]:
    """The device for `auto`, `cpu` or `cuda`, and how many of them the host has (0 for the CPU).

    `auto` is what MODELPARALLEL_DEVICE says, else cuda where there is a GPU and the CPU rehearsal where there is none.
    """
    if asked == "auto":
        asked = os.environ.get(DEVICE_VARIABLE, "").strip().lower() or "auto"
    if checked_device(asked) == "cpu":
        return "cpu", 0
    available = num_gpus()
    if available == 0:
        if asked == "cuda":
            raise LaunchError("device cuda: no CUDA device is visible: use device cpu to rehearse the job on the CPU")
        return "cpu", 0
    return "cuda", available


def checked_device(asked: str) -> str:
    """One of `auto`, `cpu` and `cuda`. Raises `LaunchError` for anything else."""
    if asked not in ("auto", "cpu", "cuda"):
        raise LaunchError(f"device {asked!r}: expected auto, cpu or cuda")
    return asked


def check_devices(num_processes: int, device: Device, available: int) -> None:
    """One process per GPU: stop before any process starts if there are too few. ``available`` 0: no limit, since the
    processes share the GPUs.
    """
    if device == "cuda" and available and num_processes > available:
        raise LaunchError(
            f"{num_processes} processes on {available} devices: at most one process per device; start {available} or "
            "fewer, let them share devices (parameters ddp and ddp_dist_backend 'gloo'), or rehearse on the CPU with "
            "device cpu"
        )


def device_names(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The devices of processes with this environment, by the names that CUDA_VISIBLE_DEVICES takes; the process of
    local rank i has the i-th.
    """
    named = environment.get(VISIBLE_VARIABLE)
    if named is None:
        return tuple(str(index) for index in range(num_gpus()))
    names = [name.strip() for name in named.split(",")]
    # CUDA ignores everything from the first name on that is no device.
    end = next((index for index, name in enumerate(names) if name in ("", "-1")), len(names))
    return tuple(names[:end])


def working_devices(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The devices of `device_names` that answer now. Each is tried in a process of its own: a broken device may hang or
    take the process with it, and the launcher itself must not hold memory of a device.
    """
    probes = {
        name: subprocess.Popen(
            [sys.executable, "-c", _PROBE],
            env={**os.environ, **environment, VISIBLE_VARIABLE: name},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for name in device_names(environment)
    }
    deadline = time.monotonic() + _PROBE_SECONDS
    working = []
    for name, probe in probes.items():
        try:
            if probe.wait(timeout=max(0.0, deadline - time.monotonic())) == 0:
                working.append(name)
        except subprocess.TimeoutExpired:
            probe.kill()
            # A process that hangs in the driver cannot be collected before the driver lets it go.
            with contextlib.suppress(subprocess.TimeoutExpired):
                probe.wait(timeout=1.0)
    return tuple(working)
