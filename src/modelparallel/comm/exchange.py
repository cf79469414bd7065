"""Collectives of a group on plain tensors: no autograd, started first and waited for later, so that work may go on.

[Note: point to point on CPU] gloo's own collectives copy what they send and go round a ring. Between the few ranks of a
tensor-parallel group, sends straight from the tensor and receives straight into the result take about half the time for
every collective here (measured with 2 and 4 processes, 256 KiB to 8 MiB). On GPUs NCCL's collectives are used where all
ranks have equal parts.

[Note: equal bits] Every rank must hold the same bits of what is summed everywhere: with two ranks a sum is the same in
both orders; with more, each part is added up by one rank and then gathered.

Every function is collective over ``group``; ranks must call them in the same order, with counts that agree: a message
of an unexpected length ends the process in gloo, and hangs in NCCL.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from modelparallel.comm.event_log import user_code_line
from modelparallel.comm.host_copies import goes_by_host, on_host
from modelparallel.errors import CommunicationError, DivergenceError, WaitTimeoutError

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group

#: Apart from what scripts send over the same process group.
_TAG = 5221
#: Up to this many bytes everybody gets everything and adds it up: one round of messages in place of two.
_SMALL_BYTES = 32768
#: Integers in the first message of `exchange_integers`, 512 bytes whoever asks: what is as long can be compared.
_FRAME = 63


@dataclass(frozen=True)
class Transfer:
    """An operation of a collective that has been started: a message to or from the rank ``peer`` of the group, or
    (None) with all of them.
    """

    work: Any
    peer: int | None = None
    is_receive: bool = True


class Pending:
    """A collective that has been started. ``wait()`` gives its result; call it once."""

    def __init__(
        self,
        transfers: Sequence[Transfer],
        finish: Callable[[], torch.Tensor],
        group: Group | None = None,
        kept: Sequence[torch.Tensor] = (),
    ) -> None:
        self._transfers = transfers
        self._finish = finish
        self._group = group
        self._kept = kept  # what is being sent must stay alive

    def wait(self) -> torch.Tensor:
        """The result; on a GPU the current stream waits, not the caller.

        Raises WaitTimeoutError when a rank does not come within the group's ``timeout_seconds``, CommunicationError
        when it has gone.
        """
        for transfer in self._transfers:
            try:
                if transfer.peer is None or self._group is None:  # of a GPU: its backend has a watch of its own
                    transfer.work.wait()
                else:
                    transfer.work.wait(_limit(self._group.timeout_seconds))
            except RuntimeError as error:
                raise _failure(self._group, error, transfer) from error
        result = self._finish()
        self._transfers, self._kept = (), ()
        return result


@functools.lru_cache(maxsize=16)
def _limit(seconds: float) -> timedelta:
    return timedelta(seconds=seconds)


_Start = Callable[..., Pending]


def _by_host_if_needed(start: _Start) -> _Start:
    """``start(tensors, group, ...)``, of copies on the CPU where the group does not carry tensors of a GPU."""

    @functools.wraps(start)
    def started(tensors: torch.Tensor | Sequence[torch.Tensor], group: Group, *args: Any) -> Pending:
        first = tensors if isinstance(tensors, torch.Tensor) else tensors[0]
        if not goes_by_host(first, group.process_group):
            return start(tensors, group, *args)
        copies = on_host(tensors) if isinstance(tensors, torch.Tensor) else [on_host(tensor) for tensor in tensors]
        pending = start(copies, group, *args)
        return Pending((), lambda: pending.wait().to(first.device), group)

    return started


@_by_host_if_needed
def start_gather_rows(rows: torch.Tensor, group: Group, counts: Sequence[int]) -> Pending:
    """``rows`` of all ranks, one after another along dim 0; ``counts``: how many each rank has."""
    gathered = rows.new_empty((sum(counts), *rows.shape[1:]))
    if rows.is_meta:
        return _done(gathered)
    rows = rows.contiguous()
    if rows.is_cuda and len(set(counts)) == 1:
        work = _all_gather_single(gathered, rows, group=group.process_group, async_op=True)
        return Pending([Transfer(work)], lambda: gathered, group, [rows])
    blocks = list(gathered.split(list(counts)))
    works = _start_blocks(blocks, [rows] * group.size, group)
    return Pending(works, lambda: gathered, group, [rows])


@_by_host_if_needed
def start_reduce_rows(rows: torch.Tensor, group: Group, counts: Sequence[int]) -> Pending:
    """This rank's part of the sum of ``rows`` over all ranks; ``counts``: the lengths of the parts along dim 0."""
    own = counts[group.rank_in_group]
    if rows.is_meta:
        return _done(rows.new_empty((own, *rows.shape[1:])))
    rows = rows.contiguous()
    if rows.is_cuda and len(set(counts)) == 1:
        reduced = rows.new_empty((own, *rows.shape[1:]))
        work = _reduce_scatter_single(reduced, rows, group=group.process_group, async_op=True)
        return Pending([Transfer(work)], lambda: reduced, group, [rows])
    return start_reduce_blocks(list(rows.split(list(counts))), group)


