"""Put distributed modules in the places of the marked ones, when the model is wrapped (smp-api section 8).

Three kinds of replacement:

- *built-in* (nn.Linear, nn.Embedding): the module is converted where it stands. It is the same object with another
  class, and its parameters are the same objects, now slices: every parent, optimizer, hook and reference of the user
  goes on holding them.
- *registered*: a new module is built from the constructor arguments of the original, through the hooks, and put in each
  of its places.
- *by a plan* (plans.py), which the user gave for the module, or which it carries: parts of it are converted where they
  stand, and nothing else in it is touched, but for registered modules and modules with a plan of their own. A plan of
  the user's goes before a registration, a registration before a plan that the module carries.

[Note: tensor_parallel_degree=1] Marks are harmless there: built-in modules stay what they are. Registered ones are
replaced all the same, because their parameters have other names, and scripts and checkpoints must not depend on the
degree.
"""

from __future__ import annotations

import inspect
import warnings
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modelparallel.errors import TensorParallelError
from modelparallel.job import registry
from modelparallel.job.registry import Registration, TensorParallelMark
from modelparallel.tensor_parallel.distributed_module import (
    DistributedModule,
    call_hook,
    checked_arguments,
    is_session_group,
    using_tp_group,
)
from modelparallel.tensor_parallel.placements import NotSplittableError
from modelparallel.tensor_parallel.planned_split import split_by_plan
from modelparallel.tensor_parallel.plans import carried_plan, carries_plan, user_plan, without

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group

_CALL_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def replace_marked_modules(
    root: nn.Module, tp_group: Group, match_weights: bool = False, prescaled_batch: bool = False
) -> nn.Module:
    """Distribute the outermost supported marked modules of ``root`` over ``tp_group``; returns the root, a new one if
    it was replaced.

    Every rank of the group must call it with the same model. ``match_weights``: registered modules get the weights of
    the originals (built-in ones keep theirs anyway). ``prescaled_batch``: the ranks of the group are fed one batch.
    Modules that cannot be distributed stay as they are, with a warning: sizes that do not divide, parameters shared
    with a module outside, instances older than their registration.
    """
    owners = _Owners(root)
    for name, module, mark, registration in _outermost_marked(root):
        if registration is None:
            _split_by_plan(name, module, mark, tp_group, owners, prescaled_batch)
            continue
        if registration.is_builtin and tp_group.size == 1:
            continue
        shared = owners.shared_with_outside(module)
        if shared is not None:
            _keep(name, module, f"{shared}, and slices of it would not be shared any more")
            continue
        try:
            if registration.is_builtin:
                _convert(name, module, registration, tp_group)
                continue
            replacement = _build(name, module, registration, mark, tp_group, keeps_weights=match_weights)
        except NotSplittableError as error:
            _keep(name, module, str(error))
            continue
        _dress_as(module, replacement, name, registration)
        if match_weights:
            _copy_weights(module, replacement, registration)
        elif registration.family is not None and (origin := registration.family.origin_of(module)):
            warnings.warn(
                f"tensor parallelism: module {name or 'the root module'!r} ({type(module).__name__}) was loaded from "
                f"{origin!r}; what replaces it has new weights: load a state dict into the wrapped model, or keep them "
                "with _match_weights: True",
                stacklevel=3,
            )
        root = _put_in_place(root, module, replacement)
    for name, part in root.named_modules():
        if isinstance(part, DistributedModule):
            part.note_name(name)
    registry.note_wrapped(root)
    return root


_Marked = tuple[str, nn.Module, TensorParallelMark, Registration | None]


def _outermost_marked(root: nn.Module) -> list[_Marked]:
    """The modules to replace; without a registration: to split by a plan."""
    outermost: list[_Marked] = []
    seen: set[int] = set()

    def visit(name: str, module: nn.Module, is_planned: bool) -> None:
        if id(module) in seen or isinstance(module, DistributedModule):
            return
        seen.add(id(module))
        mark, registration = registry.tensor_parallel_mark(module), registry.registration_for(module)
        if mark is not None and mark.enabled:
            if mark.plan is not None:
                outermost.append((name, module, mark, None))
                is_planned = True
            elif registration is not None and not (is_planned and registration.is_builtin):
                outermost.append((name, module, mark, registration))
                return
            elif not is_planned and carries_plan(module):
                outermost.append((name, module, mark, None))
                is_planned = True
        for child_name, child in module.named_children():
            visit(f"{name}.{child_name}" if name else child_name, child, is_planned)

    visit("", root, False)
    return outermost


