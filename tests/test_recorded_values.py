"""What models of transformers record in a pipeline, in training and evaluation: hidden states, attentions, router
logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine_runs import assert_equal_results, readable
from pool import preload, run_ranks
from test_zoo import as_entry_wants, make_model
from zoo_catalogue import ZOO

FIELDS = (
    "hidden_states", "attentions", "encoder_hidden_states", "decoder_hidden_states", "encoder_attentions",
    "decoder_attentions", "cross_attentions", "router_logits", "encoder_router_logits", "decoder_router_logits",
    "global_attentions", "reshaped_hidden_states",
)  # fmt: skip
#: Classes that record something, in `make test`; the others are slow tests.
QUICK = ("t5", "mixtral")


class Recording:
    """Calls a model, and keeps what it has recorded."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.recorded: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._model(*args, **kwargs)
        if hasattr(output, "keys"):
            self.recorded = {name: output[name] for name in FIELDS if output.get(name) is not None}
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def recording_model(name: str) -> Any:
    """The model, told to record all that it can."""
    model: Any = make_model(name)
    for part in model.modules():
        config = getattr(part, "config", None)
        if hasattr(config, "output_hidden_states"):
            config._attn_implementation = "eager"
            config.output_hidden_states = config.output_attentions = True
            if hasattr(config, "output_router_logits"):
                config.output_router_logits = True
    return model


def record(names: list[str]) -> dict[str, Any]:
    """Of each model: the losses of a step in training and one in evaluation, and what it has recorded in them."""
    import modelparallel as smp

    found: dict[str, Any] = {}
    for name in names:
        try:
            with as_entry_wants(name):
                model = smp.DistributedModel(recording_model(name))
                found[name] = {"training": _step(smp, model, name), "evaluation": _step(smp, model.eval(), name)}
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def _step(smp: Any, model: Any, name: str) -> Any:
    body: Callable[..., Any] = ZOO[name].body
    is_training = model.training

    @smp.step
    def step(model: Any, *batch: Any) -> Any:
        recording = Recording(model)
        loss = body(recording, *batch)
        if is_training:
            model.backward(loss)
        return loss, recording.recorded

    with torch.set_grad_enabled(is_training):
        return readable(step(model, *ZOO[name].make_batch(0)))


def names_of_transformers() -> list[str]:
    """Those that plain torch need not be compared with the library for."""
    return [name for name, entry in ZOO.items() if not entry.draws and is_of_transformers(name)]


def is_of_transformers(name: str) -> bool:
    import transformers

    return hasattr(transformers, ZOO[name].class_name)


@functools.lru_cache(maxsize=4)
def recorded(names: tuple[str, ...], num_stages: int) -> list[dict[str, Any]]:
    for name in names:
        is_of_transformers(name)  # imported
    preload()
    parameters = {"microbatches": 2, "pipeline_parallel_degree": num_stages, "timeout_seconds": 60, "seed": 3}
    return run_ranks(record, num_stages, list(names), parameters=parameters, timeout=900)


def check(names: tuple[str, ...], num_stages: int) -> None:
    expected = recorded(names, 1)[0]
    failures = []
    num_recorded = 0
    for rank, found in enumerate(recorded(names, num_stages)):
        for name in names:
            wanted, results = expected[name], found[name]
            if isinstance(wanted, str):  # this class cannot record: one process says so
                continue
            try:
                assert not isinstance(results, str), results
                assert_equal_results(results, wanted, f"{name} on pp_rank {rank}")
                num_recorded += bool(wanted["training"][1])
            except AssertionError as error:
                failures.append(f"{name} on pp_rank {rank}: {str(error)[:400]}")
    assert not failures, "\n".join(failures)
    assert num_recorded >= num_stages * len(names) // 2, "most classes record something"


def test_recorded_values_equal_those_of_one_process() -> None:
    check(QUICK, 2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("part", range(4))
def test_recorded_values_of_every_class(num_stages: int, part: int) -> None:
    check(tuple(names_of_transformers()[part::4]), num_stages)
