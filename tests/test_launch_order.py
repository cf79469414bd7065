"""Several models in one step: their gradients are reduced in one order, in whatever order they come on a rank."""

from __future__ import annotations

import torch
from torch import nn

import modelparallel as smp
from distributed_run import own_share
from parity import assert_parity
from rank_tests import RankTests, on

DP2 = RankTests(2, {"microbatches": 2, "ddp": True})
SHARED = RankTests(2, {"microbatches": 2, "ddp": True, "shard_optimizer_state": True})


class Net(nn.Sequential):
    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        super().__init__(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.double()


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x) - 1).square().mean()


@smp.step
def train(first, second, x):
    losses = [(model, loss_of(model, x)) for model in (first, second)]
    for model, loss in losses if smp.dp_rank() == 0 else losses[::-1]:
        model.backward(loss)
    return losses[0][1]


@on(DP2, SHARED)
def test_models_whose_backwards_come_in_another_order_on_each_rank_get_their_own_updates():
    for bucket_cap_mb in (25, 1e-4):
        nets = [Net(seed) for seed in (0, 1)]
        data = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        references = [Net(seed) for seed in (0, 1)]
        models = [smp.DistributedModel(net, bucket_cap_mb=bucket_cap_mb) for net in nets]
        optimizers = [smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1)) for model in models]
        optimizers += [torch.optim.SGD(reference.parameters(), lr=0.1) for reference in references]
        for _ in range(3):
            for optimizer in optimizers:
                optimizer.zero_grad()
            for reference in references:
                loss_of(reference, data).backward()
            train(*models, own_share((data,))[0])
            for optimizer in optimizers:
                optimizer.step()
        for model, reference in zip(models, references, strict=True):
            assert_parity(model.state_dict(), reference.state_dict(), dtype=torch.float64)
