"""Values of the step that code keeps beyond their microbatch, or has put where a module finds them without being given
them: in an attribute, a list, a closure.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch

from modelparallel import trees
from modelparallel.errors import StepUsageError, UnsupportedError
from modelparallel.pipeline.side_doors.kept_state import KeptState
from modelparallel.pipeline.values.stage_tensor import StageTensor, TensorOwner
from modelparallel.pipeline.values.stage_view import PlacedTensor, StageView


def check_carried_over(program: TensorOwner, value: StageTensor, *, takes_turns: bool) -> None:
    """``program`` goes on with a value of an earlier microbatch or step; ``takes_turns``: with other microbatches.

    Raises StepUsageError for one with a graph: its backward belongs to the microbatch that it came from.
    """
    if value.program.engine is not program.engine:
        raise StepUsageError("a value of a step before smp.init was called again is used: make it anew")
    if value.spec.requires_grad and torch.is_grad_enabled():
        value.program.check_open()
        raise StepUsageError(
            f"a value of microbatch {value.program.microbatch} is used in microbatch {program.microbatch}: with "
            "pipelining, values that "
            "came out of weights live for one microbatch. Return what you need from the step function, or keep "
            "value.detach()"
        )
    if takes_turns:
        raise StepUsageError(
            f"a value of microbatch {value.program.microbatch}, of this step or an earlier one, is used in microbatch "
            f"{program.microbatch}. The microbatches take turns on each stage, since the first step of this kind did "
            "not do that, so it may be another one than without a pipeline: do it in the first step, too (then they "
            "run one after another)"
        )


def refuse_buffer_read(name: str) -> NoReturn:
    """Glue reads a stateful buffer of a placed module, and a later microbatch may have written to it by then."""
    raise StepUsageError(
        f"buffer '{name}' of a module is read between the modules while microbatches take turns on each stage, "
        "since the first step of this kind did not read it, so its values may be those of a later microbatch: read "
        "it in the first step, too (then they run one after another)"
    )


def watched_hook(engine: StageView, hook: Callable[..., Any], title: str) -> Callable[..., Any]:
    """``hook``, which runs in the backward at the home of ``title`` alone. In the first step of a kind it is an error
    if it keeps something: the other stages would not have it.
    """
    if not engine.is_discovering or getattr(hook, "keeps_local", False):
        return hook

    @functools.wraps(hook)
    def run(*args: Any, **kwargs: Any) -> Any:
        kept = KeptState([value for value in args if isinstance(value, torch.nn.Module)], [hook])
        result = hook(*args, **kwargs)
        if kept.has_changed():
            raise UnsupportedError(
                f"a hook in the backward of {title} keeps something (in a list, a dictionary, an attribute, a closure "
                f"or a global): it runs on pp_rank {engine.stage} alone, where the module is, and other stages would "
                "have nothing, or something else\n"
                "  gradients of parameters: p.grad of model.named_parameters() after the step, on the stage that holds "
                "them\n"
                "  each stage is to keep what it sees, on purpose: set hook.keeps_local = True"
            )
        return result

    return run


def watched_hooks(
    engine: StageView, hooks: Mapping[str, Mapping[int, Callable[..., Any]]], title: str
) -> dict[str, OrderedDict[int, Any]]:
    """All of a module's hooks in the backward, by where they are, each as :func:`watched_hook`."""
    return {
        name: OrderedDict((key, watched_hook(engine, hook, title)) for key, hook in own.items())
        for name, own in hooks.items()
    }


_OF_NOBODY = (
    "a tensor that requires grad but belongs to no smp.DistributedModel meets the values of one inside smp.step: with "
    "pipelining its gradient would exist on one stage only. Make it part of the model (a parameter, or a module of "
    "it), or detach it; a module that the first forward makes is too late: call the model once before it is wrapped"
)


def refuse_graph(leaves: Sequence[torch.Tensor], placed: Mapping[int, PlacedTensor]) -> NoReturn:
    """Say that an ordinary tensor with a graph that ends in ``leaves`` cannot meet values of the step."""
    known = next((placed[id(leaf)] for leaf in leaves if id(leaf) in placed), None)
    if known is None:
        raise StepUsageError(_OF_NOBODY)
    raise StepUsageError(
        f"a tensor that was computed with the parameter '{known.name}' of pp_rank {known.home} meets values of the "
        "step as an ordinary tensor, which the other stages do not have: it left its module other than by the return "
        "value, where nobody saw it. Return it from the module, keep it in an attribute of the module (self.name = "
        "value) or in a list or dictionary there, or take it in a hook of the module: those are followed"
    )


def read_inside(stage: int, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """An operation inside a module at its home on a value that it was not given: with the tensor, if it is here."""

    def local(leaf: Any) -> Any:
        if not isinstance(leaf, StageTensor):
            return leaf
        if leaf.stale_reason is not None:
            raise StepUsageError(leaf.stale_reason)
        if leaf.local is None:
            raise StepUsageError(
                f"a value of shape {tuple(leaf.spec.shape)} that pp_rank {leaf.home} has computed is used inside a "
                f"module that runs on pp_rank {stage} and was not given it (it was kept in an attribute, a list "
                "or a closure): give it to the module as an argument"
            )
        return leaf.local

    args, kwargs = trees.map_leaves(local, (args, kwargs))
    return func(*args, **kwargs)
