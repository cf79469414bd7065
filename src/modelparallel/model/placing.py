"""When models are partitioned: at the first call of a step function that is given them (smp-api sections 4 and 6)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from modelparallel import trees
from modelparallel.config.topology import CommGroup
from modelparallel.errors import CannotTraceError, PartitionError
from modelparallel.errors.raised import RaisedError
from modelparallel.job.messages import allgather
from modelparallel.model.initial_weights import agree_before_partition
from modelparallel.model.wrapper import DistributedModel, wrapped_models
from modelparallel.partitioning.guests import may_have_guests, with_copies
from modelparallel.plan.partition import PartitionPlan
from modelparallel.training import runtime as runtime_module
from modelparallel.training.runtime import Runtime

logger = logging.getLogger("modelparallel")

#: Runs the body once on the unsplit models; returns the models that it has called.
TraceBody = Callable[[], list[DistributedModel]]


def partition_models(runtime: Runtime, arguments: Mapping[str, Any], trace_body: TraceBody) -> None:
    """At the start of a step call: partition the models that are not yet, and run their hooks.

    Which models: the ones among ``arguments`` and the ones that the traced body calls; with no model among the
    arguments, all that are wrapped. Collective over the world if a model is not partitioned.
    """
    models = wrapped_models(runtime)
    if all(model.has_run_post_partition_hooks for model in models):
        return
    given = [leaf for leaf in trees.leaves(dict(arguments)) if isinstance(leaf, DistributedModel)]
    known = given or models
    if not runtime.is_pipelined:
        for model in known:
            model.run_post_partition_hooks()
        return
    waiting = [model for index, model in enumerate(known) if not model.partitioned and model not in known[:index]]
    # What is trained comes first: models of its structure take its plan.
    waiting.sort(key=lambda model: (model.same_as is not None, not model.is_trained()))
    plans: list[tuple[DistributedModel, PartitionPlan]] = []
    # All are traced before the first of them is split up.
    for model in waiting:
        model.check_has_not_left()
        model.look_again()
        agree_before_partition(model.module, model.title_of(""), runtime.session, has_own_part=model.has_own_part)
        plan, called = _agreed_plan(runtime, model, trace_body, _plan_of_twin(runtime, model, plans))
        waiting.extend(other for other in called if other not in waiting and not other.partitioned)
        plans.append((model, plan))
    for model, plan in plans:
        model.place(plan)
    for model, _ in plans:
        _warn_of_unlike(runtime, model)


def _plan_of_twin(
    runtime: Runtime, model: DistributedModel, plans: Sequence[tuple[DistributedModel, PartitionPlan]]
) -> PartitionPlan | None:
    """[Note: twins] Models of one structure are partitioned alike, so that lists of their parameters correspond on
    every stage: a target network, an average or a teacher is updated by a loop over two lists. The plan is that of the
    model that was planned first; None: the model needs a plan of its own. Local, and the same on all ranks.
    """
    config = runtime.session.config
    known = [*((other, other.partition_plan) for other in wrapped_models(runtime) if other.partitioned), *plans]
    named = model.same_as
    if named is not None:
        twins = [(other, plan) for other, plan in known if other is named]
        if not twins:
            raise PartitionError(
                "the model that same_as names is not partitioned: give it to this step function, too, or to an "
                "earlier one"
            )
    elif config.load_partition or model.stored_plan is not None or model.is_placed_by_hand():
        return None
    else:
        twins = [(other, plan) for other, plan in known if other.structure == model.structure]
    for other, plan in twins:
        # Of a model that is not trained the limit has counted less.
        is_tight = config.memory_limit is not None and model.is_trained() and not other.is_trained()
        if plan is not None and (named is not None or not is_tight):
            return replace(plan, origin=f"as model {other.index}")
    return None


def _warn_of_unlike(runtime: Runtime, model: DistributedModel) -> None:
    for other in wrapped_models(runtime):
        if other is model or not other.partitioned or other.structure != model.structure:
            continue
        if other.partition_plan != model.partition_plan and runtime.session.groups.world.rank_in_group == 0:
            logger.warning(
                "models %d and %d (%s) have one structure and different partitions, so that lists of their parameters "
                "do not correspond on the stages: wrap one with same_as=, or copy with smp.copy_weights",
                other.index, model.index, type(model.module).__name__,
            )  # fmt: skip
            return


def _agreed_plan(
    runtime: Runtime, model: DistributedModel, trace_body: TraceBody, twin: PartitionPlan | None
) -> tuple[PartitionPlan, list[DistributedModel]]:
    """The plan made by one rank, on every rank, and the models that the body calls as far as that is known.

    ``twin``: the plan of a model of its structure.
    """
    config, groups, models = runtime.session.config, runtime.session.groups, wrapped_models(runtime)
    made: tuple[PartitionPlan, list[int]] | None = None
    problem: Exception | SystemExit | None = None
    has_plan = config.load_partition or model.stored_plan is not None
    is_traced = config.auto_partition and not config.skip_tracing and not has_plan
    try:
        # The whole TP_GROUP traces, since split layers talk to each other.
        if groups.pp.rank_in_group == 0 and groups.rdp.rank_in_group == 0:
            # Traced for what the body calls, too, where the plan is that of another model.
            plan, called = _traced_plan(model, trace_body) if is_traced else (twin or model.make_plan(None), [])
            plan = twin or plan
            if (twin is not None or plan.origin == "manual") and not config.skip_tracing:
                plan = _with_copies(model, plan, trace_body)
            made = plan, [models.index(other) for other in called]
    except (Exception, SystemExit) as error:
        problem = error
    answers = allgather((made, None if problem is None else RaisedError.of(problem)), CommGroup.WORLD)
    if problem is not None:
        raise problem
    failed = next(((rank, raised) for rank, (_, raised) in enumerate(answers) if raised is not None), None)
    if failed is not None:
        # As in later steps, where every rank comes to the error by itself.
        raise failed[1].rebuilt() from PartitionError(
            f"global rank {failed[0]} could not trace and partition the model: {failed[1].text}"
        )
    result, indices = next(made_there for made_there, _ in answers if made_there is not None)
    if config.partition_file and not config.load_partition and groups.world.rank_in_group == 0:
        result.save(model.plan_file)
    return result, [models[index] for index in indices]


def _traced_plan(model: DistributedModel, trace_body: TraceBody) -> tuple[PartitionPlan, list[DistributedModel]]:
    called: list[DistributedModel] = []
    try:
        trace = model.trace(lambda: called.extend(trace_body()))
        for traced in (model, *called):
            traced.check_made()
    except CannotTraceError as error:
        logger.info("partitioned by sizes alone, without a trace: %s", error)
        trace = None
    return model.make_plan(trace), called


def _with_copies(model: DistributedModel, plan: PartitionPlan, trace_body: TraceBody) -> PartitionPlan:
    """A placement by hand, or as another model's, needs a trace only to find out which modules are called inside
    others. What has copies in the other model has them here, too.
    """
    units = [name for name, _ in plan.modules]
    if not may_have_guests(model.module, units):
        return plan
    try:
        trace = model.trace(lambda: trace_body(), units)
    except CannotTraceError as error:
        logger.info("not traced for modules that are called inside others: %s", error)
        return plan
    model.check_made()
    by_trace = with_copies(replace(plan, origin="manual"), model.module, trace)
    stages = {name: {*plan.copies_of(name), *by_trace.copies_of(name)} for name, _ in (*plan.copies, *by_trace.copies)}
    return replace(plan, copies=tuple((name, tuple(sorted(of))) for name, of in stages.items()))


def set_partition(module: nn.Module, index: int) -> None:
    """Place ``module``, part of a wrapped model, and everything in it on stage ``index``; after wrapping, before the
    first step. Local, but the same calls on every rank.

    Needs ``auto_partition: False``; ignored otherwise. Source: smp-api sections 6 and 18.
    """
    runtime = runtime_module.current()
    num_stages = runtime.session.config.pipeline_parallel_degree
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < num_stages:
        raise PartitionError(
            f"smp.set_partition: there is no partition {index!r}, use 0 to {num_stages - 1} "
            f"(pipeline_parallel_degree={num_stages})"
        )
    for model in reversed(wrapped_models(runtime)):
        if any(module is part for part in model.module.modules()):
            model.set_partition(module, index)
            return
    raise PartitionError(
        f"smp.set_partition: this {type(module).__name__} is part of no smp.DistributedModel: wrap the model first, "
        "and take the module from "
        "model.get_module()"
    )
