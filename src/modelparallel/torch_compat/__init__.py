"""Every private or version-dependent name of torch that the library uses, in one place, each with the reason."""

from __future__ import annotations

import functools
import inspect
import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.utils.clip_grad
import torch.utils.checkpoint
from torch import nn
from torch._C import (  # the torch-function mode stack: modes are suspended while a module runs at its home
    _get_function_stack_at,
    _is_any_autocast_enabled,  # one look instead of one per device, at every operation of a step
    _len_torch_function_stack,
    _pop_torch_function_stack,
    _push_on_torch_function_stack,
)
from torch.utils._python_dispatch import (  # ThreadState hands the dispatch modes on
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)
from torch.utils.flop_counter import (
    flop_registry as flop_registry,
)  # operation -> its count of floating-point operations

#: ``__torch_function__`` of a tensor subclass that only looks at operations below autograd; torch documents no name.
no_torch_function = torch._C._disabled_torch_function_impl

# Disables the dispatch to tensor subclasses: metadata of a StageTensor is answered by its own wrapper tensor.
DisableTorchFunctionSubclass = torch._C.DisableTorchFunctionSubclass


@contextmanager
def dispatch_modes_off() -> Iterator[None]:
    """Run operations as they are, unseen by all dispatch modes; there is no public way to suspend them."""
    modes = _get_current_dispatch_mode_stack()
    for _ in modes:
        _pop_mode()
    try:
        yield
    finally:
        for mode in modes:
            _push_mode(mode)


def swap_contents(first: torch.Tensor, second: torch.Tensor) -> None:
    """Exchange class, attributes and contents of two tensors; both objects stay.

    As ``torch.utils.swap_tensors``, which refuses tensors that weak references or graphs of earlier operations point
    to. The first go on pointing to the object (an LSTM keeps them); a backward through the second would be lost, and
    raises.
    """
    for tensor in (first, second):
        if tensor._use_count() > 1 and tensor.is_leaf and tensor.requires_grad:  # type: ignore[attr-defined]
            torch.autograd.graph.get_gradient_edge(tensor).node.register_prehook(_refuse_backward)
    first.__class__, second.__class__ = second.__class__, first.__class__
    first.__dict__, second.__dict__ = second.__dict__, first.__dict__
    torch._C._swap_tensor_impl(first, second)


def _refuse_backward(gradients: Any) -> None:
    raise RuntimeError(
        "backward through a graph that was made before the parameters of the model were placed: run the forward again"
    )


def default_store() -> dist.Store:
    """The store of the default process group, for communicators that are not process groups of torch's registry."""
    store: dist.Store = dist.distributed_c10d._get_default_store()
    return store


