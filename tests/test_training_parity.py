"""Training on 8 processes equals one process on the union of the batches: losses, every gradient, weights after steps.

A small network of the shape of the examples' one (two convolutions, two linear layers); the examples themselves are
compared in test_seed_jobs.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import modelparallel as smp
from distributed_run import assert_equal_over, distributed_run
from parity import assert_same_training, reference_run
from rank_tests import RankTests, on
from small_models import mean_loss
from training import gentle_sgd

PP2_TP2 = RankTests(8, {"pipeline_parallel_degree": 2, "tensor_parallel_degree": 2, "microbatches": 4})
TP4 = RankTests(8, {"tensor_parallel_degree": 4}, is_slow=True)
SPREAD = RankTests(
    8,
    {
        "pipeline_parallel_degree": 2,
        "tensor_parallel_degree": 2,
        "microbatches": 2,
        "placement_strategy": "spread",
        "optimize": "memory",
        "memory_weight": 1.0,
    },
    is_slow=True,
)
PP4 = RankTests(8, {"pipeline_parallel_degree": 4, "microbatches": 3})
NUM_STEPS = 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, 1)
        self.conv2 = nn.Conv2d(4, 8, 3, 1)
        self.fc1 = nn.Linear(8 * 4 * 4, 16)
        self.fc2 = nn.Linear(16, 10)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        return F.log_softmax(self.fc2(x), 1)


def make_net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def make_images(num_samples: int, seed: int, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num_samples, 1, 12, 12, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.randint(0, 10, (num_samples,), generator=generator)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


def check(make_marked, make_optimizer, num_samples: int = 8, dtype: torch.dtype = torch.float64, **arguments) -> None:
    """Train NUM_STEPS steps here and in one process; ``num_samples``: of each data-parallel rank and step."""
    batches = [make_images(num_samples * smp.dp_size(), seed, dtype) for seed in range(NUM_STEPS)]
    expected = reference_run(
        lambda: make_net(dtype),
        batches,
        mean_loss,
        make_optimizer=make_optimizer,
        num_microbatches=smp.num_microbatches(),
        num_copies=smp.dp_size(),
    )
    actual = distributed_run(lambda: make_marked(dtype), batches, mean_loss, make_optimizer=make_optimizer, **arguments)
    assert_same_training(actual, expected, dtype=dtype)
    assert_equal_over(smp.WORLD, actual.weights)


def with_split_fc1(dtype: torch.dtype) -> Net:
    net = make_net(dtype)
    smp.set_tensor_parallelism(net.fc1, True)
    return net


def with_all_split(dtype: torch.dtype) -> Net:
    torch.manual_seed(0)
    with smp.tensor_parallelism():
        return Net().to(dtype)


@on(PP2_TP2, SPREAD)
def test_c043_tensor_and_pipeline_parallelism_equal_one_process():
    check(with_split_fc1, gentle_sgd)
    check(with_split_fc1, adam)


@on(PP2_TP2)
def test_c043_in_single_precision():
    check(with_split_fc1, gentle_sgd, dtype=torch.float32)


@on(PP2_TP2, SPREAD, PP4)
def test_c043_with_all_layers_split_and_other_reductions():
    check(with_all_split, gentle_sgd, bucket_cap_mb=0.0001)
    check(with_all_split, adam, overlapping_allreduce=False)


@on(PP2_TP2, PP4)
def test_c043_with_batches_that_do_not_divide():
    check(with_split_fc1, gentle_sgd, num_samples=7)
    check(with_split_fc1, adam, num_samples=2)


@on(TP4)
def test_c044_tensor_parallelism_equals_one_process():
    check(with_all_split, gentle_sgd)
    check(with_all_split, adam)
    check(with_split_fc1, adam, num_samples=3)


@on(TP4)
def test_c044_in_single_precision():
    check(with_all_split, gentle_sgd, dtype=torch.float32)
