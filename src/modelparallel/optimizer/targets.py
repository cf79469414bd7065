"""What an optimizer updates for the parameters of wrapped models: themselves, shards of them, or masters of either.

[Note: targets] An optimizer is built over the parameters of a model. Where a parameter is shared out among ranks, this
rank updates its shards of it (`parameters/shards.py`); where it is in half precision, its fp32 master. What takes its
place in the optimizer's groups is its *target*; chained: parameter -> shard -> master. A parameter for which nothing of
this holds is its own target, and then nothing here costs anything. Groups keep their dicts and lists, so schedulers go
on working.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from modelparallel.errors import SMPConfigError, StepUsageError
from modelparallel.parameters.shards import local_part
from modelparallel.precision import make_master, unscale, update_masters, write_back
from modelparallel.torch_compat.private_parts import version_of
from modelparallel.training.participants import Participant, Target

if TYPE_CHECKING:
    from modelparallel.parameters.shards import ParameterShards, Shard
    from modelparallel.plan.rows import ParameterRow
    from modelparallel.training.runtime import Runtime


class Targets:
    """The targets of one optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer, runtime: Runtime) -> None:
        self._optimizer = optimizer
        self._runtime = runtime
        self._index = runtime.index
        self._by_tensor: dict[torch.Tensor, Target] = {}
        self._by_parameter: dict[torch.Tensor, list[Target]] = {}
        # The models that parameters of this optimizer belong to; those without any here, too.
        self._models: list[Participant] = []
        # The gradients of the sources that were collected last, with their versions; held, so that another tensor
        # cannot be taken for one of them.
        self._collected: list[tuple[torch.Tensor | None, int]] | None = None
        # What was made from them, by target, with its version then.
        self._made: dict[torch.Tensor, tuple[torch.Tensor, int]] = {}

    # What there is

    @property
    def are_trivial(self) -> bool:
        """Whether every parameter is updated itself, on all ranks that hold the same parameters."""
        return not self._by_parameter

    def all(self) -> Iterator[Target]:
        """All targets that are not the parameters themselves."""
        return iter(self._by_tensor.values())

    def of_parameter(self, parameter: torch.Tensor) -> Sequence[Target]:
        """The targets of a parameter of a model, ascending."""
        targets = self._by_parameter.get(parameter)
        if targets is not None:
            return targets
        if not isinstance(parameter, nn.Parameter) or self._is_shared_out(parameter):
            return ()
        return (Target(parameter, parameter, parameter),)

    def has(self, parameter: torch.Tensor) -> bool:
        """Whether something else is updated in place of this parameter of a model."""
        return parameter in self._by_parameter

    def of_tensor(self, tensor: torch.Tensor) -> Target | None:
        """The target that stands in the groups as ``tensor``."""
        return self._by_tensor.get(tensor)

    def row_of(self, tensor: torch.Tensor) -> ParameterRow | None:
        """The row of the parameter that stands in the groups as ``tensor``; None for a foreign one."""
        target = self.of_tensor(tensor)
        return self._index.row_of(tensor if target is None else target.parameter)

    def masters(self) -> list[Target]:
        """The targets that are masters."""
        return [target for target in self._by_tensor.values() if target.has_master]

    def shards(self) -> list[ParameterShards]:
        """The shards of the models whose updates are shared out."""
        return [shards for model in self._models if (shards := model.gradients.shards) is not None]

    def models(self) -> list[Participant]:
        """The models that parameters of this optimizer belong to."""
        return self._models

    def _is_shared_out(self, parameter: nn.Parameter) -> bool:
        return any(shards.has(parameter) for shards in self.shards())

    # Making them

    def settle(self, parameters_of_all_ranks: Iterable[nn.Parameter]) -> None:
        """Put targets into the groups for the parameters of models that are in place; the others wait."""
        self._models = self._index.owners_of(parameters_of_all_ranks)
        for group in self._optimizer.param_groups:
            parameters = group["params"]
            settled: list[nn.Parameter] = []
            for parameter in parameters:
                if parameter in self._by_tensor:
                    settled.append(parameter)
                    continue
                targets = self._make(parameter)
                if targets is None:
                    settled.append(parameter)
                    continue
                self._by_parameter[parameter] = targets
                self._by_tensor.update({target.tensor: target for target in targets})
                self._optimizer.state.pop(parameter, None)
                settled.extend(target.tensor for target in targets)
            parameters[:] = settled

    def _make(self, parameter: nn.Parameter) -> list[Target] | None:
        """None: the parameter is its own target, or its model is not in place yet."""
        owner = self._index.owner_of(parameter)
        if owner is None or not owner.partitioned:
            return None
        shards = owner.gradients.shards
        sources: list[tuple[nn.Parameter, Shard | None]] = [(parameter, None)]
        if shards is not None and shards.has(parameter):
            if not updates_each_element_alone(self._optimizer) and shards.require_whole_parameters(
                type(self._optimizer).__name__
            ):
                for other in self._runtime.live_optimizers():
                    if other.targets is not self and not other.targets.are_trivial:
                        other.renew_targets()
            sources = [(shard.tensor, shard) for shard in shards.shards_of(parameter)]
        half, has_loss_scale = self._runtime.decisions.half, self._runtime.decisions.has_loss_scale
        targets = []
        for source, shard in sources:
            if half is not None and source.dtype == half:
                targets.append(Target(parameter, source, make_master(source), shard))
            elif has_loss_scale:
                twin = nn.Parameter(source.detach(), requires_grad=source.requires_grad)
                targets.append(Target(parameter, source, twin, shard, is_twin=True))
            else:
                targets.append(Target(parameter, source, source, shard))
        if all(target.tensor is parameter for target in targets) and targets:
            return None
        for target in targets:
            target.version = version_of(parameter)
        return targets

    def clear(self) -> None:
        """Forget all targets; the groups still hold them."""
        self._by_tensor.clear()
        self._by_parameter.clear()
        self._collected, self._made = None, {}

    # An update

    def collect_gradients(self, scale: float, *, is_checked: bool) -> torch.Tensor | None:
        """Make ``tensor.grad`` of all targets the reduced gradients of the model, in the target's precision, divided by
        ``scale``; cheap if it is so already.

        ``is_checked``: look whether they are finite; returns 1.0 if one is not, else 0.0. None: nothing was done.
        """
        for shards in self.shards():
            shards.collect_gradients()
        members = self._members()
        if self._collected is not None and _are_same(self._collected, _gradients_of(members)):
            return None
        self._check_edits(members)
        for target in members:
            if target.has_own_gradient:
                gradient = target.source.grad
                master = None if gradient is None else local_part(gradient.to(target.tensor.dtype, copy=True))
                target.tensor.grad = master
        overflow = torch.zeros((), dtype=torch.float32, device=self._runtime.session.device)
        if is_checked:
            gradients = [local_part(target.tensor.grad) for target in members if target.tensor.grad is not None]
            unscale(gradients, scale, overflow)
        self._collected = _gradients_of(members)
        self._made = {target.tensor: (own, version_of(own)) for target in members
                      if target.has_own_gradient and (own := local_part(target.tensor.grad)) is not None}  # fmt: skip
        return overflow

    def _check_edits(self, members: Sequence[Target]) -> None:
        """The gradients of the model have changed. Those made from them are made anew, unless they were changed, too:
        clipped, say, which would be lost.
        """
        if self._collected is None:
            return
        for target in members:
            made = self._made.get(target.tensor)
            own = local_part(target.tensor.grad)
            if made is None or target.source.grad is None or own is None:
                continue
            if own is not made[0] or version_of(own) != made[1]:
                name = self._index.names_of([target.parameter])[0]
                raise StepUsageError(
                    f"gradients were changed at the parameters of the model ('{name}' is one of them) after those of "
                    "the optimizer had been made from them and clipped or changed, too: with fp16 and bf16 these are "
                    "two tensors, and one of the changes would be lost: change p.grad first, then clip; call "
                    "zero_grad() or step() before the next backward"
                )

    def _members(self) -> list[Target]:
        """The targets of all tensors in the groups as they are now."""
        return [
            self._by_tensor.get(tensor) or Target(tensor, tensor, tensor)
            for group in self._optimizer.param_groups
            for tensor in group["params"]
        ]

    def refresh_masters(self) -> None:
        """Before an update: take over what was written to the parameters of the model since (a checkpoint)."""
        stale = [target for target in self.masters() if version_of(target.parameter) != target.version]
        self._take_over(stale)

    def reload_masters(self) -> None:
        """Take over the values of the model, whoever wrote them."""
        self._take_over(self.masters())

    def _take_over(self, targets: Sequence[Target]) -> None:
        update_masters([target.source for target in targets], [target.tensor for target in targets])
        for target in targets:
            target.version = version_of(target.parameter)

    def finish_update(self) -> None:
        """The targets have new values: the model gets them. Collective over the groups of the shards."""
        masters = self.masters()
        write_back([target.source for target in masters], [target.tensor for target in masters])
        self._forget_own_gradients()
        for shards in self.shards():
            shards.finish_update()
        for target in masters:
            target.version = version_of(target.parameter)
        self._collected, self._made = None, {}

    def skip_update(self) -> None:
        """The gradients were no good: forget the ones that were made for the update."""
        self._forget_own_gradients()
        self._collected, self._made = None, {}

    def _forget_own_gradients(self) -> None:
        for target in self.all():
            if target.has_own_gradient:
                target.tensor.grad = None

    def forget_gradients(self, *, set_to_none: bool) -> None:
        """``zero_grad`` of what the targets stand for."""
        for target in self.masters():
            gradient = target.source.grad
            if gradient is not None and not set_to_none:
                gradient.zero_()
            else:
                target.source.grad = None
        for shards in self.shards():
            shards.forget_gradients(set_to_none=set_to_none)
        self._collected, self._made = None, {}


