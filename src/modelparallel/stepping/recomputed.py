"""Activation checkpointing: modules that keep their inputs and run again in the backward (smp-api section 11).

[Note: marks] ``smp.set_activation_checkpointing`` marks a module when the model is wrapped; with pipelining nobody
knows then on which stages it will be. So the marks are carried out when the model has been partitioned: from then on a
call of the module is a region of the engine (pipeline/recompute/region.py), wherever it is.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from modelparallel.errors import PartitionError, SMPConfigError, StepUsageError
from modelparallel.model.views import viewed_module
from modelparallel.model.wrapper import DistributedModel, wrapped_models
from modelparallel.pipeline.values.holders import is_decoder_cache
from modelparallel.recomputation.strategies import check_strategy, groups_of
from modelparallel.torch_compat import install_call
from modelparallel.training import runtime as runtime_module
from modelparallel.training.runtime import Runtime

logger = logging.getLogger("modelparallel")

#: What decides which operations keep their results: as torch's ``create_selective_checkpoint_contexts`` takes it.
Policy = Callable[..., Any] | Sequence[Any]


@dataclass(frozen=True)
class _Options:
    preserves_random: bool = True
    pack_args_as_tuple: bool = False
    strategy: str = "each"
    policy: Policy | None = None


def checkpoint(module: nn.Module, *args: Any, preserve_rng_state: bool = True, **kwargs: Any) -> Any:
    """``module(*args, **kwargs)``, which keeps its inputs alone and runs once more in the backward. As the call of the
    module itself: local, or collective over TP_GROUP for a split one; inside a step with pipelining every stage calls
    it.

    Arguments may be nested. Without gradients, and in evaluation mode, it is an ordinary call. With
    ``preserve_rng_state`` the second run draws the random numbers of the first.

    Raises:
        SMPConfigError: a function in place of a module.
        PartitionError: a module on several stages with ``auto_partition: False``.

    Source: smp-api section 11.
    """
    _check_module(module, "smp.checkpoint")
    runtime = runtime_module.current()
    _check_stages(runtime, module, "smp.checkpoint")
    return _called(runtime, [module], module, args, kwargs, _Options(preserve_rng_state))


def checkpoint_sequential(
    sequential_module: nn.Sequential,
    input: Any,
    strategy: str = "each",
    preserve_rng_state: bool = True,
    pack_args_as_tuple: bool = False,
) -> Any:
    """``sequential_module(input)``, recomputed in the backward in groups of children. Local or collective as
    :func:`checkpoint`.

    The arguments are those of :func:`set_activation_checkpointing`.

    Raises:
        SMPConfigError: anything but an ``nn.Sequential``, or an unknown strategy.

    Source: smp-api section 11.
    """
    _check_module(sequential_module, "smp.checkpoint_sequential")
    if not isinstance(sequential_module, nn.Sequential):
        raise SMPConfigError(
            f"smp.checkpoint_sequential takes an nn.Sequential, got a {type(sequential_module).__name__}: use "
            "smp.checkpoint(module, *args)"
        )
    check_strategy(strategy)
    runtime = runtime_module.current()
    for child in sequential_module:
        _check_stages(runtime, child, "smp.checkpoint_sequential")
    options = _Options(preserve_rng_state, pack_args_as_tuple, strategy)
    return _grouped_forward(runtime, sequential_module, options)(input)


def checkpoint_wrapper(module: nn.Module, preserve_rng_state: bool = True) -> nn.Module:
    """Let every call of ``module`` in training be recomputed; returns the module itself.

    Unlike :func:`set_activation_checkpointing` it is called before the model is wrapped, while it is built. Local.
    Source: smp-api section 11.
    """
    _check_module(module, "smp.checkpoint_wrapper")
    _install(module, _Options(preserve_rng_state))
    return module


def set_activation_checkpointing(
    module: nn.Module,
    preserve_rng_state: bool = True,
    pack_args_as_tuple: bool = False,
    strategy: str = "each",
    *,
    mode: str = "full",
    policy: Policy | None = None,
) -> None:
    """Recompute a part of a wrapped model in the backward; after ``smp.DistributedModel``, before the first step.
    Local, but the same calls on every rank.

    A module on several stages is recomputed on each of its stages, with a warning.

    Args:
        module: any module of the model, or the model. Of an ``nn.Sequential`` the children are recomputed, in groups;
            of a ``ModuleList`` each child.
        preserve_rng_state: dropout and the like draw the same numbers again.
        pack_args_as_tuple: a tuple goes to the children of an ``nn.Sequential`` as one argument. Without it, it is
            spread over the arguments of a child that takes several.
        strategy: of an ``nn.Sequential``: "each" child alone; "contiguous": maximal runs of children on one stage;
            "group_x" (x an integer >= 1): those runs in pieces of at most x children.
        mode: ours, not the original's: "full", or "selective": results of operations that ``policy`` names are kept.
        policy: for "selective": a list of operations, or a function, as
            ``torch.utils.checkpoint.create_selective_checkpoint_contexts`` takes it.

    Raises:
        SMPConfigError: wrong arguments.
        StepUsageError: after the first step.
        PartitionError: at the first step, for a module on several stages with ``auto_partition: False``.

    Source: smp-api section 11.
    """
    title = "smp.set_activation_checkpointing"
    _check_module(module, title)
    module = viewed_module(module)
    module = module.module if isinstance(module, DistributedModel) else module
    model = _model_of(module)
    options = _checked(module, _Options(preserve_rng_state, pack_args_as_tuple, strategy, policy), mode)
    if model.has_run_post_partition_hooks:
        raise StepUsageError(f"{title}: call it after smp.DistributedModel and before the first step, on every rank")
    runtime = runtime_module.current()

    def carry_out(*_: Any) -> None:
        for part in _recomputed_parts(module):
            _check_stages(runtime, part, title)
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) or _has_own_forward(module):
            for child in module.children():
                _install(child, options)
        else:
            _install(module, options)

    if runtime.is_pipelined:
        model.register_post_partition_hook(carry_out)
    else:
        carry_out()


def _check_module(module: object, title: str) -> None:
    if isinstance(module, nn.Module):
        return
    raise SMPConfigError(
        f"{title} takes a module, got {module!r}: functions are recomputed by torch.utils.checkpoint.checkpoint, which "
        "works inside models and step functions, or make an nn.Module of it"
    )


def _checked(module: nn.Module, options: _Options, mode: str) -> _Options:
    title = "smp.set_activation_checkpointing"
    check_strategy(options.strategy)
    if not isinstance(module, nn.Sequential) and (options.strategy != "each" or options.pack_args_as_tuple):
        raise SMPConfigError(
            f"{title}: strategy and pack_args_as_tuple are for nn.Sequential alone, got a {type(module).__name__}"
        )
    if _has_own_forward(module) and options.strategy != "each":
        raise SMPConfigError(
            f"{title}: {type(module).__name__} has a forward of its own, so that its children cannot be called in "
            "groups: use strategy='each'"
        )
    if mode not in ("full", "selective"):
        raise SMPConfigError(f"{title}: mode: expected 'full' or 'selective', got {mode!r}")
    if (mode == "selective") != (options.policy is not None):
        raise SMPConfigError(f"{title}: mode='selective' needs a policy (operations to keep), mode='full' takes none")
    if options.policy is not None:
        try:
            create_selective_checkpoint_contexts(_as_policy(options.policy))
        except (TypeError, ValueError) as error:
            raise SMPConfigError(f"{title}: policy: {error}") from error
    return options


def _as_policy(policy: Policy) -> Any:
    return policy if callable(policy) else list(policy)


def _has_own_forward(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is not nn.Sequential.forward


def _model_of(module: nn.Module) -> DistributedModel:
    for model in reversed(wrapped_models(runtime_module.current())):
        if any(module is part for part in model.module.modules()):
            return model
    raise SMPConfigError(
        f"smp.set_activation_checkpointing: this {type(module).__name__} is part of no smp.DistributedModel: wrap the "
        "model first, and take the module from model.get_module()"
    )


def _recomputed_parts(module: nn.Module) -> list[nn.Module]:
    """The modules that must each be on one stage."""
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return list(module.children())
    return [module]


def _check_stages(runtime: Runtime, module: nn.Module, title: str) -> None:
    """Source: smp-semantics-checks 84."""
    homes = runtime.engine.homes_of(module) if runtime.is_pipelined else ()
    if len(homes) < 2 or id(module) in runtime.engine.known_to_span:
        return
    text = (
        f"{title}: a module ({type(module).__name__}) is on several partitions ({', '.join(map(str, sorted(homes)))})"
    )
    if not runtime.session.config.auto_partition:
        raise PartitionError(
            f"{text}: put it into one with smp.set_partition, or checkpoint the modules in it one by one"
        )
    runtime.engine.known_to_span.add(id(module))
    logger.warning("%s: each of these stages recomputes its part of it", text)


def _install(module: nn.Module, options: _Options) -> None:
    """From now on calls of ``module`` are recomputed."""

    def call(*args: Any, **kwargs: Any) -> Any:
        runtime = runtime_module.current()
        if not isinstance(module, nn.Sequential) or _has_own_forward(module):
            return _called(runtime, [module], inner, args, kwargs, options)
        # The call goes through the module's own, with its hooks, which finds this forward.
        module.__dict__["forward"] = _grouped_forward(runtime, module, options)
        try:
            return inner(*args, **kwargs)
        finally:
            module.__dict__.pop("forward", None)

    inner = install_call(module, call)


def _grouped_forward(runtime: Runtime, sequential: nn.Sequential, options: _Options) -> Callable[[Any], Any]:
    children = list(sequential)
    groups = groups_of([runtime.engine.homes_of(child) for child in children], options.strategy)

    def forward(input: Any) -> Any:
        for group in groups:
            members = [children[index] for index in group]
            input = _called(runtime, members, _chain(members, options), (input,), {}, options)
        return input

    return forward


def _chain(members: Sequence[nn.Module], options: _Options) -> Callable[[Any], Any]:
    def run(input: Any) -> Any:
        for member in members:
            is_spread = isinstance(input, tuple) and not options.pack_args_as_tuple and _takes_several(member)
            input = member(*input) if is_spread else member(input)
        return input

    return run


def _takes_several(module: nn.Module) -> bool:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
        return True
    return sum(parameter.kind in kinds for parameter in parameters) > 1


def _called(
    runtime: Runtime,
    modules: Sequence[nn.Module],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: _Options,
) -> Any:
    """Call ``function``, which runs ``modules``, as a region, where that is of use."""
    is_tracing = runtime.step is not None and runtime.step.is_tracing
    if not any(module.training for module in modules) or not torch.is_grad_enabled() or is_tracing:
        return function(*args, **kwargs)
    args = tuple(None if is_decoder_cache(value) else value for value in args)
    kwargs = {name: _without_cache(name, value) for name, value in kwargs.items()}
    contexts = None
    if options.policy is not None:
        contexts = create_selective_checkpoint_contexts(_as_policy(options.policy))
    return runtime.engine.recomputed(
        function,
        args,
        kwargs,
        what=f"a module with activation checkpointing ({', '.join(type(module).__name__ for module in modules)})",
        preserves_random=options.preserves_random,
        contexts=contexts,
        modules=modules,
        store=runtime.engine.activation_store,
    )


def _without_cache(name: str, value: Any) -> Any:
    """A layer that runs twice would add its keys and values twice; Hugging Face leaves them out, too."""
    if is_decoder_cache(value):
        return None
    return False if name == "use_cache" and value is True else value


__all__ = ["checkpoint", "checkpoint_sequential", "checkpoint_wrapper", "set_activation_checkpointing"]
