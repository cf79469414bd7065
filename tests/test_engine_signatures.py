"""What the engine compares at every call without running it: specs, signatures, announced structures, functions."""

from __future__ import annotations

import functools
import pickle
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

from modelparallel.errors import DivergenceError
from modelparallel.pipeline.values.arguments import Arguments
from modelparallel.pipeline.values.functions import traits_of
from modelparallel.pipeline.values.stage_tensor import AliasGroup, StageTensor, TensorSpec
from modelparallel.pipeline.values.structures import (
    Structure,
    as_announced,
    check_same,
    decode,
    encode,
    is_value_shaped,
    operation_key,
)


class Pair(NamedTuple):
    left: Any
    right: Any


class Named(Pair):
    """A named tuple with attributes of its own."""


class Output(OrderedDict[str, Any]):
    pass


class OneProgram:
    """What StageTensors and arguments ask of a program."""

    device = torch.device("cpu")
    device_type = "cpu"

    def resolve(self, leaf: Any) -> Any:
        return leaf


PROGRAM: Any = OneProgram()


def value(*shape: int, requires_grad: bool = False) -> StageTensor:
    return StageTensor(PROGRAM, TensorSpec.of(torch.zeros(shape, requires_grad=requires_grad)), 0, None)


def announce(output: Any, *inputs: torch.Tensor) -> Structure:
    """The structure as another stage, or a later step, has it."""
    structure, _ = encode(output, inputs, [], (), "it", values_are_fixed=False)
    received: Structure = pickle.loads(pickle.dumps(structure))
    return received


def test_equal_specs_are_one_object() -> None:
    spec = TensorSpec((2, 3), (3, 1), torch.float32, True, "cpu")
    assert TensorSpec.of(torch.ones(2, 3, requires_grad=True)) is spec
    assert pickle.loads(pickle.dumps(spec)) is spec
    assert spec.num_elements == 6 and spec.num_bytes == 24
    others = [
        torch.ones(3, 2, requires_grad=True),
        torch.ones(2, 3),
        torch.ones(3, 2, requires_grad=True).t(),
        torch.ones(2, 3, dtype=torch.float64, requires_grad=True),
        torch.ones(2, 3, requires_grad=True, device="meta"),
    ]
    assert spec.describes(torch.zeros(2, 3, requires_grad=True))
    for other in others:
        assert TensorSpec.of(other) is not spec and not spec.describes(other)


def outputs() -> list[Any]:
    """Outputs that a template is made for; a function of no state, so that two calls give equal structures."""
    one, two = torch.zeros(2, 3), torch.zeros(3)
    return [
        one,
        (one, two),
        [one, (two, None), {"k": one, 3: "text"}],
        Pair(one, two),
        torch.zeros(4, 3).max(dim=1),
        (True, one),
        None,
    ]


@pytest.mark.parametrize("index", range(len(outputs())))
def test_the_announced_output_is_recognised_and_rebuilt(index: int) -> None:
    known = announce(outputs()[index])
    again = outputs()[index]
    new = as_announced(known, again, [])
    assert new is not None
    assert new == encode(again, [], [], (), "it", values_are_fixed=False)[1]
    rebuilt = decode(known, [], [], [value(*spec.shape) for spec in known.specs])
    assert type(rebuilt) is (StageTensor if index == 0 else type(again))
    if isinstance(again, tuple):
        kinds = [type(leaf) if not isinstance(leaf, torch.Tensor) else StageTensor for leaf in again]
        assert [type(leaf) for leaf in rebuilt] == kinds
    for other in (outputs()[other] for other in range(len(outputs())) if other != index):
        assert as_announced(known, other, []) is None


def test_deviations_are_looked_at_in_full() -> None:
    one, two = torch.zeros(2), torch.zeros(2)
    known = announce((one, two))
    for other in ([one, two], (one, one), (one, two, two), (one, torch.zeros(3)), (one, two.double()), (one, None)):
        assert as_announced(known, other, []) is None
    assert as_announced(known, (one, two), [two]) is None  # an input, not a new tensor
    assert as_announced(known, (one, torch.nn.Parameter(two)), []) is None
    assert as_announced(announce({"a": one, "b": two}), {"b": one, "a": two}, []) is None
    assert as_announced(announce((one, one)), (one, two), []) is None
    assert as_announced(announce(one), (one,), []) is None
    assert as_announced(announce((one, True)), (two, 1), []) is None
    with pytest.raises(DivergenceError):
        check_same(known, announce((one, torch.zeros(3))), "it")


def test_inputs_stay_themselves() -> None:
    inputs = [torch.zeros(2), torch.zeros(2)]
    known = announce((inputs[1], torch.ones(2)), *inputs)
    new = torch.ones(2)
    assert as_announced(known, (inputs[1], new), inputs) == [new]
    assert as_announced(known, (inputs[0], new), inputs) is None
    made = value(2)
    assert decode(known, ["first", "second"], [], [made]) == ("second", made)
    assert as_announced(announce(inputs[0], *inputs), inputs[0], inputs) == []


@pytest.mark.parametrize(
    "output",
    [Output(a=torch.zeros(2)), Named(torch.zeros(2), 1), functools.partial(len), {"a": OrderedDict(b=torch.zeros(1))}],
)
def test_other_classes_have_no_template(output: Any) -> None:
    known = announce(output)
    assert known.template is None
    assert as_announced(known, output, []) is None
    assert type(decode(known, [], [], [value(2)])) is type(output)


