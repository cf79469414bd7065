"""State dicts under the names of transformers and under those of ``smp.nn``, both ways (smp-api section 10).

A `NameLayout` is a table of what one family calls its parameters; all translators are made from such tables. They are
pure functions of dicts: an entry that is not in the table stays where it is, under its name; the others come out in one
block, in the order of the other side, at the place of the first of them.

[Note: one copy of the weights] Renamed, reshaped and transposed tensors are views of those given, so nothing is copied
on the way back to transformers, nor for GPT-2 in either direction. Where a family keeps query, key and value apart,
joining them needs a new tensor; the three entries of the *given* dict then become views of it, so that the dict keeps
its values and the memory of the old ones is free as soon as nobody else holds them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from packaging.version import Version

from modelparallel.errors import TensorParallelError

StateDict = dict[str, Any]
Translate = Callable[..., StateDict]
OLDEST_VERSION = Version("4.57")

# The order in which smp.nn's modules of a layer register their parameters.
_SMP_ORDER = tuple(
    f"{part}.{name}."
    for part, names in (
        ("attention", ("pre_layernorm", "qkv", "dense", "post_layernorm")),
        ("cross_attention", ("pre_layernorm", "query", "key_value", "dense", "post_layernorm")),
        ("output", ("pre_layernorm", "dense1", "dense2", "post_layernorm")),
    )
    for name in names
)


def transformers_version() -> Version:
    """The one in use; where transformers has not been imported, the oldest that is supported."""
    transformers = sys.modules.get("transformers")
    return OLDEST_VERSION if transformers is None else Version(transformers.__version__)


class Form(Enum):
    """How transformers stores what ``smp.nn`` stores as a linear layer, or as several in one."""

    SAME = "same"
    # Conv1D: the weight is transposed.
    CONV1D = "transposed"
    # Linear layers of their own.
    APART = "apart"


@dataclass(frozen=True)
class Rule:
    """The layer (or layers) called ``hf`` in transformers is the one called ``smp`` here; both have a weight and,
    perhaps, a bias.
    """

    hf: tuple[str, ...]
    smp: str
    form: Form = Form.SAME

    def entries(self, hf_prefix: str, smp_prefix: str) -> Iterator[TensorNames]:
        """The names of its weight and of its bias."""
        for kind in ("weight", "bias"):
            names = tuple(f"{hf_prefix}{name}.{kind}" for name in self.hf)
            yield TensorNames(names, f"{smp_prefix}{self.smp}.{kind}", self, kind)


@dataclass(frozen=True)
class TensorNames:
    """One tensor of ``smp.nn`` and the tensors of transformers that it is made of."""

    hf: tuple[str, ...]
    smp: str
    rule: Rule
    kind: str

    def to_smp(self, state: Mapping[str, Any]) -> Any:
        """The tensor here, from a dict of transformers."""
        missing = [name for name in self.hf if name not in state]
        if missing:
            raise TensorParallelError(
                f"the state dict has some of {', '.join(self.hf)}, which become '{self.smp}', and lacks "
                f"{', '.join(missing)}"
            )
        tensors = [state[name] for name in self.hf]
        if self.rule.form is Form.APART:
            joined = torch.cat(tensors)
            if isinstance(state, MutableMapping):  # see the note above
                state.update(zip(self.hf, joined.chunk(len(tensors)), strict=True))
            return joined
        tensor = tensors[0]
        if self.rule.form is not Form.SAME and self.kind == "weight":
            tensor = tensor.t()
        return tensor

    def to_hf(self, state: Mapping[str, Any]) -> Sequence[Any]:
        """The tensors of transformers, from a dict of ours."""
        tensor: torch.Tensor = state[self.smp]
        if self.rule.form is Form.APART:
            return tensor.chunk(len(self.hf))
        return (tensor.t() if self.rule.form is not Form.SAME and self.kind == "weight" else tensor,)


def causal_masks(masked_bias: float, index: int, length: int) -> list[tuple[str, torch.Tensor]]:
    """The buffers of layer ``index`` that older versions of GPT-2 and GPT-J keep in the state dict."""
    mask = torch.ones(length, length, dtype=torch.bool).tril().view(1, 1, length, length)
    return [("attn.bias", mask), ("attn.masked_bias", torch.tensor(masked_bias))]


def linear(hf: str, smp: str) -> Rule:
    """A linear layer, embedding or LayerNorm."""
    return Rule((hf,), smp)


def conv1d(hf: str, smp: str) -> Rule:
    """A ``Conv1D`` of transformers: its weight is (in, out)."""
    return Rule((hf,), smp, Form.CONV1D)


def apart(*hf: str, smp: str) -> Rule:
    """Several linear layers; here they are one, with their outputs in this order."""
    return Rule(hf, smp, Form.APART)


# Makes the buffers of layer ``index``, which hold no weights, for sequences of a length: (name in the layer, value).
Buffers = Callable[[int, int], Sequence[tuple[str, torch.Tensor]]]


@dataclass(frozen=True)
class NameLayout:
    """What a family calls its parameters.

    ``before``, ``layer``, ``after``: what comes before, in and after each layer of ``hf_layers``. ``hf_order``: the
    names in a layer in the order of transformers, buffers included. ``buffers``: older versions of transformers kept
    causal masks in the state dict. ``head``: of the causal language model, whose body then is called ``hf_body``;
    ``former_head``: what transformers called it before the version ``renamed_in``, and does in files until today.
    """

    hf_layers: str
    smp_layers: str
    layer: tuple[Rule, ...]
    hf_order: tuple[str, ...]
    before: tuple[Rule, ...] = ()
    after: tuple[Rule, ...] = ()
    hf_body: str = "transformer"
    head: Rule | None = None
    has_head_bias: bool = False
    former_head: Rule | None = None
    renamed_in: Version = OLDEST_VERSION
    buffer_names: tuple[str, ...] = ()
    buffers: Buffers | None = None

    @property
    def heads(self) -> tuple[Rule, ...]:
        """The head under each of its names, the first of which is that of the version in use."""
        heads = [rule for rule in (self.head, self.former_head) if rule is not None]
        return tuple(heads if transformers_version() >= self.renamed_in else reversed(heads))


@dataclass(frozen=True)
class Part:
    """A stretch of the names: before the layers, one layer (then with its ``index``), or after them."""

    entries: list[TensorNames]
    hf_prefix: str = ""
    smp_prefix: str = ""
    index: int | None = None


@dataclass(frozen=True)
class Place:
    """Where a module of a family lies in a whole model.

    ``prefix``: its name and a dot, or "". ``has_head``: it is the model with the head around its body. ``is_layer``: it
    is a single layer.
    """

    layout: NameLayout
    prefix: str = ""
    has_head: bool = False
    is_layer: bool = False

    @property
    def hf_body(self) -> str:
        """What stands before the names of the body in transformers."""
        return f"{self.prefix}{self.layout.hf_body}." if self.has_head else self.prefix

    @property
    def tied(self) -> tuple[str, str]:
        """The weights in transformers of the head, and of the embedding that it may be."""
        layout = self.layout
        return f"{self.prefix}{layout.heads[0].hf[0]}.weight", f"{self.hf_body}{layout.before[0].hf[0]}.weight"

    def parts(self, state: Mapping[str, Any]) -> Iterator[Part]:
        """All entries, in the order of both sides but for that inside a layer, with the layers that ``state``, of
        either side, has.
        """
        layout = self.layout
        if self.is_layer:
            yield self._layer(self.prefix, self.prefix, 0)
            return
        yield Part([entry for rule in layout.before for entry in rule.entries(self.hf_body, self.prefix)])
        hf, smp = self.hf_body + layout.hf_layers, self.prefix + layout.smp_layers
        pattern = re.compile(rf"(?:{re.escape(hf)}|{re.escape(smp)})\.(\d+)\.")
        for index in sorted({int(match[1]) for name in state if (match := pattern.match(name))}):
            yield self._layer(f"{hf}.{index}.", f"{smp}.{index}.", index)
        last = [entry for rule in layout.after for entry in rule.entries(self.hf_body, self.prefix)]
        if self.has_head:
            last += [entry for rule in layout.heads for entry in rule.entries(self.prefix, self.prefix)]
        yield Part(last)

    def _layer(self, hf_prefix: str, smp_prefix: str, index: int) -> Part:
        entries = [entry for rule in self.layout.layer for entry in rule.entries(hf_prefix, smp_prefix)]
        return Part(entries, hf_prefix, smp_prefix, index)


def to_smp(state: Mapping[str, Any], places: Sequence[Place]) -> StateDict:
    """A state dict of transformers with the modules at ``places`` under the names, and in the shapes, of ``smp.nn``.

    Causal-mask buffers are left out. A dict without names of transformers comes back as it was.
    """
    result: StateDict = dict(state)
    for place in places:
        block: StateDict = {}
        used: set[str] = set()
        for part in place.parts(state):
            entries = part.entries
            if part.index is not None:
                used.update(part.hf_prefix + name for name in place.layout.buffer_names)
                entries = sorted(entries, key=lambda entry: _smp_position(entry.smp, part.smp_prefix))
            for entry in entries:
                if any(name in state for name in entry.hf):
                    block[entry.smp] = entry.to_smp(state)
                    used.update(entry.hf)
        result = _replaced(result, used, block)
    return result


def to_hf(state: Mapping[str, Any], places: Sequence[Place], max_seq_len: int | None = None) -> StateDict:
    """A state dict of ``smp.nn`` with the modules at ``places`` under the names, and in the shapes, of transformers.

    ``max_seq_len``: also make the causal-mask buffers of that length, where the family had some.
    """
    result: StateDict = dict(state)
    for place in places:
        block: StateDict = {}
        used: set[str] = set()
        for part in place.parts(state):
            named: StateDict = {}
            for entry in part.entries:
                if entry.smp in state and entry.smp not in used:
                    named.update(zip(entry.hf, entry.to_hf(state), strict=True))
                    used.add(entry.smp)
            if part.index is not None and named:
                if max_seq_len is not None and place.layout.buffers is not None:
                    buffers = place.layout.buffers(part.index, max_seq_len)
                    named.update({part.hf_prefix + name: value for name, value in buffers})
                names = sorted(named, key=lambda name: _hf_position(name.removeprefix(part.hf_prefix), place.layout))
                named = {name: named[name] for name in names}
            block.update(named)
        result = _replaced(result, used, block)
    return result


def model_to_smp(state: Mapping[str, Any], layout: NameLayout) -> StateDict:
    """`to_smp` for a whole language model: with a head if its body has a name in it, the body alone if not."""
    has_head = any(name.startswith(f"{layout.hf_body}.{layout.hf_layers}.") for name in state)
    place = Place(layout, has_head=has_head)
    if not has_head:
        return to_smp(state, [place])
    completed = with_tied_head(state, place)
    translated = to_smp(completed, [place])
    if isinstance(state, MutableMapping):
        state.update([(name, completed[name]) for name in state])  # what was joined, see the note at the top
    return translated


def model_to_hf(state: Mapping[str, Any], layout: NameLayout, max_seq_len: int | None) -> StateDict:
    """`to_hf` for a whole language model, with a head if there is one in it."""
    has_head = layout.head is not None and f"{layout.head.smp}.weight" in state
    return to_hf(state, [Place(layout, has_head=has_head)], max_seq_len)


def places_found(state: Mapping[str, Any], layout: NameLayout, *markers: str, is_layer: bool = False) -> list[Place]:
    """The places of a layout anywhere in ``state``: wherever a name ends in one of ``markers`` (regular
    expressions).
    """
    pattern = re.compile(rf"((?:.*\.)?)(?:{'|'.join(markers)})")
    prefixes = [match[1] for name in state if (match := pattern.fullmatch(name))]
    return [Place(layout, prefix, is_layer=is_layer) for prefix in dict.fromkeys(prefixes)]


def new_names(names: Collection[str], place: Place) -> dict[str, str]:
    """What each of the names of transformers, from ``place`` on, is called here."""
    parts = place.parts(dict.fromkeys(names))
    smp_names = {name: entry.smp for part in parts for entry in part.entries for name in entry.hf}
    return {name: smp_names[name] for name in names if name in smp_names}


def unknown_names(state: Mapping[str, Any], place: Place) -> list[str]:
    """The names of a dict of transformers, from ``place`` on, that its layout does not know."""
    known: set[str] = set()
    for part in place.parts(state):
        known.update(name for entry in part.entries for name in entry.hf)
        if part.index is not None:
            known.update(part.hf_prefix + name for name in place.layout.buffer_names)
    return [name for name in state if name.startswith(place.prefix) and name not in known]


def with_tied_head(state: Mapping[str, Any], place: Place) -> StateDict:
    """``state``, a dict of transformers, with the head's weight if it was left out because it is the embedding's.

    transformers leaves tied tensors out of its files. Only where the head's bias, if it has one, is there, and nothing
    that the layout does not know: that would be another head.
    """
    if not place.has_head:
        return dict(state)
    head, embedding = place.tied
    bias = head.removesuffix("weight") + "bias"
    weights = [f"{place.prefix}{rule.hf[0]}.weight" for rule in place.layout.heads]
    is_left_out = embedding in state and not any(weight in state for weight in weights)
    if not is_left_out or (place.layout.has_head_bias and bias not in state) or unknown_names(state, place):
        return dict(state)
    items = [(name, value) for name, value in state.items() if name != bias]
    items.append((head, state[embedding]))
    return dict([*items, (bias, state[bias])] if bias in state else items)


def _smp_position(name: str, prefix: str) -> int:
    return next(i for i, start in enumerate(_SMP_ORDER) if name.startswith(prefix + start))


def _hf_position(name: str, layout: NameLayout) -> int:
    return next(i for i, start in enumerate(layout.hf_order) if name == start or name.startswith(start + "."))


def _replaced(state: StateDict, used: set[str], block: StateDict) -> StateDict:
    """``state`` without the names ``used``, and with ``block`` where the first of them stood."""
    result: StateDict = {}
    is_placed = False
    for name, value in state.items():
        if name not in used:
            result[name] = value
        elif not is_placed:
            is_placed = True
            result.update(block)
    return result
