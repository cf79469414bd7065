"""What a pipeline cannot do ends with an error that names it, on every stage, and never with a hang."""

from __future__ import annotations

import io
import os
import pickle
import re
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine_models import WIDTH, Held, Returns, between
from engine_runs import wrapped
from pool import RankFailure, run_ranks
from stages_apart import chain, finish

PARAMETERS = {
    "pipeline_parallel_degree": 2, "microbatches": 2, "timeout_seconds": 5, "auto_partition": False,
    "default_partition": 0,
}  # fmt: skip
KEPT: dict[str, Any] = {}


def batch() -> Tensor:
    return torch.ones(4, WIDTH, dtype=torch.float64)


# Errors that every stage comes to by itself


def keeps_value(model: Any, x: Tensor) -> Tensor:
    y = model(x)
    if "value" in KEPT:
        y = y + KEPT.pop("value")
    else:
        KEPT["value"] = y
    return finish(model, y)


def keeps_on_module(self: Any, x: Tensor) -> Tensor:
    y = chain(self, x)
    last = self.__dict__.get("last")
    self.__dict__["last"] = y
    return y if last is None else y + last


def own_criterion(model: Any, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return finish(model, nn.Linear(WIDTH, 2).double()(model(x)))


def own_parameter(model: Any, x: Tensor) -> Tensor:
    return finish(model, model(x) * nn.Parameter(torch.ones(WIDTH, dtype=torch.float64)))


def input_with_grad(model: Any, x: Tensor) -> Tensor:
    KEPT["x"] = x.clone().requires_grad_()
    return finish(model, model(KEPT["x"]))


def grad_of_input(model: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return finish(model, model(x)) + x.grad


def hook_of_input(model: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    loss = finish(model, model(x))
    x.register_hook(print)
    return loss


def hook_before(model: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    x.register_hook(print)
    return finish(model, model(x))


def not_from_model(model: Any, x: Tensor) -> Tensor:
    model.backward(x.mean())
    return model(x).mean()


def stale_view(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    left, right = y[:, :5], y[:, 3:]
    del y
    z = self.b(left.sum() + x)  # left and right are cut here, each for itself
    left.mul_(2.0)
    return z + right.sum()


def saves(self: Any, x: Tensor) -> Tensor:
    torch.save(self.b(self.a(x)), io.BytesIO())
    return x


def loss_backward(model: Any, x: Tensor) -> Tensor:
    loss = model(x).mean()
    loss.backward()
    return loss


def grad_of_value(model: Any, x: Tensor) -> Tensor:
    y = model(x)
    loss = finish(model, y)
    return loss + y.grad


def not_scalar(model: Any, x: Tensor) -> Tensor:
    y = model(x)
    model.backward(y)
    return y


def two_outs(self: Any, x: Tensor) -> Tensor:
    y = self.b(self.a(x))
    torch.max(y, dim=0, out=(torch.empty(0), torch.empty(0, dtype=torch.long)))
    return y


def converts(self: Any, x: Tensor) -> Tensor:
    return self.b.to(torch.float32)(self.a(x).float())


def sets_data(self: Any, x: Tensor) -> Tensor:
    y = self.b(self.a(x))
    y.data = torch.zeros(3)
    return y


def other_model(model: Any, x: Tensor) -> Tensor:
    return finish(model, KEPT["plain"](model(x)))


def run(body: Callable[..., Any], forward: Callable[..., Any] = chain) -> tuple[Callable[..., Any], Any]:
    return body, lambda: Held(forward)


def trains(model: Any, x: Tensor) -> Tensor:
    return finish(model, model(x))


ALIKE: dict[str, tuple[Callable[..., Any], Callable[[], nn.Module], str]] = {
    "value_of_other_microbatch": (*run(keeps_value), "value of microbatch 0 is used in microbatch 1"),
    "value_on_self": (*run(trains, keeps_on_module), "microbatch 0 is used in microbatch 1"),
    "criterion_with_weights": (*run(own_criterion), "belongs to no smp.DistributedModel"),
    "parameter_of_nobody": (*run(own_parameter), "belongs to no smp.DistributedModel"),
    "input_with_grad": (*run(input_with_grad), "belongs to no smp.DistributedModel"),
    "grad_of_input": (*run(grad_of_input), "belongs to no smp.DistributedModel"),
    "hook_of_input": (*run(hook_of_input), "belongs to no smp.DistributedModel"),
    "hook_before": (*run(hook_before), "belongs to no smp.DistributedModel"),
    "not_from_model": (*run(not_from_model), "does not depend on the model's parameters"),
    "torch_save": (*run(trains, saves), "cannot be pickled or saved inside smp.step"),
    "loss_backward": (*run(loss_backward), r"use model.backward\(loss\)"),
    "grad_of_value": (*run(grad_of_value), "gradients inside a step are not known"),
    "not_scalar": (*run(not_scalar), "needs a scalar"),
    "two_outs": (*run(trains, two_outs), "out=several tensors"),
    "sets_data": (*run(trains, sets_data), "setting .data"),
    "converts": (*run(trains, converts), r"'b' is converted .*'weight' \(torch.float64, cpu\) one of torch.float32"),
}


def stepped(body: Callable[..., Any]) -> Any:
    import modelparallel as smp

    return smp.step(body)


def run_alike() -> dict[str, str]:
    """Each program's error; after each of them the pipeline still works."""
    found = {}
    healthy = wrapped(lambda: Held(chain))
    plain = stepped(trains)
    first = float(plain(healthy, batch()).reduce_mean())
    for name, (body, make, _) in ALIKE.items():
        model = wrapped(make)
        try:
            stepped(body)(model, batch())
            found[name] = "no error"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        KEPT.clear()
        assert float(plain(healthy, batch()).reduce_mean()) == first, name
    return found


def test_errors_of_programs_are_named_on_every_stage_and_the_next_step_works() -> None:
    for rank, found in enumerate(run_ranks(run_alike, 2, parameters=PARAMETERS)):
        for name, (_, _, expected) in ALIKE.items():
            assert re.search(expected, found[name]), f"{name} on pp_rank {rank}: {found[name]}"


# Errors that one stage comes to, and tells


def appends(y: Tensor, record: list[Tensor]) -> Tensor:
    record.append(y)
    return y


class Recorded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), Returns(appends)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x), [])


class Generates(nn.Module):
    """Reads, in a second call of a decoder, what its layers have stored in the first one."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
        self.decoder = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))

    def forward(self, x: Tensor) -> Tensor:
        ids = (x[:, :4] > 0).long()
        first = self.decoder(input_ids=ids)
        return self.decoder(input_ids=ids[:, -1:], past_key_values=first.past_key_values).logits


def varies(y: Tensor) -> Tensor:
    return y[y[:, 0] > 0]


def raises(y: Tensor) -> Tensor:
    raise KeyError("inside the module")


def returns_module(y: Tensor) -> Any:
    return y, nn.Identity()


def varying_batch(step: int) -> Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


TOLD: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "mutated_argument": (Recorded, "UnsupportedError: module 'second'.* changed its argument of type list"),
    "read_cache": (
        Generates,
        "UnsupportedError: module 'decoder.model.layers.*changed its argument of type DynamicCache",
    ),
    "varying_shape": (between(varies, lambda y, x: y.sum() * x), "DivergenceError: module 'second'.*smp.dynamic"),
    "exception": (between(raises, lambda y, x: y), "KeyError: .inside the module"),
    "stale_view": (lambda: Held(stale_view), "StepUsageError: operation mul_ wrote in place.*shares memory"),
    "returns_module": (between(returns_module, lambda y, x: y[0]), "UnsupportedError: module 'second'.*Identity"),
}


def run_told(name: str) -> tuple[str, float]:
    model = wrapped(TOLD[name][0])
    train = stepped(trains)
    start = time.perf_counter()
    try:
        for step in range(8):
            train(model, varying_batch(step))
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.perf_counter() - start
    return "no error", 0.0


@pytest.mark.parametrize("name", list(TOLD))
def test_error_of_one_stage_reaches_the_others_at_once(name: str) -> None:
    found = run_ranks(run_told, 2, name, parameters=PARAMETERS | {"timeout_seconds": 30})
    for rank, (error, seconds) in enumerate(found):
        assert re.search(TOLD[name][1], error, re.DOTALL), f"pp_rank {rank}: {error}"
        assert seconds < 10
    texts = [error for error, _ in found]
    assert sum("the step of pp_rank" in text for text in texts) == 1, texts


def run_dynamic() -> list[float]:
    import modelparallel as smp

    model = wrapped(between(varies, lambda y, x: y.sum() * x))
    smp.dynamic(model.module.second)
    train = stepped(trains)
    return [float(train(model, varying_batch(step)).reduce_mean()) for step in range(8)]


def test_module_marked_as_dynamic_may_return_what_it_likes() -> None:
    expected = run_ranks(run_dynamic, 1, parameters={"microbatches": 2})[0]
    for losses in run_ranks(run_dynamic, 2, parameters=PARAMETERS):
        assert losses == pytest.approx(expected, rel=1e-12)


# Stages that go apart, sleep or die


def ask(body: Callable[..., Any]) -> tuple[str, float]:
    model = wrapped(lambda: Held(chain))
    train = stepped(trains)
    train(model, batch())
    bad = stepped(body)
    start = time.perf_counter()
    try:
        bad(model, batch())
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.perf_counter() - start
    return "no error", time.perf_counter() - start


def sleeps(model: Any, x: Tensor) -> Tensor:
    import modelparallel as smp

    if smp.pp_rank() == 1:
        time.sleep(4)
    return finish(model, model(x))


def backward_in_a_hook(model: Any, x: Tensor) -> Tensor:
    output = model(x)
    for parameter in model.local_parameters():
        parameter.register_hook(lambda gradient: model.backward(gradient.sum()))
    return finish(model, output)


def calls_on_one(model: Any, x: Tensor) -> Tensor:
    import modelparallel as smp

    y = model(x)
    if smp.pp_rank() == 0:
        y = model(y)
    return finish(model, y)


def reads_large_on_one(model: Any, x: Tensor) -> Tensor:
    import modelparallel as smp

    y = model(x).repeat(2000, 1)
    if smp.pp_rank() == 0:
        print(y[0, 0].item())  # a view of a large value: not known everywhere
    return finish(model, y)


def fails_on_one(model: Any, x: Tensor) -> Tensor:
    import modelparallel as smp

    y = model(x)
    if smp.pp_rank() == 0:
        raise KeyError("only here")
    return finish(model, y)


def dies(model: Any, x: Tensor) -> Tensor:
    import modelparallel as smp

    y = model(x)
    if smp.pp_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return finish(model, y)


def test_sleeping_stage_ends_in_a_timeout_that_says_who_waits_for_what() -> None:
    found = run_ranks(ask, 2, sleeps, parameters=PARAMETERS | {"timeout_seconds": 1.5})
    error, seconds = found[0]
    assert error.startswith("WaitTimeoutError: pp_rank 0, microbatch 0: waiting to receive c input from pp_rank 1"), (
        error
    )
    assert re.search(r"stages_apart\.py:\d+", error) and "timeout_seconds=1.5" in error and "event 2: " in error
    assert seconds < 4


@pytest.mark.parametrize("body", [calls_on_one, reads_large_on_one, fails_on_one])
def test_stages_that_go_apart_end_within_seconds(body: Callable[..., Any]) -> None:
    found = run_ranks(ask, 2, body, parameters=PARAMETERS | {"timeout_seconds": 3})
    expected = r"^(DivergenceError|WaitTimeoutError|CommunicationError|KeyError): "
    for error, seconds in found:
        assert re.search(expected, error) and seconds < 8, error
    if body is fails_on_one:
        assert "KeyError: 'only here'" in found[1][0] and found[1][1] < 2


def test_killed_stage_ends_the_others_within_seconds() -> None:
    found = run_ranks(ask, 2, dies, parameters=PARAMETERS | {"timeout_seconds": 60}, return_failures=True, grace=10)
    assert isinstance(found[1], RankFailure)
    assert not isinstance(found[0], RankFailure), found[0]
    error, seconds = found[0]
    assert error.startswith("CommunicationError: pp_rank 0") and "the connection is gone" in error and seconds < 5


def test_backward_in_a_hook_of_the_backward_is_named() -> None:
    texts = [text for text, _ in run_ranks(ask, 2, backward_in_a_hook, parameters=PARAMETERS)]
    assert any("StepUsageError: model.backward was called while no microbatch runs its forward" in t for t in texts)
    assert not any(text == "no error" for text in texts), texts


# After the step


def run_after() -> dict[str, str]:
    model = wrapped(lambda: Held(chain))

    def keep(model: Any, x: Tensor) -> Any:
        y = model(x)
        KEPT["y"] = y
        return finish(model, y), {"y": y, "pair": (y, None)}

    loss, output = stepped(keep)(model, batch())
    found = {}
    for name, use in {
        "add": lambda y: y + 1, "item": lambda y: y.mean().item(), "module": lambda y: F.relu(y),
        "pickle": lambda y: pickle.dumps(y), "call": lambda y: model(y),
    }.items():  # fmt: skip
        try:
            use(KEPT["y"])
            found[name] = "no error"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    assert output["y"].outputs[0].shape == (2, WIDTH) and output["pair"][1] == [None, None]
    KEPT.clear()
    found["loss"] = f"{float(loss.reduce_mean()):.9f}"
    return found


def test_values_end_with_the_step() -> None:
    first, second = run_ranks(run_after, 2, parameters=PARAMETERS)
    assert first == second
    for name in ("add", "item", "module"):
        assert "used after the step has ended" in first[name], (name, first[name])
    assert "cannot be pickled" in first["pickle"]
    assert "can only be called inside a step function" in first["call"]


# Recomputation around a placed module


def run_checkpointed(use_reentrant: bool) -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.a(x)
        x = checkpoint(self.b, x, use_reentrant=use_reentrant)
        return self.d(checkpoint(lambda y: torch.tanh(self.c(y)), x, use_reentrant=use_reentrant))

    model = wrapped(lambda: Held(forward))
    loss = float(stepped(trains)(model, batch()).reduce_mean())
    return loss, {name: p.grad.clone() for name, p in model.local_named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_around_placed_modules_gives_the_same_gradients(use_reentrant: bool) -> None:
    expected = run_ranks(run_checkpointed, 1, use_reentrant, parameters={"microbatches": 2})[0]
    for loss, gradients in run_ranks(run_checkpointed, 2, use_reentrant, parameters=PARAMETERS):
        assert loss == pytest.approx(expected[0], rel=1e-12)
        assert gradients
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[1][name], rtol=1e-9, atol=1e-12)
