"""Delayed construction: no storage until placement, and then the values of eager construction (smp-api section 12)."""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import modelparallel as smp
import zoo_catalogue
from logs import logged_lines
from modelparallel.deferred.deferred import ShapesOnlyError, is_deferred, recording, shapes_only
from modelparallel.deferred.host_heap import trim_heap
from modelparallel.deferred.placement import adopt_meta_tensors, place_deferred
from modelparallel.errors import DeferredTensorError, SMPConfigError
from modelparallel.partitioning import find_units, trace_step
from pool import run_ranks
from rank_tests import RankTests, on

CPU = torch.device("cpu")


class Custom(nn.Module):
    """Initialisers that scripts write themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.empty(6, 8))
        nn.init.trunc_normal_(self.first, std=0.02)
        self.second = nn.Parameter(torch.Tensor(8, 8))
        nn.init.orthogonal_(self.second)
        self.wide = nn.Parameter(torch.empty(3, 8))
        nn.init.orthogonal_(self.wide, gain=2.0)
        self.third = nn.Parameter(torch.randn(8, 3) * self.second.detach().mean() + 1)
        self.gain = nn.Parameter(torch.full((3,), 1e-4), requires_grad=False)
        self.rough = nn.Parameter(torch.rand(5, 4, dtype=torch.float32).to(torch.bfloat16).clamp_(0.2, 0.8))
        self.first.data[2].zero_()
        self.first.data[:, 1:3].copy_(self.second[:6, :2].detach())
        nn.init.sparse_(nn.Parameter(torch.empty(4, 4)), 0.5)
        self.after_draws = nn.Parameter(torch.randint(0, 9, (7,)).float().exponential_())
        both = torch.randn(4, 6)
        self.left, self.right = (nn.Parameter(part.clone()) for part in both.split(3, dim=1))


class Buffers(nn.Module):
    """Tables of constants, made in ways that need values, registered and not."""

    def __init__(self) -> None:
        super().__init__()
        coordinates = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")).flatten(1)
        relative = coordinates[:, :, None] - coordinates[:, None, :]
        self.register_buffer("relative", relative.permute(1, 2, 0).contiguous().sum(-1))
        mask = torch.zeros(4, 4)
        mask[torch.ones(4, 4).triu(1) == 1] = float("-inf")
        self.register_buffer("mask", mask, persistent=False)
        self.rates = [rate.item() for rate in torch.linspace(0, 0.3, 4)]
        self.bias = nn.Parameter(torch.zeros(int(relative.max()) + 1 + len(torch.arange(5).nonzero())))
        self.frequencies = 1.0 / 10000 ** (torch.arange(0, 8, 2).float() / 8)
        self.tables = {"sines": [torch.arange(4).float().sin()]}
        self.norm = nn.BatchNorm1d(4)


class Tied(nn.Module):
    """One parameter under two names, two parameters on one storage, and a weight drawn outside torch."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6, padding_idx=1)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embedding.weight
        self.twin = nn.Parameter(self.layers[0].weight.data)
        self.view = nn.Parameter(self.layers[1].weight.data.t())
        with torch.no_grad():
            self.layers[0].bias.fill_(random.Random(3).random())
            self.layers[1].weight[0, :3] = torch.tensor([1.0, 2.0, 3.0])
        self.layers[1].weight._is_hf_initialized = True


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.LSTM(8, 4, 2), nn.Conv2d(2, 4, 3), nn.Bilinear(2, 3, 4))


def normalised() -> nn.Module:
    module = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Linear(5, 3))
    nn.utils.parametrizations.spectral_norm(module[1])
    return module


def gpt2() -> nn.Module:
    from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

    from huggingface_models import gpt2_config

    return GPT2LMHeadModel(gpt2_config())


def with_a_generator() -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    module = nn.Linear(40, 30)
    nn.init.normal_(module.weight, generator=generator)
    module.bias.data = torch.rand(30, generator=generator)
    module.noise = nn.Parameter(nn.functional.dropout(torch.ones(50), 0.5))
    return module


