"""smp.DistributedOptimizer: when it is built, what it holds, schedulers, states (smp-api section 7, clients 1.4)."""

from __future__ import annotations

import gc
import logging
import unittest.mock
import weakref

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR

import modelparallel as smp
from modelparallel.errors import SMPConfigError
from modelparallel.training import runtime
from parity import assert_parity
from rank_tests import RankTests, on
from small_models import Classifier, make_batch, make_classifier, mean_loss, train_step
from training import sgd

SINGLE = RankTests(1, {"microbatches": 2})
PP2 = RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 2})
PP3 = RankTests(3, {"pipeline_parallel_degree": 3, "microbatches": 2})
TP2 = RankTests(2, {"tensor_parallel_degree": 2})
ALL = (SINGLE, PP2, TP2)


def adadelta(parameters):
    return torch.optim.Adadelta(parameters, lr=4.0)


def own_batches(num_steps: int):
    """The same on every rank, so that one process on one of them is the reference with tensor parallelism, too."""
    return [make_batch(8, seed=step) for step in range(num_steps)]


def train(model, optimizer, num_steps=3, after_step=lambda: None):
    for batch in own_batches(num_steps):
        optimizer.zero_grad()
        if isinstance(model, smp.DistributedModel):
            train_step(model, *batch)
        else:
            mean_loss(model, *batch).backward()
        optimizer.step()
        after_step()
    return model.state_dict()


def plain_weights(make_optimizer, num_steps=3):
    plain = make_classifier()
    return train(plain, make_optimizer(plain.parameters()), num_steps)


@on(*ALL)
def test_c056_the_seed_s_optimizer_keeps_its_rate_and_holds_what_is_local():
    model = smp.DistributedModel(make_classifier())
    optimizer = smp.DistributedOptimizer(adadelta(model.parameters()))
    groups, group = optimizer.param_groups, optimizer.param_groups[0]
    assert len(group["params"]) == 4
    state = train(model, optimizer)
    assert optimizer.param_groups is groups and groups[0] is group and group["lr"] == 4.0 and group["rho"] == 0.9
    local = [id(parameter) for parameter in model.local_parameters()]
    assert [id(parameter) for parameter in group["params"]] == local
    assert {id(parameter) for parameter in optimizer.state} == set(local)
    everywhere = smp.allgather(len(local), smp.PP_GROUP)
    assert sum(everywhere) == 4 and min(everywhere) > 0
    assert_parity(state, plain_weights(adadelta), dtype=torch.float64)


OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD foreach": lambda parameters: torch.optim.SGD(parameters, lr=0.1, foreach=True),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, amsgrad=True),
    "Adam fused": lambda parameters: torch.optim.Adam(parameters, lr=0.01, fused=True),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "Adadelta": adadelta,
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.5),
}


@on(PP2, TP2)
def test_c056_every_kind_of_optimizer_trains_as_in_one_process():
    for name, make_optimizer in OPTIMIZERS.items():
        model = smp.DistributedModel(make_classifier())
        state = train(model, smp.DistributedOptimizer(make_optimizer(model.parameters())), 2)
        try:
            assert_parity(state, plain_weights(make_optimizer, 2), dtype=torch.float64)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


class Deep(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 10), nn.LogSoftmax(1))


def make_deep() -> Deep:
    torch.manual_seed(0)
    return Deep().double()


@on(PP3)
def test_c057_steps_on_a_rank_without_parameters_do_nothing():
    """Three layers on three stages, and an optimizer over one of them."""
    for name, make_optimizer in OPTIMIZERS.items():
        model, plain = smp.DistributedModel(make_deep()), make_deep()
        middle = list(model.get_module()[1].parameters())
        optimizer = smp.DistributedOptimizer(make_optimizer(middle))
        state = train(model, optimizer, 2)
        held = optimizer.param_groups[0]["params"]
        assert sorted(smp.allgather(len(held), smp.PP_GROUP)) == [0, 0, 2], name
        assert [id(parameter) for parameter in held] in ([], [id(parameter) for parameter in middle]), name
        assert len(optimizer.state) <= len(held), name
        assert_parity(state, train(plain, make_optimizer(plain[1].parameters()), 2), dtype=torch.float64)
        optimizer.step(lambda: torch.tensor(1.0))
        optimizer.zero_grad(set_to_none=False)


