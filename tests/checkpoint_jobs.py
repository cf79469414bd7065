"""A small job that checkpoints are taken of: the same in every shape, whatever the ranks hold."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import modelparallel as smp
from distributed_run import mean_over_copies, own_device, own_share
from sharded_training import TiedGPT

GLOBAL_BATCH = 8


@smp.step
def train_step(model: Any, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    model.backward(loss)
    return loss


class Dropping(TiedGPT):
    """With random numbers in it."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = F.dropout(self.wte(tokens) + self.positions, 0.2)
        for block in self.blocks:
            x = F.dropout(block(x), 0.1)
        return self.head(self.norm(x))


def make_job(
    seed: int, dtype: torch.dtype = torch.float32, make_net: Any = TiedGPT, **arguments: Any
) -> tuple[Any, Any]:
    """A wrapped model and optimizer with weights of their own; ``arguments`` are the wrapped optimizer's."""
    torch.manual_seed(seed)
    net = make_net().to(dtype)
    if smp.tp_size() > 1:
        for block in net.blocks:
            smp.set_tensor_parallelism(block.up)
            smp.set_tensor_parallelism(block.down)
    model = smp.DistributedModel(net)
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = smp.DistributedOptimizer(torch.optim.AdamW(groups, lr=1e-2), **arguments)
    return model, optimizer


def train(model: Any, optimizer: Any, steps: range) -> list[float]:
    """The losses of some steps, each on data of its own."""
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 13, (GLOBAL_BATCH, 6), generator=generator)
        tokens, targets = (part.to(own_device()) for part in own_share((tokens[:, :-1], tokens[:, 1:])))
        optimizer.zero_grad()
        losses.append(mean_over_copies(train_step(model, tokens, targets).reduce_mean()))
        optimizer.step()
    return losses