def install_call(module: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``module(...)`` run ``call``; returns what it ran before.

    ``nn.Module.__call__`` looks into the instance attribute ``_compiled_call_impl`` first (it is where
    ``Module.compile`` puts its result) and leaves it out of pickles and copies. No other per-instance place catches a
    call before the module's own hooks run.
    """
    previous = module._compiled_call_impl if module._compiled_call_impl is not None else module._call_impl
    module._compiled_call_impl = call
    return previous


def has_own_compiled_call(module: nn.Module) -> bool:
    """Whether the user has compiled this module: by ``module.compile()``, or by wrapping it in ``torch.compile``."""
    if _is_users_call(module._compiled_call_impl):
        return True
    return any(cls.__module__.startswith("torch._dynamo") for cls in type(module).__mro__)


def take_off_compiled_call(module: nn.Module) -> bool:
    """Undo ``module.compile()``; whether there was something to undo."""
    was_compiled = _is_users_call(module._compiled_call_impl)
    if was_compiled:
        module._compiled_call_impl = None
    return was_compiled


def _is_users_call(call: Any) -> bool:
    # Not one that the library has installed, when the same module was wrapped before.
    return call is not None and not getattr(call, "__module__", "").startswith("modelparallel.")


def fresh_module_call(title: str) -> Callable[..., Any]:
    """A function of (module, arguments) that makes the module's own call, hooks included, with a code object of its
    own.

    ``torch.compile`` keeps its cache, and counts recompilations, by code object.
    """

    def call(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_name=f"call_{title}", co_qualname=f"call_{title}")
    return call


def compile_errors() -> tuple[type[Exception], ...]:
    """What torch.compile raises when it cannot compile; they have no public names. (Not the errors of the code that it
    compiles, which it passes on.)"""
    from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, InternalTorchDynamoError, Unsupported

    return (BackendCompilerFailed, FailOnRecompileLimitHit, InternalTorchDynamoError, Unsupported)


def default_recompile_limit() -> int | None:
    """How often one code object is compiled, unless ``torch.compile`` is told; None where it cannot be told."""
    if "recompile_limit" not in inspect.signature(torch.compile).parameters:
        return None
    from torch._dynamo import config

    return int(config.recompile_limit)


def hook_registries(module: nn.Module) -> tuple[Mapping[int, Any], ...]:
    """The dictionaries of the hooks of a module, of all modules in it, and of the hooks for all modules at once.

    There is no public way to ask whether a module has hooks.
    """
    names = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    own = [getattr(part, name) for part in module.modules() for name in names]
    return (*own, *(getattr(torch.nn.modules.module, f"_global{name}") for name in names))


def forward_hooks_of(module: nn.Module) -> tuple[Mapping[int, Any], Mapping[int, Any]]:
    """What holds the hooks before and after the forward of ``module`` itself."""
    return module._forward_pre_hooks, module._forward_hooks


def forward_hooks_for_all() -> tuple[Mapping[int, Any], Mapping[int, Any]]:
    """What holds the hooks before and after the forward of every module of the process."""
    return torch.nn.modules.module._global_forward_pre_hooks, torch.nn.modules.module._global_forward_hooks


BACKWARD_HOOKS = ("_backward_pre_hooks", "_backward_hooks")
FORWARD_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
DELETED = object()
_REGISTER = {"register_forward_pre_hook": "_forward_pre_hooks", "register_forward_hook": "_forward_hooks"}


@contextmanager
def replaced_attributes(module: nn.Module, attributes: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """For a while ``module`` has these attributes (what holds its hooks, its forward); yields those that it had."""
    before = {name: module.__dict__[name] for name in attributes}
    module.__dict__.update(attributes)
    try:
        yield before
    finally:
        module.__dict__.update(before)


@contextmanager
def noticed_attributes(notice: Callable[[nn.Module, str, Any], bool]) -> Iterator[None]:
    """Call ``notice(module, name, value)`` before an attribute of any module is assigned or deleted (``DELETED``), or a
    hook around its forward is registered; it may say that an attribute must not be assigned.
    """
    originals = {name: getattr(nn.Module, name) for name in ("__setattr__", "__delattr__", *_REGISTER)}

    def assign(self: nn.Module, name: str, value: Any) -> None:
        if not notice(self, name, value):
            originals["__setattr__"](self, name, value)

    def delete(self: nn.Module, name: str) -> None:
        notice(self, name, DELETED)
        originals["__delattr__"](self, name)

    def registering(method: str, hooks: str) -> Callable[..., Any]:
        def register(self: nn.Module, hook: Any, *args: Any, **kwargs: Any) -> Any:
            notice(self, hooks, hook)
            return originals[method](self, hook, *args, **kwargs)

        return register

    nn.Module.__setattr__ = assign  # type: ignore[method-assign]
    nn.Module.__delattr__ = delete  # type: ignore[method-assign]
    for method, hooks in _REGISTER.items():
        setattr(nn.Module, method, registering(method, hooks))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(nn.Module, name, original)


def suspend_function_mode(mode: object) -> bool:
    """Take ``mode`` off the torch-function mode stack if it is the innermost one; whether it was."""
    num_modes = _len_torch_function_stack()
    if num_modes == 0 or _get_function_stack_at(num_modes - 1) is not mode:
        return False
    _pop_torch_function_stack()
    return True


def resume_function_mode(mode: object) -> None:
    """Put ``mode`` back after :func:`suspend_function_mode`."""
    _push_on_torch_function_stack(mode)


@contextmanager
def intercepted_function_apply(
    handler: Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], Any],
) -> Iterator[None]:
    """Send every ``autograd.Function.apply`` through ``handler(function class, original_apply, args, kwargs)``.

    ``apply`` does not look at ``__torch_function__``: given a StageTensor it would record a node on the empty wrapper
    and cut the gradient in silence.
    """
    function_class = torch.autograd.Function
    own_apply = function_class.__dict__.get("apply")
    original = function_class.apply.__func__  # type: ignore[attr-defined]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        def apply_of_class(*inner_args: Any, **inner_kwargs: Any) -> Any:
            return original(cls, *inner_args, **inner_kwargs)

        apply_of_class.__name__ = f"{cls.__qualname__}.apply"
        return handler(cls, apply_of_class, args, kwargs)

    function_class.apply = classmethod(apply)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        if own_apply is not None:
            function_class.apply = own_apply  # type: ignore[method-assign]
        else:
            del function_class.apply


#: The node of a reentrant checkpoint: ``apply(function, preserve_rng_state, *args)``.
CheckpointFunction = torch.utils.checkpoint.CheckpointFunction


@contextmanager
def intercepted_checkpoints(
    region: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any], AbstractContextManager[None] | None],
) -> Iterator[None]:
    """Run a non-reentrant ``torch.utils.checkpoint`` in ``region(function, args, kwargs, context_fn)``, where that is
    not None, in place of torch's own recomputation.

    ``checkpoint`` makes its region with a private generator; there is no public way to put another one in its place,
    and libraries keep references to ``checkpoint`` itself.
    """
    module: Any = torch.utils.checkpoint
    original = module._checkpoint_without_reentrant_generator

    def generator(
        function: Any, preserve_rng_state: Any, context_fn: Any, check: Any, debug: Any, early_stop: Any,
        *args: Any, **kwargs: Any,
    ) -> Iterator[None]:  # fmt: skip
        own_region = region(function, args, kwargs, context_fn) if torch.is_grad_enabled() else None
        if own_region is None:
            yield from original(function, preserve_rng_state, context_fn, check, debug, early_stop, *args, **kwargs)
            return
        with own_region:
            yield

    module._checkpoint_without_reentrant_generator = generator
    try:
        yield
    finally:
        module._checkpoint_without_reentrant_generator = original


def autocast_state() -> tuple[Any, ...]:
    """The autocast settings that decide the dtypes of outputs, as a hashable value."""
    if not _is_any_autocast_enabled():
        return ()
    return tuple(
        (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")
    )


@contextmanager
def noticed_tensor_hooks(notice: Callable[[], None]) -> Iterator[None]:
    """Call ``notice`` where somebody registers a hook on a tensor: the graph does not show that it has one."""
    original: Callable[..., Any] = torch.Tensor.register_hook

    def register_hook(self: torch.Tensor, hook: Callable[..., Any]) -> Any:
        notice()
        return original(self, hook)

    torch.Tensor.register_hook = register_hook  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.register_hook = original  # type: ignore[method-assign]


def _put_inside(function: Any, make: Callable[[Any], Any]) -> Callable[[], None]:
    """Let a function of ``torch.nn.utils.clip_grad``, however it was imported, run ``make(what it runs)`` instead;
    returns what takes it back. All of them are wrappers that run the ``func`` of their closure without gradients.
    """
    cell = function.__closure__[function.__code__.co_freevars.index("func")]
    original = cell.cell_contents
    cell.cell_contents = functools.wraps(original)(make(original))

    def take_back() -> None:
        cell.cell_contents = original

    return take_back


def intercept_clip_grad_norm(
    norm_of: Callable[[Sequence[torch.Tensor], bool, float, bool], torch.Tensor | None],
    clip: Callable[[Sequence[torch.Tensor], float, torch.Tensor], bool],
) -> Callable[[], None]:
    """Let ``torch.nn.utils.get_total_norm`` and ``clip_grad_norm_`` ask ``norm_of(tensors, are_parameters, norm_type,
    error_if_nonfinite)`` for the norm, unless that says None, and ``clip_grads_with_norm_`` and ``clip_grad_norm_`` ask
    ``clip(parameters, max_norm, norm)`` to scale the gradients, unless that says False. Returns what takes it back.

    ``clip_grad_norm_`` hands on gradients only, and a rank may hold none: the parameters are taken from its variables.
    """
    module: Any = torch.nn.utils.clip_grad
    clip_grad_norm_ = module.clip_grad_norm_
    code = clip_grad_norm_.__closure__[clip_grad_norm_.__code__.co_freevars.index("func")].cell_contents.__code__

    def make_total_norm(original: Any) -> Any:
        def total_norm(
            tensors: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
        ) -> Any:
            tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
            caller = sys._getframe(2)  # behind the wrapper
            are_parameters = caller.f_code is code
            given = caller.f_locals["parameters"] if are_parameters else tensors
            norm = norm_of(given, are_parameters, norm_type, error_if_nonfinite)
            return original(tensors, norm_type, error_if_nonfinite, foreach) if norm is None else norm

        return total_norm

    def make_clip(original: Any) -> Any:
        def clip_grads(parameters: Any, max_norm: float, total_norm: Any, foreach: bool | None = None) -> None:
            parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
            if not clip(parameters, max_norm, total_norm):
                original(parameters, max_norm, total_norm, foreach)

        return clip_grads

    put = [
        _put_inside(module._get_total_norm, make_total_norm),
        _put_inside(module._clip_grads_with_norm_, make_clip),
    ]

    def take_back() -> None:
        for one in put:
            one()

    return take_back


def intercept_clip_grad_value(clip: Callable[[Sequence[torch.Tensor], float], bool]) -> Callable[[], None]:
    """Let ``torch.nn.utils.clip_grad_value_`` ask ``clip(parameters, clip_value)`` first, and do nothing if that says
    True. Returns what takes it back.
    """

    def make(original: Any) -> Any:
        def clip_grad_value_(parameters: Any, clip_value: float, foreach: bool | None = None) -> None:
            parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
            if not clip(parameters, float(clip_value)):
                original(parameters, clip_value, foreach)

        return clip_grad_value_

    module: Any = torch.nn.utils.clip_grad
    return _put_inside(module.clip_grad_value_, make)


def intercept_unscaling(
    is_ours: Callable[[Any], bool], before: Callable[[Any], None], after: Callable[[dict[Any, torch.Tensor]], None]
) -> Callable[[], None]:
    """Where a ``GradScaler`` unscales the gradients of an optimizer that ``is_ours``: call ``before(optimizer)``, and
    ``after`` with the overflows that it has found by device, to be changed in place. Returns a function that takes it
    back.

    The method is private, but it is the one place through which ``unscale_`` and ``step`` go.
    """
    scaler: Any = torch.amp.GradScaler
    original = scaler._unscale_grads_

    def unscale(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_ours(optimizer):
            return original(self, optimizer, *args, **kwargs)
        before(optimizer)
        overflow_by_device = original(self, optimizer, *args, **kwargs)
        after(overflow_by_device)
        return overflow_by_device

    scaler._unscale_grads_ = unscale

    def take_back() -> None:
        scaler._unscale_grads_ = original

    return take_back


def current_backward_id() -> int:
    """A number that names the backward pass (autograd graph task) that runs now; -1 outside. Nested passes have their
    own.

    There is no public way to tell two backward passes apart, and one that raised leaves no other trace in a reducer.
    """
    return torch._C._current_graph_task_id()


def queue_backward_callback(callback: Callable[[], None]) -> None:
    """Call ``callback`` when the backward pass that runs now is through; legal only inside one (in a hook).

    DDP and FSDP finish their reductions with it, but it has no public name.
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def num_storage_users(tensor: torch.Tensor) -> int:
    """How many tensors share the memory of ``tensor``, itself included; there is no public way to ask."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)) - 1  # less the storage object just made


def storage_identity(tensor: torch.Tensor) -> int:
    """A number that all views of one storage have, also on the meta device, and no other storage that is alive."""
    return int(tensor.untyped_storage()._cdata)  # data_ptr() is 0 there


def tensor_in_archive(stream: Any) -> tuple[torch.Tensor, int] | None:
    """A tensor on the meta device like the one that ``torch.save`` has written, and where its storage begins in the
    stream. None where the bytes are of another kind of processor, or torch does not say where they are.

    ``torch.load`` to the meta device swaps bytes where there are none, and crashes, so the reader under it is asked
    first. Where storages begin is documented as ``_checkpoint_offset`` for FakeTensorMode; torch 2.13 has it here, too.
    """
    if not _knows_where_storages_begin():
        return None
    reader: Any = torch._C.PyTorchFileReader(stream)
    if not reader.has_record("byteorder") or reader.get_record("byteorder") != sys.byteorder.encode():
        return None
    stream.seek(0)
    head = torch.load(stream, map_location="meta", weights_only=True)
    start: Any = head.untyped_storage()._checkpoint_offset if isinstance(head, torch.Tensor) else None
    return None if start is None else (head, start)


@functools.cache
def _knows_where_storages_begin() -> bool:
    """Asked once: a torch that does not would read all of a tensor only to drop it."""
    stream = io.BytesIO()
    torch.save(torch.zeros(1), stream)
    stream.seek(0)
    head = torch.load(stream, map_location="meta", weights_only=True)
    return getattr(head.untyped_storage(), "_checkpoint_offset", None) is not None


def is_function_node(node: Any) -> bool:
    """Whether a node of the autograd graph is that of an ``autograd.Function`` written in Python."""
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def keep_nan_out(roots: Sequence[torch.Tensor]) -> None:
    """In the backward of these, NaN counts as zero: the mean over nothing has such a gradient, times zero."""

    def cleaned(inputs: Any, unused: Any) -> Any:
        return tuple(
            None if gradient is None else torch.where(torch.isnan(gradient), torch.zeros_like(gradient), gradient)
            for gradient in inputs
        )

    waiting = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.next_functions:  # else it adds to a gradient
            node.register_hook(cleaned)
        waiting.extend(other for other, _ in node.next_functions if other is not None)


def summed_loss(loss: torch.Tensor) -> str:
    """The name of the operation, if this is a sum over samples, as by ``reduction="sum"``; else empty."""
    node = loss.grad_fn
    for _ in range(8):
        if node is None:
            return ""
        # Private: torch says there how losses are reduced; 2 is "sum".
        if getattr(node, "_saved_reduction", None) == 2 or node.name().startswith("SumBackward"):
            return str(node.name())
        if node.name() not in ("ToCopyBackward0", "ViewBackward0", "SqueezeBackward0", "AliasBackward0"):
            return ""
        node = node.next_functions[0][0]
    return ""


def leaves_of_graph(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a backward from ``tensor`` would give gradients to; the tensor itself if it is one."""
    if tensor.grad_fn is None:
        return [tensor]
    seen, pending, leaves = {tensor.grad_fn}, [tensor.grad_fn], []
    while pending:
        node = pending.pop()
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.append(leaf)
        fresh = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= fresh
        pending.extend(fresh)
    return leaves


def is_compiled_node(node: Any) -> bool:
    """Whether a node of the autograd graph is the backward of a graph that ``torch.compile`` has compiled as a whole.

    It may be run through once only: what it saved is overwritten on the way (donated buffers).
    """
    function = getattr(type(node), "_forward_cls", None)
    return function is not None and function.__module__.startswith("torch._functorch._aot_autograd")


class ThreadState:
    """What torch keeps for each thread and code run elsewhere should find as it is here: grad mode, autocast, default
    hooks for saved tensors, the stacks of function and dispatch modes. There is no public way to hand it on.
    """

    def __init__(self) -> None:
        self._is_grad_enabled = torch.is_grad_enabled()
        self._autocast = [
            (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")
        ]
        self._is_autocast_cache_enabled = torch.is_autocast_cache_enabled()
        self._function_modes = [_get_function_stack_at(index) for index in range(_len_torch_function_stack())]
        self._dispatch_modes: list[Any] | None = _get_current_dispatch_mode_stack()
        self._saved_tensor_hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def keep_dispatch_modes(self) -> None:
        """Let :meth:`active` leave the dispatch modes as it finds them: the modes of here may be closed by then."""
        self._dispatch_modes = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Put the state in force on this thread."""
        before = ThreadState()
        if self._dispatch_modes is None:
            before.keep_dispatch_modes()
        before._clear_modes()
        self._push()
        try:
            yield
        finally:
            self._clear_modes()
            if self._saved_tensor_hooks is not None:
                torch._C._autograd._pop_saved_tensors_default_hooks()
            before._push(with_hooks=False)

    def _clear_modes(self) -> None:
        for _ in range(_len_torch_function_stack()):
            _pop_torch_function_stack()
        for _ in () if self._dispatch_modes is None else _get_current_dispatch_mode_stack():
            _pop_mode()

    def _push(self, *, with_hooks: bool = True) -> None:
        torch._C._set_grad_enabled(self._is_grad_enabled)
        for device, is_enabled, dtype in self._autocast:
            torch.set_autocast_enabled(device, is_enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(self._is_autocast_cache_enabled)
        for mode in self._function_modes:
            _push_on_torch_function_stack(mode)
        for mode in self._dispatch_modes or ():
            _push_mode(mode)
        if with_hooks and self._saved_tensor_hooks is not None:
            torch._C._autograd._push_saved_tensors_default_hooks(*self._saved_tensor_hooks)
