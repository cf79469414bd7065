"""Writing a partial checkpoint: at once, or in the background from a copy."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from modelparallel.checkpoints.partial import job_state
from modelparallel.checkpoints.partial.contents import (
    Contents,
    model_contents,
    model_facts,
    numbered,
    optimizer_contents,
)
from modelparallel.checkpoints.partial.dcp_storage import DraftWriter, RankInfo
from modelparallel.checkpoints.partial.planners import PieceSavePlanner, entry_of
from modelparallel.checkpoints.partial.user_content import named_types, saved_bytes
from modelparallel.comm.ending import close_connections, leave_at_once
from modelparallel.comm.groups import Group
from modelparallel.comm.making import gloo_group
from modelparallel.comm.waits import is_timeout
from modelparallel.errors import CheckpointError, SMPError, WaitTimeoutError
from modelparallel.torch_compat import default_store
from modelparallel.version import __version__

if TYPE_CHECKING:
    from modelparallel.checkpoints.stores.completion import Draft
    from modelparallel.model.wrapper import DistributedModel
    from modelparallel.optimizer.wrapper import DistributedOptimizer
    from modelparallel.training.runtime import Runtime

PLAN_NAME, USER_CONTENT_NAME = "plan.json", "user_content.pt"
#: How long the job's store, and a thread whose wait is over, have to answer.
_STORE_SECONDS = 5.0

logger = logging.getLogger("modelparallel")


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


class SaveProgress:
    """How far the ranks are with one save, as they note it in the store of the job: whom a save waits for."""

    def __init__(self, runtime: Runtime, tag: str, token: str) -> None:
        world = runtime.session.groups.world
        self._rank, self._size, self._lookout = world.rank_in_group, world.size, world.lookout
        self._timeout_seconds = runtime.session.config.timeout_seconds
        self._tag = tag
        self._store = dist.PrefixStore(f"modelparallel/saves/{token}", default_store())
        #: When this rank last did a part of its own work, and whether it does now.
        self.active_at, self.is_writing = time.monotonic(), False

    def note(self, step: str) -> None:
        """Where this rank is: it has "planned", is "writing", has "written" or "failed" to. Local."""
        self.active_at, self.is_writing = time.monotonic(), step == "writing"
        with suppress(RuntimeError):  # it is for messages, and must not hide what went wrong
            self._store.set(f"{step}/{self._rank}", "")

    def said(self) -> AbstractContextManager[object]:
        """While the block lasts, this thread waits for the others. Local."""
        return nullcontext() if self._lookout is None else self._lookout.waiting(lambda line: self.awaited())

    def awaited(self) -> str:
        """Who is waited for, in words. May wait itself, for the store. Local."""
        doing = f"global rank {self._rank}: waiting for the checkpoint {self._tag!r}"
        for step, what in (("planned", "that have not begun to write it"), ("written", "that have not written theirs")):
            missing = [rank for rank in range(self._size) if not self._store.check([f"{step}/{rank}"])]
            if missing:
                return f"{doing}: files of the global ranks {missing}, {what}"
        return f"{doing}: all ranks have written their files, global rank 0 puts them in order"

    def timed_out(self, seconds: float | None = None) -> WaitTimeoutError:
        """The error of a wait that was too long. ``seconds``: other than ``timeout_seconds``."""
        answers: list[str] = []
        asking = threading.Thread(target=lambda: answers.append(self.awaited()), daemon=True)
        asking.start()
        asking.join(_STORE_SECONDS)
        silence = f"the checkpoint {self._tag!r} is not complete, and the job's store says nothing"
        text = answers[0] if answers else silence
        if seconds is not None and seconds != self._timeout_seconds:
            return WaitTimeoutError(f"{text}: not complete after {seconds:g} s: wait longer")
        return WaitTimeoutError(
            f"{text}: nothing came within timeout_seconds={self._timeout_seconds:g}: a process is stopped or its disk "
            "hangs, or the disks of some ranks are that much slower than others': then raise timeout_seconds"
        )


class PendingSave:
    """A save that may still run. ``wait`` raises what went wrong, on every rank."""

    def __init__(
        self,
        tag: str,
        future: Future[Any],
        failed: Callable[[BaseException], SMPError],
        progress: SaveProgress,
        give_up: Callable[[], None],
        timeout_seconds: float,
    ) -> None:
        """``failed`` puts things right after an error of ``future``, and says what to raise for it; ``give_up`` ends
        the waits of ``future`` by an error.
        """
        self.tag = tag
        self._future = future
        self._failed = failed
        self._progress = progress
        self._give_up = give_up
        self._timeout_seconds = timeout_seconds
        self._is_reported = False

    def done(self) -> bool:
        """Whether it has ended on this rank. Local."""
        return self._future.done()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the checkpoint is complete. Local. ``timeout`` in seconds; None: as long as this rank itself
        writes, and then ``timeout_seconds`` for the others. Says after 10 s who is waited for.

        Raises CheckpointError when the save has failed, once; WaitTimeoutError when the time is up.
        """
        seconds = self._timeout_seconds if timeout is None else timeout
        start = time.monotonic()
        if not self.done():
            with self._progress.said():
                while not self.done():
                    now = time.monotonic()
                    began = max(start, now if self._progress.is_writing else self._progress.active_at)
                    left = (start if timeout is not None else began) + seconds - now
                    if left <= 0:
                        raise self._progress.timed_out(seconds)
                    with suppress(FutureTimeoutError):
                        self._future.exception(timeout=left)
        error = self._future.exception()
        if error is not None and not self._is_reported:
            self._is_reported = True
            raise self._failed(error) from error

    def finish(self, seconds: float) -> None:
        """At the end of the process: wait, or give it up. Local. Raises as `wait` does."""
        try:
            self.wait(None if seconds >= self._timeout_seconds else seconds)
        except WaitTimeoutError:
            self._give_up()
            with suppress(FutureTimeoutError):
                self._future.exception(timeout=_STORE_SECONDS)
            if not self.done():  # its thread hangs in the system, and Python would wait for it for ever
                logger.exception("at the end of the process")
                leave_at_once(1)
            raise


