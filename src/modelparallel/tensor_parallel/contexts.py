"""The public functions that mark modules before the model is wrapped (smp-api sections 6 and 8)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from modelparallel.errors import PartitionError, TensorParallelError
from modelparallel.job import registry, session
from modelparallel.job.registry import Hook, Registration, StampingContext
from modelparallel.tensor_parallel.distributed_module import DistributedModule
from modelparallel.tensor_parallel.plans import user_plan

ModuleClass = TypeVar("ModuleClass", bound=type[nn.Module])


def partition(index: int) -> StampingContext:
    """Place the modules created inside on partition ``index``: a context manager or decorator. Local, but the same on
    every rank.

    The innermost context wins. Ignored with ``auto_partition=True``; modules created in no context go to
    ``default_partition``.

    Raises:
        PartitionError: ``index`` is not a partition; before ``smp.init()`` only negative ones are known to be wrong.

    Source: smp-api section 6.
    """
    if isinstance(index, bool) or not isinstance(index, int):
        raise PartitionError(f"smp.partition({index!r}): a partition is an int, got {type(index).__name__}")
    num_partitions = session.current().config.pipeline_parallel_degree if session.is_initialized() else None
    if index < 0 or (num_partitions is not None and index >= num_partitions):
        allowed = f"0 to {num_partitions - 1}" if num_partitions is not None else "0 to pipeline_parallel_degree - 1"
        degree = f" (pipeline_parallel_degree={num_partitions})" if num_partitions is not None else ""
        raise PartitionError(f"smp.partition({index}): there is no partition {index}, use {allowed}{degree}")
    return registry.partition_context(index)


def tensor_parallelism(enabled: bool = True, **kwargs: Any) -> StampingContext:
    """Mark the supported modules created inside for tensor parallelism: a context manager or decorator. Local, but the
    same on every rank.

    They keep their classes until ``smp.DistributedModel(...)`` replaces them. The innermost context wins, also with
    ``enabled=False``; of nested supported modules only the outermost is replaced. ``kwargs`` that are arguments of the
    distributed class's constructor override what the registered ``init_hook`` gives; others are ignored. Harmless at
    ``tensor_parallel_degree=1``. Source: smp-api section 8.
    """
    return registry.tensor_parallel_context(_checked_switch("smp.tensor_parallelism", enabled), kwargs)


def set_tensor_parallelism(
    module: nn.Module, enabled: bool = True, *, plan: Mapping[str, Any] | None = None, **kwargs: Any
) -> None:
    """Mark, or with ``enabled=False`` unmark, ``module`` and everything in it for tensor parallelism. Local, but the
    same calls on every rank, before ``smp.DistributedModel(...)``.

    A later call overrides earlier ones, and the contexts, for the modules that it names.

    Args:
        module: a module, or a container such as ``nn.ModuleList``.
        enabled: False unmarks.
        plan: ours, not the original's: how to split ``module``, a table from name patterns, relative to it, to styles:
            ``{"layers.*.attn.q": "colwise", "layers.*.attn.out": "rowwise"}``; see docs/plans.md. It alone decides in
            ``module``.
        kwargs: as for ``smp.tensor_parallelism``.

    Raises:
        TensorParallelError: a wrong argument; a pattern of ``plan`` that matches nothing, an unknown style, or one that
            does not fit a module.

    Source: smp-api section 8.
    """
    if not isinstance(module, nn.Module):
        raise TensorParallelError(f"smp.set_tensor_parallelism: expected an nn.Module, got {type(module).__name__}")
    if registry.is_wrapped(module):
        raise TensorParallelError(
            f"smp.set_tensor_parallelism: this {type(module).__name__} is already part of a smp.DistributedModel, "
            f"which replaces modules when "
            "it is made: call it before\n  wrong: model = smp.DistributedModel(net); "
            "smp.set_tensor_parallelism(net.fc1)\n"
            "  right: smp.set_tensor_parallelism(net.fc1); model = smp.DistributedModel(net)"
        )
    switch = _checked_switch("smp.set_tensor_parallelism", enabled)
    if plan is not None:
        if not switch:
            raise TensorParallelError("smp.set_tensor_parallelism: a plan together with enabled=False says nothing")
        user_plan(module, plan)
    registry.set_tensor_parallel_mark(module, switch, kwargs, plan)


def tp_register_with_module(
    module_cls: type[nn.Module],
    dist_module: type[DistributedModule],
    init_hook: Hook | None = None,
    forward_hook: Hook | None = None,
    return_hook: Hook | None = None,
) -> None:
    """Let ``dist_module`` take the place of marked instances of exactly ``module_cls``. Local, but the same calls on
    every rank.

    Register before the model is built: instances record their constructor arguments from then on. A later registration
    of the same class replaces the earlier.

    Args:
        module_cls: the class whose instances are replaced.
        dist_module: the class that replaces them.
        init_hook: ``init_hook(<the arguments that the instance was built with>) -> (positional, keyword)`` for
            ``dist_module(...)``; keyword arguments that it does not take are dropped with a warning. If it gives None
            instead of a pair, this instance is not supported and stays as it is.
        forward_hook: ``forward_hook(<the arguments of a call>) -> (positional, keyword)`` for the distributed
            ``forward``.
        return_hook: ``return_hook(<what it returns>)`` -> what callers of the original expect.

    A missing hook passes everything on as it is. Source: smp-api section 8.
    """
    if not (inspect.isclass(module_cls) and issubclass(module_cls, nn.Module)):
        raise TensorParallelError(
            f"smp.tp_register_with_module: module_cls must be a subclass of nn.Module, got {module_cls!r}"
        )
    _check_registration("smp.tp_register_with_module", dist_module, init_hook, forward_hook, return_hook)
    registry.register(Registration(module_cls, dist_module, init_hook, forward_hook, return_hook))


def tp_register(
    dist_module: type[DistributedModule],
    init_hook: Hook | None = None,
    forward_hook: Hook | None = None,
    return_hook: Hook | None = None,
) -> Callable[[ModuleClass], ModuleClass]:
    """Class decorator: `tp_register_with_module` for the decorated class. Local. Source: smp-api section 8."""
    _check_registration("smp.tp_register", dist_module, init_hook, forward_hook, return_hook)

    def decorate(module_cls: ModuleClass) -> ModuleClass:
        tp_register_with_module(module_cls, dist_module, init_hook, forward_hook, return_hook)
        return module_cls

    return decorate


def _checked_switch(function: str, enabled: Any) -> bool:
    # Scripts pass ints and command-line flags; a module or a text in this place is a mistake.
    if isinstance(enabled, bool) or (isinstance(enabled, int) and enabled in (0, 1)):
        return bool(enabled)
    raise TensorParallelError(f"{function}: enabled must be a bool, got {type(enabled).__name__} {enabled!r:.80}")


def _check_registration(function: str, dist_module: Any, *hooks: Any) -> None:
    if not (inspect.isclass(dist_module) and issubclass(dist_module, DistributedModule)):
        raise TensorParallelError(
            f"{function}: dist_module must be a subclass of smp.nn.DistributedModule, got {dist_module!r}"
        )
    for kind, hook in zip(("init_hook", "forward_hook", "return_hook"), hooks, strict=True):
        if hook is not None and not callable(hook):
            raise TensorParallelError(
                f"{function}: {kind} must be a function or None, got {type(hook).__name__} {hook!r:.80}"
            )
