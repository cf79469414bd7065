"""Gradients of wrapped models: reduction, accumulation, several models, several stages (smp-api sections 4 and 5)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modelparallel as smp
from distributed_run import assert_equal_over, distributed_run, merged_gradients
from modelparallel.errors import StepUsageError
from parity import assert_parity, assert_same_training, reference_run
from rank_tests import RankTests, on
from small_models import make_batch, make_classifier, mean_loss, train_step
from training import sgd

MB3 = RankTests(1, {"microbatches": 3})
DP2 = RankTests(2, {"microbatches": 2})
PP2 = RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 2})
PP2_DP2 = RankTests(4, {"pipeline_parallel_degree": 2, "microbatches": 2})
PP3 = RankTests(3, {"pipeline_parallel_degree": 3, "microbatches": 2})
PP4 = RankTests(4, {"pipeline_parallel_degree": 4, "microbatches": 2})
SIMPLE = RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 2, "pipeline": "simple"})
ZERO_BUBBLE = RankTests(3, {"pipeline_parallel_degree": 3, "microbatches": 2, "pipeline": "zero_bubble"})
ZERO_BUBBLE_DP2 = RankTests(4, {"pipeline_parallel_degree": 2, "microbatches": 2, "pipeline": "zero_bubble"})
OTHER_SCHEDULES = (SIMPLE, ZERO_BUBBLE)
WITH_DP = (DP2, PP2_DP2)


def own_batch(step: int, num_samples: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return make_batch(num_samples, seed=100 * step + smp.dp_rank())


def all_batches(step: int, num_samples: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [make_batch(num_samples, seed=100 * step + rank) for rank in range(smp.dp_size())]


def gradients_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()}


# Two models


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))

    def forward(self, noise):
        return self.net(noise)


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, x):
        return self.net(x)


def make_pair():
    torch.manual_seed(5)
    return Generator().double(), Critic().double()


def critic_loss(generator, critic, x, noise):
    with torch.no_grad():
        fake = generator(noise)
    return F.softplus(-critic(x)).mean() + F.softplus(critic(fake)).mean()


def generator_loss(generator, critic, noise):
    return F.softplus(-critic(generator(noise))).mean()


@smp.step
def critic_step(generator, critic, x, noise):
    loss = critic_loss(generator, critic, x, noise)
    critic.backward(loss)
    return loss


@smp.step
def generator_step(generator, critic, noise):
    loss = generator_loss(generator, critic, noise)
    generator.backward(loss)
    return loss


def noise_of(step: int, rank: int) -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(1000 * step + rank), dtype=torch.float64)


@on(MB3, *WITH_DP, PP2)
def test_c039_two_models_with_two_optimizers_train_as_in_one_process():
    plain_generator, plain_critic = make_pair()
    plain_optimizers = sgd(plain_generator.parameters()), torch.optim.Adam(plain_critic.parameters(), lr=0.01)
    generator, critic = (smp.DistributedModel(module) for module in make_pair())
    with pytest.raises(StepUsageError, match="wrap the model once"):
        smp.DistributedModel(generator)
    optimizers = (
        smp.DistributedOptimizer(sgd(generator.parameters())),
        smp.DistributedOptimizer(torch.optim.Adam(critic.parameters(), lr=0.01)),
    )
    for step in range(3):
        batches = all_batches(step)
        noise = [noise_of(step, rank) for rank in range(smp.dp_size())]
        x, own_noise = batches[smp.dp_rank()][0], noise[smp.dp_rank()]
        optimizers[1].zero_grad()
        critic_step(generator, critic, x, own_noise)
        optimizers[1].step()
        optimizers[0].zero_grad()
        generator_step(generator, critic, own_noise)
        optimizers[0].step()

        plain_optimizers[1].zero_grad()
        losses = [critic_loss(plain_generator, plain_critic, b[0], n) for b, n in zip(batches, noise, strict=True)]
        (sum(losses) / len(losses)).backward()
        plain_optimizers[1].step()
        plain_optimizers[0].zero_grad()
        losses = [generator_loss(plain_generator, plain_critic, n) for n in noise]
        (sum(losses) / len(losses)).backward()
        plain_optimizers[0].step()
        # The critic's gradients of the generator's step have been reduced, too: DDP would do so.
        assert_parity(merged_gradients(critic), gradients_of(plain_critic), dtype=torch.float64)
    assert_parity(generator.state_dict(), plain_generator.state_dict(), dtype=torch.float64)
    assert_parity(critic.state_dict(), plain_critic.state_dict(), dtype=torch.float64)


@on(*WITH_DP, PP2)
def test_c039_one_backward_through_two_models_reaches_both():
    encoder, head = (smp.DistributedModel(module) for module in make_pair())

    @smp.step
    def joint_step(encoder, head, noise):
        loss = (head(encoder(noise)) ** 2).mean()
        head.backward(loss)
        return loss

    optimizer = smp.DistributedOptimizer(sgd([*encoder.parameters(), *head.parameters()]))
    plain = nn.ModuleList(make_pair())
    plain_optimizer = sgd(plain.parameters())
    for step in range(3):
        noise = [noise_of(step, rank) for rank in range(smp.dp_size())]
        optimizer.zero_grad()
        joint_step(encoder, head, noise[smp.dp_rank()])
        plain_optimizer.zero_grad()
        (sum((plain[1](plain[0](value)) ** 2).mean() for value in noise) / len(noise)).backward()
        assert_parity(merged_gradients(encoder), gradients_of(plain[0]), dtype=torch.float64)
        assert_parity(merged_gradients(head), gradients_of(plain[1]), dtype=torch.float64)
        optimizer.step()
        plain_optimizer.step()
    assert_parity(head.state_dict(), plain[1].state_dict(), dtype=torch.float64)


@on(PP2)
def test_c039_models_of_a_closure_are_partitioned_with_those_of_the_arguments():
    encoder, head = (smp.DistributedModel(module) for module in make_pair())

    @smp.step
    def joint_step(encoder, noise):
        loss = (head(encoder(noise)) ** 2).mean()
        head.backward(loss)
        return loss

    joint_step(encoder, noise_of(0, 0))
    assert encoder.partitioned and head.partitioned
    plain = make_pair()
    (plain[1](plain[0](noise_of(0, 0))) ** 2).mean().backward()
    assert_parity(merged_gradients(head), gradients_of(plain[1]), dtype=torch.float64)

    third, untouched = smp.DistributedModel(make_pair()[0]), smp.DistributedModel(make_pair()[0])

    @smp.step
    def with_a_partitioned_one(third, noise):
        loss = (head(third(noise)) ** 2).mean()
        third.backward(loss)
        return loss

    with_a_partitioned_one(third, noise_of(0, 0))  # cannot be traced, since the head is split already
    assert_parity(merged_gradients(third), gradients_of(plain[0]), dtype=torch.float64)
    assert not untouched.partitioned


# Averages and accumulation


@on(MB3, DP2, PP2, PP2_DP2)
def test_c040_without_averaging_gradients_are_the_sum_over_the_microbatches():
    results = []
    for is_averaged in (True, False):
        model = smp.DistributedModel(make_classifier(), average_grads_across_microbatches=is_averaged)
        train_step(model, *own_batch(0, 6))
        results.append(merged_gradients(model))
    expected = {name: smp.num_microbatches() * gradient for name, gradient in results[0].items()}
    assert_parity(results[1], expected, dtype=torch.float64)


@on(*WITH_DP)
def test_c041_gradients_are_reduced_in_the_second_of_two_passes():
    model = smp.DistributedModel(make_classifier(), backward_passes_per_step=2)
    plain, own = make_classifier(), make_classifier()
    for round_ in range(2):
        model.zero_grad()
        plain.zero_grad()
        own.zero_grad()
        train_step(model, *own_batch(2 * round_))
        mean_loss(own, *own_batch(2 * round_)).backward()
        assert_parity(merged_gradients(model), gradients_of(own), dtype=torch.float64)  # this rank's alone
        with torch.no_grad():
            train_step_without_backward(model, *own_batch(7))  # evaluation is no pass
        train_step(model, *own_batch(2 * round_ + 1))
        for step in (2 * round_, 2 * round_ + 1):
            (sum(mean_loss(plain, *batch) for batch in all_batches(step)) / smp.dp_size()).backward()
        assert_parity(merged_gradients(model), gradients_of(plain), dtype=torch.float64)
        assert_equal_over(smp.DP_GROUP, merged_gradients(model))


@smp.step
def train_step_without_backward(model, x, y):
    return mean_loss(model, x, y)


@on(*WITH_DP)
def test_c041_no_sync_accumulates_until_the_first_pass_outside():
    model = smp.DistributedModel(make_classifier())
    plain, own = make_classifier(), make_classifier()
    for step in range(3):
        if step < 2:
            with model.no_sync():
                train_step(model, *own_batch(step))
            mean_loss(own, *own_batch(step)).backward()
            assert_parity(merged_gradients(model), gradients_of(own), dtype=torch.float64)
        else:
            train_step(model, *own_batch(step))
        (sum(mean_loss(plain, *batch) for batch in all_batches(step)) / smp.dp_size()).backward()
    assert_parity(merged_gradients(model), gradients_of(plain), dtype=torch.float64)


@on(MB3, PP2)
def test_no_sync_is_harmless_with_one_copy():
    model = smp.DistributedModel(make_classifier())
    with model.no_sync():
        train_step(model, *own_batch(0))
    plain = make_classifier()
    mean_loss(plain, *own_batch(0)).backward()
    assert_parity(merged_gradients(model), gradients_of(plain), dtype=torch.float64)


@on(*WITH_DP)
def test_c042_overlapping_and_late_reduction_give_equal_gradients():
    results = []
    for arguments in ({}, {"overlapping_allreduce": False}, {"bucket_cap_mb": 0.0001}):
        model = smp.DistributedModel(make_classifier(), **arguments)
        for step in range(2):
            train_step(model, *own_batch(step))
        results.append(merged_gradients(model))
    assert_parity(results[1], results[0], dtype=torch.float64)
    assert_parity(results[2], results[0], dtype=torch.float64)
    plain = make_classifier()
    for step in range(2):
        (sum(mean_loss(plain, *batch) for batch in all_batches(step)) / smp.dp_size()).backward()
    assert_parity(results[0], gradients_of(plain), dtype=torch.float64)


@on(MB3, DP2, PP2, PP2_DP2)
def test_several_losses_and_given_gradients():
    @smp.step
    def two_roots(model, x, y):
        output = model(x)
        model.backward([F.nll_loss(output, y), output], [None, torch.full_like(output, 2.0) / len(output)])

    @smp.step
    def one_root(model, x):
        output = model(x)
        model.backward(output, torch.ones_like(output) / len(output))

    @smp.step
    def not_a_scalar(model, x):
        model.backward(model(x))

    @smp.step
    def too_many_gradients(model, x):
        model.backward(model(x), [None, None])

    model, plain = smp.DistributedModel(make_classifier()), make_classifier()
    num_samples = 2 * smp.num_microbatches()
    two_roots(model, *own_batch(0, num_samples))
    one_root(model, own_batch(1, num_samples)[0])
    for x, y in all_batches(0, num_samples):
        output = plain(x)
        ((F.nll_loss(output, y) + 2 * output.sum() / len(x)) / smp.dp_size()).backward()
    for x, _ in all_batches(1, num_samples):
        (plain(x).sum() / len(x) / smp.dp_size()).backward()
    assert_parity(merged_gradients(model), gradients_of(plain), dtype=torch.float64)
    with pytest.raises(StepUsageError, match="needs a scalar"):
        not_a_scalar(model, x)
    with pytest.raises(StepUsageError, match="1 tensors but 2 gradients"):
        too_many_gradients(model, x)


# Programs


class Branching(nn.Module):
    """Skips over a stage, calls one module twice, branches on a value, passes None, dicts and dataclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.shared = nn.Linear(8, 8)
        self.middle = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.wide = nn.Linear(8, 8)
        self.packed = Packed()
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        start = torch.tanh(self.stem(x))
        hidden = torch.tanh(self.shared(start))
        for layer in self.middle:
            hidden = torch.tanh(layer(hidden)) + start
        if hidden.mean().item() > 0:
            hidden = self.wide(hidden)
        hidden = torch.tanh(self.shared(hidden)) + start
        result = self.packed({"hidden": hidden, "mask": None}, Options(hidden * 0.5, 2))
        assert result["nothing"] is None and result["options"].number == 3
        return F.log_softmax(self.head(result["hidden"] + result["options"].extra), 1)


