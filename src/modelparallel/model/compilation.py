"""``torch.compile`` of the modules that a stage runs: one compiled code for all modules of one structure.

[Note: shared code] torch keeps what it has compiled with the *code object* of a function, and looks for an entry whose
guards fit before it compiles again. Parameters are inputs of the compiled code, so the blocks of a model, equal but for
their weights, can share one entry. The function that is compiled is therefore the call of a module, as a function of
the module and its arguments; modules of one structure (the same classes, with parameters of the same shapes, at the
same places) have one such function, and other structures another one, so that they do not use up each other's limit of
recompilations. The module object stays what it was: its class, its names, its hooks, its state dict.

[Note: hooks] A module with hooks in it runs uncompiled, as long as they are registered. Torch would compile forward
hooks, but sets no guards on them, so that code from before would leave a new hook out; what most of them do (appending
to a list) needs new code at every call; and hooks on the backward it cannot compile.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from modelparallel.errors import SMPConfigError, UnsupportedError
from modelparallel.torch_compat import (
    compile_errors,
    default_recompile_limit,
    fresh_module_call,
    has_own_compiled_call,
    hook_registries,
    install_call,
    take_off_compiled_call,
)

logger = logging.getLogger("modelparallel.compilation")

_LIMIT = "recompile_limit"


def checked_options(value: object) -> dict[str, Any] | None:
    """The argument ``compile`` of ``smp.DistributedModel`` as options of ``torch.compile``; None: nothing is compiled.

    Raises SMPConfigError for what torch.compile does not take, before anything is compiled. Local.
    """
    if value is None or value is False:
        return None
    if value is True:
        options: dict[str, Any] = {}
    elif isinstance(value, Mapping):
        options = dict(value)
    else:
        raise SMPConfigError(
            f"compile: expected True, False or a dict of options of torch.compile, got {value!r}: "
            'for example compile={"backend": "inductor", "dynamic": False}'
        )
    for name, kinds in (("fullgraph", bool), ("disable", bool), ("dynamic", bool), ("options", Mapping), ("mode", str)):
        given = options.get(name)
        may_be_none = name in ("dynamic", "options", "mode")
        if name in options and not isinstance(given, kinds) and not (may_be_none and given is None):
            raise SMPConfigError(f"compile: option {name!r} must be a {kinds.__name__}, got {given!r}")
    try:
        _compiled(fresh_module_call("unused"), options)  # looks the backend up, checks mode and options
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SMPConfigError(f"compile: torch.compile does not take {options!r}: {reason[:300]}") from error
    return None if options.get("disable") else options


def _compiled(function: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    given = dict(options)
    if given.get("options") is not None:
        given["options"] = dict(given["options"])  # torch.compile takes some entries out
    return torch.compile(function, **given)


class ModuleCompiler:
    """Compiles modules in place, lazily, at their first calls; one for each ``smp.DistributedModel``."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options
        self._codes: dict[object, _SharedCode] = {}
        self._errors = compile_errors()
        #: Names of the modules whose calls are compiled, and of those that are not, with the reason.
        self.compiled: list[str] = []
        self.left: dict[str, str] = {}

    def install(self, module: nn.Module, name: str) -> bool:
        """Let calls of ``module`` run compiled code; whether that is possible. Local, nothing is compiled yet."""
        reason = _reason_against(module)
        if reason is not None:
            self.left[name] = reason
            logger.info("module '%s' (%s) is not compiled: %s", name, type(module).__name__, reason)
            return False
        self.compiled.append(name)
        code = self._codes.setdefault(_structure(module), _SharedCode(type(module).__name__, self._options))
        code.num_modules += 1
        hooks = hook_registries(module)
        has_said = False

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal has_said
            if any(hooks):
                if not has_said:
                    has_said = True
                    logger.info("module '%s' runs uncompiled while it has hooks", name)
                return inner(*args, **kwargs)
            try:
                return code.function(module, *args, **kwargs)
            except self._errors as error:
                raise UnsupportedError(
                    f"module '{name}' ({type(module).__name__}) could not be compiled with {dict(self._options)!r}: "
                    f"{type(error).__name__}: {_first_lines(error)}\n"
                    "Wrap the model with compile=False, or with other options; "
                    "torch.compiler.disable keeps a function or a module's forward out of what is compiled"
                ) from error

        inner = install_call(module, call)
        return True

    def log(self, schedule: str) -> None:
        """Say what is compiled; ``schedule``: the kind of schedule of the pipeline."""
        compiled, left, structures = len(self.compiled), len(self.left), len(self._codes)
        logger.info("%d modules are compiled, of %d structures; %d are not", compiled, structures, left)
        if schedule == "zero_bubble" and compiled:
            logger.info(
                "pipeline=zero_bubble cannot take the backward of compiled code apart (unless the backend leaves it to "
                "autograd, as eager does): prefer pipeline=interleaved, which holds fewer microbatches"
            )


class _SharedCode:
    """The compiled function of one structure."""

    def __init__(self, title: str, options: Mapping[str, Any]) -> None:
        self.num_modules = 0
        self._title = title
        self._options = options

    @functools.cached_property
    def function(self) -> Callable[..., Any]:
        """The compiled function of (module, arguments); made at the first call, when it is known how many modules share
        it.
        """
        options = dict(self._options)
        limit = default_recompile_limit()
        if limit is not None and options.get(_LIMIT) is None:
            # A number that each block has its own of (layer_idx) and uses makes an entry for each block.
            options[_LIMIT] = limit * self.num_modules
        return _compiled(fresh_module_call(self._title), options)


def _reason_against(module: nn.Module) -> str | None:
    if has_own_compiled_call(module):
        return "it was compiled before the model was wrapped, and stays as it is"
    if any(isinstance(inner, torch.jit.ScriptModule) for inner in module.modules()):
        return "it holds a ScriptModule"
    # The distributed layers say so by the method that declares their slices.
    if any(callable(getattr(inner, "split_tensors", None)) for inner in module.modules()):
        return "it holds a layer that talks to other ranks (tensor parallelism)"
    return None


def _structure(module: nn.Module) -> object:
    """Equal for modules that one compiled code may serve."""
    return tuple(
        (
            name,
            type(inner),
            tuple(
                (key, None if tensor is None else (tensor.shape, tensor.dtype))
                for tensors in (inner._parameters, inner._buffers)
                for key, tensor in tensors.items()
            ),
        )
        for name, inner in module.named_modules(remove_duplicate=False)
    )


def _first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:500]


def take_off_compiled_calls(root: nn.Module, units: tuple[str, ...]) -> None:
    """Let modules above the units, if the user has compiled them, run as they are.

    What was compiled over several units would go past what the engine does between them.
    """
    inside = {id(inner) for unit in units for inner in root.get_submodule(unit).modules()}
    for name, module in root.named_modules():
        if id(module) not in inside and take_off_compiled_call(module):
            logger.warning(
                "module '%s' (%s) was compiled as a whole by its compile() method, which is undone: calls of the "
                "modules in it are placed one by one. Compile these instead: smp.DistributedModel(model, compile=True)",
                name,
                type(module).__name__,
            )
