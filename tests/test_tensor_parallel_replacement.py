"""Which marked modules are replaced when a model is wrapped, by what, and what the hooks see."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modelparallel.errors import DivergenceError, TensorParallelError
from modelparallel.job import registry
from modelparallel.nn import DistributedEmbedding, DistributedLinear, DistributedModule
from modelparallel.plan.rows import SplitSpec
from modelparallel.tensor_parallel.contexts import (
    partition,
    set_tensor_parallelism,
    tensor_parallelism,
    tp_register,
    tp_register_with_module,
)
from modelparallel.tensor_parallel.replace import replace_marked_modules
from pool import run_ranks
from split_layers import batch_of, everybody, imaginary


class Net(nn.Module):
    """The network of the MNIST examples."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1)
        self.conv2 = nn.Conv2d(32, 64, 3, 1)
        self.fc1: Any = nn.Linear(9216, 128)
        self.fc2: Any = nn.Linear(128, 10)


def test_c064_the_context_replaces_the_linear_layers_on_wrapping_and_leaves_convolutions():
    with tensor_parallelism():
        net = Net()
    fc1, weight = net.fc1, net.fc1.weight
    before = [type(child) for child in net.children()]
    assert before == [nn.Conv2d, nn.Conv2d, nn.Linear, nn.Linear]
    assert replace_marked_modules(net, imaginary(4)) is net
    assert [type(child) for child in net.children()] == [nn.Conv2d, nn.Conv2d, DistributedLinear, DistributedLinear]
    assert net.fc1 is fc1 and net.fc1.weight is weight, "references and optimizers go on holding the same objects"


@pytest.mark.parametrize(("size", "fc1", "fc2"), [(4, (128, 2304), (10, 32)), (2, (128, 4608), (10, 64))])
def test_c065_local_shapes_of_the_replaced_layers(size, fc1, fc2):
    with tensor_parallelism():
        net = Net()
    full = net.fc1.weight.detach().clone()
    net.fc1.weight.grad = full.clone()
    replace_marked_modules(net, imaginary(size, 1))
    assert net.fc1.weight.shape == fc1 and net.fc2.weight.shape == fc2
    assert torch.equal(net.fc1.weight, full.chunk(size, 1)[1])
    assert torch.equal(net.fc1.weight.grad, full.chunk(size, 1)[1])
    assert net.fc1.weight.untyped_storage().nbytes() == full.untyped_storage().nbytes() // size, "the rest is freed"
    assert net.fc1.split_tensors() == {"weight": SplitSpec(1, (128, 9216))}
    assert net.fc1.scaled_batch_tensors() == {"weight"}
    assert set(net.state_dict()) == set(Net().state_dict())


def test_c066_only_the_module_that_was_set_is_replaced():
    net = Net()
    set_tensor_parallelism(net.fc1, True)
    replace_marked_modules(net, imaginary(2))
    assert type(net.fc1) is DistributedLinear
    assert type(net.fc2) is nn.Linear and net.fc2.weight.shape == (10, 128)


def test_c070_inner_contexts_win_and_what_does_not_divide_or_is_shared_stays_with_a_warning():
    with tensor_parallelism():
        net = nn.Module()
        net.odd = nn.Linear(6, 4)
        net.head, net.table = nn.Linear(4, 8, bias=False), nn.Embedding(8, 4)
        net.head.weight = net.table.weight
        net.good = nn.Linear(4, 8)
        net.pruned = nn.Linear(4, 4)
        with tensor_parallelism(False):
            net.inner = nn.Linear(4, 4)
        net.sparse = nn.Embedding(8, 4, sparse=True)
        net.attention = nn.MultiheadAttention(4, 2)
    net.pruned.register_parameter("weight_g", net.pruned.weight)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        replace_marked_modules(net, imaginary(4))
    texts = [str(warning.message) for warning in caught]
    assert [text.split("module ")[1].split("'")[1] for text in texts] == ["odd", "head", "table", "pruned", "sparse"]
    assert "in_features is 6, not divisible by tensor_parallel_degree=4: use one of the degrees 1, 2, 3, 6" in texts[0]
    assert "its parameter is shared with 'table.weight'" in texts[1]
    kept = {name: type(child) for name, child in net.named_children() if type(child) in (nn.Linear, nn.Embedding)}
    assert set(kept) == {"odd", "head", "table", "pruned", "inner", "sparse"}
    assert type(net.good) is DistributedLinear  # type: ignore[comparison-overlap]
    # Its class only looks like nn.Linear; attention reads its weight directly.
    assert type(net.attention.out_proj) is torch.nn.modules.linear.NonDynamicallyQuantizableLinear


