"""Tensor parallelism through the public interface: models that are wrapped and trained."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modelparallel as smp
from parity import assert_ranks_train_as_one, reference_run
from pool import run_ranks
from split_layers import settings
from training import classification_loss, sgd, step_of

F64 = torch.float64


class Net(nn.Module):
    """The network of the MNIST examples, made small."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.conv2 = nn.Conv2d(4, 8, 3)
        self.fc1 = nn.Linear(32, width)
        self.fc2 = nn.Linear(width, 4)

    def forward(self, x):
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return F.log_softmax(self.fc2(F.relu(self.fc1(torch.flatten(F.max_pool2d(x, 2), 1)))), dim=1)


class Words(nn.Module):
    """An embedding, tied weights that must stay whole, and one linear layer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8, padding_idx=3)
        self.positions = nn.Embedding(5, 8)
        self.mix = nn.Linear(8, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)
        self.head.weight = self.positions.weight

    def forward(self, ids):
        x = self.norm(self.mix(self.table(ids) + self.positions(torch.arange(ids.shape[1]))))
        return self.head(x).mean(1)


def make_net() -> nn.Module:
    torch.manual_seed(11)
    return Net().double()


def make_words() -> nn.Module:
    torch.manual_seed(12)
    return Words().double()


def net_batches(num_samples: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(21)
    return [
        (torch.randn(num_samples, 1, 8, 8, dtype=F64, generator=generator), torch.arange(num_samples) % 4)
        for _ in range(3)
    ]


def words_batches(num_samples: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(22)
    return [
        (torch.randint(0, 11, (num_samples, 5), generator=generator), torch.arange(num_samples) % 5) for _ in range(3)
    ]


MODELS = {"net": (make_net, net_batches), "words": (make_words, words_batches)}


def check_replacement(shapes):
    with smp.tensor_parallelism():
        net = Net(width=128)
    assert type(net.fc1) is type(net.fc2) is nn.Linear
    model = smp.DistributedModel(net)
    module = model.module
    assert type(module.fc1) is type(module.fc2) is smp.nn.DistributedLinear
    assert type(module.conv1) is type(module.conv2) is nn.Conv2d
    assert (tuple(module.fc1.weight.shape), tuple(module.fc2.weight.shape)) == shapes
    assert {id(part) for part in model.distributed_modules()} == {id(module.fc1), id(module.fc2)}


@pytest.mark.parametrize(("tp", "shapes"), [(4, ((128, 8), (4, 32))), (2, ((128, 16), (4, 64)))])
def test_c064_c065_wrapping_replaces_the_linear_layers_by_slices(tp, shapes):
    run_ranks(check_replacement, tp, shapes, parameters=settings(tp))


def check_set_on_a_pipeline():
    net = Net()
    smp.set_tensor_parallelism(net.fc1, True)
    model = smp.DistributedModel(net)
    assert not model.partitioned
    assert type(model.module.fc1) is smp.nn.DistributedLinear and model.module.fc1.weight.shape == (16, 16)
    assert type(model.module.fc2) is nn.Linear and model.module.fc2.weight.shape == (4, 16)


def test_c066_c067_only_what_was_set_is_replaced_at_once_also_with_a_pipeline():
    run_ranks(check_set_on_a_pipeline, 4, parameters=settings(2, pp=2))


def check_local_batches():
    with smp.tensor_parallelism():
        net = make_net()
    reference = make_net()
    seen = []
    model = smp.DistributedModel(net)
    model.module.conv2.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    num_samples = 2 + smp.tp_rank()  # ranks of a group may have batches of different length
    x = torch.randn(num_samples, 1, 8, 8, dtype=F64, generator=torch.Generator().manual_seed(smp.rank()))
    torch.testing.assert_close(model(x), reference(x))
    assert seen == [num_samples]


def test_c068_c069_each_rank_gets_its_own_rows_and_other_layers_see_its_own_batch():
    run_ranks(check_local_batches, 4, parameters=settings(2))


def check_reducer_sets():
    with smp.tensor_parallelism():
        net = Net()
    model = smp.DistributedModel(net)
    module = model.module
    assert model.is_distributed_parameter(module.fc1.weight) and not model.is_distributed_parameter(module.fc1.bias)
    assert not model.is_distributed_parameter(module.conv1.weight)
    assert model.is_scaled_batch_parameter(module.fc1.weight)
    scaled = {name for name, _ in model.scaled_batch_reducer_named_parameters()}
    default = {name for name, _ in model.default_reducer_named_parameters()}
    assert scaled == {"fc1.weight", "fc2.weight"}
    assert default == {"conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias", "fc1.bias", "fc2.bias"}
    assert scaled | default == {name for name, _ in model.named_parameters()} and not scaled & default


def test_c072_the_reducer_sets_partition_the_parameters():
    run_ranks(check_reducer_sets, 2, parameters=settings(2))


def train(kind, num_samples, order):
    """Train three steps on this rank's share; the losses, gradients of the first step and final weights, un-sliced."""
    make_model, make_batches = MODELS[kind]
    model = make_model()
    smp.set_tensor_parallelism(model)
    optimizer = sgd(model.parameters()) if order == "optimizer first" else None
    model = smp.DistributedModel(model)
    optimizer = smp.DistributedOptimizer(optimizer or sgd(model.parameters()))
    train_step = step_of(classification_loss)
    full_shapes = {name: tuple(parameter.shape) for name, parameter in make_model().named_parameters()}
    losses, gradients = [], {}
    for x, y in make_batches(num_samples * smp.dp_size()):
        own = slice(smp.dp_rank() * num_samples, (smp.dp_rank() + 1) * num_samples)
        optimizer.zero_grad()
        losses.append(float(train_step(model, x[own], y[own]).reduce_mean()))
        if not gradients:
            for name, parameter in model.local_named_parameters():
                local = parameter.grad
                if tuple(local.shape) != full_shapes[name]:
                    parts = smp.allgather(local, smp.TP_GROUP)
                    dim = next(d for d, length in enumerate(full_shapes[name]) if local.shape[d] != length)
                    local = torch.cat(parts, dim)
                gradients[name] = local
        optimizer.step()
    for stage in smp.allgather(gradients, smp.PP_GROUP):
        gradients.update(stage)
    return losses, gradients, model.state_dict()


@pytest.mark.parametrize(
    ("kind", "num_ranks", "parameters", "order"),
    [
        ("net", 2, settings(2), "optimizer first"),
        ("net", 4, settings(2, microbatches=2), "model first"),
        ("words", 4, settings(4), "optimizer first"),
        ("words", 2, settings(2, microbatches=3), "model first"),
        ("net", 4, settings(2, pp=2, microbatches=2), "optimizer first"),
        ("words", 4, settings(2, pp=2, microbatches=2), "model first"),
    ],
    ids=["tp2", "tp2 rdp2", "words tp4", "words tp2", "tp2 pp2", "words tp2 pp2"],
)
def test_c073_training_equals_one_process_on_the_union_of_the_batches(kind, num_ranks, parameters, order):
    make_model, make_batches = MODELS[kind]
    num_samples = 4
    with_warning = run_ranks(train, num_ranks, kind, num_samples, order, parameters=parameters)
    num_copies = num_ranks // parameters["pipeline_parallel_degree"]
    expected = reference_run(
        make_model,
        make_batches(num_samples * num_copies),
        classification_loss,
        num_microbatches=parameters["microbatches"],
        make_optimizer=sgd,
        num_copies=num_copies,
    )
    assert_ranks_train_as_one(with_warning, expected, dtype=F64)