@on(*ALL)
def test_c058_all_forms_of_the_constructor():
    def make():
        return sgd(nn.Linear(2, 2).parameters())

    for arguments in (
        {},
        {"static_loss_scale": None, "dynamic_loss_scale": True, "dynamic_loss_args": {"scale_window": 10}},
        {"dynamic_loss_scale": True, "scale_window": 10, "min_scale": 1, "delayed_shift": 2},
        {"static_loss_scale": 128.0},
        {"init_scale": 2**16, "scale_factor": 2.0, "consecutive_hysteresis": True},
    ):
        assert smp.DistributedOptimizer(make(), **arguments).overflow is False
    assert smp.DistributedOptimizer(make(), 1.0, True).optimizer is not None
    for arguments in ({"scale_windo": 10}, {"dynamic_loss_args": {"scale_windo": 10}}):
        with pytest.raises(SMPConfigError, match=r"unknown argument 'scale_windo'; loss scaling takes .*scale_window"):
            smp.DistributedOptimizer(make(), **arguments)
    with pytest.raises(SMPConfigError, match="wrap the optimizer once"):
        smp.DistributedOptimizer(smp.DistributedOptimizer(make()))
    with pytest.raises(SMPConfigError, match="expected an optimizer, got Linear"):
        smp.DistributedOptimizer(nn.Linear(1, 1))


# When it is built


def tensor_parallel_classifier() -> Classifier:
    model = make_classifier()
    smp.set_tensor_parallelism(model, True)
    return model


@on(*ALL)
def test_an_optimizer_may_be_built_at_any_time():
    expected = plain_weights(sgd)

    def before_wrapping():
        net = tensor_parallel_classifier()
        inner = sgd(net.parameters())
        model = smp.DistributedModel(net)
        return model, smp.DistributedOptimizer(inner)

    def wrapped_before_the_model():
        net = tensor_parallel_classifier()
        optimizer = smp.DistributedOptimizer(sgd(net.parameters()))
        return smp.DistributedModel(net), optimizer

    def after_wrapping():
        model = smp.DistributedModel(tensor_parallel_classifier())
        return model, smp.DistributedOptimizer(sgd(model.parameters()))

    def from_the_user_s_module():
        model = smp.DistributedModel(tensor_parallel_classifier())
        first = {"params": list(model.get_module().first.parameters())}
        return model, smp.DistributedOptimizer(sgd([first, {"params": model.module.module.second.parameters()}]))

    def after_the_partition():
        model = smp.DistributedModel(tensor_parallel_classifier())
        train_step(model, *make_batch(8))
        return model, smp.DistributedOptimizer(sgd(model.parameters()))

    def of_all_after_the_partition():
        model = smp.DistributedModel(tensor_parallel_classifier())
        train_step(model, *make_batch(8))
        return model, smp.DistributedOptimizer(sgd([p for _, p in model.virtual_named_parameters()]))

    for build in (
        before_wrapping,
        wrapped_before_the_model,
        after_wrapping,
        from_the_user_s_module,
        after_the_partition,
        of_all_after_the_partition,
    ):
        model, optimizer = build()
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        assert held == {id(parameter) for parameter in model.parameters()}, build.__name__
        assert_parity(train(model, optimizer), expected, dtype=torch.float64)
        assert {id(parameter) for parameter in optimizer.state} == {id(parameter) for parameter in model.parameters()}
        if build is after_the_partition and smp.pp_size() > 1:
            with pytest.raises(SMPConfigError, match="were not built over the same parameters"):
                optimizer.state_dict()
        else:
            assert len(optimizer.state_dict()["state"]) == 4