@dataclass
class Options:
    extra: torch.Tensor
    number: int


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, values, options):
        assert values["mask"] is None
        return {
            "hidden": self.linear(values["hidden"]),
            "options": Options(options.extra * 2, options.number + 1),
            "nothing": None,
        }


def make_branching() -> Branching:
    torch.manual_seed(4)
    return Branching().double()


@on(PP2, PP3, PP4, PP2_DP2, ZERO_BUBBLE_DP2, *OTHER_SCHEDULES)
def test_c045_skips_repeated_modules_and_branches_equal_one_process():
    num_copies = smp.dp_size()
    batches = [make_batch(4 * num_copies, seed=seed) for seed in range(4)]
    expected = reference_run(
        make_branching, batches, mean_loss, make_optimizer=sgd, num_microbatches=2, num_copies=num_copies
    )
    actual = distributed_run(make_branching, batches, mean_loss, make_optimizer=sgd)
    assert_same_training(actual, expected, dtype=torch.float64)


class UnusedOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.aside = nn.Linear(8, 8)
        self.second = nn.Linear(8, 10)

    def forward(self, x):
        hidden = self.first(x)
        self.aside(hidden)  # needs a gradient and gets none
        return F.log_softmax(self.second(hidden), 1)


@on(PP2, PP3, PP2_DP2, DP2, ZERO_BUBBLE_DP2, *OTHER_SCHEDULES)
def test_c046_an_unused_output_of_a_submodule_works():
    def make_model():
        torch.manual_seed(0)
        return UnusedOutput().double()

    model, plain = smp.DistributedModel(make_model()), make_model()
    for step in range(3):
        train_step(model, *own_batch(step))
        (sum(mean_loss(plain, *batch) for batch in all_batches(step)) / smp.dp_size()).backward()
    assert_parity(merged_gradients(model), gradients_of(plain), dtype=torch.float64)
    aside = {name: parameter for name, parameter in model.local_named_parameters() if name.startswith("aside")}
    assert all(parameter.grad is None for parameter in aside.values())


