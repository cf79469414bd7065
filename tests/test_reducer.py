"""The gradient reducer against DDP and against the mean over the ranks, on 2 to 4 processes."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from modelparallel.comm.groups import Group
from modelparallel.config.topology import GroupKind
from modelparallel.data_parallel import BroadcastTensor, GradientReducer, ReducedParameter, broadcast_parameters
from modelparallel.data_parallel.launch_order import LaunchOrder
from modelparallel.errors import DivergenceError, StepUsageError, WaitTimeoutError
from pool import RankError, run_ranks

SMALL_CAP = 1e-4  # MiB: about 26 floats, so that a test model has many buckets
CAPS = (1e-6, SMALL_CAP, 25)
# Of every reducer that is made here; other tests run these bodies with other options.
OPTIONS = {}


def world():
    return Group(GroupKind.DP, tuple(range(dist.get_world_size())), dist.get_rank(), dist.group.WORLD)


def pairs():
    """The ranks in groups of two, {0, 1} and {2, 3}."""
    mine = None
    for first in range(0, dist.get_world_size(), 2):
        ranks = (first, first + 1)
        process_group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            mine = Group(GroupKind.RDP, ranks, ranks.index(dist.get_rank()), process_group)
    return mine


def alone():
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    return Group(GroupKind.RDP, (dist.get_rank(),), 0, groups[dist.get_rank()])


def make_model(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def make_input(step=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    return torch.randn(4, 5, generator=generator, dtype=dtype)


def reducer_of(model, group=None, **options):
    group = group or world()
    entries = [ReducedParameter(name, parameter, group) for name, parameter in model.named_parameters()]
    defaults = {"divisor": dist.get_world_size(), "bucket_cap_mb": SMALL_CAP}
    return GradientReducer(entries, **(defaults | OPTIONS | options))


def local_gradients(model, backward):
    """What ``backward(model)`` gives on this rank alone, by parameter name."""
    plain = copy.deepcopy(model)
    for parameter in plain.parameters():
        parameter.grad = None
    backward(plain)
    return {name: parameter.grad for name, parameter in plain.named_parameters()}


def gather(values, group=None):
    """The values (one dtype) of all ranks of the group, in one message: a list per rank."""
    group = group or world()
    flat = torch.cat([value.detach().reshape(-1) for value in values])
    everywhere = [torch.empty_like(flat) for _ in group.ranks]
    dist.all_gather(everywhere, flat, group=group.process_group)
    return [other.split([value.numel() for value in values]) for other in everywhere]


def mean_over_ranks(gradients, model, group=None):
    """Sum over the group of the local gradients / world size: None counts as zero, None on all ranks stays None."""
    wanted = {}
    parameters = dict(model.named_parameters())
    for dtype in {parameter.dtype for parameter in parameters.values()}:
        names = [name for name, parameter in parameters.items() if parameter.dtype == dtype]
        values = [
            gradients[name] if gradients[name] is not None else torch.zeros_like(parameters[name]) for name in names
        ]
        flags = torch.tensor([gradients[name] is not None for name in names]).to(dtype)
        *sums, count = [sum(column) for column in zip(*gather([*values, flags], group), strict=True)]
        for position, name in enumerate(names):
            mean = sums[position].view(parameters[name].shape) / dist.get_world_size()
            wanted[name] = mean if count[position].real > 0 else None
    return wanted


def assert_gradients(model, wanted, rtol=1e-12):
    present = []
    for name, parameter in model.named_parameters():
        if wanted[name] is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=rtol, atol=rtol, msg=lambda m: f"{name}: {m}")  # noqa: B023
            present.append(parameter.grad)
    for dtype in {gradient.dtype for gradient in present}:
        first, *others = gather([gradient for gradient in present if gradient.dtype == dtype])
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def run_step(reducer, model, microbatches, last_pieces=None, will_synchronize=True):
    """A step as the engine drives it: ``microbatches`` and ``last_pieces`` are functions that run a backward."""
    reducer.begin_step(will_synchronize)
    for backward in microbatches:
        backward(model)
    reducer.arm(LaunchOrder())
    for backward in last_pieces or []:
        backward(model)
    reducer.finish_step()


def loss_of(step=0, dtype=torch.float64):
    return lambda model: model(make_input(step, dtype)).square().sum().backward()


# Equal to DDP and to the mean.


def equal_to_ddp(dtype):
    for cap in CAPS:
        for overlap in (True, False):
            ours, theirs = make_model(dtype), make_model(dtype)
            reducer = reducer_of(ours, bucket_cap_mb=cap, overlap=overlap)
            ddp = DistributedDataParallel(theirs, bucket_cap_mb=cap)
            for step in range(3):
                loss_of(step, dtype)(ours)
                loss_of(step, dtype)(ddp)
                for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
                    assert torch.equal(mine.grad, other.grad)
                if step == 0:  # then gradients pile up on reduced ones
                    for parameter in (*ours.parameters(), *theirs.parameters()):
                        parameter.grad = None
            assert (len(reducer.buckets) > 1) == (cap < 1)
            reducer.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_c034_plain_backward_gives_the_gradients_of_ddp(dtype):
    run_ranks(equal_to_ddp, 2, dtype)


def overlap_makes_no_difference():
    results = []
    for overlap in (True, False):
        model = make_model()
        reducer = reducer_of(model, overlap=overlap)
        for step in range(2):
            run_step(reducer, model, [loss_of(step)], [loss_of(step + 5)])
        assert all(not bucket.is_launched for bucket in reducer.buckets)
        results.append([parameter.grad for parameter in model.parameters()])
    for with_overlap, without in zip(*results, strict=True):
        assert torch.equal(with_overlap, without)


def test_c042_overlap_on_and_off_give_equal_gradients():
    run_ranks(overlap_makes_no_difference, 4)


def accumulated_steps():
    model = make_model()
    reducer = reducer_of(model)
    wanted = mean_over_ranks(local_gradients(model, lambda m: [loss_of(step)(m) for step in range(4)]), model)
    run_step(reducer, model, [loss_of(0)], [loss_of(1)], will_synchronize=False)
    assert reducer.num_launches == 0
    run_step(reducer, model, [loss_of(2)], [loss_of(3)], will_synchronize=True)
    assert reducer.num_launches == len(reducer.buckets)
    assert_gradients(model, wanted)


def test_c041_gradients_of_several_steps_are_reduced_once():
    run_ranks(accumulated_steps, 2)


def no_sync_like_ddp():
    ours, theirs = make_model(), make_model()
    reducer, ddp = reducer_of(ours), DistributedDataParallel(theirs)
    with reducer.no_sync(), ddp.no_sync():
        loss_of(0)(ours)
        loss_of(0)(ddp)
    assert reducer.num_launches == 0
    loss_of(1)(ours)
    loss_of(1)(ddp)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-12, atol=1e-12)
    with reducer.no_sync():
        run_step(reducer, ours, [], [loss_of(2)])
    assert reducer.num_launches == len(reducer.buckets)


def test_no_sync_accumulates_and_the_next_backward_reduces_all():
    run_ranks(no_sync_like_ddp, 2)


# Parameters that do not get exactly one gradient.


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.parts = nn.ModuleList([nn.Linear(5, 5, dtype=torch.float64) for _ in range(6)])

    def forward(self, x, which):
        for part in which:
            x = self.parts[part](x).tanh()
        return x


def through(*which, step=0):
    return lambda model: model(make_input(step), which).square().sum().backward()


def irregular_steps():
    everything = through(*range(6))
    odd = dist.get_rank() % 2
    cases = {
        "used by two pieces of the last microbatch": ([everything], [everything, through(5, 4, step=1)]),
        "two pieces on one rank only": ([everything], [everything, *([through(4, step=2)] if odd else [])]),
        "unused in the last microbatch": ([everything], [through(0, 2)]),
        "unused on one rank": ([through(0, 5, odd)], [through(0, 5, 2 + odd, step=3)]),
        "unused everywhere": ([through(0, 1)], [through(1, 2)]),
        "nothing in the last microbatch": ([everything], []),
        "no gradient at all on one rank": ([], [everything] if odd else []),
        "again as at first": ([everything], [everything]),
    }
    for overlap in (True, False):
        for cap in CAPS:
            model = Branches()
            reducer = reducer_of(model, bucket_cap_mb=cap, overlap=overlap)
            for name, (first, last) in cases.items():
                for parameter in model.parameters():
                    parameter.grad = None
                wanted = mean_over_ranks(
                    local_gradients(model, lambda m: [f(m) for f in (*first, *last)]),  # noqa: B023
                    model,
                )
                run_step(reducer, model, first, last)
                try:
                    assert_gradients(model, wanted)
                except AssertionError as error:
                    raise AssertionError(f"{name}, overlap={overlap}, cap={cap}") from error
            late = [bucket.is_late for bucket in reducer.buckets]
            gathered = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, late)
            assert all(other == late for other in gathered)
            assert any(late) == (overlap and not all(bucket.is_carrier for bucket in reducer.buckets))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_parameters_with_any_number_of_gradients_get_the_mean(num_ranks):
    run_ranks(irregular_steps, num_ranks)


def gradients_without_hooks():
    """A piece that accumulates into ``grad`` without autograd, as split backward does."""

    def add_by_hand(model):
        for parameter in model.parameters():
            parameter.grad += 1 + dist.get_rank()

    model = Branches()
    reducer = reducer_of(model)
    wanted = mean_over_ranks(local_gradients(model, lambda m: (through(*range(6))(m), add_by_hand(m))), model)
    run_step(reducer, model, [], [through(*range(6)), add_by_hand])
    assert_gradients(model, wanted)


def test_a_gradient_that_changes_after_its_launch_without_a_hook_is_reduced_again():
    run_ranks(gradients_without_hooks, 2)


def users_change_gradients():
    model = Branches()
    reducer_of(model)
    everything = through(*range(6))
    for change in ("none", "zero", "replace", "half"):
        for parameter in model.parameters():
            if parameter.grad is not None:
                if change == "none":
                    parameter.grad = None
                elif change == "zero":
                    parameter.grad.zero_()
                elif change == "replace":
                    parameter.grad = torch.ones_like(parameter)
                else:
                    parameter.grad *= 0.5
        before = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        wanted = mean_over_ranks(local_gradients(model, everything), model)
        for name, gradient in before.items():
            if gradient is not None:
                wanted[name] = wanted[name] + gradient
        everything(model)
        assert_gradients(model, wanted)


def test_gradients_may_be_cleared_replaced_or_scaled_between_steps():
    run_ranks(users_change_gradients, 2)


def frozen_and_unfrozen():
    model = Branches()
    model.parts[2].requires_grad_(False)
    reducer = reducer_of(model)
    everything = through(*range(6))
    for frozen in ({2}, {2, 4}, {4}, set(), set(range(6)), {0}):
        for index, part in enumerate(model.parts):
            part.requires_grad_(index not in frozen)
            part.zero_grad()
        reducer.prepare()
        if len(frozen) == 6:
            continue
        wanted = mean_over_ranks(local_gradients(model, everything), model)
        assert all((wanted[f"parts.{index}.weight"] is None) == (index in frozen) for index in range(6))
        for drive in (everything, lambda m: run_step(reducer, m, [], [everything])):
            model.zero_grad()
            drive(model)
            assert_gradients(model, wanted)
    # Without a call of prepare: found at the first gradient.
    model.parts[3].requires_grad_(False)
    model.parts[0].requires_grad_(True)
    model.zero_grad()
    wanted = mean_over_ranks(local_gradients(model, everything), model)
    everything(model)
    assert_gradients(model, wanted)


def test_frozen_parameters_are_left_out_and_may_thaw():
    run_ranks(frozen_and_unfrozen, 2)


def mixed_dtypes_and_layouts():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "bf16": nn.Linear(3, 3, dtype=torch.bfloat16),
            "fp32": nn.Linear(3, 3),
            "c64": nn.Linear(3, 3, dtype=torch.complex64),
            "image": nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last),
            "table": nn.Embedding(9, 3, sparse=True),
        }
    )
    model["scalar"] = nn.Module()
    model["scalar"].value = nn.Parameter(torch.tensor(2.0))

    def backward(m):
        scale = dist.get_rank() + 1.0
        total = m["bf16"](torch.ones(2, 3, dtype=torch.bfloat16)).float().sum() + m["fp32"](torch.ones(2, 3)).sum()
        total = total + m["c64"](torch.ones(2, 3, dtype=torch.complex64)).abs().sum() * m["scalar"].value
        total = total + m["image"](torch.ones(1, 2, 4, 4).to(memory_format=torch.channels_last)).square().sum()
        (total * scale + m["table"](torch.tensor([dist.get_rank(), 3])).sum()).backward()

    reducer = reducer_of(model)
    gradients = {
        name: gradient.to_dense() if gradient.is_sparse else gradient
        for name, gradient in local_gradients(model, backward).items()
    }
    wanted = mean_over_ranks(gradients, model)
    for _ in range(2):
        model.zero_grad()
        run_step(reducer, model, [], [backward])
        assert_gradients(model, wanted, rtol=1e-6)
    assert len({bucket.dtype for bucket in reducer.buckets}) == 3


def test_dtypes_layouts_and_sparse_gradients():
    run_ranks(mixed_dtypes_and_layouts, 2)


# Two groups, and division by the number of dp ranks.


def split_over_tp():
    """4 dp ranks as 2 tp x 2 rdp: parts 0, 2 and 5 are summed over rdp groups {0, 1} and {2, 3}, the rest over all."""
    rdp, dp = pairs(), world()
    split = (0, 2, 5)

    def entries(model):
        return [
            ReducedParameter(name, parameter, rdp if int(name.split(".")[1]) in split else dp)
            for name, parameter in model.named_parameters()
        ]

    def wanted_of(gradients, model):
        over_dp, over_rdp = mean_over_ranks(gradients, model, dp), mean_over_ranks(gradients, model, rdp)
        return {name: (over_rdp if int(name.split(".")[1]) in split else over_dp)[name] for name in gradients}

    everything = through(*range(6))
    odd = dist.get_rank() % 2
    for overlap in (True, False):
        for cap in CAPS:
            model = Branches()
            reducer = GradientReducer(entries(model), divisor=4, bucket_cap_mb=cap, overlap=overlap, **OPTIONS)
            total = {name: None for name, _ in model.named_parameters()}
            for _number, (first, last) in enumerate(
                [
                    ([everything], [everything]),
                    ([through(1, 3)], [through(0, 1, 3, step=2)]),  # 2, 4, 5 keep their final gradients
                    ([everything], [everything, through(*([0, 4] if odd else [4, 5, 2]), step=1)]),
                    ([through(5, 1)], []),
                ]
            ):
                # The gradients pile up: what was final stays as it is.
                new = wanted_of(local_gradients(model, lambda m: [f(m) for f in (*first, *last)]), model)  # noqa: B023
                for name, gradient in new.items():
                    if gradient is not None:
                        total[name] = gradient if total[name] is None else total[name] + gradient
                run_step(reducer, model, first, last)
                for name, parameter in model.named_parameters():
                    torch.testing.assert_close(parameter.grad, total[name], rtol=1e-12, atol=1e-12)
            # The same outside steps, with one backward held back.
            with reducer.no_sync():
                through(0, 1)(model)
            everything(model)
            new = wanted_of(local_gradients(model, lambda m: (through(0, 1)(m), everything(m))), model)
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(parameter.grad, total[name] + new[name], rtol=1e-12, atol=1e-12)
            reducer.detach()


def test_c073_sums_over_rdp_are_divided_by_dp():
    run_ranks(split_over_tp, 4)


def random_steps(seed, cap, overlap):
    """Random uses of the parameters, random modes, random clearing; split and replicated parameters."""
    import random

    rdp, dp = pairs(), world()
    common, own = random.Random(seed), random.Random(1000 * seed + dist.get_rank())
    model = Branches()
    names = [name for name, _ in model.named_parameters()]
    group_of = {name: rdp if int(name.split(".")[1]) % 2 else dp for name in names}
    entries = [ReducedParameter(name, parameter, group_of[name]) for name, parameter in model.named_parameters()]
    reducer = GradientReducer(entries, divisor=4, bucket_cap_mb=cap, overlap=overlap, **OPTIONS)
    final = dict.fromkeys(names)
    pending = Branches()  # accumulates what is not reduced yet
    for _ in range(12):
        if common.random() < 0.5:
            keep = common.random() < 0.3
            for parameter in (*model.parameters(), *pending.parameters()):
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.zero_() if keep else None
            final = {
                name: torch.zeros_like(value) if keep and value is not None else None for name, value in final.items()
            }
        is_synchronised, is_automatic = common.random() < 0.7, common.random() < 0.3
        if is_automatic:
            pieces = [through(*own.sample(range(6), own.randint(1, 6)), step=own.randint(0, 9))]
        else:
            pieces = [
                through(*own.sample(range(6), own.randint(1, 6)), step=own.randint(0, 9))
                for _ in range(own.randint(0, 3))
            ]
        for piece in pieces:
            piece(pending)
        if is_automatic and is_synchronised:
            pieces[0](model)
        elif is_automatic:
            with reducer.no_sync():
                pieces[0](model)
        else:
            split = own.randint(0, len(pieces))
            run_step(reducer, model, pieces[:split], pieces[split:], will_synchronize=is_synchronised)
        if not is_synchronised:
            continue
        local = {name: parameter.grad for name, parameter in pending.named_parameters()}
        over = {id(group): mean_over_ranks(local, model, group) for group in (dp, rdp)}
        for name, parameter in model.named_parameters():
            new = over[id(group_of[name])][name]
            if new is not None:
                final[name] = new if final[name] is None else final[name] + new
            if final[name] is None:
                assert parameter.grad is None
            else:
                torch.testing.assert_close(parameter.grad, final[name], rtol=1e-10, atol=1e-12)
        pending.zero_grad()
    reducer.detach()


def random_runs():
    for seed, (cap, overlap) in enumerate([(1e-6, True), (SMALL_CAP, True), (SMALL_CAP, False)]):
        random_steps(seed, cap, overlap)


def test_random_sequences_of_steps_keep_the_rule():
    run_ranks(random_runs, 4)


def held_by_one_rank():
    group = alone()
    model = Branches()
    reducer = reducer_of(model, group, divisor=2)
    local = local_gradients(model, through(0, 1))
    for times in (1, 2):  # the second time on top of the first
        run_step(reducer, model, [], [through(0, 1)])
        for name, parameter in model.named_parameters():
            if local[name] is None:
                assert parameter.grad is None
            else:
                torch.testing.assert_close(parameter.grad, times * local[name] / 2)
    assert reducer.num_launches == 0
    idle = reducer_of(Branches(), group, divisor=1)
    assert not idle._handles and not idle.buckets


def test_a_parameter_of_one_rank_is_divided_and_a_world_of_one_costs_nothing():
    run_ranks(held_by_one_rank, 2)


# Exceptions, wrong use, hangs.


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, gradient):
        raise ValueError("in the middle of backward")


def interrupted_backward():
    def broken(model):
        x = make_input()
        for index, part in enumerate(model.parts):
            # One rank fails early, the other late: they have launched different buckets by then.
            x = Failing.apply(x) if index == (1 if dist.get_rank() else 4) else x
            x = part(x).tanh()
        with pytest.raises(ValueError, match="in the middle"):
            x.sum().backward()

    everything = through(*range(6))
    model = Branches()
    wanted = mean_over_ranks(local_gradients(model, everything), model)
    reducer = reducer_of(model)
    broken(model)
    model.zero_grad()
    everything(model)
    assert_gradients(model, wanted)
    reducer.begin_step(True)
    reducer.arm(LaunchOrder())
    broken(model)
    reducer.abort_step()
    model.zero_grad()
    run_step(reducer, model, [], [everything])
    assert_gradients(model, wanted)


def test_after_an_exception_in_backward_the_next_reduction_is_right():
    run_ranks(interrupted_backward, 2)


def nested_backward():
    from torch.utils.checkpoint import checkpoint

    def backward(model):
        x = make_input().requires_grad_()
        for index, part in enumerate(model.parts):
            x = checkpoint(part, x, use_reentrant=True) if index in (1, 4) else part(x)
            x = x.tanh()
        x.square().sum().backward()

    model = Branches()
    wanted = mean_over_ranks(local_gradients(model, backward), model)
    reducer_of(model)
    for _ in range(2):
        model.zero_grad()
        backward(model)
        assert_gradients(model, wanted)


def test_reentrant_checkpoints_run_backward_inside_backward():
    run_ranks(nested_backward, 2)


def waits_for_the_other():
    model = make_model()
    reducer_of(model, timeout_seconds=0.5)
    if dist.get_rank() == 0:
        with pytest.raises(WaitTimeoutError, match=r"gradient bucket 0 .*group \[0, 1\].*seconds=0\.5"):
            loss_of()(model)


def test_a_rank_that_does_not_come_is_named_after_the_timeout():
    run_ranks(waits_for_the_other, 2)


def different_models():
    model = make_model() if dist.get_rank() else nn.Sequential(nn.Linear(5, 3))
    reducer_of(model)


def test_different_parameters_are_refused():
    with pytest.raises(RankError) as caught:
        run_ranks(different_models, 2)
    assert isinstance(caught.value.__cause__, DivergenceError)


def wrong_use():
    reducer = reducer_of(make_model())
    with pytest.raises(StepUsageError, match="begin_step"):
        reducer.finish_step()
    reducer.begin_step(True)
    with pytest.raises(StepUsageError, match="nested"):
        reducer.begin_step(True)


def test_steps_are_not_nested():
    run_ranks(wrong_use, 2)


# Broadcast.


def broadcast():
    rank = dist.get_rank()
    dp, rdp = world(), pairs()
    torch.manual_seed(rank)
    tensors = {
        "flag": torch.tensor([rank == 0, True, False]),
        "count": torch.tensor(rank + 5),
        "weight": nn.Parameter(torch.randn(3, 4)),
        "bf16": torch.randn(3, dtype=torch.bfloat16),
        "transposed": torch.randn(4, 3).t(),
        "empty": torch.empty(0),
        "complex": torch.randn(2, dtype=torch.complex128),
        "slice": torch.full((5,), float(rank)),
    }
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    broadcast_parameters(
        [BroadcastTensor(name, tensor, rdp if name == "slice" else dp) for name, tensor in tensors.items()]
    )
    return before, {name: tensor.detach().clone() for name, tensor in tensors.items()}


def test_broadcast_from_the_first_rank_of_each_group(monkeypatch):
    results = run_ranks(broadcast, 4)
    for rank, (_, after) in enumerate(results):
        for name, tensor in after.items():
            source = results[rank // 2 * 2 if name == "slice" else 0][0]
            assert torch.equal(tensor, source[name]), name


def broadcast_in_pieces():
    from modelparallel.data_parallel import broadcast as module

    module.MESSAGE_BYTES = 40
    tensors = [torch.full((size,), float(dist.get_rank())) for size in (3, 30, 1, 7)]
    broadcast_parameters([BroadcastTensor(str(tensor.numel()), tensor, world()) for tensor in tensors])
    assert all((tensor == 0).all() for tensor in tensors)
    with pytest.raises(DivergenceError, match="the tensors to be broadcast"):
        broadcast_parameters([BroadcastTensor("x", torch.zeros(1 + dist.get_rank()), world())])


def test_broadcast_splits_large_lists_and_compares_them_first():
    run_ranks(broadcast_in_pieces, 2)
