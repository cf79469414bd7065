"""A small model with all that a state dict can hold."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import modelparallel as smp


class Net(nn.Module):
    """Tied weights, buffers of both kinds, a list, and layers that can be split."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.norm = nn.BatchNorm1d(8)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("offset", torch.full((12,), 0.5))
        self.register_buffer("temporary", torch.ones(2), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.embedding(ids))
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return self.head(hidden) * self.scale + self.offset


def make_net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().double()


def wrap(net: Net) -> smp.DistributedModel:
    smp.set_tensor_parallelism(net.layers, True)
    return smp.DistributedModel(net)


@smp.step
def train_step(model: Any, ids: torch.Tensor) -> torch.Tensor:
    loss = F.cross_entropy(model(ids), ids)
    model.backward(loss)
    return loss
