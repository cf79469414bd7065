"""What models of transformers give beside the loss in a pipeline, in training and evaluation: hidden states,
attentions, router logits and every other tensor of their outputs, and the gradients of a loss that all of it is part
of. ``RECORDED`` of the catalogue says what each class records; it is part of docs/models.md.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from engine_runs import assert_equal_results, readable
from parity import assert_parity
from pool import preload, run_ranks
from zoo_catalogue import RECORDED, ZOO, as_entry_wants, make_model

#: Classes in `make test`; the others are slow tests.
QUICK = ("t5", "mixtral")
#: What can be asked for, and the word for it in the catalogue.
WORDS = {"hidden_states": "hidden states", "attentions": "attentions", "router_logits": "router logits"}
#: What layers keep there stays at their homes; whoever reads it gets an error (test_holders.py).
CACHES = ("past_key_values", "cache_params", "mems")
#: The second step of a mode runs as the first one has planned.
MODES = ("training", "training", "evaluation", "evaluation")


class Recording:
    """Calls a model, asks it for all that it can record, and keeps every tensor of its outputs."""

    def __init__(self, model: Any, asked: dict[str, bool]) -> None:
        self._model = model
        self._asked = asked
        self.recorded: list[Any] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._model(*args, **kwargs, **self._asked)
        self.recorded.append(tensors_of(output))
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def tensors_of(output: Any) -> Any:
    if isinstance(output, (list, tuple)):
        return [tensors_of(part) for part in output if isinstance(part, (Tensor, list, tuple))]
    if hasattr(output, "keys"):
        return {name: tensors_of(output[name]) for name in output if name not in CACHES}
    return output if isinstance(output, Tensor) else []


def leaves_of(recorded: Any) -> Iterator[Tensor]:
    if isinstance(recorded, Tensor):
        yield recorded
    else:
        for part in recorded.values() if isinstance(recorded, dict) else recorded:
            yield from leaves_of(part)


def fields_of(recorded: Any) -> Iterator[str]:
    """The names under which there are tensors."""
    for part in recorded if isinstance(recorded, list) else ():
        yield from fields_of(part)
    for name, part in recorded.items() if isinstance(recorded, dict) else ():
        if next(leaves_of(part), None) is not None:
            yield name
        yield from fields_of(part)


def words_for(recorded: Any) -> str:
    """As the catalogue says it."""
    fields = set(fields_of(recorded))
    return ", ".join(word for kind, word in WORDS.items() if any(field.endswith(kind) for field in fields))


def recording_model(name: str) -> tuple[Any, dict[str, bool]]:
    """The model, told by its configuration to record all that it can, and the arguments that say so once more."""
    model: Any = make_model(name)
    for part in model.modules():
        config = getattr(part, "config", None)
        if hasattr(config, "output_hidden_states"):
            config._attn_implementation = "eager"
            config.output_hidden_states = config.output_attentions = True
            if hasattr(config, "output_router_logits"):
                config.output_router_logits = True
    arguments = inspect.signature(model.forward).parameters
    return model, {f"output_{kind}": True for kind in WORDS if f"output_{kind}" in arguments}


def loss_with_all(name: str, model: Any, asked: dict[str, bool], batch: tuple[Any, ...]) -> tuple[Tensor, Any]:
    recording = Recording(model, asked)
    loss = ZOO[name].body(recording, *batch)
    for value in leaves_of(recording.recorded):
        if value.is_floating_point() and value.requires_grad and value.numel():
            loss = loss + value.sin().mean() / 8
    return loss, recording.recorded


def record(names: list[str]) -> dict[str, Any]:
    """The body of a rank: of each model what the steps gave, and the gradients; or the error."""
    found: dict[str, Any] = {}
    for name in names:
        try:
            with as_entry_wants(name):
                found[name] = _record_one(name)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def _record_one(name: str) -> tuple[list[Any], dict[str, Tensor]]:
    import modelparallel as smp

    module, asked = recording_model(name)
    model = smp.DistributedModel(module)

    @smp.step
    def step(model: Any, is_training: bool, *batch: Any) -> Any:
        loss, recorded = loss_with_all(name, model, asked, batch)
        if is_training:
            model.backward(loss)
        return loss, recorded

    steps = []
    for index, mode in enumerate(MODES):
        model.train(mode == "training")
        with torch.set_grad_enabled(mode == "training"):
            steps.append(readable(step(model, mode == "training", *ZOO[name].make_batch(index))))
    return steps, {key: value.grad for key, value in model.local_named_parameters() if value.grad is not None}


def plain(name: str, num_microbatches: int) -> tuple[list[Any], dict[str, Tensor]]:
    """The same with torch alone, in this process."""
    with as_entry_wants(name):
        model, asked = recording_model(name)
        steps = []
        for index, mode in enumerate(MODES):
            model.train(mode == "training")
            parts = []
            for microbatch, share in _microbatches(ZOO[name].make_batch(index), num_microbatches):
                with torch.set_grad_enabled(mode == "training"):
                    loss, recorded = loss_with_all(name, model, asked, microbatch)
                if mode == "training":
                    (loss * share).backward()
                parts.append(readable((loss, recorded)))
            steps.append(_by_microbatch(parts))
    return steps, {key: value.grad for key, value in model.named_parameters() if value.grad is not None}


def _microbatches(batch: tuple[Any, ...], number: int) -> Iterator[tuple[tuple[Any, ...], float]]:
    """Each with its share of the samples."""
    total = next(len(argument) for argument in batch if isinstance(argument, Tensor) and argument.ndim)
    for index in range(number):
        part = tuple(
            [
                argument.tensor_split(number)[index] if isinstance(argument, Tensor) and argument.ndim else argument
                for argument in batch
            ]
        )
        yield part, next(len(argument) for argument in part if isinstance(argument, Tensor) and argument.ndim) / total


def _by_microbatch(parts: list[Any]) -> Any:
    """As the output of a step: every tensor is the list of those of the microbatches."""
    first = parts[0]
    if isinstance(first, Tensor):
        return parts
    if isinstance(first, dict):
        return {key: _by_microbatch([part[key] for part in parts]) for key in first}
    if any(len(part) != len(first) for part in parts):
        return parts  # one for each picture, say
    return type(first)(_by_microbatch(list(items)) for items in zip(*parts, strict=True))


def names_of_transformers(*, draws: bool) -> list[str]:
    import transformers

    return [name for name, entry in ZOO.items() if entry.draws == draws and hasattr(transformers, entry.class_name)]


@functools.lru_cache(maxsize=2)
def in_a_pipeline(names: tuple[str, ...], num_stages: int, num_microbatches: int) -> list[dict[str, Any]]:
    for name in names:
        make_model(name)  # imports its class, before the ranks are forked
    preload()
    parameters = {
        "microbatches": num_microbatches, "pipeline_parallel_degree": num_stages, "timeout_seconds": 60, "seed": 3,
    }  # fmt: skip
    return run_ranks(record, num_stages, list(names), parameters=parameters, timeout=900)


def check(names: tuple[str, ...], num_stages: int) -> None:
    ranks = in_a_pipeline(names, num_stages, num_stages)
    failures = []
    for name in names:
        if ZOO[name].draws:  # other numbers than plain torch, but the same on any number of stages
            steps, gradients = in_a_pipeline(names, 1, num_stages)[0][name]
        else:
            steps, gradients = plain(name, num_stages)
        try:
            assert words_for(steps[0][1]) == words_for(steps[2][1]) == RECORDED[name], f"records {words_for(steps)}"
            found: dict[str, Tensor] = {}
            for stage, rank in enumerate(ranks):
                assert not isinstance(rank[name], str), rank[name]
                for index, step in enumerate(rank[name][0]):
                    assert_equal_results(step, steps[index], f"pp_rank {stage}, step {index}")
                found |= rank[name][1]
            assert_parity(found, gradients, dtype=torch.float64)
        except AssertionError as error:
            failures.append(f"{name}: {str(error)[:600]}")
    assert not failures, "\n".join(failures)


def test_recorded_values_equal_those_of_one_process() -> None:
    check(QUICK, 2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("part", range(4))
def test_recorded_values_of_every_class(num_stages: int, part: int) -> None:
    check(tuple(names_of_transformers(draws=False)[part::4]), num_stages)


@pytest.mark.slow
@pytest.mark.parametrize("num_stages", [2, 3])
def test_recorded_values_of_classes_that_draw(num_stages: int) -> None:
    check(tuple(names_of_transformers(draws=True)), num_stages)


@pytest.mark.slow
def test_the_catalogue_says_what_every_class_records() -> None:
    assert set(RECORDED) == {*names_of_transformers(draws=False), *names_of_transformers(draws=True)}