BUILDERS = [Custom, Buffers, Tied, encoder, normalised, gpt2, with_a_generator]


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    assert list(tensors_of(found)) == list(tensors_of(expected))
    for name, tensor in tensors_of(expected).items():
        other = tensors_of(found)[name]
        assert type(other) is type(tensor) and torch.equal(other, tensor), name
        assert other.dtype == tensor.dtype and other.stride() == tensor.stride(), name
        assert other.requires_grad == tensor.requires_grad, name


@pytest.mark.parametrize("build", BUILDERS)
def test_c094_values_are_those_of_eager_construction(build):
    torch.manual_seed(11)
    eager = build()
    after = torch.get_rng_state()
    torch.manual_seed(11)
    with smp.delay_param_initialization():
        delayed = build()
    # What is drawn next is drawn from the same state, and the replay leaves that alone.
    assert torch.equal(torch.get_rng_state(), after)
    parameters = dict(delayed.named_parameters())
    assert all(is_deferred(parameter) for parameter in parameters.values())
    assert all(parameter.untyped_storage().device.type == "meta" for parameter in parameters.values())
    assert {name: tuple(parameter.shape) for name, parameter in parameters.items()} == {
        name: tuple(parameter.shape) for name, parameter in eager.named_parameters()
    }
    place_deferred(delayed, CPU)
    assert torch.equal(torch.get_rng_state(), after)
    assert_same(delayed, eager)
    for name, parameter in delayed.named_parameters():
        assert parameter is parameters[name], "the object stays the same one"


@pytest.mark.parametrize("name", ["swinv2", "bart", "mamba2", "torch_lstm", "rwkv", "unet"])
def test_c094_models_of_the_zoo(name):
    check_model_of_the_zoo(name)


@pytest.mark.slow
def test_c094_all_models_of_the_zoo():
    for name in zoo_catalogue.ZOO:
        check_model_of_the_zoo(name)


def check_model_of_the_zoo(name):
    entry, default_dtype = zoo_catalogue.ZOO[name], torch.get_default_dtype()
    torch.set_default_dtype(entry.default_dtype)
    try:
        torch.manual_seed(12)
        eager = entry.make_model()
        torch.manual_seed(12)
        with smp.delay_param_initialization():
            delayed = entry.make_model()
        if name in TRACED_ALIKE:
            compare_traces(entry, delayed, eager)
        place_deferred(delayed, CPU)
        assert_same(delayed, eager)
    finally:
        torch.set_default_dtype(default_dtype)


TRACED_ALIKE = ("bart", "mamba2", "torch_lstm", "rwkv", "unet")


def compare_traces(entry, delayed, eager):
    """What the partitioner learns of a model without storage is what it learns of the model that runs."""
    traces = []
    for model in (copy.deepcopy(eager).double(), copy.deepcopy(delayed).double()):
        batch, units = entry.make_batch(0), find_units(model)
        with shapes_only() if is_deferred(next(model.parameters())) else contextlib.nullcontext():
            traces.append(trace_step(model, units, functools.partial(entry.body, model, *batch)))
    if not meta_attention_has_the_sizes_of_the_real_one():
        traces = [replace(trace, units=[replace(unit, activation_bytes=0) for unit in trace.units]) for trace in traces]
    assert traces[0] == traces[1]


def meta_attention_has_the_sizes_of_the_real_one():
    """In torch 2.11 it keeps a logsumexp in float32, whatever the dtype is."""
    q = torch.empty(1, 1, 2, 8, dtype=torch.float64, device="meta")
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[1].dtype == torch.float64


def test_plain_attributes_shared_storage_and_marks_of_scripts_survive():
    torch.manual_seed(0)
    with smp.delay_param_initialization():
        buffers, tied = Buffers(), Tied()
    place_deferred(buffers, CPU)
    place_deferred(tied, CPU)
    eager = Buffers()
    assert type(buffers.frequencies) is torch.Tensor and torch.equal(buffers.frequencies, eager.frequencies)
    assert torch.equal(buffers.tables["sines"][0], eager.tables["sines"][0]) and buffers.rates == eager.rates
    assert tied.head.weight is tied.embedding.weight
    assert tied.twin.data_ptr() == tied.layers[0].weight.data_ptr()
    assert tied.view.data_ptr() == tied.layers[1].weight.data_ptr() and tied.view.stride() == (1, 6)
    assert tied.layers[1].weight._is_hf_initialized and "_is_param" not in tied.layers[1].weight.__dict__


