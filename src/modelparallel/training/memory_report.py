"""``smp.memory_report()``: what each rank holds, what was predicted, and what the process takes (docs/memory.md)."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from modelparallel.config.topology import CommGroup, GroupKind
from modelparallel.errors import OutOfMemoryError
from modelparallel.job.messages import allgather
from modelparallel.parameters.shards import local_part
from modelparallel.plan.memory_estimate import MemoryEstimate, MemorySettings, ParameterGroup, estimate_memory
from modelparallel.plan.partition import readable_bytes
from modelparallel.training import runtime as runtime_module

if TYPE_CHECKING:
    from modelparallel.training.participants import Participant
    from modelparallel.training.runtime import Runtime

logger = logging.getLogger("modelparallel")

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class RankMemory:
    """What one rank holds now, in bytes; storages are counted once, in the first category that they belong to.

    Attributes:
        parameters, buffers: of the wrapped models, what this rank holds.
        gradients: of the parameters, of masters and of shards, apart from those that are views of buckets.
        buckets: flat memory of the reduction.
        optimizer_state: what wrapped optimizers keep, and what they update in place of parameters (masters, shards).
        activations: what the microbatches in flight at the peak of the last step kept for their backward: the bytes
            that the traced microbatch saved on this stage, times the microbatches in flight. None where the model was
            not traced: without pipelining, or partitioned by sizes.
        device_allocated, device_peak: what torch's CUDA allocator has given out, now and at most; None without CUDA.
        resident, resident_peak: memory of the process (VmRSS, VmHWM); None where the system does not tell.
        predicted: the estimate for this rank, from the formula.
    """

    global_rank: int
    stage: int
    parameters: int
    gradients: int
    optimizer_state: int
    buffers: int
    buckets: int
    activations: int | None
    device_allocated: int | None
    device_peak: int | None
    resident: int | None
    resident_peak: int | None
    predicted: MemoryEstimate

    @property
    def held(self) -> int:
        """The sum of the categories that are known."""
        known = (self.parameters, self.gradients, self.optimizer_state, self.buffers, self.buckets)
        return sum(known) + (self.activations or 0)

    def items(self) -> Iterator[tuple[str, int | None]]:
        """(column, bytes), in order."""
        yield "parameters", self.parameters
        yield "gradients", self.gradients
        yield "optimizer", self.optimizer_state
        yield "buffers", self.buffers
        yield "buckets", self.buckets
        yield "activations", self.activations
        yield "held", self.held
        yield "predicted", self.predicted.total
        yield "CUDA now", self.device_allocated
        yield "CUDA peak", self.device_peak
        yield "resident", self.resident
        yield "resident peak", self.resident_peak


@dataclass(frozen=True)
class MemoryReport:
    """The memory of the ranks, ascending; prints as a table."""

    ranks: tuple[RankMemory, ...]

    def __str__(self) -> str:
        columns = [name for name, _ in self.ranks[0].items() if any(dict(rank.items())[name] for rank in self.ranks)]
        rows = [["rank", "stage", *columns]]
        for rank in self.ranks:
            values = dict(rank.items())
            cells = ("-" if values[name] is None else readable_bytes(values[name] or 0) for name in columns)
            rows.append([str(rank.global_rank), str(rank.stage), *cells])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def memory_report(is_local: bool = False) -> MemoryReport:
    """What the ranks hold in parameters, gradients, optimizer state, buffers, buckets and activations, what the formula
    predicts, and what each process takes, in bytes. Collective over the world. Ours, not the original's.

    Call it outside the step function; after the first update, if optimizer state is to be in it.

    Args:
        is_local: the caller's rank only; the call is local then.

    Returns:
        A frozen record that prints as a table; see `RankMemory` for what is counted.
    """
    own = rank_memory(runtime_module.current())
    return MemoryReport((own,) if is_local else tuple(allgather(own, CommGroup.WORLD)))


def rank_memory(runtime: Runtime) -> RankMemory:
    """The figures of this rank; local."""
    seen: set[int] = set()
    models = runtime.models
    stage = runtime.engine.stage
    parameters = [
        parameter for model in models for row, parameter in model.table.parameters() if model.table.is_local(row, stage)
    ]
    optimizers = runtime.live_optimizers()
    # Shards may be views of parameters, and gradients of buckets: in this order each is counted where it belongs.
    parameter_bytes = _bytes(parameters, seen)
    buffer_bytes = _bytes(
        (buffer for model in models for row, buffer in model.table.buffers() if model.table.is_local(row, stage)), seen
    )
    bucket_bytes = _bytes((flat for model in models for flat in model.gradients.flat_tensors()), seen)
    updated = [
        tensor for optimizer in optimizers for group in optimizer.optimizer.param_groups for tensor in group["params"]
    ]
    gradients = [tensor.grad for tensor in (*parameters, *updated) if tensor.grad is not None]
    gradient_bytes = _bytes(gradients, seen)
    local = {id(tensor) for tensor in parameters}
    state = [
        value
        for optimizer in optimizers
        for values in optimizer.optimizer.state.values()
        for value in (values.values() if isinstance(values, dict) else ())
        if isinstance(value, torch.Tensor)
    ]
    state += [tensor for tensor in updated if id(tensor) not in local]
    device = runtime.session.device
    is_cuda = device.type == "cuda"
    return RankMemory(
        runtime.session.identity.global_rank,
        stage,
        parameter_bytes,
        gradient_bytes,
        _bytes(state, seen),
        buffer_bytes,
        bucket_bytes,
        _activation_bytes(runtime, models),
        torch.cuda.memory_allocated(device) if is_cuda else None,
        torch.cuda.max_memory_allocated(device) if is_cuda else None,
        _of_process("VmRSS"),
        _of_process("VmHWM"),
        predicted_memory(runtime),
    )


def note_update(runtime: Runtime, path: Path | None) -> None:
    """An optimizer has made an update. After the first one, note what is held, and write it to ``path`` with the peaks
    when the process ends, for the launcher's summary of the job. Local.
    """
    if path is None or runtime.has_noted_memory:
        return
    runtime.has_noted_memory = True
    after_first = rank_memory(runtime)
    runtime.session.closers.append(lambda: _write_summary(runtime, after_first, path))


def _write_summary(runtime: Runtime, after_first: RankMemory, path: Path) -> None:
    device = runtime.session.device
    record = {
        "global_rank": after_first.global_rank, "stage": after_first.stage, "held": after_first.held,
        "predicted": after_first.predicted.total,
        "device_peak": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "resident_peak": _of_process("VmHWM"),
    }  # fmt: skip
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    except OSError as problem:
        logger.warning("cannot write the memory of rank %d to %s: %s", after_first.global_rank, path, problem)


def predicted_memory(runtime: Runtime) -> MemoryEstimate:
    """What the formula says of this rank, once its models are placed (before: of all that they hold); local."""
    config, groups = runtime.session.config, runtime.session.groups
    stage = runtime.engine.stage
    kinds: dict[tuple[int, bool], int] = {}
    buffer_bytes = reduced = 0
    for model in runtime.models:
        for row, parameter in model.table.parameters():
            if not model.table.is_local(row, stage):
                continue
            shape = (
                row.full_shape if row.split is None else row.split.local_shape(groups.tp.rank_in_group, groups.tp.size)
            )
            count = math.prod(shape)
            kind = (row.dtype.itemsize, parameter.requires_grad)
            kinds[kind] = kinds.get(kind, 0) + count
            group = groups.of(GroupKind(row.reducer_axis))
            reduced += count * row.dtype.itemsize if parameter.requires_grad and group.size > 1 else 0
        for row, buffer in model.table.buffers():
            if model.table.is_local(row, stage):
                buffer_bytes += buffer.nbytes
    decisions, degree = runtime.decisions, config.sharded_data_parallel_degree
    settings = MemorySettings(
        optimizer_tensors=_optimizer_tensors(runtime),
        has_masters=decisions.half is not None,
        parameter_shards=degree,
        gradient_shards=degree,
        optimizer_shards=decisions.optimizer_shards,
    )
    has_buckets = (
        groups.dp.size > 1
        and not decisions.shards_parameters
        and not any(model.gradients.are_views_of_buckets for model in runtime.models)
    )
    planned = [_planned_activations(model, stage) for model in runtime.models]
    return estimate_memory(
        [ParameterGroup(count, size, is_trained) for (size, is_trained), count in sorted(kinds.items())],
        settings,
        buffer_bytes=buffer_bytes,
        bucket_bytes=reduced if has_buckets else 0,
        activation_bytes=sum(planned),
    )


def _planned_activations(model: Participant, stage: int) -> int:
    plan = model.partition_plan
    if plan is None or not plan.figures:
        return 0
    figures = plan.figures[stage]
    return max(figures.memory_bytes - figures.state_bytes, 0)


def _optimizer_tensors(runtime: Runtime) -> int:
    """State tensors of a parameter's size: those that there are, or Adam's two before the first update."""
    counts = [
        sum(isinstance(value, torch.Tensor) and value.numel() == tensor.numel() > 1 for value in values.values())
        for optimizer in runtime.live_optimizers()
        for tensor, values in optimizer.optimizer.state.items()
        if isinstance(values, dict) and isinstance(tensor, torch.Tensor)
    ]
    return max(counts, default=2)


def _activation_bytes(runtime: Runtime, models: Iterable[Participant]) -> int | None:
    stage, in_flight = runtime.engine.stage, runtime.engine.last_peak_active
    traced = [plan.figures[stage] for model in models if (plan := model.partition_plan) is not None and plan.figures]
    if not traced or not any(figures.activation_bytes for figures in traced):
        return None
    return sum(figures.activation_bytes for figures in traced) * in_flight


def _bytes(tensors: Iterable[Any], seen: set[int]) -> int:
    """The bytes of the storages behind ``tensors`` that are not in ``seen``."""
    total = 0
    for tensor in tensors:
        local = local_part(tensor)
        if local.layout != torch.strided:
            continue
        storage = local.untyped_storage()
        if storage.device.type == "meta" or (storage.data_ptr() in seen and storage.nbytes()):
            continue
        seen.add(storage.data_ptr())
        total += storage.nbytes()
    return total


def _of_process(key: str) -> int | None:
    """A line of the system's account of this process, in bytes."""
    try:
        text = _STATUS.read_text()
    except OSError:
        return None
    own_line = next((line for line in text.splitlines() if line.startswith(f"{key}:")), None)
    return None if own_line is None else int(own_line.split()[1]) * 1024


