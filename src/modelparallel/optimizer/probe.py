"""Whether an optimizer of unknown kind looks beyond one parameter, or beyond the slice of it that is here: tried out.

[Note: probing] A rank has a part of the parameters, and slices of some. An optimizer that takes a norm over all of
them (SAM, Prodigy, D-Adaptation) would take one over this rank's, in silence; one that takes norms of single parameters
is right where these are whole. What a class does cannot be read off it, and values may leave torch on the way (by
``.item()``), so it is tried: before a call of ``step``, or of a method of its own, a copy of the optimizer that has one
small parameter makes the same call, and so do copies that have a made-up parameter beside it, with a gradient that is
somewhat larger, or much larger (what is compared with a limit notices that alone). If the parameter, its state or a
number of the optimizer comes out differently, parameters depend on each other. In the same way the gradient of one half
of a sliced parameter is changed, and the other half must not notice. Only small tensors are copied, in the first calls
and now and then later; nothing is sent, and the random generators stay where they are.
"""

from __future__ import annotations

import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modelparallel.errors import SMPConfigError
from modelparallel.torch_compat.generators import drawn_from, states_of

if TYPE_CHECKING:
    from modelparallel.plan.rows import ParameterRow

#: By how much the gradient of the made-up parameter is larger.
FACTORS = (3.0, 1e4)
#: The calls of a method that are tried, counted from 1: some optimizers warm up.
TRIED_CALLS = (1, 2, 3, 10, 100, 1000)
# Larger than rounding, smaller than any influence of the made-up parameter.
_TOLERANCE = 1e-3


def needs_probe(optimizer: torch.optim.Optimizer) -> bool:
    """Whether nothing is known of it: neither its class says something, nor is it one of torch's."""
    is_said = getattr(optimizer, "is_elementwise", None) is not None
    return not is_said and not type(optimizer).__module__.startswith("torch.optim")


