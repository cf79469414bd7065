"""Data parallelism: equal parameters on all ranks at the start, and gradients reduced over the ranks that share a
parameter.
"""

from modelparallel.data_parallel.broadcast import BroadcastTensor, broadcast_parameters
from modelparallel.data_parallel.buckets import ReducedParameter
from modelparallel.data_parallel.comm_hooks import CommHook
from modelparallel.data_parallel.joining import JoinEvents
from modelparallel.data_parallel.optimizer_shards import OptimizerShards, SharedParameter, shareable
from modelparallel.data_parallel.reducer import GradientReducer

__all__ = [
    "BroadcastTensor",
    "CommHook",
    "GradientReducer",
    "JoinEvents",
    "OptimizerShards",
    "ReducedParameter",
    "SharedParameter",
    "broadcast_parameters",
    "shareable",
]