def test_what_is_done_to_a_model_between_construction_and_placement():
    def finish(module):
        module.apply(lambda part: nn.init.xavier_uniform_(part.weight) if isinstance(part, nn.Linear) else None)
        module.half()
        module.layers[0].bias.requires_grad_(False)
        with torch.no_grad():
            module.layers[1].weight.mul_(2).clamp_(max=0.5)
            module.layers[0].weight.copy_(module.layers[1].weight.t())
        return copy.deepcopy(module)

    torch.manual_seed(2)
    expected = finish(Tied())
    torch.manual_seed(2)
    with smp.delay_param_initialization():
        model = Tied()
    model = finish(model)
    assert is_deferred(model.head.weight) and model.head.weight is model.embedding.weight
    assert model.head.weight.dtype == torch.float16
    place_deferred(model, CPU)
    assert_same(model, expected)


def test_values_are_made_for_the_moment_when_they_are_asked_for():
    torch.manual_seed(4)
    eager = nn.Linear(3, 2)
    torch.manual_seed(4)
    with smp.delay_param_initialization():
        layer = nn.Linear(3, 2)
    weight = layer.weight
    assert weight[0, 1].item() == eager.weight[0, 1].item()
    assert repr(weight) == repr(eager.weight) and weight.tolist() == eager.weight.tolist()
    assert bool((weight == eager.weight).all()) and torch.equal(weight, eager.weight)
    assert (weight.detach().numpy() == eager.weight.detach().numpy()).all()
    x = torch.randn(5, 3)
    assert torch.equal(layer(x), eager(x)), "a call computes with the values"
    loaded = pickle.loads(pickle.dumps(weight))
    assert type(loaded) is nn.Parameter and torch.equal(loaded, eager.weight)
    assert is_deferred(weight), "and none of that has placed it"


def test_gradients_hooks_and_optimizers_follow_the_parameter():
    torch.manual_seed(4)
    with smp.delay_param_initialization():
        layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    seen = []
    layer.weight.register_hook(lambda gradient: seen.append("hook"))
    layer.weight.register_post_accumulate_grad_hook(lambda parameter: seen.append("post"))
    early = layer(torch.ones(2, 3)).sum()
    early.backward(retain_graph=True)
    gradient = layer.weight.grad.clone()
    assert seen == ["hook", "post"]
    place_deferred(layer, CPU)
    assert torch.equal(layer.weight.grad, gradient)
    layer(torch.ones(2, 3)).sum().backward()
    assert seen == ["hook", "post"] * 2 and torch.equal(layer.weight.grad, 2 * gradient)
    with pytest.raises(RuntimeError, match="before the parameters of the model were placed"):
        early.backward()
    before = layer.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(layer.weight, before)


def test_assigning_data_gives_storage_and_the_object_stays():
    with smp.delay_param_initialization():
        layer = nn.Linear(3, 2)
    weight = layer.weight
    weight.data = torch.ones(2, 3)
    assert type(weight) is nn.Parameter and torch.equal(weight, torch.ones(2, 3)) and weight.requires_grad


def test_contexts_nest_and_decorate():
    @smp.delayed_parameter_initialization()
    def build(depth):
        return nn.ModuleList([nn.Linear(2, 2)] + ([build(depth - 1)] if depth else []))

    built = build(2)
    assert all(is_deferred(parameter) for parameter in built.parameters()) and not is_deferred(torch.zeros(1))
    context = smp.delay_param_initialization()
    with context:
        with smp.delay_param_initialization(enabled=False):
            assert not is_deferred(torch.zeros(2))
        with context:
            assert is_deferred(torch.zeros(2))
        assert is_deferred(torch.zeros(2))
    with pytest.raises(ValueError, match="from inside"), context:
        raise ValueError("from inside")
    assert not is_deferred(torch.zeros(2))
    with pytest.raises(SMPConfigError, match="enabled must be a bool"):
        smp.delay_param_initialization(nn.Linear(1, 1))


def test_a_tensor_that_changes_after_it_was_copied_is_an_error():
    values = torch.randn(200, 200)
    with smp.delay_param_initialization():
        layer = nn.Linear(200, 200)
    with torch.no_grad():
        layer.weight.copy_(values)
    values.add_(1)
    with pytest.raises(DeferredTensorError, match=r"\(200, 200\).*changed before the parameter was placed"):
        place_deferred(layer, CPU)