class AnyLength(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.rnn = nn.GRU(6, 6, batch_first=True)
        self.head = nn.Linear(6, 10)

    def forward(self, batch):
        states, last = self.rnn(self.embedding(batch["ids"]))
        return F.log_softmax(self.head(states.mean(1) + last[0]), 1)


@on(PP2, PP3, *OTHER_SCHEDULES)
def test_c047_shapes_change_from_step_to_step():
    def make_model():
        torch.manual_seed(0)
        return AnyLength().double()

    def loss_of(model, ids, y):
        return F.nll_loss(model({"ids": ids, "extra": None}), y)

    batches = []
    for step, (num_samples, length) in enumerate([(4, 3), (4, 7), (6, 3), (3, 1), (4, 3)]):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 10, (num_samples, length), generator=generator)
        batches.append((ids, torch.randint(0, 10, (num_samples,), generator=generator)))
    expected = reference_run(make_model, batches, loss_of, make_optimizer=sgd, num_microbatches=2)
    actual = distributed_run(make_model, batches, loss_of, make_optimizer=sgd)
    assert actual.losses == pytest.approx(expected.losses, rel=1e-12)
    assert_parity(actual.weights, expected.weights, dtype=torch.float64)


@on(PP2, PP3, DP2)
def test_c050_train_and_eval_reach_modules_on_other_stages():
    class WithDropout(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 10))

    torch.manual_seed(0)
    net = WithDropout().double()
    model = smp.DistributedModel(net)

    @smp.step
    def forward(model, x):
        return model(x)

    x, _ = make_batch(4)
    expected = WithDropout().double()
    expected.load_state_dict(net.state_dict())
    expected.eval()(x)
    trained = [forward(model, x).concat() for _ in range(2)]
    assert not torch.allclose(trained[0], trained[1]), "dropout is at work, and differs from call to call"
    assert model.eval() is model and not any(module.training for module in net.modules())
    torch.testing.assert_close(forward(model, x).concat(), expected.eval()(x).detach())
    assert model.train() is model and all(module.training for module in net.modules())
    assert not torch.allclose(forward(model, x).concat(), expected(x))


