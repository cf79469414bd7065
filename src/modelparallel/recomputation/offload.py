"""Activations in host memory, from the end of the forward that made them until shortly before their backward.

[Note: offload] What a recomputed region keeps is its inputs, and nobody reads them before its backward. On a GPU they
are copied to pinned memory on a stream of their own, behind the work that made them, and come back on another one,
ahead of the work that needs them; the host never waits. On the CPU the same happens with ordinary copies, so that tests
can look at it. A tensor that something else holds, too, stays in device memory all the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch

#: (microbatch, visit): the backward that needs a tensor.
Key = tuple[int, int]


@dataclass
class TransferCounts:
    """How many tensors, and bytes, have gone to host memory and come back, for tests and reports.

    Attributes:
        ahead: how many of the loaded came back before they were asked for.
    """

    stored: int = 0
    stored_bytes: int = 0
    loaded: int = 0
    ahead: int = 0


class StoredActivation:
    """A tensor in the store; :meth:`get` once."""

    def __init__(self, store: HostStore, tensor: torch.Tensor, key: Key, number: int) -> None:
        self._store = store
        self.key = key
        self.number = number
        #: Its copy in host memory; None when it is on its way back.
        self.host: torch.Tensor | None = None
        self._device_copy: torch.Tensor | None = None
        self._come_back: torch.cuda.Event | None = None
        self._gone: torch.cuda.Event | None = None
        self._leave(tensor)

    def _leave(self, tensor: torch.Tensor) -> None:
        stream = self._store.outward
        if stream is None:
            self.host = tensor.clone()
            return
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            self.host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self.host.copy_(tensor, non_blocking=True)
            self._gone = stream.record_event()
        tensor.record_stream(stream)  # its memory is not given to others before the copy is done

    def load(self) -> None:
        """Begin to bring it back."""
        host, stream = self.host, self._store.homeward
        if host is None:
            return
        self.host = None
        if stream is None:
            self._device_copy = host.clone()
            return
        if self._gone is not None:
            stream.wait_event(self._gone)
        with torch.cuda.stream(stream):
            self._device_copy = torch.empty_like(host, device=self._store.device)
            self._device_copy.copy_(host, non_blocking=True)
            self._come_back = stream.record_event()

    def get(self) -> torch.Tensor:
        """The tensor on its device, ordered before what the caller does next; begins to bring back those before it."""
        self._store.needs(self)
        self.load()
        tensor = self._device_copy
        if tensor is None:
            raise RuntimeError("an offloaded activation was asked for twice")
        if self._come_back is not None:
            stream = torch.cuda.current_stream(self._store.device)
            stream.wait_event(self._come_back)
            tensor.record_stream(stream)
        return tensor


class HostStore:
    """The activations of one process that wait on the host. ``horizon``: how many pipeline tasks (and how many regions
    of one task) ahead tensors are fetched.
    """

    def __init__(self, device: torch.device, horizon: int) -> None:
        self.device = device
        self.horizon = horizon
        is_cuda = device.type == "cuda"
        self.outward = torch.cuda.Stream(device) if is_cuda else None
        self.homeward = torch.cuda.Stream(device) if is_cuda else None
        self.counts = TransferCounts()
        #: ("store" or "load" or "need", number of the tensor), in order; only if a test has set it to a list.
        self.events: list[tuple[str, int]] | None = None
        self._stored: dict[Key, list[weakref.ref[StoredActivation]]] = {}

    def put(self, tensor: torch.Tensor, key: Key) -> StoredActivation:
        """Begin to move ``tensor`` to host memory; it comes back for the backward ``key``."""
        stored = StoredActivation(self, tensor, key, self.counts.stored)
        self.counts.stored += 1
        self.counts.stored_bytes += tensor.numel() * tensor.element_size()
        self._note("store", stored)
        self._stored.setdefault(key, []).append(weakref.ref(stored))
        return stored

    def in_host_memory(self) -> list[torch.Tensor]:
        """The tensors that are in host memory now."""
        alive = [stored for entries in self._stored.values() for entry in entries if (stored := entry()) is not None]
        return [stored.host for stored in alive if stored.host is not None]

    def fetch(self, keys: Iterable[Key]) -> None:
        """The backwards ``keys`` come soon: begin to bring back what they need, the last stored first."""
        for key in keys:
            for entry in reversed(self._stored.get(key, ())):
                self._load_ahead(entry())

    def needs(self, stored: StoredActivation) -> None:
        """``stored`` is asked for: it counts as loaded, and those before it may come back."""
        self._note("need", stored)
        self.counts.loaded += 1
        if stored.host is None:
            self.counts.ahead += 1
        else:
            self._note("load", stored)
            stored.load()
        entries = [entry for entry in self._stored.pop(stored.key, ()) if entry() not in (None, stored)]
        if entries:
            self._stored[stored.key] = entries
        before = [one for entry in entries if (one := entry()) is not None and one.number < stored.number]
        for other in reversed(before[-self.horizon :]):
            self._load_ahead(other)

    def _load_ahead(self, stored: StoredActivation | None) -> None:
        if stored is not None and stored.host is not None:
            self._note("load", stored)
            stored.load()

    def _note(self, what: str, stored: StoredActivation) -> None:
        if self.events is not None:
            self.events.append((what, stored.number))
