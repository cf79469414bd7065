"""What ``fp16``, ``bf16`` and the keys beside them do to a wrapped model: casts, and the scale of the loss.

[Note: half precision] The parameters and buffers of the model are cast when it is wrapped, floating inputs of its calls
before them, and outputs back to float32, so that what the script does with them is in full precision. The optimizer
keeps fp32 masters (optimizer/targets.py). With sharded data parallelism the shards are the masters and stay in float32;
what is gathered is cast. ``model.backward`` multiplies the loss by the optimizer's scale (fp16). A plain
``loss.backward()`` cannot know it, so outputs of calls outside of steps multiply their gradients instead.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modelparallel.precision import cast_floating, cast_tensors, scaled_backward
from modelparallel.tensor_parallel.distributed_module import DistributedModule

if TYPE_CHECKING:
    from modelparallel.config.reading import Config
    from modelparallel.training.decisions import Decisions
    from modelparallel.training.participants import ParameterHolder, Participant


class ModelPrecision:
    """The precision that one model trains in."""

    def __init__(self, model: Participant, config: Config, decisions: Decisions) -> None:
        self._model: Participant = weakref.proxy(model)
        self._config = config
        self._has_loss_scale = decisions.has_loss_scale
        self.half = decisions.half
        #: Whether the model stays as it is until its parameters are sharded: shards are in full precision.
        self.casts_when_placed = decisions.shards_parameters
        self._optimizer: weakref.ref[ParameterHolder] | None = None

    def cast_module(self, module: nn.Module, keep: set[int] | None = None) -> None:
        """Cast what the configuration says, in place; ``keep``: identities of tensors that stay as they are."""
        if self.half is not None:
            cast_tensors(module, self.half, keep)
        elif self._config.fp16_params:
            for part in module.modules():
                if isinstance(part, DistributedModule):
                    cast_tensors(part, torch.float16, keep)
        if self._config.fp32_grad_accumulation:
            for parameter in module.parameters():
                if parameter.dtype in (torch.float16, torch.bfloat16):
                    parameter.grad_dtype = torch.float32

    def inputs(self, args: Any, kwargs: Any) -> Any:
        """(args, kwargs) of a call of the model, cast."""
        return (args, kwargs) if self.half is None else cast_floating((args, kwargs), self.half)

    def outputs(self, output: Any, *, is_in_step: bool) -> Any:
        """The output of a call of the model, in float32."""
        if self.half is None:
            return output
        result = cast_floating(output, torch.float32, only=self.half)
        if not is_in_step and self._has_loss_scale and torch.is_grad_enabled():
            result = scaled_backward(result, self.loss_scale)
        return result

    def loss_scale(self) -> float:
        """What the loss of a backward is multiplied by now."""
        if not self._has_loss_scale:
            return 1.0
        optimizer = None if self._optimizer is None else self._optimizer()
        if optimizer is None:
            optimizer = self._model.optimizer_of_parameters()
            if optimizer is None:
                return 1.0
            self._optimizer = weakref.ref(optimizer)
        return optimizer.loss_scale
