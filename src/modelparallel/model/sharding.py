"""Sharding the parameters of a wrapped model: the groups and the plan.

[Note: faces] ``fully_shard`` puts other parameters in the place of those of the model: a shard (a ``DTensor``), and,
while it is gathered, a plain one. To everybody else the shard is *the* parameter: table, optimizers, state dicts. The
gathered one is another face of it, which the pipeline meets when a module runs, or when glue reads a weight.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from modelparallel.comm.making import divide_group
from modelparallel.data_parallel.sharding import ShardedParameters, ShardingGroups
from modelparallel.data_parallel.sharding_plan import plan_sharding
from modelparallel.errors import SMPConfigError
from modelparallel.torch_compat import has_own_compiled_call
from modelparallel.torch_compat.dtensors import mend_dtensors

if TYPE_CHECKING:
    from torch import nn

    from modelparallel.config.reading import Config
    from modelparallel.parameters.table import ParameterTable
    from modelparallel.training.runtime import Runtime

logger = logging.getLogger("modelparallel")


def shard_parameters(
    module: nn.Module,
    units: Sequence[str],
    table: ParameterTable,
    runtime: Runtime,
    *,
    finds_unused: bool,
    place: Callable[[nn.Module, set[int]], None],
) -> ShardedParameters | None:
    """Shard the parameters of ``module`` that are local and large enough; None where sharding is not asked for.

    ``units``: the names of the modules that run on this stage. ``finds_unused``: the argument
    ``find_unused_parameters`` of the model. ``place(part, others)``: gives what is in ``part`` and waits for storage
    its storage and its values, but for ``others`` (identities): parameters that are sharded get theirs group by group.
    Collective over the data-parallel group; the values must be equal by now.
    """
    session, config, decisions = runtime.session, runtime.session.config, runtime.decisions
    if not decisions.shards_parameters:
        return None
    mend_dtensors()
    by_visit = decisions.gathers_by_visit(finds_unused=finds_unused)
    plan = plan_sharding(
        module,
        units,
        table,
        stage=runtime.engine.stage,
        tp_size=session.groups.tp.size,
        threshold=config.sdp_param_persistence_threshold,
        is_pipelined=runtime.is_pipelined,
        gathers_by_visit=by_visit,
    )
    shard, replicate = divide_group(
        session.groups.rdp, config.sharded_data_parallel_degree, session.made_groups, config.timeout_seconds
    )
    place(module, {id(known.parameter) for known in plan.parameters})
    groups = ShardingGroups(shard, replicate, session.groups.tp, session.groups.dp.size)
    result = ShardedParameters(
        None if runtime.is_pipelined else module,
        plan.groups,
        plan.parameters,
        groups,
        device=session.device,
        policy=_policy(decisions.half, config),
        gathers_by_visit=by_visit,
        max_live=config.sdp_max_live_parameters,
        timeout_seconds=config.timeout_seconds,
        place=lambda part: place(part, set()),
        replace=runtime.index.replace,
    )
    if session.groups.world.rank_in_group == 0:
        _log(result, table, by_visit, config)
    return result


def check_can_shard(module: nn.Module, config: Config) -> None:
    """Raise SMPConfigError for a module whose parameters cannot come and go. Local."""
    if config.sharded_data_parallel_degree == 1:
        return
    for name, part in module.named_modules():
        if has_own_compiled_call(part):
            raise SMPConfigError(
                f"module '{name}' ({type(part).__name__}) was compiled by torch.compile, and "
                f"sharded_data_parallel_degree={config.sharded_data_parallel_degree} gathers parameters in hooks of "
                "modules, which would become part of the compiled code: wrap the model uncompiled; "
                "smp.DistributedModel(model, compile=True) compiles where that is possible"
            )


def _policy(half: torch.dtype | None, config: Config) -> MixedPrecisionPolicy:
    reduced = torch.float32 if half is not None and config.fp32_grad_accumulation else None
    return MixedPrecisionPolicy(param_dtype=half, reduce_dtype=reduced)


def _log(shards: ShardedParameters, table: ParameterTable, by_visit: bool, config: Config) -> None:
    local = sum(parameter.numel() for _, parameter in table.parameters())
    logger.info(
        "sharded data parallelism: %d of %d parameters are sharded over %d ranks, in %d groups, gathered by %s",
        shards.num_elements, local, config.sharded_data_parallel_degree, len(shards.titles),
        "visit" if by_visit else "step",
    )  # fmt: skip
    if not by_visit and shards.num_elements > config.sdp_max_live_parameters:
        logger.warning(
            "sdp_max_live_parameters=%d cannot be kept: gathered by step, this stage has %d elements in memory at a "
            "time; set sdp_gather: visit, or more stages",
            config.sdp_max_live_parameters, shards.num_elements,
        )  # fmt: skip