def test_c071_setting_false_after_true_disables_the_subtree():
    with tensor_parallelism():
        net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4)))
    set_tensor_parallelism(net[1], False)
    replace_marked_modules(net, imaginary(2))
    assert [type(part) for part in net.modules() if not isinstance(part, nn.Sequential)] == [
        DistributedLinear,
        nn.Linear,
        nn.Embedding,
    ]


def test_marks_are_harmless_at_degree_one_and_layers_keep_what_they_were():
    with tensor_parallelism():
        net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Embedding(4, 4)})
    replace_marked_modules(net, imaginary(1))
    assert type(net["a"]) is nn.Linear and type(net["b"]) is nn.Embedding
    calls = []
    net["a"].half().requires_grad_(False).eval()
    net["a"].register_forward_hook(lambda *_: calls.append("hook"))
    net["b"] = nn.Embedding.from_pretrained(torch.arange(16.0).view(4, 4), freeze=True, padding_idx=2)
    set_tensor_parallelism(copied := copy.deepcopy(net))
    replace_marked_modules(copied, imaginary(2, 1))
    linear, embedding = copied["a"], copied["b"]
    assert type(linear) is DistributedLinear and linear.weight.dtype == torch.half
    assert not linear.weight.requires_grad and not linear.training and len(linear._forward_hooks) == 1
    assert type(embedding) is DistributedEmbedding and embedding.padding_idx == 2
    assert torch.equal(embedding.weight, torch.arange(16.0).view(4, 4)[:, 2:]) and not embedding.weight.requires_grad


def check_a_graph_that_is_still_alive():
    net = nn.Sequential(nn.Linear(4, 4))
    weight = net[0].weight
    loss = net(torch.ones(1, 4)).sum()
    loss.backward()
    set_tensor_parallelism(net)
    replace_marked_modules(net, everybody())
    assert net[0].weight is not weight and net[0].weight.grad.shape == (4, 2)
    net(torch.ones(1, 4)).sum().backward()
    torch.testing.assert_close(net[0].weight.grad, torch.full((4, 2), 3.0))  # 1 before, and 2 ranks now


def test_a_model_whose_last_graph_is_still_alive_can_be_split():
    run_ranks(check_a_graph_that_is_still_alive, 2)


# Registered classes and hooks


class Attention(nn.Module):
    """Something a user wrote, with a constructor and a call that its distributed counterpart does not share."""

    def __init__(self, width, heads=2, *, dropout=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, width) * heads)
        self.inner = nn.Linear(width, width)

    def forward(self, hidden, mask=None):
        return self.inner(hidden), mask


