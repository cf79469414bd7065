"""How much memory training a model takes: the formula, without torch and without processes.

[Note: bytes per parameter] With fp32 and Adam a parameter takes 4 bytes, its gradient 4, and its two moments 8: 16
bytes. In half precision it takes 2, its gradient 2, the fp32 master 4 and the moments 8: 16 bytes again; 18 where
gradients are accumulated in fp32, and 20 where an fp32 copy of the gradient is made beside that of the model for the
optimizer's step. Buckets of the reduction come on top; what is shared out among ranks is divided by their number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

EXACT_BYTES = 4


@dataclass(frozen=True)
class ParameterGroup:
    """Elements of parameters on one rank that are kept alike.

    Attributes:
        num_elements: of the whole parameters that the rank holds (its stage, its tensor-parallel slices).
        element_bytes: of the parameter's dtype.
        is_trained: whether they have gradients and optimizer state.
        gradient_bytes: of an element of the gradient; None: as the parameter.
    """

    num_elements: int
    element_bytes: int = EXACT_BYTES
    is_trained: bool = True
    gradient_bytes: int | None = None


@dataclass(frozen=True)
class MemorySettings:
    """How the state of training is kept.

    Attributes:
        optimizer_tensors: state tensors of the optimizer for a parameter: 2 for Adam, LAMB; 1 for momentum, NovoGrad.
        has_masters: the optimizer updates fp32 copies of parameters of less than 4 bytes.
        has_master_gradients: beside them, fp32 copies of the gradients are made for the update.
        parameter_shards, gradient_shards, optimizer_shards: among how many ranks each is shared out: all three in
            sharded data parallelism, the last one alone with ``shard_optimizer_state``.
    """

    optimizer_tensors: int = 2
    has_masters: bool = False
    has_master_gradients: bool = False
    parameter_shards: int = 1
    gradient_shards: int = 1
    optimizer_shards: int = 1


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank, by what they are for."""

    parameters: int
    gradients: int
    optimizer_state: int
    masters: int = 0
    buffers: int = 0
    buckets: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """All of it: the predicted peak."""
        return sum(count for _, count in self.items())

    def items(self) -> Iterator[tuple[str, int]]:
        """(category, bytes), in order."""
        yield "parameters", self.parameters
        yield "gradients", self.gradients
        yield "optimizer state", self.optimizer_state
        yield "masters", self.masters
        yield "buffers", self.buffers
        yield "reducer buckets", self.buckets
        yield "activations", self.activations


def estimate_memory(
    groups: list[ParameterGroup],
    settings: MemorySettings,
    *,
    buffer_bytes: int = 0,
    bucket_bytes: int = 0,
    activation_bytes: int = 0,
) -> MemoryEstimate:
    """The bytes of a rank by category, from what it holds of the model.

    ``bucket_bytes``: of the reduction of gradients, 0 where no gradient is reduced or gradients are views of buckets.
    ``activation_bytes``: of all microbatches in flight together. Optimizer state of parameters in half precision is
    counted in fp32, in which our optimizers and masters keep it.
    """
    parameters = gradients = state = masters = 0
    for group in groups:
        count = group.num_elements
        parameters += _share(count, settings.parameter_shards) * group.element_bytes
        if not group.is_trained:
            continue
        gradient_bytes = group.element_bytes if group.gradient_bytes is None else group.gradient_bytes
        gradients += _share(count, settings.gradient_shards) * gradient_bytes
        updated = _share(count, settings.optimizer_shards)
        state += updated * settings.optimizer_tensors * max(group.element_bytes, EXACT_BYTES)
        if settings.has_masters and group.element_bytes < EXACT_BYTES:
            masters += updated * EXACT_BYTES * (2 if settings.has_master_gradients else 1)
    return MemoryEstimate(parameters, gradients, state, masters, buffer_bytes, bucket_bytes, activation_bytes)


def _share(count: int, num_shards: int) -> int:
    return -(-count // num_shards)