def write_partial(
    runtime: Runtime,
    tag: str,
    token: str,
    draft: Draft,
    snapshot: Snapshot,
    after: Callable[[], None],
    *,
    in_background: bool,
) -> PendingSave | None:
    """Write the checkpoint; collective over the world. ``after`` runs on the first rank when it is complete. ``token``
    tells this save from all others of the job.

    In the background the tensors are copied first, so that training may change them; returns None else. Raises
    CheckpointError on every rank, and the draft is gone, when a rank fails.
    """
    groups = runtime.session.groups
    progress = SaveProgress(runtime, tag, token)
    writer = DraftWriter(
        draft, RankInfo(*job_state.coordinates(groups)), snapshot.files, snapshot.facts, after, progress.note
    )
    contents = snapshot.contents
    planner = PieceSavePlanner(contents.pieces, list(contents.objects))
    state: dict[str, Any] = {entry_of(piece): piece.tensor for piece in contents.pieces}
    state.update(contents.objects)
    arguments: dict[str, Any] = {"storage_writer": writer, "planner": planner}

    def failed(error: BaseException) -> SMPError:
        if groups.world.rank_in_group == 0:
            with suppress(CheckpointError):  # what went wrong first is what is to be told
                draft.discard()
        if isinstance(error, WaitTimeoutError):
            return error
        if _is_timeout(error):
            return progress.timed_out()
        return explained(error, f"saving the checkpoint {tag!r}", groups.world.rank_in_group)

    try:
        process_group = arguments["process_group"] = checkpoint_group(runtime).process_group
        if in_background:
            response: Any = dcp.async_save(state, **arguments)
            future = getattr(response, "upload_completion", response)
            timeout_seconds = runtime.session.config.timeout_seconds
            return PendingSave(
                tag, future, failed, progress, lambda: close_connections([process_group]), timeout_seconds
            )
        with progress.said():
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


def checkpoint_group(runtime: Runtime) -> Group:
    """The world, with a process group for checkpoints alone. Collective over the world when it is first made."""
    session = runtime.session
    return gloo_group(session.groups.world, "checkpoints", session.made_groups, session.config.timeout_seconds)


def _is_timeout(error: BaseException) -> bool:
    """Whether an error of DCP is that another rank did not come in time."""
    if isinstance(error, CheckpointException):
        return any(_is_timeout(cause) for cause, _ in error.failures.values())
    return not isinstance(error, SMPError) and is_timeout(error)
