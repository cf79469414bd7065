"""Weights that scripts touch beside the optimizer: lists from before the partition, copies and averages, tensors of
other stages, initial weights that differ, parameters that are replaced, lazy modules, models with equal names inside.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modelparallel as smp
from distributed_run import own_share
from logs import logged_lines
from modelparallel.errors import (
    AbsentTensorError,
    DivergenceError,
    PartitionError,
    SMPConfigError,
    StepUsageError,
    UnsupportedError,
)
from parity import assert_parity
from pool import run_ranks
from rank_tests import RankTests, on
from small_models import make_classifier
from training import forward_step, square_step, step_of

ONE = RankTests(1, {"microbatches": 2})
PP2 = RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 2})
PP3 = RankTests(3, {"pipeline_parallel_degree": 3, "microbatches": 2})
TP2 = RankTests(2, {"tensor_parallel_degree": 2, "microbatches": 2})
DP2 = RankTests(2, {"microbatches": 2})
SHARDED2 = RankTests(2, {"sharded_data_parallel_degree": 2, "sdp_param_persistence_threshold": 0})
PP2_TP2 = RankTests(4, {"pipeline_parallel_degree": 2, "tensor_parallel_degree": 2, "microbatches": 2})
HALF = RankTests(2, {"pipeline_parallel_degree": 2, "fp16": True})
MANUAL = RankTests(2, {"pipeline_parallel_degree": 2, "auto_partition": False, "default_partition": 0})
EVERY = (ONE, PP2, PP3, TP2, DP2, SHARDED2, PP2_TP2)


class Net(nn.Module):
    """Equal layers, so that a wrong pairing of two lists of parameters goes unnoticed."""

    def __init__(self, width: int = 8, num_layers: int = 5) -> None:
        super().__init__()
        layers = [
            module
            for _ in range(num_layers)
            for module in (nn.Linear(width, width), nn.BatchNorm1d(width, momentum=0.3), nn.Tanh())
        ]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, width)

    def forward(self, x):
        return self.head(self.body(x))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().double()


def batch(step: int, num_samples: int = 8) -> torch.Tensor:
    union = torch.randn(num_samples, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return own_share((union,))[0]


def td_loss(online, target, x):
    with torch.no_grad():
        goal = target(x) + 1
    return F.mse_loss(online(x), goal)


td_step = step_of(td_loss)


def wrapped(module: nn.Module, **options):
    if smp.tp_size() > 1:
        for part in module.modules():
            if isinstance(part, nn.Linear):
                smp.set_tensor_parallelism(part, True)
    return smp.DistributedModel(module, **options)


def trained(model, lr: float = 0.2):
    return smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=lr))


def names_here(model) -> list[str]:
    return [name for name, _ in model.local_named_parameters()]


def weights_of(model) -> dict[str, torch.Tensor]:
    parameters = {name for name, _ in model.virtual_named_parameters()}
    return {name: value for name, value in model.state_dict().items() if name in parameters}


def copied_by_zip(target, online, old_lists):
    for theirs, own in zip(target.parameters(), online.parameters(), strict=True):
        theirs.data.copy_(own.data)


def copied_by_old_lists(target, online, old_lists):
    with torch.no_grad():
        for theirs, own in zip(*old_lists, strict=True):
            theirs.copy_(own)


def copied_by_inner_state(target, online, old_lists):
    target.get_module().load_state_dict(online.get_module().state_dict())


def copied_by_library(target, online, old_lists):
    smp.copy_weights(target, online)


COPIES = (copied_by_zip, copied_by_old_lists, copied_by_inner_state, copied_by_library)


@on(PP2, PP3)
def test_target_networks_follow_by_every_idiom():
    for copied in COPIES:
        online, target = net(), net()
        old_lists = list(target.parameters()), list(online.parameters())
        online, target = smp.DistributedModel(online), smp.DistributedModel(target)
        optimizer = trained(online)
        for step in range(2):
            optimizer.zero_grad()
            td_step(online, target, batch(step))
            optimizer.step()
            copied(target, online, old_lists)
        assert names_here(online) == names_here(target)
        has_buffers = copied in (copied_by_inner_state, copied_by_library)
        states = [dict(model.state_dict() if has_buffers else weights_of(model)) for model in (target, online)]
        assert_parity(*states, dtype=torch.float64)


@on(PP2, PP3)
def test_models_of_one_structure_are_partitioned_alike_wherever_they_are_used():
    frozen = smp.DistributedModel(net(3).requires_grad_(False))
    forward_step(frozen, batch(0))  # an earlier step, without gradients
    online = smp.DistributedModel(net())
    optimizer = trained(online)
    td_step(online, frozen, batch(1))
    optimizer.step()
    assert names_here(online) == names_here(frozen)
    assert online.partition_plan == frozen.partition_plan
    other = smp.DistributedModel(Net(num_layers=6).double())  # another structure: a plan of its own
    forward_step(other, batch(2))
    assert other.partition_plan != online.partition_plan
    twin = smp.DistributedModel(net(5), same_as=online)
    forward_step(twin, batch(3))
    assert names_here(twin) == names_here(online)
    with pytest.raises(PartitionError, match="not of one structure"):
        smp.DistributedModel(net(), same_as=other)
    with pytest.raises(SMPConfigError, match="same_as"):
        smp.DistributedModel(net(), same_as=nn.Linear(2, 2))


@on(PP2)
def test_same_as_names_a_model_that_has_to_be_there():
    online = smp.DistributedModel(Net(num_layers=3).double())
    target = smp.DistributedModel(Net(num_layers=3).double(), same_as=online)
    with pytest.raises(PartitionError, match="same_as names is not partitioned"):
        forward_step(target, batch(0))
    td_step(online, target, batch(0))
    assert names_here(target) == names_here(online)


@on(MANUAL)
def test_partitions_by_hand_that_differ_are_warned_of():
    online, target, third = (smp.DistributedModel(net(seed)) for seed in range(3))
    for model, home in ((online, 1), (target, 0)):
        smp.set_partition(model.get_module().head, home)
    with logged_lines() as lines:
        td_step(online, target, batch(0))
    assert any("different partitions" in line for line in lines) == (smp.rank() == 0)
    forward_step(third, batch(0))  # nothing was said of this one
    assert names_here(third) == names_here(online)
    smp.copy_weights(target, online)  # through whole values
    assert_parity(target.state_dict(), online.state_dict(), dtype=torch.float64)


@on(*EVERY)
def test_averages_are_those_of_one_process():
    plain, plain_average = net(), net()
    model, average, held = wrapped(net()), wrapped(net()), net()
    averaged = torch.optim.swa_utils.get_ema_multi_avg_fn(0.75)
    optimizer = trained(model)
    smp.average_weights(average, model, 0.75)  # before the partition, of equal weights
    with logged_lines():
        forward_step(average, batch(0))
        plain_average(batch(0))
        average.eval(), plain_average.eval()
    for step in range(2):
        optimizer.zero_grad()
        square_step(model, batch(step))
        optimizer.step()
        for name, value in model.state_dict().items():  # the training itself is compared elsewhere
            plain.state_dict()[name].copy_(value)
        smp.average_weights(average, model, 0.75)
        smp.average_weights(held, model, 0.75)
        averaged(list(plain_average.parameters()), list(plain.parameters()), 1)
        for own, theirs in zip(plain_average.buffers(), plain.buffers(), strict=True):
            own.copy_(theirs)
    assert_parity(average.state_dict(), plain_average.state_dict(), dtype=torch.float64)
    assert_parity(held.state_dict(), plain_average.state_dict(), dtype=torch.float64)
    smp.average_weights(average, model, 0.5, averages_buffers=True)
    expected = plain_average.body[1].running_mean.lerp(plain.body[1].running_mean, 0.5)
    assert_parity({"mean": average.state_dict()["body.1.running_mean"]}, {"mean": expected}, dtype=torch.float64)
    smp.copy_weights(average, held)
    assert_parity(average.state_dict(), held.state_dict(), dtype=torch.float64)
    late = wrapped(net(9))
    smp.copy_weights(late, model)  # one of them is not partitioned
    assert_parity(late.state_dict(), model.state_dict(), dtype=torch.float64)
    assert torch.equal(forward_step(late, batch(7)).concat(), forward_step(model, batch(7)).concat())


@on(HALF)
def test_small_steps_of_an_average_in_half_precision_add_up():
    model, average = smp.DistributedModel(net().float()), smp.DistributedModel(net().float())
    with torch.no_grad():
        for value in model.get_module().parameters():
            value.fill_(1.5)
        for value in average.get_module().parameters():
            value.fill_(1.0)
    forward_step(model, batch(0).half())
    forward_step(average, batch(0).half())
    for _ in range(400):
        smp.average_weights(average, model, 0.9995)
    expected = 1.5 - 0.5 * 0.9995**400
    for name, value in average.local_named_parameters():
        assert value.dtype == torch.float16
        assert abs(float(value.flatten()[0]) - expected) < 1e-3, name


@on(HALF)
def test_masters_follow_a_copy():
    source, target = smp.DistributedModel(net(1).float()), smp.DistributedModel(net(2).float())
    optimizer = trained(target, lr=0.0)
    optimizer.zero_grad()
    square_step(target, batch(0).half())
    forward_step(source, batch(0).half())
    optimizer.step()
    smp.copy_weights(target, source)
    optimizer.step()
    for (name, own), (_, theirs) in zip(target.local_named_parameters(), source.local_named_parameters(), strict=True):
        assert torch.equal(own, theirs), name


@on(ONE, PP2)
def test_wrong_calls_of_copies_are_named():
    model, other = smp.DistributedModel(net()), smp.DistributedModel(make_classifier())
    for value in (2, -0.1, True, "x"):
        with pytest.raises(SMPConfigError, match="decay"):
            smp.average_weights(model, model, value)
    with pytest.raises(PartitionError, match="not of one structure"):
        smp.copy_weights(model, other)
    with pytest.raises(PartitionError, match=r"average\.module"):
        smp.average_weights(torch.optim.swa_utils.AveragedModel(net()), model, 0.5)
    with pytest.raises(SMPConfigError, match="expected two models"):
        smp.copy_weights(model, model.state_dict)


@on(ONE, PP2)
def test_copies_of_a_wrapped_model_name_the_way_out():
    module = net()
    model = smp.DistributedModel(module)
    plain_copy = copy.deepcopy(module)  # of the module: works before the partition
    averaged = torch.optim.swa_utils.AveragedModel(module)
    for _ in range(2):
        for make in (copy.deepcopy, torch.optim.swa_utils.AveragedModel):
            with pytest.raises(UnsupportedError, match=r"smp\.average_weights"):
                make(model)
        for dump in (pickle.dumps, lambda value: torch.save(value, io.BytesIO())):
            with pytest.raises(UnsupportedError, match="save_checkpoint"):
                dump(model)
        forward_step(model, batch(0))
    if smp.pp_size() == 1:
        averaged.update_parameters(module)
        assert torch.equal(copy.deepcopy(module)(batch(1)), module(batch(1)))
        torch.save(module.state_dict(), io.BytesIO())
        return
    for attempt in (
        lambda: copy.deepcopy(module),
        lambda: torch.save(module, io.BytesIO()),
        lambda: torch.save(module.state_dict(), io.BytesIO()),
        lambda: averaged.update_parameters(module),
        lambda: plain_copy.load_state_dict(module.state_dict()),
    ):
        with pytest.raises((AbsentTensorError, RuntimeError), match=r"smp\.average_weights"):
            attempt()


READS = {
    "sum": lambda p: p.sum(),
    "item": lambda p: p.view(-1)[0].item(),
    "norm": lambda p: p.norm(),
    "numpy": lambda p: p.detach().numpy(),
    "tolist": lambda p: p.tolist(),
    "plus": lambda p: p + 1,
    "source": lambda p: torch.zeros(p.shape, dtype=p.dtype).copy_(p),
    "out": lambda p: torch.add(p, 1, out=torch.zeros(p.shape, dtype=p.dtype)),
    "slice": lambda p: float(p.data[0].sum()),
    "equal": lambda p: torch.equal(p, p),
    "vector": lambda p: nn.utils.parameters_to_vector([p]),
    "linear": lambda p: F.linear(torch.ones(2, p.shape[-1], dtype=p.dtype), p),
    "foreach": lambda p: torch._foreach_add([p], 1),
    "foreach_": lambda p: torch._foreach_lerp_([torch.zeros(p.shape, dtype=p.dtype)], [p], 0.5),
    "deepcopy": copy.deepcopy,
    "clone": lambda p: p.clone().max(),
    "bool": lambda p: bool((p.data[:1, :1]).all()),
    "iterate": lambda p: [float(row.sum()) for row in p],
}

WRITES = {
    "fill_": lambda p: p.fill_(0.25),
    "data": lambda p: p.data.mul_(3),
    "set data": lambda p: setattr(p, "data", torch.full(p.shape, 0.5, dtype=p.dtype)),
    "copy_": lambda p: p.copy_(torch.ones(p.shape, dtype=p.dtype)),
    "row": lambda p: p[0].zero_(),
    "item": lambda p: p.__setitem__((0, slice(None)), 7.0),
    "iadd": lambda p: p.__iadd__(1),
    "xavier": nn.init.xavier_uniform_,
    "kaiming": nn.init.kaiming_normal_,
    "trunc": nn.init.trunc_normal_,
    "orthogonal": nn.init.orthogonal_,
    "eye": nn.init.eye_,
    "normal": lambda p: p.data.normal_(0, 2),
    "constant": lambda p: nn.init.constant_(p, 3),
    "foreach": lambda p: torch._foreach_mul_([p], 2.0),
    "vector": lambda p: nn.utils.vector_to_parameters(torch.arange(p.numel(), dtype=p.dtype), [p]),
}


@on(PP2, PP3)
def test_reading_a_weight_of_another_stage_is_an_error_that_names_it():
    module = net()
    model = smp.DistributedModel(module)
    forward_step(model, batch(0))
    here = set(names_here(model))
    assert 0 < len(here) < len(list(module.parameters()))
    for name, parameter in model.virtual_named_parameters():
        assert isinstance(parameter, nn.Parameter)
        assert parameter.shape in ((8, 8), (8,)) and parameter.dtype == torch.float64 and parameter.requires_grad
        assert torch.zeros_like(parameter).sum() == 0
        if parameter.ndim != 2:
            continue
        for title, read in READS.items():
            if name in here:
                read(parameter.data)
                continue
            with pytest.raises(AbsentTensorError, match=rf"parameter '{name} ?.*lives on pp_rank"):
                read(parameter)
                pytest.fail(title)
    absent = [name for name, _ in module.named_buffers() if name not in dict(model.local_named_buffers())]
    with pytest.raises(AbsentTensorError, match=f"buffer '{absent[0]}"):
        module.get_buffer(absent[0]).mean()


@on(PP2, PP3)
def test_writes_to_any_weight_are_those_of_one_process():
    """Every stage runs the line, also the random ones: what the home writes is right."""
    plain, module = net(), net()
    model = smp.DistributedModel(module)
    forward_step(model, batch(0))
    plain.load_state_dict(model.state_dict())
    for title, write in WRITES.items():
        for target in (plain, module):
            torch.manual_seed(4)
            with torch.no_grad():
                for parameter in target.parameters():
                    if parameter.ndim == 2:
                        write(parameter)
            last = torch.rand(())
            if target is plain:
                expected = last
        assert last == expected, f"{title}: the generators of the stages have gone apart"
        assert_parity(model.state_dict(), plain.state_dict(), dtype=torch.float64)
    module.load_state_dict(net(8).state_dict())
    assert_parity(model.state_dict(), net(8).state_dict(), dtype=torch.float64)


@on(PP2)
def test_a_partitioned_model_is_converted_and_taken_back():
    model = smp.DistributedModel(net())
    forward_step(model, batch(0))
    model.float()
    assert {p.dtype for p in model.get_module().parameters()} == {torch.float32}
    forward_step(model, batch(0).float())
    model.cpu()
    assert {type(p) for p in model.get_module().parameters()} == {nn.Parameter}
    assert all(bool(p.isfinite().all()) for p in model.get_module().parameters())
    copy.deepcopy(model.get_module())


@on(PP2, PP3)
def test_zip_with_a_whole_list_is_an_error():
    module = net()
    plain, old_list = copy.deepcopy(module), list(module.parameters())
    plain_list = list(plain.parameters())
    model = smp.DistributedModel(module)
    for _, _ in zip(plain.parameters(), model.parameters(), strict=True):  # before the partition
        pass
    forward_step(model, batch(0))
    pairs = (
        lambda: zip(plain.parameters(), model.parameters()),  # noqa: B905
        lambda: zip(model.parameters(), plain.parameters()),  # noqa: B905
        lambda: zip(plain_list, model.parameters()),  # noqa: B905
        lambda: zip(tuple(plain_list), model.named_parameters()),  # noqa: B905
        lambda: zip(plain.named_parameters(), model.named_parameters()),  # noqa: B905
        lambda: zip(old_list, model.parameters()),  # noqa: B905
    )
    for pair in pairs:
        with pytest.raises(StepUsageError, match=r"zip of a list of 22 parameters.*would pair the wrong"):
            list(pair())
    here = [parameter for _, parameter in model.named_parameters()]
    for _ in range(2):
        for own, parameter in zip(here, model.parameters(), strict=True):
            assert own is parameter


# Initial weights


@on(PP2, PP3, TP2, PP2_TP2, DP2)
def test_weights_of_the_first_rank_count_where_seeds_differ():
    expected = net(20)
    with logged_lines() as lines:
        model = wrapped(net(20 + smp.rank()))
        forward_step(model.eval(), batch(0))
    assert_parity(model.state_dict(), expected.state_dict(), dtype=torch.float64)
    warnings = [line for line in lines if "began with different weights" in line]
    if smp.mp_size() > 1 and smp.rank() == 0:
        assert "'body.0.weight' first" in warnings[0]
    if smp.rank():
        assert not warnings


@on(PP2, PP3)
def test_what_rank_0_has_loaded_counts_everywhere():
    module = net(1)
    if smp.rank() == 0:
        module.head.load_state_dict(net(30).head.state_dict())
    with logged_lines() as lines:
        model = smp.DistributedModel(module)
        forward_step(model.eval(), batch(0))
    assert_parity(
        {name: value for name, value in model.state_dict().items() if name.startswith("head")},
        {name: value for name, value in net(30).state_dict().items() if name.startswith("head")},
        dtype=torch.float64,
    )
    if smp.rank() == 0:
        assert any("2 of 37" in line and "'head.weight' first" in line for line in lines), lines
    with logged_lines() as lines:
        forward_step(smp.DistributedModel(net(2)), batch(0))
    assert not any("different weights" in line for line in lines)


@on(PP2)
def test_parts_that_were_loaded_on_purpose_stay():
    model = smp.DistributedModel(net(1))
    forward_step(model.eval(), batch(0))
    part = model.local_state_dict()
    other = smp.DistributedModel(net(2)).eval()
    with logged_lines() as lines:
        other.load_state_dict(part, same_partition_load=True)
        forward_step(other, batch(0))
    assert not any("different weights" in line for line in lines)
    assert_parity(other.state_dict(), model.state_dict(), dtype=torch.float64)


@on(PP2)
def test_another_model_on_another_rank_is_named():
    model = smp.DistributedModel(Net(num_layers=2 + smp.rank()))
    with pytest.raises(DivergenceError, match="Build the model alike"):
        forward_step(model, batch(0))


@on(TP2)
def test_slices_that_were_drawn_from_other_numbers_are_named():
    with logged_lines() as lines:
        for seed in (5, 5 + smp.rank()):
            torch.manual_seed(seed)
            smp.DistributedModel(nn.Sequential(smp.nn.DistributedLinear(4, 4), nn.Tanh()))
    found = [line for line in lines if "other random numbers" in line]
    assert len(found) == (1 if smp.rank() == 0 else 0)
    assert not found or "'0'" in found[0]


# Parameters and modules that are replaced


@on(ONE, PP2, PP3)
def test_what_is_replaced_before_the_first_step_is_trained():
    module, plain = net(1), net(1)
    model = smp.DistributedModel(module)
    for target in (module, plain):
        target.head = nn.Sequential(nn.Linear(8, 8).double(), nn.Linear(8, 8).double())
        target.head.load_state_dict({f"{index}.{name}": value for index in range(2)
                                     for name, value in net(4).head.state_dict().items()})  # fmt: skip
        target.body[0].weight = nn.Parameter(net(5).body[0].weight.detach().clone())
        target.body[3].weight = target.body[6].weight  # tied
    optimizer, plain_optimizer = trained(model), torch.optim.SGD(plain.parameters(), lr=0.2)
    square_step(model, batch(0))
    for part in batch(0).split(4):
        (plain(part).square().mean() / 2).backward()
    optimizer.step()
    plain_optimizer.step()
    assert_parity(model.state_dict(), plain.state_dict(), dtype=torch.float64)


@on(PP2, PP3, DP2)
def test_what_is_replaced_too_late_is_named():
    def head(module):
        module.head = nn.Linear(8, 8).double()

    def weight(module):
        module.body[0].weight = nn.Parameter(torch.ones(8, 8, dtype=torch.float64))

    def tie(module):
        module.head.weight = module.body[0].weight

    for change, name in ((head, "head.weight"), (weight, "body.0.weight"), (tie, "head.weight")):
        model = smp.DistributedModel(net())
        square_step(model, batch(0))
        change(model.get_module())
        if smp.pp_size() == 1 and change is tie:  # all are here, and reduced
            square_step(model, batch(1))
            continue
        with pytest.raises(StepUsageError, match=rf"'{name}.*(put into the model|lives on another stage)"):
            square_step(model, batch(1))


@on(ONE, PP2)
def test_modules_without_weights_are_exchanged_at_any_time():
    module = net()
    model = smp.DistributedModel(module)
    square_step(model, batch(0))
    module.body[2] = nn.ReLU()
    plain = net()
    plain.load_state_dict(model.state_dict())
    plain.body[2] = nn.ReLU()
    expected = torch.cat([plain(part) for part in batch(1).split(4)])
    assert_parity({"": forward_step(model, batch(1)).concat()}, {"": expected}, dtype=torch.float64)


class Late(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.second(torch.relu(self.first(x)))
        if not hasattr(self, "head"):
            self.head = nn.Linear(x.shape[1], 3).to(x.dtype)
        return self.head(x)


@on(ONE, PP2, DP2)
def test_lazy_modules_and_modules_of_the_first_forward_name_the_way_out():
    with pytest.raises(StepUsageError, match=r"'1.weight' of a lazy module \(LazyLinear\)"):
        smp.DistributedModel(nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(3)))
    model = smp.DistributedModel(Late().double())
    with pytest.raises(PartitionError, match=r"parameter 'head.weight.*\(and 1 more\)"):
        square_step(model, batch(0))
    torch.manual_seed(1)
    module = nn.Sequential(Late().double(), nn.LazyLinear(3, dtype=torch.float64))
    expected = module(batch(0))
    model = smp.DistributedModel(module)
    assert_parity({"": forward_step(model, batch(0)).concat()}, {"": expected.detach()}, dtype=torch.float64)


# Two models with equal names inside


def alternating_losses() -> list[float]:
    """The critic is called twice in a step, the generator once; both have a module "1" that changes and one that
    draws.
    """

    def sequence(width: int, out: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.Dropout(0.5), nn.Linear(width, out))

    @smp.step
    def critic_step(critic, generator, real, noise):
        loss = critic(real).mean()
        critic.backward(loss)
        second = -critic(generator(noise).detach()).mean()
        critic.backward(second)
        return loss + second

    torch.manual_seed(2)
    generator = smp.DistributedModel(sequence(12, 8).double())
    critic = smp.DistributedModel(sequence(32, 1).double())
    optimizer = trained(critic)
    losses = []
    for index in range(4):
        optimizer.zero_grad()
        losses.append(float(critic_step(critic, generator, batch(index), batch(index + 50)).reduce_mean()))
        optimizer.step()
    return losses


@pytest.mark.parametrize("num_stages", [2, 3])
def test_two_models_with_equal_names_are_told_apart(num_stages):
    parameters = {"microbatches": 2, "seed": 3}
    expected = run_ranks(alternating_losses, 1, parameters=parameters)[0]
    parameters["pipeline_parallel_degree"] = num_stages
    for found in run_ranks(alternating_losses, num_stages, parameters=parameters):
        assert_parity(*({"": torch.tensor(losses).double()} for losses in (found, expected)), dtype=torch.float64)
