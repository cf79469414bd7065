"""The examples of families that are split through hooks: T5 and ViT train as the plain models do."""

from __future__ import annotations

import functools
from unittest import mock

import pytest
import torch
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5ForConditionalGeneration
from transformers.models.vit.configuration_vit import ViTConfig
from transformers.models.vit.modeling_vit import ViTForImageClassification, ViTLayer

import modelparallel as smp
from huggingface_models import F64, settings
from parity import assert_parity, reference_run
from pool import run_ranks
from scripts import load_script
from training import sgd


def make_vit():
    torch.manual_seed(1)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    return ViTForImageClassification(ViTConfig(**sizes, **dropout, image_size=8, patch_size=4)).double()


def make_t5(kind):
    torch.manual_seed(2)
    options = {"vocab_size": 13, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4,
               "decoder_start_token_id": 0, "use_cache": False}  # fmt: skip
    config = T5Config(**options, dropout_rate=0.0, feed_forward_proj=kind)
    return T5ForConditionalGeneration(config).double()


def vit_loss(model, pixels, labels):
    return model(pixel_values=pixels, labels=labels)["loss"]


def t5_loss(model, ids, labels):
    with mock.patch.object(torch.Tensor, "float", lambda self: self if self.dtype == F64 else self.to(torch.float32)):
        return model(input_ids=ids, labels=labels)["loss"]


def batch_of(kind, num_samples):
    generator = torch.Generator().manual_seed(3)
    if kind == "vit":
        return torch.randn(num_samples, 3, 8, 8, dtype=F64, generator=generator), torch.arange(num_samples) % 2
    return tuple(torch.randint(1, 13, (num_samples, 5), generator=generator) for _ in range(2))


CASES = {
    "vit": (make_vit, vit_loss),
    "relu": (functools.partial(make_t5, "relu"), t5_loss),
    "gated-gelu": (functools.partial(make_t5, "gated-gelu"), t5_loss),
}


def train(kind):
    make, loss_of = CASES[kind]
    example = load_script(f"examples/huggingface/{'vit' if kind == 'vit' else 't5'}.py")
    example.register()
    model = make()
    if kind == "vit":
        for layer in vit_layers(model).values():
            smp.set_tensor_parallelism(layer)
    else:
        example.split(model)
    model = smp.DistributedModel(model)
    distributed = {type(module).__name__ for module in model.distributed_modules()}
    assert ("SplitViTLayer" if kind == "vit" else "SplitFeedForward") in distributed
    optimizer = smp.DistributedOptimizer(sgd(model.parameters()))
    own = slice(2 * smp.dp_rank(), 2 * smp.dp_rank() + 2)
    for _ in range(3):
        optimizer.zero_grad()
        model.backward(loss_of(model, *(part[own] for part in batch_of(kind, 4))))
        optimizer.step()
    return model.state_dict()


def vit_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, ViTLayer)}


@pytest.mark.parametrize("kind", CASES)
def test_examples_train_as_the_plain_model_does(kind):
    make, loss_of = CASES[kind]
    made = []

    def keep():
        made.append(make())
        return made[-1]

    found = run_ranks(train, 2, kind, parameters=settings(2))
    batch = batch_of(kind, 4)
    expected = reference_run(keep, [batch] * 3, loss_of, make_optimizer=sgd, num_copies=2).weights
    if kind == "vit":
        weights_of_layer = load_script("examples/huggingface/vit.py").weights_of_layer
        for path, layer in vit_layers(made[0]).items():
            own = {f"{path}.{name}": weight.detach() for name, weight in weights_of_layer(layer).items()}
            rest = {name: weight for name, weight in expected.items() if not name.startswith(f"{path}.")}
            expected = rest | own
    for state in found:
        assert_parity(state, expected, dtype=F64)
