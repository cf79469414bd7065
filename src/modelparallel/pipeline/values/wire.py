"""How tensors travel: their elements in the order of their storage where that is dense, else row by row; the tensors of
one event in one message.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from modelparallel.comm.host_copies import on_host
from modelparallel.comm.stages.transport import MessageName, StageTransport
from modelparallel.errors import DivergenceError
from modelparallel.pipeline.values.stage_tensor import TensorSpec, contiguous_stride, is_dense

#: Which tensors are in a message travels as bits of one int64.
TENSORS_PER_MESSAGE = 48


def send_tensors(
    transport: StageTransport,
    peer: int,
    name: MessageName,
    tensors: Sequence[torch.Tensor | None],
    specs: Sequence[TensorSpec],
    description: str = "",
    *,
    is_stable: Sequence[bool] | None = None,
) -> None:
    """Post tensors to stage ``peer``; None marks an absent one. Returns at once.

    ``is_stable``: which tensors nobody writes to before the end of the step; the others are copied, since they leave
    later.
    """
    device = transport.channel_device(peer)
    by_channel = device is not None and all(tensor is None or tensor.device == device for tensor in tensors)
    presence, payload = pack(tensors, specs, is_stable, by_channel=by_channel)
    transport.send(peer, name, payload, description, presence=presence, by_channel=by_channel and presence != 0)


def pack(
    tensors: Sequence[torch.Tensor | None],
    specs: Sequence[TensorSpec],
    is_stable: Sequence[bool] | None = None,
    *,
    by_channel: bool = False,
) -> tuple[int, torch.Tensor]:
    """(which tensors are there, their bytes one after another) for :meth:`StageTransport.send`: on the CPU, or where
    they are if they go ``by_channel``.
    """
    presence = 0
    parts: list[torch.Tensor] = []
    for index, (tensor, spec) in enumerate(zip(tensors, specs, strict=True)):
        if tensor is None:
            continue
        presence |= 1 << index
        flat = _bytes_of(tensor, spec, by_channel=by_channel)
        if flat.numel() and flat.data_ptr() == tensor.data_ptr() and not (is_stable is not None and is_stable[index]):
            flat = flat.clone()
        parts.append(flat)
    if len(parts) == 1:
        return presence, parts[0]
    return presence, torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


def receive_tensors(
    transport: StageTransport, source: int, name: MessageName, specs: Sequence[TensorSpec], description: str = ""
) -> list[torch.Tensor | None]:
    """Wait for the tensors that :func:`send_tensors` sends, and return them, absent ones as None. Each has memory of
    its own, on the CPU, or on this process's GPU if they have come by a channel.
    """
    message = transport.receive(source, name, description)
    if message.make_ready is not None:
        message.make_ready()
    present = [bool(message.presence >> index & 1) for index in range(len(specs))]
    expected = sum(spec.num_bytes for spec, is_there in zip(specs, present, strict=True) if is_there)
    size = message.payload.numel()
    if size != expected:
        raise DivergenceError(
            f"pp_rank {transport.stage}: {name} ({description}) from pp_rank {source} has {size} bytes, expected "
            f"{expected}: the stages disagree about its shapes. Do all ranks run the same program on the same inputs?"
        )
    result: list[torch.Tensor | None] = []
    start = 0
    for spec, is_there in zip(specs, present, strict=True):
        if not is_there:
            result.append(None)
            continue
        part = message.payload
        if spec.num_bytes != size:
            part = part[start : start + spec.num_bytes].clone()
        start += spec.num_bytes
        result.append(_typed(part, spec))
    return result


def _bytes_of(tensor: torch.Tensor, spec: TensorSpec, *, by_channel: bool) -> torch.Tensor:
    tensor = tensor.detach()
    if is_dense(spec.shape, spec.stride) and not _is_in_order(spec.stride):
        tensor = tensor.permute(sorted(range(len(spec.shape)), key=lambda dim: -spec.stride[dim]))
    if not by_channel:
        tensor = on_host(tensor)
    return tensor.contiguous().view(-1).view(torch.uint8)


def _is_in_order(stride: Sequence[int]) -> bool:
    return all(first >= second for first, second in itertools.pairwise(stride))


def _typed(part: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """The bytes ``part``, whose memory nobody else uses, as a tensor of this spec (contiguous where that is not
    dense).
    """
    stride = spec.stride if is_dense(spec.shape, spec.stride) else contiguous_stride(spec.shape)
    result = torch.empty(0, dtype=spec.dtype, device=part.device)
    start = int(part.storage_offset()) // result.element_size()
    return result.set_(part.untyped_storage(), start, spec.shape, stride)
