"""What of each parameter this rank keeps under sharded data parallelism, under the names that scripts of the original
read: ``ds_tensor``, ``ds_numel``, ``ds_shape`` of a parameter, and ``fp32_partitioned_groups_flat`` of the optimizer
(optimizer/flat_groups.py).

[Note: own parts] Scripts sum up ``p.ds_tensor.ds_numel`` over a group to find where each parameter begins in the flat
tensor of the group, keep slices of it, and add up squares over ``ds_param_shard_group`` when they log norms. So every
element must belong to one rank of that group, also of a parameter that is small enough to stay whole; and a flat tensor
must go on having the values of today: it is filled anew after each update, once somebody has asked for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modelparallel.parameters.shards import local_part

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group
    from modelparallel.data_parallel.sharding import ShardedParameters


def mark_own_parts(parameters: Sequence[nn.Parameter], sharded: ShardedParameters) -> None:
    """Give each parameter of a model the attributes that say what this rank keeps of it. Local."""
    group = sharded.shard_group
    with torch.no_grad():  # a DTensor gives its local part at once then
        for parameter in parameters:
            if sharded.has(parameter):
                mark_own_part(parameter, parameter, local_part(parameter).detach().reshape(-1))
            else:
                mark_own_part(parameter, parameter, own_part_of(parameter.detach(), group))


def mark_own_part(tensor: Any, parameter: nn.Parameter, part: Any) -> None:
    """Give ``tensor``, which stands for ``parameter``, these attributes. ``part``: the elements that this rank keeps.
    Local.
    """
    part.ds_numel = part.numel()
    tensor.ds_tensor, tensor.ds_numel, tensor.ds_shape = part, parameter.numel(), parameter.shape


def own_part_of(whole: torch.Tensor, group: Group) -> torch.Tensor:
    """The elements that this rank counts as its own, of a tensor that is whole on each rank of the group. Local."""
    length = -(-whole.numel() // group.size)
    start = min(group.rank_in_group * length, whole.numel())
    return whole.reshape(-1)[start : start + length]
