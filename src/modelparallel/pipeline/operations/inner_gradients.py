"""``torch.autograd.grad`` inside a step (gradient penalties, adaptive weights), also over several stages.

[Note: inner gradients] The graph of a stage is in pieces (see the note on cuts), and values came from other stages.
So a gradient goes backwards as the backward of the step does: within a stage from piece to piece over the cuts on its
tape, and to another stage as an ordinary value that moves, so that with ``create_graph`` what is made of it has a
graph, too. Every part is an operation at the stage whose graph it walks; gradients are linear, so the parts are added
up. What is made with ``create_graph`` reaches into earlier pieces, whose graphs the step keeps until it is over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from modelparallel.errors import StepUsageError, UnsupportedError
from modelparallel.pipeline.operations.execution import execute
from modelparallel.pipeline.program.program import Program
from modelparallel.pipeline.values.arguments import Arguments
from modelparallel.pipeline.values.stage_tensor import StageTensor

_WHAT = "torch.autograd.grad"
Gradients = list[torch.Tensor | None]
#: For a value that was received in an event: (number of the event, the stage that sent it, gradients of its tensors).
Crossing = tuple[int, int, Gradients]


def run(program: Program, args: Any, kwargs: Any) -> tuple[torch.Tensor | None, ...]:
    """A call of ``torch.autograd.grad`` on values of the step, which every stage makes."""
    given = dict(
        zip(("outputs", "inputs", "grad_outputs", "retain_graph", "create_graph"), args, strict=False), **kwargs
    )
    if given.get("is_grads_batched"):
        raise UnsupportedError(f"{_WHAT}(is_grads_batched=True) inside a step is not supported: use torch.func.vmap")
    if program.region is not None or program.is_replay:
        raise StepUsageError(f"{_WHAT} was called inside a region that is recomputed: call it outside")
    outputs, inputs = _as_list(given["outputs"]), _as_list(given["inputs"])
    seeds = _as_list(given.get("grad_outputs")) if given.get("grad_outputs") is not None else [None] * len(outputs)
    create_graph = bool(given.get("create_graph"))
    allow_unused = given.get("allow_unused")
    is_zero_filled = bool(given.get("materialize_grads"))
    call = _GradientCall(program, [program.resolve(value) for value in inputs], create_graph, _named(program, inputs))
    if create_graph:
        program.keeps_graphs = program.is_whole_backward = True
    for output, seed in zip(outputs, seeds, strict=True):
        call.begin(program.resolve(output), seed)
    call.finish()
    for index, gradient in enumerate(call.gradients):
        if gradient is not None:
            continue
        if is_zero_filled:
            call.gradients[index] = torch.zeros_like(inputs[index])
        elif not allow_unused:
            raise RuntimeError(  # what torch says
                "One of the differentiated Tensors appears to not have been used in the graph. Set allow_unused=True "
                "if this is the desired behavior."
            )
    return tuple(call.gradients)


def _as_list(value: Any) -> list[Any]:
    return [value] if isinstance(value, torch.Tensor) else list(value)


def _named(program: Program, inputs: Sequence[torch.Tensor]) -> str:
    """The call with its inputs, by which stages that differentiate with respect to different ones find out."""
    placed = [program.engine.placed.get(id(value)) for value in inputs]
    names = [
        f"'{known.name}'" if known is not None else str(tuple(value.shape))
        for known, value in zip(placed, inputs, strict=True)
    ]
    return f"{_WHAT} for {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class _GradientCall:
    """One call; all stages do the same with it, and each walks the graphs that it has."""

    def __init__(self, program: Program, inputs: Sequence[torch.Tensor], create_graph: bool, what: str) -> None:
        self._what = what
        self._program, self._inputs, self._create_graph = program, inputs, create_graph
        #: The sum of what has come for each input.
        self.gradients: list[torch.Tensor | None] = [None] * len(inputs)
        # What was received before all inputs were there does not depend on them.
        self._born = min((value.born if isinstance(value, StageTensor) else 0 for value in inputs), default=0)
        self._crossings: list[Crossing] = []

    def begin(self, output: torch.Tensor, seed: torch.Tensor | None) -> None:
        """Start from an output."""
        if not isinstance(output, StageTensor) or not output.spec.requires_grad:
            raise RuntimeError("element 0 of tensors does not require grad and does not have a grad_fn")
        if seed is None and output.spec.num_elements != 1:
            raise RuntimeError("grad can be implicitly created only for scalar outputs")

        def compute(local: torch.Tensor, gradient: torch.Tensor | None) -> Any:
            return self._walked([local], [torch.ones_like(local) if gradient is None else gradient])

        self._operation(compute, (output, seed), output.home)

    def finish(self) -> None:
        """Go on where values came from other stages, the last one first."""
        while self._crossings:
            self._crossings.sort(key=lambda crossing: crossing[0])
            number, source, gradients = self._crossings.pop()

            def compute(number: int, *locals_: torch.Tensor | None) -> Any:
                sent = self._program.sent_in(number)
                pairs = [(leaf, one) for leaf, one in zip(sent, locals_, strict=True) if None not in (leaf, one)]
                return self._walked([leaf for leaf, _ in pairs], [one for _, one in pairs])  # type: ignore[misc]

            self._operation(compute, (number, *gradients), source)

    def _operation(self, compute: Callable[..., Any], args: tuple[Any, ...], home: int) -> None:
        program = self._program
        with program.engine.natively():
            arguments = Arguments(program, args, {})
            program.fetch(arguments.inputs, home, f"gradient in {self._what}")
            program.tracker.note_work(home, "")
            gradients, crossings = execute(program, self._what, None, arguments, home, program.counted(compute, home))
        for index, gradient in enumerate(gradients):
            before = self.gradients[index]
            if gradient is not None:
                self.gradients[index] = gradient if before is None else before + gradient
        self._crossings.extend(crossings)

    # At the stage whose graph it is

    def _walked(self, tensors: list[torch.Tensor], gradients: list[torch.Tensor]) -> tuple[Gradients, list[Crossing]]:
        """(gradients of the inputs, gradients of received values) that come from ``tensors`` through the graphs
        here.
        """
        cuts, received = self._program.pieces()
        versions = [self._versions(value, cuts) for value in self._inputs]
        ends = {id(version) for group in versions for version in group}
        # What an input was cut into is the input itself: nothing goes on from there to where it was made.
        cuts = [pair for pair in cuts if id(pair[1]) not in ends]
        received = [event for event in received if event[0] > self._born]
        wanted = {id(version): version for group in versions for version in group}
        wanted.update((id(leaf), leaf) for _, leaf in cuts)
        wanted.update((id(leaf), leaf) for _, _, leaves in received for leaf in leaves if leaf is not None)
        sums = self._differentiate(tensors, gradients, wanted, {})
        for original, leaf in reversed(cuts):
            if (gradient := sums.pop(id(leaf), None)) is not None:
                sums = self._differentiate([original], [gradient], wanted, sums)
        crossings: list[Crossing] = []
        for number, source, leaves in received:
            of_leaves = [None if leaf is None or id(leaf) in ends else sums.get(id(leaf)) for leaf in leaves]
            if any(gradient is not None for gradient in of_leaves):
                crossings.append((number, source, of_leaves))
        return [_sum([sums.get(id(version)) for version in group]) for group in versions], crossings

    def _versions(self, value: torch.Tensor, cuts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
        """What an input is here, and was before it was cut."""
        local = value.local if isinstance(value, StageTensor) else value
        if local is None or not local.requires_grad:
            return []
        return [local, *(original for original, leaf in cuts if leaf is local)]

    def _differentiate(
        self,
        tensors: list[torch.Tensor],
        gradients: list[torch.Tensor],
        wanted: dict[int, torch.Tensor],
        sums: dict[int, torch.Tensor],
    ) -> dict[int, torch.Tensor]:
        computed = torch.autograd.grad(
            tensors, list(wanted.values()), gradients, retain_graph=True, create_graph=self._create_graph,
            allow_unused=True,
        )  # fmt: skip
        for key, gradient in zip(wanted, computed, strict=True):
            if gradient is not None:
                sums[key] = gradient if key not in sums else sums[key] + gradient
        return sums


def _sum(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    there = [part for part in parts if part is not None]
    total = there[0] if there else None
    for part in there[1:]:
        total = part if total is None else total + part
    return total
