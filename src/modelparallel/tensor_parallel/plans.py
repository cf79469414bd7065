"""Plans: which modules of a model are cut over the tensor-parallel ranks, and how; read, checked and made exact here.

A plan is a table of name patterns (``*`` stands for one component of a name) to styles. It comes from the user
(``smp.set_tensor_parallelism(module, plan=...)``) or is carried by the model, as Hugging Face's are (an attribute
``_tp_plan``). Both become a `SplitPlan`: one `PlanEntry` for each module or parameter that is cut, and the *regions*.

[Note: Regions] Between a column-wise and a row-wise layer each rank has a slice of the features, and the code there is
the model's own. So the module that holds such a group as a whole is run for the rows of all ranks: it is a region.
A region is the nearest module above a cut layer that holds both kinds; regions do not nest, the outermost one counts.
Two exceptions, both since the parts of a mixture of experts are called with the tokens that a router sends to them,
which are others on each rank, or none:

- An element of a ``ModuleList`` or ``ModuleDict`` that owns nothing but cut layers, and stands in a list within a list
  or beside a router (something with as many outputs as the list has elements), is an expert; the region is the module
  that owns the list.
- An entry ``region`` names one (transformers' ``gather``).

Everything here reads attributes and imports nothing of the libraries that models come from.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from modelparallel.errors import TensorParallelError
from modelparallel.tensor_parallel.placements import is_plain_parameter


class SplitStyle(enum.Enum):
    """What becomes of a module or parameter."""

    COLUMNS = "columns"  # output features are cut, and stay so
    ROWS = "rows"  # input features are cut; the partial outputs are summed
    GATHERED = "gathered"  # output features are cut, and merged again
    SCATTERED = "scattered"  # as ROWS, but the input comes with all features
    VOCABULARY = "vocabulary"  # the rows of a table are cut; the partial lookups are summed
    PARTIAL = "partial"  # a module that owns cut parameters and returns a partial sum
    DIVIDED = "divided"  # adds to a partial sum what every rank has whole: its share is 1/t
    NUMBER = "number"  # an int attribute, such as a number of heads, that is divided
    REGION = "region"
    WHOLE = "whole"


_CUT_LINEAR = (SplitStyle.COLUMNS, SplitStyle.ROWS, SplitStyle.GATHERED, SplitStyle.SCATTERED)
_USER_STYLES = {
    "colwise": SplitStyle.COLUMNS,
    "rowwise": SplitStyle.ROWS,
    "vocab": SplitStyle.GATHERED,
    "sequence": SplitStyle.WHOLE,
    "replicate": SplitStyle.WHOLE,
    "region": SplitStyle.REGION,
    "divide": SplitStyle.NUMBER,
}
# The names that transformers has used, in 4.5x and 5.x.
_CARRIED_STYLES = {
    "colwise": SplitStyle.COLUMNS,
    "local_colwise": SplitStyle.COLUMNS,
    "packed_colwise": SplitStyle.COLUMNS,
    "local_packed_colwise": SplitStyle.COLUMNS,
    "rowwise": SplitStyle.ROWS,
    "local_rowwise": SplitStyle.ROWS,
    "packed_rowwise": SplitStyle.ROWS,
    "local_packed_rowwise": SplitStyle.ROWS,
    "colwise_rep": SplitStyle.GATHERED,
    "colwise_gather_output": SplitStyle.GATHERED,
    "rowwise_rep": SplitStyle.SCATTERED,
    "rowwise_split_input": SplitStyle.SCATTERED,
    "embedding_rowwise": SplitStyle.VOCABULARY,
    "vocab_parallel_rowwise": SplitStyle.VOCABULARY,
    "moe_tp_experts": SplitStyle.PARTIAL,
    "all_reduce": SplitStyle.PARTIAL,
    "moe_identity_expert": SplitStyle.DIVIDED,
    "gather": SplitStyle.REGION,
}
# These need nothing: parameters stay whole, and gradients that are partial inside a region are summed by the reducer.
# The last four are expert parallelism and a cut along the embedding dim: such modules stay whole.
_CARRIED_WHOLE = {
    "local",
    "local_params",
    "replicate",
    "replicated_with_grad_allreduce",
    "mla_kv_a_proj",
    "sequence_parallel",
    "grouped_gemm",
    "ep_router",
    "ep_dispatch_experts",
    "embedding_colwise",
}
_HEAD_SIZES = ("head_dim", "head_size")


@dataclass(frozen=True)
class PlanEntry:
    """One module, or one parameter or number of it, that a plan names.

    ``module`` and ``parameter`` are names relative to the module that the plan is for; ``parameter`` is empty where the
    module itself is meant. ``parts``: the blocks of a packed layout, a number of equal ones or their lengths; 1 if it
    is not packed. ``head_dim``: the features that belong together, where it was given. ``region``: the name of the
    region around it, None outside all.
    """

    module: str
    parameter: str
    style: SplitStyle
    pattern: str
    parts: int | tuple[int, ...] = 1
    head_dim: int | None = None
    region: str | None = None


@dataclass(frozen=True)
class SplitPlan:
    """What is to be cut, by name, and the regions; ``unbalanced`` says which entries lack their counterpart."""

    entries: tuple[PlanEntry, ...]
    regions: tuple[str, ...]
    unbalanced: tuple[str, ...] = ()


def user_plan(module: nn.Module, table: Any) -> SplitPlan:
    """The plan that a user gives for ``module``; raises TensorParallelError for anything in it that is wrong."""
    if not isinstance(table, Mapping) or not table:
        raise TensorParallelError(
            f"smp.set_tensor_parallelism: plan must be a dict of name patterns to styles, got {table!r:.80}"
        )
    entries: dict[tuple[str, str], PlanEntry] = {}
    for pattern, value in table.items():
        entries_of_pattern = [_checked(module, entry) for entry in _user_entries(module, pattern, value)]
        if not entries_of_pattern:
            raise TensorParallelError(
                f"plan: the pattern {pattern!r} matches nothing in {type(module).__name__}; {_nearest(module, pattern)}"
            )
        for entry in entries_of_pattern:
            other = entries.get((entry.module, entry.parameter))
            if other is not None and other.style is not entry.style:
                raise TensorParallelError(
                    f"plan: {entry.module!r} is matched by {other.pattern!r} and by {pattern!r}, with different styles"
                )
            entries[entry.module, entry.parameter] = entry
    plan = _with_regions(module, list(entries.values()))
    if plan.unbalanced:
        raise TensorParallelError(
            f"plan: {', '.join(map(repr, plan.unbalanced[:4]))}: each group of colwise layers needs a rowwise layer "
            "that takes their features, in the same module or in one above, and the reverse"
        )
    return plan


def carried_plan(module: nn.Module) -> SplitPlan | None:
    """The plan that ``module`` carries itself, None if it has none. Patterns that match nothing are passed over."""
    table = _carried_table(module)
    if not table:
        return None
    entries: dict[tuple[str, str], PlanEntry] = {}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    modules = dict(module.named_modules(remove_duplicate=False))
    for pattern, word in table.items():
        if word in _CARRIED_WHOLE:
            continue
        if word not in _CARRIED_STYLES:
            raise TensorParallelError(
                f"{type(module).__name__} carries a tensor-parallel plan with the style {word!r} for {pattern!r}, "
                "which is not known here: give a plan of your own with smp.set_tensor_parallelism(model, plan={...})"
            )
        style, parts = _CARRIED_STYLES[word], 2 if "packed" in word else 1
        match = _matcher(pattern)
        for name in filter(match, modules):
            made = PlanEntry(name, "", style, pattern, parts)
            if isinstance(modules[name], nn.Embedding) and style in (SplitStyle.ROWS, SplitStyle.SCATTERED):
                made = replace(made, style=SplitStyle.VOCABULARY)
            entries[name, ""] = made
        for name in filter(match, parameters):
            owner, _, own_name = name.rpartition(".")
            entries[owner, own_name] = PlanEntry(owner, own_name, style, pattern, parts)
    return _with_regions(module, _with_partial_owners(module, list(entries.values())))


def carries_plan(module: nn.Module) -> bool:
    """Whether ``module`` carries a plan, be it good or not."""
    return bool(_carried_table(module))


def _carried_table(module: nn.Module) -> dict[str, Any]:
    # The instance's table holds those of its parts; transformers 4 leaves out in it what the class itself says.
    table: dict[str, Any] = {}
    for source in (getattr(type(module), "_tp_plan", None), getattr(module, "_tp_plan", None)):
        if isinstance(source, Mapping):
            table.update(source)
    return table


def without(module: nn.Module, plan: SplitPlan, is_excluded: Any) -> SplitPlan:
    """The plan without the entries for which ``is_excluded(name of the module)`` is true."""
    kept = [entry for entry in plan.entries if not is_excluded(entry.module)]
    return plan if len(kept) == len(plan.entries) else _with_regions(module, kept)


def head_size(owner: nn.Module) -> int | None:
    """The number of features of one head, if the module that holds the layer says it."""
    for name in _HEAD_SIZES:
        value = getattr(owner, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def is_plain_linear(module: nn.Module) -> bool:
    """Whether ``module`` is an ``nn.Linear`` that computes what that class computes, from weights of its own."""
    return (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and "forward" not in module.__dict__
        and set(module._parameters) == {"weight", "bias"}
        and is_plain_parameter(module.weight)
        and not module._buffers
    )


def _user_entries(module: nn.Module, pattern: Any, value: Any) -> Iterator[PlanEntry]:
    options: Any = {}
    word = value
    if isinstance(value, tuple) and len(value) == 2:
        word, options = value
    known = ", ".join(_USER_STYLES)
    if not isinstance(pattern, str) or not isinstance(word, str) or word not in _USER_STYLES:
        raise TensorParallelError(f"plan: {pattern!r}: {value!r} is not a style; the styles are {known}")
    if not isinstance(options, Mapping) or set(options) - {"parts", "head_dim"} or (options and word != "colwise"):
        raise TensorParallelError(
            f"plan: {pattern!r}: {value!r}: only colwise takes options, ('colwise', {{'parts': 3}}) or "
            "{'parts': (q_size, k_size, v_size)}, and {'head_dim': size}"
        )
    if any("*" in component and component != "*" for component in pattern.split(".")):
        raise TensorParallelError(f"plan: {pattern!r}: '*' stands for one whole component of a name")
    parts = options.get("parts", 1)
    parts = tuple(parts) if isinstance(parts, Sequence) and not isinstance(parts, str) else parts
    sizes = parts if isinstance(parts, tuple) else (parts,)
    head_dim = options.get("head_dim")
    if not sizes or not all(_is_size(size) for size in sizes) or not (head_dim is None or _is_size(head_dim)):
        raise TensorParallelError(f"plan: {pattern!r}: parts and head_dim must be positive ints, got {dict(options)}")
    style = _USER_STYLES[word]
    match = _matcher(pattern)
    if style is SplitStyle.NUMBER:
        path, _, attribute = pattern.rpartition(".")
        match = _matcher(path)
        for name, part in module.named_modules(remove_duplicate=False):
            if match(name) and attribute in part.__dict__:
                yield PlanEntry(name, attribute, style, pattern)
        return
    for name, part in module.named_modules(remove_duplicate=False):
        if match(name):
            is_table = word == "vocab" and isinstance(part, nn.Embedding)
            yield PlanEntry(name, "", SplitStyle.VOCABULARY if is_table else style, pattern, parts, head_dim)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _checked(root: nn.Module, entry: PlanEntry) -> PlanEntry:
    module = root.get_submodule(entry.module)
    what = f"plan: {entry.module or 'the module itself'!r}, matched by {entry.pattern!r}, is a {type(module).__name__}"
    if entry.style in _CUT_LINEAR and not is_plain_linear(module):
        raise TensorParallelError(
            f"{what}: this style is for an nn.Linear with its own forward and plain weights; norms are 'sequence' or "
            "'replicate', or not named at all"
        )
    if entry.style is SplitStyle.VOCABULARY:
        reason = reason_against_table(module)
        if reason is not None:
            raise TensorParallelError(f"{what}: {reason}")
    if entry.style is SplitStyle.NUMBER:
        value = module.__dict__[entry.parameter]
        if not _is_size(value):
            raise TensorParallelError(
                f"plan: {entry.module}.{entry.parameter} is {value!r}, and only an int is divided"
            )
    if entry.style in _CUT_LINEAR and isinstance(module, nn.Linear):
        blocks(entry, module.out_features)  # raises if the parts do not fit
    return entry


def blocks(entry: PlanEntry, length: int) -> tuple[int, ...]:
    """The lengths of the blocks of a packed layout of ``length`` features; empty if it is one block."""
    if entry.parts == 1:
        return ()
    parts = entry.parts if isinstance(entry.parts, tuple) else (length // entry.parts,) * entry.parts
    if sum(parts) != length:
        raise TensorParallelError(
            f"plan: {entry.module!r} has {length} features, which are not the parts {entry.parts} of {entry.pattern!r}"
        )
    return parts


def reason_against_table(module: nn.Module) -> str | None:
    """Why the rows of an embedding cannot be cut, or None."""
    if not isinstance(module, nn.Embedding):
        return "this style is for an nn.Embedding or, with 'vocab', an nn.Linear"
    if "forward" in module.__dict__ or set(module._parameters) != {"weight"} or not is_plain_parameter(module.weight):
        return "it has a forward of its own, or its weight is not a plain parameter"
    for option in ("max_norm", "sparse", "scale_grad_by_freq"):
        if getattr(module, option):
            return f"{option} is not supported for a table that is cut over its rows"
    return None


def _matcher(pattern: str) -> Any:
    expression = r"\.".join("[^.]+" if part == "*" else re.escape(part) for part in pattern.split("."))
    return re.compile(expression).fullmatch


def _nearest(module: nn.Module, pattern: str) -> str:
    """What there is where the pattern leaves the model."""
    names = [name for name, _ in module.named_modules(remove_duplicate=False)]
    components = pattern.split(".")
    for length in range(len(components) - 1, -1, -1):
        match = _matcher(".".join(components[:length])) if length else None
        parents = [name for name in names if (match(name) if match else name == "")]
        if parents:
            inside = [name for name, _ in module.get_submodule(parents[0]).named_children()]
            where = repr(parents[0]) if parents[0] else "the module"
            return f"{where} has {', '.join(inside[:12]) or 'no submodules'}"
    return "names are relative to the module that is given"


def _with_partial_owners(root: nn.Module, entries: list[PlanEntry]) -> list[PlanEntry]:
    """Owners of two or more cut weights (not biases) return a partial sum, also where the plan does not say so."""
    owned: dict[str, int] = {}
    for entry in entries:
        if not entry.parameter or entry.style not in (SplitStyle.COLUMNS, SplitStyle.ROWS):
            continue
        if getattr(root.get_submodule(entry.module), entry.parameter).ndim >= 3:
            owned[entry.module] = owned.get(entry.module, 0) + 1
    said = {entry.module for entry in entries if entry.style is SplitStyle.PARTIAL}
    more = [
        PlanEntry(name, "", SplitStyle.PARTIAL, "") for name, count in owned.items() if count >= 2 and name not in said
    ]
    return entries + more


def _with_regions(root: nn.Module, entries: list[PlanEntry]) -> SplitPlan:
    partial = {entry.module for entry in entries if entry.style is SplitStyle.PARTIAL}
    opening: set[str] = set()  # modules that own, or are the parents of, what opens a stretch of cut features
    closing: set[str] = set()
    for entry in entries:
        if entry.style in (SplitStyle.COLUMNS, SplitStyle.ROWS) and not entry.parameter:
            (opening if entry.style is SplitStyle.COLUMNS else closing).add(_parent(entry.module))
    open_above, closed_above = _with_ancestors(opening), _with_ancestors(closing)
    explicit = {entry.module for entry in entries if entry.style is SplitStyle.REGION}
    candidates: set[str] = set()
    unbalanced: list[str] = []
    for start in sorted(opening | closing):
        region = next((name for name in _upwards(start) if name in open_above and name in closed_above), None)
        if region is None:
            unbalanced.append(start)
            continue
        around = next((name for name in _upwards(region) if name in explicit), None)
        candidates.add(around if around is not None else _above_experts(root, region, entries))
    regions = sorted(
        name for name in candidates if not any(above in candidates for above in _upwards(name) if above != name)
    )
    region_set = set(regions)
    lost = set(unbalanced)
    placed = []
    for entry in entries:
        is_cut = entry.style in (SplitStyle.COLUMNS, SplitStyle.ROWS)
        if is_cut and not entry.parameter and _parent(entry.module) in lost:
            continue
        around = next((name for name in _upwards(entry.module) if name in region_set), None)
        if around is None and entry.style is SplitStyle.REGION:
            continue  # holds nothing that is cut
        if around is None and entry.parameter and is_cut:
            around = next((name for name in _upwards(entry.module) if name in partial), None)
        placed.append(replace(entry, region=around))
    return SplitPlan(tuple(placed), tuple(regions), tuple(unbalanced))


def _above_experts(root: nn.Module, name: str, entries: list[PlanEntry]) -> str:
    """``name``, or the owner of the list whose elements are experts, of which ``name`` is one; see the note above."""
    if not name:
        return name
    container = root.get_submodule(_parent(name))
    if not isinstance(container, (nn.ModuleList, nn.ModuleDict)):
        return name
    cut = {entry.module for entry in entries if entry.style in (SplitStyle.COLUMNS, SplitStyle.ROWS)}
    module = root.get_submodule(name)
    if any(f"{name}.{inner.rpartition('.')[0]}" not in cut for inner, _ in module.named_parameters()):
        return name
    owner = _parent(_parent(name))
    while owner and isinstance(root.get_submodule(owner), (nn.ModuleList, nn.ModuleDict)):
        owner = _parent(owner)
    lists = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    is_in_a_list = any(above and isinstance(root.get_submodule(_parent(above)), lists) for above in _upwards(owner))
    siblings = [part for part in root.get_submodule(owner).children() if part is not container]
    count = len(container)
    has_router = any(
        getattr(part, "out_features", None) == count
        or any(tensor.shape[:1] == (count,) for tensor in part.parameters(recurse=False))
        for part in siblings
    )
    return owner if is_in_a_list or has_router else name


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _upwards(name: str) -> Iterator[str]:
    """``name`` and the modules around it, up to the root."""
    yield name
    while name:
        name = _parent(name)
        yield name


def _with_ancestors(names: set[str]) -> set[str]:
    return {above for name in names for above in _upwards(name)}
