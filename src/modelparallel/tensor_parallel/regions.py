"""How a region runs: the rows of all ranks come in, each rank's own rows go out (see plans.py, [Note: Regions]).

[Note: Partial gradients] Inside a region a tensor is either a slice, different on each rank, or *replicated*: equal on
all ranks, for the rows of all. Each rank's loss is that of its own rows, so the gradient of a replicated tensor is
partial: the true one is the sum over the ranks. All follows from that. A row-wise sum hands slices the true gradient
(its backward sums, too). Whole parameters used inside get partial gradients, which the default reducer adds up over
dp; a router or a norm in a stretch of cut features needs nothing of its own. The entry sums what goes back to each
rank's rows.

Two layouts, with the same numbers:

    cheap      entry: all-gather rows, backward reduce-scatter; row-wise sum: reduce-scatter rows, backward all-gather
    general    entry: the same; row-wise sum: all-reduce, also in backward; exit: each rank slices its own rows

The cheap one is right where the row-wise layer's output is the very tensor that the region returns. A region finds
that out: its first call, for each kind of arguments, is general, and looks. It also looks whether the outputs are
replicated: what differs from rank to rank there is a slice (attention weights of a rank's own heads) and is handed
out as a tensor that says so when it is used. All ranks run the same program, and say so to each other at each entry.

[Note: Dropout] Random operations on replicated tensors must draw the same on all ranks, those on slices something else
on each. What comes between a column-wise layer and the next sum works on slices, so there the default generator is one
of the rank's own; elsewhere in the region it is one that all ranks share.

With ``prescaled_batch`` all ranks have the same rows, and the group's batch counts t times: nothing is gathered or
sliced, and gradients that go out of the region are the mean of the ranks' (their sum is t times the true one).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from modelparallel import trees
from modelparallel.comm.collectives.agreed_random import default_generator_at, derived_seed
from modelparallel.comm.collectives.split import all_gather, all_reduce, average_gradient, reduce_scatter
from modelparallel.comm.collectives.started import exchange_integers
from modelparallel.errors import TensorParallelError
from modelparallel.tensor_parallel.region_arguments import (
    SEPARATE,
    GatherMemo,
    RegionArguments,
    agree,
    joined,
    read_arguments,
    separately,
    substituted,
)
from modelparallel.torch_compat import DisableTorchFunctionSubclass
from modelparallel.torch_compat.functions import TensorFunction
from modelparallel.torch_compat.generators import default_generator
from modelparallel.torch_compat.private_parts import version_of

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group

_UNKNOWN, _GENERAL, _CHEAP = 0, 1, 2

_active: ContextVar[RegionCall | None] = ContextVar("smp_region_call", default=None)


def active_call(what: str | None = None) -> RegionCall | None:
    """The call of the region that is running here. ``what``: a layer that needs one, by name; raises if there is
    none.
    """
    call = _active.get()
    if call is None and what is not None:
        raise TensorParallelError(
            f"{what} holds a slice of its features and was called outside its region, the module that is run for the "
            "rows of all ranks: call that module (or checkpoint it as a whole)"
        )
    return call


@dataclass(frozen=True)
class Outputs:
    """What the first call of a region found: which output the row-wise layer makes, and which are slices.

    ``is_separate``: the rows of the ranks must not be joined.
    """

    tail: int | None
    is_slice: tuple[bool, ...]
    is_separate: bool = False


class RegionCall:
    """One call of a region; what the layers inside need to know."""

    def __init__(self, name: str, group: Group, counts: tuple[int, ...], *, is_prescaled: bool, is_cheap: bool) -> None:
        self.name = name
        self.group = group
        self.counts = counts
        self.is_prescaled = is_prescaled
        self.is_cheap = is_cheap
        self.sums: list[torch.Tensor] = []
        self._versions: list[int | None] = []
        #: Of the numbers that all ranks draw alike in this call; 0 if nothing is drawn.
        self.seed = 0
        self._shared_state: torch.Tensor | None = None
        self._num_stretches = 0

    def enter_slices(self, output: torch.Tensor) -> torch.Tensor:
        """``output`` is what a column-wise layer returns: from here on this rank draws numbers of its own."""
        if self.seed and self._shared_state is None:
            generator = default_generator(output.device)
            self._shared_state = generator.get_state()
            self._num_stretches += 1
            generator.manual_seed(derived_seed(self.seed, self._num_stretches, self.group.rank_in_group))
        return output

    def _leave_slices(self, device: torch.device) -> None:
        if self._shared_state is not None:
            default_generator(device).set_state(self._shared_state)
            self._shared_state = None

    def reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' partial outputs: of the own rows in the cheap layout, else of all."""
        self._leave_slices(partial.device)
        if self.is_prescaled:
            return all_reduce(partial, self.group, has_equal_gradients=self.is_cheap)
        if not self.is_cheap:
            return all_reduce(partial, self.group)
        times = self._times(partial, "the input of its row-wise layer")
        return reduce_scatter(partial, self.group, counts=[count * times for count in self.counts])

    def note(self, output: torch.Tensor) -> torch.Tensor:
        """``output`` is what a row-wise layer returns."""
        self.sums.append(output)
        self._versions.append(_version(output))
        return output

    @property
    def only_sum(self) -> torch.Tensor | None:
        """What the one row-wise layer of the region has returned, if nobody has written to it since."""
        if len(self.sums) != 1 or self._versions[0] is None or _version(self.sums[0]) != self._versions[0]:
            return None
        return self.sums[0]

    def own_rows(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        """The caller's rows of a replicated tensor."""
        if self.is_prescaled:
            return tensor
        times = self._times(tensor, what)
        start = sum(self.counts[: self.group.rank_in_group]) * times
        return tensor.narrow(0, start, self.counts[self.group.rank_in_group] * times)

    def _times(self, tensor: torch.Tensor, what: str) -> int:
        total = sum(self.counts)
        if tensor.ndim == 0 or tensor.shape[0] % max(total, 1):
            raise TensorParallelError(
                f"region '{self.name}': {what} has shape {tuple(tensor.shape)}, which cannot be told apart by the "
                f"{total} rows of all ranks: a region must return tensors whose first dim is the batch, and losses "
                "belong outside"
            )
        return tensor.shape[0] // max(total, 1)


def run_region(
    name: str,
    group: Group,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    memo: GatherMemo,
    known: dict[tuple[str, bool], Outputs],
    is_prescaled: bool,
    is_training: bool,
    is_pipelined: bool = False,
    is_partial: bool = False,
) -> Any:
    """Run ``forward``, of the region ``name``, for the rows of all ranks; returns the own rows of what it returns.

    ``known``: what earlier calls found out, by kind of arguments; kept with the region. ``is_partial``: what it returns
    is a partial sum, and is reduced here. ``is_pipelined``: an output that is a slice becomes None, since the pipeline
    would use it.
    """
    own = read_arguments(name, args, kwargs)
    is_meta = own.tensors[0].is_meta
    has_grad = torch.is_grad_enabled()
    seed = 1 + int(torch.empty((), dtype=torch.int64).random_(2**62)) if is_training and not is_meta else 0

    def state_of(signature: str) -> int:
        outputs = known.get((signature, has_grad))
        if outputs is None:
            return _UNKNOWN
        return SEPARATE if outputs.is_separate else _GENERAL if outputs.tail is None else _CHEAP

    def run(part: RegionArguments) -> Any:
        if is_prescaled:
            inputs = substituted(part, [average_gradient(t, group) if t.requires_grad else t for t in part.tensors])
        else:
            inputs = joined(name, group, part, memo)
        is_cheap = is_partial or part.state == _CHEAP
        call = RegionCall(name, group, part.counts, is_prescaled=is_prescaled, is_cheap=is_cheap)
        call.seed = seed
        token = _active.set(call)
        try:
            with default_generator_at(seed, own.tensors[0].device) if seed else nullcontext():
                result = forward(*inputs[0], **inputs[1])
        finally:
            _active.reset(token)
        if is_partial:
            if not isinstance(result, torch.Tensor):
                raise TensorParallelError(f"'{name}' returns a partial sum, which must be a tensor, not {type(result)}")
            return call.reduce(result)
        # Unless all ranks know a kind of arguments, all find out, together.
        outputs = known.get((part.signature, has_grad)) if part.state != _UNKNOWN else None
        if outputs is None and not is_meta:
            outputs = known[part.signature, has_grad] = _look_at(call, result)
        return _own_part(call, result, outputs, is_pipelined)

    seed, passes = agree(name, group, own, seed=seed, states=state_of, memo=None if is_prescaled else memo)
    if is_prescaled and len(set(passes[0].counts)) > 1:
        raise TensorParallelError(
            f"region '{name}': prescaled_batch is set, but the ranks of the tensor-parallel group have batches of "
            f"{list(passes[0].counts)} rows: feed them the same batch (shard data by rdp_rank)"
        )
    results = [(part, run(part)) for part in passes]
    first, own_result = passes[0], next(result for part, result in results if part.is_own)
    if is_partial and first.state == _UNKNOWN and len(passes) == 1 and not (is_meta or is_prescaled):
        with torch.no_grad():
            alone = [(part, run(part)) for part in separately(first, group)]
        is_separate = _differs_somewhere(own_result, next(result for part, result in alone if part.is_own), group)
        known[own.signature, has_grad] = Outputs(0, (), is_separate)
        if is_separate:
            results = [(part, run(part)) for part in separately(first, group)]
            own_result = next(result for part, result in results if part.is_own)
    others = [
        leaf
        for part, result in results
        if not part.is_own
        for leaf in trees.leaves(result)
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad
    ]
    return _with_passes(own_result, others) if others else own_result


def _differs_somewhere(joined_result: torch.Tensor, own_result: torch.Tensor, group: Group) -> bool:
    """Whether some rank's rows came out otherwise together with those of others: a module of fused experts may be given
    rows in the order of the experts, which is lost when the ranks' rows are put one after another.
    """
    own = own_result.double()
    is_other = bool((joined_result.detach().double() - own).norm() > 0.05 * own.norm())
    return any(row[0] for row in exchange_integers([int(is_other)], group, "a region"))


class _Depend(TensorFunction):
    """The first tensor, whose gradient also sets off the backward of the others: it has messages, all ranks join in."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        ctx.others = [(other.shape, other.dtype, other.device) for other in others]
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.others]
        return grads[0], *zeros


def _with_passes(result: Any, others: list[torch.Tensor]) -> Any:
    waiting = list(others)

    def attach(leaf: Any) -> Any:
        if not waiting or not isinstance(leaf, torch.Tensor) or not leaf.requires_grad:
            return leaf
        attached = _Depend.apply(leaf, *waiting)
        waiting.clear()
        return attached

    return trees.map_leaves(attach, result)


def _look_at(call: RegionCall, result: Any) -> Outputs:
    """Find out, by the values of this call, what the outputs are."""
    tensors = [leaf for leaf in trees.leaves(result) if isinstance(leaf, torch.Tensor)]
    sums = []
    for tensor in tensors:
        values = torch.nan_to_num(tensor.detach().double())
        sums.append(torch.stack([values.sum(), values.abs().sum(), values.square().sum()]))
    is_slice: tuple[bool, ...] = ()
    if tensors:
        ranks = all_gather(torch.stack(sums).unsqueeze(0), call.group)
        # Replicated values are computed alike on each rank, up to the order of additions of some kernels.
        scale = ranks.abs().amax(dim=(0, 2)).clamp(min=1e-30)
        spread = (ranks - ranks[:1]).abs().amax(dim=(0, 2))
        is_slice = tuple((spread > 1e-3 * scale).tolist())
    if not tensors or is_slice[0]:
        raise TensorParallelError(
            f"region '{call.name}': its first output is not equal on the tensor-parallel ranks, so that it is not the "
            "sum that a row-wise layer makes: the plan cuts a layer whose features are not used by a row-wise one"
            if tensors
            else f"region '{call.name}' returns no tensor"
        )
    places = [index for index, tensor in enumerate(tensors) if tensor is call.only_sum]
    return Outputs(places[0] if len(places) == 1 else None, is_slice)


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else version_of(tensor)  # inference tensors do not count it


def _own_part(call: RegionCall, result: Any, outputs: Outputs | None, is_pipelined: bool) -> Any:
    index = -1

    def own(leaf: Any) -> Any:
        nonlocal index
        if not isinstance(leaf, torch.Tensor):
            return leaf
        index += 1
        if call.is_cheap and outputs is not None and index == outputs.tail:
            if len(call.sums) != 1 or leaf is not call.sums[0]:
                raise TensorParallelError(
                    f"region '{call.name}': its row-wise layer made what it returned in its first call, not in this "
                    "one, although the arguments are of the same kind: give the two different values of an "
                    "argument (a bool or a string), or do something with the output in the first call too"
                )
            return leaf
        if outputs is not None and index < len(outputs.is_slice) and outputs.is_slice[index]:
            if is_pipelined:
                return None
            return _slice_of_rank(call.own_rows(leaf, f"output {index}"), call.name, index)
        return call.own_rows(leaf, f"output {index}")

    mapped = trees.map_leaves(own, result)
    if call.is_cheap and outputs is not None and outputs.tail is not None and index < outputs.tail:
        raise TensorParallelError(f"region '{call.name}': an output that its first call returned is missing")
    return mapped


class RankSlice(torch.Tensor):
    """An output of a region that is only this rank's slice of the features: any use of it is an error that says so.

    Modules return attention weights whether or not they are wanted, and no rank has the weights of all heads.
    """

    _smp_origin: str

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _METADATA:
            with DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        origin = next((value._smp_origin for value in trees.leaves((args, kwargs)) if isinstance(value, RankSlice)), "")
        raise TensorParallelError(
            f"{origin} is this rank's slice of it (attention weights: of its own heads), not the whole: it cannot be "
            "used with tensor_parallel_degree > 1 (output_attentions is not supported there)"
        )


_METADATA = frozenset(
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "requires_grad", "grad_fn", "is_leaf", "ndim", "layout", "is_meta")
) | {torch.Tensor.dim, torch.Tensor.size, torch.Tensor.is_floating_point, torch.Tensor.__repr__}


def _slice_of_rank(tensor: torch.Tensor, name: str, index: int) -> torch.Tensor:
    marked = tensor.detach().as_subclass(RankSlice)
    marked._smp_origin = f"output {index} of '{name}'"
    return marked
