"""Messages of any picklable object between processes: what `smp.send`, `smp.broadcast` and the like do.

Note: Protocol
    A message from one process to another is a header of two numbers (a mark and the length of what follows), the
    payload, and an answer of one number, which the receiver sends once it has the payload. The header is needed because
    gloo ends the process, uncatchably, when a message is longer than the receive buffer. The answer is what "returns
    once the peer's matching receive happened" means on any backend. Messages of one pair arrive in the order in which
    they were sent, whatever rank type names the pair. A broadcast is one such message per member, so that `recv_from`
    need not know which of the two it answers.

Note: Tensors
    Plain tensors travel as their bytes: only the elements that a view shows and not the storage behind it. A CPU
    tensor comes back on the CPU; one that was on an accelerator comes back on the receiver's own device. Autograd
    history, and Python attributes set on a tensor, do not travel; `requires_grad` does. Sparse and quantized tensors
    come back on the CPU. Everything else is pickled as it is.
"""

import functools
import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from modelparallel.comm.groups import Group
from modelparallel.comm.waits import Wait
from modelparallel.errors import CommunicationError, GroupMembershipError

_MARK = 0x534D504D  # tells our header from the bytes of anything else
_DATA_TAG, _ANSWER_TAG = 1, 2


@dataclass(frozen=True)
class ObjectMessenger:
    """Sends and receives objects.

    `process_group` spans the world and is gloo; nothing else may use it. `device` is where tensors of accelerators
    arrive. `timeout_seconds` limits every wait; after a time-out the connection of the pair cannot be used any more.
    """

    process_group: dist.ProcessGroup
    global_rank: int
    device: torch.device
    timeout_seconds: float

    def send(self, obj: Any, dest_rank: int, group: Group) -> None:
        """Send `obj` to the member `dest_rank` of `group`; returns once that member has received it.

        The peer calls `receive` (smp-api section 3). Raises `GroupMembershipError` for a rank outside the group or the
        own one, `CommunicationError` if `obj` cannot be pickled or the peer is gone, `WaitTimeoutError`.
        """
        peer = self._peer(dest_rank, group, "send")
        self._send_payloads(dumps(obj), [peer], group, "smp.send")

    def receive(self, src_rank: int, group: Group) -> Any:
        """Receive the next object from the member `src_rank` of `group`; pairs with its `send` or `broadcast`."""
        peer = self._peer(src_rank, group, "recv_from")
        header = torch.zeros(2, dtype=torch.int64)
        wait = self._waiting("smp.recv_from", group, "a message", peer)
        wait.run(lambda: self.process_group.recv([header], peer, _DATA_TAG))
        mark, size = header.tolist()
        if mark != _MARK:
            raise CommunicationError(
                f"global rank {self.global_rank}: what came from {self._name(peer, group)} is not a message of "
                "smp.send or smp.broadcast: use one version of the library on all processes"
            )
        payload = torch.empty(size, dtype=torch.uint8)
        wait.what = f"a message ({size} bytes)"
        wait.run(lambda: self.process_group.recv([payload], peer, _DATA_TAG))
        answer = torch.ones(1, dtype=torch.int64)
        wait.run(lambda: self.process_group.send([answer], peer, _ANSWER_TAG))
        return loads(payload, self.device)

    def broadcast(self, obj: Any, group: Group) -> None:
        """Send `obj` to all other members of `group`; only the sender calls, the others call `receive`."""
        peers = [rank for rank in group.ranks if rank != self.global_rank]
        if peers:
            self._send_payloads(dumps(obj), peers, group, "smp.broadcast")

    def allgather(self, obj: Any, group: Group, purpose: str = "smp.allgather") -> list[Any]:
        """The objects of all members in the order of their ranks in `group`; collective over `group`."""
        payload = dumps(obj)
        if group.size == 1:
            return [loads(payload, self.device)]
        wait = self._waiting(purpose, group)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in group.ranks]
        own_size = torch.tensor([payload.numel()])
        wait.run(lambda: dist.all_gather(sizes, own_size, group.process_group, async_op=True))
        # One broadcast per member and not one padded gather: a group where one rank holds much would need its size
        # times the number of members everywhere.
        payloads = [torch.empty(size, dtype=torch.uint8) for size in map(int, sizes)]
        payloads[group.rank_in_group] = payload
        works = [
            wait.started(partial(dist.broadcast, part, source, group.process_group, async_op=True))
            for part, source in zip(payloads, group.ranks, strict=True)
        ]
        for work in works:
            wait.end(work)
        return [loads(part, self.device) for part in payloads]

    def barrier(self, group: Group) -> None:
        """Wait until all members of `group` have called; collective over `group`, other ranks are not waited for."""
        if group.size == 1:
            return
        # A sum over a CPU tensor, not torch's barrier: that one would use NCCL and the current CUDA device.
        token = torch.ones(1, dtype=torch.int64)
        wait = self._waiting("smp.barrier", group)
        wait.run(lambda: dist.all_reduce(token, group=group.process_group, async_op=True))

    def _send_payloads(self, payload: torch.Tensor, peers: Sequence[int], group: Group, call: str) -> None:
        """To all peers at a time: none of them has to wait for another to arrive."""
        header = torch.tensor([_MARK, payload.numel()], dtype=torch.int64)
        works, answers = [], []
        for peer in peers:
            wait = self._waiting(call, group, f"{payload.numel()} bytes", peer, is_send=True)
            for part in (header, payload):
                works.append((wait, wait.started(partial(self.process_group.send, [part], peer, _DATA_TAG))))
            answer = torch.zeros(1, dtype=torch.int64)
            answers.append((wait, wait.started(partial(self.process_group.recv, [answer], peer, _ANSWER_TAG))))
        for wait, work in works + answers:
            wait.end(work)

    def _waiting(
        self, purpose: str, group: Group, what: str = "", peer: int | None = None, *, is_send: bool = False
    ) -> Wait:
        return Wait(
            group, purpose, peer, what, is_send, self.timeout_seconds, "message_timeout_seconds",
            "every rank named must reach the matching call (see its output), or raise message_timeout_seconds",
        )  # fmt: skip

    def _peer(self, rank: int, group: Group, call: str) -> int:
        """The global rank of a member; refuses ranks outside the group and the own one."""
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise GroupMembershipError(
                f"{call}: expected an int as {group.kind}_rank, got {type(rank).__name__} {rank!r}"
            )
        if not 0 <= rank < group.size:
            raise GroupMembershipError(
                f"{call}: {group.kind} rank {rank} is outside {_described(group)}: its ranks are 0..{group.size - 1}"
            )
        if rank == group.rank_in_group:
            raise GroupMembershipError(
                f"{call}: {group.kind} rank {rank} is this process itself (global rank {self.global_rank}): a process "
                "cannot exchange messages with itself; keep the object"
            )
        return group.ranks[rank]

    def _name(self, global_rank: int, group: Group) -> str:
        if len(group.ranks) == self.process_group.size():
            return f"global rank {global_rank}"
        return f"global rank {global_rank} ({group.kind}_rank {group.ranks.index(global_rank)})"


