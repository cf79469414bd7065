"""The inputs of a step are those of pp_rank 0: sent to the other stages in one message when the step starts.

Tensors, numbers, strings, arrays and the results of ``smp_slice`` travel; modules, optimizers, devices and other
objects stay local, since each process has its own. Scripts feed placeholders of any shape on the other stages.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modelparallel import trees
from modelparallel.comm.stages.transport import MessageKind, MessageName, StageTransport
from modelparallel.errors import StepUsageError
from modelparallel.pipeline.batch_lists import SlicedObject
from modelparallel.pipeline.values.in_place import element_range
from modelparallel.pipeline.values.stage_tensor import TensorSpec, is_dense
from modelparallel.pipeline.values.structures import TensorPickler
from modelparallel.pipeline.values.wire import TENSORS_PER_MESSAGE, pack, receive_tensors
from modelparallel.torch_compat.private_parts import sparse_indices, sparse_values

_TRAVELLING = (int, float, complex, str, bytes, bool, type(None), torch.dtype, SlicedObject)


class _OwnObject:
    """Stands for an object that does not travel: the receiver takes its own at this path. No dataclass: those are
    containers.
    """

    def __init__(self, path: trees.Path) -> None:
        self.path = path


@dataclass(frozen=True)
class _Envelope:
    payload: bytes
    specs: tuple[TensorSpec, ...]
    parts: tuple[_PackedTensor, ...]


@dataclass(frozen=True)
class _PackedTensor:
    """A tensor as a view of the flat tensor ``index`` of the message, in elements."""

    index: int
    spec: TensorSpec
    offset: int


class _InputPickler(TensorPickler):
    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_nested:
            return self.taken_out(value)
        return None

    def reducer_override(self, value: Any) -> Any:
        """Sparse tensors travel as their parts."""
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        if value.is_nested or value.layout not in _SPARSE_PARTS:
            raise pickle.PicklingError(f"a tensor of layout {value.layout}")
        parts = [part(value.detach()) for part in _SPARSE_PARTS[value.layout]]
        is_coalesced = value.layout is torch.sparse_coo and value.is_coalesced()
        return _sparse_tensor, (value.layout, tuple(parts), tuple(value.shape), is_coalesced)


_SPARSE_PARTS: dict[torch.layout, tuple[Callable[..., torch.Tensor], ...]] = {
    torch.sparse_coo: (sparse_indices, sparse_values),
    torch.sparse_csr: (torch.Tensor.crow_indices, torch.Tensor.col_indices, torch.Tensor.values),
    torch.sparse_csc: (torch.Tensor.ccol_indices, torch.Tensor.row_indices, torch.Tensor.values),
}


def _sparse_tensor(
    layout: torch.layout, parts: tuple[torch.Tensor, ...], shape: tuple[int, ...], is_coalesced: bool
) -> torch.Tensor:
    if layout is torch.sparse_coo:
        indices, values = parts
        return torch.sparse_coo_tensor(indices, values, shape, is_coalesced=is_coalesced)
    outer, inner, values = parts
    return torch.sparse_compressed_tensor(outer, inner, values, shape, layout=layout)


class _InputUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[torch.Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: Any) -> Any:
        return self._tensors[pid]


def _in_parts(tensors: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[TensorSpec], list[_PackedTensor]]:
    """(what travels, its specs, per tensor how it is cut from what travels): tensors that share memory travel as one,
    so that they share it on every stage.
    """
    sharing: dict[tuple[int, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.layout is torch.strided and tensor.numel():
            sharing.setdefault((tensor.untyped_storage().data_ptr(), tensor.dtype), []).append(index)
    parts: dict[int, _PackedTensor] = {}
    travelling: list[torch.Tensor] = []
    for members in sharing.values():
        if len(members) == 1:
            continue
        ranges = [element_range(tensors[index]) for index in members]
        first, last = min(start for start, _ in ranges), max(end for _, end in ranges)
        for index in members:
            tensor = tensors[index]
            parts[index] = _PackedTensor(len(travelling), TensorSpec.of(tensor), int(tensor.storage_offset()) - first)
        travelling.append(tensors[members[0]].detach().as_strided((last + 1 - first,), (1,), first))
    for index, tensor in enumerate(tensors):
        if index not in parts:
            parts[index] = _PackedTensor(len(travelling), TensorSpec.of(tensor), -1)
            travelling.append(tensor.detach())
    specs = [TensorSpec.of(tensor) for tensor in travelling]
    return travelling, specs, [parts[index] for index in range(len(tensors))]


def _from_parts(received: list[torch.Tensor], parts: Sequence[_PackedTensor]) -> list[torch.Tensor]:
    return [
        received[part.index]
        if part.offset < 0
        else received[part.index].as_strided(part.spec.shape, part.spec.stride, part.offset).data
        for part in parts
    ]


@dataclass(frozen=True)
class _MessagePart:
    """Some of the tensors of the inputs: those from ``start`` on, one for each spec."""

    name: MessageName
    start: int
    specs: Sequence[TensorSpec]


def _message_parts(specs: Sequence[TensorSpec], step: int) -> list[_MessagePart]:
    return [
        _MessagePart(
            MessageName(MessageKind.INPUTS, 1 + index, step), start, specs[start : start + TENSORS_PER_MESSAGE]
        )
        for index, start in enumerate(range(0, len(specs), TENSORS_PER_MESSAGE))
    ]


def _on_device(
    received: Sequence[torch.Tensor | None], specs: Sequence[TensorSpec], device: torch.device
) -> list[torch.Tensor]:
    return [
        tensor.to(device) if spec.device_type != "cpu" else tensor
        for tensor, spec in zip(received, specs, strict=True)
        if tensor is not None
    ]


def share_inputs(
    transport: StageTransport, arguments: dict[str, Any], extra: Any, step: int, device: torch.device
) -> tuple[dict[str, Any], Any]:
    """(arguments, extra) of pp_rank 0 on every stage. Collective over PP_GROUP; ``step`` numbers the calls."""
    name = MessageName(MessageKind.INPUTS, 0, step)
    what = "the inputs of the step"
    if transport.stage != 0:
        envelope: _Envelope = pickle.loads(transport.receive_object(0, name, what))
        tensors: list[torch.Tensor] = []
        for part in _message_parts(envelope.specs, step):
            tensors += _on_device(receive_tensors(transport, 0, part.name, part.specs, what), part.specs, device)
        return _unpickled(envelope.payload, _from_parts(tensors, envelope.parts), arguments)
    travelling = trees.map_leaves_with_path(lambda path, leaf: leaf if _travels(leaf) else _OwnObject(path), arguments)
    file = io.BytesIO()
    pickler = _InputPickler(file)
    try:
        pickler.dump((travelling, extra))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        which = next((f"{name!r} ({type(value).__name__})" for name, value in arguments.items() if _stays(value)), "")
        raise StepUsageError(
            f"smp.step: argument {which} cannot travel from pp_rank 0 to the other stages ({error}): pass tensors, "
            "numbers, strings and containers of them"
        ) from error
    travelling_tensors, specs, parts = _in_parts(pickler.tensors)
    payload = pickle.dumps(_Envelope(file.getvalue(), tuple(specs), tuple(parts)))
    # Packed once for all peers; scripts may go on to write into their batch while the step runs.
    packed = [
        (part.name, *pack(travelling_tensors[part.start : part.start + len(part.specs)], part.specs))
        for part in _message_parts(specs, step)
    ]
    for peer in transport.peers():
        transport.send_object(peer, name, payload, what)
        for part_name, presence, flat in packed:
            transport.send(peer, part_name, flat, what, presence=presence)
    # The others get a slice with gaps (ids[:, :-1]) row by row. Strides decide which results are known already, so they
    # must be the same here.
    with_gaps = [part.offset < 0 and not is_dense(part.spec.shape, part.spec.stride) for part in parts]
    if not any(with_gaps):
        return arguments, extra
    pairs = zip(pickler.tensors, with_gaps, strict=True)
    own = [tensor.contiguous() if has_gaps else tensor for tensor, has_gaps in pairs]
    return _unpickled(file.getvalue(), own, arguments)


def _unpickled(payload: bytes, tensors: list[torch.Tensor], arguments: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    shared, extra = _InputUnpickler(io.BytesIO(payload), tensors).load()
    own_objects = trees.map_leaves(lambda leaf: _own(leaf, arguments) if isinstance(leaf, _OwnObject) else leaf, shared)
    return own_objects, extra


def _travels(leaf: Any) -> bool:
    if isinstance(leaf, (torch.Tensor, *_TRAVELLING)):
        return True
    return type(leaf).__module__ == "numpy"  # arrays and numbers


def _own(placeholder: _OwnObject, arguments: dict[str, Any]) -> Any:
    value: Any = arguments
    for key in placeholder.path:
        try:
            value = dict(trees.children(value))[key]
        except (KeyError, TypeError):
            where = ".".join(str(part) for part in placeholder.path)
            raise StepUsageError(
                f"smp.step: the argument at '{where}' on pp_rank 0 is an object that does not travel between stages, "
                "and this stage was called "
                "without one there: pass the same modules, optimizers and other objects on every rank"
            ) from None
    return value


def _stays(value: Any) -> bool:
    """Whether an argument cannot be pickled."""
    try:
        _InputPickler(io.BytesIO()).dump(trees.map_leaves(lambda leaf: leaf if _travels(leaf) else None, value))
    except (pickle.PicklingError, AttributeError, TypeError):
        return True
    return False
