"""Calls of step functions: forms of the decorator, arguments, order, errors (smp-api section 4, clients 1.0)."""

from __future__ import annotations

import argparse
import os
import signal
import time
from typing import Any

import pytest
import torch
from torch import nn

import modelparallel as smp
from modelparallel.errors import (
    CommunicationError,
    DivergenceError,
    SMPConfigError,
    SMPError,
    StepUsageError,
    WaitTimeoutError,
)
from parity import assert_parity
from pool import RankFailure, run_ranks
from rank_tests import RankTests, on
from small_models import make_batch, make_classifier, mean_loss, train_step
from training import sgd

MB4 = RankTests(1, {"microbatches": 4})
PP2 = RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 4})
APART = [RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 2, "timeout_seconds": 1.5}) for _ in range(3)]
APART_DP = RankTests(2, {"microbatches": 2, "timeout_seconds": 1.5})
ALL = (MB4, PP2)


class Trainer:
    """A script's class with a step function in its body, without self."""

    def __init__(self, model):
        self.model = model

    @smp.step
    def train_step(model: Any, x, y):  # a step function is no method
        loss = mean_loss(model, x, y)
        model.backward(loss)
        return loss

    def run(self, x, y):
        return self.train_step(self.model, x, y)


@on(*ALL)
def test_a_step_function_does_not_bind_as_a_method():
    x, y = make_batch(8)
    loss = Trainer(smp.DistributedModel(make_classifier())).run(x, y)
    torch.testing.assert_close(loss.reduce_mean(), mean_loss(make_classifier(), x, y).detach())
    assert not hasattr(Trainer.__dict__["train_step"], "__get__")


@on(*ALL)
def test_all_forms_of_the_decorator_and_what_it_keeps_of_the_function():
    def body(x):
        """Says what it does."""
        return x.sum()

    for decorated in (smp.step(body), smp.step()(body), smp.step(detach_outputs=True)(body)):
        assert decorated.__name__ == "body" and decorated.__doc__ == "Says what it does."
        assert float(decorated(torch.ones(4)).reduce_sum()) == 4
    with pytest.raises(SMPConfigError, match="keyword arguments only"):
        smp.step(["mask"])


@on(*ALL)
def test_names_that_are_no_arguments_are_refused():
    for options in ({"non_split_inputs": ["mask"]}, {"input_split_axes": {"mask": 1}}):
        with pytest.raises(ValueError, match=r"'mask', which is not an argument of body\(x, y\)"):

            @smp.step(**options)
            def body(x, y):
                return x

    @smp.step(input_split_axes={"x": 1})
    def no_axis(x):
        return x

    with pytest.raises(StepUsageError, match=r"'x' has a tensor of shape \(4,\), which has no axis 1"):
        no_axis(torch.ones(4))


@on(*ALL)
def test_every_kind_of_parameter():
    @smp.step(input_split_axes={"extra": 1})
    def body(first, /, second=2, *rest, key, default=10, **others):
        shapes = " ".join(str(list(value.shape)) for value in (*rest, *others.values()))
        return len(first), second, shapes, key, default, sorted(others)

    x = torch.zeros(8, 4)
    result = body(x, 5, x, x, key="k", extra=x, more=x)
    assert result[0] == [2] * 4 and result[1] == [5] * 4 and result[3] == ["k"] * 4 and result[4] == [10] * 4
    assert result[5] == [["extra"] * 4, ["more"] * 4]
    assert result[2] == ["[2, 4] [2, 4] [8, 1] [2, 4]"] * 4
    with pytest.raises(TypeError, match="missing a required"):
        body(x)


@on(*ALL)
def test_arguments_of_every_kind_that_scripts_pass():
    from transformers.tokenization_utils_base import BatchEncoding

    @smp.step
    def body(args, model, optimizer, criterion, device, number, inputs, loader, data, target):
        assert type(inputs) is BatchEncoding and inputs["name"] == "batch" and len(inputs["ids"]) == 2
        assert args.rank == smp.rank() and isinstance(optimizer, smp.DistributedOptimizer) and loader[0] == number
        loss = criterion(model(data.to(device)), target) * args.factor
        model.backward(loss)
        return loss

    model = smp.DistributedModel(make_classifier())
    optimizer = smp.DistributedOptimizer(sgd(model.parameters()))
    args = argparse.Namespace(rank=smp.rank(), factor=2.0)
    inputs = BatchEncoding({"ids": torch.arange(8), "name": "batch"})
    x, y = make_batch(8)
    loss = body(args, model, optimizer, nn.NLLLoss(), torch.device("cpu"), 3, inputs, range(3, 5), data=x, target=y)
    torch.testing.assert_close(loss.reduce_mean(), 2 * mean_loss(make_classifier(), x, y).detach())
    assert type(inputs) is BatchEncoding and len(inputs["ids"]) == 8


