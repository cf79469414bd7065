"""What torch keeps behind an underscore and has no public form for, each said once, under a name of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

aten: Any = torch.ops.aten

#: How often a tensor was written to in place.
version_of: Callable[[torch.Tensor], int] = torch.Tensor._version.__get__  # type: ignore[attr-defined]
#: A tensor of a subclass that has no storage.
make_wrapper: Callable[..., Any] = torch.Tensor._make_wrapper_subclass
#: The parts of a sparse tensor that may have an element several times.
sparse_indices, sparse_values = torch.Tensor._indices, torch.Tensor._values

# Operations on lists of tensors: one call, and on a GPU one kernel, for all of them.
foreach_add = torch._foreach_add
foreach_add_ = torch._foreach_add_
foreach_addcmul_ = torch._foreach_addcmul_
foreach_copy_ = torch._foreach_copy_
foreach_div = torch._foreach_div
foreach_div_ = torch._foreach_div_
foreach_mul_ = torch._foreach_mul_
foreach_norm = torch._foreach_norm
foreach_sqrt = torch._foreach_sqrt
#: Divides gradients by a scale and notes whether one is not finite.
foreach_check_finite_and_unscale_ = torch._amp_foreach_non_finite_check_and_unscale_


def _kind_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.dtype


def by_kind(
    tensors: Iterable[torch.Tensor], kind_of: Callable[[torch.Tensor], tuple[Any, ...]] = _kind_of
) -> dict[tuple[Any, ...], list[torch.Tensor]]:
    """Lists that such an operation takes, by what all tensors of a list must have in common: (device, dtype)."""
    result: dict[tuple[Any, ...], list[torch.Tensor]] = {}
    for tensor in tensors:
        result.setdefault(kind_of(tensor), []).append(tensor)
    return result


#: The classes of norms that may have running statistics.
BATCH_AND_INSTANCE_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
#: Operations whose schemas do not say that they only look at their input in another way.
UNSAFE_VIEWS = frozenset({aten._unsafe_view, aten._reshape_alias})
#: Operations that give a number or a truth value, but one about shapes.
ABOUT_SHAPES = frozenset({aten._fused_sdp_choice, aten.is_same_size, aten._has_compatible_shallow_copy_type})
#: A kernel of CPU builds for which torch has no formula of its work.
CPU_FLASH_ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu


def base_of(tensor: torch.Tensor) -> torch.Tensor:
    """What ``tensor`` is a view of; the tensor itself if it is none."""
    return tensor if tensor._base is None else tensor._base


def is_view(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is a view that autograd knows."""
    return tensor._is_view()


def schema_of(operation: Any) -> Any:
    """The schema of an operation that a dispatch mode or a tensor subclass is given; None for one without."""
    return getattr(operation, "_schema", None)


def packet_of(operation: Any) -> Any:
    """All overloads of an operation together; what is no overload stands for itself."""
    return getattr(operation, "_overloadpacket", operation)


def is_operation(function: Any) -> bool:
    """Whether it is one overload of an operation, and not a function around operations."""
    return isinstance(function, torch._ops.OpOverload)


def has_compiled_call(module: nn.Module) -> bool:
    """Whether calls of the module go to something that was put there: by ``module.compile()``, or by the library."""
    return module._compiled_call_impl is not None


def plain_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the module with its hooks, whatever was put there for its calls."""
    return module._call_impl(*args, **kwargs)


def has_tensor_hooks(tensor: torch.Tensor) -> bool:
    """Whether something is called with the gradient of ``tensor``."""
    return bool(tensor._backward_hooks)


def names_of_temporary_buffers(module: nn.Module) -> set[str]:
    """The names of the module's own buffers that are in no state dict; a copy."""
    return set(module._non_persistent_buffers_set)


def set_names_of_temporary_buffers(module: nn.Module, names: set[str]) -> None:
    """What `names_of_temporary_buffers` is to give."""
    module._non_persistent_buffers_set = names
