"""``model.module.module.module``: scripts for the original reach for the user's module at depths 1, 2 and 3.

``DistributedModel.module`` is the user's module itself. It gets a plain attribute ``module``, a view that behaves like
it, whose ``module`` is a last view without one: so every depth resolves, and code that follows ``.module`` until there
is none (Hugging Face's ``unwrap_model``) ends. Source: smp-api section 18, clients 1.0.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_OWN = ("_viewed", "_depth")


class ModuleView:
    """Looks like the module that it views, for ``isinstance`` too."""

    def __init__(self, viewed: nn.Module, depth: int) -> None:
        object.__setattr__(self, "_viewed", viewed)
        object.__setattr__(self, "_depth", depth)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(object.__getattribute__(self, "_viewed"))

    def __getattr__(self, name: str) -> Any:
        viewed = object.__getattribute__(self, "_viewed")
        if name == "module":
            depth = object.__getattribute__(self, "_depth")
            if depth == 0:
                raise AttributeError(f"'{type(viewed).__name__}' object has no attribute 'module'")
            return ModuleView(viewed, depth - 1)
        return getattr(viewed, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(object.__getattribute__(self, "_viewed"), name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return object.__getattribute__(self, "_viewed")(*args, **kwargs)

    def __reduce__(self) -> Any:
        return ModuleView, (object.__getattribute__(self, "_viewed"), object.__getattribute__(self, "_depth"))

    def __repr__(self) -> str:
        return repr(object.__getattribute__(self, "_viewed"))


def viewed_module(module: Any) -> Any:
    """What ``module`` is a view of; a module itself."""
    return object.__getattribute__(module, "_viewed") if type(module) is ModuleView else module


def attach_module_attribute(module: nn.Module) -> None:
    """Let ``module.module`` and ``module.module.module`` lead to ``module``, unless it has one of that name."""
    if not hasattr(module, "module"):
        module.__dict__["module"] = ModuleView(module, 1)


def alias_inherited_forwards(module: nn.Module) -> None:
    """Let ``super()._orig_forward(...)`` mean ``super().forward(...)`` in the classes of ``module`` that write it.

    Scripts for the original had to, since ``super().forward`` recursed there; here both work (smp-api section 15). Only
    base classes of a class whose ``forward`` names it are touched.
    """
    for kind in {type(part) for part in module.modules()}:
        for index, derived in enumerate(kind.__mro__):
            code = getattr(derived.__dict__.get("forward"), "__code__", None)
            if code is None or "_orig_forward" not in code.co_names:
                continue
            for base in kind.__mro__[index + 1 :]:
                if base is not nn.Module and "forward" in base.__dict__ and "_orig_forward" not in base.__dict__:
                    base._orig_forward = base.__dict__["forward"]  # type: ignore[attr-defined]
