"""The distributed layers, ``smp.nn`` (smp-api section 9)."""

from torch import nn as _torch_nn

from modelparallel.job import registry as _registry
from modelparallel.nn import huggingface as huggingface
from modelparallel.nn.attention import DistributedAttentionLayer as DistributedAttentionLayer
from modelparallel.nn.attention import FlashAttentionLayer as FlashAttentionLayer
from modelparallel.nn.embedding import DistributedEmbedding as DistributedEmbedding
from modelparallel.nn.linear import DistributedLinear as DistributedLinear
from modelparallel.nn.lm_head import DistributedTransformerLMHead as DistributedTransformerLMHead
from modelparallel.nn.normalization import DistributedLayerNorm as DistributedLayerNorm
from modelparallel.nn.normalization import FusedLayerNorm as FusedLayerNorm
from modelparallel.nn.transformer import DistributedTransformer as DistributedTransformer
from modelparallel.nn.transformer import DistributedTransformerLayer as DistributedTransformerLayer
from modelparallel.nn.transformer import DistributedTransformerOutputLayer as DistributedTransformerOutputLayer
from modelparallel.tensor_parallel.distributed_module import DistributedModule as DistributedModule

__all__ = [
    "DistributedAttentionLayer",
    "DistributedEmbedding",
    "DistributedLayerNorm",
    "DistributedLinear",
    "DistributedModule",
    "DistributedTransformer",
    "DistributedTransformerLMHead",
    "DistributedTransformerLayer",
    "DistributedTransformerOutputLayer",
    "FlashAttentionLayer",
    "FusedLayerNorm",
    "huggingface",
]

_registry.register(_registry.Registration(_torch_nn.Linear, DistributedLinear, is_builtin=True))
_registry.register(_registry.Registration(_torch_nn.Embedding, DistributedEmbedding, is_builtin=True))
