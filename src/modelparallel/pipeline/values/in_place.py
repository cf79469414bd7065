"""Writing in place to a value that was cut.

A cut leaves each live value as a leaf of its own, and autograd lets nobody write to a leaf that requires grad, or to a
view of one. The writing goes to a copy that depends on the leaf. Values that share memory must all see it: where one of
them covers the others, they become views of its copy; where none does, the others become stale.
"""

from __future__ import annotations

import torch

from modelparallel.pipeline.values.stage_tensor import StageTensor, is_dense, last_element
from modelparallel.torch_compat.private_parts import base_of, is_view


def writable(value: StageTensor, local: torch.Tensor) -> torch.Tensor:
    """``local``, the value here, or what may be written to in its place.

    Also what shares memory with a leaf is not written to: the leaf may be on its way to another stage.

    If that is a copy and ``value.local`` is not, nobody else may read what shares memory with ``value`` afterwards.
    """
    if value.is_pinned_home:
        return local
    sharing = [value, *(other for other in value.sharing() if _shares(other, local))]
    if not any(_is_leaf(member.local) for member in sharing):
        return local
    covering = _covering(sharing)
    if covering is None and not local.requires_grad:
        return local  # a detached view of a leaf
    with torch.enable_grad():  # writing under no_grad changes the value, and not where its gradient goes
        if covering is None or covering.local is None:
            return local.clone()
        old, new = covering.local, covering.local.clone()
        for member in sharing:
            if member is covering or member.local is None:
                continue
            source = new if member.local.requires_grad else new.detach()
            offset = int(member.local.storage_offset() - old.storage_offset() + new.storage_offset())
            member.local = source.as_strided(member.local.shape, member.local.stride(), offset)
        covering.local = new
    return value.local if value.local is not None else local


def _is_leaf(local: torch.Tensor | None) -> bool:
    """Whether it is a leaf that requires grad, or a view of one. A view that was made under no_grad only looks like a
    leaf: its gradient goes where that of its base goes.
    """
    if local is None or not local.requires_grad:
        return False
    origin = base_of(local)
    return origin.is_leaf and origin.requires_grad


def _shares(other: StageTensor, local: torch.Tensor) -> bool:
    return (
        other.local is not None
        and other.stale_reason is None
        and other.local.dtype == local.dtype
        and other.local.untyped_storage().data_ptr() == local.untyped_storage().data_ptr()
    )


def _covering(sharing: list[StageTensor]) -> StageTensor | None:
    """The value whose elements include the elements of all others, if there is one."""
    if len(sharing) == 1:
        return None  # a copy of it alone is enough
    ends = {id(member): element_range(member.local) for member in sharing}
    first = min(start for start, _ in ends.values())
    last = max(end for _, end in ends.values())
    for member in sharing:
        local = member.local
        if local is None or not local.requires_grad or ends[id(member)] != (first, last):
            continue
        if is_view(local) and local.is_leaf:
            continue  # made under no_grad: a copy of it has no graph
        if is_dense(tuple(local.shape), local.stride()):
            return member
    return None


def element_range(tensor: torch.Tensor | None) -> tuple[int, int]:
    """The first and the last element of the memory that ``tensor`` takes."""
    if tensor is None or not tensor.numel():
        return (0, 0)
    start = int(tensor.storage_offset())
    return start, last_element(start, tensor.shape, tensor.stride())
