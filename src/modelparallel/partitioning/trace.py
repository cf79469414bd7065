"""Tracing: run the user's step body once, on the whole model, and note what every unit costs.

The body runs for real, with its side effects; what belongs to the model (buffers, gradients, train mode, hooks) and
the states of the random generators are put back afterwards, also when the body raises.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from modelparallel import trees
from modelparallel.parameters.table import waits_for_storage
from modelparallel.partitioning.costs import Flow, Trace, sizes_only, tensor_bytes
from modelparallel.partitioning.operations import OperationCounter, StorageSet, Traffic, storage_of
from modelparallel.partitioning.units import direct_tensors, has_weights
from modelparallel.torch_compat.generators import SavedGenerators
from modelparallel.torch_compat.private_parts import (
    names_of_temporary_buffers,
    set_names_of_temporary_buffers,
    version_of,
)

LOGGER = logging.getLogger("modelparallel.partitioning")


def trace_step(
    root: nn.Module,
    units: Sequence[str],
    run: Callable[[], object],
    *,
    measure_times: bool = False,
    measure_memory: bool = False,
) -> Trace:
    """Run ``run`` once on the unsplit model ``root`` and return the costs of its ``units``.

    Args:
        root: the user's module, whole on this process; ``run`` calls it (or its parts), in any order and any number
            of times.
        units: from :func:`~modelparallel.partitioning.units.find_units`.
        run: the step body on one microbatch. Its result is not used. It must not run a backward that it does not
            need: saved tensors are counted when they are saved, and gradients of parameters are put back to what
                they were.
        measure_times: run the body a second time, without the counting, and take each unit's forward time, with the
            operations outside the units that count for it. The backward is not run: each of its two parts is taken to
            last as long as the forward.
        measure_memory: on a GPU, take the memory that a unit's calls leave allocated where that is more than its
            saved tensors.

    Local, except for collectives that the body itself contains. What ``run`` raises passes through.
    """
    try:
        recorder, stateful = _record(root, units, run, measure_memory, counts_saved=True)
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
        LOGGER.info("tracing: torch.func refuses saved-tensor hooks; output sizes stand for activations")
        recorder, stateful = _record(root, units, run, measure_memory, counts_saved=False)
    seconds: dict[str, float] = {}
    if measure_times:
        clock = _CostRecorder(root, units, measure_memory=False)
        with untouched(root), clock.listening(), _GlueWatch(clock):
            run()
        seconds = clock.seconds
    return recorder.trace(stateful, seconds if measure_times else None)


def _record(
    root: nn.Module, units: Sequence[str], run: Callable[[], object], measure_memory: bool, counts_saved: bool
) -> tuple[_CostRecorder, tuple[str, ...]]:
    recorder = _CostRecorder(root, units, measure_memory)
    with untouched(root) as changed, torch_fast_path_off():
        with recorder.listening(), recorder.counting(counts_saved):
            run()
        return recorder, changed()


@contextmanager
def untouched(root: nn.Module) -> Iterator[Callable[[], tuple[str, ...]]]:
    """Leave buffers, gradients and train mode of ``root``, and the random generators, as they are on entry.

    Yields a function that returns the full names of the buffers changed so far. Parameters are not copied: one that
    changes is reported in the log and stays changed.
    """
    buffers = _Buffers(root)
    modes = [(module, module.training) for module in root.modules()]
    gradients = [
        (parameter, parameter.grad, None if parameter.grad is None else parameter.grad.detach().clone())
        for parameter in root.parameters()
    ]
    versions = [(name, parameter, _version(parameter)) for name, parameter in root.named_parameters()]
    with random_states_kept():
        try:
            yield buffers.changed
        finally:
            buffers.restore()
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for parameter, gradient, values in gradients:
                    if gradient is not None and values is not None:
                        gradient.copy_(values)
                    parameter.grad = gradient
            for name, parameter, version in versions:
                if _version(parameter) != version:
                    LOGGER.warning(
                        "tracing: the step body changes the parameter %r in place; it keeps the change", name
                    )


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Put the random generators of torch (CPU and every GPU in use), Python and numpy back on exit."""
    has_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())] if has_cuda else []
    saved = SavedGenerators([torch.device("cpu"), *gpus], has_numpy=True)
    try:
        yield
    finally:
        saved.restore()


