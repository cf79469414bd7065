"""One norm of the gradient: over all stages, slices and shards, the same number on every rank, and what clips by it.

[Note: one norm] A rank holds a part of the model, so a norm of what it holds is a number of its own, and clipping by it
changes the direction of the update in silence. Here each element of the model is counted once: a parameter that several
ranks hold is added up by one of them (tp_rank 0; the home of a copied parameter; the rank that a shard says), and the
parts are summed in float64 over the MP_GROUP, over the world where parameters are shared out among the copies of the
model. ``clip_grad_norm_``, ``get_total_norm`` and ``clip_grads_with_norm_`` of torch ask for it once a model is wrapped
in a job where that matters (`torch_compat.intercept_clip_grad_norm`): so a plain script, and Hugging Face's Trainer,
get this norm too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from modelparallel.comm.waits import reduce_in_place
from modelparallel.errors import SMPConfigError, SMPError, StepUsageError
from modelparallel.parameters.retired import without_retired
from modelparallel.parameters.shards import local_part
from modelparallel.torch_compat import intercept_clip_grad_norm, intercept_clip_grad_value
from modelparallel.torch_compat.private_parts import by_kind, foreach_mul_, foreach_norm
from modelparallel.training import runtime as runtime_module

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group
    from modelparallel.parameters.shards import Shard
    from modelparallel.plan.rows import ParameterRow
    from modelparallel.training.participants import Participant
    from modelparallel.training.runtime import Runtime


class NonFiniteGradientError(SMPError, RuntimeError):
    """The norm of the gradient is infinite or not a number."""


@dataclass(frozen=True)
class _CountedGradient:
    """A gradient that is here, and whether this rank counts it: of the ranks of an MP_GROUP, and of the world.

    ``scale``: that of the loss, where the gradient still has it (fp16, a parameter that no optimizer updates).
    """

    gradient: torch.Tensor
    is_counted_in_copy: bool
    is_counted_in_world: bool
    scale: float = 1.0

    @property
    def exact(self) -> torch.Tensor:
        """What is here of the gradient, without the scale of the loss."""
        local = local_part(self.gradient)
        return local if self.scale == 1.0 else local.float() / self.scale


def clip_grad_norm_(
    model: nn.Module | torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> torch.Tensor:
    """Scale the gradients so that their norm, over all stages, slices and shards, is at most ``max_norm``. Collective
    over MP_GROUP; with sharded parameters or optimizer state over the world.

    Call it after the step function, before ``optimizer.step()``. With fp16 the norm is that of the gradients without
    the scale of the loss.

    Args:
        model: a wrapped model, or some of its parameters (each rank gives those that it holds).
        max_norm: the greatest norm that stays as it is.
        norm_type: 2 or any other order > 0, ``inf`` for the largest element.
        error_if_nonfinite: raise where the norm is not finite.

    Returns:
        The norm before the scaling, a scalar tensor, equal on all ranks and to the norm in one process.

    Raises:
        NonFiniteGradientError: the norm is not finite, with ``error_if_nonfinite``.
        SMPConfigError: a wrong order; a model that is not wrapped, or not partitioned yet.
        StepUsageError: inside ``model.join()`` with ``shard_optimizer_state``.
    """
    runtime = runtime_module.current()
    if isinstance(model, nn.Module):
        wrapped = next((known for known in runtime.models if id(known) == id(model)), None)
        if wrapped is None:
            raise SMPConfigError(
                f"smp.clip_grad_norm_: got a {type(model).__name__} that is not wrapped: pass the "
                "smp.DistributedModel, or parameters of it"
            )
        tensors: list[torch.Tensor] = list(wrapped.parameters())
        _check_partition(wrapped)
    else:
        tensors = [model] if isinstance(model, torch.Tensor) else list(model)
    parts = parts_of(runtime, tensors)
    norm = total_norm(runtime, parts, norm_type)
    if error_if_nonfinite:
        check_finite(norm)
    clip_parts(parts, max_norm, norm)
    return norm


def _check_partition(model: Participant) -> None:
    if not model.partitioned:
        raise SMPConfigError(
            "smp.clip_grad_norm_: the model is not partitioned yet, so there are no gradients: call it after the step "
            "function"
        )


def total_norm(runtime: Runtime, parts: Sequence[_CountedGradient], norm_type: float) -> torch.Tensor:
    """The norm of order ``norm_type`` over all ranks; collective, see :func:`clip_grad_norm_`."""
    order = float(norm_type)
    if not order > 0:
        raise SMPConfigError(f"norm_type: expected a number > 0 or inf, got {norm_type!r}")
    decisions, device = runtime.decisions, runtime.session.device
    is_shared_out, group = decisions.shares_out_parameters, decisions.whole_model
    if is_shared_out and any(model.gradients.joining.is_joining for model in runtime.models):
        raise StepUsageError(
            "the norm of the gradient is a sum over all ranks where parameters are shared out among them "
            "(shard_optimizer_state), but inside model.join() ranks that ran out of batches do not take part: clip "
            "without join(), or leave shard_optimizer_state out"
        )
    own = [part.exact for part in parts if (part.is_counted_in_world if is_shared_out else part.is_counted_in_copy)]
    total = torch.zeros((), dtype=torch.float64, device=device)
    with torch.no_grad():
        norms = [norm.double().to(device) for norm in _norms(own, order)]
        if norms:
            stacked = torch.stack(norms)
            total = stacked.max() if math.isinf(order) else stacked.pow(order).sum()
    if group.size > 1:
        reduce(total, group, dist.ReduceOp.MAX if math.isinf(order) else dist.ReduceOp.SUM, runtime)
    norm = total if math.isinf(order) else total.pow(1.0 / order)
    return norm if _is_double(runtime) else norm.float()


def _norms(gradients: Sequence[torch.Tensor], order: float) -> list[torch.Tensor]:
    filled = [gradient for gradient in gradients if gradient.numel()]
    # Squares of half numbers overflow; full precision for those, and one kernel for all the others.
    whole = [gradient for gradient in filled if gradient.dtype not in (torch.float16, torch.bfloat16)]
    half = [gradient for gradient in filled if gradient.dtype in (torch.float16, torch.bfloat16)]
    norms = list(foreach_norm(whole, order)) if whole else []
    norms.extend(torch.linalg.vector_norm(gradient, order, dtype=torch.float32) for gradient in half)
    return norms


def reduce(value: torch.Tensor, group: Group, operation: Any, runtime: Runtime, what: str = "norm") -> None:
    """All-reduce one number in place; collective over ``group``."""
    seconds = runtime.session.config.timeout_seconds
    reduce_in_place(value, group, f"the {what} of the gradient over all ranks", operation, seconds)


def _is_double(runtime: Runtime) -> bool:
    """Equal on all ranks: the parameter tables hold all parameters, wherever they are."""
    return any(row.dtype in (torch.float64, torch.complex128) for model in runtime.models for row in model.table.rows())


def parts_of(runtime: Runtime, tensors: Iterable[torch.Tensor]) -> list[_CountedGradient]:
    """The gradients, here, of parameters of wrapped models, of their shards or masters, and of foreign ones; local.

    Where an optimizer updates masters or shards it is their gradients, without the scale of the loss.
    """
    optimizers = [optimizer for optimizer in runtime.live_optimizers() if not optimizer.targets.are_trivial]
    for optimizer in optimizers:
        optimizer.collect_gradients()
    for model in runtime.models:
        if model.gradients.shards is not None:
            model.gradients.shards.collect_gradients()
    parts: list[_CountedGradient] = []
    for tensor in without_retired(tensors):
        targets = (other.targets.of_tensor(tensor) for other in optimizers)
        own_target = next((target for target in targets if target is not None), None)
        parameter: Any = own_target.parameter if own_target is not None else tensor
        owner = runtime.index.owner_of(parameter)
        holder = next((other for other in optimizers if other.targets.has(parameter)), None)
        members: Sequence[tuple[torch.Tensor, Shard | None]] = [(tensor, None)]
        if own_target is not None:
            members = [(tensor, own_target.shard)]
        elif holder is not None:
            members = [(target.tensor, target.shard) for target in holder.targets.of_parameter(parameter)]
        elif owner is not None and owner.gradients.shards is not None and owner.gradients.shards.has(parameter):
            members = [(shard.tensor, shard) for shard in owner.gradients.shards.shards_of(parameter)]
        row = owner.table.row_of(parameter) if owner is not None else None
        scale = 1.0 if owner is None or own_target is not None or holder is not None else owner.loss_scale
        parts.extend(
            _part(runtime, member.grad, row, shard, scale) for member, shard in members if member.grad is not None
        )
    return parts


def _part(
    runtime: Runtime, gradient: torch.Tensor, row: ParameterRow | None, shard: Shard | None, scale: float
) -> _CountedGradient:
    groups = runtime.session.groups
    is_first_copy = groups.rdp.rank_in_group == 0
    if row is None:  # of no model of ours: equal on all ranks, as far as we can know
        is_first = groups.mp.rank_in_group == 0
        return _CountedGradient(gradient, is_first, is_first and is_first_copy, scale)
    is_home = row.home is None or row.home == runtime.engine.stage
    if shard is not None:
        return _CountedGradient(gradient, is_home and shard.is_counted, is_home and shard.is_counted, scale)
    is_counted = is_home and (row.split is not None or groups.tp.rank_in_group == 0)
    return _CountedGradient(gradient, is_counted, is_counted and is_first_copy, scale)


@torch.no_grad()
def clip_parts(parts: Sequence[_CountedGradient], max_norm: float, norm: torch.Tensor) -> None:
    """Multiply the gradients that are here by max_norm / (norm + 1e-6) if that is below 1."""
    coefficient = torch.clamp(float(max_norm) / (norm.double() + 1e-6), max=1.0)
    if bool(coefficient == 1.0):
        return  # nothing was clipped: a backward may still add to the gradients that masters were made from
    for (device, dtype), members in by_kind(local_part(part.gradient) for part in parts).items():
        factor = coefficient.to(device, dtype if dtype == torch.float64 else torch.float32)
        foreach_mul_(members, factor)


def check_finite(norm: torch.Tensor) -> None:
    """Raise NonFiniteGradientError for a norm that is infinite or not a number."""
    if not bool(torch.isfinite(norm)):
        raise NonFiniteGradientError(
            f"the norm of the gradient over all ranks is {float(norm)}, so it cannot be clipped: look for an overflow "
            "(fp16: a smaller loss scale) or a division by zero in the model; error_if_nonfinite=False clips all the "
            "same"
        )


def _parameters_of_gradients(runtime: Runtime, gradients: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The parameters whose gradients, or other tensors on the memory of these, are given; what was given if none is
    ours.

    Raises SMPConfigError for weights, and for gradients of which only some are ours: nobody could add them up rightly.
    """
    tensors: list[torch.Tensor] = [tensor for model in runtime.models for _, tensor in model.table.parameters()]
    tensors += [tensor for one in runtime.live_optimizers() for group in one.param_groups for tensor in group["params"]]
    known = {_memory_of(tensor.grad): tensor for tensor in reversed(tensors) if tensor.grad is not None}
    parameters = [known.get(_memory_of(gradient)) for gradient in gradients]
    are_weights = [_is_weight(runtime, gradient) for gradient in gradients]
    if all(parameter is None for parameter in parameters) and not any(are_weights):
        return gradients
    if any(parameter is None for parameter in parameters):
        if runtime.session.groups.mp.size == 1:
            return gradients  # of whole weights
        raise SMPConfigError(
            "torch.nn.utils.get_total_norm: the tensors are not all gradients of wrapped models, and each rank has a "
            "part of the model, so that their norm would be that of a part: pass the gradients as they are "
            "(p.grad for p in model.parameters()), or use smp.clip_grad_norm_(model, float('inf'))"
        )
    return [parameter for parameter in parameters if parameter is not None]


