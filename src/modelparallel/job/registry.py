"""What contexts and decorators say about modules before the model is wrapped (smp-api sections 6, 8 and 12).

This is one of the two ambient objects of the library (the other is the session). Two things are kept here:

- *Marks*. While `partition_context` or `tensor_parallel_context` is active, each module that is constructed is stamped
  with the innermost context's index or switch. A stamp lies in the instance's ``__dict__`` under a private name, as
  plain data: it survives ``deepcopy`` and pickling, and needs no table that would have to follow the module.
- *Registrations*. Which distributed class takes the place of which class, with the three hooks that translate between
  them, and the arguments with which each instance of a registered class was built, because they are replayed to the
  hook later.

``nn.Module.__init__`` is replaced only while a context is active, and put back afterwards.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import ContextDecorator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import nn

_PARTITION = "_smp_partition"
_TENSOR_PARALLEL = "_smp_tensor_parallel"
_ARGUMENTS = "_smp_constructor_arguments"
_WRAPPED = "_smp_wrapped"
_FAMILY = "_smp_family"

Hook = Callable[..., Any]


@dataclass(frozen=True)
class TensorParallelMark:
    """Whether a module was marked for tensor parallelism, and the keyword arguments that came with the mark.

    ``plan``: the table of names and styles that was given for this very module and what is in it.
    """

    enabled: bool
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class ConstructorArguments:
    """The arguments that an instance was built with, without ``self``."""

    positional: tuple[Any, ...]
    keyword: Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """What the library knows of a class of another one beyond hooks, so that its models are replaced out of the box.

    arguments_of: the arguments that an instance was built with, read off the instance: it may be older than its
        registration. Raises an error if the instance is not what its class builds.
    answer_of: ``answer_of(original)`` makes the function that answers calls in its place,
        ``answer(replacement, args, kwargs)``; it can be copied and pickled.
    translations_at: ``translations_at(prefix)`` gives the pair (from the names of the distributed class to those of
        the original, and back) for the state dict of a whole model in which the module's names begin with ``prefix``.
    new_names_at: ``new_names_at(prefix, names)`` says, for the names of such a whole model as it was built, which of
        the distributed class's parameters each has become, or become a part of.
    origin_of: where an instance's weights were loaded from, "" if from nowhere: a warning says that they are lost.
    kept_arguments: arguments of the distributed class that an instance decides, whatever its configuration says, where
        its weights are kept.
    attributes: names of plain attributes that the replacement gets if the original has them, since callers read them.
    """

    arguments_of: Callable[[nn.Module], ConstructorArguments]
    answer_of: Callable[[nn.Module], Callable[..., Any]]
    translations_at: Callable[[str], tuple[Callable[..., Any], Callable[..., Any]]]
    new_names_at: Callable[[str, Collection[str]], dict[str, str]]
    origin_of: Callable[[nn.Module], str]
    kept_arguments: Callable[[nn.Module], dict[str, Any]]
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Registration:
    """``distributed_class`` takes the place of ``module_class``; a missing hook passes arguments or results on as they
    are.

    ``is_builtin``: the distributed class turns an instance of the original into itself and keeps its weights.
    ``family``: in place of the forward and return hooks, and of recording constructor arguments.
    """

    module_class: type[nn.Module]
    distributed_class: type[nn.Module]
    init_hook: Hook | None = None
    forward_hook: Hook | None = None
    return_hook: Hook | None = None
    is_builtin: bool = False
    family: Family | None = None


class _Registry:
    """The ambient state: the active contexts (per thread and async task) and the registrations (per process)."""

    def __init__(self) -> None:
        self.contexts: ContextVar[tuple[StampingContext, ...]] = ContextVar("smp_contexts", default=())
        self.registrations: dict[type[nn.Module], Registration] = {}
        self.lock = threading.Lock()
        self.num_active = 0
        self.plain_init: Callable[..., None] | None = None
        self.stamping_init: Callable[..., None] | None = None

    def activate(self) -> None:
        with self.lock:
            self.num_active += 1
            if self.num_active == 1:
                self.plain_init = nn.Module.__init__
                self.stamping_init = self._make_stamping_init(nn.Module.__init__)
                nn.Module.__init__ = self.stamping_init  # type: ignore[method-assign]

    def deactivate(self) -> None:
        with self.lock:
            self.num_active -= 1
            # Whoever replaced the function meanwhile keeps theirs: ours, inside it, does nothing without a context.
            if self.num_active == 0 and nn.Module.__init__ is self.stamping_init:
                nn.Module.__init__ = self.plain_init  # type: ignore[method-assign, assignment]

    def _make_stamping_init(self, plain_init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(plain_init)
        def stamping_init(module: nn.Module, *args: Any, **kwargs: Any) -> None:
            plain_init(module, *args, **kwargs)
            stamps: dict[str, Any] = {}
            for context in self.contexts.get():  # outermost first, so that the innermost wins
                stamps.update(context.stamps)
            module.__dict__.update(stamps)

        return stamping_init


_registry = _Registry()


class StampingContext(ContextDecorator):
    """A context manager, or decorator, that stamps each module constructed inside. Reusable and reentrant."""

    def __init__(self, stamps: Mapping[str, Any]) -> None:
        self.stamps = dict(stamps)

    def __enter__(self) -> StampingContext:
        _registry.contexts.set((*_registry.contexts.get(), self))
        _registry.activate()
        return self

    def __exit__(self, *exception: object) -> None:
        _registry.deactivate()
        active = _registry.contexts.get()
        last = max((index for index, context in enumerate(active) if context is self), default=None)
        if (
            last is not None
        ):  # None: left in another thread or task than it was entered in, which has no contexts of ours
            _registry.contexts.set(active[:last] + active[last + 1 :])


def partition_context(index: int) -> StampingContext:
    """Stamp each module constructed inside with partition ``index``."""
    return StampingContext({_PARTITION: index})


def tensor_parallel_context(enabled: bool, kwargs: Mapping[str, Any]) -> StampingContext:
    """Stamp each module constructed inside with the switch ``enabled`` and ``kwargs`` for its distributed class."""
    return StampingContext({_TENSOR_PARALLEL: (enabled, dict(kwargs))})


def partition_mark(module: nn.Module) -> int | None:
    """The partition that ``module`` was created in, None outside every context."""
    return module.__dict__.get(_PARTITION)


def tensor_parallel_mark(module: nn.Module) -> TensorParallelMark | None:
    """The tensor-parallel mark of ``module``, None if it was never marked."""
    stamp = module.__dict__.get(_TENSOR_PARALLEL)
    return None if stamp is None else TensorParallelMark(*stamp)


def set_tensor_parallel_mark(
    module: nn.Module, enabled: bool, kwargs: Mapping[str, Any], plan: Mapping[str, Any] | None = None
) -> None:
    """Mark ``module`` and its whole subtree, over any earlier mark; ``plan`` is a mark of ``module`` alone."""
    for part in module.modules():
        part.__dict__[_TENSOR_PARALLEL] = (enabled, dict(kwargs))
    if plan is not None:
        module.__dict__[_TENSOR_PARALLEL] = (enabled, dict(kwargs), dict(plan))


def note_wrapped(root: nn.Module) -> None:
    """Remember that the modules of ``root`` were wrapped: marks set later would come too late."""
    for module in root.modules():
        # The id tells the module itself from a copy of it, which may be marked and wrapped again.
        module.__dict__[_WRAPPED] = id(module)


def is_wrapped(module: nn.Module) -> bool:
    """Whether `note_wrapped` saw this very module."""
    return bool(module.__dict__.get(_WRAPPED) == id(module))


def register(registration: Registration) -> None:
    """Add a registration; a later one for the same class replaces the earlier."""
    is_derived = registration.family is not None or registration.module_class in _DERIVED_ARGUMENTS
    if not registration.is_builtin and not is_derived:
        _record_arguments(registration.module_class)
    _registry.registrations[registration.module_class] = registration


def registration_for(module: nn.Module) -> Registration | None:
    """The registration of exactly this class. A subclass of a registered class may compute something else, and so is
    not meant.
    """
    return _registry.registrations.get(type(module))


def is_registered(module_class: type) -> bool:
    """Whether something takes the place of ``module_class``."""
    return module_class in _registry.registrations


def note_family(module: nn.Module, family: Family) -> None:
    """Remember that ``module`` stands for one of ``family``."""
    module.__dict__[_FAMILY] = family


def family_of(module: nn.Module) -> Family | None:
    """The family that `note_family` said of ``module``."""
    return module.__dict__.get(_FAMILY)


def class_replaced_by(module: nn.Module) -> type[nn.Module] | None:
    """The class that ``module``, which stands for one of a family, has taken the place of."""
    family = family_of(module)
    registrations = _registry.registrations.values()
    return (
        None if family is None else next((each.module_class for each in registrations if each.family is family), None)
    )


def constructor_arguments(module: nn.Module) -> ConstructorArguments | None:
    """The arguments that ``module`` was built with, None if it was built before its class was registered."""
    registration = registration_for(module)
    if registration is not None and registration.family is not None:
        return registration.family.arguments_of(module)
    derive = _DERIVED_ARGUMENTS.get(type(module))
    if derive is not None:
        return derive(module)
    stamp = module.__dict__.get(_ARGUMENTS)
    return None if stamp is None else ConstructorArguments(*stamp)


def _record_arguments(module_class: type[nn.Module]) -> None:
    original_init: Any = module_class.__init__
    if getattr(original_init, "_smp_records", None) is module_class:
        return
    has_own_init = "__init__" in module_class.__dict__

    @functools.wraps(original_init)
    def recording_init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        if type(self) is module_class:  # a subclass has a constructor, and arguments, of its own
            self.__dict__[_ARGUMENTS] = (args, dict(kwargs))
        if has_own_init:
            original_init(self, *args, **kwargs)
        else:  # looked up now: a context may have replaced that of nn.Module
            super(module_class, self).__init__(*args, **kwargs)

    recording_init._smp_records = module_class  # type: ignore[attr-defined]
    module_class.__init__ = recording_init  # type: ignore[method-assign]


def _linear_arguments(module: nn.Module) -> ConstructorArguments:
    assert isinstance(module, nn.Linear)
    keyword = {"bias": module.bias is not None, "device": module.weight.device, "dtype": module.weight.dtype}
    return ConstructorArguments((module.in_features, module.out_features), keyword)


def _embedding_arguments(module: nn.Module) -> ConstructorArguments:
    assert isinstance(module, nn.Embedding)
    names = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    keyword = {name: getattr(module, name) for name in names}
    return ConstructorArguments((module.num_embeddings, module.embedding_dim), keyword)


# Their constructors are not patched: the instance's attributes say all that the arguments said.
_DERIVED_ARGUMENTS: dict[type[nn.Module], Callable[[nn.Module], ConstructorArguments]] = {
    nn.Linear: _linear_arguments,
    nn.Embedding: _embedding_arguments,
}
