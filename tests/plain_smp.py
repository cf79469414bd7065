"""What a script calls of ``smp``, on plain torch: the reference of random scripts.

The whole model is in this process, microbatches run one after another, ``backward`` runs at once. Data-parallel
copies are processes whose gradients are averaged at the end of a step; they start from the weights of the first.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modelparallel import trees


class Outputs:
    """``smp.StepOutput``."""

    def __init__(self, outputs: list[Tensor], weights: list[float]) -> None:
        self.outputs, self._weights = outputs, weights

    def reduce_mean(self) -> Tensor:
        return torch.stack([part * weight for part, weight in zip(self.outputs, self._weights, strict=True)]).sum(0)

    def reduce_sum(self) -> Tensor:
        return torch.stack(self.outputs).sum(0)

    def concat(self) -> Tensor:
        return torch.cat(self.outputs)


def merged(outputs: list[Any], weights: list[float]) -> Any:
    first = outputs[0]
    if isinstance(first, Tensor):
        return Outputs([output.detach() for output in outputs], weights)
    if isinstance(first, dict):
        return {key: merged([output[key] for output in outputs], weights) for key in first}
    return outputs


class PlainSmp:
    """Stands for the module ``modelparallel``, for scripts that call models inside of step functions only."""

    def __init__(self, num_microbatches: int) -> None:
        self._num_microbatches = num_microbatches
        self._weight = 1.0
        self._models: list[nn.Module] = []

    def rank(self) -> int:
        return dist.get_rank()

    dp_rank = rdp_rank = rank

    def pp_rank(self) -> int:
        return 0

    def pp_size(self) -> int:
        return 1

    def is_tracing(self) -> bool:
        return False

    def DistributedModel(self, module: nn.Module, **_: Any) -> nn.Module:
        for value in (*module.parameters(), *module.buffers()):
            dist.broadcast(value.detach(), 0)
        calls = {
            "module": module,
            "backward": lambda loss: (loss * self._weight).backward(),
            "get_module": lambda: module,
            "virtual_named_parameters": lambda: module.named_parameters(),
        }
        module.__dict__.update(calls)  # not as a submodule
        self._models.append(module)
        return module

    def DistributedOptimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        return optimizer

    def set_partition(self, module: nn.Module, index: int) -> None:
        pass

    def set_tensor_parallelism(self, module: nn.Module) -> None:
        pass

    def set_activation_checkpointing(self, module: nn.Module) -> None:
        pass

    def average_weights(self, model: nn.Module, decay: float) -> nn.Module:
        raise NotImplementedError

    def copy_weights(self, target: nn.Module, online: nn.Module) -> None:
        with torch.no_grad():
            for one, other in zip(target.parameters(), online.parameters(), strict=True):
                one.copy_(other)

    def step(self, function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            arguments = signature.bind(*args).arguments
            num_samples = next(len(value) for value in arguments.values() if isinstance(value, Tensor))
            before = self._begin_step()
            outputs, weights = [], []
            for index in range(min(self._num_microbatches, num_samples)):
                piece = {name: self._piece(value, index) for name, value in arguments.items()}
                own = next(len(value) for value in piece.values() if isinstance(value, Tensor))
                self._weight = own / num_samples
                outputs.append(function(**piece))
                weights.append(self._weight)
            self._end_step(before)
            return merged(outputs, weights)

        return call

    def _piece(self, value: Any, index: int) -> Any:
        return value.tensor_split(self._num_microbatches)[index] if isinstance(value, Tensor) else value

    def _parameters(self) -> list[nn.Parameter]:
        return list(dict.fromkeys(parameter for model in self._models for parameter in model.parameters()))

    def _begin_step(self) -> list[Tensor | None]:
        if dist.get_world_size() == 1:
            return []
        for model in self._models:
            if model.training and torch.is_grad_enabled():
                for buffer in model.buffers():
                    dist.broadcast(buffer, 0)
        before = [parameter.grad for parameter in self._parameters()]
        for parameter in self._parameters():
            parameter.grad = None
        return before

    def _end_step(self, before: list[Tensor | None]) -> None:
        """The step's own gradients are averaged and added to those from before."""
        for parameter, earlier in zip(self._parameters(), before, strict=False) if before else ():
            has_gradient = torch.tensor(float(parameter.grad is not None))
            dist.all_reduce(has_gradient)
            if has_gradient > 0:
                mean = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()
                dist.all_reduce(mean)
                mean /= dist.get_world_size()
                parameter.grad = mean if earlier is None else earlier.add_(mean)
            else:
                parameter.grad = earlier


def readable(value: Any) -> Any:
    """A copy of what a script looks at, by value: outputs of steps as lists, sharded tensors whole."""

    def read(leaf: Any) -> Any:
        if hasattr(leaf, "outputs") and hasattr(leaf, "reduce_mean"):
            return [read(part) for part in leaf.outputs]
        if isinstance(leaf, Tensor):
            whole = leaf.full_tensor() if hasattr(leaf, "full_tensor") else leaf
            if type(whole) not in (Tensor, nn.Parameter, nn.Buffer):  # of the library: its numbers, or its error
                return torch.tensor(whole.tolist(), dtype=whole.dtype)
            return whole.detach().clone()
        return leaf

    if isinstance(value, Mapping):
        return {key: readable(entry) for key, entry in value.items()}
    return trees.map_leaves(read, value)