# Running out


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, that of a device, or that of torch's allocator."""
    if isinstance(error, OutOfMemoryError):
        return False
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)


class ExplainedMemory:
    """A context in which OutOfMemoryError, with what is known, takes the place of an error that says that memory ran
    out. ``doing``: what is done in it, with ``{}`` for the ``parts``.
    """

    __slots__ = ("_doing", "_parts", "_runtime")

    # A class and not a generator: each step enters some, which would take it a microsecond each.
    def __init__(self, runtime: Runtime, doing: str, *parts: object) -> None:
        self._runtime, self._doing, self._parts = runtime, doing, parts

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, (RuntimeError, MemoryError)) and is_out_of_memory(error):
            raise explain_out_of_memory(self._runtime, error, self._doing.format(*self._parts)) from error


def explain_out_of_memory(runtime: Runtime, error: BaseException, doing: str) -> OutOfMemoryError:
    """The error to raise in place of ``error``, which came up while ``doing``: on which rank, what it holds, what the
    formula predicted, and three settings that would help. Local.
    """
    held = rank_memory(runtime)
    known = ", ".join(f"{name} {readable_bytes(count)}" for name, count in held.items() if count)
    predicted = ", ".join(f"{name} {readable_bytes(count)}" for name, count in held.predicted.items() if count)
    ways = "\n".join(f"  - {way}" for way in _ways_out(runtime, held)[:3])
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return OutOfMemoryError(
        f"global rank {held.global_rank} (pp_rank {held.stage}) ran out of memory {doing}: {first_line}\n"
        f"it holds: {known}\n"
        f"predicted: {predicted}, together {readable_bytes(held.predicted.total)}\n"
        f"what would help:\n{ways}"
    )


