"""The gradient reducer: one for whole and for sliced parameters, for plain ``loss.backward()`` and steps.

Note: Why not DDP's reducer
    It knows one process group, and it counts one gradient per parameter and backward pass. Here the last microbatch's
    backward runs in pieces, so a parameter may get several gradients, or none, in the synchronised microbatch.

Note: Protocol
    Gradients lie in flat buckets (see buckets.py), which are reduced by asynchronous collectives in ONE order over
    all groups, the same on all ranks: the buckets that may be launched early, in planned order; the carriers (the
    last bucket of each group); the late ones. An early bucket is launched as soon as each of its parameters has got a
    gradient and all earlier buckets are launched. That is a guess: more gradients may come. When the step is over,
    everything left is launched, and the carriers tell all ranks of the group which early buckets had changed on any
    of them. Those are packed and reduced once more on all ranks, and are late from then on. Only then are gradients
    written, so the local ones are intact until then.

    What was launched and not finished (an exception ended the backward pass) stays launched: each bucket is launched
    exactly once per reduction on every rank, so the collectives of all ranks stay paired, and the next reduction
    finds the bucket changed and repeats it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch.utils.hooks import RemovableHandle

from modelparallel.data_parallel.agreement import check_agreement
from modelparallel.data_parallel.buckets import (
    Bucket,
    ReducedParameter,
    SharedOut,
    Slot,
    fill_buckets,
    gradient_dtype,
    with_carriers,
)
from modelparallel.data_parallel.comm_hooks import CommHook, HookedBucket
from modelparallel.data_parallel.launch_order import LaunchOrder
from modelparallel.data_parallel.progress import Progress, check_progress, check_trained, flags_of, wants_plan
from modelparallel.errors import DivergenceError, SMPConfigError, StepUsageError
from modelparallel.torch_compat import current_backward_id, queue_backward_callback

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group


class _Phase(Enum):
    # No step is under way: each backward pass ends with final gradients.
    AUTOMATIC = "automatic"
    # In a step, before its last microbatch: gradients only accumulate.
    QUIET = "quiet"
    # Buckets are launched as they fill.
    ARMED = "armed"


class GradientReducer:
    """Makes ``p.grad`` the sum over the parameter's group of all ranks' gradients, divided by ``divisor``.

    smp-api sections 5 and 8.

    parameters: name, parameter and group of every parameter of the local model, in the same order on all ranks of a
    group. Parameters
        that do not require gradients are left out for as long as that is so; it is looked up before each reduction
        and must be the same on all ranks of the group.
    divisor: number of ranks whose losses are averaged, usually the dp size, also where a parameter is summed over the
    rdp group only. bucket_cap_mb: size of a bucket in MiB. overlap: reduce while backward still runs. False gives the
    same gradients. as_views: final gradients are views of the buckets' memory (buckets.py). shards: what is reduced to
    the owners of shards alone, in buckets of its own. timeout_seconds: how long a wait for another rank may last.
    progress: gives the numbers of training steps and updates, which must be the same on all ranks.

    Outside a step, every backward pass that gives a gradient to one of the parameters ends with final gradients.
    Inside a step the engine calls ``begin_step``, ``arm`` before the backward of the last microbatch, and
    ``finish_step``; ``abort_step`` when the step raised. Gradients accumulated without a reduction (``no_sync``,
    ``begin_step(False)``) are reduced with the next one. A parameter unused on all ranks keeps ``grad`` None; used on
    some, all get the mean, the others counting as zero. Sparse gradients become dense.

    Every backward pass outside ``no_sync``, and ``finish_step``, is collective over all groups of the parameters.
    With nothing to reduce or scale (one process) no hook is registered.
    """

    def __init__(
        self,
        parameters: Sequence[ReducedParameter],
        *,
        divisor: int,
        bucket_cap_mb: float = 25,
        overlap: bool = True,
        as_views: bool = False,
        shards: SharedOut | None = None,
        timeout_seconds: float = 600.0,
        progress: Callable[[], Progress] = lambda: (0, 0),
    ) -> None:
        if bucket_cap_mb <= 0:
            raise SMPConfigError(
                f"bucket_cap_mb={bucket_cap_mb} must be positive: it is the size of a gradient bucket in MiB"
            )
        if divisor < 1:
            raise SMPConfigError(
                f"divisor={divisor} must be at least 1: it is the number of ranks whose gradients are averaged"
            )
        self.overlap = overlap
        self.as_views = as_views
        self.timeout_seconds = timeout_seconds
        self._progress = progress
        # Other parameters are trained than those of the buckets: to be told with the next reduction. Hooks are as of
        # ``_hooked``.
        self._wants_plan = False
        self._hooked: list[torch.dtype | None] = []
        #: Collectives launched so far, for tests and reports.
        self.num_launches = 0
        self._divisor = divisor
        self._bucket_cap_mb = bucket_cap_mb
        self._entries = tuple(
            entry for entry in parameters if entry.group.size > 1 or self._divisor_of(entry) > 1
        )  # one process has no work here
        self._phase = _Phase.AUTOMATIC
        self._launches = LaunchOrder()  # of the step that is under way
        self._num_no_sync = 0
        self._will_synchronize = False
        # The backward pass for which an end-of-backward callback is queued, and whether a reduction was begun for it.
        self._backward_id: int | None = None
        self._is_open = False
        # CUDA runs hooks in threads of the autograd engine, one per device.
        self._lock = threading.RLock()
        self._handles: list[RemovableHandle] = []
        self._layout: list[torch.dtype | None] = []
        self._comm_hook: CommHook | None = None
        # Inside join(): announces a reduction; gives what is divided by, and the number of ranks that have gradients.
        self._before_reduction: Callable[[], tuple[int, int]] | None = None
        # Whether buckets are launched during the backward.
        self._is_early = overlap
        self._shards = shards
        self._shared_buckets: Sequence[Bucket] = ()
        self._slots: dict[int, Slot] = {}
        self.buckets: tuple[Bucket, ...] = ()
        self._scaled_only: tuple[Slot, ...] = ()
        self._launch_order: tuple[Bucket, ...] = ()
        self._num_launched = 0
        self._num_early = 0
        self._plan()

    def _divisor_of(self, entry: ReducedParameter) -> int:
        return self._divisor if entry.divisor is None else entry.divisor

    # The plan: which parameters take part.

    def prepare(self) -> None:
        """Look whether parameters were frozen or unfrozen; what follows from it, all ranks do together with the next
        reduction. Called before a forward outside a step.
        """
        layout = self._current_layout()
        if self._shards is not None and self._shards.buckets is not self._shared_buckets:
            self._plan()
        elif layout != self._hooked:
            pairs = list(zip(layout, self._layout, strict=True))
            if not self.buckets or any(None not in pair and pair[0] is not pair[1] for pair in pairs):
                self._plan()  # there is no reduction that could tell; or other dtypes
                return
            self._wants_plan = layout != self._layout
            self._register_hooks()

    def _current_layout(self) -> list[torch.dtype | None]:
        """The dtype of the gradient of each parameter, None for one that is frozen."""
        parameters = [entry.parameter for entry in self._entries]
        return [gradient_dtype(parameter) if parameter.requires_grad else None for parameter in parameters]

    def _plan(self) -> None:
        for bucket in self._launch_order:
            if bucket.is_launched:
                self._wait(bucket)
                bucket.forget()
        self._layout = self._current_layout()
        entries = [entry for entry, dtype in zip(self._entries, self._layout, strict=True) if dtype is not None]
        shared = self._take_shared_buckets({id(entry.parameter) for entry in entries})
        shared_slots = {id(slot.parameter): slot for bucket in shared for slot in bucket.slots}
        known = self._slots | shared_slots
        slots = [known.get(id(entry.parameter)) or Slot(entry, self._divisor_of(entry)) for entry in entries]
        self._slots = known | {id(slot.parameter): slot for slot in slots}
        pairs = [
            (entry, slot)
            for entry, slot in zip(entries, slots, strict=True)
            if entry.group.size > 1 and id(entry.parameter) not in shared_slots
        ]
        self._scaled_only = tuple(
            slot for entry, slot in zip(entries, slots, strict=True) if entry.group.size == 1
        )  # split over all ranks that exist
        whole = [self._make_bucket(members, group) for members, group in self._fill_buckets(pairs)]
        self.buckets = with_carriers((*shared, *whole))
        for bucket in self.buckets:
            if bucket.is_carrier:
                self._check_layout(bucket)
        self._order()
        self._wants_plan = False
        self._register_hooks()

    def _register_hooks(self) -> None:
        """For the parameters that are trained now, whether the buckets hold them or not."""
        self._remove_hooks()
        self._hooked = self._current_layout()
        bucket_of = {id(slot): bucket for bucket in self.buckets for slot in bucket.slots}
        shared = {id(slot.parameter) for bucket in self._shared_buckets for slot in bucket.slots}
        for entry, dtype in zip(self._entries, self._hooked, strict=True):
            if dtype is None:
                continue
            slot = self._slots.setdefault(id(entry.parameter), Slot(entry, self._divisor_of(entry)))
            hook = self._make_hook(slot, bucket_of.get(id(slot)))
            self._handles.append(slot.parameter.register_post_accumulate_grad_hook(hook))
            if slot.needs_rescaling or id(slot.parameter) in shared:
                self._handles.append(slot.parameter.register_hook(_make_rescaling_hook(slot)))

    def _fill_buckets(self, pairs: Sequence[tuple[ReducedParameter, Slot]]) -> list[tuple[list[Slot], Group]]:
        return fill_buckets([entry for entry, _ in pairs], [slot for _, slot in pairs], self._bucket_cap_mb)

    def _make_bucket(self, members: Sequence[Slot], group: Group) -> Bucket:
        first = members[0].parameter
        if self._comm_hook is not None:
            return HookedBucket(members, group, self._comm_hook, as_views=self.as_views)
        return Bucket(members, group, first.device, gradient_dtype(first), as_views=self.as_views)

    def _take_shared_buckets(self, trained: set[int]) -> list[Bucket]:
        """The buckets of what is shared out, without those whose parameters are all frozen."""
        if self._shards is None:
            return []
        self._shared_buckets = self._shards.buckets
        return [
            bucket for bucket in self._shared_buckets if any(id(slot.parameter) in trained for slot in bucket.slots)
        ]

    def _check_layout(self, carrier: Bucket) -> None:
        """Compare the plan of the carrier's group over its ranks."""
        listing = [
            f"{slot.name} {tuple(slot.parameter.shape)} {bucket.dtype} /{slot.divisor} in bucket {position}"
            + (f" strides {slot.parameter.stride()}" if bucket.takes_over else "")
            for position, bucket in enumerate((*carrier.carried, carrier))
            for slot in bucket.slots
        ]
        check_agreement(
            carrier.group, carrier.device, listing, "the parameters whose gradients are reduced", self.timeout_seconds
        )

    def _order(self) -> None:
        waits = self._before_reduction is not None or any(bucket.waits_for_the_end for bucket in self.buckets)
        self._is_early = self.overlap and not waits
        carriers = [bucket for bucket in self.buckets if bucket.is_carrier]
        early = [bucket for bucket in self.buckets if not bucket.is_late and not bucket.is_carrier]
        late = [bucket for bucket in self.buckets if bucket.is_late]
        # Without overlap the flags come first, so that buckets can be unpacked one by one.
        first = [] if self._is_early else carriers
        self._launch_order = (*first, *early, *(bucket for bucket in carriers if bucket not in first), *late)
        self._num_early = len(early) if self._is_early else 0
        hooked = [bucket for bucket in self._launch_order if isinstance(bucket, HookedBucket)]
        for bucket in hooked:
            bucket.is_last = bucket is hooked[-1]

    # Hooks.

    def _make_hook(self, slot: Slot, bucket: Bucket | None) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            if self._phase is _Phase.QUIET:
                return
            if self._phase is _Phase.AUTOMATIC:
                if self._num_no_sync:
                    return
                if self._backward_id != current_backward_id():
                    self._begin_backward()
            if bucket is None or not self._is_early or self._wants_plan or slot.is_fired:
                return
            with self._lock:
                slot.is_fired = True
                bucket.num_waiting -= 1
                is_full = bucket.num_waiting == 0
            if is_full and self._phase is _Phase.ARMED:
                self._launches.launch()
            elif is_full:
                self.launch_full_buckets()

        return hook

    def _begin_backward(self) -> None:
        """The first gradient of a backward pass outside a step."""
        with self._lock:
            self._backward_id = current_backward_id()
            queue_backward_callback(self._end_of_backward)
            # A reduction may be open already: this pass runs inside another one (reentrant checkpoints), or the last
            # one raised.
            self._start_reduction()
            self._is_open = True

    def _end_of_backward(self) -> None:
        # The pass around this one, if any, must queue a callback of its own for the gradients that follow.
        self._backward_id = None
        if self._is_open:
            self._is_open = False
            self._finish_reduction()

    # Steps.

    def begin_step(self, will_synchronize: bool) -> None:
        """Start a step: gradients accumulate locally until ``arm``. Under ``no_sync`` no step synchronises.

        Raises StepUsageError when a step is under way.
        """
        if self._phase is not _Phase.AUTOMATIC:
            raise StepUsageError(
                "a step begins while the gradients of another one are accumulated: steps of one model cannot be "
                "nested; an engine that ends a step by an exception calls abort_step()"
            )
        self.prepare()
        self._will_synchronize = will_synchronize and self._num_no_sync == 0
        self._phase = _Phase.QUIET

    def arm(self, launches: LaunchOrder) -> None:
        """The backward of the last microbatch begins: from now on full buckets are launched, when ``launches`` says
        that it is this reducer's turn. No effect in a step without reduction.
        """
        if self._phase is _Phase.QUIET and self._will_synchronize:
            self._start_reduction()
            self._launches = launches
            launches.add(self)
            self._phase = _Phase.ARMED

    def make_local(self) -> None:
        """Gradients that are final are ordinary local ones from now on, of which the sum, divided, is the same."""
        for slot in self._slots.values():
            slot.final_part_to_local()

    def finish_step(self) -> None:
        """End the step; if it synchronises, wait for all reductions and write the final gradients.

        Collective over all groups of the parameters. Raises WaitTimeoutError or CommunicationError, naming bucket and
        group.
        """
        if self._phase is _Phase.AUTOMATIC:
            raise StepUsageError("finish_step() without begin_step()")
        self._phase = _Phase.AUTOMATIC
        if self._will_synchronize:
            self._finish_reduction()

    def abort_step(self) -> None:
        """The step ended by an exception: gradients stay local. Legal at any time."""
        self._phase = _Phase.AUTOMATIC
        self._will_synchronize = False
        self._is_open = False
        self._backward_id = None

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, backward passes and steps accumulate local gradients; the first one outside reduces them too, as in
        DDP.
        """
        self._num_no_sync += 1
        try:
            yield
        finally:
            self._num_no_sync -= 1

    def register_comm_hook(self, hook: CommHook) -> None:
        """Reduce by ``hook`` from now on: the groups were checked. The same on all ranks, between steps."""
        self._comm_hook = hook
        self._plan()

    def detach(self) -> None:
        """Remove all hooks; the reducer does nothing from then on."""
        self._remove_hooks()
        self._entries = ()
        self._layout = []
        self._shards = None
        self._slots = {}
        self.buckets = ()
        self._scaled_only = ()
        self._launch_order = ()
        self._num_early = 0

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # The reduction.

    def _start_reduction(self) -> None:
        self.prepare()
        for bucket in self._launch_order:
            if not bucket.is_launched:
                bucket.start_waiting()
        self._skip_launched()

    def _skip_launched(self) -> None:
        self._num_launched = 0
        while self._num_launched < len(self._launch_order) and self._launch_order[self._num_launched].is_launched:
            self._num_launched += 1

    def launch_full_buckets(self) -> bool:
        """Launch the next early buckets that are full; whether all early ones are launched."""
        with self._lock:
            while self._num_launched < self._num_early and self._launch_order[self._num_launched].num_waiting == 0:
                self._launch(self._launch_order[self._num_launched])
                self._num_launched += 1
            return self._num_launched >= self._num_early

    def launch_early_buckets(self) -> None:
        """The step ends: launch the early buckets that are left. Collective over all groups of the parameters."""
        if self._phase is not _Phase.ARMED:
            return
        with self._lock:
            for bucket in self._launch_order[self._num_launched : self._num_early]:
                self._launch(bucket)

    def _launch(self, bucket: Bucket) -> None:
        if bucket.is_carrier:
            bucket.own_flags = flags_of(self._progress(), wants_plan=self._wants_plan)
        bucket.pack()
        bucket.launch()
        self.num_launches += 1

    def _wait(self, bucket: Bucket) -> None:
        bucket.wait(self.timeout_seconds)

    def _finish_reduction(self) -> None:
        if self._before_reduction is not None:
            self._divide(*self._before_reduction())
        self._reduce()

    def _reduce(self) -> None:
        if not self._is_early and any(bucket.is_one_by_one for bucket in self.buckets):
            self._reduce_one_by_one()
            return
        self._skip_launched()
        for bucket in self._launch_order[self._num_launched :]:
            self._launch(bucket)
        changed = self._find_changed() if self._is_early else set()
        if self._learn_of_ranks():
            self._plan_together()
            self._reduce()
            return
        repeated: list[Bucket] = []
        for bucket in self._launch_order:
            self._wait(bucket)
            if bucket in changed:
                # Its memory is free now; all ranks of its group do the same at this point.
                self._launch(bucket)
                repeated.append(bucket)
            else:
                bucket.unpack()
                bucket.forget()
        for bucket in repeated:
            self._wait(bucket)
            bucket.unpack()
            bucket.forget()
            bucket.is_late = True
        if repeated:
            self._order()
        self._scale_alone()

    def _reduce_one_by_one(self) -> None:
        """The local gradients of a bucket are given up before the next one takes memory."""
        for bucket in self._launch_order:
            if bucket.is_carrier and not bucket.is_launched:
                self._launch(bucket)
        if self._learn_of_ranks():
            self._plan_together()
            self._reduce()
            return
        for bucket in self._launch_order:
            if not bucket.is_launched:
                self._launch(bucket)
            self._wait(bucket)
            bucket.unpack()
            bucket.forget()
        self._scale_alone()

    # What the ranks tell of themselves: progress.py

    def _learn_of_ranks(self) -> bool:
        """Whether some rank trains other parameters than before; nothing is unpacked yet.

        Raises DivergenceError, on all ranks, if they are not at the same step.
        """
        flags_of_groups = []
        for bucket in self._launch_order:
            if bucket.is_launched and (self._is_early or bucket.is_carrier):
                self._wait(bucket)
            if bucket.is_carrier:
                flags_of_groups.append((bucket.group, bucket.rank_flags()))
        if self._before_reduction is None:
            try:
                for group, flags in flags_of_groups:
                    check_progress(flags, self._progress(), group)
            except DivergenceError:
                self._let_go()
                raise
        return any(wants_plan(flags) for _, flags in flags_of_groups)

    def _let_go(self) -> None:
        """What was launched is not used; the local gradients are as they were."""
        for bucket in self._launch_order:
            if bucket.is_launched:
                self._wait(bucket)
                bucket.forget()

    def _plan_together(self) -> None:
        """All ranks of the groups know that somebody's parameters were frozen or thawed. Raises DivergenceError."""
        self._let_go()
        current = self._current_layout()
        groups = {bucket.group.ranks: bucket.group for bucket in self.buckets if bucket.is_carrier}
        for group in groups.values():
            members = [
                (entry.name, dtype is not None)
                for entry, dtype in zip(self._entries, current, strict=True)
                if entry.group.ranks == group.ranks
            ]
            check_trained([name for name, _ in members], [flag for _, flag in members], group)
        self._plan()
        self._num_launched = 0

    # Ranks that ran out of batches

    def begin_join(self, before_reduction: Callable[[], tuple[int, int]]) -> None:
        """Call ``before_reduction`` before each reduction, which begins after the backward; it returns what gradients
        are divided by, and how many ranks have any. The same on all ranks.
        """
        self._before_reduction = before_reduction
        self._order()

    def end_join(self) -> None:
        """All ranks are at work again."""
        self._before_reduction = None
        self._order()
        self._divide(self._divisor, self._divisor)

    def _divide(self, divisor: int, num_present: int) -> None:
        # Parts of a group are present as of the whole: the ranks of a TP_GROUP run out together.
        for slot in self._slots.values():
            slot.divisor_now = slot.divisor * divisor // self._divisor
            slot.num_present = max(1, slot.group_size * num_present // self._divisor)

    def shadow_reduction(self, divisor: int, num_present: int) -> None:
        """Take part in a reduction of the others without gradients; the gradients of this rank's shards are kept."""
        self._divide(divisor, num_present)
        for slot in self._slots.values():
            slot.is_silent = True
        try:
            if not self._reduce_silently():
                self._plan_together()
                for slot in self._slots.values():
                    slot.is_silent = True
                self._reduce_silently()
        finally:
            for slot in self._slots.values():
                slot.is_silent = False

    def _reduce_silently(self) -> bool:
        """False: nothing was done, since a rank trains other parameters than before."""
        for bucket in self._launch_order:
            if bucket.is_carrier:
                self._launch(bucket)
        if self._learn_of_ranks():
            return False
        for bucket in self._launch_order:
            if not bucket.is_carrier:
                self._launch(bucket)
            self._wait(bucket)
            bucket.unpack_silently()
            bucket.forget()
        return True

    def _find_changed(self) -> set[Bucket]:
        """The buckets that changed on some rank of their group after they were launched there."""
        changed: set[Bucket] = set()
        for bucket in self._launch_order:
            if not bucket.is_late:
                # Also the others, which came before the carriers: a timeout then names the oldest.
                self._wait(bucket)
            if bucket.carried:
                flags = bucket.changed_anywhere()
                changed.update(other for other, flag in zip(bucket.carried, flags, strict=True) if flag)
        return changed

    @torch.no_grad()
    def _scale_alone(self) -> None:
        """Parameters that no other rank holds: only the division."""
        for slot in self._scaled_only:
            gradient = slot.parameter.grad
            if gradient is not None and not slot.is_final:
                gradient.mul_(slot.pack_scale)
            slot.is_final = True


def _make_rescaling_hook(slot: Slot) -> Callable[[torch.Tensor], None]:
    def hook(gradient: torch.Tensor) -> None:
        slot.final_part_to_local()

    return hook
