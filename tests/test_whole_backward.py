"""Under zero_bubble, what must not run twice is not split: hooks on tensors, recomputed regions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pool import run_ranks
from training import square_loss, step_of

WIDTH = 8
SEEN: list[float] = []


class Hooked(nn.Module):
    """A block that changes a gradient by a hook, inside a placed module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y.register_hook(self._halve)
        return x + self.second(y)

    def _halve(self, gradient: Tensor) -> Tensor:
        SEEN.append(float(gradient.sum()))
        return gradient * 0.5


class Recomputed(Hooked):
    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self._inner, x, use_reentrant=False)

    def _inner(self, x: Tensor) -> Tensor:
        SEEN.append(float(x.detach().sum()))
        return self.second(torch.tanh(self.first(x)))


def train(kind: type[nn.Module]) -> tuple[dict[str, Tensor], int]:
    import modelparallel as smp

    torch.manual_seed(2)
    model = smp.DistributedModel(nn.Sequential(*[kind() for _ in range(4)]).double())
    step = step_of(square_loss)
    x = torch.randn(8, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        model.zero_grad()
        SEEN.clear()
        step(model, x)
    gradients = {name: p.grad.clone() for name, p in model.local_named_parameters() if p.grad is not None}
    return gradients, len(SEEN)


@pytest.mark.parametrize("kind", [Hooked, Recomputed])
def test_hooks_and_recomputation_happen_once(kind: type[nn.Module]) -> None:
    expected, num_expected = run_ranks(train, 1, kind, parameters={"microbatches": 4})[0]
    parameters = {"pipeline_parallel_degree": 2, "microbatches": 4, "pipeline": "zero_bubble"}
    ranks = run_ranks(train, 2, kind, parameters=parameters)
    found = {name: gradient for gradients, _ in ranks for name, gradient in gradients.items()}
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-14, msg=name)
    assert sum(count for _, count in ranks) == num_expected
