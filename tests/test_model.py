"""smp.DistributedModel: wrapping, partition, hooks, what it gives out (smp-api sections 5, 6 and 18)."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modelparallel as smp
from distributed_run import assert_equal_over, merged_gradients
from logs import logged_lines
from modelparallel.errors import PartitionError, SMPConfigError, StepUsageError
from modelparallel.model.views import alias_inherited_forwards
from modelparallel.training import runtime
from parity import assert_parity
from rank_tests import RankTests, on
from small_models import Classifier, make_batch, make_classifier, mean_loss, train_step
from stateful_model import train_step as tied_step
from training import sgd

DP2 = RankTests(2, {})
TP2 = RankTests(2, {"tensor_parallel_degree": 2})
TP2_DP4 = RankTests(4, {"tensor_parallel_degree": 2})
PP2 = RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 2})
PP2_TP2 = RankTests(4, {"pipeline_parallel_degree": 2, "tensor_parallel_degree": 2, "microbatches": 2})
ZERO_BUBBLE = RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 2, "pipeline": "zero_bubble"})
MANUAL = RankTests(2, {"pipeline_parallel_degree": 2, "auto_partition": False, "default_partition": 0})
FLAT = (DP2, TP2)
PIPELINED = (PP2, PP2_TP2)


def tensor_parallel_classifier() -> Classifier:
    """Its first layer is split where there are tensor-parallel ranks."""
    model = make_classifier()
    smp.set_tensor_parallelism(model.first, True)
    return model


class Doubled(Classifier):
    """Calls its base class's forward as scripts for the original had to."""

    def forward(self, *args, **kwargs):
        return 2 * super()._orig_forward(*args, **kwargs)