def updates_each_element_alone(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the update of an element depends on that element's gradient and state only, so that a parameter can be
    cut anywhere.

    Said by the class (``is_elementwise``), known of torch's own; others may take norms of whole parameters.
    """
    said = getattr(optimizer, "is_elementwise", None)
    if said is not None:
        return bool(said)
    kind = type(optimizer)
    return kind.__module__.startswith("torch.optim") and kind.__name__ not in ("Adafactor", "Muon", "LBFGS")


def check_may_be_divided(optimizer: torch.optim.Optimizer, runtime: Runtime) -> None:
    """Raise SMPConfigError for LBFGS where a rank has a part of the model, or masters take the parameters' place, and
    for SparseAdam where gradients are reduced.
    """
    decisions = runtime.decisions
    if isinstance(optimizer, torch.optim.SparseAdam) and runtime.session.groups.dp.size > 1:
        raise SMPConfigError(
            "SparseAdam takes sparse gradients, but gradients become dense when they are reduced over the "
            "data-parallel ranks (the rows that a batch has used are not known then): use Adam and "
            "sparse=False, or one data-parallel rank"
        )
    if not isinstance(optimizer, torch.optim.LBFGS):
        return
    if decisions.is_divided:
        raise SMPConfigError(
            "LBFGS looks at all parameters together, so that no rank may hold only a part of them: use another "
            "optimizer, or leave out pipeline_parallel_degree, tensor_parallel_degree, shard_optimizer_state and "
            "sharded_data_parallel_degree"
        )
    if decisions.half is not None:
        raise SMPConfigError(
            "LBFGS evaluates its closure within an update, where with fp16 and bf16 the fp32 masters are not in the "
            "model yet: leave out fp16 and bf16, or use another optimizer"
        )


def _gradients_of(members: Sequence[Target]) -> list[tuple[torch.Tensor | None, int]]:
    gradients = (target.source.grad for target in members)
    return [(gradient, -1 if gradient is None else version_of(gradient)) for gradient in gradients]


def _are_same(
    before: Sequence[tuple[torch.Tensor | None, int]], now: Sequence[tuple[torch.Tensor | None, int]]
) -> bool:
    return len(before) == len(now) and all(
        old is new and old_version == new_version
        for (old, old_version), (new, new_version) in zip(before, now, strict=True)
    )
