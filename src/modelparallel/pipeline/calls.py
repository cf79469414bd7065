"""Calls of placed modules: native at the home, an announcement elsewhere."""

from __future__ import annotations

import io
import pickle
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.checkpoint
from torch import nn

from modelparallel import trees
from modelparallel.errors import UnsupportedError
from modelparallel.pipeline import glue
from modelparallel.pipeline.stage_tensor import StageTensor
from modelparallel.pipeline.structures import call_key, flatten_call, has_containers

if TYPE_CHECKING:
    from modelparallel.pipeline.engine import PipelineEngine
    from modelparallel.pipeline.program import Program

DYNAMIC_MARK = "_modelparallel_dynamic"
_PRIMITIVES = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, nn.Module)


@dataclass
class PlacedModule:
    """A module with a home; ``inner`` is its own call, hooks included; ``unit`` its number if frames hang on it."""

    module: nn.Module
    name: str
    home: int
    unit: int | None
    inner: Callable[..., Any] = lambda *args, **kwargs: None
    parameters: tuple[nn.Parameter, ...] = ()
    filled: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)

    def __post_init__(self) -> None:
        self.parameters = tuple(self.module.parameters())

    @property
    def description(self) -> str:
        return f"module '{self.name}' ({type(self.module).__name__})"

    def is_first_filling(self, value: Any) -> bool:
        """Whether this is an object in which the layers of a Hugging Face decoder keep keys and values, each for
        itself, and this layer is given it for the first time.

        With ``use_cache=True``, their default, decoders make one in every forward. What a layer stores there may stay at
        its home until it is read again: by the forward for a next token, which gives it to the layer a second time.
        """
        kind = type(value)
        if not kind.__name__.endswith("Cache") or kind.__module__.split(".")[0] != "transformers":
            return False
        is_first = value not in self.filled
        self.filled.add(value)
        return is_first


def mark_dynamic(module: nn.Module) -> None:
    """Let ``module`` announce its output at every call, since its shapes depend on data."""
    module.__dict__[DYNAMIC_MARK] = True


def run(engine: PipelineEngine, program: Program, entry: PlacedModule, args: Any, kwargs: Any) -> Any:
    """Call a placed module; every stage of the pipeline does, in the same order."""
    values, skeleton, rebuild = flatten_call(args, kwargs)
    values = [program.resolve(value) for value in values]
    inputs = [value for value in values if isinstance(value, StageTensor)]
    program.fetch(inputs, entry.home, f"{entry.name} input")
    is_dynamic = DYNAMIC_MARK in entry.module.__dict__
    key = None if is_dynamic else call_key(entry.name, entry.module, values, skeleton)
    if key is not None:
        # Freezing a weight changes which outputs need gradients.
        key = (id(entry), tuple([parameter.requires_grad for parameter in entry.parameters]), key)
    holds_containers = has_containers(skeleton)
    call = _checkpointed(entry.inner) if engine.num_open_checkpoints and torch.is_grad_enabled() else entry.inner

    def compute(locals_: list[Any]) -> Any:
        inner_args, inner_kwargs = rebuild(locals_)
        if entry.unit is not None:
            program.frames.enter_unit(entry.unit)
        objects = [value for value in locals_ if not isinstance(value, (torch.Tensor, *_PRIMITIVES))]
        if objects:
            objects = [value for value in objects if not entry.is_first_filling(value)]
        if not objects and not holds_containers:
            return call(*inner_args, **inner_kwargs)
        before = [_fingerprint(value) for value in objects]
        output = call(*inner_args, **inner_kwargs)
        for value, old in zip(objects, before, strict=True):
            if old is not None and _fingerprint(value) != old:
                raise _changed(entry, type(value))
        if holds_containers:
            _check_containers(entry, (inner_args, inner_kwargs), locals_, skeleton)
        return output

    return glue.execute(engine, program, entry.description, key, values, entry.home, compute, protect=True)


def _checkpointed(inner: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(inner, *args, use_reentrant=False, **kwargs)

    return call


def _check_containers(entry: PlacedModule, arguments: Any, leaves: list[Any], skeleton: Any) -> None:
    found, found_skeleton, _ = flatten_call(*arguments)
    if found_skeleton != skeleton or any(one is not other for one, other in zip(found, leaves, strict=True)):
        changed = next((type(leaf) for leaf in arguments[0] if trees.is_container(leaf)), dict)
        raise _changed(entry, changed)


def _changed(entry: PlacedModule, kind: type) -> UnsupportedError:
    return UnsupportedError(
        f"{entry.description} changed its argument of type {kind.__name__}: what it stored there would stay on "
        f"pp_rank {entry.home}. Return it instead, or switch the recording off (Hugging Face models: use_cache=False, "
        "output_attentions=False)"
    )


class _FingerprintPickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return (id(value), value._version if not value.is_inference() else 0)
        if isinstance(value, (nn.Module, type)) or callable(value):
            return id(value)
        return None


def _fingerprint(value: Any) -> bytes | None:
    """The content of an object, for telling whether a module has changed it; None where it cannot be told."""
    file = io.BytesIO()
    try:
        _FingerprintPickler(file).dump(value)
    except (pickle.PicklingError, AttributeError, TypeError, RecursionError):
        return None
    return file.getvalue()