@on(*ALL)
def test_a_step_function_inside_another_is_refused_and_the_next_call_works():
    @smp.step
    def inner(x):
        return x.sum()

    @smp.step
    def outer(x):
        return inner(x)

    with pytest.raises(StepUsageError, match=r"inner is decorated with @smp\.step and was called inside another"):
        outer(torch.ones(4))
    assert float(inner(torch.ones(4)).reduce_sum()) == 4


@on(*ALL)
def test_two_step_functions_in_turn_train_one_model():
    @smp.step
    def other_step(model, y, x):
        loss = (model(x) ** 2).mean()
        model.backward(loss)
        return loss

    model = smp.DistributedModel(make_classifier())
    optimizer = smp.DistributedOptimizer(sgd(model.parameters()))
    plain = make_classifier()
    plain_optimizer = sgd(plain.parameters())
    for step in range(4):
        x, y = make_batch(8, seed=step)
        optimizer.zero_grad()
        plain_optimizer.zero_grad()
        if step % 2:
            train_step(model, x, y)
            mean_loss(plain, x, y).backward()
        else:
            other_step(model, y, x=x)
            (plain(x) ** 2).mean().backward()
        optimizer.step()
        plain_optimizer.step()
    assert_parity(model.state_dict(), plain.state_dict(), dtype=torch.float64)


@on(*ALL)
def test_a_step_without_tensors_runs_each_microbatch():
    @smp.step
    def body(number):
        return torch.tensor(float(number)), number

    output, numbers = body(3)
    assert numbers == [3] * 4 and output.stack().tolist() == [3.0] * 4
    assert smp.step(lambda: None)() == [None] * 4


@on(*ALL)
def test_integer_and_boolean_outputs_reduce():
    @smp.step
    def body(x):
        return (x > 2).sum(), x > 2, x.to(torch.int32)

    count, flags, values = body(torch.arange(8.0))
    assert int(count.reduce_sum()) == 5 and float(count.reduce_mean()) == 1.25
    assert flags.concat().tolist() == [False] * 3 + [True] * 5
    assert values.concat().dtype == torch.int32
    assert "4 x (2,)" in repr(values)


@on(*ALL)
def test_plain_backward_inside_a_step_is_refused():
    model = smp.DistributedModel(make_classifier())

    @smp.step
    def body(model, x, y):
        loss = mean_loss(model, x, y)
        loss.backward()
        return loss

    with pytest.raises(StepUsageError, match=r"model\.backward\(loss\)"):
        body(model, *make_batch(8))


@on(*ALL)
def test_an_error_of_every_rank_leaves_the_next_step_intact():
    model = smp.DistributedModel(make_classifier())
    x, y = make_batch(8)

    @smp.step
    def broken(model, x, y):
        mean_loss(model, x, y)
        if not smp.is_tracing():
            raise KeyError("the script's own mistake")

    with pytest.raises(KeyError, match="the script's own mistake"):
        broken(model, x, y)
    _, loss = train_step(model, x, y)
    torch.testing.assert_close(loss.reduce_mean(), mean_loss(make_classifier(), x, y).detach())


@on(*ALL)
def test_a_step_takes_one_random_number_from_the_script_whatever_it_draws():
    """Its seed; so a script that puts the generator's state back repeats what the step drew."""
    torch.manual_seed(11)
    before = torch.get_rng_state()
    torch.randint(2**62 - 1, ())
    expected = torch.get_rng_state()
    for draw in (lambda: 0.0, lambda: torch.rand(2), lambda: torch.rand(3, 2).sum() + torch.rand(())):
        torch.set_rng_state(before)
        smp.step(lambda x, draw=draw: x + draw())(torch.ones(4, 2))
        assert torch.equal(torch.get_rng_state(), expected)
    drawing = smp.step(lambda x: x + torch.rand(2))
    torch.set_rng_state(before)
    first, second = drawing(torch.zeros(4, 2)).concat(), drawing(torch.zeros(4, 2)).concat()
    torch.set_rng_state(before)
    assert torch.equal(drawing(torch.zeros(4, 2)).concat(), first) and not torch.equal(second, first)


