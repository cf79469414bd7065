"""Unmodified models in a pipeline against one process: losses, every gradient by name, weights after optimizer
steps.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from engine_runs import SCHEDULES, scatter
from modelparallel.config.table import Config
from parity import ReferenceResult, assert_parity, reference_run
from pool import preload, run_ranks
from training import step_of
from zoo_catalogue import NUM_STAGES, ZOO, as_entry_wants, make_model, split_document, table

SETTINGS: dict[str, dict[str, Any]] = {
    **{schedule: {"pipeline": schedule} for schedule in SCHEDULES},
    "no_pushes": {"pipeline": SCHEDULES[-1], "push_limit_bytes": 0},
}
# Those that `make test` trains, each second one on the most stages and the others on the fewest; `make test-all` trains
# all of them, in all settings.
QUICK = (
    "llama qwen2 gemma2 gpt2_tied gptj opt falcon bert_tied albert deberta_v2 xlnet distilbert longformer t5 bart "
    "marian mixtral qwen2_moe switch mamba2 jamba vit swin convnext resnet segformer wav2vec2 whisper clip "
    "patch_tst torch_transformer torch_encoder torch_lstm densenet unet lstm tree looped called_twice early_exit "
    "branching containers gluey routed cnn_batchnorm"
).split()

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01),
    # With its default eps Adam makes the rounding errors of gradients that are zero in theory (of the bias of an
    # attention's keys) as large as other weights' changes.
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, eps=1e-4),
}


@dataclass
class Trained:
    """What training a model gave on one rank."""

    losses: list[float]
    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    num_local_parameters: int


def train(names: tuple[str, ...], optimizer: str, is_scattered: bool = False) -> dict[str, Trained]:
    """The body of a rank: trains the models one after another."""
    results: dict[str, Trained] = {}
    for name in names:
        try:
            with as_entry_wants(name):
                results[name] = _train_one(name, optimizer, is_scattered)
        except Exception as error:
            raise RuntimeError(f"model '{name}' of the zoo: {type(error).__name__}: {error}") from error
    return results


def _train_one(name: str, optimizer: str, is_scattered: bool) -> Trained:
    import modelparallel as smp

    entry = ZOO[name]
    model = smp.DistributedModel(make_model(name))
    if is_scattered:
        scatter(model)
    wrapped = smp.DistributedOptimizer(OPTIMIZERS[optimizer](model.parameters()))
    train_step = step_of(entry.body)
    losses, gradients = [], {}
    torch.manual_seed(13)
    random.seed(13)
    for step in range(entry.num_steps):
        wrapped.zero_grad()
        loss = train_step(model, *entry.make_batch(step))  # some are float32: averaged in double precision
        losses.append(sum(float(part) * share for part, share in zip(loss.outputs, loss.weights, strict=True)))
        if step == 0:
            gradients = {
                key: torch.zeros_like(value) if value.grad is None else value.grad.clone()
                for key, value in model.local_named_parameters()
            }
        wrapped.step()
    return Trained(losses, gradients, model.state_dict(), len(gradients))


@functools.cache
def expected(name: str, num_microbatches: int, optimizer: str) -> ReferenceResult:
    """The same training in one process with plain torch."""
    entry = ZOO[name]
    with as_entry_wants(name):
        return reference_run(
            lambda: make_model(name),
            [entry.make_batch(step) for step in range(entry.num_steps)],
            entry.body,
            num_microbatches=num_microbatches,
            make_optimizer=OPTIMIZERS[optimizer],
        )


@functools.cache
def expected_with_draws(group: tuple[str, ...], num_microbatches: int, optimizer: str) -> dict[str, ReferenceResult]:
    """The same training in one process with the library, whose random numbers depend on the number of the step."""
    trained = run_ranks(train, 1, group, optimizer, parameters={"microbatches": num_microbatches})[0]
    return {name: ReferenceResult(one.losses, one.gradients, one.weights) for name, one in trained.items()}


@functools.cache
def import_classes(*, is_quick: bool) -> None:
    """Here, and in the server that the ranks are forked from: some take a tenth of a second."""
    for name in (*QUICK, *DRAWING) if is_quick else ZOO:
        make_model(name)
    preload()


@functools.lru_cache(maxsize=1)
def pipelined(
    group: tuple[str, ...], num_stages: int, optimizer: str, setting: str, is_scattered: bool
) -> list[dict[str, Trained]]:
    """The models of ``group``, trained one after another in one set of processes."""
    import_classes(is_quick=group[0] in (*QUICK, *DRAWING))
    parameters = {
        "pipeline_parallel_degree": num_stages, "microbatches": num_stages, "timeout_seconds": 60, **SETTINGS[setting],
    }  # fmt: skip
    if is_scattered:
        parameters |= {"auto_partition": False, "default_partition": 0}
    return run_ranks(train, num_stages, group, optimizer, is_scattered, parameters=parameters)


def check(name: str, num_stages: int, optimizer: str, setting: str, *, is_scattered: bool = False) -> None:
    group = tuple([member for member in GROUP_OF[name] if not (is_scattered and member in NOT_SCATTERED)])
    ranks = [rank[name] for rank in pipelined(group, num_stages, optimizer, setting, is_scattered)]
    if ZOO[name].draws:
        reference = expected_with_draws(group, num_stages, optimizer)[name]
    else:
        reference = expected(name, num_stages, optimizer)
    assert is_scattered or all(rank.num_local_parameters for rank in ranks), "a stage holds no parameter"
    losses = {"losses": torch.tensor(reference.losses, dtype=torch.float64)}
    for rank in ranks:
        assert_parity({"losses": torch.tensor(rank.losses, dtype=torch.float64)}, losses, dtype=torch.float64)
        assert_parity(rank.weights, reference.weights, dtype=torch.float64)
    gradients = {key: value for rank in ranks for key, value in rank.gradients.items()}
    assert_parity(gradients, reference.gradients, dtype=torch.float64)


def groups(names: list[str], size: int = 12) -> dict[str, tuple[str, ...]]:
    parts = [tuple(names[start : start + size]) for start in range(0, len(names), size)]
    return {name: part for part in parts for name in part}


DRAWING = [name for name, entry in ZOO.items() if entry.draws]
SETTLED = [name for name in QUICK if name not in DRAWING]
GROUP_OF = {
    **groups(DRAWING),
    **groups(SETTLED[::2]),
    **groups(SETTLED[1::2]),
    **groups([name for name in ZOO if name not in DRAWING and name not in QUICK]),
}
RUNS = [(stages, optimizer, setting) for stages, optimizer in zip(NUM_STAGES, OPTIMIZERS, strict=True)
        for setting in SETTINGS]  # fmt: skip
# On the fewest stages without pushes, on the most as is the default.
QUICK_RUNS = {RUNS[len(SCHEDULES)]: {*DRAWING, *SETTLED[1::2]}, RUNS[-2]: {*DRAWING, *SETTLED[::2]}}
CASES = [
    pytest.param(
        name, *run, id=f"{name}-pp{run[0]}-{run[2]}",
        marks=() if name in QUICK_RUNS.get(run, ()) else pytest.mark.slow,
    )
    for run in RUNS for name in GROUP_OF
]  # fmt: skip


@pytest.mark.parametrize("name, num_stages, optimizer, setting", CASES)
def test_pipelined_model_equals_one_process(name: str, num_stages: int, optimizer: str, setting: str) -> None:
    check(name, num_stages, optimizer, setting)


# What an assignment in glue makes of a buffer is known from the trace, which placing by hand goes without ("gluey");
# and whoever places ViLT's decoder must place the head, too, which has the same bias.
NOT_SCATTERED = ("gluey", "vilt")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in GROUP_OF if name not in NOT_SCATTERED])
def test_neighbours_on_different_stages(name: str) -> None:
    check(name, 3, "sgd", SCHEDULES[-1], is_scattered=True)


def test_every_schedule_is_run() -> None:
    pattern = Config.model_json_schema()["properties"]["pipeline"]["pattern"]
    accepted = set(pattern.strip("^$()").split("|")) - {"_only_forward"}
    assert accepted == set(SCHEDULES), "enter the schedule in SCHEDULES of engine_runs.py"


def test_the_quick_ones_are_a_third_of_the_zoo() -> None:
    assert set(QUICK) <= set(ZOO)
    assert 0.3 <= len({*QUICK, *DRAWING}) / len(ZOO) <= 0.4


def test_the_documents_table_is_that_of_the_zoo() -> None:
    assert split_document()[1] == table(), "docs/models.md is old: run python tests/zoo_catalogue.py"