def _split_by_plan(
    name: str, module: nn.Module, mark: TensorParallelMark, tp_group: Group, owners: _Owners, prescaled_batch: bool
) -> None:
    """Split a module that was marked with a plan, or carries one, but for what is decided inside it otherwise."""
    if tp_group.size == 1:
        return
    plan = user_plan(module, mark.plan) if mark.plan is not None else carried_plan(module)
    if plan is None:
        return

    def is_excluded(inner: str) -> bool:
        part = module
        for component in inner.split(".") if inner else ():
            part = getattr(part, component)
            own = registry.tensor_parallel_mark(part)
            if own is None or not own.enabled or own.plan is not None:
                return True
            registration = registry.registration_for(part)
            if isinstance(part, DistributedModule) or (registration is not None and not registration.is_builtin):
                return True
        return False

    split_by_plan(
        module, name, without(module, plan, is_excluded), tp_group, owners.names_of,
        is_users=mark.plan is not None, is_prescaled=prescaled_batch,
    )  # fmt: skip


class _Owners:
    """Which modules own each parameter, and which modules hold each module."""

    def __init__(self, root: nn.Module) -> None:
        self.of_parameter: dict[int, list[tuple[str, nn.Module]]] = {}
        self.of_module: dict[int, list[tuple[str, nn.Module]]] = {}
        for name, module in root.named_modules():
            for parameter_name, parameter in module._parameters.items():
                if parameter is not None:
                    self.of_parameter.setdefault(id(parameter), []).append((_join(name, parameter_name), module))
            for child in module._modules.values():
                if child is not None:
                    self.of_module.setdefault(id(child), []).append((name, module))

    def names_of(self, parameter: nn.Parameter) -> list[str]:
        """All names of a parameter."""
        return [name for name, _ in self.of_parameter.get(id(parameter), ())]

    def shared_with_outside(self, module: nn.Module) -> str | None:
        """How a parameter of ``module`` is reachable without passing through it, in words, or None."""
        inside = {id(part) for part in module.modules()}
        for part in module.modules():
            if part is not module:
                for name, parent in self.of_module.get(id(part), ()):
                    if id(parent) not in inside:
                        return f"its submodule {type(part).__name__} is also a child of {name or 'the root module'!r}"
            for parameter in part._parameters.values():
                for name, owner in self.of_parameter.get(id(parameter), ()):
                    if id(owner) not in inside:
                        return f"its parameter is shared with {name!r}"
        return None


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _keep(name: str, module: nn.Module, reason: str) -> None:
    warnings.warn(
        f"tensor parallelism: module {name or 'the root module'!r} ({type(module).__name__}) was marked but is not "
        f"distributed: {reason}",
        stacklevel=4,  # where smp.DistributedModel is called
    )


def _convert(name: str, module: nn.Module, registration: Registration, tp_group: Group) -> None:
    if "forward" in module.__dict__:
        raise NotSplittableError("its instance has a forward of its own")
    distributed_class = registration.distributed_class
    if not issubclass(distributed_class, DistributedModule):
        raise TensorParallelError(
            f"{distributed_class.__name__} is registered as built-in and is not a DistributedModule"
        )
    distributed_class.convert(module, tp_group)