@_by_host_if_needed
def start_reduce_blocks(blocks: Sequence[torch.Tensor], group: Group) -> Pending:
    """The sum over all ranks of the block that each has for this rank; block i is for rank i, and may be any view."""
    own = blocks[group.rank_in_group]
    if own.is_meta:
        return _done(torch.empty_like(own))
    sent = [block.contiguous() for block in blocks]
    received = _buffers(sent[group.rank_in_group], group)
    works = _start_blocks(received, sent, group)

    def finish() -> torch.Tensor:
        # In the order of the ranks, so that the result does not depend on whose it is.
        if group.size == 2:
            other = received[1 - group.rank_in_group]
            return torch.add(received[0], received[1], out=other)
        return torch.stack(received).sum(0)

    return Pending(works, finish, group, sent)


@_by_host_if_needed
def start_gather_blocks(block: torch.Tensor, group: Group) -> Pending:
    """``block`` of all ranks, side by side along the last dim: [..., w] -> [..., t * w]; all widths must be equal."""
    shape = (*block.shape[:-1], block.shape[-1] * group.size)
    if block.is_meta:
        return _done(block.new_empty(shape))
    block = block.contiguous()
    received = _buffers(block, group)
    works = _start_blocks(received, [block] * group.size, group)
    return Pending(works, lambda: torch.cat(received, -1), group, [block])


@_by_host_if_needed
def start_all_reduce(tensor: torch.Tensor, group: Group) -> Pending:
    """The sum of ``tensor`` over all ranks, equal to the last bit on all of them; ``tensor`` itself is left alone."""
    if tensor.is_meta:
        return _done(torch.empty_like(tensor))
    if tensor.is_cuda:
        total = tensor.clone(memory_format=torch.contiguous_format)
        work = dist.all_reduce(total, group=group.process_group, async_op=True)
        return Pending([Transfer(work)], lambda: total, group)
    tensor = tensor.contiguous()
    if group.size == 2 or tensor.numel() * tensor.element_size() <= _SMALL_BYTES:
        return start_reduce_blocks([tensor] * group.size, group)
    flat = tensor.view(-1)
    counts = [len(part) for part in torch.arange(flat.numel()).tensor_split(group.size)]
    scattered = start_reduce_rows(flat, group, counts)
    return Pending([], lambda: start_gather_rows(scattered.wait(), group, counts).wait().view(tensor.shape), group)


