"""Sharded data parallelism: parameters, gradients and optimizer state live in shards, and are whole only while used.

[Note: sharded data parallelism] FSDP2 does the work (``fully_shard``): it gathers the parameters of a module before
they are used and reduces their gradients into shards. This file decides *when*, so that it is right with microbatches,
a pipeline, tensor parallelism and modules that some ranks do not use. There are two ways (``sdp_gather``):

- "visit": a module's parameters are gathered by its own forward, freed after it, and gathered again for its backward.
  The fewest bytes at a time; all ranks of a sharding group must call, and go back through, the same modules in the same
  order, as everywhere with FSDP. Without a pipeline gradients are reduced where the last backward of the step leaves a
  module; with one, when the step is over.
- "step": everything is gathered in one fixed order when a step begins, and freed when it ends. Gradients are reduced
  in that order when the step is over. Nothing depends on what is used where: any schedule, modules that are used by
  some ranks only, weights that are read without their module being called.

[Note: what is reduced] When a step (or a backward outside of steps) is over, the ranks tell each other which parameters
have got a gradient. One that got a gradient on some rank is reduced by all, the others counting as zero; one that got
none anywhere keeps ``grad`` None. The gradient is the sum over all ranks that hold the parameter, divided by the
data-parallel size, as with the reducer. A parameter that tensor parallelism has left whole is summed over the TP_GROUP
too: FSDP's hook behind the reduce-scatter does that for the shards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from modelparallel.comm.collectives.started import start_gather_rows
from modelparallel.comm.waits import Wait, reduce_in_place
from modelparallel.data_parallel.agreement import check_agreement
from modelparallel.data_parallel.named_collectives import NamedGather, NamedReduceScatter
from modelparallel.data_parallel.progress import frozen_apart
from modelparallel.errors import UnsupportedError
from modelparallel.parameters.shards import Shard
from modelparallel.torch_compat import current_backward_id, queue_backward_callback
from modelparallel.torch_compat.fsdp import FSDPGroup, FSDPParameter

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group


@dataclass(frozen=True)
class ShardingGroups:
    """``shard``: the ranks among which one copy of the parameters is divided; ``replicate``: those that hold the same
    shard in other copies; ``tp``: the tensor-parallel group. ``divisor``: ranks whose losses are averaged.
    """

    shard: Group
    replicate: Group
    tp: Group
    divisor: int

    def mesh(self, device: torch.device) -> DeviceMesh:
        """The mesh for FSDP: of two dims, (replicate, shard), or of one if there is one copy. Local."""
        if self.replicate.size == 1:
            return DeviceMesh.from_group(self.shard.process_group, device.type, mesh_dim_names=("shard",))
        # Rows are sharding groups. The caller's own row and column are what counts, so the others may be made up; they
        # only have to be of the right shape.
        rows = [[rank - self.shard.ranks[self.shard.rank_in_group] + other for rank in self.shard.ranks]
                for other in self.replicate.ranks]  # fmt: skip
        return DeviceMesh.from_group(
            [self.replicate.process_group, self.shard.process_group],
            device.type,
            mesh=torch.tensor(rows, dtype=torch.int),
            mesh_dim_names=("replicate", "shard"),
        )


@dataclass
class ShardedParameter:
    """What is known of one parameter when it is sharded. ``is_split``: by tensor parallelism; ``needs_tp_sum``: its
    gradient is that of this rank's samples alone. ``parameter``: the one in the model until then, afterwards None, so
    that its memory is free before the next is sharded.
    """

    name: str
    parameter: nn.Parameter | None
    is_split: bool
    needs_tp_sum: bool


class _Entry:
    """A parameter in FSDP's care, and what the current reduction knows of it."""

    def __init__(self, known: ShardedParameter, inner: FSDPParameter) -> None:
        self.name = known.name
        self.is_split = known.is_split
        self.needs_tp_sum = known.needs_tp_sum
        self.inner = inner
        #: Whether it got a gradient that was reduced within the backward.
        self.is_noted = False
        #: Whether it had a reduced gradient before; None while nothing was reduced.
        self.had_gradient: bool | None = None
        self.tensor: nn.Parameter | None = None  # the parameter of optimizers
        #: The gradient that it was given: another one there, or none, is a script's.
        self.shown: torch.Tensor | None = None
        #: Whether all ranks trained it in the last reduction; None before the first.
        self.was_trained: bool | None = None
        self.aside: torch.Tensor | None = None  # what waited for a reduction before a step with weighted losses

    def show_gradient(self) -> None:
        """The parameter of optimizers has the reduced gradient."""
        if self.tensor is not None:
            self.tensor.grad = self.shown = self.inner.local_gradient

    def take_edit(self) -> None:
        """What a script has put there since, through ``optimizer.param_groups``, or taken away, counts."""
        if self.tensor is not None and self.tensor.grad is not self.shown:
            self.shown = self.tensor.grad
            self.inner.set_local_gradient(self.shown)


