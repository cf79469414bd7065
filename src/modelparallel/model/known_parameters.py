"""Parameters and modules that a script replaces, ties or adds after the model was wrapped.

Homes, reduction and optimizers go by the parameters that were there. Before the partition the library looks at the
model anew. Afterwards a parameter that nobody knows would have no home, or no reduced gradient: that is an error at the
next step, which names it. Each step asks, so the usual answer must be quick: are the same objects in the same places?
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import nn

from modelparallel.parameters.table import ParameterTable


class KnownParameters:
    """What is where in a module, as of now. ``table``: which tensors are known, under which names."""

    def __init__(self, module: nn.Module, table: ParameterTable) -> None:
        self._module = module
        self._table = table
        self.note()

    def note(self) -> None:
        """Take the tensors that the module has now as known."""
        # Columns of a table: places, each the dictionary of a module and a key in it, and the tensor that was there.
        self._dictionaries: list[dict[str, Any]] = []
        self._sizes: list[int] = []
        self._parameter_places: tuple[list[dict[str, Any]], list[str]] = ([], [])
        self._child_places: tuple[list[dict[str, Any]], list[str]] = ([], [])
        self._children: list[nn.Module | None] = []
        for part in self._module.modules():
            for known, places in ((part._parameters, self._parameter_places), (part._modules, self._child_places)):
                self._dictionaries.append(known)
                self._sizes.append(len(known))
                places[0].extend([known] * len(known))
                places[1].extend(known)
            self._children += part._modules.values()
        self._names = self._names_now()

    def _names_now(self) -> list[str | None]:
        return self._table.names_of(map(dict.get, *self._parameter_places))

    def is_changed(self) -> bool:
        """Whether another parameter or module is in some place. Local, and quick: each step asks, of all places."""
        return not (
            all(map(operator.eq, map(len, self._dictionaries), self._sizes))
            and all(map(operator.is_, map(dict.get, *self._child_places), self._children))
            and self._names_now() == self._names
        )

    def unknown(self) -> list[str]:
        """The names of the parameters that were not there when the model was wrapped, or partitioned."""
        return [name for name, value in self._module.named_parameters() if self._table.name_of(value) is None]

    def changed(self) -> list[tuple[str, object]]:
        """(name of the parameter that a place had, what it has now) of the places that have changed."""
        now = zip(self._names, map(dict.get, *self._parameter_places), strict=True)
        return [(name, value) for name, value in now if name is not None and self._table.name_of(value) != name]

    def out_of_place(self, home_of: Callable[[str], int | None]) -> list[tuple[str, str]]:
        """(place, name of the parameter that it has now) where that parameter has its home on another stage."""
        misplaced = []
        for place, value in self._module.named_parameters(remove_duplicate=False):
            name = self._table.name_of(value)
            if name is not None and home_of(place) not in (None, home_of(name), *self._holders(place, name)):
                misplaced.append((place, name))
        return misplaced

    def _holders(self, place: str, name: str) -> tuple[int, ...]:
        row = self._table.row_named(name)
        return row.holders if row is not None and place in (row.name, *row.aliases) else ()