class WithStatistics(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 10), nn.LogSoftmax(1))


@on(DP2, PP2_DP2)
def test_batch_statistics_are_those_of_the_first_copy():
    """As DDP's ``broadcast_buffers``: before each training step every copy takes those of the first."""

    def run(**arguments):
        torch.manual_seed(0)
        model = smp.DistributedModel(WithStatistics().double(), **arguments)
        for step in range(3):
            train_step(model, *own_batch(step))
        return {name: buffer.clone() for name, buffer in model.local_named_buffers()}

    torch.manual_seed(0)
    norm = nn.Sequential(*list(WithStatistics().double())[:2])
    expected = {}
    for step in range(3):
        for part in make_batch(4, seed=100 * step + (smp.dp_rank() if step == 2 else 0))[0].chunk(2):
            norm(part)  # before the last step those of the first copy; then this one's own batch
    expected = dict(norm.named_buffers())
    shared, apart = run(), run(broadcast_buffers=False)
    for name, buffer in shared.items():
        torch.testing.assert_close(buffer, expected[name])
        if smp.dp_rank() == 0:
            torch.testing.assert_close(apart[name], buffer)
        elif "num_batches" not in name:
            assert not torch.allclose(apart[name], buffer)


# What scripts do around and inside a step


@on(MB3, DP2, PP2, PP2_DP2)
def test_a_penalty_on_all_parameters_inside_the_step():
    """Inside a step every stage runs the same program, so there ``model.parameters()`` are all of them."""

    def penalised(model, x, y):
        return mean_loss(model, x, y) + 0.1 * sum(parameter.pow(2).sum() for parameter in model.parameters())

    @smp.step
    def step(model, x, y):
        loss = penalised(model, x, y)
        model.backward(loss)
        return loss, len(list(model.parameters()))

    model, plain = smp.DistributedModel(make_classifier()), make_classifier()
    num_samples = 2 * smp.num_microbatches()
    for step_number in range(2):
        _, numbers = step(model, *own_batch(step_number, num_samples))
        assert set(numbers) == {4}
        losses = [penalised(plain, *batch) for batch in all_batches(step_number, num_samples)]
        (sum(losses) / len(losses)).backward()
    assert_parity(merged_gradients(model), gradients_of(plain), dtype=torch.float64)
    if smp.pp_size() > 1:
        assert len(list(model.parameters())) == 2, "outside, those of this stage"


