"""Communicators between pairs of stages, in which tensors go from GPU to GPU.

[Note: channels] Every ordered pair of stages between which a plan moves values has a communicator of its own, so that
what one stage sends never waits for what it receives, or for another peer. A message says over gloo what it is and that
its payload comes by the channel; the receiver's listening thread posts the receive when it has read that. So receives
are posted in the order of the sends whatever the programs do, also in a step that leaves its plan, and one is posted
only when its send is on the way. It waits for nothing that this process computes: it has a stream of its own, or what a
late receive waits for could wait, round several stages, for the receive. Who takes the message lets the stream that it
computes on wait for the payload; the host never waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from modelparallel.comm.waits import is_timeout
from modelparallel.errors import CommunicationError, WaitTimeoutError
from modelparallel.torch_compat import default_store

_TAG = 0
_SOURCE, _DESTINATION = 0, 1  # ranks in the communicator of a pair


class PairChannels:
    """The channels of one stage.

    Args:
        stage: this process's.
        global_ranks: of the stages of the pipeline.
        backend: "nccl", or "gloo" for CPU tensors in tests.
        device: where the payloads are, of this process.
        timeout_seconds: for making a communicator, and for a payload that has been announced.
    """

    def __init__(
        self, stage: int, global_ranks: Sequence[int], backend: str, device: torch.device, timeout_seconds: float
    ) -> None:
        self.device = device
        self._stage = stage
        self._backend = backend
        self._timeout = timedelta(seconds=timeout_seconds)
        pipeline = "-".join(map(str, global_ranks))
        self._store = dist.PrefixStore(f"modelparallel/channels/{pipeline}", default_store())
        self._groups: dict[tuple[int, int], Any] = {}  # by (source, destination)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def open(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Make the communicators of these (source, destination) that there are not yet. Collective over the pipeline:
        each stage makes its own, and all go through the pairs in one order, so nobody waits for ever.
        """
        for pair in sorted(set(pairs) - self._groups.keys()):
            if self._stage in pair:
                try:
                    self._open(pair)
                except RuntimeError as error:
                    other = pair[0] if pair[1] == self._stage else pair[1]
                    kind = WaitTimeoutError if is_timeout(error) else CommunicationError
                    raise kind(
                        f"pp_rank {self._stage}: the channel between the stages {pair[0]} and {pair[1]} could not be "
                        f"opened within timeout_seconds={self._timeout.total_seconds():g}: see the output of pp_rank "
                        f"{other} ({str(error).splitlines()[0]})"
                    ) from error

    def _open(self, pair: tuple[int, int]) -> None:
        group = self._groups[pair] = self._make(pair)
        # The backend connects the two at the first use; later that would hold up a step.
        first = torch.zeros(1, dtype=torch.uint8, device=self.device)
        if self._stage == pair[0]:
            group.send([first], _DESTINATION, _TAG).wait()
        else:
            group.recv([first], _SOURCE, _TAG).wait()

    def _make(self, pair: tuple[int, int]) -> Any:
        rank = _SOURCE if self._stage == pair[0] else _DESTINATION
        name = f"{pair[0]}-{pair[1]}"
        # Sessions of one process share the store, and must not find each other's addresses in it.
        number = self._store.add(f"{name}/made by {rank}", 1)
        store = dist.PrefixStore(f"{name}/{number}", self._store)
        if self._backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = self._timeout
            return dist.ProcessGroupNCCL(store, rank, 2, options)
        return dist.ProcessGroupGloo(store, rank, 2, timeout=self._timeout)

    def is_open_to(self, peer: int) -> bool:
        """Whether there is a channel from this stage to stage ``peer``."""
        return (self._stage, peer) in self._groups

    def send(self, peer: int, payload: torch.Tensor) -> dist.Work:
        """Post ``payload``, which must not change before the work is done. Returns at once."""
        work: dist.Work = self._groups[self._stage, peer].send([payload], _DESTINATION, _TAG)
        return work

    def receive(self, peer: int, num_bytes: int) -> tuple[torch.Tensor, Callable[[], object]]:
        """Post a receive: (payload, a function that the thread that is going to use it calls before)."""
        group = self._groups[peer, self._stage]
        if self._stream is None:
            payload = torch.empty(num_bytes, dtype=torch.uint8)
            return payload, group.recv([payload], _SOURCE, _TAG).wait
        with torch.cuda.stream(self._stream):
            payload = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
            work = group.recv([payload], _SOURCE, _TAG)

        def make_ready() -> None:
            work.wait()
            payload.record_stream(torch.cuda.current_stream(self.device))  # its memory is of the other stream

        return payload, make_ready

    def close(self) -> None:
        """Let go of the communicators; nothing is under way. Local."""
        for group in self._groups.values():
            if self._backend == "nccl":
                group.abort()
        self._groups.clear()