class OptimizerProbe:
    """Tries the calls of one optimizer.

    ``row_of``: the row of the parameter that a tensor of its groups stands for. ``around``: called first in each call
    of a method beside ``step``, and what it returns last. ``is_divided``: no rank has all of the model.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        row_of: Callable[[torch.Tensor], ParameterRow | None],
        around: Callable[[str], Callable[[], None]],
        *,
        is_divided: bool,
    ) -> None:
        self._optimizer = optimizer
        self._is_divided = is_divided
        self._row_of = row_of
        self._around = around
        self._num_calls: dict[str, int] = {}
        self._is_inside = False  # a call that was looked at; what it calls is part of it
        #: Why something could not be tried; the first reason.
        self.doubt: str | None = None
        for name in _own_methods(type(optimizer)):
            # A bound method: schedulers put theirs around ``step.__func__``.
            vars(optimizer)[name] = types.MethodType(self._watched(name), optimizer)

    def _watched(self, name: str) -> Callable[..., Any]:
        original = getattr(type(self._optimizer), name)

        def call(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            if self._is_inside:
                return original(optimizer, *args, **kwargs)
            after = self._around(name) if name != "step" else None
            closure = next((value for value in (*args, *kwargs.values()) if callable(value)), None)
            if closure is None:
                # What is given tensors would be given those of the model.
                if all(isinstance(value, int | float | str | None) for value in (*args, *kwargs.values())):
                    self.try_call(name, args, kwargs)
            elif name == "step" and self._is_divided:
                args, kwargs = self._with_tried_closure(closure, args, kwargs)
            self._is_inside = True
            try:
                result = original(optimizer, *args, **kwargs)
            finally:
                self._is_inside = False
            if after is not None:
                after()
            return result

        call.__name__, call.__doc__ = name, original.__doc__
        return call

    def _with_tried_closure(
        self, closure: Callable[[], Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The gradients are there when the closure has returned: then the rest of the step is tried."""
        has_run = False

        def tried() -> Any:
            nonlocal has_run
            loss = closure()
            if not has_run:
                has_run = True
                num_more = [0]

                def again() -> Any:
                    num_more[0] += 1
                    return loss

                def put(value: Any, other: Any) -> Any:
                    return other if value is closure else value

                self.try_call(
                    "step", tuple(put(value, again) for value in args),
                    {key: put(value, again) for key, value in kwargs.items()}, num_evaluations=num_more,
                )  # fmt: skip
            return loss

        return (
            tuple(tried if value is closure else value for value in args),
            {key: tried if value is closure else value for key, value in kwargs.items()},
        )

    def try_call(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], num_evaluations: list[int] | None = None
    ) -> None:
        """Raise SMPConfigError if the call would use what this rank has only a part of. Local."""
        count = self._num_calls.get(name, 0) + 1
        if not self._is_divided or (count > TRIED_CALLS[2] and count not in TRIED_CALLS):
            self._num_calls[name] = count
            return
        candidates = [
            tensor
            for group in self._optimizer.param_groups
            for tensor in group["params"]
            if _can_be_tried(tensor) and bool(tensor.grad.any())
        ]
        if not candidates:
            return  # not counted
        self._num_calls[name] = count
        smallest = min(candidates, key=lambda tensor: int(tensor.numel()))
        alone = self._outcome(name, args, kwargs, smallest, [_copy_of(smallest)])
        if alone is None:
            return
        if num_evaluations is not None and num_evaluations[0] > 1:
            raise self._refusal(name, smallest, "evaluates its closure several times, and cannot be tried out")
        for factor in FACTORS:
            beside = self._outcome(name, args, kwargs, smallest, [_made_up(smallest, factor), _copy_of(smallest)])
            if beside is not None and not _are_equal(alone, beside, smallest, None):
                raise self._refusal(name, smallest, "depends on other parameters, too")
        self._try_slices(name, args, kwargs, candidates)

    def _try_slices(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], candidates: Sequence[torch.Tensor]
    ) -> None:
        by_dim: dict[int, torch.Tensor] = {}
        for tensor in candidates:
            row = self._row_of(tensor)
            split = None if row is None or tuple(tensor.shape) == row.full_shape else row.split
            if split is not None and tensor.ndim > split.dim and tensor.shape[split.dim] > 1:
                known = by_dim.setdefault(split.dim, tensor)
                if tensor.numel() < known.numel():
                    by_dim[split.dim] = tensor
        for dim, tensor in by_dim.items():
            alone = self._outcome(name, args, kwargs, tensor, [_copy_of(tensor)])
            for factor in FACTORS:
                changed = self._outcome(name, args, kwargs, tensor, [_half_changed(tensor, dim, factor)])
                if alone is not None and changed is not None and not _are_equal(alone, changed, tensor, dim):
                    raise self._refusal(name, tensor, "depends on all elements of it, of which this rank has a slice")

    def _refusal(self, name: str, tensor: torch.Tensor, what: str) -> SMPConfigError:
        kind, row = type(self._optimizer).__name__, self._row_of(tensor)
        return SMPConfigError(
            f"{kind}.{name}: what it does to a parameter ('{row.name if row is not None else '?'}' was tried) {what}. "
            "No rank has all parameters, so that norms and sums over them would be those of a part: use an optimizer "
            "that updates each parameter by itself (each element, with tensor_parallel_degree), or leave out "
            "pipeline_parallel_degree, tensor_parallel_degree and shard_optimizer_state; where it needs the norm of "
            "the gradient only, smp.clip_grad_norm_(model, float('inf')) is that of all ranks; is_elementwise = True "
            "on its class says that it may be cut"
        )

    # A try

    def _outcome(
        self,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        kept: torch.Tensor,
        stand_ins: list[nn.Parameter],
    ) -> dict[str, Any] | None:
        """All numbers after the call on a copy that has ``stand_ins`` (the last for ``kept``) alone; None: unknown."""
        known = {id(tensor) for group in self._optimizer.param_groups for tensor in group["params"]}
        devices = drawn_from(kept.device)
        with torch.random.fork_rng(devices=devices[1:]):
            before = states_of(devices)
            try:
                copied = _Copier(known, kept, stand_ins).optimizer(self._optimizer)
                result = getattr(type(copied), name)(copied, *args, **kwargs)
            except Exception as error:  # the copy lacks something; the call itself is not to fail for that
                self.doubt = self.doubt or f"{type(error).__name__}: {error}"
                return None
            after = states_of(devices)
        if not all(torch.equal(*pair) for pair in zip(before, after, strict=True)):
            self.doubt = self.doubt or "it draws random numbers"
            return None
        own = stand_ins[-1]
        numbers: dict[str, Any] = {"": own.detach(), "result": result}
        numbers.update((f"state.{key}", value) for key, value in _leaves(copied.state.get(own, {})))
        for index, group in enumerate(copied.param_groups):
            numbers.update((f"group {index}.{key}", value) for key, value in group.items() if key != "params")
        numbers.update((f"attribute {key}", value) for key, value in vars(copied).items())
        return numbers


