"""Two functions under a module path that the original API names (smp-api section 18); nothing else belongs here."""

from __future__ import annotations

import torch

from modelparallel import runtime, session
from modelparallel.tensor_parallel.distributed_module import DistributedModule

__all__ = ["get_distribution_axis", "rmsg"]


def get_distribution_axis(param: torch.Tensor) -> int | None:
    """The tensor dim along which ``param`` is sliced over the tensor-parallel ranks; None when it is not sliced.

    Local call, for a parameter or buffer of a model wrapped by ``smp.DistributedModel``. Raises
    ``NotInitializedError`` before ``smp.init()``. See smp-api section 18.
    """
    for model in runtime.current().models:
        for module in model.module.modules():
            if isinstance(module, DistributedModule):
                for name, spec in module.split_tensors().items():
                    if getattr(module, name, None) is param:
                        return spec.dim
    return None


def rmsg(message: object) -> str:
    """``message`` as text with the ranks of this process in front, for debug prints. Local call."""
    current = session.current()
    global_rank = current.identity.global_rank
    at = current.topology.coordinates(global_rank)
    return f"[rank {global_rank}, pp {at.pp_rank}, tp {at.tp_rank}, rdp {at.rdp_rank}] {message}"
