"""The arguments of a region's call: what the ranks tell each other of them, and how their rows come together.

[Note: Kinds of arguments] Rows can be joined where the ranks' arguments are of one kind: the same tree, tensors of the
same dtype and shape but for the first dim, and equal numbers, texts and flags. Where they are not (a rank whose batch
has no padding gets no mask from some attention implementations; batches of different width), the region makes one
*pass* for each kind, on the rows of the ranks that have it, in one order on all ranks. A rank whose own arguments are
of another kind takes part with no rows: it has its slice of the features to compute.
"""

from __future__ import annotations

import ast
import copy
import json
import math
import weakref
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from modelparallel import trees
from modelparallel.comm.collectives.split import all_gather
from modelparallel.comm.collectives.started import exchange_integers
from modelparallel.errors import TensorParallelError
from modelparallel.torch_compat.private_parts import version_of

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group

SEPARATE = 3
_MAX_TENSORS = 28
_SEED, _CHECK, _STATE, _ROWS, _LENGTH, _FIRST = range(6)  # the places of a header; then first dims, then serials


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

    def __len__(self) -> int:
        return len(self._entries)

    def serial_of(self, tensor: torch.Tensor) -> int:
        """The call that gathered this tensor as it is now; 0 if none."""
        entry = self._entries.get(id(tensor))
        if entry is None or entry[0]() is not tensor or tensor.is_inference() or entry[1] != version_of(tensor):
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
        entries[identity] = (reference, version_of(tensor), self.serial, counts, None if result is tensor else result)


