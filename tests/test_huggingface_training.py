"""Models of transformers, split out of the box, train as the plain models do."""

from __future__ import annotations

import warnings

import pytest
import torch

import modelparallel as smp
from huggingface_models import F64, KINDS, folded, in_float64, settings
from modelparallel.errors import SMPConfigError
from parity import assert_parity, reference_run
from pool import run_ranks
from training import sgd


def whole_gradients(model):
    """The gradients of all parameters under the names of transformers, on every rank."""
    found = {}
    stage = smp.pp_rank()
    for row, parameter in model.table.parameters():
        if not model.table.is_local(row, stage):
            continue
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if row.split is not None and smp.tp_size() > 1:
            gradient = row.split.join(smp.allgather(gradient, smp.TP_GROUP))
        found.update(dict.fromkeys((row.name, *row.aliases), gradient))
    merged = {}
    for part in smp.allgather(found, smp.PP_GROUP):
        merged.update(part)
    return folded(merged)


def train(kinds, num_samples, is_optimizer_first=False):
    """Three steps on this rank's share: (losses, gradients of the first step, final weights) of each kind."""
    results = {}
    for name in kinds:
        kind = KINDS[name]
        model = kind.make()
        smp.set_tensor_parallelism(model)
        optimizer = sgd(model.parameters()) if is_optimizer_first else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # BERT's tied embedding stays whole, as it says
            model = smp.DistributedModel(model)
        replaced = [part for part, module in model.module.named_modules() if hasattr(module, "seq_layers")]
        assert [part.removesuffix("transformer").removesuffix(".") for part in replaced] == list(kind.replaced)
        optimizer = smp.DistributedOptimizer(optimizer or sgd(model.parameters()))

        @smp.step
        def train_step(model, kind, *batch):
            loss = kind.loss(model, *batch)
            model.backward(loss)
            return loss

        losses, gradients = [], {}
        for batch in kind.batches(num_samples * smp.dp_size()):
            own = slice(smp.dp_rank() * num_samples, (smp.dp_rank() + 1) * num_samples)
            optimizer.zero_grad()
            losses.append(float(train_step(model, kind, *(part[own] for part in batch)).reduce_mean()))
            gradients = gradients or whole_gradients(model)
            optimizer.step()
        results[name] = losses, gradients, folded(model.state_dict())
    return results


def check(num_ranks, parameters, kinds=tuple(KINDS), num_samples=4, **more):
    results = run_ranks(train, num_ranks, kinds, num_samples, parameters=parameters, **more)
    num_copies = num_ranks // parameters["pipeline_parallel_degree"]
    for name in kinds:
        kind = KINDS[name]
        with in_float64():
            expected = reference_run(
                kind.make,
                kind.batches(num_samples * num_copies),
                kind.loss,
                num_microbatches=parameters["microbatches"],
                make_optimizer=sgd,
                num_copies=num_copies,
            )
        for result in results:
            _, gradients, weights = result[name]
            assert list(weights) == list(expected.weights)
            assert_parity({key: gradients[key] for key in expected.gradients}, expected.gradients, dtype=F64)
            assert_parity(weights, expected.weights, dtype=F64)
        losses = torch.tensor([result[name][0] for result in results]).mean(0)
        torch.testing.assert_close(losses, torch.tensor(expected.losses))


def test_c082_training_equals_that_of_the_plain_model():
    check(2, settings(2, optimize="speed"))


def test_an_optimizer_of_the_plain_model_trains_what_has_replaced_it():
    check(2, settings(2), ("gpt2", "gptj", "bert"), is_optimizer_first=True)


def check_groups():
    model = KINDS["gptj"].make()
    smp.set_tensor_parallelism(model)
    named = dict(model.named_parameters())
    query = named.pop("transformer.h.1.attn.q_proj.weight")
    norms = {name: named.pop(name) for name in list(named) if "ln_" in name}
    optimizer = torch.optim.SGD([{"params": named.values()}, {"params": norms.values(), "weight_decay": 1.0}], lr=0.1)
    wrong = torch.optim.SGD([{"params": list(named.values())}, {"params": [query], "lr": 1.0}], lr=0.1)
    wrapped = smp.DistributedModel(model)
    groups = smp.DistributedOptimizer(optimizer).param_groups
    names = {id(parameter): name for name, parameter in wrapped.named_parameters()}
    assert {names[id(parameter)] for parameter in groups[1]["params"]} == {
        n for n in names.values() if "layernorm" in n
    }
    assert len(groups[0]["params"]) + len(groups[1]["params"]) == len(names)
    message = (
        r"'transformer\.h\.1\.attn\.k_proj\.weight' and 'transformer\.h\.1\.attn\.q_proj\.weight', which .* as one"
    )
    with pytest.raises(SMPConfigError, match=message):
        smp.DistributedOptimizer(wrong)


def test_groups_of_such_an_optimizer_keep_their_parameters():
    run_ranks(check_groups, 2, parameters=settings(2))


def test_c082_training_on_a_pipeline_equals_that_of_the_plain_model():
    check(4, settings(2, pp=2, optimize="memory"), ("gpt2", "gptneo", "bert"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tp", "pp", "optimize"),
    [(1, 1, "speed"), (2, 1, "memory"), (4, 1, "speed"), (4, 1, "memory"), (2, 2, "speed"), (2, 2, "memory")],
)
def test_c082_training_equals_that_of_the_plain_model_everywhere(tp, pp, optimize):
    check(tp * pp, settings(tp, pp, optimize=optimize))