class Old(nn.Module):
    """Is replaced by a registered class, with parameters of the same names or of others."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, size))

    def forward(self, x):
        return x @ self.weight


class New(smp.nn.DistributedModule):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size, size), 2.0))

    def forward(self, x):
        return x @ self.weight


class Other(New):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.kernel = nn.Parameter(self.weight.detach().clone())
        del self.weight


@on(TP2)
def test_parameters_that_were_replaced_are_remapped_or_refused():
    class ToOther(Old):
        pass

    smp.tp_register_with_module(Old, New)
    smp.tp_register_with_module(ToOther, Other)
    with smp.tensor_parallelism():
        net = nn.Sequential(Old(4))
    inner = sgd([{"params": net.parameters(), "lr": 0.5}])
    old = weakref.ref(net[0].weight)
    model = smp.DistributedModel(net)
    optimizer = smp.DistributedOptimizer(inner)
    assert isinstance(net[0], New) and inner.param_groups[0]["params"][0] is net[0].weight
    assert inner.param_groups[0]["lr"] == 0.5
    gc.collect()
    assert old() is None, "nothing keeps what was replaced"
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert not torch.equal(net[0].weight, torch.full((4, 4), 2.0))

    with smp.tensor_parallelism():
        net = nn.Sequential(ToOther(4))
    inner = sgd(net.parameters())
    smp.DistributedModel(net)
    with pytest.raises(
        SMPConfigError, match=r"(?s)parameter '0\.weight', which tensor parallelism has replaced.*right:"
    ):
        smp.DistributedOptimizer(inner)


# What it looks like


@on(*ALL)
def test_it_is_an_optimizer_of_the_original_class():
    class Own(torch.optim.AdamW):
        calls = 0

        def own_method(self, value):
            self.calls += value
            return self

    model = smp.DistributedModel(make_classifier())
    inner = Own(model.parameters(), lr=0.1)
    optimizer = smp.DistributedOptimizer(inner)
    for kind in (torch.optim.Optimizer, torch.optim.AdamW, Own, smp.DistributedOptimizer):
        assert isinstance(optimizer, kind)
    assert optimizer.optimizer is inner and optimizer.defaults is inner.defaults and optimizer.state is inner.state
    assert optimizer.own_method(2) is inner and inner.calls == 2 and optimizer.calls == 2
    assert optimizer._is_accelerate_prepared and optimizer.step_was_skipped is False
    assert optimizer.orig_state_dict()["param_groups"][0]["lr"] == 0.1
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = optimizer.no_such_thing
    train_step(model, *make_batch(8))
    optimizer.zero_grad(set_to_none=False)
    assert all(torch.count_nonzero(p.grad) == 0 for p in model.local_parameters())
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.local_parameters())
    count = []
    handle = optimizer.register_step_pre_hook(lambda *_: count.append(1))
    optimizer.step()
    handle.remove()
    optimizer.step()
    assert count == [1]
    assert "DistributedOptimizer" in repr(optimizer)


class Foreign:
    """Not a torch.optim.Optimizer: a script's own wrapper."""

    def __init__(self, inner):
        self.inner = inner
        self.param_groups, self.state = inner.param_groups, inner.state

    def step(self):
        self.inner.step()

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none)

    def special(self):
        return "special"


@on(PP2)
def test_an_object_that_only_behaves_like_an_optimizer():
    model = smp.DistributedModel(make_classifier())
    optimizer = smp.DistributedOptimizer(Foreign(sgd(model.parameters())))
    assert optimizer.special() == "special" and isinstance(optimizer, torch.optim.Optimizer)
    assert_parity(train(model, optimizer), plain_weights(sgd), dtype=torch.float64)


@on(*ALL)
def test_groups_that_are_added():
    def build(model):
        optimizer = sgd([{"params": model.get_submodule("first").parameters(), "lr": 0.2}])
        return optimizer, {"params": list(model.get_submodule("second").parameters()), "lr": 0.05}

    plain = make_classifier()
    plain_optimizer, group = build(plain)
    plain_optimizer.add_param_group(group)
    expected = train(plain, plain_optimizer, 2)
    for is_partitioned in (False, True):
        for is_inner in (False, True):
            model = smp.DistributedModel(make_classifier())
            inner, group = build(model.get_module())
            optimizer = smp.DistributedOptimizer(inner)
            if is_partitioned:
                train_step(model, *make_batch(8))
            (optimizer.optimizer if is_inner and not is_partitioned else optimizer).add_param_group(group)
            assert_parity(train(model, optimizer, 2), expected, dtype=torch.float64)
            assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.05]
            saved = optimizer.state_dict()
            assert [group["params"] for group in saved["param_groups"]] == [[0, 1], [2, 3]]
            with pytest.raises(SMPConfigError, match=r"has 1 groups of \[2\] parameters, the optimizer 2 of \[2, 2\]"):
                optimizer.load_state_dict({"state": {}, "param_groups": saved["param_groups"][:1]})


# Schedulers

SCHEDULERS = {
    "StepLR": lambda optimizer: StepLR(optimizer, 1, gamma=0.5),
    "LambdaLR": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, max_lr=0.5, total_steps=10),
}


@on(*ALL)
def test_c061_schedulers_drive_the_rate_whichever_object_they_are_given():
    for name, make_scheduler in SCHEDULERS.items():
        plain = make_classifier()
        plain_optimizer = sgd(plain.parameters())
        plain_scheduler = make_scheduler(plain_optimizer)
        rates = []

        def note(scheduler=plain_scheduler, optimizer=plain_optimizer, rates=rates):
            scheduler.step()
            rates.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))

        expected = train(plain, plain_optimizer, after_step=note)
        for when in ("before wrapping", "wrapper", "inner"):
            net = make_classifier()
            inner = sgd(net.parameters())
            scheduler = make_scheduler(inner) if when == "before wrapping" else None
            model = smp.DistributedModel(net)
            optimizer = smp.DistributedOptimizer(inner)
            if scheduler is None:
                scheduler = make_scheduler(optimizer if when == "wrapper" else optimizer.optimizer)
            actual_rates = []

            def note_actual(scheduler=scheduler, optimizer=optimizer, rates=actual_rates):
                note(scheduler, optimizer, rates)

            state = train(model, optimizer, after_step=note_actual)
            assert actual_rates == rates, (name, when)
            assert_parity(state, expected, dtype=torch.float64)


