"""Writing a partial checkpoint: at once, or in the background from a copy."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from modelparallel.checkpoints import job_state
from modelparallel.checkpoints.contents import Contents, model_contents, model_facts, numbered, optimizer_contents
from modelparallel.checkpoints.dcp_storage import DraftWriter, RankInfo
from modelparallel.checkpoints.planners import PieceSavePlanner, entry_of
from modelparallel.checkpoints.user_content import named_types, saved_bytes
from modelparallel.comm.groups import gloo_group
from modelparallel.errors import CheckpointError, SMPError, WaitTimeoutError
from modelparallel.version import __version__

if TYPE_CHECKING:
    from modelparallel.checkpoints.completion import Draft
    from modelparallel.model import DistributedModel
    from modelparallel.optimizer import DistributedOptimizer
    from modelparallel.runtime import Runtime

PLAN_NAME, USER_CONTENT_NAME = "plan.json", "user_content.pt"
#: The longest that ranks wait for each other's files.
FILE_TIMEOUT_SECONDS = 3600.0


@dataclass(frozen=True)
class Snapshot:
    """What this rank gives to a checkpoint: ``contents`` (of which the objects are bytes by now), and what the first
    rank writes beside: whole files, and facts for the completion record.
    """

    contents: Contents
    files: Mapping[str, bytes]
    facts: Mapping[str, Any]


def take_snapshot(
    runtime: Runtime,
    models: Sequence[DistributedModel],
    optimizers: Sequence[DistributedOptimizer],
    user_content: Any,
    data_loader: Any,
) -> Snapshot:
    """What goes into the checkpoint from this rank; the tensors are those of the models and optimizers. Local."""
    contents = Contents(objects=job_state.job_objects(runtime, data_loader))
    for index, model in enumerate(models):
        contents.add(model_contents(model, numbered("model", index)))
    for index, optimizer in enumerate(optimizers):
        contents.add(optimizer_contents(optimizer, numbered("optimizer", index)))
    config = runtime.session.config
    trust = (named_types(config.allowed_types), config.trust_pickles)
    contents.objects = {
        key: saved_bytes(value, f"the entry '{key}'", *trust) for key, value in contents.objects.items()
    }
    files = {}
    if runtime.session.groups.world.rank_in_group == 0:
        plans = [json.loads(plan.to_json()) if (plan := model.partition_plan) else None for model in models]
        files[PLAN_NAME] = json.dumps(plans).encode()
        if user_content is not None:
            files[USER_CONTENT_NAME] = saved_bytes(user_content, "user_content", *trust)
    pp_size, tp_size, rdp_size = job_state.sizes(runtime.session.groups)
    facts = {
        "kind": "partial",
        "modelparallel": __version__,
        "torch": torch.__version__,
        "num_steps": runtime.num_steps + runtime.num_earlier_steps,
        "shape": {"pp": pp_size, "tp": tp_size, "rdp": rdp_size},
        "sharded_data_parallel_degree": runtime.session.config.sharded_data_parallel_degree,
        "num_models": len(models),
        "num_optimizers": len(optimizers),
        "models": [model_facts(model) for model in models],
    }
    return Snapshot(contents, files, facts)


class PendingSave:
    """A save that may still run. ``wait`` raises what went wrong, on every rank."""

    def __init__(self, tag: str, future: Future[Any], failed: Callable[[BaseException], SMPError]) -> None:
        """``failed`` puts things right after an error of ``future``, and says what to raise for it."""
        self.tag = tag
        self._future = future
        self._failed = failed
        self._is_reported = False

    def done(self) -> bool:
        """Whether it has ended on this rank. Local."""
        return self._future.done()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the checkpoint is complete. Local. ``timeout`` in seconds; None: as long as files may take.

        Raises CheckpointError when the save has failed, once; WaitTimeoutError when the time is up.
        """
        seconds = FILE_TIMEOUT_SECONDS if timeout is None else timeout
        try:
            error = self._future.exception(timeout=seconds)
        except FutureTimeoutError as timed_out:
            raise WaitTimeoutError(
                f"the checkpoint {self.tag!r} is not written after {seconds:g} s: the disk or a rank is slow, look at "
                "its folder's draft; or wait longer"
            ) from timed_out
        if error is not None and not self._is_reported:
            self._is_reported = True
            raise self._failed(error) from error


def write_partial(
    runtime: Runtime, tag: str, draft: Draft, snapshot: Snapshot, after: Callable[[], None], *, in_background: bool
) -> PendingSave | None:
    """Write the checkpoint; collective over the world. ``after`` runs on the first rank when it is complete.

    In the background the tensors are copied first, so that training may change them; returns None else. Raises
    CheckpointError on every rank, and the draft is gone, when a rank fails.
    """
    groups = runtime.session.groups
    writer = DraftWriter(draft, RankInfo(*job_state.coordinates(groups)), snapshot.files, snapshot.facts, after)
    contents = snapshot.contents
    planner = PieceSavePlanner(contents.pieces, list(contents.objects))
    state: dict[str, Any] = {entry_of(piece): piece.tensor for piece in contents.pieces}
    state.update(contents.objects)
    arguments: dict[str, Any] = {"storage_writer": writer, "planner": planner}

    def failed(error: BaseException) -> SMPError:
        if groups.world.rank_in_group == 0:
            with suppress(CheckpointError):  # what went wrong first is what is to be told
                draft.discard()
        return explained(error, f"saving the checkpoint {tag!r}", groups.world.rank_in_group)

    try:
        arguments["process_group"] = world_process_group(runtime)
        if in_background:
            response: Any = dcp.async_save(state, **arguments)
            return PendingSave(tag, getattr(response, "upload_completion", response), failed)
        dcp.save(state, **arguments)
    except (CheckpointException, Exception) as error:
        raise failed(error) from error
    return None


def explained(error: BaseException, doing: str, own_rank: int) -> SMPError:
    """An error of DCP in our terms: which rank failed, and how."""
    if isinstance(error, CheckpointException):
        rank, (cause, _) = min(error.failures.items())
        more = f" (and on {len(error.failures) - 1} others)" if len(error.failures) > 1 else ""
        kind = type(cause) if isinstance(cause, CheckpointError) else CheckpointError
        text = str(cause) if isinstance(cause, SMPError) else f"{type(cause).__name__}: {cause}"
        return kind(f"{doing} failed on global rank {rank}{more}: {text}")
    if isinstance(error, CheckpointError):
        return error
    return CheckpointError(
        f"{doing} failed on global rank {own_rank}, most often because another rank has ended: "
        f"{type(error).__name__}: {error}"
    )


def world_process_group(runtime: Runtime) -> dist.ProcessGroup:
    """The process group of checkpoints. Collective over the world when it is first made."""
    config = runtime.session.config
    return gloo_group(
        runtime.session.groups.world,
        "checkpoints",
        runtime.session.made_groups,
        config.timeout_seconds,
        max(FILE_TIMEOUT_SECONDS, config.timeout_seconds),
    )
