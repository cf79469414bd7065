"""What keeps a step within the memory of a device: groups of children that are recomputed, offloaded activations."""

from modelparallel.memory.offload import HostStore as HostStore
from modelparallel.memory.strategies import check_strategy as check_strategy
from modelparallel.memory.strategies import groups_of as groups_of