def _ways_out(runtime: Runtime, held: RankMemory) -> list[str]:
    """Settings that take less memory, the ones that fit this job and its largest part first."""
    config, groups = runtime.session.config, runtime.session.groups
    predicted = held.predicted
    activations = [
        f"more microbatches (microbatches: {2 * config.microbatches}), so that each has fewer samples",
        "recompute activations (smp.set_activation_checkpointing) instead of keeping them",
    ]
    if runtime.is_pipelined and config.active_microbatches > 1:
        activations.insert(1, f"fewer microbatches in flight (active_microbatches: {config.active_microbatches - 1})")
    state = []
    if groups.dp.size > 1 and not runtime.decisions.shares_out_parameters:
        state.append("share the optimizer state out (shard_optimizer_state: True)")
        state.append(f"share everything out (sharded_data_parallel_degree: {groups.dp.size})")
    state.append(f"more stages (pipeline_parallel_degree: {2 * config.pipeline_parallel_degree})")
    if runtime.decisions.half is None:
        state.append("half precision (bf16: True)")
    fixed = predicted.total - predicted.activations
    is_state = fixed > 2 * (held.activations or predicted.activations or fixed)
    first, second = (state, activations) if is_state else (activations, state)
    return [first[0], second[0], *first[1:], *second[1:]]
