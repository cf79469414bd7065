"""Whether the job is to be preempted, agreed by all ranks; see [Note: preemption] in job/preemption.py."""

from __future__ import annotations

import logging
import os

import torch
import torch.distributed as dist

from modelparallel.comm.waits import Wait
from modelparallel.errors import StepUsageError
from modelparallel.job.messages import known_to_peers
from modelparallel.job.preemption import PreemptionNotice
from modelparallel.training.runtime import current

logger = logging.getLogger("modelparallel")


def preemption_requested() -> bool:
    """Whether the job was asked to save its state and leave, since its time is nearly over or its machines are needed.

    Collective over the world: all ranks call it equally often, between steps, and get the same answer; once it is True
    it stays so. It takes one reduction of a number. The first call makes this process survive SIGUSR1 and one SIGTERM,
    unless the script has handlers of its own; what asks is `SIGUSR1` or `SIGTERM` to the launcher (or to the rank, if
    srun or torchrun has started it). A script that is asked saves and leaves::

        for step in range(first, num_steps):
            ...
            if smp.preemption_requested():
                smp.save_checkpoint("checkpoints", f"step{step + 1}", user_content={"step": step + 1})
                sys.exit(smp.EXIT_PREEMPTED)

    The job then ends with that code on all ranks, and the cluster puts it back into its queue: no failure, and it does
    not count as a restart.

    Raises:
        NotInitializedError: before `smp.init()`.
        StepUsageError: inside a step function.
        WaitTimeoutError: a rank did not call within `message_timeout_seconds`.
        CommunicationError: a rank has ended.

    Extension; see docs/launching.md.
    """
    runtime = current()
    if runtime.step is not None:
        raise StepUsageError("smp.preemption_requested inside a step function: call it outside, between the steps")
    ambient = runtime.session
    if runtime.preemption is None:
        runtime.preemption = PreemptionNotice(os.environ)
        ambient.closers.append(runtime.preemption.close)
    notice = runtime.preemption
    if notice.is_agreed:
        return True
    is_seen = notice.is_seen
    world = ambient.groups.world
    if world.size > 1:
        answer = torch.tensor(int(is_seen), dtype=torch.int32)
        seconds = ambient.config.message_timeout_seconds
        wait = Wait(world, "smp.preemption_requested", seconds=seconds, limit="message_timeout_seconds")
        with known_to_peers("smp.preemption_requested", world):
            group = world.process_group
            wait.run(lambda: dist.all_reduce(answer, dist.ReduceOp.MAX, group=group, async_op=True))
        is_seen = bool(answer.item())
    if is_seen:
        notice.is_agreed = True
        if ambient.identity.global_rank == 0:
            logger.warning("the job is to be preempted: its script is told now, to save and leave")
    return is_seen