def _is_weight(runtime: Runtime, tensor: torch.Tensor) -> bool:
    row = runtime.index.row_of(tensor)
    return row is not None and not row.is_buffer


def _memory_of(tensor: torch.Tensor) -> object:
    local = local_part(tensor)
    has_memory = local.layout == torch.strided and local.numel() > 0
    return (local.data_ptr(), local.numel()) if has_memory else id(tensor)


def intercept_clipping(runtime: Runtime) -> None:
    """Let ``torch.nn.utils.clip_grad_norm_`` give this norm from now on, and ``clip_grad_value_`` reach masters and
    shards, until the session ends.

    Nothing changes for parameters of models that are not wrapped, and for jobs in which every rank holds all.
    """

    def can_matter() -> bool:
        has_masters = any(not optimizer.targets.are_trivial for optimizer in runtime.live_optimizers())
        return has_masters or runtime.decisions.is_divided

    def are_ours(parameters: Sequence[torch.Tensor]) -> bool:
        parameters = without_retired(parameters)
        if not can_matter():
            return False
        if not parameters:  # a stage without any of them takes part in the sum
            return any(model.partitioned for model in runtime.models)
        targets = [optimizer.targets for optimizer in runtime.live_optimizers()]
        return any(
            _is_weight(runtime, tensor) or any(each.of_tensor(tensor) is not None for each in targets)
            for tensor in parameters
        )

    def norm_of(
        tensors: Sequence[torch.Tensor], are_parameters: bool, norm_type: float, error_if_nonfinite: bool
    ) -> torch.Tensor | None:
        parameters = tensors if are_parameters or not can_matter() else _parameters_of_gradients(runtime, tensors)
        if not are_ours(parameters):
            return None
        norm = total_norm(runtime, parts_of(runtime, parameters), norm_type)
        if error_if_nonfinite:
            check_finite(norm)
        return norm

    def clip(parameters: Sequence[torch.Tensor], max_norm: float, norm: torch.Tensor) -> bool:
        if not are_ours(parameters):
            return False
        clip_parts(parts_of(runtime, parameters), max_norm, norm)
        return True

    def clip_value(parameters: Sequence[torch.Tensor], value: float) -> bool:
        if not are_ours(parameters):
            return False
        with torch.no_grad():
            for part in parts_of(runtime, parameters):
                local_part(part.gradient).clamp_(-value, value)
        return True

    runtime.session.closers.append(intercept_clip_grad_norm(norm_of, clip))
    runtime.session.closers.append(intercept_clip_grad_value(clip_value))
