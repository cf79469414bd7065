"""Rehearsal on a CPU: a script that was written for CUDA runs where there is no GPU.

The launcher starts it in each process of a job on the CPU, before the script. Calls of the *script* that ask about
CUDA, or ask for it, are mapped to the CPU. *Libraries* see torch as it is, without CUDA: they get the very objects that
were there before. docs/rehearsal.md lists every mapped name, and what stays different from a GPU.
"""

import os
import warnings
from collections.abc import Iterable

import torch

from modelparallel.errors import LaunchError
from modelparallel.launch.rehearsal import collectives, cuda_device, memory, placement, precision, streams
from modelparallel.launch.rehearsal.callers import ScriptCode
from modelparallel.launch.rehearsal.mapping import Installation, MappedName
from modelparallel.launch.rehearsal.operators import declare_torchvision_operators

__all__ = ["MappedName", "declare_torchvision_operators", "is_active", "mapped_names", "start"]

_installation: Installation | None = None


def start(*, script_directories: Iterable[str | os.PathLike[str]], num_devices: int) -> None:
    """Map CUDA to the CPU for code below the directories, for the rest of this process.

    Args:
        script_directories: code below them is the script; installed packages below them are libraries all the same.
        num_devices: CUDA devices that the script sees: one for each process of this host.

    Raises `LaunchError` where CUDA works: there is nothing to rehearse. A second call does nothing. Local.
    """
    global _installation
    if _installation is not None:
        return
    if torch.cuda.is_available():
        raise LaunchError("rehearsal: this process sees a CUDA device: run the job on it with device cuda, or hide it")
    declare_torchvision_operators()
    # A loader with pin_memory=True works without a GPU, and says so each time.
    warnings.filterwarnings("ignore", message=".*'pin_memory' argument is set as true but no accelerator.*")
    installation = Installation(ScriptCode(script_directories))
    cuda_device.install(installation, num_devices)
    memory.install(installation)
    streams.install(installation)
    placement.install(installation)
    precision.install(installation)
    collectives.install(installation)
    installation.finish()
    _installation = installation


def is_active() -> bool:
    """Whether this process rehearses."""
    return _installation is not None


def mapped_names() -> list[MappedName]:
    """Every mapped name, with what the script gets under it, as docs/rehearsal.md lists them. Empty if not started."""
    return [] if _installation is None else list(_installation.names)