class Tied(nn.Module):
    """Embedding and head share one weight, with a layer in between."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh())
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("offset", torch.full((12,), 0.5))
        self.register_buffer("temporary", torch.ones(2), persistent=False)

    def forward(self, ids):
        return self.head(self.body(self.embedding(ids))) * self.scale + self.offset


def make_tied() -> Tied:
    torch.manual_seed(2)
    return Tied().double()


def run_tied_step(model) -> None:
    tied_step(model, torch.arange(8))


# Without pipelining


@on(*FLAT, TP2_DP4)
def test_c033_without_pipelining_the_model_is_ready_at_once():
    torch.manual_seed(smp.rank())  # every rank starts from other weights
    net = Classifier().double()
    before = net.second.weight.detach().clone()
    smp.set_tensor_parallelism(net.first, True)
    model = smp.DistributedModel(net)
    assert model.partitioned is True
    device = runtime.current().session.device
    assert all(parameter.device == device for parameter in model.parameters())
    replicated = {name: parameter.detach() for name, parameter in model.default_reducer_named_parameters()}
    assert "second.weight" in replicated
    assert_equal_over(smp.DP_GROUP, replicated)
    sliced = {name: parameter.detach() for name, parameter in model.scaled_batch_reducer_named_parameters()}
    assert_equal_over(smp.RDP_GROUP, sliced)
    if smp.rank() == 0:
        torch.testing.assert_close(model.get_module().second.weight.detach(), before, rtol=0, atol=0)


@on(*FLAT, TP2_DP4)
def test_c034_plain_backward_outside_a_step_gives_final_gradients():
    model = smp.DistributedModel(tensor_parallel_classifier())
    optimizer = smp.DistributedOptimizer(sgd(model.parameters()))
    plain = make_classifier()
    plain_optimizer = sgd(plain.parameters())
    for step in range(3):
        batches = [make_batch(6 + step, seed=10 * step + rank) for rank in range(smp.dp_size())]
        optimizer.zero_grad()
        plain_optimizer.zero_grad()
        x, y = batches[smp.dp_rank()]
        F.nll_loss(model(x), y, reduction="mean").backward()
        (sum(mean_loss(plain, *batch) for batch in batches) / smp.dp_size()).backward()
        replicated = {name: parameter.grad for name, parameter in model.default_reducer_named_parameters()}
        assert_equal_over(smp.DP_GROUP, replicated)
        expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
        assert_parity(merged_gradients(model), expected, dtype=torch.float64)
        optimizer.step()
        plain_optimizer.step()
    assert_parity(model.state_dict(), plain.state_dict(), dtype=torch.float64)


# The partition


@on(*PIPELINED)
def test_c035_calls_outside_a_step_function_stop_with_advice():
    model = smp.DistributedModel(make_classifier())
    x, y = make_batch(4)
    for _ in range(2):  # before and after the partition
        with pytest.raises(StepUsageError, match=r"(?s)only be called inside a step function.*@smp\.step"):
            model(x)
        with pytest.raises(StepUsageError, match=r"@smp\.step"):
            model.backward(torch.zeros(()))
        train_step(model, x, y)


@on(*PIPELINED)
def test_c036_the_first_step_call_partitions_and_runs_the_hooks_once():
    model = smp.DistributedModel(make_classifier())
    events = []
    optimizer = smp.DistributedOptimizer(sgd(model.parameters()))
    module = model.get_module()
    module.first.register_forward_hook(lambda *_: events.append("forward"))

    def hook(hooked, given):
        assert hooked is model and given is optimizer and hooked.partitioned
        assert len(list(hooked.local_parameters())) == 2
        events.append("partition")

    model.register_post_partition_hook(hook)
    model.register_post_partition_hook(lambda *_: events.append("removed")).remove()
    model.register_post_step_hook(lambda hooked, given: events.append(("step", hooked is model, given is optimizer)))
    x, y = make_batch(4)
    assert model.partitioned is False and model.partition_plan is None
    train_step(model, x, y)
    assert model.partitioned is True and model.partition_plan is not None
    forwards = ["forward"] * 2  # hooks of a placed module run on every stage; the trace leaves nothing behind
    assert events == ["partition", *forwards, ("step", True, True)]
    train_step(model, x, y)
    assert events == ["partition", *forwards, ("step", True, True), *forwards]


@on(*FLAT)
def test_hooks_without_pipelining_run_once_at_the_first_call():
    model = smp.DistributedModel(make_classifier())
    events: list[Any] = []
    model.register_post_partition_hook(lambda hooked, optimizer: events.append(("partition", optimizer)))
    model.register_post_step_hook(lambda hooked, optimizer: events.append(("step", optimizer)))
    x, y = make_batch(4)
    model(x)
    assert events == [("partition", None)]
    model(x)
    train_step(model, x, y)
    train_step(model, x, y)
    assert events == [("partition", None), ("step", None)]

    other = smp.DistributedModel(make_classifier())
    other.register_post_partition_hook(lambda hooked, optimizer: events.append("other"))
    train_step(other, x, y)
    assert events[2:] == ["other"]


@on(*PIPELINED, ZERO_BUBBLE)
def test_c037_every_name_is_on_exactly_one_stage():
    model = smp.DistributedModel(make_tied())
    names = [name for name, _ in make_tied().named_parameters()]
    for what in ("local_named_parameters", "local_parameters", "local_buffers", "local_named_buffers", "local_modules"):
        with pytest.raises(PartitionError, match=f"model.{what}"):
            list(getattr(model, what)())
    assert [name for name, _ in model.named_parameters()] == names
    run_tied_step(model)
    local = [name for name, _ in model.local_named_parameters()]
    assert [name for name, _ in model.named_parameters()] == local
    assert [id(parameter) for parameter in model.local_parameters()] == [id(p) for _, p in model.named_parameters()]
    everywhere = smp.allgather(local, smp.PP_GROUP)
    assert all(everywhere), "each stage holds something"
    assert sorted(name for part in everywhere for name in part) == sorted(names)
    assert [name for name, _ in model.virtual_named_parameters()] == names
    homes = model.partition_plan
    assert homes.home_of_module("embedding") == homes.home_of_module("head"), "tied weights sit together"
    both = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert ("head.weight" in both) == ("embedding.weight" in both) == ("embedding.weight" in local)


@on(*PIPELINED)
def test_c037_buffers_and_modules_of_a_stage():
    model = smp.DistributedModel(make_tied())
    run_tied_step(model)
    buffers = dict(model.local_named_buffers())
    assert [id(buffer) for buffer in model.local_buffers()] == [id(buffer) for buffer in buffers.values()]
    everywhere = smp.allgather(sorted(buffers), smp.PP_GROUP)
    norm = [part for part in everywhere if "body.1.running_mean" in part]
    assert len(norm) == 1, "statistics have one home"
    assert set().union(*everywhere) == {name for name, _ in make_tied().named_buffers()}
    modules = dict(model.local_named_modules())
    assert ("body.0" in modules) == ("body.0.weight" in dict(model.local_named_parameters()))
    assert [id(module) for module in model.local_modules()] == [id(module) for module in modules.values()]


@on(*PIPELINED)
def test_c037_memory_of_a_stage_is_that_of_its_parameters():
    model = smp.DistributedModel(make_tied())
    run_tied_step(model)
    local = {id(parameter) for parameter in model.local_parameters()}
    foreign = [parameter for _, parameter in model.virtual_named_parameters() if id(parameter) not in local]
    assert foreign and all(parameter.untyped_storage().nbytes() <= 8 for parameter in foreign)
    assert all(parameter.grad is None for parameter in foreign)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.virtual_named_parameters()}
    assert shapes == {name: tuple(parameter.shape) for name, parameter in make_tied().named_parameters()}


@on(*PIPELINED)
def test_c038_moving_the_model_before_the_partition_changes_nothing():
    net = make_classifier()
    model = smp.DistributedModel(net)
    for moved in (model.to("meta"), model.to(torch.device("meta")), model.to(device="meta")):
        assert moved is model
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    assert model.to(torch.float32).get_module().first.weight.dtype == torch.float32, "a dtype is no move"
    assert model.double() is model and net.first.weight.dtype == torch.float64
    train_step(model, *make_batch(4))


@on(*PIPELINED, *FLAT)
def test_c039_wrapping_twice_and_what_cannot_be_wrapped():
    model = smp.DistributedModel(make_classifier())
    with pytest.raises(StepUsageError, match="wrap the model once"):
        smp.DistributedModel(model)
    with pytest.raises(StepUsageError, match="contains a DistributedModel"):
        smp.DistributedModel(nn.Sequential(model))
    with pytest.raises(SMPConfigError, match=r"expected an nn\.Module, got dict"):
        smp.DistributedModel({})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(SMPConfigError, match="ScriptModule"):
        smp.DistributedModel(script)
    # A model that was refused leaves nothing behind.
    train_step(model, *make_batch(4))


@on(DP2)
def test_a_user_s_own_data_parallel_wrapper_is_refused():
    inner = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    for wrapped in (inner, nn.Sequential(inner)):
        with pytest.raises(StepUsageError, match="DistributedDataParallel"):
            smp.DistributedModel(wrapped)


@on(PP2, DP2)
def test_c048_execution_times_are_not_traced_on_the_cpu():
    with pytest.raises(SMPConfigError, match='trace_execution_times=True needs trace_device="gpu"'):
        smp.DistributedModel(make_classifier(), trace_device="cpu", trace_execution_times=True)
    for arguments, text in (
        ({"trace_device": "tpu"}, "trace_device"),
        ({"backward_passes_per_step": 0}, "backward_passes_per_step"),
        ({"backward_passes_per_step": True}, "backward_passes_per_step"),
        ({"bucket_cap_mb": 0}, "bucket_cap_mb"),
    ):
        with pytest.raises(SMPConfigError, match=text):
            smp.DistributedModel(make_classifier(), **arguments)


@on(PP2)
def test_all_arguments_of_the_constructor_train():
    x, y = make_batch(8)
    expected = None
    for arguments in (
        {"trace_device": "cpu"},
        {"trace_device": "gpu", "trace_execution_times": True, "trace_memory_usage": True},
        {"gradient_as_bucket_view": True, "find_unused_parameters": True, "bucket_cap_mb": 0.0001},
        {"broadcast_buffers": False, "overlapping_allreduce": False},
    ):
        model = smp.DistributedModel(make_classifier(), **arguments)
        train_step(model, x, y)
        gradients = merged_gradients(model)
        expected = expected or gradients
        assert_parity(gradients, expected, dtype=torch.float64)


# Manual partition


@on(MANUAL)
def test_c055_set_partition_after_wrapping_moves_a_subtree():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            with smp.partition(1):
                self.late = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            self.early = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
            self.rest = nn.Linear(4, 10)

        def forward(self, x):
            return F.log_softmax(self.rest(self.late(self.early(x))), 1)

    torch.manual_seed(0)
    net = Nested().double()
    torch.manual_seed(0)
    plain = Nested().double()
    model = smp.DistributedModel(net)
    smp.set_partition(model.get_module().early[1], 1)
    smp.set_partition(net.late[0], 0)
    for index in (2, -1, True, "1"):
        with pytest.raises(PartitionError, match="there is no partition"):
            smp.set_partition(net.rest, index)
    with pytest.raises(PartitionError, match=r"is part of no smp\.DistributedModel"):
        smp.set_partition(nn.Linear(2, 2), 1)
    x, y = make_batch(4)
    train_step(model, x, y)
    homes = {name: model.partition_plan.home_of_module(name) for name in ("early.0", "early.1.0", "late.0", "late.1")}
    assert homes == {"early.0": 0, "early.1.0": 1, "late.0": 0, "late.1": 1}
    assert model.partition_plan.home_of_module("rest") == 0
    mean_loss(plain, x, y).backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    assert_parity(merged_gradients(model), expected, dtype=torch.float64)
    with pytest.raises(PartitionError, match="already partitioned"):
        smp.set_partition(net.rest, 1)


# What the wrapper gives out


def test_orig_forward_is_the_inherited_forward():
    torch.manual_seed(0)
    plain = Classifier()
    torch.manual_seed(0)
    doubled = Doubled()
    x = make_batch(4)[0].float()
    alias_inherited_forwards(doubled)
    assert torch.equal(doubled(x), 2 * plain(x))
    assert not hasattr(nn.Linear, "_orig_forward")


@on(*PIPELINED, *FLAT)
def test_names_and_the_user_s_module_at_every_depth():
    net = make_tied()
    model = smp.DistributedModel(net)
    assert isinstance(model, nn.Module) and isinstance(model, smp.model.DistributedModel)
    assert model.get_module() is net and model.module is net
    for depth in (model.module, model.module.module, model.module.module.module):
        assert isinstance(depth, Tied) and depth.head is net.head and depth.scale is net.scale
    unwrapped, steps = model, 0
    while hasattr(unwrapped, "module") and steps < 10:
        unwrapped, steps = unwrapped.module, steps + 1
    assert steps < 10 and isinstance(unwrapped, Tied)
    assert "module" not in net.state_dict() and "module" not in dict(net.named_modules())
    assert [name for name, _ in net.named_children()] == ["embedding", "body", "head"]
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in make_tied().named_parameters()]
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in make_tied().named_buffers()]
    model.module.module.extra = 3
    assert net.extra == 3
    assert list(model.distributed_modules()) == []


class WithOwnModule(nn.Module):
    """A user's class that has a ``module`` itself."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(4, 10)

    def forward(self, x):
        return F.log_softmax(self.module(x), 1)