# Calls that differ between the ranks: in process sets of their own, since the connections are of no use afterwards


def error_within(seconds: float, call: Any, *expected: type[SMPError]) -> str:
    """The message of the error that ``call`` must end in."""
    start = time.monotonic()
    with pytest.raises(expected) as caught:
        call()
    assert time.monotonic() - start < seconds, "an error, but too late"
    assert "pp_rank" in str(caught.value), str(caught.value)
    return str(caught.value)


@smp.step
def other_step(model, x):
    return model(x)


@on(APART[0])
def test_step_calls_in_another_order_stop_with_a_named_error():
    model = smp.DistributedModel(make_classifier())
    x, y = make_batch(8)
    train_step(model, x, y)
    call = (lambda: train_step(model, x, y)) if smp.pp_rank() == 0 else (lambda: other_step(model, x))
    text = error_within(1, call, DivergenceError)  # at once, on both
    assert "pp_rank 1 calls the step function test_step_calls.other_step at test_step_calls.py:" in text
    assert "pp_rank 0 calls small_models.train" in text


@on(APART[1])
def test_another_number_of_step_calls_stops_with_a_named_error():
    model = smp.DistributedModel(make_classifier())
    x, y = make_batch(8)
    train_step(model, x, y)
    if smp.pp_rank() == 1:
        text = error_within(10, lambda: train_step(model, x, y), WaitTimeoutError)
        assert "waiting to receive the inputs of the step from pp_rank 0" in text


@on(APART[2])
def test_an_exception_on_one_stage_ends_the_others_with_a_named_error():
    model = smp.DistributedModel(make_classifier())
    x, y = make_batch(8)

    @smp.step
    def broken(model, x, y):
        if smp.pp_rank() == 0 and not smp.is_tracing():
            raise KeyError("the script's own mistake")
        return mean_loss(model, x, y)

    if smp.pp_rank() == 0:
        with pytest.raises(KeyError, match="the script's own mistake"):
            broken(model, x, y)
    else:
        text = error_within(2, lambda: broken(model, x, y), CommunicationError)
        assert "microbatch 0" in text and "small_models.py" in text and "the script's own mistake" in text


@on(APART_DP)
def test_an_exception_on_one_copy_ends_the_others_with_a_named_error():
    model = smp.DistributedModel(make_classifier())
    x, y = make_batch(8)
    train_step(model, x, y)

    @smp.step
    def broken(model, x, y):
        if smp.dp_rank() == 0:
            raise KeyError("the script's own mistake")
        loss = mean_loss(model, x, y)
        model.backward(loss)
        return loss

    start = time.monotonic()
    with pytest.raises(KeyError if smp.dp_rank() == 0 else WaitTimeoutError) as caught:
        broken(model, x, y)
    assert time.monotonic() - start < 10
    assert smp.dp_rank() == 0 or "first.weight" in str(caught.value), str(caught.value)


# Failures of one process, with a wait that is long: the others must not sit it out


def step_that_fails(how: str) -> tuple[str, float]:
    model = smp.DistributedModel(make_classifier())
    x, y = make_batch(8)
    train_step(model, x, y)

    @smp.step
    def broken(model, x, y):
        loss = mean_loss(model, x, y)
        if smp.rank() == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(3)
        model.backward(loss)
        return loss

    start = time.monotonic()
    try:
        for _ in range(2):
            broken(model, x, y)
    except SMPError as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - start
    return "no error", 0.0


@pytest.mark.parametrize("how", ["killed", "ended"])
@pytest.mark.parametrize("degree", [1, 2])
def test_a_process_that_dies_in_a_step_ends_the_others_with_a_named_error(how, degree):
    parameters = {"pipeline_parallel_degree": degree, "microbatches": 2, "ddp": True, "timeout_seconds": 60}
    results = run_ranks(step_that_fails, 2, how, parameters=parameters, return_failures=True, grace=20)
    assert isinstance(results[1], RankFailure)
    text, seconds = results[0]
    assert text.startswith("CommunicationError") and seconds < 10, text
