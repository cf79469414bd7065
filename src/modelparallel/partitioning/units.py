"""Which modules the partitioner may place: the units.

The random-number frames of the engine hang on the units, so they follow from the model alone, never from the
pipeline degree or the plan. [Note: What is a unit] Walking the tree of modules from the root, the first of these
that fits makes a module a unit, and nothing inside a unit is one:

1. a module of torch itself that is not a container (a ``Linear``, an ``LSTM``, a ``MultiheadAttention`` whose
   forward reads its child's weight, a ``TransformerEncoderLayer``, a compiled module), and a distributed layer;
2. a module with weights whose children have none;
3. a block: an element of a list (``ModuleList``, ``Sequential``, ``ModuleDict``) that has children with weights, or
   one of three or more attributes of one class (``down1``, ``down2``, ``down3``), unless it is itself a stack of
   blocks (see :func:`_is_block`). If a model has fewer than eight units in this way, a block that stands in no list
   of its like is opened: it may be most of the model.

The size of a module does not count: tensor parallelism changes it.

A module without weights is never a unit (it runs where its data is), except a norm with running statistics.
Containers and the composite modules in between (``BertModel``, an encoder) are walked through; parameters that such
a module owns itself (a ViT's ``cls_token``) are placed one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from modelparallel.torch_compat.private_parts import BATCH_AND_INSTANCE_NORMS

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_TENSOR_LISTS = (nn.ParameterList, nn.ParameterDict)
_STACKS = (nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder)
_TORCH_BLOCKS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_WHOLE_MODULES = (
    "torch.nn.modules.",
    "torch.nn.utils.parametrize",  # a parametrized module computes its tensors from children: take it whole
    "torch._dynamo.",  # a compiled module does not call its inner modules one by one
    "torch.jit.",
    "torch.ao.",
)
# Attributes of one class that are taken for the blocks of a model, and the number of units that is enough.
_MANY_ATTRIBUTES = 3
_ENOUGH_UNITS = 8
_NOT_WHOLE = {nn.Module, *_CONTAINERS, *_TENSOR_LISTS, *_STACKS}


def find_units(root: nn.Module) -> tuple[str, ...]:
    """The names of the units of ``root`` in module order; the root itself is ``""``.

    A module that is reached by several names is one unit, under its first name. Local; the same on every rank that
    built the same model.
    """
    finder = _Finder(opens_single_blocks=False)
    finder.visit("", root, None)
    if len(finder.units) < _ENOUGH_UNITS:
        finder = _Finder(opens_single_blocks=True)
        finder.visit("", root, None)
    return tuple(finder.units)


def has_weights(module: nn.Module) -> bool:
    """Whether ``module`` holds, somewhere inside, a parameter or the running statistics of a norm."""
    return _has_own_weights(module) or any(map(_has_own_weights, module.modules()))


def _has_own_weights(module: nn.Module) -> bool:
    return any(own is not None for own in module._parameters.values()) or has_running_statistics(module)


def is_whole(module: nn.Module) -> bool:
    """Whether ``module`` must be placed whole: its forward may read its children's weights without calling them."""
    if _is_distributed(module):
        # What a plan split is one piece, also a mixture of experts; a distributed transformer is not.
        return getattr(module, "is_indivisible", False) or not any(True for _ in _repeated_lists(module))
    for cls in type(module).__mro__:
        if cls in _CONTAINERS or cls in _TENSOR_LISTS or cls in _STACKS:
            return False
        if cls not in _NOT_WHOLE and cls.__module__.startswith(_WHOLE_MODULES):
            return True
    return False


@dataclass(frozen=True)
class DirectTensor:
    """A parameter or buffer owned by a module above all units."""

    name: str
    owner: str
    tensor: torch.Tensor
    is_parameter: bool


def direct_tensors(root: nn.Module, units: tuple[str, ...]) -> list[DirectTensor]:
    """The parameters and buffers of ``root`` that lie in no unit, by their first name, in module order."""
    inside: set[int] = set()
    modules = dict(root.named_modules())
    for unit in units:
        inside.update(id(module) for module in modules[unit].modules())
    result = []
    seen: set[int] = set()
    for owner, module in modules.items():
        prefix = f"{owner}." if owner else ""
        own = [(name, tensor, True) for name, tensor in module._parameters.items()]
        own += [(name, tensor, False) for name, tensor in module._buffers.items()]
        for name, tensor, is_parameter in own:
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if id(module) not in inside:
                result.append(DirectTensor(prefix + name, owner, tensor, is_parameter))
    return result