@_by_host_if_needed
def start_split_features(matrix: torch.Tensor, group: Group, counts: Sequence[int]) -> Pending:
    """[own rows, F] -> [rows of all ranks, F/t]."""
    received = matrix.new_empty((sum(counts), matrix.shape[1] // group.size))
    if matrix.is_meta:
        return _done(received)
    sent = [part.contiguous() for part in matrix.chunk(group.size, 1)]
    return Pending(_start_blocks(list(received.split(list(counts))), sent, group), lambda: received, group, sent)


@_by_host_if_needed
def start_merge_features(matrix: torch.Tensor, group: Group, counts: Sequence[int]) -> Pending:
    """[rows of all ranks, F/t] -> [own rows, F]."""
    if matrix.is_meta:
        return _done(matrix.new_empty((counts[group.rank_in_group], matrix.shape[1] * group.size)))
    matrix = matrix.contiguous()
    sent = matrix.split(list(counts))
    received = _buffers(sent[group.rank_in_group], group)
    works = _start_blocks(received, sent, group)
    return Pending(works, lambda: torch.cat(received, 1), group, [matrix])


def exchange_integers(values: Sequence[int], group: Group, who: str) -> tuple[tuple[int, ...], ...]:
    """The ``values`` of every rank, in the order of rank_in_group: a small message to each, and another one for more
    than 63. Every rank must give equally many.

    ``who`` asks (a layer, by its full name if it has one). Raises DivergenceError on all ranks, before anything else is
    sent, if they do not all ask the same: ranks that call different layers, as a mixture of experts does whose routing
    differs from rank to rank, would take each other's tensors for their own.
    """
    if group.size == 1:
        return (tuple(values),)
    identity = zlib.crc32(f"{who} {len(values)}".encode())
    rows = _exchange_frames([identity, *values[:_FRAME]], 1 + _FRAME, group)
    differing = [rank for rank, row in enumerate(rows) if row[0] != identity]
    if differing:
        raise DivergenceError(
            f"{who}: the ranks of the {group.kind} group {list(group.ranks)} called different layers; this is rank "
            f"{group.rank_in_group} of the group, and rank {differing[0]} called another one. Layers that are split "
            "must be called in the same order on all of them: switch tensor parallelism off for layers that are called "
            "depending on the data (experts), smp.set_tensor_parallelism(module, False), or split the model by a plan"
        )
    rest = list(values[_FRAME:])
    more = _exchange_frames(rest, len(rest), group) if rest else [[]] * group.size
    return tuple((*row[1 : 1 + min(len(values), _FRAME)], *extra) for row, extra in zip(rows, more, strict=True))


def _exchange_frames(values: list[int], length: int, group: Group) -> list[list[int]]:
    device = torch.device("cpu") if _has_cpu_backend(group) else torch.device("cuda", torch.cuda.current_device())
    own = torch.tensor([values + [0] * (length - len(values))], dtype=torch.int64, device=device)
    rows: list[list[int]] = start_gather_rows(own, group, (1,) * group.size).wait().tolist()
    return rows


def _buffers(own: torch.Tensor, group: Group) -> list[torch.Tensor]:
    """Where blocks of the shape of ``own`` come to; on the CPU the own block stays where it is."""
    return [
        own if rank == group.rank_in_group and not own.is_cuda else torch.empty_like(own) for rank in range(group.size)
    ]


def _done(result: torch.Tensor) -> Pending:
    return Pending((), lambda: result)


def _start_blocks(received: list[torch.Tensor], sent: Sequence[torch.Tensor], group: Group) -> list[Transfer]:
    """Block i of ``sent`` goes to rank i, whose block comes into block i of ``received``. All are contiguous."""
    own = group.rank_in_group
    try:
        if sent[own].is_cuda:
            work = dist.all_to_all(received, list(sent), group=group.process_group, async_op=True)
            return [Transfer(work)]
        process_group = group.process_group
        peers = [rank for rank in range(group.size) if rank != own]
        transfers = [
            Transfer(process_group.recv([received[peer]], peer, _TAG), peer) for peer in peers if received[peer].numel()
        ]
        transfers += [
            Transfer(process_group.send([sent[peer]], peer, _TAG), peer, False) for peer in peers if sent[peer].numel()
        ]
    except RuntimeError as error:
        raise _failure(group, error) from error
    if received[own].data_ptr() != sent[own].data_ptr():
        received[own].copy_(sent[own])
    return transfers


def _failure(group: Group | None, error: RuntimeError, transfer: Transfer | None = None) -> CommunicationError:
    if group is None:
        return CommunicationError(f"an exchange of tensors failed: {str(error).splitlines()[0]}")
    peer = None if transfer is None else transfer.peer
    who = f"the {group.kind} group {list(group.ranks)}" if peer is None else f"global rank {group.ranks[peer]}"
    is_send = transfer is not None and not transfer.is_receive
    what = (
        f"{group.layer + ': ' if group.layer else ''}global rank {group.ranks[group.rank_in_group]} waited at "
        f"{user_code_line()} for {who + ' to take a tensor' if is_send else 'a tensor of ' + who}"
    )
    if "timed out" in str(error).lower():
        return WaitTimeoutError(
            f"{what}, of the {group.kind} group of global ranks {list(group.ranks)}: it did not come within "
            f"timeout_seconds={group.timeout_seconds:g}. It is stopped, slow, or has not called this layer: split "
            "layers must be called by all ranks of the group in the same order; see its output"
        )
    return CommunicationError(
        f"{what}: the connection failed ({str(error).splitlines()[0]}): a process of the {group.kind} group of global "
        f"ranks {list(group.ranks)} has probably failed, or runs another program"
    )


def _has_cpu_backend(group: Group) -> bool:
    return "cpu:" in dist.get_backend_config(group.process_group)


# torch 2.13 renamed the two; 2.11 has only the old names.
_all_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
