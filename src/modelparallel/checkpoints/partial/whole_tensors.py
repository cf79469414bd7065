"""Whole tensors put together out of the pieces of all ranks, each at one rank, a few at a time.

[Note: one tensor at a time] All ranks know what each of them holds (`pieces.py`), so each knows, without asking, who
sends what to whom. A rank that puts a tensor together has room for that one; the others send their pieces of it.
Whatever several ranks hold is sent by the one that has sent least so far, or not at all if the receiver has it itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import torch

from modelparallel.checkpoints.partial.pieces import Piece, rectangle_of
from modelparallel.comm.groups import Group
from modelparallel.comm.waits import Wait
from modelparallel.config.topology import CommGroup
from modelparallel.errors import CheckpointError
from modelparallel.job.messages import told_by_all

_TAG = 0


@dataclass(frozen=True)
class _Offer:
    """A piece that a rank holds; ``index`` is its place among that rank's pieces."""

    global_rank: int
    index: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Whole:
    """What all ranks know of a tensor: its dtype, and its shape before any cut."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class WholeTensors:
    """Puts together the tensors of which the ranks hold ``pieces``. Every method is called by all ranks, in one order.

    Collective over the world when it is made. Raises CheckpointError if the ranks do not agree on a tensor, or do not
    hold all of it.

    Attributes:
        described: every tensor by its key.
    """

    def __init__(self, pieces: Sequence[Piece], group: Group) -> None:
        self._pieces = list(pieces)
        self._group = group
        self._rank = group.rank_in_group
        own = [(piece.key, piece.tensor.dtype, piece.full_shape, piece.offsets, piece.sizes) for piece in pieces]
        self.described: dict[str, Whole] = {}
        self._offers: dict[str, dict[tuple[tuple[int, ...], tuple[int, ...]], list[_Offer]]] = {}
        pieces_of_ranks = told_by_all(own, CommGroup.WORLD, "putting tensors of a checkpoint together")
        for other, descriptions in enumerate(pieces_of_ranks):
            for index, (key, dtype, full_shape, offsets, sizes) in enumerate(descriptions):
                whole = self.described.setdefault(key, Whole(dtype, full_shape))
                if whole != Whole(dtype, full_shape):
                    raise CheckpointError(f"'{key}' is {whole} on one rank and {Whole(dtype, full_shape)} on {other}")
                copies = self._offers.setdefault(key, {}).setdefault((offsets, sizes), [])
                copies.append(_Offer(other, index, offsets, sizes))
        self._num_sent = [0] * len(pieces_of_ranks)

    def check(self, key: str) -> Whole:
        """What is known of a tensor of which the ranks hold all. Local."""
        whole = self.described.get(key)
        held = sum(prod(sizes) for _, sizes in self._offers.get(key, ()))
        if whole is None or held != prod(whole.shape):
            raise CheckpointError(
                f"the ranks hold {held} elements of '{key}', which has shape {whole.shape if whole else 'unknown'}: is "
                "the model the same on all ranks?"
            )
        return whole

    def put_together(self, wanted: Mapping[int, str]) -> torch.Tensor | None:
        """``wanted`` says which rank gets which tensor; returns the own one, on the CPU, None if this rank gets none.

        Collective over the ranks that hold pieces of these and those that get them.
        """
        sends: list[tuple[int, torch.Tensor]] = []
        arrivals: list[tuple[int, torch.Tensor, list[_Offer]]] = []
        result: torch.Tensor | None = None
        for receiver, key in wanted.items():
            by_sender: dict[int, list[_Offer]] = {}
            for copies in self._offers[key].values():
                offer = self._chosen(copies, receiver)
                by_sender.setdefault(offer.global_rank, []).append(offer)
            if receiver == self._rank:
                whole = self.described[key]
                result = torch.empty(whole.shape, dtype=whole.dtype)
                for sender, offers in by_sender.items():
                    if sender != self._rank:
                        length = sum(prod(offer.sizes) for offer in offers) * whole.dtype.itemsize
                        arrivals.append((sender, torch.empty(length, dtype=torch.uint8), offers))
                for offer in by_sender.get(self._rank, ()):
                    rectangle_of(result, offer.offsets, offer.sizes).copy_(self._pieces[offer.index].tensor)
            elif self._rank in by_sender:
                parts = [self._pieces[offer.index].tensor.cpu().reshape(-1) for offer in by_sender[self._rank]]
                sends.append((receiver, torch.cat(parts).view(torch.uint8)))
        self._exchange(sends, [(sender, buffer) for sender, buffer, _ in arrivals])
        for _, buffer, offers in arrivals:
            assert result is not None
            flat, start = buffer.view(result.dtype), 0
            for offer in offers:
                length = prod(offer.sizes)
                rectangle_of(result, offer.offsets, offer.sizes).copy_(flat[start : start + length].view(offer.sizes))
                start += length
        return result

    def _chosen(self, copies: Sequence[_Offer], receiver: int) -> _Offer:
        own = next((offer for offer in copies if offer.global_rank == receiver), None)
        if own is not None:
            return own
        offer = min(copies, key=lambda each: self._num_sent[each.global_rank])
        self._num_sent[offer.global_rank] += prod(offer.sizes)
        return offer

    def _exchange(
        self, sends: Sequence[tuple[int, torch.Tensor]], receives: Sequence[tuple[int, torch.Tensor]]
    ) -> None:
        process_group, started = self._group.process_group, []
        for is_send, messages, start in ((False, receives, process_group.recv), (True, sends, process_group.send)):
            for peer, buffer in messages:
                wait = Wait(self._group, "putting tensors of a checkpoint together", peer, "a piece", is_send)
                started.append((wait, wait.started(partial(start, [buffer], peer, _TAG))))
        for wait, work in started:
            wait.end(work)
