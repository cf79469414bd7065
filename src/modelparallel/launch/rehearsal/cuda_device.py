"""The questions about CUDA, the current device, and random state, as a script with one GPU per process expects them."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import torch

from modelparallel.launch.rehearsal.devices import names_cuda
from modelparallel.launch.rehearsal.mapping import Installation
from modelparallel.launch.rehearsal.memory import total_bytes

DEVICE_NAME = "CPU rehearsal"
#: Scripts ask for 8.0 before they use bfloat16, which the CPU has.
CAPABILITY = (8, 0)
_TENSOR_TYPES = (
    "BFloat16Tensor",
    "BoolTensor",
    "ByteTensor",
    "CharTensor",
    "DoubleTensor",
    "FloatTensor",
    "HalfTensor",
    "IntTensor",
    "LongTensor",
    "ShortTensor",
)


@dataclasses.dataclass(frozen=True)
class RehearsedProperties:
    """What `torch.cuda.get_device_properties` tells."""

    name: str = DEVICE_NAME
    major: int = CAPABILITY[0]
    minor: int = CAPABILITY[1]
    total_memory: int = dataclasses.field(default_factory=total_bytes)
    multi_processor_count: int = dataclasses.field(default_factory=lambda: os.cpu_count() or 1)
    is_integrated: int = 1
    is_multi_gpu_board: int = 0
    warp_size: int = 1


class RehearsedDevices:
    """The devices of this host: one for each of its processes."""

    def __init__(self, num_devices: int) -> None:
        self.num_devices = num_devices
        self.current = 0
        self._generators = [torch.Generator() for _ in range(num_devices)]

    def index_of(self, device: Any) -> int:
        """The number that a device argument stands for; the current one if it names none.

        Raises RuntimeError as CUDA does for a device that does not exist: this is what a rehearsal is for.
        """
        index = self.current
        if type(device) is int:
            index = self.current if device < 0 else device
        elif isinstance(device, str) and names_cuda(device) and ":" in device:
            index = int(device.partition(":")[2])
        if index >= self.num_devices:
            raise RuntimeError(
                f"CUDA error: invalid device ordinal {index} (rehearsal with {self.num_devices} devices: one for each "
                "process of this host)"
            )
        return index

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return self.num_devices

    def current_device(self) -> int:
        return self.current

    def set_device(self, device: Any) -> None:
        self.current = self.index_of(device)

    @contextlib.contextmanager
    def device(self, device: Any) -> Iterator[None]:
        previous = self.current
        self.set_device(device)
        try:
            yield
        finally:
            self.current = previous

    @contextlib.contextmanager
    def device_of(self, obj: Any) -> Iterator[None]:
        yield

    def get_device_name(self, device: Any = None) -> str:
        self.index_of(device)
        return DEVICE_NAME

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        self.index_of(device)
        return CAPABILITY

    def get_device_properties(self, device: Any = None) -> RehearsedProperties:
        self.index_of(device)
        return RehearsedProperties()

    # Random state. Random operations of a rehearsed GPU draw from the generator of the CPU, whose state scripts keep
    # equal on ranks that must agree; seeding "CUDA" by rank must not disturb that. So CUDA's state is kept apart: it
    # can be seeded, saved and restored, and nothing draws from it.

    def manual_seed(self, seed: int) -> None:
        self._generators[self.current].manual_seed(int(seed))

    def manual_seed_all(self, seed: int) -> None:
        for generator in self._generators:
            generator.manual_seed(int(seed))

    def seed(self) -> None:
        self._generators[self.current].seed()

    def seed_all(self) -> None:
        self.manual_seed_all(self._generators[self.current].seed())

    def initial_seed(self) -> int:
        return self._generators[self.current].initial_seed()

    def get_rng_state(self, device: Any = "cuda") -> torch.Tensor:
        return self._generators[self.index_of(device)].get_state()

    def set_rng_state(self, new_state: torch.Tensor, device: Any = "cuda") -> None:
        self._generators[self.index_of(device)].set_state(new_state)

    def get_rng_state_all(self) -> list[torch.Tensor]:
        return [generator.get_state() for generator in self._generators]

    def set_rng_state_all(self, new_states: list[torch.Tensor]) -> None:
        for generator, state in zip(self._generators, new_states, strict=False):
            generator.set_state(state)


def _true(*args: Any, **kwargs: Any) -> bool:
    return True


def _false(*args: Any, **kwargs: Any) -> bool:
    return False


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _no_architectures() -> list[str]:
    return []


@contextlib.contextmanager
def _range(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


def install(installation: Installation, num_devices: int) -> None:
    devices = RehearsedDevices(num_devices)
    questions = {
        "is_available": (devices.is_available, "True"),
        "is_initialized": (_true, "True"),
        "init": (_nothing, "does nothing"),
        "device_count": (devices.device_count, "number of processes of this host"),
        "current_device": (devices.current_device, "what set_device set, 0 before"),
        "set_device": (devices.set_device, "remembers the number; an error if there are fewer devices"),
        "device": (devices.device, "sets the current device for a block"),
        "device_of": (devices.device_of, "does nothing"),
        "get_device_name": (devices.get_device_name, f"'{DEVICE_NAME}'"),
        "get_device_capability": (devices.get_device_capability, str(CAPABILITY)),
        "get_device_properties": (devices.get_device_properties, "name, capability, memory and cores of the machine"),
        "can_device_access_peer": (_true, "True"),
        "get_arch_list": (_no_architectures, "an empty list"),
        "is_bf16_supported": (_true, "True"),
        "is_tf32_supported": (_false, "False"),
        "is_current_stream_capturing": (_false, "False"),
        "synchronize": (_nothing, "does nothing: work is done when a call returns"),
        "ipc_collect": (_nothing, "does nothing"),
    }
    for name, (replacement, meaning) in questions.items():
        installation.module_name(torch.cuda, name, replacement, meaning)
    random = {
        "manual_seed": (devices.manual_seed, "seeds a state of its own; the generator of the CPU is not touched"),
        "manual_seed_all": (devices.manual_seed_all, "seeds a state of its own"),
        "seed": (devices.seed, "seeds a state of its own"),
        "seed_all": (devices.seed_all, "seeds a state of its own"),
        "initial_seed": (devices.initial_seed, "the seed of that state"),
        "get_rng_state": (devices.get_rng_state, "that state"),
        "set_rng_state": (devices.set_rng_state, "restores that state"),
        "get_rng_state_all": (devices.get_rng_state_all, "that state of all devices"),
        "set_rng_state_all": (devices.set_rng_state_all, "restores that state of all devices"),
    }
    for name, (replacement, meaning) in random.items():
        installation.module_name(torch.cuda, name, replacement, meaning)
        installation.module_name(torch.cuda.random, name, replacement, meaning)
    for name in _TENSOR_TYPES:
        if hasattr(torch, name):
            installation.module_name(torch.cuda, name, getattr(torch, name), f"torch.{name}")
    for name, replacement in {
        "range_push": _nothing,
        "range_pop": _nothing,
        "range_start": _nothing,
        "range_end": _nothing,
        "mark": _nothing,
        "range": _range,
    }.items():
        installation.module_name(torch.cuda.nvtx, name, replacement, "does nothing")
    for name in ("start", "stop"):
        installation.module_name(torch.cuda.profiler, name, _nothing, "does nothing")
