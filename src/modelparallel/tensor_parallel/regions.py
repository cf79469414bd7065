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

With ``prescaled_batch`` all ranks have the same rows, and the group's batch counts t times: nothing is gathered or
sliced, and gradients that go out of the region are the mean of the ranks' (their sum is t times the true one).
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from modelparallel import trees
from modelparallel.comm.collectives import all_gather, all_reduce, average_gradient, reduce_scatter
from modelparallel.comm.exchange import exchange_integers
from modelparallel.errors import TensorParallelError

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group

_MAX_TENSORS = 28
_TEXT_LENGTH = 1200
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
    """What the first call of a region found: which output the row-wise layer makes, and which are slices."""

    tail: int | None
    is_slice: tuple[bool, ...]


class RegionCall:
    """One call of a region; what the layers inside need to know."""

    def __init__(self, name: str, group: Group, counts: tuple[int, ...], *, is_prescaled: bool, is_cheap: bool) -> None:
        self.name = name
        self.group = group
        self.counts = counts
        self.is_prescaled = is_prescaled
        self.is_cheap = is_cheap
        self.sums: list[torch.Tensor] = []

    def reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' partial outputs: of the own rows in the cheap layout, else of all."""
        if self.is_prescaled:
            return all_reduce(partial, self.group, has_equal_gradients=self.is_cheap)
        if not self.is_cheap:
            return all_reduce(partial, self.group)
        times = self._times(partial, "the input of its row-wise layer")
        return reduce_scatter(partial, self.group, counts=[count * times for count in self.counts])

    def note(self, output: torch.Tensor) -> torch.Tensor:
        """``output`` is what a row-wise layer returns."""
        self.sums.append(output)
        return output

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


class GatherMemo:
    """Arguments that were gathered: a mask that every layer gets is sent once. Shared by the regions of a model.

    Keyed by the tensor itself, weakly, and its version. ``serial`` numbers the calls, equally on all ranks: an entry
    counts only if the ranks' entries come from one call.
    """

    def __init__(self) -> None:
        self.serial = 0
        self._entries: dict[int, tuple[Any, int, int, tuple[int, ...], torch.Tensor | None]] = {}

    def __reduce__(self) -> Any:
        return GatherMemo, ()

    def serial_of(self, tensor: torch.Tensor) -> int:
        """The call that gathered this tensor as it is now; 0 if none."""
        entry = self._entries.get(id(tensor))
        if entry is None or entry[0]() is not tensor or tensor.is_inference() or entry[1] != tensor._version:
            return 0
        return entry[2]

    def find(self, tensor: torch.Tensor, counts: tuple[int, ...]) -> tuple[bool, torch.Tensor]:
        """(whether it fits these counts, what it became)."""
        _, _, _, known, result = self._entries[id(tensor)]
        return known == counts, tensor if result is None else result

    def add(self, tensor: torch.Tensor, counts: tuple[int, ...], result: torch.Tensor) -> None:
        """Remember a result that takes no gradient."""
        if tensor.requires_grad or tensor.is_inference() or result.requires_grad:
            return
        identity, entries = id(tensor), self._entries
        reference = weakref.ref(tensor, lambda _: entries.pop(identity, None))
        entries[identity] = (reference, tensor._version, self.serial, counts, None if result is tensor else result)


