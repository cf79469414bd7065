"""Whose a parameter is, and what happens where one takes the place of another."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from modelparallel.errors import SMPConfigError
from modelparallel.optimizer.wrapper import DistributedOptimizer
from modelparallel.parameters.index import ParameterIndex
from modelparallel.parameters.retired import name_before, replacement_of, retire_replaced
from modelparallel.parameters.table import ParameterTable
from pool import run_ranks


@dataclass
class Model:
    table: ParameterTable


class Engine:
    def __init__(self) -> None:
        self.told: list[tuple[Any, Any]] = []

    def replace_tensor(self, old: nn.Parameter, new: Any) -> None:
        self.told.append((old, new))


def two_models() -> tuple[nn.Module, nn.Module, list[Model]]:
    first, second = nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    second[1].weight = second[0].weight
    return first, second, [Model(ParameterTable(first)), Model(ParameterTable(second))]


def test_tensors_are_known_by_what_they_are():
    first, second, models = two_models()
    index = ParameterIndex(models, Engine().replace_tensor)
    assert index.owner_of(first.weight) is models[0] and index.owner_of(second[1].weight) is models[1]
    assert index.row_of(second[1].weight).aliases == ("1.weight",)
    assert index.row_of(first.running_mean).is_buffer
    foreign = first.weight.detach().clone()
    assert index.owner_of(foreign) is None and index.row_of(foreign) is None
    assert index.names_of([second[0].bias, foreign, first.bias]) == ["0.bias", "", "bias"]
    assert index.owners_of([foreign, second[0].bias]) == [models[1]]
    assert index.owners_of(iter([second[0].bias, first.bias])) == models
    third = nn.Linear(2, 2)
    models.append(Model(ParameterTable(third)))
    assert index.owner_of(third.bias) is models[2]


def test_a_tensor_is_local_where_all_its_models_have_it():
    first, second, models = two_models()
    index = ParameterIndex([*models, Model(ParameterTable(first))], Engine().replace_tensor)
    assert all(index.is_local(tensor, 1) for tensor in (first.weight, second[0].weight, torch.ones(1)))
    models[0].table.set_homes({"weight": 1, "bias": 0}.get)
    assert [index.is_local(first.weight, stage) for stage in (0, 1)] == [False, True]
    assert [index.is_local(first.bias, stage) for stage in (0, 1)] == [True, False]
    assert index.is_local(first.running_mean, 1)


def test_replacing_tells_all_tables_and_the_engine_and_lets_go_of_the_old_one():
    first, second, models = two_models()
    models.append(Model(ParameterTable(second)))  # wrapped twice
    engine = Engine()
    index = ParameterIndex(models, engine.replace_tensor)
    old, new, face = second[0].weight, nn.Parameter(torch.ones(2, 4)), nn.Parameter(torch.ones(4, 4))
    index.replace(old, new, face)
    assert engine.told == [(old, (new, face))]
    for table in (models[1].table, models[2].table):
        assert table.tensor("0.weight") is new
        assert table.row_of(new) is table.row_of(face) is table.row_of(new) is not None
    assert index.owner_of(old) is None and index.owner_of(first.weight) is models[0]
    assert name_before(old) == "0.weight" and replacement_of(old) is new
    newest = nn.Parameter(torch.ones(1, 4))
    index.replace(new, newest)
    assert replacement_of(old) is replacement_of(new) is newest and index.owner_of(new) is None
    reference = weakref.ref(old)
    engine.told.clear()
    second[0].weight = second[1].weight = newest
    del old
    gc.collect()
    assert reference() is None


def test_no_tensor_is_taken_for_one_that_is_gone():
    layer = nn.Linear(3, 3)
    models = [Model(ParameterTable(layer))]
    index = ParameterIndex(models, Engine().replace_tensor)
    for _ in range(50):  # the next parameter gets the memory, and often the id, of the one before
        old, new = layer.weight, nn.Parameter(torch.ones(3, 3))
        index.replace(old, new)
        layer.weight = new
        del old, new
        assert index.row_of(nn.Parameter(torch.ones(3, 3))) is None
        assert index.names_of([layer.weight]) == ["weight"]


class Subclass(nn.Parameter):
    """Libraries have their own."""


def test_optimizers_find_what_modules_that_were_replaced_had():
    before = {"a.weight": nn.Parameter(torch.ones(2)), "b": Subclass(torch.ones(2)), "c": nn.Parameter(torch.ones(2))}
    same, after_a, after_b = before["c"], nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    retire_replaced(before, {"x.weight": after_a, "b": after_b, "c": same}, {"a.weight": "x.weight"})
    assert replacement_of(before["a.weight"]) is after_a and name_before(before["a.weight"]) == "a.weight"
    assert replacement_of(before["b"]) is after_b and type(before["b"]) is Subclass
    assert name_before(same) is None and name_before(after_a) is None


def wraps_an_optimizer_of_a_parameter_that_is_gone():
    gone = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([gone], lr=0.1)
    retire_replaced({"gone": gone}, {}, {})
    with pytest.raises(SMPConfigError, match="the optimizer holds parameter 'gone'"):
        DistributedOptimizer(optimizer)


def test_a_parameter_without_a_counterpart_is_an_error_of_the_optimizer():
    run_ranks(wraps_an_optimizer_of_a_parameter_that_is_gone, 1, parameters={})
