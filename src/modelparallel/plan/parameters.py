"""What is known of each parameter and buffer of a distributed model: the rows of the parameter table."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SplitSpec:
    """How a tensor is cut over the tensor-parallel ranks: ``dim`` is the cut dimension, ``full_shape`` the shape before
    the cut.
    """

    dim: int
    full_shape: tuple[int, ...]

    def local_slice(self, tp_rank: int, tp_size: int) -> slice:
        """The index range of ``dim`` that ``tp_rank`` holds."""
        length = self.full_shape[self.dim] // tp_size
        return slice(tp_rank * length, (tp_rank + 1) * length)


@dataclass(frozen=True)
class ParameterRow:
    """One logical parameter or buffer.

    ``name`` is its name in the user's model (the key of every state dict), ``aliases`` the other names of the same
    tensor. ``home`` is the pp_rank that holds it, None as long as the model is not partitioned and for constant
    buffers, which every stage holds. ``replicas`` are the other pp_ranks that hold a copy of a shared parameter
    (``tied_weights``), with which modules of theirs compute.
    """

    name: str
    aliases: tuple[str, ...]
    is_buffer: bool
    is_persistent: bool
    dtype: torch.dtype
    full_shape: tuple[int, ...]
    split: SplitSpec | None = None
    is_scaled_batch: bool = False
    home: int | None = None
    replicas: tuple[int, ...] = ()

    @property
    def holders(self) -> tuple[int, ...]:
        """The pp_ranks that hold a parameter with a home, that one first."""
        return () if self.home is None else (self.home, *self.replicas)

    @property
    def reducer_axis(self) -> str:
        """The group over which its gradient is summed: "rdp" where the gradient already holds the whole tp group's
        batch, else "dp".
        """
        return "rdp" if self.split is not None or self.is_scaled_batch else "dp"
