"""transformers' models by the plans that they carry, on both of its major versions (docs/plans.md)."""

from __future__ import annotations

import warnings

import pytest
import torch

import modelparallel as smp
from modelparallel.errors import TensorParallelError
from parity import assert_parity
from plan_training import check_training, own_rows, settings
from pool import preload, run_ranks

FAST_FAMILIES = ["llama", "mixtral"]
FAMILY_NAMES = [
    "llama", "llama-tied", "llama-eager", "llama-single", "mistral", "qwen2", "qwen3", "gemma", "mixtral",
    "phi3",
]  # fmt: skip


def import_families():
    pytest.importorskip("transformers")
    import plan_families

    assert set(FAMILY_NAMES) == set(plan_families.FAMILIES)
    for name in FAMILY_NAMES:
        plan_families.make_family(name)  # imports the family, for the ranks too
    preload()


def test_hugging_face_models_train_as_in_one_process():
    import_families()
    check_training(FAST_FAMILIES, 2, settings(2, microbatches=2), "sgd")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "parameters", "kind"),
    [
        (2, settings(2), "adam"),
        (4, settings(4), "sgd"),
        (4, settings(2, pipeline_parallel_degree=2, microbatches=2), "adam"),
    ],
    ids=["tp2", "tp4", "tp2 pp2"],
)
def test_all_families_train_as_in_one_process(num_ranks, parameters, kind):
    import_families()
    check_training(FAMILY_NAMES, num_ranks, parameters, kind)


def call_family(what):
    """What users do with a Hugging Face model beside training, on each rank with its own rows."""
    from plan_families import family_batch, family_loss, make_family

    name = {"attentions": "llama-eager", "checkpoint": "qwen3"}.get(what, "llama")
    model, plain = make_family(name), make_family(name)
    smp.set_tensor_parallelism(model)
    model = smp.DistributedModel(model)
    own, _ = own_rows((2, 2))
    ids, mask = family_batch(0, 4)
    if what == "padding of one rank":  # the other one gets no mask at all
        mask[:2] = 1
    if what == "attentions":
        output = model(input_ids=ids[own], output_attentions=True, output_hidden_states=True)
        expected = plain(input_ids=ids, output_hidden_states=True).hidden_states
        torch.testing.assert_close(output.hidden_states[1], expected[1][own])
        with pytest.raises(TensorParallelError, match=r"output 1 of 'model.layers.0.self_attn' is this rank's slice"):
            output.attentions[0].sum()
    elif what == "generation":
        more = {"max_new_tokens": 4, "do_sample": False, "use_cache": True}
        mine = model.module.eval().generate(ids[own], attention_mask=torch.ones_like(ids[own]), **more)
        expected = plain.eval().generate(ids, attention_mask=torch.ones_like(ids), **more)
        assert torch.equal(mine, expected[own])
    elif what == "positions":
        positions = torch.arange(6) + 3 * torch.arange(4)[:, None]
        for rows in (1, 2):
            own = slice(rows * smp.tp_rank(), rows * (smp.tp_rank() + 1))
            mine = model(input_ids=ids[own], position_ids=positions[own]).logits
            torch.testing.assert_close(mine, plain(input_ids=ids, position_ids=positions).logits[own])
        mine = model(input_ids=ids[own], position_ids=positions[smp.tp_rank()][None]).logits
        torch.testing.assert_close(mine, plain(input_ids=ids, position_ids=positions[[0, 0, 1, 1]]).logits[own])
    else:
        for reentrant in (True, False) if what == "checkpoint" else (None, None):
            if reentrant is not None:
                model.module.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.zero_grad()
            plain.zero_grad()
            family_loss(model, ids[own], mask[own]).backward()
            family_loss(plain, ids, mask).backward()
            for (at, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
                split, expected = model.table.row_of(parameter).split, other.grad
                if split is not None:
                    expected = split.slice_of(expected, smp.tp_rank(), smp.tp_size())
                torch.testing.assert_close(parameter.grad, expected, msg=lambda text, at=at: f"{at}: {text}")


def check_more(names):
    """Outputs and gradients of calls with one and two samples; which names were split, and why others were not."""
    import transformers

    from plan_families import MORE, family_batch, family_loss, make_family

    results = {}
    for name in names:
        if not hasattr(transformers, MORE[name][0]):
            continue
        model, plain = make_family(name).eval(), make_family(name).eval()  # some drop by default
        own, total = own_rows((1, 2))
        ids, mask = family_batch(0, total)
        try:
            (family_loss(plain, ids, mask) * total).backward()
        except RuntimeError as error:
            results[name] = f"does not run in float64: {error}"
            continue
        smp.set_tensor_parallelism(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = smp.DistributedModel(model)
        for _ in range(2):
            model.zero_grad()
            (family_loss(model, ids[own], mask[own]) * (own.stop - own.start)).backward()
            actual, expected = {}, {}
            for (at, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
                split, gradient = model.table.row_of(parameter).split, other.grad
                gradient = torch.zeros_like(other) if gradient is None else gradient / 2
                expected[at] = gradient if split is None else split.slice_of(gradient, smp.tp_rank(), 2)
                actual[at] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            try:  # some routers, rotary tables and norms are in single precision
                assert_parity(actual, expected, dtype=torch.float32)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
        results[name] = sum(row.split is not None for row in model.table.rows())
    return results


@pytest.mark.slow
def test_many_families_give_the_gradients_of_one_process():
    transformers = pytest.importorskip("transformers")
    from plan_families import MORE, make_family

    for name in MORE:
        if hasattr(transformers, MORE[name][0]):
            make_family(name)
    preload()
    found, other = run_ranks(check_more, 2, list(MORE), parameters=settings(2))
    print(found)
    assert found == other and len(found) > 25
    assert sum(isinstance(result, int) and result > 0 for result in found.values()) > 22


@pytest.mark.slow
@pytest.mark.parametrize(
    "what", ["padding of one rank", "no padding", "attentions", "generation", "positions", "checkpoint"]
)
def test_what_users_do_with_hugging_face_models(what):
    import_families()
    run_ranks(call_family, 2, what, parameters=settings(2))
