"""Communication hooks in the place of the all-reduce: torch's own (``ddp_comm_hooks``) work as they are.

[Note: hooks] A hook is called with its state and a bucket that looks like ``torch.distributed.GradBucket``, and returns
a future of the *mean* of the bucket over its group. The microbatches are averaged before. Where the mean over the
group is not the final gradient (slices of split layers: the sum over rdp ranks, divided by dp), the bucket is scaled
before, so hooks need not know. What parameters have a gradient travels apart (``FlagBucket``): a hook may compress
what it is given.

Stock hooks average over the world unless their state names a group, which is wrong as soon as the world is not the
data-parallel group. So a state of None is replaced by the process group of the bucket, and a state whose
``process_group`` is None has that group during the call.

On the CPU hooks are called when the backward is over, one after another: a hook of several collectives starts the later
ones from a thread of gloo, so the order of the collectives of two buckets would differ from rank to rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from modelparallel.comm.waits import FutureWork, Wait
from modelparallel.data_parallel.buckets import Bucket, Slot, gradient_dtype
from modelparallel.errors import SMPConfigError

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group


@dataclass(frozen=True)
class CommHook:
    """What ``register_comm_hook`` was given."""

    state: Any
    function: Callable[..., Any]

    @property
    def title(self) -> str:
        """The name of the function, for errors."""
        return getattr(self.function, "__qualname__", type(self.function).__name__)

    def check_state(self, groups: Sequence[Group]) -> None:
        """Raise SMPConfigError if the state averages over other ranks than the ``groups`` of the parameters."""
        named = self.state if isinstance(self.state, dist.ProcessGroup) else getattr(self.state, "process_group", None)
        if not isinstance(named, dist.ProcessGroup):
            return
        ranks = tuple(sorted(dist.get_process_group_ranks(named)))
        for group in groups:
            if ranks != group.ranks:
                raise SMPConfigError(
                    f"model.register_comm_hook: the state of {self.title} names a process group of the global ranks "
                    f"{list(ranks)}, but there are parameters whose gradients are averaged over the {group.kind.name} "
                    f"group {list(group.ranks)}: leave the process group out (None), then each bucket's own is used"
                )

    def start(self, bucket: GradientBucket, group: Group) -> torch.futures.Future[Any]:
        """Call the hook."""
        if self.state is None:
            future = self.function(group.process_group, bucket)
        elif getattr(self.state, "process_group", group) is None:
            self.state.process_group = group.process_group
            try:
                future = self.function(self.state, bucket)
            finally:
                self.state.process_group = None
        else:
            future = self.function(self.state, bucket)
        if not callable(getattr(future, "wait", None)):  # `then` returns a base class of torch.futures.Future
            raise SMPConfigError(
                f"model.register_comm_hook: {self.title} returned a {type(future).__name__}: a hook returns a "
                "torch.futures.Future of the averaged bucket"
            )
        result: torch.futures.Future[Any] = future
        return result


class GradientBucket:
    """What a hook sees of a bucket: the methods of ``torch.distributed.GradBucket``."""

    def __init__(self, buffer: torch.Tensor, slots: Sequence[Slot], index: int, is_last: bool) -> None:
        self._buffer = buffer
        self._slots = slots
        self._index = index
        self._is_last = is_last

    def index(self) -> int:
        """The place of the bucket in the order of reduction."""
        return self._index

    def buffer(self) -> torch.Tensor:
        """The gradients of the bucket, flat."""
        return self._buffer

    def set_buffer(self, buffer: torch.Tensor) -> None:
        """Replace the flat tensor, by a compressed one say."""
        self._buffer = buffer

    def gradients(self) -> list[torch.Tensor]:
        """The gradients of the parameters, views of the buffer; of a scalar a vector, which PowerSGD wants."""
        pieces = self._buffer.split([slot.parameter.numel() for slot in self._slots])
        return [piece.view(slot.parameter.shape or 1) for piece, slot in zip(pieces, self._slots, strict=True)]

    def parameters(self) -> list[torch.Tensor]:
        """The parameters of the bucket."""
        return [slot.parameter for slot in self._slots]

    def is_last(self) -> bool:
        """Whether it is the last bucket of the reduction."""
        return self._is_last


class HookedBucket(Bucket):
    """A bucket that is reduced by a hook."""

    needs_flag_bucket = True

    def __init__(self, slots: Sequence[Slot], group: Group, hook: CommHook, *, as_views: bool = False) -> None:
        first = slots[0].parameter
        super().__init__(slots, group, first.device, gradient_dtype(first), as_views=as_views)
        self._hook = hook
        self.waits_for_the_end = self.device.type == "cpu"  # see the note
        # Set by the reducer.
        self.is_last = False
        self._future: torch.futures.Future[Any] | None = None

    @property
    def is_one_by_one(self) -> bool:
        return True

    @property
    def is_launched(self) -> bool:
        return self._future is not None

    def scale_of(self, slot: Slot) -> float:
        """The factor of the local gradient with which the mean over the group is the final gradient."""
        return self.group.size / slot.pack_divisor

    @property
    def has_flags(self) -> Sequence[bool]:
        return self.has_anywhere

    def launch(self) -> None:
        """Call the hook."""
        assert self._flat is not None
        num_elements = sum(slot.parameter.numel() for slot in self.slots)
        bucket = GradientBucket(self._flat[:num_elements], self.slots, self.index, self.is_last)
        self._future = self._hook.start(bucket, self.group)

    @torch.no_grad()
    def wait(self, timeout_seconds: float) -> None:
        """Wait for the future of the hook."""
        assert self._future is not None and self._flat is not None
        future = self._future
        purpose = f"the reduction of {self.title} by {self._hook.title}"
        Wait(self.group, purpose, seconds=timeout_seconds).end(FutureWork(future), self.device)
        result = future.wait()
        value = result[0] if isinstance(result, (list, tuple)) else result
        buffer = self._flat[: sum(slot.parameter.numel() for slot in self.slots)]
        if value.numel() != buffer.numel():
            raise SMPConfigError(
                f"model.register_comm_hook: the future of {self._hook.title} holds {value.numel()} elements, the "
                f"bucket {buffer.numel()}: it must hold the averaged buffer"
            )
        if value.data_ptr() != buffer.data_ptr():
            buffer.copy_(value.view(-1))

    def forget(self) -> None:
        """After the reduction: nothing is under way, and the gradients are no longer held."""
        super().forget()
        self._future = None
