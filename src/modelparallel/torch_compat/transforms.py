"""The entry points of torch.func, intercepted where every call of them comes through, however it was imported."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._functorch.apis
import torch._functorch.eager_transforms

#: (module that looks the function up in its globals, its name there, what to call it in messages). ``torch.func.vmap``
#: and the others are closures over the user's function that call these; jacrev, jacfwd and hessian are made of them.
_ENTRIES: tuple[tuple[Any, str, str], ...] = (
    (torch._functorch.apis, "vmap_impl", "torch.func.vmap"),
    (torch._functorch.eager_transforms, "grad_impl", "torch.func.grad"),
    (torch._functorch.eager_transforms, "grad_and_value_impl", "torch.func.grad_and_value"),
    (torch._functorch.eager_transforms, "_vjp_with_argnums", "torch.func.vjp"),
    (torch._functorch.eager_transforms, "_jvp_with_argnums", "torch.func.jvp"),
    (torch.nn.utils.stateless, "_functional_call", "torch.func.functional_call"),
)


def module_of_backward_hook(function_class: Any) -> Any:
    """The module whose full backward hooks are being set up by the caller's caller, which applies ``function_class``;
    None if it does something else. The function is not told which module it works for.
    """
    if function_class is not torch.nn.modules._functions.BackwardHookFunction:
        return None
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch.utils.hooks.BackwardHook):
            return owner.module
        frame = frame.f_back  # type: ignore[assignment]
    return None


#: (name in messages, the function of torch, args, kwargs) -> result
Handler = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def intercepted_transforms(handler: Handler) -> Iterator[None]:
    """Send every call of a transform, and of ``functional_call``, through ``handler``; nested ones, too."""
    originals = [(module, name, getattr(module, name)) for module, name, _ in _ENTRIES]

    def sent(title: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return handler(title, original, args, kwargs)

        return call

    for (module, name, original), (_, _, title) in zip(originals, _ENTRIES, strict=True):
        setattr(module, name, sent(title, original))
    try:
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)
