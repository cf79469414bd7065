"""The parameter table: the only truth about who owns which parameter and buffer of a distributed model.

Built when the model is wrapped, completed with the homes when it is partitioned. Optimizer, reducer, state dicts and
reports read it and nothing else. Names are those of the user's module, before and after wrapping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import nn

from modelparallel.plan.rows import ParameterRow, SplitSpec

#: In a state dict: whether it holds a part of the model only.
PARTIAL_KEY = "_smp_is_partial"


class ParameterTable:
    """Rows by name, and the live tensors behind them."""

    def __init__(self, module: nn.Module) -> None:
        self.rebuild(module)

    def rebuild(self, module: nn.Module) -> None:
        """Begin anew with what the module has now; before the partition."""
        splits, scaled = _declared_by_layers(module)
        self._rows: dict[str, ParameterRow] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        self._names: dict[int, str] = {}  # by id, of tensors that are held here
        self._faces: list[torch.Tensor] = []  # further tensors that stand for one of the table
        aliases: dict[int, list[str]] = {}
        persistent = set(module.state_dict(keep_vars=True))
        for is_buffer, source in ((False, module.named_parameters), (True, module.named_buffers)):
            for name, tensor in source(remove_duplicate=False):
                if id(tensor) in self._names:
                    aliases.setdefault(id(tensor), []).append(name)
                    continue
                self._names[id(tensor)] = name
                self._tensors[name] = tensor
                split = splits.get(name)
                self._rows[name] = ParameterRow(
                    name, (), is_buffer, name in persistent, tensor.dtype,
                    split.full_shape if split is not None else tuple(tensor.shape), split, name in scaled,
                )  # fmt: skip
        for identity, names in aliases.items():
            first = self._names[identity]
            self._rows[first] = replace(self._rows[first], aliases=tuple(names))

    def rows(self) -> Iterator[ParameterRow]:
        """All rows: parameters first, each in the order of the module."""
        yield from self._rows.values()

    def parameters(self) -> Iterator[tuple[ParameterRow, nn.Parameter]]:
        """(row, live parameter) of every parameter, also of those that live on other stages."""
        for name, row in self._rows.items():
            tensor = self._tensors[name]
            if isinstance(tensor, nn.Parameter):
                yield row, tensor

    def buffers(self) -> Iterator[tuple[ParameterRow, torch.Tensor]]:
        """(row, live buffer) of every buffer."""
        for name, row in self._rows.items():
            if row.is_buffer:
                yield row, self._tensors[name]

    def tensor(self, name: str) -> torch.Tensor:
        """The live tensor of a row."""
        return self._tensors[name]

    def row_of(self, tensor: torch.Tensor) -> ParameterRow | None:
        """The row of a parameter or buffer, by identity; None for a foreign tensor."""
        name = self._names.get(id(tensor))
        return None if name is None else self._rows[name]

    def name_of(self, tensor: object) -> str | None:
        """The name of the row of a parameter or buffer; None for anything else."""
        return self._names.get(id(tensor))

    def names_of(self, tensors: Iterable[object]) -> list[str | None]:
        """The same for each of ``tensors``. Quick: every step asks for all."""
        return [*map(self._names.get, map(id, tensors))]

    def row_named(self, name: str) -> ParameterRow | None:
        """The row with this name or alias."""
        row = self._rows.get(name)
        if row is not None:
            return row
        return next((row for row in self._rows.values() if name in row.aliases), None)

    def replace_tensor(self, name: str, tensor: torch.Tensor, faces: Iterable[torch.Tensor] = ()) -> None:
        """Another tensor stands for the row ``name`` from now on; the old one is forgotten.

        ``faces``: tensors that take its place in the module at times (while it is gathered); their row is this one.
        """
        self._names.pop(id(self._tensors[name]), None)
        self._tensors[name] = tensor
        for known in (tensor, *faces):
            self._names[id(known)] = name
        self._faces.extend(faces)

    def set_homes(
        self, home_of: Callable[[str], int | None], copies_of: Callable[[str], Iterable[int]] = lambda name: ()
    ) -> None:
        """Complete the table: ``home_of`` gives the stage of a name, None for a constant that every stage holds,
        ``copies_of`` further stages that hold a tied copy.

        A tensor of several names has its home where the first of them is, and tied copies where the others are.
        """
        for name, row in self._rows.items():
            home = home_of(name)
            others = {home_of(alias) for alias in row.aliases}
            others.update(stage for alias in (name, *row.aliases) for stage in copies_of(alias))
            others -= {home, None}
            tied_copies = tuple(sorted(stage for stage in others if stage is not None)) if home is not None else ()
            self._rows[name] = replace(row, home=home, tied_copies=tied_copies)

    def is_local(self, row: ParameterRow, stage: int) -> bool:
        """Whether ``stage`` holds the tensor."""
        return row.home is None or stage in row.holders


def waits_for_storage(tensor: torch.Tensor) -> bool:
    """Whether the initialisation of ``tensor`` is delayed: it has a shape, and no values yet."""
    # By attribute and not by class: the class is above this file.
    return getattr(type(tensor), "waits_for_storage", False)


def stand_in(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the same shape and dtype on one element of memory: what another stage holds. Reading it gives NaN, or
    zero.
    """
    value = float("nan") if tensor.is_floating_point() or tensor.is_complex() else 0
    return torch.full((1,) * tensor.ndim, value, dtype=tensor.dtype, device=device).expand(tensor.shape)


def _declared_by_layers(module: nn.Module) -> tuple[dict[str, SplitSpec], set[str]]:
    """What the distributed layers say of their tensors, under full names."""
    splits: dict[str, SplitSpec] = {}
    scaled: set[str] = set()
    for prefix, part in module.named_modules():
        # By attribute and not by class: the layers are above this file.
        if not hasattr(part, "split_tensors"):
            continue
        start = f"{prefix}." if prefix else ""
        splits.update({start + name: spec for name, spec in part.split_tensors().items()})
        scaled.update(start + name for name in part.scaled_batch_tensors())
    return splits, scaled