class _Finder:
    def __init__(self, *, opens_single_blocks: bool) -> None:
        self.units: list[str] = []
        self._opens_single_blocks = opens_single_blocks
        self._covered: set[int] = set()

    def visit(self, name: str, module: nn.Module, container: nn.Module | None) -> None:
        if id(module) in self._covered or isinstance(module, _TENSOR_LISTS) or not has_weights(module):
            return
        if self._is_unit(module, container):
            self.units.append(name)
            self._covered.update(id(inner) for inner in module.modules())
            return
        blocks = None if _is_container(module) else _repeated_classes(module, _MANY_ATTRIBUTES)
        for child_name, child in module.named_children():
            is_among_blocks = blocks is None or type(child) in blocks
            self.visit(f"{name}.{child_name}" if name else child_name, child, module if is_among_blocks else None)

    def _is_unit(self, module: nn.Module, container: nn.Module | None) -> bool:
        if _is_container(module):
            return False
        if is_whole(module):
            return True
        if not any(has_weights(child) for child in module.children()):
            return True
        if any(id(inner) in self._covered and has_weights(inner) for inner in module.modules()):
            # It holds a unit, or a part of one, that was met before under another name, and units do not nest. (An
            # activation that all blocks share is no obstacle: it has no weights, and no home.)
            return False
        if container is None or not _is_block(module, container):
            return False
        return not self._opens_single_blocks or type(module) in _repeated_classes(container)


def _is_block(module: nn.Module, container: nn.Module) -> bool:
    """Whether this element of a list (or of a module with many alike attributes) is a block, and no stack of blocks.

    What tells a stack (a stage of a Swin transformer, a ``BertModel`` in a ``Sequential``) from a block that holds a
    list of equal parts (a mixture of experts, a list of attention heads): the list of a stack is its own attribute,
    or its elements are deep; the parts of a block sit further down and are flat (their children are single layers),
    and the block stands in a list of its like.
    """
    inner_lists = list(_repeated_lists(module))
    if not inner_lists:
        return True
    if not _repeated_classes(container):
        return False
    own_lists = {id(inner) for inner in _lists_of(module)}
    for inner in inner_lists:
        repeated = _repeated_classes(inner)
        elements = [element for element in inner.children() if type(element) in repeated]
        if id(inner) in own_lists or not all(_is_flat(element) for element in elements):
            return False
    return True


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, _CONTAINERS)


def _is_distributed(module: nn.Module) -> bool:
    # The distributed layers say so by the method that declares their slices; importing them here would point sideways.
    return callable(getattr(module, "split_tensors", None))


def has_running_statistics(module: nn.Module) -> bool:
    """Whether it is a norm that changes its buffers in training."""
    is_norm = isinstance(module, BATCH_AND_INSTANCE_NORMS)
    return is_norm and bool(module.track_running_stats) and module.running_mean is not None


def _is_composite(module: nn.Module) -> bool:
    """A module, not a container, with layers of its own inside."""
    if _is_container(module) or not has_weights(module):
        return False
    if is_whole(module) and not isinstance(module, _TORCH_BLOCKS) and not _is_distributed(module):
        return False
    return any(has_weights(child) for child in module.children())


def _is_flat(module: nn.Module) -> bool:
    """Whether all layers inside, looked for through containers, are single layers."""
    for child in module.children():
        if _is_container(child):
            if not _is_flat(child):
                return False
        elif _is_composite(child):
            return False
    return True


def _repeated_classes(container: nn.Module, at_least: int = 2) -> set[type[nn.Module]]:
    counts = Counter(type(element) for element in container.children() if _is_composite(element))
    return {cls for cls, count in counts.items() if count >= at_least}


def _repeated_lists(module: nn.Module) -> Iterator[nn.Module]:
    """The containers inside ``module`` that hold two or more composite modules of one class."""
    for inner in module.modules():
        if _is_container(inner) and _repeated_classes(inner):
            yield inner


def _lists_of(module: nn.Module) -> Iterator[nn.Module]:
    """The containers that are attributes of ``module`` itself, and those nested directly in them."""
    for child in module.children():
        if _is_container(child):
            yield child
            yield from _lists_of(child)
