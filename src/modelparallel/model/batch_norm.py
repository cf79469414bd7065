"""``torch.nn.SyncBatchNorm`` in a distributed model: over the ranks that run the layer, on the CPU too.

[Note: synchronised statistics] torch's layer takes the statistics of the whole world unless it is given a group: with
pipelining it would wait for stages that never call it. So layers over the world get the DP_GROUP, whose ranks see
different samples (the RDP_GROUP where the ranks of a TP_GROUP feed the same batch), and each microbatch is normalised
over the microbatches of the same number of all these ranks. While the first step is traced, on one copy, nobody
synchronises. torch has no kernel for the CPU: there the means and variances of all ranks are gathered and combined by
differentiable operations.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from modelparallel.comm.collectives.split import all_gather
from modelparallel.comm.groups import Group
from modelparallel.errors import SMPConfigError
from modelparallel.training import runtime as runtime_module

if TYPE_CHECKING:
    from modelparallel.comm.groups import Groups

logger = logging.getLogger("modelparallel")


class GroupBatchNorm(nn.SyncBatchNorm):
    """What a ``SyncBatchNorm`` becomes when the model is wrapped, in place: the same object, parameters and buffers."""

    #: Whose statistics are combined.
    group: Group

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As torch's; collective over ``group`` in training."""
        step = runtime_module.current().step
        if not self.training or self.group.size == 1 or (step is not None and step.is_tracing):
            return self._normalise_alone(input)
        if input.is_cuda:
            return super().forward(input)
        self._check_input_dim(input)
        dims = [dim for dim in range(input.dim()) if dim != 1]
        values = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        count = values.new_tensor(input.numel() // input.shape[1])
        variance, mean = torch.var_mean(values, dims, correction=0)
        own = torch.stack([mean, variance, count.expand_as(mean)])
        means, variances, counts = all_gather(own.unsqueeze(0), self.group).unbind(1)
        total = counts.sum(0)
        mean = (means * counts).sum(0) / total
        variance = ((variances + (means - mean).square()) * counts).sum(0) / total
        self._track(mean.detach(), variance.detach(), total)
        shape = [-1 if dim == 1 else 1 for dim in range(input.dim())]
        result = (values - mean.view(shape)) * torch.rsqrt(variance + self.eps).view(shape)
        if self.weight is not None:
            result = result * self.weight.view(shape)
        if self.bias is not None:
            result = result + self.bias.view(shape)
        return result.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: torch.Tensor, variance: torch.Tensor, total: torch.Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        factor = self._average_factor()
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        unbiased = variance * total / (total - 1).clamp(min=1)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), factor)

    def _average_factor(self) -> float:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        return self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)

    def _normalise_alone(self, input: torch.Tensor) -> torch.Tensor:
        self._check_input_dim(input)
        is_tracked = self.training and self.track_running_stats and self.running_mean is not None
        factor = self._average_factor() if is_tracked else 0.0
        uses_batch = self.training or (self.running_mean is None and self.running_var is None)
        keeps = not self.training or self.track_running_stats
        mean, variance = (self.running_mean, self.running_var) if keeps else (None, None)
        return F.batch_norm(input, mean, variance, self.weight, self.bias, uses_batch, factor, self.eps)


def synchronise_batch_norms(module: nn.Module, groups: Groups, default: Group) -> None:
    """Make every ``SyncBatchNorm`` of a model one over the right ranks, in place. ``default``: those that feed samples
    of their own. Raises SMPConfigError for a group of ranks that do not all run the layer.
    """
    moved = []
    for name, part in module.named_modules():
        if not isinstance(part, nn.SyncBatchNorm):
            continue
        group = _group_of(name, part.process_group, groups, default)
        if group is default and default.size < groups.world.size:
            moved.append(name)
        layer: Any = part
        if type(part) is nn.SyncBatchNorm:
            layer.__class__ = GroupBatchNorm
        layer.process_group = group.process_group
        layer.group = group.of_layer(f"SyncBatchNorm '{name}'")
    if moved and groups.world.rank_in_group == 0:
        logger.info(
            "SyncBatchNorm over the ranks that run the layer, the %s group, and not over the world: %s",
            default.kind.name,
            ", ".join(moved),
        )


def _group_of(name: str, process_group: Any, groups: Groups, default: Group) -> Group:
    if process_group is None:
        return default
    ranks = tuple(sorted(dist.get_process_group_ranks(process_group)))
    if ranks in (groups.world.ranks, default.ranks):
        return default
    if not set(ranks) <= set(groups.dp.ranks):
        raise SMPConfigError(
            f"module '{name}' is a SyncBatchNorm over the global ranks {list(ranks)}, but only those of a DP_GROUP "
            f"({list(groups.dp.ranks)} here) run it, so it would wait for ever: convert with "
            "torch.nn.SyncBatchNorm.convert_sync_batchnorm(model), or give it ranks of smp.get_dp_process_group()"
        )
    own = ranks.index(groups.world.ranks[groups.world.rank_in_group])
    return replace(groups.dp, ranks=ranks, rank_in_group=own, process_group=process_group, _copies={})