def test_shapes_only_never_makes_a_value():
    with smp.delay_param_initialization():
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 2))
    state = torch.get_rng_state()
    with shapes_only():
        output = model(torch.randn(3, 4))
        loss = nn.functional.cross_entropy(output, torch.tensor([0, 1, 0]))
        assert output.shape == (3, 2) and loss.shape == () and loss.requires_grad
        for needs_a_value in (loss.item, lambda: print(loss), lambda: bool(loss > 0)):
            with pytest.raises(ShapesOnlyError):
                needs_a_value()
    with pytest.raises(ShapesOnlyError, match="is_tracing"):
        loss.item()
    torch.set_rng_state(state)
    place_deferred(model, CPU)
    assert torch.equal(model[1].running_mean, torch.zeros(6)), "nothing was written"


# A model on the meta device


def test_meta_models_are_initialised_by_their_modules():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.MultiheadAttention(4, 2))
    adopt_meta_tensors(model, CPU)
    torch.manual_seed(1)
    place_deferred(model, CPU)
    expected = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.MultiheadAttention(4, 2))
    torch.manual_seed(1)
    for part in (expected[0], expected[1]):
        part.reset_parameters()
    expected[2]._reset_parameters()
    expected[2].out_proj.reset_parameters()
    names = [name for name in tensors_of(expected) if not name.startswith("2.out_proj")]
    for name in names:
        assert torch.equal(tensors_of(model)[name], tensors_of(expected)[name]), name


def test_meta_models_can_be_loaded_before_they_are_placed():
    with torch.device("meta"):
        model = nn.ModuleDict({"custom": Shaped(), "linear": nn.Linear(3, 2)})
    adopt_meta_tensors(model, CPU)
    state = {f"custom.{name}": value for name, value in Shaped().state_dict().items()}
    model.load_state_dict({**state, "linear.weight": torch.ones(2, 3)}, strict=False)
    torch.manual_seed(7)
    place_deferred(model, CPU)
    assert torch.equal(model["custom"].table, state["custom.table"])
    assert torch.equal(model["linear"].weight, torch.ones(2, 3)), "what was loaded is not initialised again"
    torch.manual_seed(7)
    assert torch.equal(model["linear"].bias, nn.Linear(3, 2).bias)


