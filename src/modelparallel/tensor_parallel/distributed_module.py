"""The base class of every module whose work is shared among the ranks of a tensor-parallel group (smp-api section
9).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modelparallel.errors import TensorParallelError
from modelparallel.job import session
from modelparallel.plan.rows import SplitSpec
from modelparallel.tensor_parallel.placements import slice_of

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group
    from modelparallel.job.registry import Hook


@dataclass(frozen=True)
class TensorParallelSettings:
    """What a distributed module works on: the configuration's ``optimize``, ``prescaled_batch`` and ``debug``, and the
    group.
    """

    group: Group
    is_memory: bool = False
    is_prescaled: bool = False
    is_debug: bool = False


_NAME = "_smp_name"
_override: ContextVar[TensorParallelSettings | None] = ContextVar("smp_tensor_parallel_settings", default=None)


@contextmanager
def using_tp_group(
    group: Group, *, is_memory: bool = False, is_prescaled: bool = False, is_debug: bool = False
) -> Iterator[None]:
    """Modules constructed inside work on ``group`` and with these settings instead of those of the session (and cannot
    be deep-copied).
    """
    token = _override.set(TensorParallelSettings(group, is_memory, is_prescaled, is_debug))
    try:
        yield
    finally:
        _override.reset(token)


def current_settings() -> TensorParallelSettings:
    """What a module constructed now works with."""
    override = _override.get()
    if override is not None:
        return override
    active = session.current()
    config = active.config
    return TensorParallelSettings(active.groups.tp, config.optimize == "memory", config.prescaled_batch, config.debug)


def is_session_group(tp_group: Group) -> bool:
    """Whether ``tp_group`` is what modules find by themselves."""
    return session.is_initialized() and session.current().groups.tp == tp_group


class DistributedModule(nn.Module):
    """Base of distributed modules: subclass it, hold local slices as parameters, and say so in `split_tensors`.

    The sizes that a subclass takes in its constructor are global; `tp_group` says how they are divided. Every rank of
    the group must construct it and call it in the same order: construction is local, calls and backward are collective
    over TP_GROUP. Source: smp-api section 8.
    """

    drawn_from = 0  # of one that was converted from an ordinary module: it has drawn nothing

    def __init__(self) -> None:
        super().__init__()
        #: A checksum of the generator's state before the weights are drawn.
        self.drawn_from = zlib.crc32(torch.get_rng_state().numpy().tobytes())
        override = _override.get()
        if override is not None:
            self.__dict__["_tp_group"] = override.group

    @property
    def tp_group(self) -> Group:
        """The group among whose ranks this module is split: the session's TP_GROUP."""
        group: Group = self.__dict__.get("_tp_group") or session.current().groups.tp
        return group.of_layer(self.described)

    @property
    def described(self) -> str:
        """The class, and the full name of the module in the user's model, for messages."""
        name = self.__dict__.get(_NAME)
        return type(self).__name__ if not name else f"{type(self).__name__} '{name}'"

    def note_name(self, name: str) -> None:
        """``name`` is the full name of the module in the user's model."""
        self.__dict__[_NAME] = name

    def split_tensors(self) -> dict[str, SplitSpec]:
        """The parameters and buffers owned directly by this module (not by its children) that are slices, by name."""
        return {}

    def scaled_batch_tensors(self) -> set[str]:
        """The directly owned parameters and buffers that work on the batch of the whole group, sliced or not, by name.

        Their gradients must come out as the sum over the batches of the group's ranks: they are then summed over
        RDP_GROUP and divided by dp. All others are averaged over DP_GROUP.
        """
        return set(self.split_tensors())

    @classmethod
    def convert(cls, module: nn.Module, tp_group: Group) -> None:
        """Turn ``module``, an instance of the class that this one stands for, into a ``cls`` in place, keeping its
        weights.

        Only for built-in replacements. Raises NotSplittableError, before anything is changed, if that is impossible.
        """
        raise NotImplementedError(f"{cls.__name__} does not convert other modules")

    @classmethod
    def _adopt(cls, module: nn.Module, tp_group: Group) -> None:
        """Make ``module`` an instance of this class, working on ``tp_group``."""
        module.__class__ = cls
        if not is_session_group(tp_group):
            module.__dict__["_tp_group"] = tp_group

    @torch.no_grad()
    def copy_weights_from(self, module: nn.Module) -> None:
        """Copy the weights of ``module``, the one that this module replaces, each rank its slices (config
        ``_match_weights``).

        Goes by the names of parameters and buffers; a class whose names differ from the original's overrides it.
        """
        self.copy_state(module.state_dict(keep_vars=True), type(module).__name__)

    @torch.no_grad()
    def copy_state(self, source: Mapping[str, torch.Tensor], origin: str) -> None:
        """Copy full tensors by name, each rank its slices, and whether they are trained; ``origin`` is for messages."""
        wanted = self.state_dict(keep_vars=True)
        splits = {
            f"{prefix}.{name}" if prefix else name: spec
            for prefix, part in self.named_modules()
            if isinstance(part, DistributedModule)
            for name, spec in part.split_tensors().items()
        }
        group = self.tp_group
        shapes = {
            name: splits[name].full_shape if name in splits else tuple(tensor.shape) for name, tensor in wanted.items()
        }
        missing = [
            f"{name} {shape}"
            for name, shape in shapes.items()
            if name not in source or tuple(source[name].shape) != tuple(shape)
        ]
        extra = [f"{name} {tuple(tensor.shape)}" for name, tensor in source.items() if name not in wanted]
        if missing or extra:
            raise TensorParallelError(
                f"_match_weights: {type(self).__name__} and the {origin} that it replaces do not name "
                f"their weights alike "
                f"(only here, or of another shape: {', '.join(missing) or 'none'}; only there: "
                f"{', '.join(extra) or 'none'}): "
                f"override {type(self).__name__}.copy_weights_from(module), or switch _match_weights off"
            )
        for name, tensor in wanted.items():
            full = source[name]
            part = slice_of(full, splits[name], group.rank_in_group, group.size) if name in splits else full
            tensor.copy_(part)
            tensor.requires_grad_(full.requires_grad)

    def install_answer(self, answer: Callable[..., Any]) -> None:
        """Answer calls by ``answer(self, args, kwargs)``, which calls `own_forward`."""
        self.__dict__["_smp_answer"] = answer
        self.__dict__["forward"] = self._forward_by_answer

    def _forward_by_answer(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_smp_answer"](self, args, kwargs)

    def own_forward(self, *args: Any, **kwargs: Any) -> Any:
        """``forward`` of the class, whatever the calling convention of the module that this one replaced."""
        return type(self).forward(self, *args, **kwargs)

    def install_call_hooks(self, name: str, forward_hook: Hook | None, return_hook: Hook | None) -> None:
        """Answer calls with the signature of the replaced module, called ``name`` in error messages.

        The hooks sit around ``forward``, so that hooks registered on the module see the original's arguments and
        result.
        """
        if forward_hook is None and return_hook is None:
            return
        self.__dict__["_smp_call_hooks"] = (name, forward_hook, return_hook)
        # A bound method of this class, not a closure: copying and pickling bind it to the copy.
        self.__dict__["forward"] = self._forward_through_hooks

    def _forward_through_hooks(self, *args: Any, **kwargs: Any) -> Any:
        name, forward_hook, return_hook = self.__dict__["_smp_call_hooks"]
        positional, keyword = args, kwargs
        if forward_hook is not None:
            positional, keyword = call_argument_hook("forward_hook", name, type(self), forward_hook, args, kwargs)
        result = type(self).forward(self, *positional, **keyword)
        if return_hook is None:
            return result
        return call_hook("return_hook", name, type(self), return_hook, (result,), {})


def call_hook(
    kind: str, name: str, distributed_class: type, hook: Hook, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call a registered hook; what goes wrong is reported with the module, the class and the hook."""
    try:
        return hook(*args, **kwargs)
    except Exception as error:
        given = ", ".join(
            [type(value).__name__ for value in args]
            + [f"{key}={type(value).__name__}" for key, value in kwargs.items()]
        )
        raise TensorParallelError(
            f"{kind} {getattr(hook, '__name__', hook)!r} of {distributed_class.__name__}, for module {name!r}, called "
            f"with ({given}), "
            f"raised {type(error).__name__}: {error}"
        ) from error


def call_argument_hook(
    kind: str, name: str, distributed_class: type, hook: Hook, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Call a hook that returns arguments: an iterable of positional ones and a dict of keyword ones."""
    result = call_hook(kind, name, distributed_class, hook, args, kwargs)
    return checked_arguments(kind, name, distributed_class, hook, result)


def checked_arguments(
    kind: str, name: str, distributed_class: type, hook: Hook, result: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``result`` of an argument hook as (positional, keyword), or an error that says what is wrong with it."""
    if isinstance(result, tuple | list) and len(result) == 2 and isinstance(result[1], dict):
        positional, keyword = result
        # A tensor or a text is iterable too, but nobody means its rows or letters as arguments.
        if isinstance(positional, Iterable) and not isinstance(positional, str | bytes | dict | torch.Tensor):
            return tuple(positional), keyword
    shown = (
        f"({', '.join(type(part).__name__ for part in result)})" if isinstance(result, tuple) else type(result).__name__
    )
    raise TensorParallelError(
        f"{kind} {getattr(hook, '__name__', hook)!r} of {distributed_class.__name__}, for module {name!r}, returned "
        f"{shown}: return "
        "(positional, keyword), a tuple or list of positional arguments and a dict of keyword arguments; one tuple "
        "argument is ((a, b),), {}"
    )