@on(PP2)
def test_a_scheduler_that_watches_a_loss():
    model = smp.DistributedModel(make_classifier())
    optimizer = smp.DistributedOptimizer(sgd(model.parameters()))
    scheduler = ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    train(model, optimizer, 3, lambda: scheduler.step(1.0))
    assert optimizer.param_groups[0]["lr"] == 0.025


# States


@on(*ALL)
def test_an_optimizer_over_two_models():
    models = [smp.DistributedModel(make_classifier()) for _ in range(2)]
    untouched = smp.DistributedModel(make_classifier())
    optimizer = smp.DistributedOptimizer(sgd([p for model in models for p in model.parameters()]))
    plain = make_classifier()
    plain_optimizer = sgd(plain.parameters())
    for index, model in enumerate(models):
        optimizer.zero_grad()
        train_step(model, *make_batch(8))
        assert len(optimizer.param_groups[0]["params"]) >= len(list(models[0].local_parameters()))
        optimizer.step()
        if index == 0:
            plain_optimizer.zero_grad()
            mean_loss(plain, *make_batch(8)).backward()
            plain_optimizer.step()
            assert_parity(model.state_dict(), plain.state_dict(), dtype=torch.float64)
    held = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
    assert held == {id(parameter) for model in models for parameter in model.local_parameters()}
    saved = optimizer.state_dict()
    assert sorted(saved["state"]) == list(range(8))
    other = smp.DistributedOptimizer(sgd([p for _, p in untouched.virtual_named_parameters()]))
    other.load_state_dict({"state": {i: saved["state"][i] for i in range(4)}, "param_groups": _first_four(saved)})
    train_step(untouched, *make_batch(8))  # the state is taken at the partition of its own model
    assert len(other.state) == len(list(untouched.local_parameters()))


def _first_four(saved):
    return [{**saved["param_groups"][0], "params": [0, 1, 2, 3]}]


@on(PP2, TP2)
def test_local_states_are_indexed_as_in_the_whole_model():
    model = smp.DistributedModel(tensor_parallel_classifier())
    optimizer = smp.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=0.1))
    train(model, optimizer, 1)
    part = optimizer.local_state_dict()
    assert part["_smp_is_partial"] is True and part["param_groups"][0]["params"] == [0, 1, 2, 3]
    names = [name for name, _ in model.virtual_named_parameters()]
    local = dict(model.local_named_parameters())
    assert {names[index] for index in part["state"]} == set(local)
    for index, values in part["state"].items():
        assert values["exp_avg"].shape == local[names[index]].shape
    assert optimizer.local_state_dict(gather_if_shard=False).keys() == part.keys()
    whole = optimizer.state_dict()
    assert "_smp_is_partial" not in whole
    shapes = [tuple(parameter.shape) for parameter in make_classifier().parameters()]
    assert [tuple(whole["state"][index]["exp_avg"].shape) for index in range(4)] == shapes


@on(*ALL)
def test_a_dead_optimizer_is_forgotten():
    model = smp.DistributedModel(make_classifier())
    optimizer = smp.DistributedOptimizer(sgd(model.parameters()))
    before = len(runtime.current().live_optimizers())
    assert runtime.current().live_optimizers()[-1] is optimizer
    del optimizer
    gc.collect()
    assert len(runtime.current().live_optimizers()) < before
    train_step(model, *make_batch(8))


@on(SINGLE, PP2)
def test_parameters_of_no_wrapped_model_are_refused_or_named():
    model, other = smp.DistributedModel(make_classifier()), make_classifier()
    train_step(model, *make_batch(8))
    with pytest.raises(SMPConfigError, match="none of its 4 parameters"):
        smp.DistributedOptimizer(sgd(other.parameters())).step()
    optimizer = smp.DistributedOptimizer(sgd([*model.parameters(), nn.Parameter(torch.ones(3))]))
    with unittest.mock.patch.object(logging.getLogger("modelparallel"), "warning") as warned:
        optimizer.step()
        optimizer.step()
    assert warned.call_count == 1 and "(3,)" in warned.call_args.args


@on(SINGLE, PP2)
def test_a_parameter_that_is_listed_twice_is_updated_once():
    with pytest.warns(UserWarning, match="duplicate parameters"):  # of torch
        model = smp.DistributedModel(make_classifier())
        parameters = list(model.parameters())
        inner = sgd([parameters[0], *parameters])
    optimizer = smp.DistributedOptimizer(inner)
    assert len(optimizer.param_groups[0]["params"]) == len(parameters)
    assert_parity(train(model, optimizer), plain_weights(sgd), dtype=torch.float64)
