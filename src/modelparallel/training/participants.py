"""What takes part in a training job, as the others see it: wrapped models, their gradients, and wrapped optimizers.

The runtime, the targets of optimizers, the states and the reports work with these protocols, so that a model need not
know the class of an optimizer, nor the other way round. ``smp.DistributedModel`` is a `Participant`,
``smp.DistributedOptimizer`` a `ParameterHolder`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from modelparallel.data_parallel.launch_order import LaunchOrder
from modelparallel.pipeline.loss_weights import LossWeights

if TYPE_CHECKING:
    import torch
    from torch import nn

    from modelparallel.data_parallel.sharding import ShardedParameters
    from modelparallel.parameters.shards import ParameterShards, Shard
    from modelparallel.parameters.table import ParameterTable
    from modelparallel.plan.partition import PartitionPlan


class JoinedUpdates(Protocol):
    """What is announced inside ``model.join()``."""

    @property
    def is_joining(self) -> bool:
        """Whether the context manager is entered, and enabled."""

    def announce_update(self, optimizer: ParameterHolder) -> None:
        """The optimizer begins an update of shards."""


class ParticipantGradients(Protocol):
    """The gradients of one wrapped model over the ranks that hold the same part of it."""

    has_begun: bool

    @property
    def shards(self) -> ParameterShards | None:
        """The parameters that are shared out among ranks; None if all are whole."""

    @property
    def sharding(self) -> ShardedParameters | None:
        """The same, if the parameters themselves are sharded."""

    @property
    def joining(self) -> JoinedUpdates:
        """What is announced inside ``model.join()``."""

    @property
    def are_views_of_buckets(self) -> bool:
        """Whether final gradients are views of the reduction buckets."""

    def flat_tensors(self) -> list[torch.Tensor]:
        """The buckets and flat buffers."""

    def set_aside(self) -> None:
        """A step with weighted losses begins: its gradients are kept apart from earlier ones."""

    def put_back(self, factor: float | None, done: set[int]) -> None:
        """That step has ended: its gradients, times ``factor``, are added to the earlier ones."""


class Participant(Protocol):
    """A wrapped model."""

    module: nn.Module
    has_own_part: bool
    early_names: set[str] | None
    training: bool

    @property
    def table(self) -> ParameterTable:
        """Names, shapes, homes and slices of all parameters and buffers."""

    @property
    def gradients(self) -> ParticipantGradients:
        """What happens to the gradients over the ranks."""

    @property
    def partitioned(self) -> bool:
        """Whether the parameters are in place."""

    @property
    def partition_plan(self) -> PartitionPlan | None:
        """The frozen plan; None before the partition and without pipelining."""

    @property
    def loss_scale(self) -> float:
        """What the loss of a backward is multiplied by."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """What this rank holds."""

    def title_of(self, name: str) -> str:
        """The name of a module or tensor among all wrapped models."""

    def optimizer_of_parameters(self) -> ParameterHolder | None:
        """The wrapped optimizer that holds parameters of this model."""

    def backward(self, tensors: torch.Tensor) -> None:
        """In place of ``tensors.backward()``."""

    def enter_step(self, step: RunningStep) -> None:
        """The model is used in this step."""

    def arm(self, launches: LaunchOrder) -> None:
        """The backward of the last microbatch begins; ``launches``: the order of the step's reducers."""

    def finish_step(self, has_backward: bool) -> bool:
        """The step function has run; returns whether gradients were reduced over the data-parallel ranks."""

    def abort_step(self, error: BaseException) -> Exception | None:
        """The step function raised; returns what the error comes of, if that is known."""


@dataclass(eq=False)
class Target:
    """``tensor`` stands for ``parameter`` in the optimizer. ``source`` holds what the model computes with: the
    parameter or its shard; ``tensor`` is that, or its master, or its *twin*: with the memory of ``source`` and a
    gradient of its own, for where that of ``source`` is kept with the scale of the loss (a later backward may add to
    it) and that of ``tensor`` without (it may be clipped).
    """

    parameter: nn.Parameter
    source: nn.Parameter
    tensor: nn.Parameter
    shard: Shard | None = None
    # Of the parameter, when source and master were last equal.
    version: int = -1

    is_twin: bool = False

    @property
    def has_master(self) -> bool:
        return self.tensor is not self.source and not self.is_twin

    @property
    def has_own_gradient(self) -> bool:
        return self.tensor is not self.source


class BackgroundSave(Protocol):
    """A checkpoint that is written in the background."""

    tag: str

    def done(self) -> bool:
        """Whether it is complete, or has failed."""

    def wait(self) -> None:
        """Wait until it is complete, on all ranks."""

    def finish(self, seconds: float) -> None:
        """The process ends: wait so long for it."""


class HeldTargets(Protocol):
    """What an optimizer updates for the parameters, as other optimizers see it."""

    @property
    def are_trivial(self) -> bool:
        """Whether every parameter is updated itself."""

    def of_tensor(self, tensor: torch.Tensor) -> Target | None:
        """The target that stands in the groups as ``tensor``."""

    def of_parameter(self, parameter: torch.Tensor) -> Sequence[Target]:
        """The targets of a parameter of a model, ascending."""

    def has(self, parameter: torch.Tensor) -> bool:
        """Whether something else is updated in place of this parameter of a model."""


class ParameterHolder(Protocol):
    """A wrapped optimizer."""

    optimizer: Any

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the inner optimizer."""

    @property
    def targets(self) -> HeldTargets:
        """What the inner optimizer updates for the parameters."""

    @property
    def loss_scale(self) -> float:
        """What the loss of a backward is multiplied by."""

    def all_groups(self) -> Sequence[Sequence[nn.Parameter]]:
        """All parameters given to the optimizer, by group, also those that live on other stages."""

    def all_parameters(self) -> Iterable[nn.Parameter]:
        """All parameters given to the optimizer, also those that live on other stages."""

    def collect_gradients(self) -> None:
        """Give masters and shards the gradients of the model, without the scale of the loss."""

    def replace_parameters(self) -> None:
        """Take the new parameters in place of the replaced ones."""

    def settle(self) -> None:
        """The parameters of a model are in place: take what this rank updates for them."""

    def renew_targets(self) -> None:
        """The shards of a model have been cut anew: take the new ones."""

    def step(self) -> Any:
        """Update the parameters that this rank holds."""


@dataclass
class RunningStep:
    """The step function call that is under way, seen from the models."""

    is_tracing: bool = False
    has_backward: bool = False
    models: list[Participant] = field(default_factory=list)
    loss_weights: LossWeights = field(default_factory=LossWeights)
    launches: LaunchOrder = field(default_factory=LaunchOrder)

    def arm(self) -> None:
        """The backward of the last microbatch begins."""
        if self.loss_weights.are_given:
            return  # gradients are reduced when the total of the weights is known
        for model in self.models:
            model.arm(self.launches)