@dataclass
class RegionArguments:
    """The arguments of one pass: ``counts`` are the rows of each rank, 0 where it takes no part with rows.

    ``kind`` describes them as text, ``signature`` without what may change from call to call: sizes and numbers.
    ``dims`` and ``serials`` have a row for each rank: the first dims of the tensors, and the calls that gathered them.
    ``state``: what is known of the signature. ``is_own``: whether this rank takes part with rows.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: list[torch.Tensor]
    names: list[str]
    kind: str
    signature: str
    counts: tuple[int, ...] = ()
    members: tuple[int, ...] = ()
    dims: tuple[tuple[int, ...], ...] = ()
    serials: tuple[tuple[int, ...], ...] = ()
    state: int = 0
    is_own: bool = True

    @property
    def hidden(self) -> torch.Tensor | None:
        """The tensor whose first dim is the batch: the first floating one of two or more dims, or else the first."""
        floating = [tensor for tensor in self.tensors if tensor.ndim >= 2 and tensor.is_floating_point()]
        return next(iter(floating or [tensor for tensor in self.tensors if tensor.ndim]), None)


def read_arguments(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RegionArguments:
    """What is to be known of the arguments of a call of the region ``name``."""
    tensors: list[torch.Tensor] = []
    names: list[str] = []
    leaves: list[list[Any]] = []

    def look(path: trees.Path, leaf: Any) -> Any:
        where = ".".join(map(str, path[1:]))
        if isinstance(leaf, torch.Tensor):
            tensors.append(leaf)
            names.append(where)
            leaves.append([where, str(leaf.dtype)[6:], leaf.ndim, list(leaf.shape[1:]), leaf.requires_grad])
            return leaf
        if type(leaf).__name__ == "BlockMask":
            raise TensorParallelError(
                f"region '{name}': argument {where} is a BlockMask, whose rows cannot be joined with those of other "
                "ranks: use another attention implementation, for example 'sdpa'"
            )
        is_literal = leaf is None or type(leaf) in (bool, str, int) or (type(leaf) is float and math.isfinite(leaf))
        leaves.append([where, type(leaf).__name__, *([repr(leaf)] if is_literal else [])])
        return leaf

    trees.map_leaves_with_path(look, (args, kwargs))
    arguments = RegionArguments(args, kwargs, tensors, names, json.dumps(leaves), _signature(leaves))
    if arguments.hidden is None:
        raise TensorParallelError(f"region '{name}': no argument is a tensor with a batch dim, its rows are not known")
    if len(tensors) > _MAX_TENSORS:
        raise TensorParallelError(f"region '{name}': {len(tensors)} tensors as arguments, at most {_MAX_TENSORS}")
    return arguments


def _signature(leaves: list[list[Any]]) -> str:
    # A tensor has five entries, a number, text or flag three, any other object two.
    return json.dumps(
        [
            (*leaf[:3], leaf[4]) if len(leaf) == 5 else leaf[:2] if leaf[1] in ("int", "float") else leaf
            for leaf in leaves
        ]
    )


def agree(
    name: str, group: Group, own: RegionArguments, *, seed: int, states: Any, memo: GatherMemo | None
) -> tuple[int, list[RegionArguments]]:
    """(a common seed, the passes): one small message, and two more if the ranks' arguments are of different kinds.

    ``states``: what is known of a signature, a number; of each pass the least of the ranks' is taken. `SEPARATE` says
    that rows must not be joined: then each rank's make a pass. Without a ``memo`` the ranks have equal rows.
    """
    hidden = own.hidden
    assert hidden is not None
    padding = [0] * (_MAX_TENSORS - len(own.tensors))
    dims = [tensor.shape[0] if tensor.ndim else 0 for tensor in own.tensors] + padding
    text = own.kind.encode()
    header = [seed, zlib.crc32(text), states(own.signature), hidden.shape[0], len(text), *dims]
    if hidden.is_meta:
        return 0, [_pass_of(own, [[*header, *[0] * _MAX_TENSORS]] * group.size, tuple(range(group.size)))]
    serials = [memo.serial_of(tensor) if memo is not None else 0 for tensor in own.tensors] + padding
    if memo is not None:
        memo.serial += 1
    rows = exchange_integers([*header, *serials], group, name)
    everybody = tuple(range(group.size))
    if len({row[_CHECK] for row in rows}) == 1:
        if min(row[_STATE] for row in rows) != SEPARATE:
            return rows[0][_SEED], [_pass_of(own, rows, everybody)]
        return rows[0][_SEED], [_part(own, own.kind, rows, (rank,), group, SEPARATE) for rank in everybody]
    length = max(row[_LENGTH] for row in rows)
    texts = exchange_integers([*text, *[32] * (length - len(text))], group, name)
    kinds = [bytes(encoded).decode().rstrip() for encoded in texts]
    _check_kinds(name, kinds, is_prescaled=memo is None)
    distinct = list(dict.fromkeys(kinds))
    known = exchange_integers([states(_signature(json.loads(kind))) for kind in distinct], group, name)
    passes = []
    for index, kind in enumerate(distinct):
        members = tuple(rank for rank in everybody if kinds[rank] == kind)
        state = min(row[index] for row in known)
        for some in [(rank,) for rank in members] if state == SEPARATE else [members]:
            passes.append(_part(own, kind, rows, some, group, state))
    return rows[0][_SEED], passes


def separately(own: RegionArguments, group: Group) -> list[RegionArguments]:
    """A pass for each rank, of arguments that are of one kind and go together by `agree`."""
    return [
        _part(own, own.kind, [[0, 0, 0, count, 0, *dims] for count, dims in zip(own.counts, own.dims, strict=True)],
              (rank,), group, SEPARATE)
        for rank in range(group.size)
    ]  # fmt: skip


def _part(
    own: RegionArguments, kind: str, rows: Sequence[Sequence[int]], members: tuple[int, ...], group: Group, state: int
) -> RegionArguments:
    is_own = group.rank_in_group in members
    part = _pass_of(copy.copy(own) if is_own else _stand_in(own, kind), rows, members)
    part.is_own, part.state = is_own, state
    return part


def _pass_of(arguments: RegionArguments, rows: Sequence[Sequence[int]], members: tuple[int, ...]) -> RegionArguments:
    number = len(arguments.tensors)
    arguments.members = members
    arguments.counts = tuple(row[_ROWS] if rank in members else 0 for rank, row in enumerate(rows))
    arguments.dims = tuple(tuple(row[_FIRST : _FIRST + number]) for row in rows)
    start = _FIRST + _MAX_TENSORS
    # What was gathered of some ranks is not remembered.
    arguments.serials = tuple(
        tuple(row[start : start + number]) if len(members) == len(rows) else (0,) * number for row in rows
    )
    arguments.state = min(row[_STATE] for row in rows)
    return arguments


def _check_kinds(name: str, kinds: list[str], is_prescaled: bool) -> None:
    """Raise, on all ranks, if one rank cannot make what another has.

    A tensor without rows, and a flag, can be made; any other object stands for itself.
    """
    described = [json.loads(kind) for kind in dict.fromkeys(kinds)]
    names = {tuple(leaf[0] for leaf in leaves) for leaves in described}
    if (
        not is_prescaled
        and len(names) == 1
        and all(
            all(len(leaf) > 2 for leaf in leaves_of_ranks) or len({str(leaf) for leaf in leaves_of_ranks}) == 1
            for leaves_of_ranks in zip(*described, strict=True)
        )
    ):
        return
    lines = [f"  tp_rank {rank}: {kind}" for rank, kind in enumerate(kinds)]
    raise TensorParallelError(
        f"region '{name}': the ranks of the tensor-parallel group called it with different arguments, which must "
        + ("be equal with prescaled_batch\n" if is_prescaled else "have the same names and types of objects\n")
        + "\n".join(lines)
    )


def _stand_in(own: RegionArguments, kind: str) -> RegionArguments:
    """Arguments of another kind, without rows, made from the own ones."""
    leaves = json.loads(kind)
    assert own.hidden is not None
    device = own.hidden.device
    remaining = iter(leaves)
    tensors: list[torch.Tensor] = []

    def make(_: trees.Path, leaf: Any) -> Any:
        wanted = next(remaining)
        if len(wanted) == 5:
            _, dtype, ndim, shape, requires_grad = wanted
            made = torch.zeros((0, *shape) if ndim else (), dtype=getattr(torch, dtype), device=device)
            tensors.append(made.requires_grad_(requires_grad and torch.is_grad_enabled()))
            return tensors[-1]
        return ast.literal_eval(wanted[2]) if len(wanted) == 3 else leaf

    args, kwargs = trees.map_leaves_with_path(make, (own.args, own.kwargs))
    names = [leaf[0] for leaf in leaves if len(leaf) == 5]
    return RegionArguments(args, kwargs, tensors, names, kind, _signature(leaves))


def joined(
    name: str, group: Group, arguments: RegionArguments, memo: GatherMemo
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a pass for the rows of all its members."""
    return substituted(
        arguments, [_gathered(name, group, arguments, index, memo) for index in range(len(arguments.tensors))]
    )


