"""The members of a process group prove to each other that they belong to the job; see [Note: who may take part].

Each member sends each other one a number that nobody could foresee, and answers with a digest of both numbers that
only who knows the secret of the job can make. gloo connects every pair of a group by one socket, so a pair that has
proved it once stays proved.
"""

from __future__ import annotations

import datetime
import hmac
import json
import secrets
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from modelparallel.comm.groups import Group
from modelparallel.comm.lookout import Lookout
from modelparallel.comm.waits import Wait, is_timeout
from modelparallel.errors import CommunicationError, WaitTimeoutError

_TAG = 5222
_BYTES = 32


class MadeGroups(dict[tuple[str, tuple[int, ...]], dist.ProcessGroup]):
    """Process groups by purpose and ranks. ``secret`` is what their members have proved to know; empty: nothing.
    ``seconds``: the longest wait in making one. ``lookout``: what waits in them tell. ``store``: where those who make
    one meet.
    """

    def __init__(self, secret: bytes, lookout: Lookout, seconds: float, store: dist.Store) -> None:
        super().__init__()
        self.secret = secret
        self.lookout = lookout
        self.seconds = seconds
        self.store = store

    def add(self, purpose: str, ranks: tuple[int, ...], process_group: dist.ProcessGroup) -> None:
        """Take the group in once its members have proved that they belong to it. Collective over them.

        Raises CommunicationError.
        """
        if (purpose, ranks) not in self:
            prove(process_group, self.secret, f"{purpose} {ranks}", self.seconds)
            self[purpose, ranks] = process_group


def prove(process_group: dist.ProcessGroup, secret: bytes, name: str, seconds: float) -> None:
    """Raise CommunicationError if another member does not know the secret. Collective over the group."""
    own, peers = process_group.rank(), [rank for rank in range(process_group.size()) if rank != process_group.rank()]
    if not peers:
        return

    def digest(source: int, destination: int, asked: bytes, own_number: bytes) -> bytes:
        text = json.dumps(["modelparallel", name, source, destination, asked.hex(), own_number.hex()])
        return hmac.digest(secret, text.encode(), "sha256")

    numbers = {peer: secrets.token_bytes(_BYTES) for peer in peers}
    asked = _exchanged(process_group, numbers, name, seconds)
    answers = {peer: digest(own, peer, asked[peer], numbers[peer]) for peer in peers}
    told = _exchanged(process_group, answers, name, seconds)
    for peer in peers:
        if not hmac.compare_digest(told[peer], digest(peer, own, numbers[peer], asked[peer])):
            raise CommunicationError(
                f"what took part as rank {peer} in the process group '{name}' (rank {own} here) does not know "
                "the secret of this job. It is another job's, or of another user; if it is not, give all processes the "
                "same MODELPARALLEL_SECRET_FILE, or none"
            )


def _exchanged(process_group: dist.ProcessGroup, sent: dict[int, bytes], name: str, seconds: float) -> dict[int, bytes]:
    """Each peer gets its bytes; returns what they sent."""
    works: list[Any] = []
    outgoing = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in sent.values()]
    incoming = {peer: torch.empty(_BYTES, dtype=torch.uint8) for peer in sent}
    try:
        works += [process_group.send([data], peer, _TAG) for peer, data in zip(sent, outgoing, strict=True)]
        works += [process_group.recv([data], peer, _TAG) for peer, data in incoming.items()]
        for work in works:
            work.wait(datetime.timedelta(seconds=seconds))
    except RuntimeError as error:
        kind = WaitTimeoutError if is_timeout(error) else CommunicationError
        raise kind(
            f"a member of the process group '{name}' did not prove that it belongs to this job "
            f"({str(error).splitlines()[0]}): see its own message"
        ) from error
    return {peer: data.numpy().tobytes() for peer, data in incoming.items()}


def gather_json(value: Any, group: Group, default: Callable[[Any], Any] | None = None) -> list[Any]:
    """What each member gave, in the order of their ranks: numbers, texts, and lists and dicts of them. Collective.

    For what the library itself tells between ranks: nothing that arrives is executed. Raises CommunicationError for
    what cannot be read, and the errors of `Wait.end`.
    """
    own = torch.frombuffer(bytearray(json.dumps(value, default=default).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(group.size)]
    _gather(sizes, torch.tensor([own.numel()]), group)
    longest = max(map(int, sizes))
    padded = torch.cat([own, torch.zeros(longest - own.numel(), dtype=torch.uint8)])
    parts = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
    _gather(parts, padded, group)
    try:
        return [
            json.loads(part[: int(size)].numpy().tobytes().decode()) for part, size in zip(parts, sizes, strict=True)
        ]
    except (ValueError, RecursionError) as error:
        raise CommunicationError(f"what another rank told cannot be read: {error}") from error


def _gather(parts: list[torch.Tensor], own: torch.Tensor, group: Group) -> None:
    Wait(group).run(lambda: dist.all_gather(parts, own, group.process_group, async_op=True))
