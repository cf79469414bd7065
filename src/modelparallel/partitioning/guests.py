"""Guests: units that are called inside other units (a position bias or an adapter that is handed to every block).

A guest needs its weights wherever it is called, so every stage of one of its hosts holds a tied copy; the gradients of
the copies are added up as those of tied weights are. Who is whose guest shows in the traced step only. What a copy
writes to its buffers would stay on its stage: a guest with such buffers lives on one stage with all of its hosts.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from modelparallel import trees
from modelparallel.errors import REMEDY_FOR_GUESTS, PartitionError
from modelparallel.partitioning.costs import Trace, merged_groups
from modelparallel.partitioning.units import has_running_statistics, has_weights
from modelparallel.plan.partition import PartitionPlan


def keeps_state(root: nn.Module, trace: Trace, guest: str) -> bool:
    """Whether calls of the guest change its buffers, as far as that is known."""
    if any(name == guest or name.startswith(f"{guest}.") for name in trace.stateful_buffers):
        return True
    modules = dict(root.named_modules())
    return guest in modules and any(has_running_statistics(part) for part in modules[guest].modules())


def settled(root: nn.Module, trace: Trace) -> Trace:
    """The trace with each guest that must not be copied tied to its hosts."""
    bound = [[guest, *hosts] for guest, hosts in trace.guests if keeps_state(root, trace, guest)]
    return replace(trace, ties=merged_groups([*(list(group) for group in trace.ties), *bound])) if bound else trace


def with_copies(plan: PartitionPlan, root: nn.Module, trace: Trace) -> PartitionPlan:
    """The plan with the copies that the guests need; the units of the trace are those of the plan.

    Raises PartitionError for a guest that must not be copied and has hosts on other stages.
    """
    copies = []
    modules, tensors = dict(plan.modules), dict(plan.tensors)
    called = {*trace.order, *(tensor.name for tensor in trace.tensors if tensor.near_unit is not None)}
    for guest, hosts in trace.guests:
        entries = modules if guest in modules else tensors
        if guest not in entries:
            continue  # a constant buffer: every stage has it
        stages = sorted({modules[host] for host in hosts})
        if plan.origin != "manual" and guest not in called and entries[guest] not in stages:
            entries[guest] = stages[0]  # nobody needs it where it is
        home = entries[guest]
        others = tuple(stage for stage in stages if stage != home)
        if others and keeps_state(root, trace, guest):
            raise PartitionError(
                f"module '{guest}' keeps state in its buffers (running statistics) and is on pp_rank {home}, but is "
                f"called inside modules of other stages ({_some(modules, hosts, home)}), and copies of it would go "
                f"apart: {REMEDY_FOR_GUESTS}"
            )
        if others:
            copies.append((guest, others))
    return replace(plan, modules=tuple(modules.items()), tensors=tuple(tensors.items()), copies=tuple(copies))


def _some(modules: Mapping[str, int], hosts: Sequence[str], home: int) -> str:
    far = [f"'{host}' on pp_rank {modules[host]}" for host in hosts if modules[host] != home]
    return ", ".join(far[:3]) + (f" and {len(far) - 3} more" if len(far) > 3 else "")


# Whether an untraced model may have guests at all


def may_have_guests(root: nn.Module, units: Sequence[str]) -> bool:
    """Whether code of a unit may call a module of another one: it keeps one outside its children, or calls what it is
    given. Asked where nothing else needs a trace; a model of which nothing can be read has none.
    """
    seen: set[Callable[..., Any]] = set()
    for name in units:
        unit = root.get_submodule(name)
        own = {id(part) for part in unit.modules()}
        for part in unit.modules():
            if type(part).__module__.startswith("torch."):
                continue
            if any(id(kept) not in own for kept in _kept_modules(vars(part))):
                return True
            forward = inspect.unwrap(type(part).forward)
            if forward not in seen and _calls_what_it_is_given(forward):
                return True
            seen.add(forward)
    return False


def _kept_modules(attributes: Mapping[str, Any]) -> Iterator[nn.Module]:
    """Modules with weights among the attributes that are no children: in containers, functions and their closures."""
    pending = [value for name, value in attributes.items() if not name.startswith("_")]
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if id(value) in seen or isinstance(value, torch.Tensor):
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            if has_weights(value):
                yield value
        elif trees.is_container(value):
            pending.extend(child for _, child in trees.children(value))
        elif callable(value):
            pending.append(getattr(value, "__self__", None))
            pending.append(getattr(value, "func", None))  # of a partial
            pending.extend(getattr(value, "args", ()) if isinstance(getattr(value, "args", None), tuple) else ())
            for cell in getattr(value, "__closure__", None) or ():
                try:
                    pending.append(cell.cell_contents)
                except ValueError:
                    continue  # not filled yet


def _calls_what_it_is_given(function: Any) -> bool:
    """Whether the source of a forward calls one of its arguments, or something of it that no tensor has."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return False
    definition = tree.body[0]
    if not isinstance(definition, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return False
    arguments = definition.args
    names = {argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)[1:]}
    names |= {argument.arg for argument in (arguments.vararg, arguments.kwarg) if argument is not None}
    for node in ast.walk(definition):
        if not isinstance(node, ast.Call):
            continue
        callee, attribute = node.func, None
        while isinstance(callee, (ast.Attribute, ast.Subscript)):
            if isinstance(callee, ast.Attribute):
                attribute = attribute or callee.attr
            callee = callee.value
        if isinstance(callee, ast.Name) and callee.id in names:
            is_method = attribute is not None and (hasattr(torch.Tensor, attribute) or hasattr(dict, attribute))
            if not is_method:
                return True
    return False