def _described(group: Group) -> str:
    return f"the {group.kind} group {list(group.ranks)}"


def dumps(obj: Any) -> torch.Tensor:
    """The object as bytes, in a CPU tensor. Raises `CommunicationError` if it cannot be pickled."""
    file = io.BytesIO()
    try:
        _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(obj)
    except (pickle.PicklingError, TypeError, AttributeError, RecursionError) as error:
        raise CommunicationError(
            f"an object of type {type(obj).__name__} cannot be sent to another process, as it cannot be pickled "
            f"({error}): send tensors, numbers, containers and objects of module-level classes"
        ) from error
    return torch.frombuffer(file.getbuffer(), dtype=torch.uint8)


def loads(payload: torch.Tensor, device: torch.device) -> Any:
    """The object from its bytes; tensors of accelerators go to `device`. Raises `CommunicationError`."""
    try:
        return _Unpickler(io.BytesIO(payload.numpy().tobytes()), device).load()
    except (pickle.UnpicklingError, AttributeError, ImportError, EOFError) as error:
        raise CommunicationError(
            f"a message of {payload.numel()} bytes cannot be read ({error}): its classes must be importable, under the "
            "same names, on the receiver too"
        ) from error


class _Pickler(pickle.Pickler):
    """Pickles plain tensors as bytes; see Note: Tensors."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) not in (torch.Tensor, torch.nn.Parameter) or obj.is_meta:
            return NotImplemented
        if obj.layout is not torch.strided or obj.is_quantized:
            return obj.detach().cpu().__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        # Contiguous, in index order; conjugated and negated views, which are lazy, are computed.
        values = obj.detach().resolve_conj().resolve_neg().cpu().contiguous()
        data = pickle.PickleBuffer(values.reshape(-1).view(torch.uint8).numpy())
        is_parameter, is_on_accelerator = type(obj) is torch.nn.Parameter, obj.device.type != "cpu"
        arguments = (data, obj.dtype, tuple(obj.shape), is_on_accelerator, obj.requires_grad, is_parameter)
        return _rebuild_tensor, arguments


def _rebuild_tensor(
    data: bytearray,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    is_on_accelerator: bool,
    requires_grad: bool,
    is_parameter: bool,
    device: torch.device | None = None,
) -> torch.Tensor:
    # frombuffer refuses an empty buffer.
    flat = torch.frombuffer(data, dtype=dtype) if len(data) else torch.empty(0, dtype=dtype)
    tensor = flat.reshape(shape)
    if is_on_accelerator and device is not None:
        tensor = tensor.to(device)
    return torch.nn.Parameter(tensor, requires_grad) if is_parameter else tensor.requires_grad_(requires_grad)


class _Unpickler(pickle.Unpickler):
    """Hands the receiver's device to the tensors."""

    def __init__(self, file: io.BytesIO, device: torch.device) -> None:
        super().__init__(file)
        self.device = device

    def find_class(self, module: str, name: str) -> Any:
        named = super().find_class(module, name)
        return functools.partial(named, device=self.device) if named is _rebuild_tensor else named
