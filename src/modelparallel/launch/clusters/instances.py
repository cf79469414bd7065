"""Instance types of AWS: what a host has, so that a launch file for the cloud works elsewhere, too.

Facts of the public lists of Amazon EC2 and SageMaker. A type that is missing is no error: the caller is told None.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from modelparallel.config.reading import nearest

Accelerator = Literal["cuda", "neuron", "none"]
#: "efa-rdma" is EFA whose network cards read the memory of GPUs (FI_EFA_USE_DEVICE_RDMA=1).
Network = Literal["ethernet", "efa", "efa-rdma"]
PREFIX = "ml."


@dataclass(frozen=True)
class Instance:
    """One host.

    Attributes:
        name: without `ml.`.
        num_devices: accelerators, 0 for a host of processors alone.
        device: what these are to torch.
        device_name: the model of the accelerator.
        device_memory: GiB of each.
        num_cpus: virtual ones.
        memory: GiB.
    """

    name: str
    num_devices: int
    device: Accelerator
    device_name: str
    device_memory: int
    num_cpus: int
    memory: float
    network: Network


# name, number of accelerators, their model, GiB of each, vCPUs, GiB of the host, network
_ACCELERATED = """
p2.xlarge           1  K80      12    4    61  ethernet
p2.8xlarge          8  K80      12   32   488  ethernet
p2.16xlarge        16  K80      12   64   732  ethernet
p3.2xlarge          1  V100     16    8    61  ethernet
p3.8xlarge          4  V100     16   32   244  ethernet
p3.16xlarge         8  V100     16   64   488  ethernet
p3dn.24xlarge       8  V100     32   96   768  efa
p4d.24xlarge        8  A100     40   96  1152  efa-rdma
p4de.24xlarge       8  A100     80   96  1152  efa-rdma
p5.4xlarge          1  H100     80   16   256  efa-rdma
p5.48xlarge         8  H100     80  192  2048  efa-rdma
p5e.48xlarge        8  H200    141  192  2048  efa-rdma
p5en.48xlarge       8  H200    141  192  2048  efa-rdma
p6-b200.48xlarge    8  B200    180  192  2048  efa-rdma
p6-b300.48xlarge    8  B300    288  192  4096  efa-rdma
p6e-gb200.36xlarge  4  GB200   185  144   960  efa-rdma
g4dn.xlarge         1  T4       16    4    16  ethernet
g4dn.2xlarge        1  T4       16    8    32  ethernet
g4dn.4xlarge        1  T4       16   16    64  ethernet
g4dn.8xlarge        1  T4       16   32   128  efa
g4dn.12xlarge       4  T4       16   48   192  efa
g4dn.16xlarge       1  T4       16   64   256  efa
trn1.2xlarge        1  Trainium  32   8    32  ethernet
trn1.32xlarge      16  Trainium  32 128   512  efa
trn1n.32xlarge     16  Trainium  32 128   512  efa
trn2.48xlarge      16  Trainium2 96 192  2048  efa
inf2.xlarge         1  Inferentia2 32   4   16  ethernet
inf2.8xlarge        1  Inferentia2 32  32  128  ethernet
inf2.24xlarge       6  Inferentia2 32  96  384  ethernet
inf2.48xlarge      12  Inferentia2 32 192  768  ethernet
"""
_NEURON = ("Trainium", "Trainium2", "Inferentia2")

# g5, g6 and g6e differ in the card and the memory: size, cards, vCPUs, EFA.
_CARDS = {"g5": ("A10G", 24), "g6": ("L4", 24), "g6e": ("L40S", 48)}
_G_SIZES = """
xlarge    1   4  ethernet
2xlarge   1   8  ethernet
4xlarge   1  16  ethernet
8xlarge   1  32  efa
12xlarge  4  48  efa
16xlarge  1  64  efa
24xlarge  4  96  efa
48xlarge  8 192  efa
"""

# Processors alone: GiB for each vCPU, and the sizes; "18" is 18xlarge, which has 72 vCPUs.
_PROCESSORS = {
    "c4": (1.875, "xlarge 2 4"),
    "c5": (2, "large xlarge 2 4 9 12 18 24"),
    "c5n": (2.625, "large xlarge 2 4 9 18"),
    "c6i": (2, "large xlarge 2 4 8 12 16 24 32"),
    "c7i": (2, "large xlarge 2 4 8 12 16 24 48"),
    "m4": (4, "xlarge 2 4 10 16"),
    "m5": (4, "large xlarge 2 4 8 12 16 24"),
    "m6i": (4, "large xlarge 2 4 8 12 16 24 32"),
    "m7i": (4, "large xlarge 2 4 8 12 16 24 48"),
    "r5": (8, "large xlarge 2 4 8 12 16 24"),
    "r5d": (8, "large xlarge 2 4 8 12 16 24"),
    "r7i": (8, "large xlarge 2 4 8 12 16 24 48"),
    "t3": (4, "large xlarge 2"),
}
_EFA_PROCESSORS = (
    "c5n.9xlarge",
    "c5n.18xlarge",
    "c6i.32xlarge",
    "m6i.32xlarge",
    "c7i.48xlarge",
    "m7i.48xlarge",
    "r7i.48xlarge",
)


def _table() -> dict[str, Instance]:
    rows: list[Instance] = []
    for line in filter(None, _ACCELERATED.splitlines()):
        name, count, model, device_memory, cpus, memory, network = line.split()
        device: Accelerator = "neuron" if model in _NEURON else "cuda"
        row = Instance(name, int(count), device, model, int(device_memory), int(cpus), int(memory), _network(network))
        rows.append(row)
    for family, (model, card_memory) in _CARDS.items():
        for line in filter(None, _G_SIZES.splitlines()):
            size, count, cpus, network = line.split()
            host_memory = int(cpus) * (8 if family == "g6e" else 4)
            name = f"{family}.{size}"
            rows.append(
                Instance(name, int(count), "cuda", model, card_memory, int(cpus), host_memory, _network(network))
            )
    for family, (ratio, sizes) in _PROCESSORS.items():
        for size in sizes.split():
            num_cpus = 2 if size == "large" else 4 if size == "xlarge" else 4 * int(size)
            name = f"{family}.{size}" if size.endswith("large") else f"{family}.{size}xlarge"
            network = "efa" if name in _EFA_PROCESSORS else "ethernet"
            rows.append(Instance(name, 0, "none", "", 0, num_cpus, num_cpus * ratio, _network(network)))
    return {row.name: row for row in rows}


def _network(word: str) -> Network:
    return "efa-rdma" if word == "efa-rdma" else "efa" if word == "efa" else "ethernet"


INSTANCES = _table()


def instance_of(instance_type: str) -> Instance | None:
    """What a type has, with or without `ml.` before it; None for one that is not in the table."""
    return INSTANCES.get(instance_type.removeprefix(PREFIX))


def devices_of(instance_type: str) -> int | None:
    """Accelerators of one host: `devices_of("ml.p4d.24xlarge")` is 8; None for a type that is not in the table."""
    instance = instance_of(instance_type)
    return None if instance is None else instance.num_devices


def nearest_instance(instance_type: str) -> str:
    """The known type that is spelled most like this one, with its prefix."""
    prefix = PREFIX if instance_type.startswith(PREFIX) else ""
    return prefix + nearest(instance_type.removeprefix(PREFIX), INSTANCES)


def fabric_environment(instance_type: str) -> dict[str, str]:
    """The variables that the network of a type needs (smp-config section 5.6); empty for one without EFA."""
    instance = instance_of(instance_type)
    if instance is None or instance.network == "ethernet":
        return {}
    rdma = {"FI_EFA_USE_DEVICE_RDMA": "1"} if instance.network == "efa-rdma" else {}
    return {"FI_PROVIDER": "efa", "RDMAV_FORK_SAFE": "1", **rdma}
