"""torch.compile of the modules at their homes: the same numbers, one code for equal blocks, hooks, options, errors."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from engine_runs import Case, compare, outcomes
from logs import logged_lines
from modelparallel.errors import SMPConfigError, StepUsageError, UnsupportedError
from modelparallel.model.compilation import checked_options
from modelparallel.pipeline.program.splitting import SplitBackward
from modelparallel.torch_compat import default_recompile_limit
from parity import assert_parity
from pool import run_ranks
from training import step_of

THIS = "test_compile"
WIDTH = 6


class Block(nn.Module):
    def __init__(self, number: int = 0, dropout: float = 0.25) -> None:
        super().__init__()
        self.number = number  # each block has its own; nothing is computed with it
        self.norm = nn.LayerNorm(WIDTH)
        self.inner = nn.Linear(WIDTH, 8)
        self.outer = nn.Linear(8, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return x + self.dropout(self.outer(F.gelu(self.inner(self.norm(x)))))


class NumberedBlock(Block):
    """Its number is a constant of what is compiled, so that every block needs its own."""

    def forward(self, x):
        return super().forward(x) * (1 + self.number / 100)


class Net(nn.Module):
    """Blocks between two layers, and a weight that is used between the modules."""

    def __init__(self, num_blocks=4, *, tied=False, checkpointed=False, dropout=0.25, block=Block) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        self.blocks = nn.ModuleList(block(number, dropout) for number in range(num_blocks))
        self.last = nn.Linear(WIDTH, WIDTH, bias=False)
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.9))
        if tied:
            self.last.weight = self.first.weight
        self.checkpointed = checkpointed

    def forward(self, x):
        x = self.first(x) * self.scale
        for block in self.blocks:
            if self.checkpointed:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x) * self.scale
        return self.last(x)


def make_batch(step):
    generator = torch.Generator().manual_seed(step)
    return (torch.randn(6, WIDTH, generator=generator, dtype=torch.float64),)


def loss_of(model, x):
    return (model(x) - 0.5).square().mean()


NETS = {
    "plain": Net,
    "tied": functools.partial(Net, tied=True),
    "checkpointed": functools.partial(Net, checkpointed=True),
}
BACKENDS = {
    "as-it-is": False,
    "eager": {"backend": "eager"},
    "aot": {"backend": "aot_eager"},
    "inductor": {"options": {"fallback_random": True}},
}
CASES = {
    f"{net} {backend}": Case(make, make_batch, loss_of, compile=options)
    for net, make in NETS.items()
    for backend, options in BACKENDS.items()
}


@functools.cache
def expected(*nets):
    """Without compiling, in one process; the random numbers depend on how many steps came before."""
    found = outcomes(THIS, [f"{net} as-it-is" for net in nets], 1, num_microbatches=3, timeout_seconds=60)[0]
    return {name.split()[0]: outcome for name, outcome in found.items()}


# The modules are scattered, so that every stage is visited several times and the bodies run in threads.
@pytest.mark.parametrize(
    ("num_stages", "schedule", "names"),
    [
        (1, "simple", ["plain eager", "checkpointed aot"]),
        (2, "simple", ["tied eager"]),
        pytest.param(2, "interleaved", ["plain eager", "tied aot"], marks=pytest.mark.slow),
        (2, "zero_bubble", ["plain aot", "tied eager"]),
        (3, "interleaved", ["checkpointed eager"]),
        pytest.param(3, "zero_bubble", ["plain eager"], marks=pytest.mark.slow),
    ],
)
def test_parity_with_one_process_that_does_not_compile(num_stages, schedule, names):
    check_parity(names, num_stages, schedule)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["simple", "interleaved", "zero_bubble"])
def test_parity_with_inductor(schedule):
    check_parity(["plain inductor"], 2, schedule, is_scattered=schedule == "interleaved")


@pytest.mark.slow
def test_the_backward_of_compiled_code_is_not_split():
    # Inductor reuses the memory of what it saved for the backward, and raises when the graph is to be kept.
    block = Block().double()
    compiled = torch.compile(block)
    scale = nn.Parameter(torch.full((WIDTH,), 0.9, dtype=torch.float64))
    weights = [scale, *block.parameters()]
    found = []
    for is_split in (False, True):
        torch.manual_seed(0)
        x = make_batch(0)[0].requires_grad_()
        y = compiled(x) * scale
        if is_split:
            part = SplitBackward({id(weight) for weight in weights})
            part.run_inputs([y], [torch.ones_like(y)])
            part.run_weights()
        else:
            y.sum().backward()
        found.append({str(index): tensor.grad for index, tensor in enumerate([x, *weights])})
        for weight in weights:
            weight.grad = None
    assert_parity(found[1], found[0], dtype=torch.float64)


def check_parity(names, num_stages, schedule, **more):
    ranks = outcomes(THIS, names, num_stages, num_microbatches=3, pipeline=schedule, timeout_seconds=120, **more)
    found = expected(*(name.split()[0] for name in names))
    for name in names:
        compare(name, [rank[name] for rank in ranks], found[name.split()[0]])


# ---------------------------------------------------------------- what is compiled, and how often


def counting(backend="eager"):
    from torch._dynamo.testing import CompileCounterWithBackend

    return CompileCounterWithBackend(backend)


def train(net, compile, num_steps=2):
    """The model, its step function, and the losses of some steps, the same for the same net."""
    import modelparallel as smp

    torch.manual_seed(0)
    model = smp.DistributedModel(net.double(), compile=compile)
    train_step = step_of(loss_of)
    return model, train_step, [train_step(model, *make_batch(step)).reduce_mean().item() for step in range(num_steps)]


def compile_many_blocks():
    found = {}
    for kind, block in {"equal": Block, "numbered": NumberedBlock}.items():
        counter = counting()
        torch.manual_seed(0)
        net = Net(12, block=block)
        *_, as_it_is = train(copy.deepcopy(net), False)
        *_, compiled = train(net, {"backend": counter})
        assert compiled == pytest.approx(as_it_is, rel=1e-12)
        found[kind] = counter.frame_count
    return found


def test_equal_blocks_are_compiled_once_and_unequal_ones_past_the_limit():
    # The first and the last layer are one structure, but only the input of the last one needs a gradient.
    # A torch that cannot be told a limit (2.11) leaves the rest of the numbered blocks as they are.
    numbered = 14 if default_recompile_limit() is not None else 10
    assert run_ranks(compile_many_blocks, 1, parameters={"microbatches": 2}) == [{"equal": 3, "numbered": numbered}]


def compile_on_a_stage():
    import modelparallel as smp

    counter = counting()
    torch.manual_seed(0)
    net = Net(8)
    model = smp.DistributedModel(net.double(), compile={"backend": counter})
    for index, block in enumerate(net.blocks):
        smp.set_partition(block, index % 2)
    smp.set_partition(net.last, 1)
    train_step = step_of(loss_of)
    for step in range(2):
        train_step(model, *make_batch(step))
    own = {name for name, module in net.named_modules() if module in [net.first, net.last, *net.blocks]}
    return counter.frame_count, sorted(own - set(model._compiler.compiled)), model._compiler.left


def test_a_stage_compiles_what_is_at_home_there():
    parameters = {"pipeline_parallel_degree": 2, "microbatches": 2, "auto_partition": False, "default_partition": 0}
    ranks = run_ranks(compile_on_a_stage, 2, parameters=parameters | {"timeout_seconds": 60})
    others = [
        ["blocks.1", "blocks.3", "blocks.5", "blocks.7", "last"],
        ["blocks.0", "blocks.2", "blocks.4", "blocks.6"],
    ]
    assert ranks == [(2, others[0], {}), (2, [*others[1], "first"], {})]


# ---------------------------------------------------------------- the modules stay what they were


def look_at_modules():
    torch.manual_seed(0)
    net = Net(2, dropout=0.0).double()
    before = {
        "names": list(net.state_dict()),
        "parameters": [id(p) for p in net.parameters()],
        "blocks": list(net.blocks),
    }
    copied = copy.deepcopy(net)
    model, _, _ = train(net, {"backend": "eager"})
    inner = model.get_module()
    assert inner is net and list(net.blocks) == before["blocks"] and type(net.blocks[0]) is Block
    assert list(net.state_dict()) == before["names"] == list(model.state_dict())
    assert [id(p) for p in net.parameters()] == before["parameters"]
    x = make_batch(5)[0]
    with torch.no_grad():
        for other in (copy.deepcopy(net.blocks[0]), pickle.loads(pickle.dumps(net.blocks[0]))):
            assert torch.equal(other(x), copied.blocks[0](x)) and other.norm.weight is not net.blocks[0].norm.weight


def use_hooks():
    torch.manual_seed(0)
    counter = counting()
    net = Net(3, dropout=0.0)
    model, train_step, [first] = train(net, {"backend": counter}, 1)
    num_compiled = counter.frame_count

    def repeated():
        return train_step(model, *make_batch(0)).reduce_mean().item()

    seen = []
    handles = [
        net.blocks[0].register_forward_hook(lambda *_: seen.append("block")),
        net.blocks[0].inner.register_forward_pre_hook(lambda *_: seen.append("inner")),
        net.blocks[2].norm.register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    assert repeated() == pytest.approx(first, rel=1e-12)
    assert seen == ["inner", "block", "backward"] * 2  # of 2 microbatches
    handles.append(net.blocks[1].outer.register_forward_hook(lambda module, args, output: output * 0))
    assert repeated() != pytest.approx(first, rel=1e-3)
    for handle in handles:
        handle.remove()
    assert repeated() == pytest.approx(first, rel=1e-12)
    assert len(seen) == 12 and counter.frame_count == num_compiled


def keep_what_the_user_compiled():
    torch.manual_seed(0)
    net = Net(3)
    *_, as_it_is = train(copy.deepcopy(net), False)
    theirs, ours = counting(), counting("aot_eager")
    net.blocks[1].compile(backend=theirs)
    model, _, compiled = train(net, {"backend": ours})
    assert compiled == pytest.approx(as_it_is, rel=1e-12)
    assert (theirs.frame_count, ours.frame_count) == (1, 3)
    assert list(model._compiler.left) == ["blocks.1"]
    # What the library installed itself is not taken for the user's.
    *_, again = train(net, {"backend": ours})
    assert again == pytest.approx(as_it_is, rel=1e-12)
    whole = Net(3)
    whole.load_state_dict(copy.deepcopy(net).state_dict())
    whole.compile(backend=theirs)
    with logged_lines() as messages:
        assert train(whole, False)[2] == pytest.approx(as_it_is, rel=1e-12) and theirs.frame_count == 1
    assert any("(Net) was compiled as a whole" in text for text in messages)


@pytest.mark.parametrize("body", [look_at_modules, use_hooks, keep_what_the_user_compiled])
def test_modules_and_hooks(body):
    run_ranks(body, 1, parameters={"microbatches": 2})


# ---------------------------------------------------------------- options and errors


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("inductor", "expected True, False or a dict"),
        ({"backend": "nope"}, "Invalid backend: 'nope'"),
        ({"bakend": "eager"}, "unexpected keyword argument 'bakend'"),
        ({"fullgraph": "yes"}, "option 'fullgraph' must be a bool, got 'yes'"),
        ({"dynamic": 1}, "option 'dynamic' must be a bool"),
        ({"mode": "fastest"}, "Unrecognized mode=fastest"),
        ({"options": {"no_such_option": 1}}, "Unexpected optimization option no_such_option"),
        ({"mode": "default", "options": {}}, "Either mode or options"),
    ],
)
def test_wrong_options_stop_before_anything_is_compiled(value, text):
    with pytest.raises(SMPConfigError, match=text):
        checked_options(value)


def test_options_that_compile_nothing():
    assert checked_options(None) is checked_options(False) is checked_options({"disable": True}) is None
    assert checked_options({}) == checked_options(True) == {}


class Speaks(Block):
    def forward(self, x):
        torch._dynamo.graph_break()
        return super().forward(x)


class Fails(Block):
    def forward(self, x):
        return F.linear(super().forward(x), torch.zeros(2, 3))


def hand_options_over():
    given = {}

    def backend(graph, inputs, **more):
        given.setdefault("options", more)
        given["num"] = given.get("num", 0) + 1
        return graph

    options = {"backend": backend, "options": {"a": 1}, "dynamic": False}
    import modelparallel as smp

    model = smp.DistributedModel(Net(3, block=Speaks).double(), compile=options)
    for num_samples in (1, 2, 3, 4):
        model(torch.zeros(num_samples, WIDTH, dtype=torch.float64))
    assert given["options"] == {"options": {"a": 1}}
    assert given["num"] == 4 * 3, "dynamic=False: one for each shape, of the two layers and of the blocks"
    assert options["options"] == {"a": 1}
    with pytest.raises(UnsupportedError, match=r"module 'blocks.0' \(Speaks\) could not be compiled.*fullgraph"):
        train(Net(3, block=Speaks), {"backend": "eager", "fullgraph": True})
    # The model's own mistake, not one of compiling.
    with pytest.raises(RuntimeError, match="same reduction dim") as found:
        train(Net(3, block=Fails), {"backend": "eager"})
    assert not isinstance(found.value, UnsupportedError)
    with pytest.raises(StepUsageError, match="compile=True"):
        model.compile()


def test_options_are_handed_over_and_errors_name_the_module():
    run_ranks(hand_options_over, 1, parameters={})


def split_a_layer():
    import modelparallel as smp

    def make():
        torch.manual_seed(0)
        net = Net(2)
        smp.set_tensor_parallelism(net.blocks[0].inner, True)
        return net

    *_, as_it_is = train(make(), False)
    model, _, compiled = train(make(), {"backend": "eager"})
    assert compiled == pytest.approx(as_it_is, rel=1e-12)
    return model._compiler.compiled, list(model._compiler.left)


def test_layers_that_talk_to_other_ranks_are_left_as_they_are():
    ranks = run_ranks(split_a_layer, 2, parameters={"tensor_parallel_degree": 2, "microbatches": 2, "ddp": True})
    assert ranks == [(["first", "blocks.1", "last"], ["blocks.0"])] * 2