@dataclass
class _Arguments:
    """The arguments of a call, and what the ranks told each other of them."""

    tensors: list[torch.Tensor]
    names: list[str]
    hidden: torch.Tensor
    structure: str
    rows: list[list[int]]  # of each rank: see _header

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(row[3] for row in self.rows)

    def dims(self, index: int) -> tuple[int, ...]:
        """The first dim of a tensor on every rank."""
        return tuple(row[5 + index] for row in self.rows)

    def serials(self, index: int) -> set[int]:
        return {row[5 + _MAX_TENSORS + index] for row in self.rows}


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
    is_partial: bool = False,
) -> Any:
    """Run ``forward``, of the region ``name``, for the rows of all ranks; returns the own rows of what it returns.

    ``known``: what earlier calls found out, by kind of arguments; kept with the region. ``is_partial``: what it returns
    is a partial sum, and is reduced here.
    """
    arguments = _describe(name, args, kwargs)
    key = (arguments.structure + _flags(args, kwargs), torch.is_grad_enabled())
    outputs = known.get(key)
    is_meta = arguments.hidden.is_meta
    seed = int(torch.empty((), dtype=torch.int64).random_()) if is_training and not is_meta else 0
    state = _UNKNOWN if outputs is None else _GENERAL if outputs.tail is None else _CHEAP
    _exchange_headers(name, group, arguments, seed, state, memo, is_meta, is_prescaled)
    # Unless all ranks know, all find out, together.
    state = min(row[2] for row in arguments.rows)
    is_cheap = is_partial or state == _CHEAP
    counts = arguments.counts
    call = RegionCall(name, group, counts, is_prescaled=is_prescaled, is_cheap=is_cheap)
    if is_prescaled:
        inputs = [average_gradient(t, group) if t.requires_grad else t for t in arguments.tensors]
    else:
        inputs = [_gathered(name, group, arguments, index, memo) for index in range(len(arguments.tensors))]
    args, kwargs = _substituted(args, kwargs, inputs)
    token = _active.set(call)
    try:
        with _seeded(arguments.rows[0][0], arguments.hidden.device) if seed else nullcontext():
            result = forward(*args, **kwargs)
    finally:
        _active.reset(token)
    if is_partial:
        if not isinstance(result, torch.Tensor):
            raise TensorParallelError(f"'{name}' returns a partial sum, which must be one tensor, not {type(result)}")
        return call.reduce(result)
    if state == _UNKNOWN and not is_meta:
        outputs = _look_at(call, result)
        known[key] = outputs
    return _own_part(call, result, outputs)


