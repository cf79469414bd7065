"""Whose parameter it is, over all wrapped models of a process, and the one way to put another in its place.

[Note: identity] Tensors are told apart as objects, so maps go by ``id``. Such a key is only as good as its tensor is
alive: the next tensor may get the same. So the tables alone keep ids, of tensors that they hold; what has become of a
parameter that was replaced is said by the old object itself (retired.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import nn

from modelparallel.parameters.retired import retire
from modelparallel.parameters.table import ParameterTable
from modelparallel.plan.rows import ParameterRow


class TableOwner(Protocol):
    """A wrapped model."""

    @property
    def table(self) -> ParameterTable:
        """Its parameters and buffers."""


Owner = TypeVar("Owner", bound=TableOwner)


class ParameterIndex(Generic[Owner]):
    """The parameters and buffers of ``owners``, in the order of wrapping; models that are wrapped later come into the
    same list. ``follow``: is told (old parameter, those that stand for it) of each that is replaced.
    """

    def __init__(self, owners: Sequence[Owner], follow: Callable[[nn.Parameter, Sequence[nn.Parameter]], None]) -> None:
        self._owners = owners
        self._follow = follow

    def owner_of(self, tensor: torch.Tensor) -> Owner | None:
        """The model that a parameter or buffer belongs to, the first of several; None for a foreign tensor."""
        return next((owner for owner in self._owners if owner.table.row_of(tensor) is not None), None)

    def owners_of(self, tensors: Iterable[torch.Tensor]) -> list[Owner]:
        """The models that at least one of the tensors belongs to."""
        known = list(tensors)
        return [owner for owner in self._owners if any(owner.table.row_of(tensor) is not None for tensor in known)]

    def row_of(self, tensor: torch.Tensor) -> ParameterRow | None:
        """The row of a parameter or buffer; None for a foreign tensor."""
        owner = self.owner_of(tensor)
        return None if owner is None else owner.table.row_of(tensor)

    def names_of(self, tensors: Iterable[torch.Tensor]) -> list[str]:
        """The names in their models; "" for foreign tensors."""
        rows = map(self.row_of, tensors)
        return [row.name if row is not None else "" for row in rows]

    def is_local(self, tensor: torch.Tensor, stage: int) -> bool:
        """Whether ``stage`` holds the tensor; True before the partition, and of foreign tensors."""
        rows = ((owner.table, owner.table.row_of(tensor)) for owner in self._owners)
        return all(row is None or table.is_local(row, stage) for table, row in rows)

    def replace(self, old: nn.Parameter, new: nn.Parameter, *faces: nn.Parameter) -> None:
        """``new`` takes the place of ``old`` everywhere but in optimizers, which look when they settle. ``faces``:
        parameters that take its place in the module at times.
        """
        name = self.names_of([old])[0]
        for owner in self._owners:
            known = owner.table.name_of(old)
            if known is not None:
                owner.table.replace_tensor(known, new, faces)
        self._follow(old, (new, *faces))
        retire(old, name, new)