class Shaped(nn.Module):
    """It does not say how to initialise itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 2))


def test_meta_parameters_without_values_are_an_error_that_names_them():
    with torch.device("meta"):
        model = nn.ModuleDict({"inner": Shaped()})
    adopt_meta_tensors(model, CPU)
    with pytest.raises(DeferredTensorError, match=r"'inner.table' was created on the meta device.*load a state dict"):
        place_deferred(model, CPU)


# model_creation


def test_c095_model_creation_sets_the_dtype_and_ignores_keywords():
    with smp.model_creation(dtype=torch.float16):
        layer = nn.Linear(3, 2)
    assert layer.weight.dtype == torch.float16 and torch.get_default_dtype() == torch.float32
    with pytest.raises(KeyError), smp.model_creation(dtype=torch.bfloat16):
        raise KeyError
    assert torch.get_default_dtype() == torch.float32
    with smp.model_creation(tensor_parallelism=False, x=1):
        plain = nn.Linear(3, 2)
    assert "_smp_tensor_parallel" not in plain.__dict__ and plain.weight.dtype == torch.float32
    with smp.model_creation(True, fused_softmax=False):
        marked = nn.Linear(3, 2)
    assert marked.__dict__["_smp_tensor_parallel"] == (True, {"fused_softmax": False})

    @smp.model_creation(dtype=torch.float64)
    def build():
        return nn.Linear(2, 2)

    assert build().weight.dtype == torch.float64 and torch.get_default_dtype() == torch.float32
    for wrong in (torch.int64, "float16"):
        with pytest.raises(SMPConfigError, match="dtype must be a floating-point"):
            smp.model_creation(dtype=wrong)
    with pytest.raises(SMPConfigError, match="tensor_parallelism must be a bool"):
        smp.model_creation(torch.float16)


# In distributed models

DELAYED = {"delayed_parameter_initialization": True}
ONE = RankTests(1, {"microbatches": 2, **DELAYED})
DP2 = RankTests(2, {"microbatches": 2, **DELAYED})
PP2 = RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 2, **DELAYED})
PP3 = RankTests(
    3, {"pipeline_parallel_degree": 3, "microbatches": 2, "tied_weights": "replicate", **DELAYED}, is_slow=True
)
TP2 = RankTests(2, {"tensor_parallel_degree": 2, **DELAYED})
TP2_SPEED = RankTests(2, {"tensor_parallel_degree": 2, "optimize": "speed", **DELAYED}, is_slow=True)
PP2TP2 = RankTests(4, {"pipeline_parallel_degree": 2, "tensor_parallel_degree": 2, "microbatches": 2, **DELAYED})
BF16 = RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 2, "bf16": True, **DELAYED})
ALL = (ONE, DP2, PP2, PP3, TP2, TP2_SPEED, PP2TP2, BF16)


class Small(nn.Module):
    """Layers that are cut, layers that are not, buffers, and a tied table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        with smp.tensor_parallelism():
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
            self.inner = nn.Embedding(12, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.table.weight
        nn.init.trunc_normal_(self.blocks[1].weight, std=0.1)

    def forward(self, ids):
        hidden = self.table(ids) + self.inner(ids)
        for block in self.blocks:
            hidden = torch.tanh(block(hidden))
        return self.head(self.norm(hidden.transpose(1, 2)).transpose(1, 2))


@smp.step
def train_step(model, ids):
    logits = model(ids)
    loss = nn.functional.cross_entropy(getattr(logits, "logits", logits).flatten(0, 1), ids.flatten())
    model.backward(loss)
    return loss


def train(build, is_delayed):
    torch.manual_seed(21)
    with smp.model_creation() if is_delayed else smp.delay_param_initialization(enabled=False):
        module = build()
    assert all(is_deferred(parameter) == is_delayed for parameter in module.parameters())
    model = smp.DistributedModel(module)
    optimizer = smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9))
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        ids = torch.arange(8 * 6).reshape(8, 6).mul(step + 3) % 12
        losses.append(train_step(model, ids).reduce_mean())
        if step == 0:
            assert not any(is_deferred(tensor) for tensor in model.module.parameters())
        optimizer.step()
    return model, losses


def family_model():
    return smp.nn.DistributedTransformerLMHead(
        num_layers=2, num_attention_heads=2, attention_head_size=4, hidden_size=8, intermediate_size=16,
        vocab_size=12, num_positions=6, causal_mask_size=6, attention_dropout_prob=0.0, hidden_dropout_prob=0.0,
        embedding_dropout_prob=0.0, add_lm_head=True,
    )  # fmt: skip


def replaced_gpt2():
    with smp.tensor_parallelism():
        return gpt2()


@on(*ALL)
def test_c094_training_is_that_of_an_eager_model():
    for build in (Small, gpt2, replaced_gpt2):
        if smp.tp_size() == 1 and build is replaced_gpt2:
            continue
        eager, expected = train(build, False)
        model, losses = train(build, True)
        plans = [each.partition_plan for each in (eager, model)]
        if smp.tp_size() == 1:
            assert plans[0] is None or plans[0].modules == plans[1].modules, (build, plans)
        if plans[0] is None or plans[0].modules == plans[1].modules:
            assert all(torch.equal(*pair) for pair in zip(losses, expected, strict=True)), (build, losses, expected)
        state, other = model.state_dict(), eager.state_dict()
        assert list(state) == list(other)
        for name, value in other.items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6, msg=f"{build.__name__} {name}")


@on(PP2, PP3, PP2TP2)
def test_only_what_a_stage_holds_ever_gets_storage():
    torch.manual_seed(0)
    with smp.delay_param_initialization():
        module = Small()
    model = smp.DistributedModel(module)
    optimizer = smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    parameters = dict(model.module.named_parameters())
    assert all(is_deferred(parameter) for parameter in parameters.values()), "wrapping places nothing"
    train_step(model, torch.arange(24).reshape(4, 6) % 12)
    for name, parameter in model.module.named_parameters():
        assert parameter is parameters[name]
        num_elements = parameter.untyped_storage().nbytes() // parameter.element_size()
        assert num_elements == (parameter.numel() if model.is_local(parameter) else 1), name
    assert all(model.is_local(parameter) for group in optimizer.param_groups for parameter in group["params"])


