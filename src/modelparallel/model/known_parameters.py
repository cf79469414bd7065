"""Parameters and modules that a script replaces, ties or adds after the model was wrapped.

Homes, reduction and optimizers go by the parameters that were there. Before the partition the library looks at the
model anew. Afterwards a parameter that nobody knows would have no home, or no reduced gradient: that is an error at the
next step, which names it. Each step asks, so the usual answer must be quick: are the same objects in the same places?
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from modelparallel.parameters.table import ParameterTable


class KnownParameters:
    """What is where in a module, as of now. ``table``: which tensors are known, under which names."""

    def __init__(self, module: nn.Module, table: ParameterTable) -> None:
        self._module = module
        self._table = table
        self._parameters: list[tuple[Mapping[str, Any], str, str | None]] = []
        self._children: list[tuple[Mapping[str, Any], str, nn.Module | None]] = []
        self._sizes: list[tuple[Mapping[str, Any], int]] = []
        self.note()

    def note(self) -> None:
        """Take what is there now as known."""
        self._parameters, self._children, self._sizes = [], [], []
        for part in self._module.modules():
            known = part._parameters
            self._parameters += [(known, key, self._table.name_of(value)) for key, value in known.items()]
            self._children += [(part._modules, key, child) for key, child in part._modules.items()]
            self._sizes += [(known, len(known)), (part._modules, len(part._modules))]

    def is_changed(self) -> bool:
        """Whether another parameter or module is in some place. Local, and quick."""
        name_of = self._table.name_of
        return (
            any(len(mapping) != size for mapping, size in self._sizes)
            or any(mapping.get(key) is not child for mapping, key, child in self._children)
            or any(name_of(mapping.get(key)) != name for mapping, key, name in self._parameters)
        )

    def unknown(self) -> list[str]:
        """The names of the parameters that were not there when the model was wrapped, or partitioned."""
        return [name for name, value in self._module.named_parameters() if self._table.name_of(value) is None]

    def changed(self) -> list[tuple[str, object]]:
        """(name of the parameter that was there, what is there now) of the places that have changed."""
        now = [(name, mapping.get(key)) for mapping, key, name in self._parameters]
        return [(name, value) for name, value in now if name is not None and self._table.name_of(value) != name]

    def out_of_place(self, home_of: Callable[[str], int | None]) -> list[tuple[str, str]]:
        """(place, name of the parameter that is there now) of those whose home is another stage than the place's."""
        found = []
        for place, value in self._module.named_parameters(remove_duplicate=False):
            name = self._table.name_of(value)
            if name is not None and home_of(place) not in (None, home_of(name), *self._holders(place, name)):
                found.append((place, name))
        return found

    def _holders(self, place: str, name: str) -> tuple[int, ...]:
        row = self._table.row_named(name)
        return row.holders if row is not None and place in (row.name, *row.aliases) else ()