@on(*PIPELINED)
def test_a_user_s_own_attribute_module_stays():
    torch.manual_seed(0)
    model = smp.DistributedModel(nn.Sequential(WithOwnModule(), nn.Linear(10, 10)).double())
    train_step(model, *make_batch(4))
    assert isinstance(model.module[0].module, nn.Linear)
    model = smp.DistributedModel(WithOwnModule().double())
    assert isinstance(model.module.module, nn.Linear)
    assert [name for name, _ in model.named_parameters()] == ["module.weight", "module.bias"]


@on(TP2, TP2_DP4, PP2_TP2)
def test_the_reducer_sets_divide_the_parameters():
    model = smp.DistributedModel(tensor_parallel_classifier())
    if smp.pp_size() > 1:
        train_step(model, *make_batch(4))
    net = model.get_module()
    assert [type(module).__name__ for module in model.distributed_modules()] == ["DistributedLinear"]
    assert model.is_distributed_parameter(net.first.weight) and not model.is_distributed_parameter(net.second.weight)
    assert model.is_scaled_batch_parameter(net.first.weight) and not model.is_scaled_batch_parameter(net.first.bias)
    assert not model.is_distributed_buffer(torch.zeros(1)) and not model.is_scaled_batch_buffer(torch.zeros(1))
    default = dict(model.default_reducer_named_parameters())
    scaled = dict(model.scaled_batch_reducer_named_parameters())
    assert not set(default) & set(scaled)
    assert {**default, **scaled} == dict(model.local_named_parameters())
    everywhere = set().union(*smp.allgather(set(scaled), smp.PP_GROUP))
    assert everywhere == {"first.weight"}


@on(*PIPELINED, *FLAT)
def test_moving_the_whole_model_to_the_cpu():
    model = smp.DistributedModel(make_tied())
    run_tied_step(model)
    whole = model.state_dict()
    assert model.cpu() is model
    torch.testing.assert_close(dict(model.get_module().state_dict()), whole, rtol=0, atol=0)
    if smp.pp_size() > 1:
        with pytest.raises(StepUsageError, match=r"model\.cpu\(\)"):
            run_tied_step(model)


@on(PP2)
def test_the_plan_is_logged_as_a_table():
    with logged_lines() as lines:
        train_step(smp.DistributedModel(make_classifier()), *make_batch(4))
    text = "\n".join(lines)
    assert text.count("Partition assignments:") == (1 if smp.rank() == 0 else 0)
    if smp.rank() == 0:
        assert "first" in text and "second" in text
