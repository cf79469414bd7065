"""``model.backward``: where a backward starts, and by what its gradients are multiplied (smp-api section 5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from modelparallel.errors import StepUsageError
from modelparallel.pipeline.local_program import LocalProgram
from modelparallel.pipeline.loss_weights import checked_weight, total_of, unit_for
from modelparallel.pipeline.roots import backward_root
from modelparallel.pipeline.values.stage_tensor import StageTensor
from modelparallel.torch_compat import summed_loss
from modelparallel.training.participants import Participant, RunningStep
from modelparallel.training.runtime import Runtime, logger


class ModelBackward:
    """The backwards of one model; ``is_averaged``: ``average_grads_across_microbatches``."""

    def __init__(self, model: Participant, runtime: Runtime, *, is_averaged: bool) -> None:
        self._model = model
        self._runtime = runtime
        self._is_averaged = is_averaged
        self._has_looked_for_sum = False

    def run(
        self,
        tensors: torch.Tensor | Sequence[torch.Tensor],
        grad_tensors: torch.Tensor | Sequence[torch.Tensor | None] | None,
        weight: float | torch.Tensor | None,
    ) -> None:
        """See ``DistributedModel.backward``."""
        roots = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        if grad_tensors is None or isinstance(grad_tensors, torch.Tensor):
            seeds: list[torch.Tensor | None] = [grad_tensors] * len(roots)
        else:
            seeds = list(grad_tensors)
        if len(seeds) != len(roots):
            raise StepUsageError(f"model.backward: {len(roots)} tensors but {len(seeds)} gradients; give one for each")
        step = self._runtime.step
        if step is None:
            self._run_outside(roots, seeds, weight)
            return
        if step.is_tracing:
            return
        self._model.enter_step(step)
        step.has_backward = True
        engine = self._runtime.engine
        program = engine.program or engine.local_program
        if program is None:
            raise StepUsageError(
                "model.backward was called while no microbatch runs its forward, as in a hook of the backward of a "
                "pipeline: call it in the step function, or in what that calls"
            )
        if step.loss_weights.note(weight is not None) and weight is not None:
            with engine.natively():
                self._begin_weights(step, weight)
        scale = self._model.loss_scale
        if weight is not None:
            scale /= step.loss_weights.unit
        elif self._is_averaged:
            scale *= program.weight
        looks = weight is None and grad_tensors is None and not self._has_looked_for_sum
        note_root = self._look_for_sum if looks else None
        if isinstance(program, LocalProgram):
            program.start_backward(roots, seeds, scale, weight, note_root)
            return
        with engine.natively():
            backward_root(program, roots, seeds, scale, weight, note_root)

    def _run_outside(
        self,
        roots: Sequence[torch.Tensor],
        seeds: Sequence[torch.Tensor | None],
        weight: float | torch.Tensor | None,
    ) -> None:
        if self._runtime.is_pipelined:
            raise StepUsageError("model.backward can only be called inside a function decorated with @smp.step")
        if weight is not None:
            raise StepUsageError(
                "model.backward with a weight can only be called inside a function decorated with @smp.step, at whose "
                "end the weights are added up"
            )
        torch.autograd.backward(roots, seeds)

    def _begin_weights(self, step: RunningStep, weight: float | torch.Tensor) -> None:
        """The first backward of a step whose losses have weights."""
        weights, runtime = step.loss_weights, self._runtime
        if any(model.gradients.joining.is_joining for model in runtime.models):
            raise StepUsageError(
                "model.backward with a weight inside model.join(): ranks that ran out of batches do not take part in "
                "the sum of the weights: give all ranks equally many batches"
            )
        if runtime.weight_unit is not None:
            weights.unit = runtime.weight_unit
        elif (
            runtime.session.groups.tp.size == 1  # split layers add up what the ranks begin with: one unit for all
            and not isinstance(weight, StageTensor)
            and (not runtime.is_pipelined or runtime.engine.is_discovering)
        ):
            # By the first microbatch, on all stages.
            weights.unit = unit_for(checked_weight(weight) * runtime.session.config.microbatches)
        for model in runtime.models:
            if model.partitioned:
                model.gradients.set_aside()

    def _look_for_sum(self, loss: torch.Tensor) -> None:
        """Once: whether the loss is a sum over samples, of which microbatches are averaged."""
        active = self._runtime.session
        if self._has_looked_for_sum:
            return
        self._has_looked_for_sum = True
        summed = summed_loss(loss) if self._is_averaged and active.config.microbatches > 1 else ""
        if summed and active.groups.dp.rank_in_group == 0:
            logger.warning(
                "model.backward was given a loss that is a sum over samples (%s), and gradients are averaged over the "
                "microbatches. For those of the sum over all microbatches wrap the model with "
                "average_grads_across_microbatches=False; for a mean use reduction='mean', or give the mean and "
                "model.backward(loss, weight=number of samples or tokens)",
                summed,
            )


def scale_by_weights(runtime: Runtime, step: RunningStep, weights: Sequence[float]) -> None:
    """The step function has run: the gradients of the step become those of the mean over all that the weights of all
    ranks count. Before they are reduced, which divides them by the number of ranks. Collective over DP_GROUP.
    """
    group = runtime.session.groups.dp
    total = total_of(sum(weights), group)
    factor = step.loss_weights.unit * group.size / total
    done: set[int] = set()
    for model in runtime.models:
        if model.partitioned:
            model.gradients.put_back(factor, done)
    runtime.weight_unit = unit_for(total / group.size)
