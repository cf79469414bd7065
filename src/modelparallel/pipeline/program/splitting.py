"""The backward of a piece in two parts: gradients of its inputs first (I), gradients of its weights later (W).

[Note: splitting] The next stage waits for the gradients of the inputs only, so those of the weights can fill its
waiting time (zero bubble, Qi et al. 2023, arXiv:2401.10241). In the autograd graph of a piece some nodes lead to an
input (a received or cut leaf), some to weights only. I runs the nodes that lead to inputs, keeps the graph, and notes
what arrives at the *fork nodes*: those with a successor that leads to weights only. W starts again at each fork node
with what it noted, and asks for the weights behind it. A node that makes both gradients runs twice, each time for one
of them, so the work is that of one backward.

Some weights get their gradient in I, since W would count too much or repeat what must not be repeated: weights that
several walks of W would come to (one weight used twice: the path through the other fork node would be counted again),
and weights behind an ``autograd.Function`` (its backward makes all gradients at once, and may communicate). A piece
with compiled code in it (torch.compile) is not split at all: the backward of compiled code makes all gradients at once,
and does not allow that its graph is kept.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch.autograd.graph import GradientEdge

from modelparallel.torch_compat import is_compiled_node, is_function_node


class _Node:
    """What is known of a node of the graph: whether it leads to an input, and the weights that it leads to without
    passing a node that leads to an input.
    """

    __slots__ = ("leads_to_input", "node", "weights")

    def __init__(self, node: Any) -> None:
        self.node = node
        self.leads_to_input = False
        self.weights: dict[int, torch.Tensor] = {}


class SplitBackward:
    """The backward of one piece; ``run_inputs`` once, then ``run_weights`` once. ``weights``: ids of the parameters."""

    def __init__(self, weights: Container[int]) -> None:
        self._weights = weights
        self._noted: list[tuple[Any, dict[int, torch.Tensor], list[torch.Tensor | None]]] = []
        self._left: list[tuple[torch.Tensor, torch.Tensor]] = []  # roots from which no input can be reached

    def run_inputs(self, tensors: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]) -> None:
        """Add to ``.grad`` of the leaves that are no weights, and of the weights that cannot wait."""
        leaves: dict[int, torch.Tensor] = {}
        nodes = self._explore([tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None], leaves)
        if any(is_compiled_node(node) for node in nodes):
            torch.autograd.backward(list(tensors), list(gradients))
            return
        roots: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        num_owners: dict[int, int] = {}  # how many paths that are walked apart lead to a weight
        for tensor, gradient in zip(tensors, gradients, strict=True):
            node = None if tensor.grad_fn is None else nodes[tensor.grad_fn]
            if node is not None and not node.leads_to_input and gradient is not None:
                self._left.append((tensor, gradient))
                num_owners.update(dict.fromkeys(node.weights, 1))  # all that is left runs as one backward
            else:
                roots.append((tensor, gradient))
                if node is None:
                    leaves[id(tensor)] = tensor
        if not roots:
            return
        forks = [node for node in nodes.values() if node.leads_to_input and node.weights]
        for fork in forks:
            for key in fork.weights:
                num_owners[key] = num_owners.get(key, 0) + 1
        at_once = dict(leaves)
        handles = []
        for fork in forks:
            is_custom = is_function_node(fork.node)
            later = {key: weight for key, weight in fork.weights.items() if num_owners[key] == 1 and not is_custom}
            at_once.update({key: weight for key, weight in fork.weights.items() if key not in later})
            if later:
                noted: list[torch.Tensor | None] = []
                self._noted.append((fork.node, later, noted))
                handles.append(fork.node.register_prehook(_note_into(noted)))
        try:
            torch.autograd.backward(
                [tensor for tensor, _ in roots],
                [gradient for _, gradient in roots],
                inputs=list(at_once.values()),
                retain_graph=bool(self._noted or self._left),
            )
        finally:
            for handle in handles:
                handle.remove()

    def run_weights(self) -> None:
        """Add to ``.grad`` of the weights that have waited."""
        if self._left:
            torch.autograd.backward([tensor for tensor, _ in self._left], [gradient for _, gradient in self._left])
        for node, weights, noted in self._noted:
            arrived = [(index, gradient) for index, gradient in enumerate(noted) if gradient is not None]
            if not arrived:
                continue
            torch.autograd.backward(
                [GradientEdge(node, index) for index, _ in arrived],
                [gradient for _, gradient in arrived],
                inputs=list(weights.values()),
            )
        self._left, self._noted = [], []

    def _explore(self, roots: Sequence[Any], leaves: dict[int, torch.Tensor]) -> dict[Any, _Node]:
        """All nodes below ``roots``, successors before predecessors; ``leaves`` gets the leaves that are no weights."""
        nodes: dict[Any, _Node] = {}
        pending: list[tuple[Any, bool]] = [(root, False) for root in roots]
        while pending:
            current, are_successors_done = pending.pop()
            if not are_successors_done:
                if current in nodes:
                    continue
                nodes[current] = _Node(current)
                pending.append((current, True))
                pending.extend((node, False) for node, _ in current.next_functions if node is not None)
                continue
            explored = nodes[current]
            variable = getattr(current, "variable", None)
            if variable is not None:
                if id(variable) in self._weights:
                    explored.weights[id(variable)] = variable
                else:
                    explored.leads_to_input = True
                    leaves[id(variable)] = variable
                continue
            successors = [nodes[node] for node, _ in current.next_functions if node is not None]
            explored.leads_to_input = any(node.leads_to_input for node in successors)
            for node in successors:
                if not node.leads_to_input:
                    explored.weights.update(node.weights)
        # In the order of insertion a node comes before those below it, which does not matter to the callers.
        return nodes


def _note_into(noted: list[torch.Tensor | None]) -> Any:
    def note(gradients: tuple[torch.Tensor | None, ...]) -> None:
        noted[:] = gradients

    return note