def test_a_list_in_two_places_stays_one_list() -> None:
    shared = [torch.zeros(2)]
    known = announce((shared, shared))
    rebuilt = decode(known, [], [], [value(2)])
    assert rebuilt[0] is rebuilt[1]


def key(func: Any, *args: Any, **kwargs: Any) -> Any:
    return operation_key(traits_of(func), Arguments(PROGRAM, args, kwargs))


def test_signatures_tell_calls_apart() -> None:
    x, y = value(2, 3), value(2, 3)
    calls = [
        key(torch.add, x, y),
        key(torch.mul, x, y),
        key(torch.Tensor.add, x, y),
        key(torch.add, x, value(2, 3, requires_grad=True)),
        key(torch.add, x, torch.zeros(2, 3)),
        key(torch.add, x, 1),
        key(torch.add, x, 1.0),
        key(torch.add, x, True),
        key(torch.add, x, other=y),
        key(torch.add, x, alpha=y),
        key(torch.add, [x, y]),
        key(torch.add, (x, y)),
        key(torch.add, (x,), y),
        key(torch.add, x, (y,)),
        key(torch.add, ((x,), y)),
        key(torch.add, (x, (y,))),
        key(torch.Tensor.__getitem__, x, slice(0, 1)),
        key(torch.Tensor.__getitem__, x, slice(0, 2)),
        key(torch.Tensor.__getitem__, x, slice(None, 1)),
        key(torch.Tensor.__getitem__, x, (slice(0, 1), None)),
    ]
    assert len(set(calls)) == len(calls)
    assert key(torch.add, value(2, 3), value(2, 3)) == calls[0]
    assert key(torch.add, x, 0.5) == key(torch.add, x, 2.5)  # a float's value decides nothing in arithmetic
    assert key(torch.linspace, x, 0.5) != key(torch.linspace, x, 2.5)
    with torch.no_grad():
        assert key(torch.add, x, y) != calls[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert key(torch.add, x, y) != calls[0]


def test_calls_get_their_own_containers_back() -> None:
    x, options, names = value(2), {"a": 1}, ["b"]
    given: list[Any] = []

    def callee(*args: Any, **kwargs: Any) -> None:
        given.extend((args, kwargs))

    arguments = Arguments(PROGRAM, ((x, 1), options), {"names": names, "both": [x, x]})
    arguments.call(callee, [torch.ones(1) if leaf is x else leaf for leaf in arguments.values])
    args, kwargs = given
    assert args[1] is options and kwargs["names"] is names
    assert [type(leaf) for leaf in (*args[0], *kwargs["both"])] == [torch.Tensor, int, torch.Tensor, torch.Tensor]


def test_shapes_that_depend_on_values() -> None:
    def depends(func: Any, *args: Any) -> bool:
        return is_value_shaped(traits_of(func), Arguments(PROGRAM, args, {}))

    x = value(3)
    mask = StageTensor(PROGRAM, TensorSpec.of(torch.zeros(3, dtype=torch.bool)), 0, None)
    assert depends(torch.nonzero, x) and depends(torch.where, mask)
    assert not depends(torch.where, mask, x, x) and not depends(torch.add, x, x)
    get = torch.Tensor.__getitem__
    assert depends(get, x, mask) and depends(get, x, (None, mask)) and depends(get, x, torch.ones(3).bool())
    assert not depends(get, mask, 0) and not depends(get, x, torch.ones(3).long())


def test_functions_are_told_apart() -> None:
    grad: Any = torch.Tensor.requires_grad
    shape = torch.Tensor.shape.__get__  # type: ignore[attr-defined]
    assert traits_of(shape).is_metadata and traits_of(shape).name == "shape"
    assert traits_of(torch.Tensor.shape.__get__) is traits_of(shape)  # type: ignore[attr-defined]
    assert traits_of(grad.__get__).is_special and traits_of(grad.__set__).is_special
    assert traits_of(torch.Tensor.add_).is_in_place and not traits_of(torch.Tensor.add).is_in_place
    assert not traits_of(torch.Tensor.requires_grad_).is_in_place and not traits_of(torch.Tensor.__add__).is_in_place
    assert traits_of(F.dropout).is_random and not traits_of(F.gelu).is_random
    assert traits_of(torch.Tensor.view_as).stays_with_base

    def make(number: int) -> Any:
        def apply() -> int:
            return number

        return apply

    assert traits_of(make(1)) is not traits_of(make(1))  # what is made anew for each call is not kept
    assert traits_of(make(1)).identity == traits_of(make(2)).identity


def test_values_that_share_memory() -> None:
    base = value(4)
    assert base.sharing() == []
    group = base.aliases
    assert isinstance(group, AliasGroup)
    views = [StageTensor(PROGRAM, base.spec, 0, None, group) for _ in range(3)]
    assert all(one is other for one, other in zip(base.sharing(), views, strict=True))
    for _ in range(1000):
        StageTensor(PROGRAM, base.spec, 0, None, group)  # dropped at once
    assert len(group._members) < 100
    assert len(base.sharing()) == 3 and len(views[0].sharing()) == 3