@on(MB3, DP2, PP2, PP2_DP2)
def test_parameters_that_are_frozen_and_unfrozen_between_steps():
    model, plain = smp.DistributedModel(make_classifier()), make_classifier()
    for step, (part, is_trained) in enumerate(
        [("first", False), ("first", True), ("second", False), ("first", False), ("second", True), ("first", True)]
    ):
        if step != 3:
            for net in (model.get_module(), plain):
                net.get_submodule(part).requires_grad_(is_trained)
        model.zero_grad()
        plain.zero_grad()
        train_step(model, *own_batch(step))
        (sum(mean_loss(plain, *batch) for batch in all_batches(step)) / smp.dp_size()).backward()
        assert_parity(merged_gradients(model), gradients_of(plain), dtype=torch.float64)


@on(*WITH_DP)
def test_an_error_of_every_rank_in_the_middle_of_the_backwards():
    model, plain = smp.DistributedModel(make_classifier()), make_classifier()
    train_step(model, *own_batch(0))

    @smp.step
    def broken(model, x, y, where):
        loss = mean_loss(model, x, y)
        if where == "before" and x[0, 0] == x0:
            raise KeyError("the script's own mistake")
        model.backward(loss)
        if where == "after" and x[0, 0] == x0:
            raise KeyError("the script's own mistake")

    for number, where in enumerate(("before", "after")):
        batch = own_batch(number)
        x0 = batch[0][2, 0]  # the second microbatch
        with pytest.raises(KeyError, match="the script's own mistake"):
            broken(model, *batch, where)
        model.zero_grad()
        train_step(model, *own_batch(number))
        plain.zero_grad()
        (sum(mean_loss(plain, *batch) for batch in all_batches(number)) / smp.dp_size()).backward()
        assert_parity(merged_gradients(model), gradients_of(plain), dtype=torch.float64)


@on(PP2, PP2_DP2, DP2)
def test_states_loaded_in_the_hooks_of_the_first_step():
    """As resuming scripts do: the model in the post-partition hook, the optimizer in the post-step hook."""
    source = smp.DistributedModel(make_classifier())
    source_optimizer = smp.DistributedOptimizer(torch.optim.Adam(source.parameters(), lr=0.01))
    train_step(source, *own_batch(0))
    source_optimizer.step()
    parts = copy.deepcopy((source.local_state_dict(), source_optimizer.local_state_dict()))

    target = smp.DistributedModel(make_classifier())
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.zero_()
    optimizer = smp.DistributedOptimizer(torch.optim.Adam(target.parameters(), lr=0.5))
    target.register_post_partition_hook(lambda model, _: model.load_state_dict(parts[0]))
    target.register_post_step_hook(lambda _, optimizer: optimizer.load_state_dict(parts[1]))
    _, loss = train_step(target, *own_batch(1))
    source.zero_grad()
    _, expected = train_step(source, *own_batch(1))
    torch.testing.assert_close(loss.outputs, expected.outputs, rtol=0, atol=0)
    optimizer.step()
    source_optimizer.step()
    torch.testing.assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)
