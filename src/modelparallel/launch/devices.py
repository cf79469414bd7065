"""Which device the processes of a job use, decided before any of them starts."""

from modelparallel.errors import LaunchError
from modelparallel.launch.job import Device


def num_gpus() -> int:
    """CUDA devices that this process sees."""
    import torch

    return torch.cuda.device_count()


def resolve_device(asked: str) -> tuple[Device, int]:
    """The device for `auto`, `cpu` or `cuda`, and how many of them the host has (0 for the CPU).

    `auto` is cuda where there is a GPU and the CPU rehearsal where there is none.
    """
    if asked not in ("auto", "cpu", "cuda"):
        raise LaunchError(f"device {asked!r}: expected auto, cpu or cuda")
    if asked == "cpu":
        return "cpu", 0
    available = num_gpus()
    if available == 0:
        if asked == "cuda":
            raise LaunchError("device cuda: no CUDA device is visible: use device cpu to rehearse the job on the CPU")
        return "cpu", 0
    return "cuda", available


def check_devices(num_processes: int, device: Device, available: int) -> None:
    """One process per GPU: stop before any process starts if there are too few."""
    if device == "cuda" and num_processes > available:
        raise LaunchError(
            f"{num_processes} processes on {available} devices: at most one process per device; start {available} or "
            "fewer, or rehearse on the CPU with device cpu"
        )