def _describe(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
    tensors: list[torch.Tensor] = []
    names: list[str] = []
    texts: list[str] = []

    def look(path: trees.Path, leaf: Any) -> Any:
        where = ".".join(map(str, path[1:]))
        if isinstance(leaf, torch.Tensor):
            tensors.append(leaf)
            names.append(where)
            texts.append(f"{where}:{leaf.dtype}[{'' if leaf.ndim == 0 else ['rows', *leaf.shape[1:]]}]")
            return leaf
        if type(leaf).__name__ == "BlockMask":
            raise TensorParallelError(
                f"region '{name}': argument {where} is a BlockMask, whose rows cannot be joined with those of other "
                "ranks: use another attention implementation, for example 'sdpa'"
            )
        texts.append(f"{where}:{type(leaf).__name__}")
        return leaf

    trees.map_leaves_with_path(look, (args, kwargs))
    floating = [tensor for tensor in tensors if tensor.ndim >= 2 and tensor.is_floating_point()]
    candidates = floating or [tensor for tensor in tensors if tensor.ndim]
    if not candidates:
        raise TensorParallelError(f"region '{name}': no argument is a tensor with a batch dim, its rows are not known")
    if len(tensors) > _MAX_TENSORS:
        raise TensorParallelError(f"region '{name}': {len(tensors)} tensors as arguments, at most {_MAX_TENSORS}")
    return _Arguments(tensors, names, candidates[0], ";".join(texts), [])


def _flags(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Simple values among the arguments, which may change what a module returns."""
    found = [leaf for leaf in trees.leaves((args, kwargs)) if isinstance(leaf, (bool, str))]
    return repr(found) if found else ""


def _exchange_headers(
    name: str,
    group: Group,
    arguments: _Arguments,
    seed: int,
    state: int,
    memo: GatherMemo,
    is_meta: bool,
    is_prescaled: bool,
) -> None:
    """One small message: a common seed, whether the arguments are alike, their first dims, what is known already."""
    tensors = arguments.tensors
    padding = [0] * (_MAX_TENSORS - len(tensors))
    dims = [tensor.shape[0] if tensor.ndim else 0 for tensor in tensors] + padding
    # Shapes that are propagated, and rows that are equal on all ranks, have nothing to remember.
    serials = [0 if is_meta or is_prescaled else memo.serial_of(tensor) for tensor in tensors] + padding
    check = zlib.crc32(arguments.structure.encode())
    header = [seed, check, state, arguments.hidden.shape[0], len(tensors), *dims, *serials]
    if is_meta:
        arguments.rows = [header] * group.size
        return
    memo.serial += 1
    arguments.rows = exchange_integers(header, group)
    if len({row[1] for row in arguments.rows}) == 1:
        return
    own = arguments.structure.encode()[:_TEXT_LENGTH]
    texts = exchange_integers([*own, *[32] * (_TEXT_LENGTH - len(own))], group)
    lines = [f"  tp_rank {rank}: {bytes(text).decode(errors='replace').rstrip()}" for rank, text in enumerate(texts)]
    raise TensorParallelError(
        f"region '{name}': the ranks of the tensor-parallel group called it with different kinds of arguments; their "
        "rows cannot be joined. Batches must agree in all dims but the first (pad them to one length), and an argument "
        "must be a tensor on all ranks or on none (an attention implementation that leaves out a mask without padding "
        "does so on some ranks only: use 'eager')\n" + "\n".join(lines)
    )


def _gathered(name: str, group: Group, arguments: _Arguments, index: int, memo: GatherMemo) -> torch.Tensor:
    """An argument for the rows of all ranks.

    Its first dim is that of the batch on all ranks: it is joined. It is 1 on all, and the tensor is meant for each row:
    it stays if all ranks have the same, else each row gets that of its rank. Any other tensor must be the same on all.
    """
    tensor, counts, dims = arguments.tensors[index], arguments.counts, arguments.dims(index)
    if tensor.ndim == 0:
        return tensor
    serials = arguments.serials(index)
    if len(serials) == 1 and 0 not in serials:
        fits, result = memo.find(tensor, counts)
        if fits:
            return result
    result = _joined(name, group, arguments, index, tensor, counts, dims)
    if not tensor.is_meta:
        memo.add(tensor, counts, result)
    return result


def _joined(
    name: str,
    group: Group,
    arguments: _Arguments,
    index: int,
    tensor: torch.Tensor,
    counts: tuple[int, ...],
    dims: tuple[int, ...],
) -> torch.Tensor:
    if dims == counts:
        # A vector of as many numbers as rows and as positions may be either; those per position are equal everywhere.
        hidden = arguments.hidden
        is_ambiguous = tensor.ndim == 1 and hidden.ndim > 2 and set(counts) == {hidden.shape[1]}
        if is_ambiguous and not tensor.is_meta and _is_equal_everywhere(tensor, group):
            return tensor
        return all_gather(tensor, group, counts=counts)
    if all(dim == 1 for dim in dims):
        if tensor.is_meta or _is_equal_everywhere(tensor, group):
            return tensor
        repeats = torch.tensor(counts, device=tensor.device)
        return all_gather(tensor, group, counts=dims).repeat_interleave(repeats, 0, output_size=sum(counts))
    if all(dim in (1, count) for dim, count in zip(dims, counts, strict=True)):
        own = counts[group.rank_in_group]
        return all_gather(tensor.expand(own, *tensor.shape[1:]), group, counts=counts)
    if len(set(dims)) == 1 and (tensor.is_meta or _is_equal_everywhere(tensor, group)):
        return tensor
    raise TensorParallelError(
        f"region '{name}': argument {arguments.names[index]} has shape {tuple(tensor.shape)} here and first dims "
        f"{dims} on the ranks, whose batches are {counts}: a tensor whose first dim is not the batch must be equal on "
        "all ranks of the tensor-parallel group"
    )


def _is_equal_everywhere(tensor: torch.Tensor, group: Group) -> bool:
    parts = all_gather(tensor.detach().unsqueeze(0), group)
    return all(torch.equal(parts[0], part) for part in parts[1:])


def _substituted(
    args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Sequence[torch.Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    remaining = iter(tensors)
    # A path is not needed, but this walks in the order in which _describe did.
    mapped: tuple[tuple[Any, ...], dict[str, Any]] = trees.map_leaves_with_path(
        lambda _, leaf: next(remaining) if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs)
    )
    return mapped


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
    tail = None
    if len(call.sums) == 1:
        found = [index for index, tensor in enumerate(tensors) if tensor is call.sums[0]]
        tail = found[0] if len(found) == 1 else None
    return Outputs(tail, is_slice)


def _own_part(call: RegionCall, result: Any, outputs: Outputs | None) -> Any:
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
            return _slice_of_rank(call.own_rows(leaf, f"output {index}"), call.name, index)
        return call.own_rows(leaf, f"output {index}")

    mapped = trees.map_leaves(own, result)
    if call.is_cheap and outputs is not None and outputs.tail is not None and index < outputs.tail:
        raise TensorParallelError(f"region '{call.name}': an output that its first call returned is missing")
    return mapped


class RankSlice(torch.Tensor):
    """An output of a region that is only this rank's slice of the features: any use of it is an error that says so.

    Modules return attention weights whether or not they are wanted; those of all heads are on no rank.
    """

    _smp_origin: str

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
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


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw the same random numbers on all ranks inside (dropout of replicated values), and leave the streams alone."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    states = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
