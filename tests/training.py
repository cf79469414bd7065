"""Steps, losses and optimizers that many tests train with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import modelparallel as smp


def step_of(loss_of: Callable[..., Tensor]) -> Any:
    """A step function that trains: ``loss_of(model, *batch)`` is the loss of a microbatch."""

    @smp.step
    def train_step(model: Any, *batch: Any) -> Tensor:
        loss = loss_of(model, *batch)
        model.backward(loss)
        return loss

    return train_step


def square_loss(model: Any, x: Tensor) -> Tensor:
    return model(x).square().mean()


def classification_loss(model: Any, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(x), labels)


def token_loss(model: Any, tokens: Tensor, *others: Tensor) -> Tensor:
    """Each token is to be said again; a model may take more than the tokens."""
    return F.cross_entropy(model(tokens, *others).flatten(0, 1), tokens.flatten())


square_step, classification_step, token_step = step_of(square_loss), step_of(classification_loss), step_of(token_loss)


@smp.step
def forward_step(model: Any, x: Tensor) -> Any:
    return model(x)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def gentle_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def sgd_of_trained(parameters: Any) -> torch.optim.Optimizer:
    """It is not given the frozen ones."""
    return sgd([parameter for parameter in parameters if parameter.requires_grad])