class SplitAttention(DistributedModule):
    def __init__(self, size, heads, fused_softmax=True, dropout=0.5):
        super().__init__()
        self.arguments = (size, heads, fused_softmax, dropout)
        self.weight = nn.Parameter(torch.zeros(size, size // self.tp_group.size))
        self.inner = nn.Linear(size, size)
        self.calls = []

    def split_tensors(self):
        return {"weight": SplitSpec(1, (self.arguments[0], self.arguments[0]))}

    def forward(self, inputs, scale=1):
        self.calls.append((inputs, scale))
        return inputs


SEEN: list = []


def attention_init(width, heads=2, *, dropout=0.0):
    SEEN.append(("init", width, heads, dropout))
    return [width], {"heads": heads, "fused_softmax": True, "dropout": dropout, "vocab_size": 5, "architecture": "x"}


def attention_forward(hidden, mask=None):
    SEEN.append(("forward", hidden, mask))
    return ((hidden, mask),), {}


def attention_return(output):
    SEEN.append(("return", output))
    return output[0], "mask"


tp_register_with_module(Attention, SplitAttention, attention_init, attention_forward, attention_return)


@tp_register(SplitAttention, attention_init, attention_forward, attention_return)
class DecoratedAttention(Attention):
    def __init__(self, width, heads=2, *, dropout=0.0):
        super().__init__(width, heads, dropout=dropout)


@pytest.mark.parametrize("attention", [Attention, DecoratedAttention])
@pytest.mark.parametrize("size", [1, 2])
def test_c075_c076_hooks_get_the_original_arguments_and_both_registrations_are_equivalent(attention, size):
    SEEN.clear()
    with tensor_parallelism(fused_softmax=False, fused_bias_gelu=True):
        shared = attention(4, dropout=0.25)
        net = nn.ModuleDict({"layers": nn.Sequential(shared, nn.ReLU(), shared), "other": nn.ModuleList([shared])})
        net.shortcut = shared
        object.__setattr__(net, "reference", shared)
    handle = shared.register_forward_hook(lambda module, args, output: (*output, len(args)))
    shared.eval().double()
    with pytest.warns(UserWarning, match=r"'layers.0' gives SplitAttention .* dropped: architecture, vocab_size"):
        replace_marked_modules(net, imaginary(size))
    new = net["layers"][0]
    assert type(new) is SplitAttention and new.arguments == (4, 2, False, 0.25)
    assert new is net["layers"][2] is net["other"][0] is net.shortcut is net.reference
    assert not new.training and new.weight.dtype == torch.float64
    hidden = torch.ones(1)
    assert new(hidden, mask=None) == (hidden, "mask", 1), "hooks of the original see its arguments and result"
    assert new.calls == [((hidden, None), 1)], "a tuple reaches forward as one argument"
    assert [("init", 4, 2, 0.25), ("forward", hidden, None), ("return", (hidden, None))] == SEEN
    handle.remove()
    new.register_forward_hook(lambda module, args, output: output[1])
    assert new(hidden, 7) == "mask"
    assert copy.deepcopy(net)["layers"][0](hidden, 7) == "mask"


def test_replaced_modules_can_be_copied_and_pickled_with_their_hooks():
    with tensor_parallelism():
        net = nn.Sequential(Attention(4))
    with pytest.warns(UserWarning, match="dropped"):
        replace_marked_modules(net, imaginary(2))
    for clone in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert clone[0]("hidden") == ("hidden", "mask")
        assert len(clone[0].calls) == 1 and net[0].calls == [], "the call went to the copy"


def test_c076_a_registration_without_hooks_passes_arguments_through():
    class Plain(nn.Module):
        def __init__(self, size, heads, dropout=0.1):
            super().__init__()

    tp_register(SplitAttention)(Plain)
    with tensor_parallelism():
        net = nn.Sequential(Plain(4, heads=3))
    replace_marked_modules(net, imaginary(2))
    assert net[0].arguments == (4, 3, True, 0.5), "the distributed class's own default, unless the argument was passed"
    assert net[0]("x", scale=2) == "x"
    assert net[0].calls == [("x", 2)]


def test_a_supported_root_is_replaced_and_returned():
    with tensor_parallelism(), partition(1):
        root = Attention(4)
    with pytest.warns(UserWarning, match="root module|'' gives"):
        new = replace_marked_modules(root, imaginary(2))
    assert type(new) is SplitAttention and type(root) is Attention
    assert registry.partition_mark(new) == registry.partition_mark(new.inner) == 1
    with tensor_parallelism():
        linear = nn.Linear(4, 4)
    assert replace_marked_modules(linear, imaginary(2)) is linear and type(linear) is DistributedLinear  # type: ignore[comparison-overlap]


def test_registered_modules_that_cannot_be_replaced_stay():
    class Late(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.kind = kind
            self.inner = nn.Linear(4, 4)

    class SplitLate(DistributedModule):
        def __init__(self, kind):
            super().__init__()
            if kind == "odd":
                DistributedLinear(3, 3)

    with tensor_parallelism():
        early = Late("ok")
        tp_register_with_module(Late, SplitLate, lambda kind: None if kind == "unsupported" else ([kind], {}))
        net = nn.ModuleDict({kind: Late(kind) for kind in ("ok", "odd", "unsupported", "alias")})
    net["early"] = early
    net["outside"] = net["alias"].inner
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        replace_marked_modules(net, imaginary(2))
    texts = [str(warning.message) for warning in caught]
    assert [type(net[name]) for name in ("ok", "odd", "unsupported", "early")] == [SplitLate, Late, Late, Late]
    assert "in_features of a DistributedLinear is 3" in texts[0]
    assert type(net["odd"].inner) is nn.Linear, "only the outermost supported module counts"
    assert "its init_hook returned None" in texts[1]
    assert "its submodule Linear is also a child of 'the root module'" in texts[2]
    assert "register the class first" in texts[3]
    assert type(net["alias"]) is Late and net["alias"].inner is net["outside"]
    assert type(net["outside"]) is DistributedLinear, "one object in both places, and marked itself"  # type: ignore[comparison-overlap]


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        (
            (lambda: ((), {}),),
            r"init_hook '<lambda>' of SplitAttention, for module '0', called with \(int\), raised TypeErr",
        ),
        ((lambda width: ([4, 2], {})[0],), r"init_hook .* returned list: return \(positional, keyword\)"),
        ((lambda width: (torch.ones(2), {}),), r"init_hook .* returned \(Tensor, dict\)"),
        ((lambda width: ([4, 2, True, 0.0, 5], {}),), r"module '0': SplitAttention\(size, heads,.*init_hook returned"),
        ((lambda width: ([4], {}),), r"module '0': constructing SplitAttention with \['size'\] failed.*heads"),
        ((None,), r"module '0': constructing SplitAttention with \['size'\] failed"),
    ],
    ids=["signature", "list", "tensor", "too many", "too few", "no hook"],
)
def test_wrong_init_hooks_are_named(hooks, message):
    class Wrong(nn.Module):
        def __init__(self, width):
            super().__init__()

    tp_register_with_module(Wrong, SplitAttention, *hooks)
    with tensor_parallelism():
        net = nn.Sequential(Wrong(4))
    with pytest.raises(TensorParallelError, match=message):
        replace_marked_modules(net, imaginary(2))


def refuse(*args):
    raise ValueError("head_mask is not supported")


@pytest.mark.parametrize(
    ("forward_hook", "return_hook", "message"),
    [
        (
            refuse,
            None,
            "forward_hook 'refuse' of SplitAttention, for module '0', .* raised ValueError: head_mask is not",
        ),
        (lambda x: x, None, r"forward_hook .* returned str: return \(positional, keyword\)"),
        (None, refuse, "return_hook 'refuse' of SplitAttention, for module '0'"),
    ],
)
def test_hooks_that_raise_in_a_call_are_named(forward_hook, return_hook, message):
    class Wrong(nn.Module):
        pass

    tp_register_with_module(Wrong, SplitAttention, lambda: ([4, 2], {}), forward_hook, return_hook)
    with tensor_parallelism():
        net = nn.Sequential(Wrong())
    replace_marked_modules(net, imaginary(2))
    with pytest.raises(TensorParallelError, match=message) as caught:
        net("text")
    assert isinstance(caught.value, ValueError), "scripts catch the ValueError of a hook"


class Doubled(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.first = nn.Linear(size, size)
        self.weight = nn.Parameter(torch.randn(size, size))
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        return F.linear(self.first(x), self.weight) * self.scale


class SplitDoubled(DistributedModule):
    def __init__(self, size):
        super().__init__()
        self.size = size
        self.first = DistributedLinear(size, size)
        self.weight = nn.Parameter(torch.empty(size // self.tp_group.size, size))
        self.register_buffer("scale", torch.zeros(()))

    def split_tensors(self):
        return {"weight": SplitSpec(0, (self.size, self.size))}

    def forward(self, x):
        from modelparallel.comm.collectives.split import all_gather

        return F.linear(self.first(x), all_gather(self.weight, self.tp_group)) * self.scale


def check_match_weights():
    tp_register_with_module(Doubled, SplitDoubled)
    torch.manual_seed(1)
    with tensor_parallelism():
        net = nn.Sequential(Doubled(4).double())
    net[0].weight.requires_grad_(False)
    x = batch_of(torch.distributed.get_rank(), 3, 4)
    expected = net(x)
    replace_marked_modules(net, everybody(), match_weights=True)
    assert type(net[0]) is SplitDoubled and not net[0].weight.requires_grad
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_c080_match_weights_makes_the_forward_equal_the_originals(size):
    run_ranks(check_match_weights, size)


def test_match_weights_names_what_has_no_counterpart():
    tp_register_with_module(Doubled, SplitAttention, lambda size: ([size, 2], {}))
    with tensor_parallelism():
        net = nn.Sequential(Doubled(4))
    with pytest.raises(TensorParallelError, match=r"only here.*inner.weight \(4, 4\).*only there: .*scale \(\)"):
        replace_marked_modules(net, imaginary(2), match_weights=True)


def check_layers_called_by_data():
    """Experts that the ranks call in another order, or not at all."""
    import modelparallel as smp

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x, chosen):
            for index in chosen:
                x = self.experts[index](x)
            return x

    with smp.tensor_parallelism():
        plain = Experts()
    model = smp.DistributedModel(plain)
    x = torch.ones(2, 4)
    model(x, [0, 2])
    with pytest.raises(DivergenceError, match=r"DistributedLinear 'experts\.\d': the ranks of the .* called different"):
        model(x, [0, 1 + smp.tp_rank()])


def test_split_layers_that_are_called_by_data_are_told():
    run_ranks(check_layers_called_by_data, 2, parameters={"tensor_parallel_degree": 2, "ddp": True})
