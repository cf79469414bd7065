"""Collectives of a group on plain tensors: no autograd, started first and waited for later, so that work may go on.

[Note: point to point on CPU] gloo's own collectives copy what they send and go round a ring. Between the few ranks of a
tensor-parallel group, sends straight from the tensor and receives straight into the result take about half the time for
every collective here (measured with 2 and 4 processes, 256 KiB to 8 MiB). On GPUs NCCL's collectives are used where all
ranks have equal parts.

[Note: equal bits] Every rank must hold the same bits of what is summed everywhere: with two ranks a sum is the same in
both orders; with more, each part is added up by one rank and then gathered.

[Note: two spaces of tags] The messages of split layers follow the program of the step. Blocks of gradients are sent
when those are ready, and blocks of parameters when an optimizer has updated its own, which need not be at the same
place among the messages of split layers on every rank. So each of the two directions has a tag of its own.

Every function is collective over ``group``; ranks must call them in the same order, with counts that agree: a message
of an unexpected length ends the process in gloo, and hangs in NCCL.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import partial, wraps
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from modelparallel.comm.host_copies import goes_by_host, on_host
from modelparallel.comm.waits import Wait
from modelparallel.errors import DivergenceError
from modelparallel.torch_compat.process_groups import start_all_gather, start_reduce_scatter

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group

#: Apart from what scripts send over the same process group; see the note.
_LAYERS, _TO_OWNERS, _FROM_OWNERS = 5221, 5231, 5232
#: Up to this many bytes everybody gets everything and adds it up: one round of messages in place of two.
_SMALL_BYTES = 32768
#: Integers in the first message of `exchange_integers`, 512 bytes whoever asks: what is as long can be compared.
_FRAME = 63


_CPU = torch.device("cpu")
#: An operation of a collective that has been started, and what it waits for.
_Transfer = tuple[Any, Wait]


class Pending:
    """A collective that has been started. ``wait()`` gives its result."""

    def __init__(
        self,
        transfers: Sequence[_Transfer],
        finish: Callable[[], torch.Tensor],
        device: torch.device = _CPU,
        kept: Sequence[Any] = (),
        parts: Sequence[Pending] = (),
    ) -> None:
        """``device``: of the tensors; ``kept``: what is being sent must stay alive; ``parts``: what has to end first,
        of which ``finish`` takes the results.
        """
        self._transfers = transfers
        self._finish: Callable[[], torch.Tensor] | None = finish
        self._device = device
        self._kept = kept
        self._parts = parts
        self._result: torch.Tensor | None = None

    def wait(self, purpose: str = "", seconds: float = 0.0) -> torch.Tensor:
        """The result, also when asked again; on a GPU the current stream waits, not the caller. ``purpose`` and
        ``seconds`` as in `Wait`.

        Raises WaitTimeoutError when a rank does not come in time, CommunicationError when it has gone.
        """
        for part in self._parts:
            part.wait(purpose, seconds)
        for work, wait in self._transfers:
            wait.purpose, wait.seconds = purpose, seconds
            wait.end(work, self._device)
        if self._finish is not None:
            self._result = self._finish()
        self._transfers, self._kept, self._parts, self._finish = (), (), (), None
        assert self._result is not None
        return self._result


_Start = Callable[..., Pending]


def _by_host_if_needed(start: _Start) -> _Start:
    """``start(tensors, group, ...)``, of copies on the CPU where the group does not carry tensors of a GPU."""

    @wraps(start)
    def started(tensors: torch.Tensor | Sequence[torch.Tensor], group: Group, *args: Any) -> Pending:
        first = tensors if isinstance(tensors, torch.Tensor) else tensors[0]
        if not goes_by_host(first, group.process_group):
            return start(tensors, group, *args)
        copies = on_host(tensors) if isinstance(tensors, torch.Tensor) else [on_host(tensor) for tensor in tensors]
        pending = start(copies, group, *args)
        return Pending((), lambda: pending.wait().to(first.device), parts=[pending])

    return started


@_by_host_if_needed
def start_gather_rows(
    rows: torch.Tensor, group: Group, counts: Sequence[int], tag: int = _LAYERS, into: torch.Tensor | None = None
) -> Pending:
    """``rows`` of all ranks, one after another along dim 0; ``counts``: how many each rank has. ``into``: where the
    result is wanted, if it lies on the device of ``rows``; they may be a part of it.
    """
    is_given = into is not None and into.device == rows.device
    gathered = into if into is not None and is_given else rows.new_empty((sum(counts), *rows.shape[1:]))
    if rows.is_meta:
        return _done(gathered)
    rows = rows.contiguous()
    blocks = list(gathered.split(list(counts)))
    if rows.is_cuda:
        process_group, parts = group.process_group, [_real(block) for block in blocks]
        if len(set(counts)) == 1:
            start = partial(start_all_gather, _real(gathered), _real(rows), process_group)
        else:
            start = partial(dist.all_gather, parts, _real(rows), process_group, async_op=True)
        return _collective(start, group, gathered, [rows])
    works = _start_blocks(blocks, [rows] * group.size, group, tag)
    return Pending(works, lambda: gathered, kept=[rows])


@_by_host_if_needed
def start_reduce_rows(rows: torch.Tensor, group: Group, counts: Sequence[int], tag: int = _LAYERS) -> Pending:
    """This rank's part of the sum of ``rows`` over all ranks, in memory of its own; ``counts``: the lengths of the
    parts along dim 0.
    """
    own = counts[group.rank_in_group]
    if rows.is_meta:
        return _done(rows.new_empty((own, *rows.shape[1:])))
    rows = rows.contiguous()
    blocks = list(rows.split(list(counts)))
    if not rows.is_cuda:
        return start_reduce_blocks(blocks, group, tag)
    reduced, process_group = rows.new_empty((own, *rows.shape[1:])), group.process_group
    if len(set(counts)) == 1:
        start = partial(start_reduce_scatter, _real(reduced), _real(rows), process_group)
    else:
        parts = [_real(block) for block in blocks]
        start = partial(dist.reduce_scatter, _real(reduced), parts, group=process_group, async_op=True)
    return _collective(start, group, reduced, [rows])


@_by_host_if_needed
def start_reduce_blocks(blocks: Sequence[torch.Tensor], group: Group, tag: int = _LAYERS) -> Pending:
    """The sum over all ranks of the block that each has for this rank, in memory of its own; block i is for rank i, and
    may be any view.
    """
    own = blocks[group.rank_in_group]
    if own.is_meta:
        return _done(torch.empty_like(own))
    sent = [block.contiguous() for block in blocks]
    received = _buffers(sent[group.rank_in_group], group)
    works = _start_blocks(received, sent, group, tag)
    return Pending(works, lambda: _sum(received, group.rank_in_group), own.device, sent)


def start_to_owners(flat: torch.Tensor, bounds: Sequence[int], group: Group) -> Pending:
    """Each rank gets its own block of the sum of ``flat`` over the ranks; block i is from bounds[i] to bounds[i + 1].
    ``flat`` must stay as it is until the wait is over.
    """
    return start_reduce_rows(flat, group, _lengths(bounds), _TO_OWNERS)


def start_from_owners(flat: torch.Tensor, bounds: Sequence[int], group: Group) -> Pending:
    """Each rank gets the blocks of all others, in place."""
    own = flat[bounds[group.rank_in_group] : bounds[group.rank_in_group + 1]]
    gathering = start_gather_rows(own, group, _lengths(bounds), _FROM_OWNERS, flat)

    def finish() -> torch.Tensor:
        gathered = gathering.wait()
        return flat if gathered is flat else flat.copy_(gathered)

    return Pending((), finish, parts=[gathering])


@_by_host_if_needed
def start_gather_blocks(block: torch.Tensor, group: Group) -> Pending:
    """``block`` of all ranks, side by side along the last dim: [..., w] -> [..., t * w]; all widths must be equal."""
    shape = (*block.shape[:-1], block.shape[-1] * group.size)
    if block.is_meta:
        return _done(block.new_empty(shape))
    block = block.contiguous()
    received = _buffers(block, group)
    works = _start_blocks(received, [block] * group.size, group)
    return Pending(works, lambda: torch.cat(received, -1), block.device, [block])


@_by_host_if_needed
def start_all_reduce(tensor: torch.Tensor, group: Group) -> Pending:
    """The sum of ``tensor`` over all ranks, equal to the last bit on all of them; ``tensor`` itself is left alone."""
    if tensor.is_meta:
        return _done(torch.empty_like(tensor))
    if tensor.is_cuda:
        total = tensor.clone(memory_format=torch.contiguous_format)
        return _collective(partial(dist.all_reduce, total, group=group.process_group, async_op=True), group, total)
    tensor = tensor.contiguous()
    if group.size == 2 or tensor.numel() * tensor.element_size() <= _SMALL_BYTES:
        return start_reduce_blocks([tensor] * group.size, group)
    flat = tensor.view(-1)
    counts = [len(part) for part in torch.arange(flat.numel()).tensor_split(group.size)]
    scattered = start_reduce_rows(flat, group, counts)
    return Pending(
        (), lambda: start_gather_rows(scattered.wait(), group, counts).wait().view(tensor.shape), parts=[scattered]
    )


@_by_host_if_needed
def start_split_features(matrix: torch.Tensor, group: Group, counts: Sequence[int]) -> Pending:
    """[own rows, F] -> [rows of all ranks, F/t]."""
    received = matrix.new_empty((sum(counts), matrix.shape[1] // group.size))
    if matrix.is_meta:
        return _done(received)
    sent = [part.contiguous() for part in matrix.chunk(group.size, 1)]
    works = _start_blocks(list(received.split(list(counts))), sent, group)
    return Pending(works, lambda: received, matrix.device, sent)


@_by_host_if_needed
def start_merge_features(matrix: torch.Tensor, group: Group, counts: Sequence[int]) -> Pending:
    """[rows of all ranks, F/t] -> [own rows, F]."""
    if matrix.is_meta:
        return _done(matrix.new_empty((counts[group.rank_in_group], matrix.shape[1] * group.size)))
    matrix = matrix.contiguous()
    sent = matrix.split(list(counts))
    received = _buffers(sent[group.rank_in_group], group)
    works = _start_blocks(received, sent, group)
    return Pending(works, lambda: torch.cat(received, 1), matrix.device, [matrix])


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
    rows = _exchange_frames([identity, *values[:_FRAME]], 1 + _FRAME, group, who)
    differing = [rank for rank, row in enumerate(rows) if row[0] != identity]
    if differing:
        raise DivergenceError(
            f"{who}: the ranks of the {group.kind} group {list(group.ranks)} called different layers; this is rank "
            f"{group.rank_in_group} of the group, and rank {differing[0]} called another one. Layers that are split "
            "must be called in the same order on all of them: switch tensor parallelism off for layers that are called "
            "depending on the data (experts), smp.set_tensor_parallelism(module, False), or split the model by a plan"
        )
    rest = list(values[_FRAME:])
    more = _exchange_frames(rest, len(rest), group, who) if rest else [[]] * group.size
    return tuple((*row[1 : 1 + min(len(values), _FRAME)], *extra) for row, extra in zip(rows, more, strict=True))


def _exchange_frames(values: list[int], length: int, group: Group, who: str) -> list[list[int]]:
    device = torch.device("cpu") if _has_cpu_backend(group) else torch.device("cuda", torch.cuda.current_device())
    own = torch.tensor([values + [0] * (length - len(values))], dtype=torch.int64, device=device)
    rows: list[list[int]] = start_gather_rows(own, group, (1,) * group.size).wait(group.layer or who).tolist()
    return rows


def _buffers(own: torch.Tensor, group: Group) -> list[torch.Tensor]:
    """Where blocks of the shape of ``own`` come to; on the CPU the own block stays where it is."""
    return [
        own if rank == group.rank_in_group and not own.is_cuda else torch.empty_like(own) for rank in range(group.size)
    ]


def _collective(start: Callable[[], Any], group: Group, result: torch.Tensor, kept: Sequence[Any] = ()) -> Pending:
    wait = Wait(group)
    return Pending([(wait.started(start), wait)], lambda: result, result.device, kept)


def _done(result: torch.Tensor) -> Pending:
    return Pending((), lambda: result)


def _start_blocks(
    received: Sequence[torch.Tensor], sent: Sequence[torch.Tensor], group: Group, tag: int = _LAYERS
) -> list[_Transfer]:
    """Block i of ``sent`` goes to rank i, whose block comes into block i of ``received``. All are contiguous."""
    own, process_group = group.rank_in_group, group.process_group
    if sent[own].is_cuda:
        wait = Wait(group)
        work = wait.started(
            lambda: dist.all_to_all(list(received), list(sent), group=group.process_group, async_op=True)
        )
        return [(work, wait)]
    transfers = []
    for is_send, blocks, start in ((False, received, process_group.recv), (True, sent, process_group.send)):
        for peer, block in enumerate(blocks):
            if peer == own or not block.numel():
                continue
            wait = Wait(group, peer=group.ranks[peer], is_send=is_send)
            transfers.append((wait.started(partial(start, [_real(block)], peer, tag)), wait))
    if received[own].data_ptr() != sent[own].data_ptr():
        received[own].copy_(sent[own])
    return transfers


def _sum(parts: list[torch.Tensor], own: int) -> torch.Tensor:
    """In the order of the ranks, so that the result does not depend on whose it is; in memory of what has come, as part
    ``own`` may be what was sent.
    """
    if len(parts) > 2 and parts[0].dtype.itemsize < 4:  # each addition would round: summed up in single precision
        return torch.stack(parts).sum(0)
    total = torch.add(parts[0], parts[1], out=parts[1 if own == 0 else 0])
    for part in parts[2:]:
        total += part
    return total


def _lengths(bounds: Sequence[int]) -> list[int]:
    return [stop - start for start, stop in pairwise(bounds)]


def _real(block: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(block) if block.is_complex() else block


def _has_cpu_backend(group: Group) -> bool:
    return "cpu:" in dist.get_backend_config(group.process_group)
