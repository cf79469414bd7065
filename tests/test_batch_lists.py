"""Lists in the arguments of a step: one element per sample, one tensor per feature, or an error with the ways out."""

from __future__ import annotations

import collections
import dataclasses
import types
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modelparallel as smp
from logs import logged_lines
from modelparallel import trees
from modelparallel.errors import CommunicationError, StepUsageError
from modelparallel.pipeline.batch_lists import ListReader
from modelparallel.pipeline.microbatches import Microbatches, split
from rank_tests import RankTests, on

LOCAL = RankTests(1, {"microbatches": 2})
PP2 = RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 2})
FAILS = RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 2})

X, Y = torch.randn(8, 6), torch.arange(8)
NAMES = [f"n{index}" for index in range(8)]
RAGGED = [torch.randn(3 + index % 3, 6) for index in range(8)]
EVEN = [torch.randn(4, 6) for _ in range(8)]
IMAGES = [torch.randn(3, 5, 5) for _ in range(8)]
BOXES = [{"boxes": torch.randn(1 + index % 3, 4), "labels": torch.zeros(1 + index % 3)} for index in range(8)]


@dataclasses.dataclass
class Collated:
    x: Any
    names: Any = None


class Holder:
    def __init__(self, x: Any) -> None:
        self.x = x


def parts(*, num: int = 2, axes: Any = None, whole: Any = (), reader: Any = None, **arguments: Any) -> Microbatches:
    return split(arguments, num, axes or {}, set(whole), is_uneven_allowed=True, reader=reader, variadic="args")


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("ragged tensors", {"b": {"s": RAGGED, "y": Y}}, {"b": {"s": RAGGED[4:], "y": Y[4:]}}),
        ("tensors of even length", {"s": EVEN, "y": Y}, {"s": EVEN[4:], "y": Y[4:]}),
        ("strings", {"b": {"x": X, "n": NAMES}}, {"b": {"x": X[4:], "n": NAMES[4:]}}),
        ("strings of default_collate", {"b": [X, Y, tuple(NAMES)]}, {"b": [X[4:], Y[4:], tuple(NAMES[4:])]}),
        ("a dataclass", {"b": Collated(X, NAMES)}, {"b": Collated(X[4:], NAMES[4:])}),
        ("detection", {"images": IMAGES, "targets": BOXES}, {"images": IMAGES[4:], "targets": BOXES[4:]}),
        ("an array", {"b": {"x": X, "i": np.arange(8)}}, {"b": {"x": X[4:], "i": np.arange(4, 8)}}),
        ("some None", {"b": {"x": X, "n": [None, "a"] * 4}}, {"b": {"x": X[4:], "n": [None, "a"] * 2}}),
        ("marked", {"x": X, "n": smp.SampleList(NAMES)}, {"x": X[4:], "n": NAMES[4:]}),
        ("features", {"b": [X, Y]}, {"b": [X[4:], Y[4:]]}),
        ("views", {"v": [X, X + 1]}, {"v": [X[4:], X[4:] + 1]}),
        ("two samples of two features", {"b": [X[:2], X[2:4]]}, {"b": [X[1:2], X[3:4]]}),
        ("a cache", {"x": X, "c": ((X, X), (Y, X))}, {"x": X[4:], "c": ((X[4:], X[4:]), (Y[4:], X[4:]))}),
        ("other lists", {"x": X, "size": (32, 32), "n": NAMES[:3]}, {"x": X[4:], "size": (32, 32), "n": NAMES[:3]}),
        ("whole", {"x": X, "n": NAMES, "whole": ["n"]}, {"x": X[4:], "n": NAMES}),
        ("by feature", {"x": X[:2], "v": [X[:2], X[2:4]], "axes": {"v": 0}}, {"x": X[1:2], "v": [X[1:2], X[3:4]]}),
        ("*args", {"args": (X[:2], X[2:4])}, {"args": (X[1:2], X[3:4])}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_second_microbatch_gets(name, arguments, expected):
    found = parts(**arguments).arguments[1]
    assert [type(leaf) for leaf in trees.leaves(found)] == [type(leaf) for leaf in trees.leaves(expected)]
    for mine, theirs in zip(trees.leaves(found), trees.leaves(expected), strict=True):
        assert np.array_equal(np.asarray(mine), np.asarray(theirs)) if mine is not None else theirs is None


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"x": X, "names": NAMES}, ["'names'", "smp.SampleList", "non_split_inputs", "smp_slice"]),
        ({"x": X[:2], "size": (32, 32)}, ["'size'", "tensor", "non_split_inputs"]),
        ({"x": X[:2], "config": {"betas": [0.9, 0.99]}}, ["'config'", "'betas'"]),
        ({"s": RAGGED}, ["'s'", "3, 4, 5", "smp.SampleList"]),
        ({"images": IMAGES}, ["'images'", "smp.SampleList", "input_split_axes"]),
        ({"b": [{"x": X}, {"x": X}]}, ["'b'", "input_split_axes"]),
        ({"x": X, "anchors": [X[:2], X[:6]]}, ["'anchors'", "2, 6", "non_split_inputs"]),
        ({"x": X, "anchors": [X[:3], X[:5]]}, ["'anchors'", "length 3", "non_split_inputs"]),
        ({"x": X[:2], "views": [X[:2], X[:2]]}, ["'views'", "input_split_axes"]),
        ({"x": X, "y": Y.numpy()}, ["'y'", "tensor"]),
        ({"x": torch.nested.nested_tensor(RAGGED, layout=torch.jagged)}, ["'x'", "nested", "smp.SampleList"]),
    ],
)
def test_what_is_unclear_is_an_error_that_names_the_ways_out(arguments, names):
    with pytest.raises(StepUsageError) as caught:
        parts(**arguments)
    for name in names:
        assert name in str(caught.value)


