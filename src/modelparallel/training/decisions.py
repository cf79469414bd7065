"""What the configuration means for the training of this process, decided once.

A configuration says what a script wants. What follows from it and the groups (who holds a part of what, over which
ranks a sum counts each element once) is asked for in many places; it is answered here alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group, Groups
    from modelparallel.config.table import Config


@dataclass(frozen=True)
class Decisions:
    """The answers; equal on all ranks, but that each names groups of its own.

    Attributes:
        half: what ``fp16`` or ``bf16`` train in; None: what the model is in.
        has_loss_scale: whether losses are scaled and updates with infinite gradients skipped.
        shards_parameters: whether parameters are whole only while they are used (sharded data parallelism).
        shares_out_parameters: whether each rank may update a part of a parameter only, by that or by
            ``shard_optimizer_state``.
        is_divided: whether each rank may hold, or update, a part of the model only.
        whole_model: the ranks over which sums over the model (norms, overflows) count each element once.
        samples: the ranks that feed samples of their own.
        optimizer_shards: the number of parts of the optimizer state, of parameters that tensor parallelism has split.
        lockstep: the ranks of this stage whose pipelines must run in one order; None: there is one pipeline.
    """

    half: torch.dtype | None
    has_loss_scale: bool
    shards_parameters: bool
    shares_out_parameters: bool
    is_divided: bool
    whole_model: Group
    samples: Group
    optimizer_shards: int
    lockstep: Group | None
    _gather: str
    _is_pipelined: bool

    @classmethod
    def of(cls, config: Config, groups: Groups) -> Decisions:
        """The decisions of a configuration for the caller's groups."""
        degree = config.sharded_data_parallel_degree
        shares_out = groups.dp.size > 1 and (config.shard_optimizer_state or degree > 1)
        lockstep = groups.tp if groups.tp.size > 1 else None
        if degree > 1 and config.sdp_gather == "visit":
            lockstep = groups.dp  # each visit of a module gathers its parameters
        return cls(
            half=torch.float16 if config.fp16 else torch.bfloat16 if config.bf16 else None,
            has_loss_scale=config.fp16,
            shards_parameters=degree > 1,
            shares_out_parameters=shares_out,
            is_divided=groups.mp.size > 1 or shares_out,
            whole_model=groups.world if shares_out else groups.mp,
            samples=groups.rdp if config.prescaled_batch and groups.tp.size > 1 else groups.dp,
            optimizer_shards=degree if degree > 1 else groups.rdp.size if config.shard_optimizer_state else 1,
            lockstep=lockstep,
            _gather=config.sdp_gather,
            _is_pipelined=groups.pp.size > 1,
        )

    def gathers_by_visit(self, *, finds_unused: bool) -> bool:
        """What ``sdp_gather: auto`` means. ``finds_unused``: ranks may use different parameters.

        With a pipeline gradients stay whole until the end of the step in any case, and there are as many visits as
        microbatches: gathering once costs the parameters' own bytes and saves all the gathering. Without, by visit, as
        FSDP does; but not if it is said that ranks may use different parameters.
        """
        if self._gather == "auto":
            return not self._is_pipelined and not finds_unused
        return self._gather == "visit"
