"""Marks and registrations: what contexts and decorators record before a model is wrapped. One process."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

from modelparallel.errors import PartitionError, TensorParallelError
from modelparallel.job import registry, session
from modelparallel.nn import DistributedLinear, DistributedModule
from modelparallel.tensor_parallel.contexts import (
    partition,
    set_tensor_parallelism,
    tensor_parallelism,
    tp_register,
    tp_register_with_module,
)

PLAIN_INIT = nn.Module.__init__


@pytest.fixture(autouse=True)
def module_init_is_put_back():
    yield
    assert nn.Module.__init__ is PLAIN_INIT


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        with partition(1):
            self.before = nn.Linear(2, 2)
            with partition(2):
                self.inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
            self.after = nn.Linear(2, 2)
        self.outside = nn.Linear(2, 2)


def test_c051_the_innermost_partition_context_wins():
    block = Block()
    assert registry.partition_mark(block.before) == 1
    assert registry.partition_mark(block.inner) == registry.partition_mark(block.inner[0]) == 2
    assert registry.partition_mark(block.after) == 1
    assert registry.partition_mark(block.outside) is None
    assert registry.partition_mark(block) is None


def test_c052_partitions_that_cannot_exist_are_refused(monkeypatch):
    with pytest.raises(PartitionError, match=r"partition\(-1\)"):
        partition(-1)
    with pytest.raises(PartitionError, match="an int, got bool"):
        partition(True)

    class Config:
        pipeline_parallel_degree = 2

    class Session:
        config = Config

    monkeypatch.setattr(session, "is_initialized", lambda: True)
    monkeypatch.setattr(session, "current", lambda: Session)
    assert registry.partition_mark(partition(1)(nn.ReLU)()) == 1
    with pytest.raises(PartitionError, match=r"partition\(2\).*use 0 to 1 .pipeline_parallel_degree=2"):
        partition(2)


def test_contexts_are_decorators_reentrant_and_leave_after_errors():
    context = partition(3)

    @context
    def build(depth):
        if depth:
            return build(depth - 1)
        with context, tensor_parallelism(False):
            return nn.ReLU()

    relu = build(2)
    assert registry.partition_mark(relu) == 3
    assert registry.tensor_parallel_mark(relu).enabled is False
    with pytest.raises(ZeroDivisionError):
        with context:
            raise ZeroDivisionError
    assert nn.Module.__init__ is PLAIN_INIT
    assert registry.partition_mark(nn.ReLU()) is None


def test_contexts_do_not_reach_other_threads():
    made = []
    with partition(1):
        thread = threading.Thread(target=lambda: made.append(nn.ReLU()))
        thread.start()
        thread.join()
        made.append(nn.ReLU())
    assert [registry.partition_mark(module) for module in made] == [None, 1]


def test_another_replacement_of_the_module_constructor_survives():
    calls = []
    with partition(1):
        ours = nn.Module.__init__

        def theirs(self, *args, **kwargs):
            calls.append(type(self).__name__)
            ours(self, *args, **kwargs)

        nn.Module.__init__ = theirs
    try:
        assert registry.partition_mark(nn.ReLU()) is None
        with partition(2):
            assert registry.partition_mark(nn.ReLU()) == 2
        assert nn.Module.__init__ is theirs
        assert calls == ["ReLU", "ReLU"]
    finally:
        nn.Module.__init__ = PLAIN_INIT


def test_marks_survive_deepcopy_and_pickling_and_stay_out_of_state_dicts():
    with partition(1), tensor_parallelism(fused_softmax=False):
        module = nn.Linear(2, 2)
    for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert registry.partition_mark(clone) == 1
        assert registry.tensor_parallel_mark(clone) == registry.TensorParallelMark(True, {"fused_softmax": False})
    assert set(module.state_dict()) == {"weight", "bias"}
    assert b"modelparallel" not in pickle.dumps(module)


def test_c070_the_innermost_tensor_parallel_context_wins():
    with tensor_parallelism(fused_softmax=False):
        outer = nn.Linear(2, 2)
        with tensor_parallelism(False):
            inner = nn.Linear(2, 2)
        with tensor_parallelism(fused_bias_gelu=True):
            other = nn.Linear(2, 2)
    assert registry.tensor_parallel_mark(outer).enabled
    assert not registry.tensor_parallel_mark(inner).enabled
    assert registry.tensor_parallel_mark(other) == registry.TensorParallelMark(True, {"fused_bias_gelu": True})
    assert registry.tensor_parallel_mark(nn.Linear(2, 2)) is None


def test_c071_later_calls_override_earlier_ones_for_the_overlap():
    layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2))
    set_tensor_parallelism(layers, True, fused_softmax=True)
    set_tensor_parallelism(layers[1], False)
    assert registry.tensor_parallel_mark(layers[0][0]) == registry.TensorParallelMark(True, {"fused_softmax": True})
    assert (
        registry.tensor_parallel_mark(layers[1]).enabled is registry.tensor_parallel_mark(layers[1][0]).enabled is False
    )
    set_tensor_parallelism(layers[1][0])
    assert registry.tensor_parallel_mark(layers[1][0]).enabled


def test_wrong_arguments_are_named():
    with pytest.raises(TensorParallelError, match=r"enabled must be a bool, got Linear"):
        tensor_parallelism(nn.Linear(2, 2))
    with pytest.raises(TensorParallelError, match=r"expected an nn\.Module, got list"):
        set_tensor_parallelism([nn.Linear(2, 2)])
    with pytest.raises(TensorParallelError, match=r"subclass of smp.nn.DistributedModule, got <class .*Linear"):
        tp_register_with_module(nn.Conv2d, nn.Linear)
    with pytest.raises(TensorParallelError, match="forward_hook must be a function or None, got str"):
        tp_register(DistributedLinear, None, "hook")
    with pytest.raises(TensorParallelError, match=r"module_cls must be a subclass of nn\.Module"):
        tp_register_with_module(len, DistributedLinear)
    registry.note_wrapped(net := nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(TensorParallelError, match=r"(?s)already part of a smp.DistributedModel.*right: smp.set_tensor"):
        set_tensor_parallelism(net[0])
    set_tensor_parallelism(copy.deepcopy(net))


def test_constructor_arguments_are_recorded_exactly():
    class Base(nn.Module):
        def __init__(self, first, *rest, scale=1.0, **extra):
            super().__init__()

    class Child(Base):
        pass

    early = Base(0)
    tp_register_with_module(Base, DistributedModule)
    init = Base.__init__
    tp_register_with_module(Base, DistributedModule)
    assert Base.__init__ is init, "wrapped once"
    table = object()
    recorded = registry.constructor_arguments(Base(1, 2, table, scale=3, name="x"))
    assert recorded == registry.ConstructorArguments((1, 2, table), {"scale": 3, "name": "x"})
    assert registry.constructor_arguments(early) is None
    assert registry.constructor_arguments(Child(1)) is None
    assert registry.registration_for(Child(1)) is None
    assert registry.registration_for(early).distributed_class is DistributedModule


def test_torch_classes_are_not_patched():
    init = nn.Linear.__init__
    linear = nn.Linear(3, 4, bias=False, dtype=torch.float64)
    recorded = registry.constructor_arguments(linear)
    assert recorded.positional == (3, 4)
    assert recorded.keyword == {"bias": False, "device": torch.device("cpu"), "dtype": torch.float64}
    embedding = registry.constructor_arguments(nn.Embedding(5, 6, padding_idx=-1, max_norm=2.0))
    assert embedding.positional == (5, 6)
    assert embedding.keyword["padding_idx"] == 4
    assert embedding.keyword["max_norm"] == 2.0
    assert nn.Linear.__init__ is init
