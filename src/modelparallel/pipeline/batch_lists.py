"""Lists in the arguments of a step: one element per sample, or one tensor per feature.

[Note: lists in a batch] The members of a list are split, not the list (smp-api section 4): ``[x, y]`` is two tensors of
the batch. But loaders also give lists of one element per sample: strings, tensors of different lengths, the boxes of
each image. To split the members of those, or to give the whole list to every microbatch, is wrong in silence. So each
list is compared with the lengths of the tensors outside of lists, and where there are none, lists with each other:

- tensors that differ in dtype or number of dims are features, and tell the length of the batch themselves;
- members as long as the batch are features; a list as long as the batch of members that are not is cut by samples;
- other objects (strings, numbers, arrays) are cut by samples where they lie in a container (a dict, a dataclass)
  together with the tensors, and are as many as the samples; where they are as many by themselves, as an argument of
  their own, nothing tells, which is an error that names the ways to say it;
- both may be true, which is an error, too. What an earlier call of the same step function has told decides.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch

from modelparallel import trees
from modelparallel.errors import StepUsageError

#: A list of at least so many tensors of one shape looks like samples; fewer like views or features.
_MANY = 4


class SlicedObject:
    """The results of an object's own ``smp_slice``, one per microbatch; made where the object is, before it travels.

    No dataclass: those are containers.
    """

    def __init__(self, parts: tuple[Any, ...]) -> None:
        self.parts = parts


class SampleList(list[Any]):
    """``smp.SampleList(values)``: a list of one element per sample, in an argument of a step function. Local. Ours, not
    the original's.

    Each microbatch gets the plain list of the elements of its samples. Most lists need no such mark: lists that stand
    in a batch together with its tensors, and lists of tensors of different lengths, are recognised
    (docs/data_parallelism.md).
    """


class Reading(NamedTuple):
    """What the arguments of a call hold. ``lengths``: (argument, batch length) of what is split; ``cut``: the paths of
    the lists that are cut by samples; ``notices``: what the user should hear once, by what it is about.
    """

    lengths: Sequence[tuple[str, int]]
    cut: frozenset[trees.Path]
    notices: Mapping[Hashable, str]


@dataclass
class _List:
    """A list whose elements are alike. ``kind``: "tensors", "containers", "numbers", "arrays" or "objects";
    ``root``: the path of the argument; ``members``: for each element the batch lengths of the tensors in it.
    """

    path: trees.Path
    root: trees.Path
    value: Sequence[Any]
    kind: str
    members: list[list[int]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.path[0])

    @property
    def length(self) -> int:
        return len(self.value)

    @property
    def lengths(self) -> set[int]:
        return {length for member in self.members for length in member}

    def describe(self) -> str:
        what = {"numbers": "numbers", "arrays": "rows"}.get(self.kind)
        if what is None:
            first = next((element for element in self.value if element is not None), None)
            what = f"elements of type {type(first).__name__}"
        kind = "an array" if self.kind == "arrays" else f"a {type(self.value).__name__}"
        lengths = sorted(self.lengths)
        shown = ", ".join(str(length) for length in lengths[:6]) + (", ..." if len(lengths) > 6 else "")
        return f"{place(self.path)} is {kind} of {self.length} {what}" + (
            f" with tensors of length {shown}" if lengths else ""
        )


def place(path: trees.Path) -> str:
    """How an argument, or a part of one, is named in a text."""
    name, *keys = path
    return f"argument '{name}'" + (f" at {''.join(f'[{key!r}]' for key in keys)}" if keys else "")


class ListReader:
    """Reads the arguments of one step function, and remembers how its lists were read."""

    def __init__(self) -> None:
        self._known: dict[trees.Path, str] = {}  # "samples" or "whole"
        self._looked_at: dict[tuple[trees.Path, type], str] = {}  # what there is to say

    def read(
        self,
        arguments: Mapping[str, Any],
        axes: Mapping[str, int],
        whole: set[str],
        num_microbatches: int,
        variadic: str | None = None,
    ) -> Reading:
        """Look at the arguments that are not ``whole``; ``variadic``: the one that holds ``*args``.

        Raises StepUsageError for a list of which it is unclear how it is split.
        """
        lengths = self._lengths_of_tensors(arguments, axes, whole, num_microbatches)
        if lengths is not None:
            return Reading(lengths, frozenset(), {})
        walk = _CallContents(axes, num_microbatches)
        for name, value in arguments.items():
            if name in whole:
                continue
            named = (
                [((name,), value)] if name != variadic else [((name, index), one) for index, one in enumerate(value)]
            )
            for path, argument in named:
                walk.visit(path, argument, path)
        if num_microbatches > 1:
            self._read_lists(walk, num_microbatches)
            self._look_into_objects(walk)
        else:
            walk.take_all()
        return Reading(walk.lengths, frozenset(walk.cut), walk.notices)

    def _lengths_of_tensors(
        self, arguments: Mapping[str, Any], axes: Mapping[str, int], whole: set[str], num_microbatches: int
    ) -> list[tuple[str, int]] | None:
        """What :meth:`read` finds in the usual batch, in a fraction of the time: tensors of one length, beside what is
        not split and needs no word. None: it takes a longer look.
        """
        lengths: list[tuple[str, int]] = []
        for name, value in arguments.items():
            if name in whole:
                continue
            if isinstance(value, torch.Tensor):
                if name in axes:
                    return None
                if value.ndim:
                    lengths.append((name, value.shape[0]))
            elif trees.is_container(value):
                return None
            elif num_microbatches > 1:
                kind = type(value)
                # "": it was looked at, and there is nothing to say.
                if kind not in _PLAIN and self._looked_at.get(((name,), kind)) != "":
                    return None
        if num_microbatches > 1 and any(length != lengths[0][1] for _, length in lengths):
            return None
        return lengths

    def _read_lists(self, walk: _CallContents, num_microbatches: int) -> None:
        known_lengths = {length for _, length in walk.lengths}
        are_members_split = False
        if len(known_lengths) > 1:
            listing = ", ".join(dict.fromkeys(f"'{name}' {length}" for name, length in walk.lengths))
            walk.notices["lengths"] = (
                f"smp.step: the arguments have batches of different lengths ({listing}); each is split on its own. "
                "Name what is not a batch in non_split_inputs"
            )
        if not known_lengths and walk.lists:
            known_lengths = self._length_of_lists(walk, num_microbatches)
            are_members_split = any(entry.lengths == known_lengths for entry in walk.lists)
        while walk.lists:
            entry = walk.lists.pop(0)
            if not known_lengths:
                walk.take(entry)
                continue
            has_tensors_beside = any(
                (entry.root, length) in walk.lengths_by_path for length in {entry.length} & known_lengths
            )
            verdict = (
                "whole"
                if are_members_split and entry.lengths
                else self._verdict(entry, known_lengths, num_microbatches, is_in_batch=has_tensors_beside)
            )
            self._known[entry.path] = verdict
            if verdict == "samples":
                walk.cut.add(entry.path)
                walk.note(entry.root, entry.length)
            else:
                walk.take(entry)

    def _verdict(self, entry: _List, batch: set[int], num_microbatches: int, *, is_in_batch: bool) -> str:
        """How a list is read: "samples", or "whole" where its members are split, or nothing is. ``is_in_batch``: it
        lies in a container with tensors of its own length.
        """
        sizes = "a batch of length " + " or ".join(str(length) for length in sorted(batch)[:4])
        before = self._known.get(entry.path)
        is_as_long = entry.length in batch
        if entry.lengths:
            are_members_as_long = entry.lengths <= batch
            if is_as_long and are_members_as_long and entry.length > 1:
                verdict = before or _refuse(entry, f"with {sizes}: both it and its tensors are as long")
            elif are_members_as_long:
                verdict = "whole"
            elif is_as_long:
                verdict = "samples"
            else:
                verdict = "whole"
                are_even = not any(length % num_microbatches for length in entry.lengths)  # else an error of its own
                if are_even and len(entry.lengths) > 1 and any(length % min(batch) for length in entry.lengths):
                    _refuse(entry, f"with {sizes}: neither it nor its tensors are as long")
        elif not is_as_long or entry.length == 1 or all(element is None for element in entry.value):
            verdict = "whole"
        elif before is not None:
            verdict = before
        elif not is_in_batch or (entry.kind == "numbers" and isinstance(entry.value, tuple)):
            _refuse(entry, f"with {sizes}: as many as there are samples")
        else:
            verdict = "samples"
        if before is not None and verdict != before and entry.length > 1:
            was = "one element per sample" if before == "samples" else "the same for all microbatches"
            _refuse(entry, f"with {sizes}: an earlier call had {was} there, which does not fit these lengths")
        return verdict

    def _length_of_lists(self, walk: _CallContents, num_microbatches: int) -> set[int]:
        """The length of the batch where all tensors lie in lists; empty where nothing tells."""
        tensors = [entry for entry in walk.lists if entry.lengths]
        for entry in tensors:
            before = self._known.get(entry.path)
            if before is not None:
                return {entry.length} if before == "samples" else entry.lengths
        if not tensors:
            for entry in walk.lists:
                if entry.length > 1 and entry.kind != "numbers":
                    walk.notices[entry.path] = (
                        f"smp.step: {entry.describe()}, and no tensor tells the length of the batch: every microbatch "
                        "gets all of it. If it holds one element per sample, pass smp.SampleList(...), or an object "
                        "with smp_slice; else name it in non_split_inputs"
                    )
            return set()
        lengths = set().union(*(entry.lengths for entry in tensors))
        if len(lengths) == 1:
            return self._length_of_members(walk, tensors, lengths, num_microbatches)
        if len({entry.length for entry in tensors}) == 1 and any(
            len({length for entry in tensors for length in entry.members[index]}) > 1
            for index in range(tensors[0].length)
        ):
            return {tensors[0].length}  # the tensors of one element differ in length: it is no batch
        entry = next((entry for entry in tensors if len(entry.lengths) > 1), tensors[0])
        _refuse(entry, "and no tensor outside of lists tells the length of the batch")

    def _length_of_members(
        self, walk: _CallContents, tensors: Sequence[_List], lengths: set[int], num_microbatches: int
    ) -> set[int]:
        """All tensors have one length."""
        (length,) = lengths
        for entry in tensors:
            if entry.length >= num_microbatches > 1:
                if entry.kind == "containers" or length % num_microbatches:
                    _refuse(entry, "and no tensor outside of lists tells the length of the batch")
                if entry.length >= _MANY and len({element.shape for element in entry.value}) == 1:
                    walk.notices[entry.path] = (
                        f"smp.step: {entry.describe()}, all of one shape: each of these tensors is split. If they are "
                        "one per sample, pass torch.stack(...) or smp.SampleList(...); if not, name the argument in "
                        "input_split_axes"
                    )
        return lengths

    def _look_into_objects(self, walk: _CallContents) -> None:
        """Objects that hold tensors and cannot be split: the first of each kind."""
        batch = {length for _, length in walk.lengths}
        for path, value in walk.objects:
            key = (path, type(value))
            if key in self._looked_at:
                if self._looked_at[key]:
                    walk.notices[key] = self._looked_at[key]
                continue
            self._looked_at[key] = ""
            hidden = {tensor.shape[0] for tensor in _hidden_tensors(value)}
            if hidden & batch or (hidden and not batch):
                walk.notices[key] = self._looked_at[key] = (
                    f"smp.step: {place(path)} is a {type(value).__name__} that holds tensors of the batch and cannot "
                    "be split: every microbatch gets all of it. Pass a dict, a tuple or a dataclass, or give the class "
                    "a method smp_slice(num_microbatches, microbatch, axis); if it is meant so, name the argument in "
                    "non_split_inputs"
                )


class _CallContents:
    """What lies in the arguments of one call."""

    def __init__(self, axes: Mapping[str, int], num_microbatches: int) -> None:
        self._axes = axes
        self._is_split = num_microbatches > 1
        self.lengths: list[tuple[str, int]] = []
        self.lengths_by_path: set[tuple[trees.Path, int]] = set()  # the same, by the path of the argument
        self.lists: list[_List] = []
        self.objects: list[tuple[trees.Path, Any]] = []
        self.cut: set[trees.Path] = set()
        self.notices: dict[Hashable, str] = {}

    def note(self, root: trees.Path, length: int) -> None:
        """Something in the argument ``root`` has this many samples."""
        self.lengths.append((str(root[0]), length))
        self.lengths_by_path.add((root, length))

    def visit(self, path: trees.Path, value: Any, root: trees.Path) -> None:
        """Note what ``value``, a part of the argument ``root``, is, and what is in it."""
        name = path[0]
        if isinstance(value, torch.Tensor):
            if value.ndim:
                self.note(root, value.shape[self._axis_of(name, value)])
        elif isinstance(value, SampleList):
            self.cut.add(path)
            self.note(root, len(value))
        elif trees.is_container(value):
            kind = _kind_of(value) if name not in self._axes else None
            if kind is None:
                self._visit_children(path, value, root)
            else:
                self.lists.append(_List(path, root, value, kind, [*map(_lengths_in, value)]))
        elif type(value).__module__ == "numpy":
            if getattr(value, "ndim", 0):
                self.lists.append(_List(path, root, value, "arrays"))
        elif type(value) not in _PLAIN and self._is_split:
            self.objects.append((path, value))

    def take(self, entry: _List) -> None:
        """The list is not cut: what is in its members counts."""
        if entry.kind in ("tensors", "containers"):
            self._visit_children(entry.path, entry.value, entry.root)

    def take_all(self) -> None:
        """No list is cut."""
        while self.lists:
            self.take(self.lists.pop(0))

    def _visit_children(self, path: trees.Path, value: Any, root: trees.Path) -> None:
        for key, child in trees.children(value):
            self.visit((*path, key), child, root)

    def _axis_of(self, name: str, tensor: torch.Tensor) -> int:
        axis = self._axes.get(name, 0)
        if not -tensor.ndim <= axis < tensor.ndim:
            raise StepUsageError(
                f"smp.step: argument '{name}' has a tensor of shape {tuple(tensor.shape)}, which has no axis {axis} to "
                "split along: correct input_split_axes, or name it in non_split_inputs"
            )
        return axis


_NUMBERS = (bool, int, float, complex)
_PLAIN = (*_NUMBERS, str, bytes, type(None), torch.dtype, torch.device, SlicedObject)


def _kind_of(value: Any) -> str | None:
    """The kind of a list whose elements are alike, else None."""
    if not isinstance(value, (list, tuple)) or hasattr(value, "_fields") or not value:
        return None
    if type(value).__module__.startswith("torch"):  # a torch.Size, several results of a function
        return None
    kinds: dict[Any, str] = {}
    for element in value:
        if isinstance(element, torch.Tensor):
            kinds[element.dtype, element.ndim] = "tensors"
        elif isinstance(element, (SlicedObject, SampleList)):
            return None
        elif isinstance(element, _NUMBERS):
            kinds["number"] = "numbers"
        elif trees.is_container(element):
            kinds[type(element)] = "containers"
        elif element is not None:
            kinds[type(element)] = "objects"
    return next(iter(kinds.values()), "objects") if len(kinds) <= 1 else None


def _lengths_in(value: Any) -> list[int]:
    return [leaf.shape[0] for leaf in trees.leaves(value) if isinstance(leaf, torch.Tensor) and leaf.ndim]


def _hidden_tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors with a batch axis in an object, one level deep."""
    if isinstance(value, (torch.nn.Module, torch.optim.Optimizer, type)) or callable(value):
        return
    if type(value).__module__.partition(".")[0] == "modelparallel":
        return
    if isinstance(value, Mapping):
        parts = list(value.values())
    else:
        names = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        parts = [*getattr(value, "__dict__", {}).values(), *(getattr(value, name, None) for name in names)]
    for part in parts:
        yield from (leaf for leaf in trees.leaves(part) if isinstance(leaf, torch.Tensor) and leaf.ndim)


def _refuse(entry: _List, reason: str) -> NoReturn:
    as_tensor = "make it a tensor, or " if entry.kind in ("numbers", "arrays") else ""
    by_feature = (
        f"name '{entry.name}' in input_split_axes (each of its tensors is split) or" if entry.lengths else "name it"
    )
    raise StepUsageError(
        f"smp.step: {entry.describe()}, {reason}, so it is unclear whether it holds one element per sample. If so, "
        f"{as_tensor}pass smp.SampleList(...) or an object with smp_slice; if not, {by_feature} in non_split_inputs "
        "(every microbatch gets all of it)"
    )