def _build(
    name: str,
    module: nn.Module,
    registration: Registration,
    mark: TensorParallelMark,
    tp_group: Group,
    *,
    keeps_weights: bool,
) -> DistributedModule:
    """The distributed module for ``module``; raises NotSplittableError if ``module`` must stay."""
    try:
        recorded = registry.constructor_arguments(module)
    except TensorParallelError as error:
        raise TensorParallelError(f"tensor parallelism, module {name or 'the root module'!r}: {error}") from error
    if recorded is None:
        raise NotSplittableError(
            "it was created before its class was registered, so its arguments are unknown; register the class first"
        )
    distributed_class: Any = registration.distributed_class
    positional, keyword = recorded.positional, dict(recorded.keyword)
    hook = registration.init_hook
    if hook is not None:
        result = call_hook("init_hook", name, distributed_class, hook, positional, keyword)
        if result is None:
            raise NotSplittableError("its init_hook returned None: not supported with these arguments")
        positional, keyword = checked_arguments("init_hook", name, distributed_class, hook, result)
    signature = inspect.signature(distributed_class)
    if hook is not None:
        keyword = _known_arguments(name, distributed_class, signature, keyword)
    try:
        bound = signature.bind_partial(*positional, **keyword)
    except TypeError as error:
        source = "its init_hook returned" if hook is not None else f"{type(module).__name__} was built with"
        raise TensorParallelError(
            f"module {name!r}: {distributed_class.__name__}{signature} does not take the arguments that {source} "
            f"({error}); "
            "translate them in an init_hook"
        ) from error
    chosen = dict(mark.kwargs)
    if keeps_weights and registration.family is not None:
        chosen = {**registration.family.kept_arguments(module), **chosen}
    for key, value in chosen.items():
        if key in signature.parameters and signature.parameters[key].kind not in (
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        ):
            bound.arguments[key] = value
    with ExitStack() as stack:
        if not is_session_group(tp_group):
            stack.enter_context(using_tp_group(tp_group))
        index = registry.partition_mark(module)
        if index is not None:  # the new module, and what it is made of, belong where the original was put
            stack.enter_context(registry.partition_context(index))
        return _construct(name, distributed_class, bound)


def _construct(name: str, distributed_class: Any, bound: inspect.BoundArguments) -> DistributedModule:
    try:
        module: DistributedModule = distributed_class(*bound.args, **bound.kwargs)
    except TensorParallelError as error:  # keep the class: not splittable means keep the original
        raise type(error)(f"module {name!r}: {error}") from error
    except TypeError as error:
        raise TensorParallelError(
            f"module {name!r}: constructing {distributed_class.__name__} with {sorted(bound.arguments)} failed: {error}"
        ) from error
    return module


def _known_arguments(
    name: str, distributed_class: type, signature: inspect.Signature, keyword: dict[str, Any]
) -> dict[str, Any]:
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
        return keyword
    unknown = [key for key in keyword if key not in signature.parameters]
    if unknown:
        warnings.warn(
            f"tensor parallelism: the init_hook of module {name!r} gives {distributed_class.__name__} keyword "
            f"arguments that it does not "
            f"take; they are dropped: {', '.join(sorted(unknown))}",
            stacklevel=5,
        )
    return {key: value for key, value in keyword.items() if key not in unknown}


def _dress_as(original: nn.Module, replacement: DistributedModule, name: str, registration: Registration) -> None:
    """Give the replacement the calling convention, module hooks, mode, dtype and device of the original."""
    if registration.family is None:
        replacement.install_call_hooks(name, registration.forward_hook, registration.return_hook)
    else:
        replacement.install_answer(registration.family.answer_of(original))
        names = [name for name in registration.family.attributes if hasattr(original, name)]
        replacement.__dict__.update({name: getattr(original, name) for name in names})
        registry.note_family(replacement, registration.family)
    for table in _CALL_HOOK_TABLES:
        # The same table objects: handles that the user holds go on working.
        if original.__dict__.get(table):
            replacement.__dict__[table] = original.__dict__[table]
    replacement.train(original.training)
    placements = {
        (parameter.dtype, parameter.device) for parameter in original.parameters() if parameter.is_floating_point()
    }
    if len(placements) == 1:
        dtype, device = placements.pop()
        if any(parameter.dtype != dtype or parameter.device != device for parameter in replacement.parameters()):
            replacement.to(device=device, dtype=dtype)


def _copy_weights(original: nn.Module, replacement: DistributedModule, registration: Registration) -> None:
    if registration.family is None:
        replacement.copy_weights_from(original)
        return
    _, to_distributed = registration.family.translations_at("")
    # With gradients, so that what is made of trained parameters is seen to be trained.
    with torch.enable_grad():
        state = to_distributed(original.state_dict(keep_vars=True))
    replacement.copy_state(state, type(original).__name__)


def _put_in_place(root: nn.Module, original: nn.Module, replacement: nn.Module) -> nn.Module:
    for parent in root.modules():
        for name, child in parent._modules.items():
            if child is original:
                parent._modules[name] = replacement
        for name, value in parent.__dict__.items():
            if value is original:
                parent.__dict__[name] = replacement
    return replacement if root is original else root