@contextmanager
def torch_fast_path_off() -> Iterator[None]:
    """torch's fused inference kernel for transformer layers skips the operations (and hooks) that the trace counts."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


class _Buffers:
    """A snapshot of all buffers of a model: which tensor each name held, and its values."""

    def __init__(self, root: nn.Module) -> None:
        self._names: dict[int, str] = {}
        self._modules: list[tuple[str, nn.Module, dict[str, torch.Tensor | None], set[str]]] = []
        self._values: dict[int, tuple[torch.Tensor, torch.Tensor, int]] = {}
        for name, module in root.named_modules():
            own = dict(module._buffers)
            self._modules.append((f"{name}." if name else "", module, own, names_of_temporary_buffers(module)))
            for buffer in own.values():
                if buffer is not None and id(buffer) not in self._values:
                    self._values[id(buffer)] = (buffer, buffer.detach().clone(), _version(buffer))

    def changed(self) -> tuple[str, ...]:
        """Names of the buffers written to in place, or replaced by a tensor of other values.

        A buffer replaced by an equal one (moved, rebuilt from the same constants) is still a constant.
        """
        names = []
        seen = set()
        for prefix, module, own, _ in self._modules:
            for name, buffer in own.items():
                if buffer is None or id(buffer) in seen:
                    continue
                seen.add(id(buffer))
                _, values, version = self._values[id(buffer)]
                now = module._buffers.get(name)
                is_other = now is not buffer and waits_for_storage(buffer)  # of which no values can be compared
                if _version(buffer) != version or now is None or is_other or not _same_values(now, values):
                    names.append(prefix + name)
        return tuple(names)

    def restore(self) -> None:
        for _, module, own, non_persistent in self._modules:
            module._buffers.clear()
            module._buffers.update(own)
            set_names_of_temporary_buffers(module, non_persistent)
        with torch.no_grad():
            for buffer, values, _ in self._values.values():
                if buffer.shape != values.shape:
                    buffer.set_(values)  # type: ignore[call-overload]
                elif not _same_values(buffer, values):
                    buffer.copy_(values)


def _version(tensor: torch.Tensor) -> int:
    return (
        -1 if tensor.is_inference() else version_of(tensor)
    )  # inference tensors keep no version; their values are compared


def _same_values(first: torch.Tensor, second: torch.Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if any(tensor.is_meta or waits_for_storage(tensor) for tensor in (first, second)):
        return True
    second = second.to(first.device)
    if first.is_floating_point() or first.is_complex():
        # A buffer may hold NaN, which differs from itself.
        return bool(((first == second) | ((first != first) & (second != second))).all())
    return torch.equal(first, second)


class _CostRecorder:
    """Notes, through module hooks and operation modes, what happens in which unit during one run of the body."""

    def __init__(self, root: nn.Module, units: Sequence[str], measure_memory: bool) -> None:
        self._root = root
        self._units = tuple(units)
        self._measure_memory = measure_memory and torch.cuda.is_available() and torch.cuda.is_initialized()
        self._modules = dict(root.named_modules())
        self.order: list[str] = []
        self.seconds: dict[str, float] = dict.fromkeys(units, 0.0)
        self._calls = dict.fromkeys(units, 0)
        self._flops = dict.fromkeys(units, 0)
        self._moved_bytes = dict.fromkeys(units, 0)
        self._output_bytes = dict.fromkeys(units, 0)
        self._saved_bytes = dict.fromkeys(units, 0)
        self._memory_bytes = dict.fromkeys(units, 0)
        self._input_gradient = dict.fromkeys(units, False)
        self._output_gradient = dict.fromkeys(units, False)
        self._near: dict[str, str | None] = {}
        self._waiting: list[str] = []  # tensors above the units used before any unit ran
        self._guests: dict[str, dict[str, None]] = {}  # of units and tensors, the units inside which they are used
        self._open_units: list[
            tuple[str, int, float, int]
        ] = []  # active unit, its nested calls, start time, allocated bytes
        self._glue_unit: str | None = None  # where the glue operation that is running runs
        self._reads_weight = False
        self._last: str | None = None
        self._has_gradients = False
        self._saved = StorageSet(root.parameters())
        self._traffic = Traffic()
        self._from_outside = StorageSet()
        self._tied = {name: group for group in sizes_only(root, self._units).ties for name in group}
        self._position: dict[str, int] = {}
        self._direct = {
            id(storage_of(direct.tensor)): direct
            for direct in direct_tensors(root, self._units)
            if storage_of(direct.tensor) is not None
        }
        self._owner_of_weight = {
            id(storage_of(parameter)): unit
            for unit in reversed(self._units)
            for parameter in self._modules[unit].parameters()
            if storage_of(parameter) is not None
        }

        self._holders: dict[int, list[str]] = {}  # of tensors, the units that have them
        for unit in self._units:
            for tensor in (*self._modules[unit].parameters(), *self._modules[unit].buffers()):
                self._holders.setdefault(id(tensor), []).append(unit)
        for direct in direct_tensors(root, self._units):
            self._holders.setdefault(id(direct.tensor), []).append(direct.name)

    def _is_trainable(self, unit: str) -> bool:
        return any(parameter.requires_grad for parameter in self._modules[unit].parameters())

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hooks on every module inside a unit: a script may call ``block.attention(...)`` without calling the block."""
        handles = []
        for unit in self._units:
            for module in self._modules[unit].modules():
                if isinstance(module, torch.jit.ScriptModule) and module is not self._modules[unit]:
                    continue  # inner modules of a scripted one are not called through Python
                if module is not self._modules[unit] and not has_weights(module):
                    continue  # it may be in several units (one activation for all blocks), and then tells nothing
                handles.append(module.register_forward_pre_hook(self._enter(unit), with_kwargs=True, prepend=True))
                handles.append(module.register_forward_hook(self._leave(unit), with_kwargs=True, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def counting(self, counts_saved: bool) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(_GlueWatch(self))
            if counts_saved:
                stack.enter_context(saved_tensors_hooks(self._save, _keep))
            stack.enter_context(OperationCounter(self._add_operation))
            yield

    def _enter(self, unit: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._open_units and self._open_units[-1][0] == unit:
                self._open_units[-1] = (unit, self._open_units[-1][1] + 1, *self._open_units[-1][2:])
                return
            if self._open_units:  # its work is that of the module that calls it
                self._guests.setdefault(unit, {})[self._open_units[-1][0]] = None
                return
            if not self._calls[unit]:
                self._first_call(unit)
            self._calls[unit] += 1
            for tensor in _tensors((args, kwargs)):
                self._input_gradient[unit] |= tensor.requires_grad
                if not self._traffic.used(tensor, self._position[unit]):
                    self._from_outside.add(tensor)
            self._open_units.append((unit, 1, self._now(), self._allocated()))

        return enter

    def _first_call(self, unit: str) -> None:
        # Units that share a parameter will be placed together, so data goes to where the first of them is.
        places = [self._position[name] for name in self._tied.get(unit, ()) if name in self._position]
        self._position[unit] = places[0] if places else len(self.order)
        self.order.append(unit)
        for name in self._waiting:
            self._near[name] = unit
        self._waiting.clear()

    def _leave(self, unit: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
            if not self._open_units or self._open_units[-1][0] != unit:
                return  # a guest; or an error unwinds the calls
            _, nested, start, allocated = self._open_units[-1]
            if nested > 1:
                self._open_units[-1] = (unit, nested - 1, start, allocated)
                return
            self._open_units.pop()
            self._last = unit
            self.seconds[unit] += self._now() - start
            self._memory_bytes[unit] += max(0, self._allocated() - allocated)
            storages = StorageSet()
            for tensor in _tensors(output):
                self._output_gradient[unit] |= tensor.requires_grad
                self._output_bytes[unit] += tensor_bytes(tensor) if storages.add(tensor) else 0
                self._traffic.made(tensor, self._position[unit])

        return leave

    def _now(self) -> float:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self._measure_memory else 0

    @property
    def _current(self) -> str | None:
        """The unit that a running operation counts for."""
        if self._open_units:
            return self._open_units[-1][0]
        return self._glue_unit or self._last

    def _add_operation(self, flops: int, moved_bytes: int) -> None:
        if self._current is not None:
            self._flops[self._current] += flops
            self._moved_bytes[self._current] += moved_bytes

    def _save(self, tensor: torch.Tensor) -> torch.Tensor:
        self._has_gradients = True
        if self._saved.add(tensor) and self._current is not None:
            # A view keeps its whole storage; but a microbatch is a view of a batch that is there anyway.
            is_outside = tensor in self._from_outside
            self._saved_bytes[self._current] += (
                tensor_bytes(tensor) if is_outside else tensor.untyped_storage().nbytes()
            )
        # Not the tensor itself: a node that saves its own output would keep itself alive, and with it the weights.
        return tensor.detach()

    def inside(self, inputs: Iterator[torch.Tensor]) -> None:
        """An operation of the unit that runs: it may read a weight of another one."""
        host = self._open_units[-1][0]
        for tensor in inputs:
            holders = self._holders.get(id(tensor), ())
            if holders and host not in holders:
                self._guests.setdefault(holders[0], {})[host] = None

    def before_glue(self, inputs: Sequence[torch.Tensor]) -> None:
        """An operation outside the units runs where the weight it reads lives, else where its data is."""
        owners = (self._owner_of_weight.get(id(storage_of(tensor))) for tensor in inputs)
        owner = next((owner for owner in owners if owner in self._position), None)
        place = self._traffic.cheapest_place(inputs) if owner is None else self._position[owner]
        self._reads_weight = owner is not None
        self._glue_unit = self.order[place] if place is not None and place < len(self.order) else None

    def add_seconds(self, seconds: float) -> None:
        """An operation outside the units took so long."""
        if self._current is not None:
            self.seconds[self._current] += seconds

    def after_glue(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        unit, reads_weight = self._current, self._reads_weight
        self._glue_unit, self._reads_weight = None, False
        if not outputs:
            return  # reading a shape or a dtype is no use
        for tensor in inputs:
            direct = self._direct.get(id(storage_of(tensor)))
            if direct is None:
                continue
            reads_weight |= direct.is_parameter
            if direct.name not in self._near:
                self._near[direct.name] = unit
                if unit is None:
                    self._waiting.append(direct.name)
        place = 0 if unit is None else self._position[unit]
        moved = [self._traffic.used(tensor, place) for tensor in inputs]
        if reads_weight or any(moved):
            for tensor in outputs:
                self._traffic.made(tensor, place)

    def trace(self, stateful_buffers: tuple[str, ...], seconds: dict[str, float] | None) -> Trace:
        sizes = sizes_only(self._root, self._units, stateful_buffers)
        first_calls = {unit: position for position, unit in enumerate(self.order)}
        flows = tuple(
            Flow(self.order[maker], tuple(self.order[user] for user in users), num_bytes)
            for (maker, *users), num_bytes in self._traffic.flows().items()
            if maker < len(self.order)
        )
        units = tuple(
            replace(
                unit,
                first_call=first_calls.get(unit.name),
                num_calls=self._calls[unit.name],
                output_bytes=self._output_bytes[unit.name],
                activation_bytes=max(self._saved_bytes[unit.name], self._memory_bytes[unit.name]),
                flops=self._flops[unit.name],
                moved_bytes=self._moved_bytes[unit.name],
                needs_weight_gradient=self._output_gradient[unit.name] and self._is_trainable(unit.name),
                needs_input_gradient=self._input_gradient[unit.name],
                seconds=None if seconds is None else seconds[unit.name],
            )
            for unit in sizes.units
        )
        tensors = tuple(replace(tensor, near_unit=self._near.get(tensor.name)) for tensor in sizes.tensors)
        return replace(
            sizes,
            units=units,
            tensors=tensors,
            source="run",
            has_gradients=self._has_gradients,
            flows=flows,
            guests=tuple((guest, tuple(hosts)) for guest, hosts in self._guests.items()),
        )


class _GlueWatch(TorchFunctionMode):
    """Tells the recorder, operation by operation, whose weights the code outside the units reads."""

    def __init__(self, recorder: _CostRecorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        recorder = self._recorder
        if recorder._open_units:
            recorder.inside(_tensors((args, kwargs)))
            return func(*args, **kwargs)
        inputs = [tensor for tensor in _tensors((args, kwargs)) if storage_of(tensor) is not None]
        recorder.before_glue(inputs)
        outputs: list[torch.Tensor] = []
        start = recorder._now()
        try:
            result = func(*args, **kwargs)
            recorder.add_seconds(recorder._now() - start)
            outputs = [tensor for tensor in _tensors(result) if storage_of(tensor) is not None]
            return result
        finally:
            recorder.after_glue(inputs, outputs)


def _keep(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _tensors(value: object) -> Iterator[torch.Tensor]:
    return (leaf for leaf in trees.leaves(value) if isinstance(leaf, torch.Tensor))