class _Copier:
    """Copies an optimizer with ``stand_ins`` in the place of the parameter ``kept``, and without the others."""

    def __init__(self, known: set[int], kept: torch.Tensor, stand_ins: Sequence[nn.Parameter]) -> None:
        self._known, self._kept, self._stand_ins = known, kept, stand_ins

    def optimizer(self, original: Any, seen: dict[int, Any] | None = None) -> Any:
        """With all that belongs to it; what is patched on it is left out."""
        seen = {} if seen is None else seen
        copied = seen[id(original)] = object.__new__(type(original))
        for key, value in vars(original).items():
            if callable(value) and hasattr(type(original), key):
                continue
            is_hooks = key.startswith("_optimizer_") and isinstance(value, dict)
            vars(copied)[key] = OrderedDict() if is_hooks else self._value(value, seen)
        return copied

    def _value(self, value: Any, seen: dict[int, Any]) -> Any:
        if id(value) in seen:
            return seen[id(value)]
        if isinstance(value, torch.Tensor):
            made: Any = self._stand_ins[-1] if value is self._kept else value.detach().clone()
        elif isinstance(value, torch.optim.Optimizer):
            return self.optimizer(value, seen)
        elif isinstance(value, dict):
            made = defaultdict(value.default_factory) if isinstance(value, defaultdict) else {}
            seen[id(value)] = made
            for key, item in value.items():
                if id(key) not in self._known:
                    made[key] = self._value(item, seen)
                elif key is self._kept:
                    made.update((stand_in, self._value(item, dict(seen))) for stand_in in self._stand_ins)
        elif type(value) in (list, tuple):
            items: list[Any] = []
            for item in value:
                if id(item) not in self._known:
                    items.append(self._value(item, seen))
                elif item is self._kept:
                    items.extend(self._stand_ins)
            made = type(value)(items)
        else:
            return value
        seen[id(value)] = made
        return made


def _own_methods(kind: type) -> list[str]:
    """``step``, and the public methods that a class has beside those of torch.optim.Optimizer."""
    classes = (
        kind.__mro__[: kind.__mro__.index(torch.optim.Optimizer)] if issubclass(kind, torch.optim.Optimizer) else ()
    )
    names = {name for cls in classes for name, value in vars(cls).items() if isinstance(value, types.FunctionType)}
    of_torch = {name for name in names if name != "step" and hasattr(torch.optim.Optimizer, name)}
    return sorted(name for name in names - of_torch if not name.startswith("_"))


def _can_be_tried(tensor: torch.Tensor) -> bool:
    gradient = tensor.grad
    is_plain = gradient is not None and gradient.layout == torch.strided and not hasattr(tensor, "to_local")
    return is_plain and tensor.numel() > 0


def _copy_of(tensor: torch.Tensor) -> nn.Parameter:
    copied = nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)
    vars(copied).update(vars(tensor))
    assert tensor.grad is not None
    copied.grad = tensor.grad.detach().clone()
    return copied


def _other_values(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """Random values, ``factor`` times as large as the values of ``tensor``, by a generator of their own."""
    generator = torch.Generator().manual_seed(1)
    size = tensor.detach().abs().max().float().cpu() + 1e-30
    drawn = (torch.rand(tensor.shape, generator=generator) + 0.5) * size * factor
    return drawn.to(tensor.device, tensor.dtype)


def _made_up(tensor: torch.Tensor, factor: float) -> nn.Parameter:
    made = _copy_of(tensor)
    assert made.grad is not None
    with torch.no_grad():
        made.add_(_other_values(made, 3.0))
    made.grad = _other_values(made.grad, factor)
    return made


def _half_changed(tensor: torch.Tensor, dim: int, factor: float) -> nn.Parameter:
    changed = _copy_of(tensor)
    start = tensor.shape[dim] // 2
    assert changed.grad is not None
    with torch.no_grad():
        for values, own_factor in ((changed, 3.0), (changed.grad, factor)):
            part = values.narrow(dim, start, values.shape[dim] - start)
            part.add_(_other_values(part, own_factor))
    return changed


def _leaves(values: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(values, dict):
        return [(prefix, values)]
    return [leaf for key, value in values.items() for leaf in _leaves(value, f"{prefix}.{key}")]


def _are_equal(first: Mapping[str, Any], second: Mapping[str, Any], tensor: torch.Tensor, dim: int | None) -> bool:
    """``dim``: the dim along which one half of ``tensor``, and of what has its shape, is not compared."""
    if first.keys() != second.keys():
        return False
    for key, value in first.items():
        other = second[key]
        if isinstance(value, int | float) and isinstance(other, int | float):
            value, other = (torch.tensor(float(number), dtype=torch.float64) for number in (value, other))
        if not isinstance(value, torch.Tensor) or not isinstance(other, torch.Tensor):
            continue
        if value.shape != other.shape:
            return False
        before = tensor.detach() if key == "" else None
        if dim is not None and value.shape == tensor.shape:
            value, other = (part.narrow(dim, 0, tensor.shape[dim] // 2) for part in (value, other))
            before = None if before is None else before.narrow(dim, 0, tensor.shape[dim] // 2)
        if not _are_close(value.detach(), other.detach(), before):
            return False
    return True


def _are_close(first: torch.Tensor, second: torch.Tensor, before: torch.Tensor | None) -> bool:
    if not first.is_floating_point() and not first.is_complex():
        return torch.equal(first, second)
    if not first.numel():
        return True
    size = float((first if before is None else first - before).abs().max())
    rounding = torch.finfo(first.dtype).eps * 8 * float(first.abs().max())
    difference = float(torch.nan_to_num(first - second).abs().max())
    return difference <= _TOLERANCE * size + rounding