def test_earlier_calls_tell():
    reader = ListReader()
    parts(reader=reader, b={"x": torch.zeros(16, 2), "classes": NAMES})
    later = parts(reader=reader, b={"x": X, "classes": NAMES})  # as many as samples, this time
    assert later.arguments[1]["b"]["classes"] == NAMES
    reader = ListReader()
    parts(reader=reader, b={"x": X, "classes": NAMES})
    with pytest.raises(StepUsageError, match="an earlier call had one element per sample"):
        parts(reader=reader, b={"x": X[:5], "classes": NAMES})


def test_what_cannot_be_split_is_said():
    for value in (types.MappingProxyType({"x": X}), Holder(X)):
        (text,) = parts(b=value).notices.values()
        assert "'b'" in text
        assert "smp_slice" in text
    assert not parts(x=X, b=Holder(torch.zeros(1000))).notices  # constants of its own
    assert "'b' at ['x']" in next(iter(parts(b={"x": X.numpy()}).notices.values()))
    assert "'weight' 4" in next(iter(parts(x=X, weight=torch.ones(4)).notices.values()))


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_sparse_tensors_are_split(layout):
    x = X * (X > 0)
    found = parts(x=x.to_sparse(layout=layout), y=Y).arguments[1]["x"]
    assert found.layout is layout
    assert torch.equal(found.to_dense(), x[4:])


def collated(seed: int) -> tuple[dict[str, Any], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    lists = [torch.randn(2 + index % 3, 6, generator=generator, dtype=torch.float64) for index in range(8)]
    names = [str(index + 1.0) for index in range(8)]
    return {"x": (x * (x > 0)).to_sparse(), "y": Y % 3, "lists": lists, "names": names}, x


def collated_loss(model: Any, batch: Any) -> Tensor:
    x = batch["x"].to_dense() + torch.stack([one.mean(0) for one in batch["lists"]])
    weights = torch.tensor([float(name) for name in batch["names"]], dtype=torch.float64)
    return (F.cross_entropy(model(x), batch["y"], reduction="none") * weights).mean()


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


@on(LOCAL, PP2)
def test_a_batch_of_sparse_ragged_and_named_samples_trains_as_one_process():
    model = smp.DistributedModel(make_net())

    @smp.step
    def step(model, batch):
        loss = collated_loss(model, batch)
        model.backward(loss)
        return loss, len(batch["names"])

    loss, counts = step(model, collated(1)[0])
    plain = make_net()
    expected = collated_loss(plain, collated(1)[0])
    expected.backward()
    assert counts == [4, 4]
    torch.testing.assert_close(loss.reduce_mean(), expected.detach(), rtol=1e-9, atol=0)
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in model.local_named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-9, atol=1e-12)


@on(LOCAL, PP2)
def test_a_line_about_an_object_comes_once():
    model = smp.DistributedModel(make_net())
    with logged_lines() as lines:

        @smp.step
        def step(model, batch):
            loss = model(batch.x).pow(2).mean()
            model.backward(loss)
            return loss

        for _ in range(2):
            step(model, Holder(torch.ones(8, 6, dtype=torch.float64)))
    assert sum("smp_slice" in line for line in lines) == (smp.rank() == 0)


@on(PP2)
def test_an_unclear_list_is_an_error_on_all_stages():
    model = smp.DistributedModel(make_net())

    @smp.step
    def step(model, x, names):
        loss = model(x).pow(2).mean()
        model.backward(loss)
        return loss

    x = X.double()
    step(model, x, None)
    with pytest.raises(StepUsageError, match="'names' is a list of 8 elements of type str"):
        step(model, x, NAMES if smp.pp_rank() == 0 else None)
    step(model, x, smp.SampleList(NAMES) if smp.pp_rank() == 0 else None)


@on(FAILS)
def test_an_argument_that_cannot_travel_is_named():
    model = smp.DistributedModel(make_net())

    @smp.step
    def step(model, x, options):
        loss = model(x).pow(2).mean()
        model.backward(loss)
        return loss

    text = "argument 'options' .defaultdict. cannot travel" if smp.pp_rank() == 0 else "argument 'options'"
    with pytest.raises(StepUsageError if smp.pp_rank() == 0 else CommunicationError, match=text):
        step(model, X.double(), collections.defaultdict(lambda: 0, size=2))
