"""``import smdistributed.modelparallel.torch as smp`` gives the module ``modelparallel`` itself.

An alias has to give the *same* module objects, never a second copy: a class that exists twice breaks every
``isinstance``, and a second session would be a second truth. Replacing this package in ``sys.modules`` settles the
package, but Python would then find ``smdistributed.modelparallel.torch.nn`` through the package's path and execute its
file again under the other name. So a finder stands in front of the path search and answers each name below this package
with the module that ``modelparallel`` has.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

import modelparallel

PREFIX = __name__ + "."


class _AliasLoader(importlib.abc.Loader):
    """Hands out the module of ``modelparallel`` and leaves it as it was."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._own_spec: importlib.machinery.ModuleSpec | None = None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._target)
        self._own_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has just stamped the alias's spec on the module; reload and pickling need the real one.
        module.__spec__ = self._own_spec


class _AliasFinder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(PREFIX):
            return None
        name = fullname[len(PREFIX) :]
        real = f"modelparallel.{name}"
        if importlib.util.find_spec(real) is None:
            return None
        return importlib.machinery.ModuleSpec(fullname, _AliasLoader(real), is_package=False)


if not any(isinstance(finder, _AliasFinder) for finder in sys.meta_path):
    sys.meta_path.insert(0, _AliasFinder())
sys.modules[__name__] = modelparallel
