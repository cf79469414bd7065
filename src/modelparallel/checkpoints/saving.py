"""``smp.save_checkpoint`` (smp-api section 14)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from modelparallel.checkpoints.partial.agreement import agreed, agreed_token
from modelparallel.checkpoints.partial.job_state import check_loader
from modelparallel.checkpoints.partial.writing import PendingSave, take_snapshot, write_partial
from modelparallel.checkpoints.stores.completion import PARTIAL_ENDING, Draft, prune, write_newest
from modelparallel.checkpoints.stores.opening import open_store
from modelparallel.checkpoints.whole.full import check_tag, save_full
from modelparallel.config.topology import CommGroup
from modelparallel.errors import CheckpointError, SMPConfigError, StepUsageError
from modelparallel.job.messages import told_by_all
from modelparallel.model.wrapper import DistributedModel, wrapped_models
from modelparallel.optimizer.wrapper import DistributedOptimizer, wrapped_optimizers
from modelparallel.training import runtime as runtime_module

if TYPE_CHECKING:
    from modelparallel.training.runtime import Runtime


def save_checkpoint(
    path: str | os.PathLike[str],
    tag: str,
    partial: bool = True,
    model: DistributedModel | Sequence[DistributedModel] | None = None,
    optimizer: DistributedOptimizer | Sequence[DistributedOptimizer] | None = None,
    user_content: Any = None,
    translate_if_full: bool = True,
    num_kept_partial_checkpoints: int | None = None,
    *,
    data_loader: Any = None,
    full_optimizer: bool = False,
    async_save: bool = False,
    if_saving: str = "wait",
) -> PendingSave | None:
    """Save a checkpoint that counts only when it is whole. Collective over the world, with equal arguments.

    Args:
        path: a folder, which is made, or a URL that fsspec knows (``s3://...``); the same place on all ranks.
        tag: names the checkpoint: ``<path>/<tag>_partial/`` or ``<path>/<tag>``.
        partial: every rank writes its share: model, optimizer, masters, loss scale, random states; a job of any other
            shape resumes from it. False: rank 0 writes the merged model into one file.
        model, optimizer: what is saved; None: the wrapped ones of this process.
        user_content: anything ``torch.save`` takes, from rank 0; ``smp.resume_from_checkpoint`` returns it.
        translate_if_full: a full checkpoint has Hugging Face's names where layers of its families were replaced.
        num_kept_partial_checkpoints: the oldest complete ones beyond this number are removed.
        data_loader: its ``state_dict()`` is kept, too (``StatefulDataLoader``, ``smp.GlobalBatchSampler``).
        full_optimizer: with ``partial=False``, also ``<path>/optimizer_<tag>``.
        async_save: return when the tensors are copied, and write in the background; partial checkpoints only.
        if_saving: what to do while an earlier one is still being written: "wait" for it or "refuse".

    Returns:
        The :class:`PendingSave` of an ``async_save``, else None. An ``async_save`` that fails says so at its
        ``wait()``, at the next save, or when the process ends.

    Raises:
        CheckpointError: on every rank when one cannot write; what was saved before is untouched.
        SMPConfigError: wrong arguments.
        StepUsageError: before the partition, or without a wrapped model.
        WaitTimeoutError: a rank did not write within ``timeout_seconds``.

    Source: smp-api section 14.
    """
    runtime = runtime_module.current()
    models, optimizers = _chosen(runtime, model, optimizer)
    _check(runtime, tag, partial, models, num_kept_partial_checkpoints, async_save, if_saving, full_optimizer)
    check_loader(data_loader)
    _settle_earlier(runtime, if_saving)
    store = open_store(path)
    name = tag + PARTIAL_ENDING if partial else tag
    token = agreed_token(
        "smp.save_checkpoint", path=str(os.fspath(path)), tag=tag, partial=partial, async_save=async_save,
        models=len(models), optimizers=len(optimizers),
    )  # fmt: skip
    if not partial:
        save_full(
            path,
            tag,
            model=models[0],
            optimizer=optimizers[0] if full_optimizer else None,
            user_content=user_content,
            translate_if_full=translate_if_full,
        )
        return None

    def put_in_order() -> None:
        write_newest(store, name)
        if num_kept_partial_checkpoints is not None:
            prune(store, num_kept_partial_checkpoints)

    with agreed():  # before the ranks wait for each other's files
        snapshot = take_snapshot(runtime, models, optimizers, user_content, data_loader)
    draft = Draft(store, name, token)
    pending = write_partial(runtime, tag, token, draft, snapshot, put_in_order, in_background=async_save)
    if pending is None:
        return None
    if runtime.background_save is None:
        runtime.session.finishers.append(lambda seconds: _finish_last(runtime, seconds))
    runtime.background_save = pending
    return pending


def _finish_last(runtime: Runtime, seconds: float) -> None:
    if runtime.background_save is not None:
        runtime.background_save.finish(seconds)


def _chosen(runtime: Runtime, model: Any, optimizer: Any) -> tuple[list[DistributedModel], list[DistributedOptimizer]]:
    models = wrapped_models(runtime) if model is None else _as_list(model)
    optimizers = wrapped_optimizers(runtime) if optimizer is None else _as_list(optimizer)
    for number, thing in enumerate((*models, *optimizers)):
        kind = DistributedModel if number < len(models) else DistributedOptimizer
        if not isinstance(thing, kind):
            raise SMPConfigError(
                f"smp.save_checkpoint: expected a smp.{kind.__name__}, got {type(thing).__name__}: give the wrapped one"
            )
    return models, optimizers


def _as_list(thing: Any) -> list[Any]:
    return list(thing) if isinstance(thing, list | tuple) else [thing]


def _check(
    runtime: Runtime,
    tag: str,
    partial: bool,
    models: Sequence[DistributedModel],
    num_kept: int | None,
    async_save: bool,
    if_saving: str,
    full_optimizer: bool,
) -> None:
    check_tag(tag)
    if not models:
        raise StepUsageError("smp.save_checkpoint: there is no smp.DistributedModel to save: wrap the model first")
    waiting = [model for model in models if not model.partitioned]
    if waiting and partial:
        raise StepUsageError(
            "smp.save_checkpoint: the model is not partitioned yet, or has left the pipeline by model.cpu(): save "
            "after the first call of a step function"
        )
    if num_kept is not None and (isinstance(num_kept, bool) or not isinstance(num_kept, int) or num_kept < 1):
        raise SMPConfigError(
            f"smp.save_checkpoint: num_kept_partial_checkpoints={num_kept!r}: expected a number from 1"
        )
    if if_saving not in ("wait", "refuse"):
        raise SMPConfigError(f"smp.save_checkpoint: if_saving={if_saving!r}: expected 'wait' or 'refuse'")
    if async_save and not partial:
        raise SMPConfigError("smp.save_checkpoint: async_save=True needs partial=True: a full checkpoint is gathered")
    if not partial and len(models) != 1:
        raise SMPConfigError(
            f"smp.save_checkpoint(partial=False): the file of a full checkpoint holds one model, and there are "
            f"{len(models)}: say which (model=...), or save a partial checkpoint, which holds all"
        )
    if full_optimizer and partial:
        raise SMPConfigError("smp.save_checkpoint: full_optimizer=True is for partial=False; a partial one has it")


def _settle_earlier(runtime: Runtime, if_saving: str) -> None:
    """An earlier save in the background ends first, on all ranks, or is an error on all."""
    pending = runtime.background_save
    if pending is None:
        return
    if if_saving == "refuse":
        is_busy = any(told_by_all(not pending.done(), CommGroup.WORLD, "smp.save_checkpoint"))
        if is_busy:
            raise CheckpointError(
                f"smp.save_checkpoint: the checkpoint {pending.tag!r} is still being written (if_saving='refuse'): "
                "save less often, or wait for it"
            )
    pending.wait()