def substituted(arguments: RegionArguments, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with other tensors in the places of theirs."""
    remaining = iter(tensors)
    mapped: tuple[tuple[Any, ...], dict[str, Any]] = trees.map_leaves_with_path(
        lambda _, leaf: next(remaining) if isinstance(leaf, torch.Tensor) else leaf, (arguments.args, arguments.kwargs)
    )
    return mapped


def _gathered(name: str, group: Group, arguments: RegionArguments, index: int, memo: GatherMemo) -> torch.Tensor:
    tensor = arguments.tensors[index]
    serials = {row[index] for row in arguments.serials}
    if len(serials) == 1 and 0 not in serials:
        fits, result = memo.find(tensor, arguments.counts)
        if fits:
            return result
    result = _joined(name, group, arguments, index)
    if not tensor.is_meta and len(arguments.members) == group.size:
        memo.add(tensor, arguments.counts, result)
    return result


def _joined(name: str, group: Group, arguments: RegionArguments, index: int) -> torch.Tensor:
    """A tensor for the rows of all members.

    Its first dim is that of the batch on all: it is joined. It is 1 on all, and the tensor is meant for each row: one
    is enough if all have the same, else each row gets that of its rank. Any other tensor must be equal on all.
    """
    tensor, counts, members = arguments.tensors[index], arguments.counts, arguments.members
    dims = [row[index] for row in arguments.dims]
    held = [(dims[rank], counts[rank]) for rank in members]
    if tensor.ndim == 0:
        if len(members) == group.size:
            return tensor
        vector = tensor.unsqueeze(0) if arguments.is_own else tensor.new_empty(0)
        common = _common(vector, [int(rank in members) for rank in range(group.size)], group, arguments)
        return tensor if common is None else common[0]
    sizes = [dims[rank] if rank in members else 0 for rank in range(group.size)]
    if all(dim == count for dim, count in held):
        # A vector of as many numbers as rows and as positions may be either; those per position are equal everywhere.
        hidden = arguments.hidden
        if (
            tensor.ndim == 1
            and hidden is not None
            and hidden.ndim > 2
            and {count for _, count in held} == {hidden.shape[1]}
        ):
            common = _common(tensor, sizes, group, arguments)
            if common is not None:
                return common
        return all_gather(tensor, group, counts=counts)
    if all(dim == 1 for dim, _ in held):
        common = _common(tensor, sizes, group, arguments)
        if common is not None:
            return common
        repeats = torch.tensor([counts[rank] for rank in members], device=tensor.device)
        return all_gather(tensor, group, counts=sizes).repeat_interleave(repeats, 0, output_size=sum(counts))
    if all(dim in (1, count) for dim, count in held):
        own = counts[group.rank_in_group]
        return all_gather(tensor.expand(own, *tensor.shape[1:]) if own else tensor, group, counts=counts)
    common = _common(tensor, sizes, group, arguments) if len({dim for dim, _ in held}) == 1 else None
    if common is None:
        raise TensorParallelError(
            f"region '{name}': argument {arguments.names[index]} has shape {tuple(tensor.shape)} here and the first "
            f"dims {dims} on the ranks, whose batches are {list(counts)}: a tensor whose first dim is not the batch "
            "must be equal on all ranks of the tensor-parallel group"
        )
    return common


def _common(tensor: torch.Tensor, sizes: list[int], group: Group, arguments: RegionArguments) -> torch.Tensor | None:
    """The tensor that all members hold, None if theirs are not equal."""
    if tensor.is_meta:
        return tensor
    is_everybodys = len(arguments.members) == group.size
    # A member's own tensor carries its gradient; a rank that has none sends the gradient to a member.
    together = all_gather(tensor.detach() if is_everybodys else tensor, group, counts=sizes)
    parts = together.split([size for size in sizes if size])
    if any(not torch.equal(parts[0], part) for part in parts[1:]):
        return None
    return tensor if is_everybodys else parts[0]
