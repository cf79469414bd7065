"""``smp.resume_from_checkpoint`` (smp-api section 14)."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelparallel.checkpoints.partial import job_state
from modelparallel.checkpoints.partial.agreement import agreed
from modelparallel.checkpoints.partial.contents import numbered
from modelparallel.checkpoints.partial.reading import (
    OptimizerLoad,
    StoredCheckpoint,
    check_model,
    check_optimizer,
    load_model,
)
from modelparallel.checkpoints.partial.user_content import Allowed, Loading, named_types, read_user_content
from modelparallel.checkpoints.partial.writing import PLAN_NAME, USER_CONTENT_NAME
from modelparallel.checkpoints.stores import completion
from modelparallel.checkpoints.stores.completion import PARTIAL_ENDING
from modelparallel.checkpoints.stores.completion_record import CompletionRecord
from modelparallel.checkpoints.stores.local import Store
from modelparallel.checkpoints.stores.opening import open_store
from modelparallel.checkpoints.tools.original import find_original, load_original
from modelparallel.checkpoints.whole.full import load_full
from modelparallel.config.topology import CommGroup
from modelparallel.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    PartitionError,
    StepUsageError,
)
from modelparallel.errors.foreign_text import parse_json
from modelparallel.job.messages import allgather
from modelparallel.model.wrapper import wrapped_models
from modelparallel.optimizer.wrapper import wrapped_optimizers
from modelparallel.plan.partition import PartitionPlan
from modelparallel.training import runtime as runtime_module

if TYPE_CHECKING:
    from modelparallel.model.wrapper import DistributedModel
    from modelparallel.optimizer.wrapper import DistributedOptimizer
    from modelparallel.training.runtime import Runtime

logger = logging.getLogger("modelparallel")

NEWEST_COMPLETE = "newest-complete"


def resume_from_checkpoint(
    path: str | os.PathLike[str],
    tag: str | None = None,
    partial: bool = True,
    strict: bool = True,
    load_optimizer: bool = True,
    load_sharded_optimizer_state: bool = True,
    translate_function: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    *,
    data_loader: Any = None,
    allowed_types: Sequence[Allowed] = (),
    trust_pickles: bool = False,
    verify: bool = True,
) -> Any:
    """Load a checkpoint into the wrapped models and optimizers. Collective over the world, with equal arguments.

    Where the process has more models or optimizers than the checkpoint, the ones that were wrapped last get it, in
    order. The job may have another shape than the one that saved. Call it after both wrappers exist, before or after
    the first step. In a pipeline that is not partitioned yet the tensors are read at the partition, each rank its own;
    the stored plan is used if it is for as many stages. A folder ``<tag>_partial`` of the original library, with one
    file per rank and no index, is read by a job of the shape that saved it.

    Args:
        path, tag: as given to ``smp.save_checkpoint``. ``tag=None``: what ``<path>/newest`` names.
            ``"newest-complete"``: the newest one that is whole; damaged ones are passed over, with a warning.
        partial: False: the model alone, from one file: ``<path>/<tag>`` of a full checkpoint, or an ordinary state dict
            of torch or Hugging Face.
        strict: names must be the same; False takes the names that both have.
        load_optimizer: also the optimizers, masters and scales.
        load_sharded_optimizer_state: False: of the optimizers only masters and the loss scale.
        translate_function: maps the names of a full state dict to the model's, in place of the active translation.
        data_loader: gets the state of the data loader that was saved.
        allowed_types: classes that ``user_content`` may hold objects of, beside tensors, plain types, configurations of
            transformers, and the classes of the parameter of this name.
        trust_pickles: open any object in the checkpoint, which runs code that is in it; so does the parameter.
        verify: compare all files with the digests in the completion record first; the ranks share the work.

    Returns:
        ``user_content``, None if there is none.

    Raises:
        CheckpointNotFoundError: there is no such checkpoint.
        CheckpointCorruptError: the checkpoint is not whole.
        CheckpointError: the checkpoint is of another model.

    Source: smp-api section 14.
    """
    runtime = runtime_module.current()
    models = wrapped_models(runtime)
    if not models:
        raise StepUsageError("smp.resume_from_checkpoint: wrap the model with smp.DistributedModel first")
    job_state.check_loader(data_loader)
    if runtime.background_save is not None:
        runtime.background_save.wait()
    store = open_store(path)
    last_optimizer = next(reversed(wrapped_optimizers(runtime)), None) if load_optimizer else None
    config = runtime.session.config
    allowed_types = (*allowed_types, *named_types(config.allowed_types))
    how = Loading(strict, not load_sharded_optimizer_state, allowed_types, trust_pickles or config.trust_pickles)
    if not partial:
        full_tag = _agreed_tag(runtime, store) if tag is None else tag
        return load_full(
            path,
            full_tag,
            model=models[-1],
            optimizer=last_optimizer,
            strict=strict,
            translate_function=translate_function,
            allowed_types=how.allowed_types,
            trust_pickles=how.trust_pickles,
        )
    original = None if tag == NEWEST_COMPLETE else find_original(runtime, store, tag)
    if original is not None:
        return load_original(runtime, store.child(original), models[-1], last_optimizer, data_loader, how)
    name = _find(runtime, store, tag, verify)
    return _load_partial(runtime, store, name, load_optimizer, data_loader, how)


def _load_partial(
    runtime: Runtime,
    store: Store,
    name: str,
    load_optimizer: bool,
    data_loader: Any,
    how: Loading,
) -> Any:
    """Load the checkpoint in the folder ``name``; returns its user content. Collective over the world."""
    with agreed():  # before the ranks wait for each other's tensors
        folder = store.child(completion.folder_of(store, name))
        record = completion.read_record(store, name)
        checkpoint = StoredCheckpoint(
            runtime, folder, record.files, allowed=how.allowed_types, trusts_pickles=how.trust_pickles
        )
        models = _last(wrapped_models(runtime), int(record.facts.get("num_models", 1)), "models")
        for index, model in enumerate(models):
            check_model(model, numbered("model", index), checkpoint.entries, how.strict)
        num_optimizers = int(record.facts.get("num_optimizers", 1)) if load_optimizer else 0
        optimizers = _last(wrapped_optimizers(runtime), num_optimizers, "optimizers")
        wanted = job_state.wanted_keys(runtime.session.groups, record.facts, checkpoint.entries, data_loader)
        _use_stored_plans(folder, record, models)
    groups_of = _load_job_state(runtime, checkpoint, wanted, data_loader, optimizers)
    _Loads(checkpoint, models, optimizers, groups_of, masters_only=how.masters_only).start()
    if runtime.session.groups.world.rank_in_group == 0:
        logger.info("resuming from %s, saved after %s steps", folder.path_of(), record.facts.get("num_steps"))
    if USER_CONTENT_NAME not in record.files:
        return None
    with agreed():
        return read_user_content(folder, USER_CONTENT_NAME, how.allowed_types, how.trust_pickles)


# Which


def _agreed_tag(runtime: Runtime, store: Store) -> str:
    """The tag of the newest full checkpoint, the same on all ranks. Collective over the world."""
    newest: tuple[str | None, str] | None = None
    with agreed():
        if runtime.session.groups.world.rank_in_group == 0:
            newest = _newest_tag(store)
    tag, problem = allgather(newest, CommGroup.WORLD)[0]
    if tag is None:
        raise CheckpointNotFoundError(problem)
    return str(tag)


def _newest_tag(store: Store) -> tuple[str | None, str]:
    """(tag, what is wrong where there is none). Local."""
    newest = completion.read_newest(store)
    if newest is not None and newest.endswith(PARTIAL_ENDING):
        return None, f"the newest checkpoint in {store.path_of()!r} is the partial one {newest!r}: pass partial=True"
    return newest, f"there is no file 'newest' in {store.path_of()!r}: give a tag"


def _find(runtime: Runtime, store: Store, tag: str | None, verifies: bool) -> str:
    """The name of a whole checkpoint, the same on all ranks. Collective over the world."""
    rank = runtime.session.groups.world.rank_in_group
    candidates: tuple[list[str], str | None] = ([], None)
    with agreed():
        if rank == 0:
            candidates = _candidates(store, tag)
    names, problem = allgather(candidates, CommGroup.WORLD)[0]
    if problem is not None:
        raise CheckpointNotFoundError(problem)
    problems: list[str] = []
    for name in names:
        problems = _problems(runtime, store, name, verifies)
        if not problems:
            return str(name)
        if tag == NEWEST_COMPLETE and rank == 0:
            _pass_over(store, name, problems)
    try:
        completion.read_record(store, names[0])
    except CheckpointNotFoundError as error:
        raise CheckpointNotFoundError(str(error)) from None
    shown, more = "; ".join(problems[:5]), f" and {len(problems) - 5} more" if len(problems) > 5 else ""
    if tag == NEWEST_COMPLETE:
        raise CheckpointNotFoundError(f"no checkpoint in {store.path_of()!r} is whole; of the last: {shown}{more}")
    raise CheckpointCorruptError(
        f"{store.path_of(names[0])!r} is not what was written: {shown}{more}. Resume from another tag, or from "
        f"tag={NEWEST_COMPLETE!r}, which passes over damaged ones"
    )


def _candidates(store: Store, tag: str | None) -> tuple[list[str], str | None]:
    """(names to try in turn, what is wrong). On the first rank."""
    try:
        completion.recover(store)
    except CheckpointError as error:  # a path that is only read from
        logger.info("%s", error)
    if tag == NEWEST_COMPLETE:
        surveyed = completion.survey(store, f"*{PARTIAL_ENDING}")[::-1]
        for name, problems in itertools.takewhile(lambda entry: entry[1], surveyed):
            _pass_over(store, name, problems)
        names = [name for name, problems in surveyed if not problems]
        return names, None if names else f"there is no complete partial checkpoint in {store.path_of()!r}"
    if tag is not None:
        return [tag + PARTIAL_ENDING], None
    newest = completion.read_newest(store)
    if newest is None:
        return [], (
            f"there is no file 'newest' in {store.path_of()!r}, so no checkpoint was completed there: check the path, "
            "or give a tag"
        )
    return [newest if newest.endswith(PARTIAL_ENDING) else newest + PARTIAL_ENDING], None


def _pass_over(store: Store, name: str, problems: Sequence[str]) -> None:
    logger.warning("%s is not whole and is passed over: %s", store.path_of(name), "; ".join(problems[:3]))


def _problems(runtime: Runtime, store: Store, name: str, verifies: bool) -> list[str]:
    """What is wrong with a checkpoint, each rank having looked at its share of the files. Collective over the world."""
    world = runtime.session.groups.world
    try:
        own = completion.problems_of(store, name, (world.rank_in_group, world.size), checks_digests=verifies)
    except CheckpointError as error:
        own = [str(error)]
    problems_of_all = [problem for problems in allgather(own, CommGroup.WORLD) for problem in problems]
    return list(dict.fromkeys(problems_of_all))


# What


def _last(things: Sequence[Any], count: int, noun: str) -> list[Any]:
    """The ``count`` ``things`` that were wrapped last, in the order of wrapping: the checkpoint is theirs."""
    if len(things) < count:
        raise CheckpointError(
            f"the checkpoint holds {count} {noun} and this process has wrapped {len(things)}: wrap them all first, in "
            "the order in which they were saved"
        )
    return list(things[len(things) - count :])


@dataclass
class _Loads:
    """What is still to be read: each model when it is partitioned, each optimizer when all its models are."""

    checkpoint: StoredCheckpoint
    models: Sequence[DistributedModel]
    optimizers: Sequence[DistributedOptimizer]
    groups_of: Sequence[Sequence[Mapping[str, Any]]]  # the settings of each optimizer's groups
    masters_only: bool

    def start(self) -> None:
        """Read what can be read now. Collective over the world."""
        for index, model in enumerate(self.models):
            if model.partitioned:
                load_model(self.checkpoint, model, numbered("model", index))
            else:
                model.load_when_partitioned(functools.partial(self._load_late, model, index))
        self._load_optimizers()

    def _load_late(self, model: DistributedModel, index: int) -> None:
        load_model(self.checkpoint, model, numbered("model", index))
        self._load_optimizers()

    def _load_optimizers(self) -> None:
        if all(model.partitioned for model in self.models):
            for index, (optimizer, groups) in enumerate(zip(self.optimizers, self.groups_of, strict=True)):
                prefix = numbered("optimizer", index)
                OptimizerLoad(self.checkpoint, optimizer, prefix, groups, masters_only=self.masters_only).run()


def _use_stored_plans(folder: Store, record: CompletionRecord, models: Sequence[DistributedModel]) -> None:
    """Models that are not partitioned yet take the stored plan if it is for as many stages."""
    if PLAN_NAME not in record.files:
        return
    try:
        plans = list(parse_json(folder.read(PLAN_NAME)))
    except (ValueError, TypeError) as error:
        raise CheckpointCorruptError(
            f"{folder.path_of(PLAN_NAME)!r} is not what was written ({error}): resume from another tag"
        ) from error
    for model, plan in zip(models, plans, strict=False):
        if plan is None or model.partitioned:
            continue
        try:
            model.use_stored_plan(PartitionPlan.from_json(json.dumps(plan)))
        except PartitionError as error:
            logger.info("the partition plan of the checkpoint is not used: %s", error)


def _load_job_state(
    runtime: Runtime,
    checkpoint: StoredCheckpoint,
    wanted: Mapping[str, str],
    data_loader: Any,
    optimizers: Sequence[DistributedOptimizer],
) -> list[Sequence[Mapping[str, Any]]]:
    """Put back random states, steps and the place in the data (``wanted``: see `job_state.wanted_keys`), and the
    settings of the optimizers' groups, which are returned. Collective over the world.
    """
    prefixes = [numbered("optimizer", index) for index in range(len(optimizers))]
    keys = [*wanted.values(), *(f"{prefix}.param_groups" for prefix in prefixes)]
    objects = checkpoint.read([], keys, "loading the state of the job")
    groups_of = [objects[f"{prefix}.param_groups"] for prefix in prefixes]
    with agreed():
        for prefix, optimizer, groups in zip(prefixes, optimizers, groups_of, strict=True):
            check_optimizer(optimizer, prefix, groups)
            # At once, also where the state waits for the partition: schedulers read the learning rate.
            for saved_group, group in zip(groups, optimizer.param_groups, strict=True):
                group.update((key, value) for key, value in saved_group.items() if key != "params")
        job_state.take_job_state(runtime, wanted, objects.__getitem__, data_loader)
    return groups_of
