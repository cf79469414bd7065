"""Steps of the gradient reducer on the ranks of a test, compared with DDP and with the mean over the ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from modelparallel.comm.groups import Group
from modelparallel.config.topology import GroupKind
from modelparallel.data_parallel import GradientReducer, ReducedParameter
from modelparallel.data_parallel.launch_order import LaunchOrder

SMALL_CAP = 1e-4  # MiB: about 26 floats, so that a test model has many buckets
CAPS = (1e-6, SMALL_CAP, 25)
# Of every reducer that is made here; other tests run these bodies with other options.
OPTIONS: dict[str, Any] = {}
# Runs a backward of the model.
Backward = Callable[[Any], Any]
# By parameter name.
Gradients = dict[str, Tensor | None]


def world() -> Group:
    return Group(GroupKind.DP, tuple(range(dist.get_world_size())), dist.get_rank(), dist.group.WORLD)


def pairs() -> Group:
    """The ranks in groups of two, {0, 1} and {2, 3}."""
    mine = None
    for first in range(0, dist.get_world_size(), 2):
        ranks = (first, first + 1)
        process_group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            mine = Group(GroupKind.RDP, ranks, ranks.index(dist.get_rank()), process_group)
    assert mine is not None, "an odd number of ranks"
    return mine


def alone() -> Group:
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    return Group(GroupKind.RDP, (dist.get_rank(),), 0, groups[dist.get_rank()])


def make_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def make_input(step: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    return torch.randn(4, 5, generator=generator, dtype=dtype)


def reducer_of(model: nn.Module, group: Group | None = None, **options: Any) -> GradientReducer:
    group = group or world()
    entries = [ReducedParameter(name, parameter, group) for name, parameter in model.named_parameters()]
    defaults = {"divisor": dist.get_world_size(), "bucket_cap_mb": SMALL_CAP}
    return GradientReducer(entries, **(defaults | OPTIONS | options))


def local_gradients(model: nn.Module, backward: Backward) -> Gradients:
    """What ``backward(model)`` gives on this rank alone, by parameter name."""
    plain = copy.deepcopy(model)
    for parameter in plain.parameters():
        parameter.grad = None
    backward(plain)
    return {name: parameter.grad for name, parameter in plain.named_parameters()}


def gather(values: Sequence[Tensor], group: Group | None = None) -> list[tuple[Tensor, ...]]:
    """The values (one dtype) of all ranks of the group, in one message: a list per rank."""
    group = group or world()
    flat = torch.cat([value.detach().reshape(-1) for value in values])
    everywhere = [torch.empty_like(flat) for _ in group.ranks]
    dist.all_gather(everywhere, flat, group=group.process_group)
    return [other.split([value.numel() for value in values]) for other in everywhere]


def mean_over_ranks(gradients: Gradients, model: nn.Module, group: Group | None = None) -> Gradients:
    """Sum over the group of the local gradients / world size: None counts as zero, None on all ranks stays None."""
    wanted: Gradients = {}
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


def assert_gradients(model: nn.Module, wanted: Gradients, rtol: float = 1e-12) -> None:
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


def run_step(
    reducer: GradientReducer,
    model: nn.Module,
    microbatches: Sequence[Backward],
    last_pieces: Sequence[Backward] = (),
    will_synchronize: bool = True,
) -> None:
    """A step as the engine drives it: ``microbatches`` and ``last_pieces`` are functions that run a backward."""
    reducer.begin_step(will_synchronize)
    for backward in microbatches:
        backward(model)
    reducer.arm(LaunchOrder())
    for backward in last_pieces:
        backward(model)
    reducer.finish_step()


def loss_of(step: int = 0, dtype: torch.dtype = torch.float64) -> Backward:
    return lambda model: model(make_input(step, dtype)).square().sum().backward()


def equal_to_ddp(dtype: torch.dtype) -> None:
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


def accumulated_steps() -> None:
    model = make_model()
    reducer = reducer_of(model)
    wanted = mean_over_ranks(local_gradients(model, lambda m: [loss_of(step)(m) for step in range(4)]), model)
    run_step(reducer, model, [loss_of(0)], [loss_of(1)], will_synchronize=False)
    assert reducer.num_launches == 0
    run_step(reducer, model, [loss_of(2)], [loss_of(3)], will_synchronize=True)
    assert reducer.num_launches == len(reducer.buckets)
    assert_gradients(model, wanted)


def no_sync_like_ddp() -> None:
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


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.parts = nn.ModuleList([nn.Linear(5, 5, dtype=torch.float64) for _ in range(6)])

    def forward(self, x: Tensor, which: Sequence[int]) -> Tensor:
        for part in which:
            x = self.parts[part](x).tanh()
        return x


def through(*which: int, step: int = 0) -> Backward:
    return lambda model: model(make_input(step), which).square().sum().backward()


def irregular_steps() -> None:
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


def gradients_without_hooks() -> None:
    """A piece that accumulates into ``grad`` without autograd, as split backward does."""

    def add_by_hand(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.grad += 1 + dist.get_rank()

    model = Branches()
    reducer = reducer_of(model)
    wanted = mean_over_ranks(local_gradients(model, lambda m: (through(*range(6))(m), add_by_hand(m))), model)
    run_step(reducer, model, [], [through(*range(6)), add_by_hand])
    assert_gradients(model, wanted)


def users_change_gradients() -> None:
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


def frozen_and_unfrozen() -> None:
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


def mixed_dtypes_and_layouts() -> None:
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

    def backward(m: Any) -> None:
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


def split_over_tp() -> None:
    """4 dp ranks as 2 tp x 2 rdp: parts 0, 2 and 5 are summed over rdp groups {0, 1} and {2, 3}, the rest over all."""
    rdp, dp = pairs(), world()
    split = (0, 2, 5)

    def entries(model: nn.Module) -> list[ReducedParameter]:
        return [
            ReducedParameter(name, parameter, rdp if int(name.split(".")[1]) in split else dp)
            for name, parameter in model.named_parameters()
        ]

    def wanted_of(gradients: Gradients, model: nn.Module) -> Gradients:
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


def random_steps(seed: int, cap: float, overlap: bool) -> None:
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


def random_runs() -> None:
    for seed, (cap, overlap) in enumerate([(1e-6, True), (SMALL_CAP, True), (SMALL_CAP, False)]):
        random_steps(seed, cap, overlap)


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise ValueError("in the middle of backward")


def interrupted_backward() -> None:
    def broken(model: Any) -> None:
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


def nested_backward() -> None:
    from torch.utils.checkpoint import checkpoint

    def backward(model: Any) -> None:
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


# What must hold of a reduction: a body, its number of ranks and its arguments.
RULES: list[tuple[Callable[..., None], int, tuple[Any, ...]]] = [
    (equal_to_ddp, 2, (torch.float32,)),
    (accumulated_steps, 2, ()),
    (no_sync_like_ddp, 2, ()),
    (irregular_steps, 4, ()),
    (gradients_without_hooks, 2, ()),
    (users_change_gradients, 2, ()),
    (frozen_and_unfrozen, 2, ()),
    (mixed_dtypes_and_layouts, 2, ()),
    (split_over_tp, 4, ()),
    (random_runs, 4, ()),
    (interrupted_backward, 2, ()),
    (nested_backward, 2, ()),
]