@on(PP2, PP2TP2, ONE)
def test_a_state_dict_is_loaded_before_anything_is_placed():
    torch.manual_seed(33)
    source = Small()
    state = {name: value.clone() for name, value in source.state_dict().items()}
    for context in (smp.delay_param_initialization(), torch.device("meta")):
        torch.manual_seed(0)
        with context:
            module = Small()
        if smp.pp_size() == 1:
            module.load_state_dict(state, assign=isinstance(context, torch.device))
        model = smp.DistributedModel(module)
        if smp.pp_size() > 1:
            model.load_state_dict(state)
            assert all(is_deferred(parameter) for parameter in model.module.parameters())
        with torch.no_grad():
            forward(model, torch.arange(24).reshape(4, 6) % 12)
        found = model.state_dict()
        for name in (name for name in state if "running" not in name and "num_batches" not in name):
            assert torch.equal(found[name], state[name]), name


@smp.step
def forward(model, ids):
    return model(ids)


@on(PP2)
def test_a_body_that_needs_values_is_partitioned_by_sizes():

    @smp.step
    def reads_the_loss(model, ids):
        loss = model(ids).square().mean()
        if loss.item() > 0:
            model.backward(loss)
        return loss

    with logged_lines() as lines:
        with smp.delay_param_initialization():
            module = nn.Sequential(Small())  # of no structure that was planned before
        reads_the_loss(smp.DistributedModel(module), torch.arange(24).reshape(4, 6) % 12)
    if smp.pp_rank() == 0:
        assert any("partitioned by sizes alone" in line and "needs values" in line for line in lines), lines


# How much memory it takes

WIDTH, LAYERS = 1536, 16
MODULE = WIDTH * WIDTH * 4


def account(key):
    text = Path("/proc/self/status").read_text()
    return int(text.split(key + ":")[1].split()[0]) * 1024


def build_and_step(is_delayed, width):
    torch.manual_seed(0)
    before = account("VmRSS")
    with smp.delay_param_initialization(enabled=is_delayed):
        with smp.tensor_parallelism():
            module = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(LAYERS)))
    built = account("VmRSS") - before
    model = smp.DistributedModel(module)
    with torch.no_grad():
        forward(model, torch.randn(2, width))
    return built, account("VmHWM") - before


def measure_memory(is_delayed):
    build_and_step(is_delayed, 8)  # so that the code that it takes is in memory
    draw = random.Random(smp.rank())
    tensors = [torch.ones(draw.randint(1000, 500_000)) for _ in range(200)]
    kept = tensors[::2]  # a heap with holes, as that of a process that has done something
    del tensors
    trim_heap()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins now
    built, peak = build_and_step(is_delayed, WIDTH)
    assert len(kept) == 100
    return built, peak


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of the process")
@pytest.mark.parametrize(("axis", "degree", "skip_tracing"), [
    ("pipeline", 1, False), ("pipeline", 4, False), ("pipeline", 4, True), ("tensor", 4, False),
])  # fmt: skip
def test_c094_peak_of_host_memory_is_the_share_and_one_module(axis, degree, skip_tracing):
    parameters = {f"{axis}_parallel_degree": degree, "skip_tracing": skip_tracing, "ddp": True}
    share, margin = LAYERS * MODULE // degree, 8 * 1024 * 1024
    if degree == 1:
        for built, peak in run_ranks(measure_memory, 1, False, parameters=parameters):
            assert min(built, peak) > LAYERS * MODULE - margin, "what is measured is there"
    for built, peak in run_ranks(measure_memory, degree, True, parameters=parameters):
        assert built < MODULE + margin, f"construction took {built >> 20} MiB"
        # Of a slice the whole parameter is there for a moment.
        most = share + MODULE + margin
        assert peak < most, f"{peak >> 20} MiB at most, for a share of {share >> 20}"


def test_recording_draws_no_more_than_one_tensor_at_a_time():
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and not is_deferred(result) and not result.is_meta:
                sizes.append(result.nbytes)
            return result

    with Watch(), recording():
        nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 3)
    assert sum(sizes) < 1000
