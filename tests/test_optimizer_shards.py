"""Sharding of the optimizer state, the data-parallel side: shards, their gradients and the gathered updates."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import modelparallel as smp
from distributed_run import assert_equal_over, own_share
from modelparallel.data_parallel import GradientReducer, OptimizerShards, ReducedParameter, SharedParameter
from modelparallel.data_parallel.shard_gradient import ShardGradient
from modelparallel.errors import StepUsageError, WaitTimeoutError
from modelparallel.parameters.shards import local_part
from odd_model import CAP, NUM_STEPS, batch, make_model
from parity import assert_parity, reference_run
from pool import run_ranks
from rank_tests import RankTests, on
from reducer_programs import CAPS, Branches, local_gradients, loss_of, mean_over_ranks, pairs, run_step, through, world
from reducer_programs import make_model as make_plain
from training import sgd_of_trained, token_loss, token_step

SHARDED = {"shard_optimizer_state": True, "microbatches": 2}
DP2 = RankTests(2, SHARDED)
DP3 = RankTests(3, SHARDED)
DP4 = RankTests(4, SHARDED, is_slow=True)
TP2 = RankTests(4, {**SHARDED, "tensor_parallel_degree": 2})
PP2 = RankTests(4, {**SHARDED, "pipeline_parallel_degree": 2})
COPIES = RankTests(4, {**SHARDED, "pipeline_parallel_degree": 2, "tied_weights": "replicate"}, is_slow=True)
ZERO_BUBBLE = RankTests(4, {**SHARDED, "pipeline_parallel_degree": 2, "pipeline": "zero_bubble"}, is_slow=True)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=0.01, weight_decay=0.1)


def adafactor(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adafactor([p for p in parameters if p.requires_grad], lr=0.01)


class Run:
    """A model whose shards a plain optimizer updates, until smp.DistributedOptimizer does."""

    def __init__(self, make_optimizer: Any, *, needs_whole: bool = False, **arguments: Any) -> None:
        net = make_model()
        smp.set_tensor_parallelism(net.wide)
        smp.set_tensor_parallelism(net.back)
        self.model = smp.DistributedModel(net, **{"bucket_cap_mb": CAP, **arguments})
        self.needs_whole = needs_whole
        self.make_optimizer = make_optimizer
        self.optimizer: Any = None
        if self.model.partitioned:
            self.start()
        else:
            self.model.register_post_partition_hook(lambda *_: self.start())

    @property
    def shards(self) -> Any:
        return self.model.gradients.shards

    def start(self) -> None:
        if self.needs_whole:
            assert self.shards.require_whole_parameters("Adafactor")
        tensors = []
        for _, parameter in self.model.local_named_parameters():
            if self.shards.has(parameter):
                tensors += [shard.tensor for shard in self.shards.shards_of(parameter)]
            else:
                tensors.append(parameter)
        trained = [tensor for tensor in tensors if tensor.requires_grad]
        self.optimizer = self.make_optimizer(trained) if trained else None

    def update(self) -> None:
        self.shards.collect_gradients()
        if self.optimizer is not None:
            self.optimizer.step()
        self.shards.finish_update()

    def step(self, number: int) -> None:
        token_step(self.model, *own_share(batch(number)))
        self.update()
        self.model.zero_grad()


@functools.cache
def reference(make_optimizer: Any, num_copies: int, num_microbatches: int = 2) -> dict[str, Tensor]:
    return reference_run(
        make_model,
        [batch(step) for step in range(NUM_STEPS)],
        token_loss,
        num_microbatches=num_microbatches,
        make_optimizer=make_optimizer,
        num_copies=num_copies,
    ).weights


def verify(run: Run, make_optimizer: Any, num_microbatches: int = 2) -> None:
    weights = run.model.state_dict()
    assert_parity(weights, reference(make_optimizer, smp.dp_size(), num_microbatches), dtype=torch.float64)
    local = {name: parameter.detach() for name, parameter in run.model.local_named_parameters()}
    assert_equal_over(smp.CommGroup.RDP_GROUP, local)


ALL = (DP2, DP3, DP4, TP2, PP2, COPIES, ZERO_BUBBLE)


@on(*ALL)
def test_c062_training_on_shards_equals_one_process():
    for make_optimizer in (adam, sgd_of_trained):
        for overlap in (True, False):
            for cap in (CAP, 25):
                run = Run(make_optimizer, overlapping_allreduce=overlap, bucket_cap_mb=cap)
                for step in range(NUM_STEPS):
                    run.step(step)
                verify(run, make_optimizer)


def shard_ranges(run: Run) -> dict[str, list[tuple[int, int]]]:
    """Of every shared parameter, the ranges of all ranks that hold it."""
    found: dict[str, list[tuple[int, int]]] = {}
    names = [name for name, p in run.model.local_named_parameters() if run.shards.has(p)]
    own = {
        name: [(s.start, s.stop) for s in run.shards.shards_of(p)]
        for name, p in run.model.local_named_parameters()
        if name in names
    }
    for other in smp.allgather((smp.pp_rank(), smp.tp_rank(), own), smp.CommGroup.DP_GROUP):
        for name, ranges in other[2].items():
            if run.model.is_distributed_parameter(dict(run.model.local_named_parameters())[name]):
                ranges = ranges if other[1] == smp.tp_rank() else []
            found.setdefault(name, []).extend(ranges)
    return found


@on(*ALL)
def test_c062_each_element_has_one_holder_and_the_sizes_are_balanced():
    for cap in (CAP, 25):
        run = Run(adam, bucket_cap_mb=cap)
        for step in range(2):
            run.step(step)
        parameters = dict(run.model.local_named_parameters())
        for name, ranges in shard_ranges(run).items():
            position = 0
            for start, stop in sorted(ranges):
                assert start == position < stop, name
                position = stop
            assert position == parameters[name].numel(), name
        whole = {name for name, parameter in parameters.items() if not run.shards.has(parameter)}
        # Frozen ones, copies on several stages, and tp slices that one process alone holds.
        assert {name for name in whole if not name.startswith(("frozen", "embed"))} == set()
        counts = [0, 0]
        for bucket in run.shards.buckets:
            held = smp.allgather(sum(s.stop - s.start for s in bucket.shards), smp.CommGroup.DP_GROUP)
            if bucket.group.size == smp.dp_size():
                assert max(held) - min(held) < bucket.group.size
                counts[0] += 1
            else:
                counts[1] += 1
        assert counts[0] > 0 and (counts[1] > 0) == (smp.tp_size() > 1)
        # State of shards alone, each tensor of the size of its shard.
        for tensor, state in run.optimizer.state.items():
            assert state["exp_avg"].shape == tensor.shape
        assert all(p not in run.optimizer.state for p in parameters.values() if run.shards.has(p))


@on(DP2, DP3, TP2, PP2)
def test_whole_parameters_for_optimizers_that_look_at_them():
    for make_optimizer, cap in ((adam, 25), (adafactor, CAP), (adafactor, 25)):
        if make_optimizer is adafactor and smp.tp_size() > 1:
            continue  # its statistics are over whole parameters, which tp slices are not
        run = Run(make_optimizer, needs_whole=True, bucket_cap_mb=cap)
        for step in range(NUM_STEPS):
            run.step(step)
        verify(run, make_optimizer)
        sizes = []
        for _, parameter in run.model.local_named_parameters():
            for shard in run.shards.shards_of(parameter) if run.shards.has(parameter) else ():
                assert shard.tensor.shape == parameter.shape
                assert (shard.start, shard.stop) == (0, parameter.numel())
                sizes.append(parameter.numel())
        sums = smp.allgather(sum(sizes), smp.CommGroup.RDP_GROUP)
        assert max(sums) - min(sums) <= 78  # the largest parameter, 13 * 6
        with pytest.raises(StepUsageError, match="before the first step"):
            late = Run(adam)
            late.step(0)
            late.shards.require_whole_parameters("Adafactor")


def accumulate(run: Run, *, by: str) -> None:
    for step in range(NUM_STEPS):
        tokens, use = own_share(batch(step))
        parts = list(zip(tokens.tensor_split(2), use.tensor_split(2), strict=True))
        if by == "no_sync":
            with run.model.no_sync():
                token_step(run.model, *parts[0])
            assert all(s.tensor.grad is None for bucket in run.shards.buckets for s in bucket.shards)
            token_step(run.model, *parts[1])
        else:  # "passes", or on top of gradients of shards
            token_step(run.model, *parts[0])
            token_step(run.model, *parts[1])
        for parameter in run.model.local_parameters():
            if parameter.grad is not None:
                assert isinstance(parameter.grad, ShardGradient) == run.shards.has(parameter)
                parameter.grad /= 2
        run.update()
        run.model.zero_grad()


@on(DP2, TP2, PP2, COPIES)
def test_gradients_of_several_steps_add_up_in_the_shards():
    for by, arguments in (("no_sync", {}), ("passes", {"backward_passes_per_step": 2}), ("shards", {})):
        run = Run(adam, **arguments)
        accumulate(run, by=by)
        verify(run, adam, num_microbatches=4)


@on(DP2, DP3)
def test_plain_backward_reduces_to_the_shards():
    run = Run(adam)
    for step in range(NUM_STEPS):
        tokens, use = own_share(batch(step))
        halves = list(zip(tokens.tensor_split(2), use.tensor_split(2), strict=True))
        with run.model.no_sync():
            (token_loss(run.model, *halves[0]) / 2).backward()
        (token_loss(run.model, *halves[1]) / 2).backward()
        run.update()
        run.model.zero_grad()
    verify(run, adam)


@on(DP2, DP3)
def test_replaced_data_comes_back_and_frozen_parameters_stay():
    run = Run(sgd_of_trained)
    expected = make_model()
    optimizer = sgd_of_trained(expected.parameters())
    for step in range(NUM_STEPS):
        for model in (run.model.module, expected):
            model.wide.weight.data = model.wide.weight.data * 0.9  # a new tensor
            model.back.bias.requires_grad_(step != 1)
            model.frozen.weight.requires_grad_(step > 0)  # thaws: not shared out
        tokens, use = own_share(batch(step))
        token_loss(run.model, tokens, use).backward()
        if step == 2:
            assert run.model.module.frozen.weight.grad is not None
        run.update()
        if step:
            with torch.no_grad():
                run.model.module.frozen.weight.sub_(run.model.module.frozen.weight.grad)
        run.model.zero_grad()
        optimizer.zero_grad()
        for rank in range(smp.dp_size()):
            tokens, use = (part.tensor_split(smp.dp_size())[rank] for part in batch(step))
            (token_loss(expected, tokens, use) / smp.dp_size()).backward()
        optimizer.step()
        if step:
            with torch.no_grad():
                expected.frozen.weight.sub_(expected.frozen.weight.grad)
        expected.zero_grad()
    assert_parity(run.model.state_dict(), expected.state_dict(), dtype=torch.float64)
    run.model.module.back.weight.data = run.model.module.back.weight.data.float()
    with pytest.raises(StepUsageError, match=r"'back\.weight' was torch\.float64"):
        run.update()
    run.model.module.back.weight.data = run.model.module.back.weight.data.double()  # other tests update all models


@on(DP2)
def test_a_graph_of_old_values_is_noticed():
    run = Run(sgd_of_trained)
    loss = token_loss(run.model, *own_share(batch(0)))
    run.update()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    run.model.gradients.abort_step()


@on(DP2, DP3)
def test_half_parameters_with_gradients_in_single_precision():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).bfloat16()
    for parameter in net.parameters():
        parameter.grad_dtype = torch.float32
    model = smp.DistributedModel(net, bucket_cap_mb=CAP)
    shards = model.gradients.shards
    x = torch.full((2, 5), 1.0 + smp.dp_rank()).bfloat16()
    plain = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).bfloat16()
    plain.load_state_dict(net.state_dict())
    for parameter in plain.parameters():
        parameter.grad_dtype = torch.float32
    model(x).float().square().sum().backward()
    plain(x).float().square().sum().backward()
    for (name, parameter), other in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert isinstance(parameter.grad, ShardGradient) and shards.has(parameter)
        mean = sum(smp.allgather(other.grad, smp.CommGroup.DP_GROUP)) / smp.dp_size()
        for shard in shards.shards_of(parameter):
            assert shard.tensor.dtype == torch.bfloat16 and shard.tensor.grad.dtype == torch.float32
            wanted = mean.flatten()[shard.start : shard.stop]
            torch.testing.assert_close(shard.tensor.grad, wanted, rtol=1e-6, atol=1e-7, msg=name)


@on(DP2)
def test_what_cannot_be_shared_out_stays_whole():
    net = nn.Module()
    net.image = nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)
    memory = torch.randn(20)
    net.low, net.high = nn.Parameter(memory[:12]), nn.Parameter(memory[8:])
    net.none = nn.Parameter(torch.empty(0, 3))
    net.fine = nn.Parameter(torch.randn(9))
    net.wave = nn.Parameter(torch.randn(5, dtype=torch.complex64))
    net.forward = lambda x: (
        net.image(x).sum() + net.low.sum() + net.high.sum() + net.fine.sum() * 2 + net.wave.abs().sum()
    )
    model = smp.DistributedModel(net)
    shards = model.gradients.shards
    shared = {name for name, parameter in net.named_parameters() if shards.has(parameter)}
    assert shared == {"image.bias", "fine", "wave"}
    model(torch.ones(1, 2, 4, 4)).backward()
    assert isinstance(net.fine.grad, ShardGradient) and type(net.low.grad) is Tensor
    for shard in shards.shards_of(net.fine):
        torch.testing.assert_close(shard.tensor.grad, torch.full_like(shard.tensor, 2.0))
    for shard in shards.shards_of(net.wave):
        wanted = (net.wave / net.wave.abs()).detach()[shard.start : shard.stop]
        torch.testing.assert_close(shard.tensor.grad, wanted)
    shards.finish_update()


# The reducer and the shards alone.


def sharded_reducer(model, group_of, **options):
    entries = [(name, parameter, group_of(name)) for name, parameter in model.named_parameters()]
    divisor, cap = dist.get_world_size(), options.pop("bucket_cap_mb", CAP)
    timeout = options.get("timeout_seconds", 60)
    shared = [SharedParameter(*entry) for entry in entries if not entry[0].startswith("parts.3")]
    shards = OptimizerShards(shared, divisor=divisor, bucket_cap_mb=cap, timeout_seconds=timeout)
    every = [ReducedParameter(*entry) for entry in entries]
    return GradientReducer(every, divisor=divisor, bucket_cap_mb=cap, shards=shards, **options), shards


def random_steps_of_shards(seed, cap, overlap):
    """Random uses of parameters on every rank, some reduced over pairs, some not shared out; gradients pile up."""
    common, own = random.Random(seed), random.Random(1000 * seed + dist.get_rank())
    rdp, dp = pairs(), world()

    def group_of(name):
        return rdp if int(name.split(".")[1]) in (0, 2) else dp

    model = Branches()
    reducer, shards = sharded_reducer(model, group_of, bucket_cap_mb=cap, overlap=overlap)
    total: dict[str, Any] = {name: None for name, _ in model.named_parameters()}
    for step in range(8):
        pieces = [
            [
                through(*own.sample(range(6), own.randint(1, 5)), step=own.randint(0, 9))
                for _ in range(own.randint(0, 2))
            ]
            for _ in range(2)
        ]
        pieces[0].append(through(5, 4))  # some gradient on every rank
        if common.random() < 0.4:
            model.zero_grad()
            if common.random() < 0.5:
                shards.forget_gradients()
            total = dict.fromkeys(total)
        local = local_gradients(model, lambda m, pieces=pieces: [piece(m) for part in pieces for piece in part])
        over = {id(group): mean_over_ranks(local, model, group) for group in (dp, rdp)}
        run_step(reducer, model, *pieces)
        for name, parameter in model.named_parameters():
            new = over[id(group_of(name))][name]
            if new is not None:
                total[name] = new if total[name] is None else total[name] + new
            if not shards.has(parameter):
                assert name.startswith("parts.3")
                assert (parameter.grad is None) == (total[name] is None)
                if total[name] is not None:
                    torch.testing.assert_close(parameter.grad, total[name], rtol=1e-12, atol=1e-12)
                continue
            assert (parameter.grad is None) == (total[name] is None), (name, step)
            for shard in shards.shards_of(parameter):
                assert (shard.tensor.grad is None) == (total[name] is None), (name, step)
                if total[name] is not None:
                    wanted = total[name].flatten()[shard.start : shard.stop]
                    torch.testing.assert_close(shard.tensor.grad, wanted, rtol=1e-12, atol=1e-12)
    assert all(bucket._flat is None or not bucket.slots for bucket in reducer.buckets if bucket.needs_flag_bucket)
    return sum(bucket.is_late for bucket in reducer.buckets)


def random_runs_of_shards():
    num_late = [
        random_steps_of_shards(seed, cap, overlap)
        for seed, (cap, overlap) in enumerate([(cap, overlap) for cap in CAPS for overlap in (True, False)])
    ]
    assert any(num_late)  # buckets were reduced twice


def test_shards_get_the_mean_whatever_each_rank_has_used():
    run_ranks(random_runs_of_shards, 4)


def others_do_not_come(is_update):
    model, group = make_plain(), world()
    _, shards = sharded_reducer(model, lambda name: group, timeout_seconds=0.5)
    if dist.get_rank() == 0:
        if is_update:
            with pytest.raises(WaitTimeoutError, match=r"the updated parameters of gradient bucket.*seconds=0\.5"):
                shards.finish_update()
        else:
            with pytest.raises(WaitTimeoutError, match=r"(flags|owners of shards).*seconds=0\.5"):
                loss_of()(model)


@pytest.mark.parametrize("is_update", [False, True])
def test_a_rank_that_does_not_come_is_named_after_the_timeout(is_update):
    run_ranks(others_do_not_come, 2, is_update)


def bytes_of(tensors):
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


def memory_of_shards():
    size = dist.get_world_size()
    for overlap in (True, False):
        model, group = make_plain(), world()
        num_bytes = 8 * sum(parameter.numel() for parameter in model.parameters())
        reducer, shards = sharded_reducer(model, lambda name, group=group: group, overlap=overlap)
        padding = 8 * size * len(shards.buckets)
        held = [shard.tensor for bucket in shards.buckets for shard in bucket.shards]
        assert num_bytes <= bytes_of(model.parameters()) < num_bytes + padding
        assert bytes_of([*held, *model.parameters()]) == bytes_of(model.parameters())
        num_flats, num_local = [], []
        for bucket in shards.buckets:

            def launch(launch=bucket.launch, buckets=shards.buckets, flats=num_flats, local=num_local, model=model):
                flats.append(sum(other._flat is not None for other in buckets))
                local.append(sum(type(parameter.grad) is Tensor for parameter in model.parameters()))
                launch()

            bucket.launch = launch
        for step in range(2):
            loss_of(step)(model)
            shown = [local_part(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
            assert bytes_of([*shown, *(t.grad for t in held)]) == bytes_of([t.grad for t in held])
            assert num_bytes / size - padding <= bytes_of([t.grad for t in held]) <= num_bytes / size + padding
            assert all(bucket._flat is None for bucket in shards.buckets)
        num_buckets = len(shards.buckets)
        assert num_buckets > 1
        assert num_flats[:num_buckets] == (list(range(1, num_buckets + 1)) if overlap else [1] * num_buckets)
        assert overlap or sorted(set(num_local), reverse=True) == num_local[:num_buckets]  # let go one by one
        reducer.detach()


def test_gradients_and_shards_take_the_memory_that_the_documentation_says():
    run_ranks(memory_of_shards, 3)


# With smp.DistributedOptimizer.


@on(DP2, DP3, TP2, PP2, COPIES)
def test_c062_the_wrapped_optimizer_trains_on_shards():
    for make_optimizer, cap in ((adam, CAP), (sgd_of_trained, 25), (adafactor, CAP)):
        if make_optimizer is adafactor and smp.tp_size() > 1:
            continue
        net = make_model()
        smp.set_tensor_parallelism(net.wide)
        smp.set_tensor_parallelism(net.back)
        model = smp.DistributedModel(net, bucket_cap_mb=cap)
        optimizer = smp.DistributedOptimizer(make_optimizer(model.parameters()))
        for step in range(NUM_STEPS):
            optimizer.zero_grad()
            token_step(model, *own_share(batch(step)))
            optimizer.step()
        assert_parity(model.state_dict(), reference(make_optimizer, smp.dp_size()), dtype=torch.float64)


@on(DP4)
def test_a_rank_without_a_share_takes_part():
    """Two whole parameters on four ranks."""
    torch.manual_seed(0)
    plain = nn.Linear(3, 2).double()
    net = nn.Linear(3, 2).double()
    net.load_state_dict(plain.state_dict())
    model = smp.DistributedModel(net)
    optimizer = smp.DistributedOptimizer(torch.optim.Adafactor(model.parameters(), lr=0.1))
    other = torch.optim.Adafactor(plain.parameters(), lr=0.1)
    x = torch.randn(4, 3, dtype=torch.float64)
    for _ in range(3):
        for module, update in ((model, optimizer), (plain, other)):
            update.zero_grad()
            module(x).square().mean().backward()
            update.step()
    assert_parity(dict(net.named_parameters()), dict(plain.named_parameters()), dtype=torch.float64)
