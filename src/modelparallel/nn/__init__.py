"""The distributed layers, ``smp.nn`` (smp-api section 9)."""

from torch import nn as _torch_nn

from modelparallel import registry as _registry
from modelparallel.nn.embedding import DistributedEmbedding as DistributedEmbedding
from modelparallel.nn.linear import DistributedLinear as DistributedLinear
from modelparallel.nn.normalization import FusedLayerNorm as FusedLayerNorm
from modelparallel.tensor_parallel.distributed_module import DistributedModule as DistributedModule

__all__ = ["DistributedEmbedding", "DistributedLinear", "DistributedModule", "FusedLayerNorm"]

_registry.register(_registry.Registration(_torch_nn.Linear, DistributedLinear, is_builtin=True))
_registry.register(_registry.Registration(_torch_nn.Embedding, DistributedEmbedding, is_builtin=True))
