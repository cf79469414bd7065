"""The parity assertion sees what it must see, and the reference equals the whole batch."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from parity import assert_parity, assert_same_training, reference_run


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def body(model, x, y, scale):
    return functional.cross_entropy(model(x), y) * scale


def test_reference_equals_the_whole_batch_also_when_split_unevenly():
    x, y = torch.randn(10, 5, dtype=torch.float64), torch.randint(0, 3, (10,))
    settings = {"make_optimizer": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "num_steps": 3}
    whole = reference_run(make_net, [(x, y, 2.0)], body, **settings)
    split = reference_run(make_net, [(x, y, 2.0)], body, num_microbatches=3, num_copies=2, **settings)
    assert_same_training(split, whole, dtype=torch.float64)
    assert whole.losses[-1] < whole.losses[0] and set(whole.weights) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_fewer_samples_than_microbatches_skip_the_empty_ones():
    x, y = torch.randn(2, 5, dtype=torch.float64), torch.tensor([0, 2])
    settings = {"make_optimizer": lambda p: torch.optim.SGD(p, lr=0.1)}
    a = reference_run(make_net, [(x, y, 1.0)], body, num_microbatches=4, **settings)
    b = reference_run(make_net, [(x, y, 1.0)], body, **settings)
    assert_parity(a.weights, b.weights, dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-7), (torch.float32, 1e-3)])
def test_a_small_difference_is_found_and_the_worst_tensor_named(dtype, relative):
    expected = {"a": torch.randn(8, dtype=dtype), "b": torch.randn(3, 3, dtype=dtype)}
    assert_parity({name: tensor.clone() for name, tensor in expected.items()}, expected, dtype=dtype)
    actual = {"a": expected["a"], "b": expected["b"] * (1 + relative)}
    with pytest.raises(AssertionError, match="the worst is 'b'"):
        assert_parity(actual, expected, dtype=dtype)
    with pytest.raises(AssertionError, match=r"missing \['b'\]"):
        assert_parity({"a": expected["a"]}, expected, dtype=dtype)
    with pytest.raises(AssertionError, match="not finite"):
        assert_parity({**expected, "a": expected["a"] * float("nan")}, expected, dtype=dtype)