class _GatherGroup:
    """The parameters of one or more modules, gathered and reduced together."""

    def __init__(self, title: str, inner: FSDPGroup, entries: Sequence[_Entry], *, is_root: bool) -> None:
        self.title = title
        self.inner = inner
        self.entries = entries
        self.is_root = is_root
        self.reduced: list[_Entry] = []  # by the reduction that runs now, in the order of its flat buffer

    @property
    def num_elements(self) -> int:
        return sum(entry.inner.sharded.numel() for entry in self.entries)

    def note_reduced(self) -> None:
        """The reduction of what waits begins."""
        self.reduced = [entry for entry in self.entries if entry.inner.is_waiting]
        for entry in self.reduced:
            if entry.had_gradient is None:
                entry.had_gradient = entry.inner.sharded.grad is not None


Replace = Callable[[nn.Parameter, nn.Parameter, nn.Parameter], None]


class ShardedParameters:
    """The sharded parameters of one model: FSDP's groups, and when they gather and reduce. See the notes above.

    Args:
        root: the module whose forward contains all others; None in a pipeline, where each module stands for itself.
        plan: the modules of each group, by title; the root's group takes what is left.
        parameters: all parameters that are to be sharded. Others stay as they are.
        gathers_by_visit: ``sdp_gather`` is "visit".
        max_live: ``sdp_max_live_parameters``: elements that may be gathered at a time.
        place: called with a module before the parameters in it are sharded; they may get storage only then.
        replace: is told (old parameter, sharded parameter, gathered parameter) of each.

    Making it replaces the parameters in the modules, group by group: the old ones have no use afterwards, and nobody
    should keep them. Collective over the mesh, as are all methods that say so; each rank calls them in the same order.
    """

    def __init__(
        self,
        root: nn.Module | None,
        plan: Mapping[str, Sequence[nn.Module]],
        parameters: Sequence[ShardedParameter],
        groups: ShardingGroups,
        *,
        device: torch.device,
        policy: MixedPrecisionPolicy,
        gathers_by_visit: bool,
        max_live: int,
        timeout_seconds: float,
        place: Callable[[nn.Module], None],
        replace: Replace,
    ) -> None:
        self._groups = groups
        self._device = device
        self._timeout_seconds = timeout_seconds
        self.gathers_by_visit = gathers_by_visit
        self._is_pipelined = root is None
        #: Whether gradients are reduced within the last backward.
        self._reduces_in_backward = gathers_by_visit and root is not None
        self._is_in_step = False
        self._will_synchronize = False
        self._num_no_sync = 0
        self._backward_id: int | None = None
        listing = [
            f"{known.name} {tuple(known.parameter.shape)} {known.parameter.dtype}"
            for known in parameters
            if known.parameter is not None
        ]
        check_agreement(groups.shard, device, listing, "the parameters that are sharded", timeout_seconds)
        tops = [root] if root is not None else [module for modules in plan.values() for module in modules]
        item_of, kept_whole = _names_of(tops, parameters)
        options: Any = {"mesh": groups.mesh(device), "mp_policy": policy, "ignored_params": kept_whole}
        #: In the order in which they are gathered.
        self._all: list[_GatherGroup] = []
        for title, modules in plan.items():
            for module in modules:
                place(module)
            fully_shard(modules[0] if len(modules) == 1 else list(modules), **options)
            self._add_group(title, modules[0], item_of, replace, is_root=False)
        if root is not None:
            place(root)
            fully_shard(root, **options)
            self._add_group("the root", root, item_of, replace, is_root=True)
        self._entries = [entry for group in self._all for entry in group.entries]
        self._by_parameter = {id(entry.inner.sharded): entry for entry in self._entries}
        if gathers_by_visit and not self._is_pipelined:
            _bound_prefetch(self._all, max_live)
        self._set_backward(self._reduces_in_backward)

    def _add_group(
        self,
        title: str,
        module: Any,
        item_of: Mapping[tuple[int, str], ShardedParameter],
        replace: Replace,
        *,
        is_root: bool,
    ) -> None:
        if not FSDPGroup.exists(module):
            return  # all that it has is in other groups, or stays whole
        inner = FSDPGroup(module, self._device)
        items = [item_of[id(parameter.owner[0]), parameter.owner[1]] for parameter in inner.parameters]
        entries = [_Entry(item, parameter) for item, parameter in zip(items, inner.parameters, strict=True)]
        group = _GatherGroup(title, inner, entries, is_root=is_root)
        if self._groups.divisor != self._groups.shard.size * self._groups.replicate.size:
            module.set_gradient_divide_factor(self._groups.divisor)
            # gloo has no operation that sums and divides by any number at once.
            module.set_force_sum_reduction_for_comms(True)
        module.set_custom_all_gather(NamedGather(group.title, self._groups.shard, self._timeout_seconds))
        module.set_custom_reduce_scatter(NamedReduceScatter(group.title, self._groups.shard, self._timeout_seconds))
        if self._groups.replicate.size > 1:  # summed by torch itself, within the limit of the process group
            purpose = f"the reduction of the gradients of {group.title} over the copies"
            inner.name_reduction(Wait(self._groups.replicate, purpose, seconds=self._timeout_seconds).around)
        if self._groups.tp.size > 1 and any(entry.needs_tp_sum for entry in group.entries):
            module.set_all_reduce_hook(lambda flat: self._sum_over_tp(group, flat))
        if not self.gathers_by_visit:
            module.set_reshard_after_forward(False, recurse=False)
            if self._is_pipelined:
                group.inner.take_off_hooks()
        if not self._is_pipelined:
            group.inner.notice_backward(lambda: self._notice(group))
        inner.make_whole()  # other parts of the library want to know the gathered parameters
        inner.keep_place([item.name for item in items])
        self._all.append(group)
        for item, entry in zip(items, entries, strict=True):
            old, item.parameter = item.parameter, None
            assert old is not None and entry.inner.whole is not None
            entry.inner.take_hooks(old)
            replace(old, entry.inner.sharded, entry.inner.whole)

    @property
    def shard_group(self) -> Group:
        """The ranks among which each parameter is divided. Local."""
        return self._groups.shard

    # What others ask (shards.ParameterShards)

    def has(self, parameter: torch.Tensor) -> bool:
        """Whether the parameter is sharded. Local."""
        return id(parameter) in self._by_parameter

    def shards_of(self, parameter: nn.Parameter) -> Sequence[Shard]:
        """This rank's shard; none where it has no row of the parameter. Local."""
        entry = self._by_parameter.get(id(parameter))
        if entry is None or entry.inner.local.numel() == 0:
            return ()
        local = entry.inner.local
        if entry.tensor is None or entry.tensor.data_ptr() != local.data_ptr():
            entry.tensor = nn.Parameter(local.detach(), requires_grad=parameter.requires_grad)
            entry.show_gradient()
        is_first_copy = self._groups.replicate.rank_in_group == 0
        is_counted = is_first_copy and (entry.is_split or self._groups.tp.rank_in_group == 0)
        start = entry.inner.start
        return (Shard(parameter, entry.tensor, start, start + local.numel(), self._groups.shard, is_counted),)

    def collect_gradients(self) -> None:
        """Let each shard's tensor have the reduced gradient, and what a script has put there count. Local."""
        for entry in self._entries:
            entry.take_edit()
            entry.show_gradient()

    def forget_gradients(self, *, set_to_none: bool = True) -> None:
        """Forget reduced gradients, or fill them with zeros, and forget those that wait for a reduction. Local."""
        for entry in self._entries:
            entry.inner.forget_waiting()
            entry.take_edit()
            if not set_to_none and entry.inner.sharded.grad is not None:
                entry.inner.sharded.grad.zero_()
                continue
            entry.inner.sharded.grad = None
            entry.show_gradient()

    def finish_update(self) -> None:
        """Nothing: the parameters are gathered when they are next used."""

    def whole(self, sharded: Any) -> torch.Tensor:
        """The values of a sharded parameter, whole, detached; collective over the sharding group.

        Not ``full_tensor``: its collectives end the process where gloo is asked for tensors of a GPU (torch 2.11).
        """
        group = self._groups.shard
        num_rows = sharded.shape[0]
        per_rank = -(-num_rows // group.size)
        counts = [min(per_rank, max(num_rows - rank * per_rank, 0)) for rank in range(group.size)]
        entry = self._by_parameter.get(id(sharded))
        purpose = f"the gathering of {'a sharded tensor' if entry is None else f'the parameter {entry.name!r}'}"
        return start_gather_rows(sharded.to_local().detach(), group, counts).wait(purpose)

    def require_whole_parameters(self, optimizer_name: str) -> bool:
        """Raise for an optimizer that needs whole parameters (norms of layers, factored moments, matrix roots). Local.

        A shard is some rows of a parameter. The ``DTensor`` parameter stands for the whole of it, but holds no more: an
        update rule that is not element-wise would have to be written for ``DTensor``, which not all of torch's
        operations serve; what they do not serve would be wrong in silence where it acts on rows alone.
        """
        raise UnsupportedError(
            f"{optimizer_name} needs whole parameters, and sharded_data_parallel_degree={self._groups.shard.size} "
            "leaves rows of them to each process: use an element-wise optimizer (SGD, Adam, AdamW, FusedAdam), or "
            "shard_optimizer_state: True in place of sharded_data_parallel_degree"
        )

    def placed(self, parameter: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
        """A ``DTensor`` laid out as the sharded ``parameter``, with the values of the whole tensor. Local."""
        return self._by_parameter[id(parameter)].inner.placed(full)

    @property
    def num_elements(self) -> int:
        """Elements of all sharded parameters, whole. Local."""
        return sum(group.num_elements for group in self._all)

    @property
    def titles(self) -> list[str]:
        """What is gathered together. Local."""
        return [group.title for group in self._all]

    @property
    def num_gathered(self) -> int:
        """Elements that are gathered at this moment. Local."""
        return sum(group.num_elements for group in self._all if group.inner.is_gathered)

    # Steps

    def enter_step(self) -> None:
        """The model is used in a step for the first time. Collective over the sharding group if it gathers by step."""
        if not self.gathers_by_visit:
            self._gather_all()

    def prepare(self) -> None:
        """Before a forward outside of steps; likewise."""
        self._will_synchronize = self._num_no_sync == 0
        self.collect_gradients()
        self.enter_step()

    def begin_step(self, will_synchronize: bool) -> None:
        """Start a step with gradients: they accumulate until :meth:`arm`."""
        self._is_in_step = True
        self.collect_gradients()
        self._will_synchronize = will_synchronize
        self._set_backward(False)

    def arm(self) -> None:
        """The backward of the last microbatch begins."""
        if self._is_in_step and self._will_synchronize and self._reduces_in_backward:
            self._set_backward(True)

    def set_aside(self) -> None:
        """A step with weighted losses begins: what waits for a reduction is not multiplied with what it adds. Local."""
        for entry in self._entries:
            entry.aside = entry.inner.take_waiting()

    def put_back(self, factor: float | None) -> None:
        """It is over: multiply what it has added, or let go of that, and add what was set aside. Local."""
        for entry in self._entries:
            before, entry.aside = entry.aside, None
            if factor is not None:
                entry.inner.scale_waiting(factor, before)
                continue
            entry.inner.forget_waiting()
            if before is not None:
                entry.inner.wait_with(before)

    def finish_step(self) -> None:
        """End the step; if it synchronises, gradients become final. Collective over the mesh then."""
        self._is_in_step = False
        if self._will_synchronize:
            self._finish_reduction()
        self.free()
        self._set_backward(self._reduces_in_backward and self._num_no_sync == 0)

    def abort_step(self) -> None:
        """The step raised: gradients that are not reduced stay where they are."""
        self._is_in_step = False
        self._backward_id = None
        for group in self._all:
            group.inner.reset()
            group.reduced = []
        for entry in self._entries:
            entry.is_noted, entry.had_gradient = False, None
        self._set_backward(self._reduces_in_backward and self._num_no_sync == 0)

    def free(self) -> None:
        """Free all gathered parameters. Local."""
        for group in self._all:
            group.inner.free()

    def enter_no_sync(self) -> None:
        """Gradients of backward passes only accumulate from now on."""
        self._num_no_sync += 1
        if not self._is_in_step:
            self._set_backward(False)

    def leave_no_sync(self) -> None:
        """The end of that."""
        self._num_no_sync -= 1
        if not self._is_in_step:
            self._set_backward(self._reduces_in_backward and self._num_no_sync == 0)

    def _gather_all(self) -> None:
        for group in self._all:
            group.inner.gather()

    def _set_backward(self, reduces: bool) -> None:
        for group in self._all:
            group.inner.set_backward(reduces=reduces, frees=self.gathers_by_visit)

    # Reduction

    def _notice(self, group: _GatherGroup) -> None:
        """The backward leaves the group (without a pipeline)."""
        if not self._is_in_step and self._num_no_sync == 0 and current_backward_id() != -1:
            self._begin_backward()
        if not group.inner.reduces:
            return
        # What was frozen or thawed since the last reduction may be so on this rank alone: here all reduce what they did
        # then, and what is new comes when they have compared (see _finish_reduction).
        for entry in group.entries:
            if entry.was_trained is False and entry.inner.sharded.requires_grad:
                entry.aside = entry.inner.take_waiting(entry.aside)
        is_used = any(
            entry.inner.is_waiting or (entry.was_trained and not entry.inner.sharded.requires_grad)
            for entry in group.entries
        )
        for entry in group.entries:
            entry.is_noted = entry.is_noted or entry.inner.is_waiting
            # All ranks must reduce the same parameters of the group.
            is_trained = entry.inner.sharded.requires_grad if entry.was_trained is None else entry.was_trained
            if (is_used or group.is_root) and is_trained:
                entry.inner.wait_with_zeros()
        group.note_reduced()

    def _begin_backward(self) -> None:
        if self._backward_id != current_backward_id():
            self._backward_id = current_backward_id()
            # Twice: the reducer's own end of the backward, queued meanwhile, comes first on all ranks.
            queue_backward_callback(lambda: queue_backward_callback(self._end_of_backward))

    def _end_of_backward(self) -> None:
        self._backward_id = None
        self._finish_reduction()
        if not self.gathers_by_visit:
            self.free()

    def _finish_reduction(self) -> None:
        """Reduce what waits on any rank, in one order on all; see [Note: what is reduced]."""
        for entry in self._entries:
            if entry.aside is not None and not entry.inner.is_waiting:
                entry.inner.wait_with(entry.aside)
            entry.aside = None
        own = [bool(entry.inner.sharded.requires_grad) for entry in self._entries]
        each = [
            flag
            for entry, is_trained in zip(self._entries, own, strict=True)
            for flag in (entry.is_noted, entry.inner.is_waiting, is_trained, not is_trained)
        ]
        flags = torch.tensor(each, dtype=torch.uint8, device=self._device)
        if self._entries:
            for kind in (self._groups.shard, self._groups.replicate, self._groups.tp):
                if kind.size > 1:
                    purpose = "the exchange of which parameters have a gradient"
                    reduce_in_place(flags, kind, purpose, dist.ReduceOp.MAX, self._timeout_seconds)
        is_true = [flag > 0 for flag in flags.tolist()]
        rows = [is_true[start : start + 4] for start in range(0, len(is_true), 4)]
        for entry, row, is_trained in zip(self._entries, rows, own, strict=True):
            if row[2] and row[3]:
                here = [] if is_trained else [self._groups.shard.ranks[self._groups.shard.rank_in_group]]
                raise frozen_apart(entry.name, here, self._groups.shard)
            entry.was_trained = is_trained
        is_known = {id(entry): row[:2] for entry, row in zip(self._entries, rows, strict=True)}
        for group in self._all:
            late = [entry for entry in group.entries if is_known[id(entry)][1]]
            for entry in late:
                entry.inner.wait_with_zeros()
            if late:
                group.note_reduced()
                group.inner.reduce()
        for entry in self._entries:
            if entry.had_gradient is False and not any(is_known[id(entry)]):
                entry.inner.sharded.grad = None
            entry.is_noted, entry.had_gradient = False, None
            entry.show_gradient()

    def _sum_over_tp(self, group: _GatherGroup, flat: torch.Tensor) -> None:
        """``flat`` holds the shards of the gradients of ``group.reduced``, one after another."""
        parts = torch.split(flat, [entry.inner.padded_numel for entry in group.reduced])
        chosen = [part for part, entry in zip(parts, group.reduced, strict=True) if entry.needs_tp_sum]
        if not chosen:
            return
        packed = flat if len(chosen) == len(parts) else torch.cat(chosen)
        purpose = f"the reduction of the gradients of {group.title} over the TP_GROUP"
        reduce_in_place(packed, self._groups.tp, purpose, seconds=self._timeout_seconds)
        if packed is not flat:
            for part, total in zip(chosen, packed.split([part.numel() for part in chosen]), strict=True):
                part.copy_(total)


def _names_of(
    tops: Sequence[nn.Module], parameters: Sequence[ShardedParameter]
) -> tuple[dict[tuple[int, str], ShardedParameter], set[nn.Parameter]]:
    """The sharded parameters by (module, attribute), and those in the modules that stay whole."""
    known = {id(item.parameter): item for item in parameters}
    # The same parameter may be reached by several names; FSDP tells it by the first it comes across.
    item_of: dict[tuple[int, str], ShardedParameter] = {}
    whole: set[nn.Parameter] = set()
    for top in tops:
        for module in top.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) in known:
                    item_of[id(module), name] = known[id(parameter)]
                else:
                    whole.add(parameter)
    return item_of, whole


def _bound_prefetch(groups: Sequence[_GatherGroup], max_live: int) -> None:
    """Gather ahead, and keep, only what fits into ``max_live`` elements.

    FSDP gathers the group before while one goes backward, which has two in memory beside the root's. Where these are
    too many, it waits. The root's parameters are kept between forward and backward if the largest other group fits
    beside them.
    """
    root = next((group for group in groups if group.is_root), None)
    others = [group for group in groups if not group.is_root]
    kept = root.num_elements if root is not None else 0
    largest = max((group.num_elements for group in others), default=0)
    if root is not None and others and kept + largest > max_live:
        module: Any = root.inner.module
        module.set_reshard_after_forward(True, recurse=False)
    for before, group in zip([None, *others], others, strict=False):
        if before is not None and kept + before.num_elements + group.num_elements > max_live:
            module = group.inner.module
            module.set_modules_to_backward_prefetch([module])  # itself, which is there already
