"""What the ranks of a group share out of a parameter: the pieces that an optimizer updates in its place.

[Note: shards] A parameter is *whole* where every rank that holds it also updates it. It is *shared out* where each rank
of a group updates a range of its elements, and has optimizer state for these alone: by sharding of the optimizer state
(the parameter itself stays whole between updates) or by sharded data parallelism (it is whole only while it is used).
Both are told to the optimizer, to norms and to state dicts in the terms of this file. The parts that make shards are in
``data_parallel``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group


@dataclass(frozen=True, eq=False)
class Shard:
    """A range of elements of a parameter, which this rank updates.

    ``parameter`` is the one in the model. ``tensor`` is what an optimizer updates in its place, of the parameter's
    dtype: the elements ``start`` to ``stop`` of the local parameter (the tensor-parallel slice) laid out flat, of any
    shape. ``group``: the ranks that hold the other ranges. ``is_counted``: of all ranks that hold this very range, this
    is the one that adds it to a norm; each element of the model is counted once over all ranks of the world.
    """

    parameter: nn.Parameter
    tensor: nn.Parameter
    start: int
    stop: int
    group: Group
    is_counted: bool = True


class ParameterShards(Protocol):
    """The parameters of one model that are shared out."""

    def has(self, parameter: nn.Parameter) -> bool:
        """Whether the parameter is shared out; the answer is the same on all ranks that hold it. Local."""

    def shards_of(self, parameter: nn.Parameter) -> Sequence[Shard]:
        """This rank's shards of the parameter, ascending; none if it is not shared out, or this rank has no part of it.
        Local.
        """

    def require_whole_parameters(self, optimizer_name: str) -> bool:
        """The optimizer needs whole parameters: share them out as such, each to one rank, if that can be. Returns
        whether the shards were cut anew, so that earlier ones are void.

        On all ranks alike, before the first step. Raises an SMPError that names the optimizer where whole parameters
        cannot be had.
        """

    def collect_gradients(self) -> None:
        """Let ``shard.tensor.grad`` be what the last reduction left (None if there is none). Local, and cheap if it is
        already so. Called before gradients are read: by an optimizer's step, a norm, a loss scaler.
        """

    def forget_gradients(self, *, set_to_none: bool = True) -> None:
        """Forget the gradients of shards, or fill them with zeros, and forget those of the parameters that are shared
        out (``zero_grad``). Local.
        """

    def finish_update(self) -> None:
        """The tensors of the shards have new values: the ranks that use the whole parameters get them. Collective over
        the groups of the shards; not called after an update that all ranks skipped.
        """


def local_part(tensor: Any) -> torch.Tensor:
    """The part of a ``DTensor`` that is in this process; another tensor as it is."""
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local
