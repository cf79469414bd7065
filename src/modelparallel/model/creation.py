"""``smp.delay_param_initialization`` and ``smp.model_creation`` (smp-api section 12), and what the wrapper needs of
them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ContextDecorator, ExitStack, nullcontext
from typing import Any

import torch
from torch import nn

from modelparallel.deferred.deferred import recording, shapes_only
from modelparallel.deferred.placement import adopt_meta_tensors, has_deferred, place_deferred
from modelparallel.errors import CannotTraceError, SMPConfigError
from modelparallel.job import session
from modelparallel.partitioning import Trace
from modelparallel.tensor_parallel.contexts import tensor_parallelism

__all__ = [
    "delay_param_initialization",
    "delayed_parameter_initialization",
    "has_deferred",
    "model_creation",
    "place_deferred",
    "take_in",
    "trace_shapes",
]


class _Creation(ContextDecorator):
    """A context manager or decorator, reusable and reentrant, that opens the contexts of ``make`` anew each time."""

    def __init__(self, make: Callable[[ExitStack], None]) -> None:
        self._make = make
        self._open: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            self._make(stack)
            self._open.append(stack.pop_all())

    def __exit__(self, *exception: Any) -> None:
        self._open.pop().__exit__(*exception)


def delay_param_initialization(enabled: bool = True) -> _Creation:
    """Parameters and buffers created inside have no storage until they are placed: a context manager or decorator.
    Local.

    They are placed on the device by ``smp.DistributedModel`` without pipelining, else at the first step call, and then
    only the tensors that the process holds, one at a time. Their values are the same as without the context: the
    functions that initialise them, inside the context or later, are recorded, and replayed from the same states of the
    random generators. Operations that need values meanwhile (``item()``, printing) make them for the moment.
    ``enabled=False`` switches an outer context off. Source: smp-api section 12.
    """
    if not isinstance(enabled, bool | int):
        raise SMPConfigError(
            f"smp.delay_param_initialization: enabled must be a bool, got {type(enabled).__name__} {enabled!r:.80}"
        )
    return _Creation(lambda stack: stack.enter_context(recording(bool(enabled))))


#: The other name that the documentation of the original uses.
delayed_parameter_initialization = delay_param_initialization


def model_creation(
    tensor_parallelism: bool = False, dtype: torch.dtype | None = None, **tensor_parallel_config: Any
) -> _Creation:
    """How a model is created, in one context manager or decorator. Local.

    With ``delayed_parameter_initialization`` in the configuration, initialisation is delayed as by
    ``smp.delay_param_initialization``.

    Args:
        tensor_parallelism: as ``smp.tensor_parallelism(**tensor_parallel_config)``; False: nothing is marked, and the
            keyword arguments are ignored.
        dtype: the default dtype of floating-point tensors inside; what it was is put back afterwards. None: unchanged.

    Source: smp-api section 12.
    """
    is_split = tensor_parallelism
    if not isinstance(is_split, bool | int):
        raise SMPConfigError(
            f"smp.model_creation: tensor_parallelism must be a bool, got {type(is_split).__name__} {is_split!r:.80}"
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise SMPConfigError(
            f"smp.model_creation: dtype must be a floating-point torch.dtype such as torch.float16, or None, got "
            f"{dtype!r}"
        )

    def open_contexts(stack: ExitStack) -> None:
        if is_split:
            stack.enter_context(_tensor_parallelism(**tensor_parallel_config))
        if session.is_initialized() and session.current().config.delayed_parameter_initialization:
            stack.enter_context(recording())
        if dtype is not None:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(dtype)

    return _Creation(open_contexts)


# The argument of model_creation has the same name.
_tensor_parallelism = tensor_parallelism


def take_in(module: nn.Module) -> AbstractContextManager[None]:
    """Called by ``smp.DistributedModel`` with the module as it was given: meta tensors are taken in as deferred ones.

    Returns the context in which modules are replaced: of a model without storage, by modules without storage.
    """
    adopt_meta_tensors(module, torch.device("cpu"))
    return recording() if has_deferred(module) else nullcontext()


def trace_shapes(trace: Callable[[], Trace]) -> Trace:
    """``trace()`` on a model without storage: with shapes in place of values; it draws and writes nothing.

    Raises CannotTraceError if the body needs values, or uses operations that have no shapes without them.
    """
    try:
        with shapes_only():
            return trace()
    except Exception as error:
        raise CannotTraceError(
            "the model has no storage yet (its initialisation is delayed), and the step function cannot run on shapes "
            f"alone: {type(error).__name__}: {error}"
        ) from error
