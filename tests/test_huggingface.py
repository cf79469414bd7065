"""Models of transformers: which are replaced, what is refused, and their state dicts in both namings."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import random
import subprocess
import sys
import warnings
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Block, GPT2LMHeadModel, GPT2Model
from transformers.models.gptj.modeling_gptj import GPTJForCausalLM

import modelparallel as smp
from huggingface_models import (
    BODIES,
    F64,
    KINDS,
    bert_config,
    folded,
    gpt2_config,
    gptj_config,
    gptneo_config,
    in_float64,
)
from modelparallel.errors import SMPError, TensorParallelError
from modelparallel.job import registry
from modelparallel.nn.huggingface import bert, gpt2, gptj, gptneo, gptneox, register_families, roberta
from modelparallel.nn.huggingface.translation import to_hf, to_smp
from parity import assert_parity
from pool import run_ranks
from rank_tests import RankTests, on

FUNCTIONS = {
    "gpt2": (gpt2.translate_state_dict_to_hf_gpt2, gpt2.translate_hf_state_dict_to_smdistributed_gpt2),
    "gptj": (gptj.translate_state_dict_to_hf_gptj, gptj.translate_hf_gptj_state_dict_to_smdistributed_gptj),
    "gptneo": (gptneo.translate_state_dict_to_hf_gptneo, gptneo.translate_hf_state_dict_to_smdistributed_gptneo),
    "gptneox": (
        gptneox.translate_state_dict_to_hf_gptneox,
        gptneox.translate_hf_state_dict_to_smdistributed_gptneox,
    ),
    "bert": (bert.translate_state_dict_to_hf_bert, bert.translate_hf_state_dict_to_smdistributed_bert),
    "roberta": (roberta.translate_state_dict_to_hf_roberta, roberta.translate_hf_state_dict_to_smdistributed_roberta),
}
MP = "modelparallel.nn.huggingface"


def functions_of(name):
    return FUNCTIONS[name.partition("-")[0]]


def assert_same(actual, expected):
    assert list(actual) == list(expected), "the same names in the same order"
    wrong = [name for name, tensor in expected.items() if not torch.equal(actual[name], tensor)]
    assert not wrong, wrong


# Translators alone


def test_the_documented_names_and_their_aliases():
    assert gpt2.translate_hf_state_dict_to_smdistributed is FUNCTIONS["gpt2"][1]
    assert gptj.translate_hf_gptj_state_dict_to_smdistributed is FUNCTIONS["gptj"][1]
    assert gptj.translate_hf_state_dict_to_smdistributed_gptj is FUNCTIONS["gptj"][1]
    assert gptneo.translate_hf_gptneo_state_dict_to_smdistributed is FUNCTIONS["gptneo"][1]
    assert roberta.translate_state_dict_to_smdistributed is FUNCTIONS["roberta"][1]
    assert roberta.translate_hf_state_dict_to_smdistributed is FUNCTIONS["roberta"][1]
    assert smp.nn.huggingface.gpt2 is gpt2


@pytest.mark.parametrize("name", [name for name in KINDS if name != "gpt2-classes"])
def test_c082_the_round_trip_is_exact(name):
    to_transformers, to_ours = functions_of(name)
    state = KINDS[name].make().state_dict()
    expected = {key: tensor.clone() for key, tensor in state.items()}
    ours = to_ours(state, 8)
    assert_same(state, expected)
    is_language_model = "lm_head.weight" in ours
    assert is_language_model == (KINDS[name].replaced == ("",))
    layer = ("transformer." if is_language_model else f"{KINDS[name].replaced[0]}.") + "seq_layers.1."
    assert ours[layer + "attention.qkv.weight"].shape == (48, 16)
    back = to_transformers(ours)
    assert_same(back, expected)
    assert_same(to_ours(back), ours)
    assert_same(to_ours(ours), ours)  # each side's own names pass
    assert_same(to_transformers(back), back)


@pytest.mark.parametrize(("model_class", "make_config"), BODIES, ids=lambda value: getattr(value, "__name__", ""))
def test_the_round_trip_of_a_body_is_exact(model_class, make_config):
    to_transformers, to_ours = FUNCTIONS[model_class.__name__.lower().replace("model", "")]
    state = model_class(make_config()).state_dict()
    ours = to_ours(state)
    assert not any(name.startswith(("h.", "encoder.layer.")) for name in ours)
    assert_same(to_transformers(ours), state)


def test_c082_the_round_trip_is_exact_for_any_configuration():
    draw = random.Random(3)
    for heads, layers, tied, crossed in itertools.product((1, 3), (1, 11), (True, False), (True, False)):
        more = {"tie_word_embeddings": tied, "n_head": heads, "n_layer": layers, "n_embd": 6 * heads}
        state = GPT2LMHeadModel(
            gpt2_config(**more, add_cross_attention=crossed, n_inner=draw.choice([5, 9]))
        ).state_dict()
        assert_same(
            gpt2.translate_state_dict_to_hf_gpt2(gpt2.translate_hf_state_dict_to_smdistributed_gpt2(state)), state
        )
        state = GPTJForCausalLM(gptj_config(**more)).state_dict()
        assert_same(
            gptj.translate_state_dict_to_hf_gptj(gptj.translate_hf_state_dict_to_smdistributed_gptj(state)), state
        )


def test_causal_mask_buffers_of_older_versions_are_made_again_for_a_length():
    state = GPT2LMHeadModel(gpt2_config(n_positions=5)).state_dict()
    ours = gpt2.translate_hf_state_dict_to_smdistributed_gpt2(state)
    old = gpt2.translate_state_dict_to_hf_gpt2(ours, 5)
    names = [name for name in old if name.startswith("transformer.h.1.")]
    assert names[:5] == [
        f"transformer.h.1.{n}"
        for n in ("ln_1.weight", "ln_1.bias", "attn.bias", "attn.masked_bias", "attn.c_attn.weight")
    ]
    assert torch.equal(old["transformer.h.1.attn.bias"], torch.ones(1, 1, 5, 5).tril().bool())
    assert old["transformer.h.0.attn.masked_bias"] == -1e4
    assert_same(gpt2.translate_hf_state_dict_to_smdistributed_gpt2(old, max_seq_len=5), ours)
    state = KINDS["gptneo"].make().state_dict()
    ours = gptneo.translate_hf_state_dict_to_smdistributed_gptneo(state)
    old = gptneo.translate_state_dict_to_hf_gptneo(ours, 4, window_size=2)
    local = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]).bool()
    assert torch.equal(old["transformer.h.1.attn.attention.bias"][0, 0], local)
    assert torch.equal(old["transformer.h.0.attn.attention.bias"][0, 0], torch.ones(4, 4).tril().bool())
    assert_same(gptneo.translate_hf_gptneo_state_dict_to_smdistributed(old, 4), ours)


def test_a_head_that_a_file_leaves_out_is_the_embedding():
    for name in ("gpt2", "gptj"):
        state = KINDS[name].make().state_dict()
        state["lm_head.weight"] = state["transformer.wte.weight"]
        short = {key: tensor for key, tensor in state.items() if key != "lm_head.weight"}
        ours = functions_of(name)[1](short)
        assert_same(functions_of(name)[0](ours), state)
    other = {**short, "score.weight": torch.zeros(2)}
    assert "lm_head.weight" not in gptj.translate_hf_state_dict_to_smdistributed_gptj(other)
    del short["lm_head.bias"]
    assert "lm_head.weight" not in gptj.translate_hf_state_dict_to_smdistributed_gptj(short)


def test_the_head_of_gptneox_is_known_by_both_of_its_names():
    to_transformers, to_ours = functions_of("gptneox")
    ours = to_ours(KINDS["gptneox"].make().state_dict())
    named = {}
    for version, name in (("5.13.0", "embed_out.weight"), ("5.14.0", "lm_head.weight")):
        with mock.patch.object(sys.modules["transformers"], "__version__", version):
            named[name] = to_transformers(ours)
        assert list(named[name])[-1] == name and len(named[name]) == len(ours)
    for version in ("5.13.0", "5.14.0"):
        with mock.patch.object(sys.modules["transformers"], "__version__", version):
            for name, state in named.items():
                assert_same(to_ours(state), ours)
                tied = to_ours({key: tensor for key, tensor in state.items() if key != name})
                assert tied["lm_head.weight"] is state["gpt_neox.embed_in.weight"]


def storages(*states):
    return {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for s in states for tensor in s.values()
    }


@pytest.mark.parametrize("name", ["gpt2", "gptj", "bert"])
def test_translating_keeps_one_copy_of_the_weights_in_memory(name):
    state = {key: tensor.clone() for key, tensor in KINDS[name].make().state_dict().items()}
    size = sum(storages(state).values())
    ours = functions_of(name)[1](state)
    gc.collect()
    assert sum(storages(state, ours).values()) == size
    assert sum(storages(state, ours, functions_of(name)[0](ours)).values()) == size


def test_what_is_not_of_the_family_keeps_its_name_and_place():
    body = KINDS["gpt2-classes"].make().state_dict()
    place = registry_family("GPT2Model").translations_at("transformer.")
    ours = place[1](body)
    assert list(ours)[-1] == "score.weight" and "transformer.transformer.seq_layers.0.attention.qkv.weight" in ours
    assert_same(place[0](ours), body)
    two = {f"a.encoder.{key}": tensor for key, tensor in KINDS["bert"].make().state_dict().items()}
    two |= {"between": torch.zeros(1)} | {key.replace("a.", "b.", 1): tensor for key, tensor in two.items()}
    ours = bert.translate_hf_state_dict_to_smdistributed_bert(two)
    assert sum("seq_layers" in key for key in ours) and "between" in ours and not any(".layer." in key for key in ours)
    assert_same(bert.translate_state_dict_to_hf_bert(ours), two)
    incomplete = KINDS["gptj"].make().state_dict()
    del incomplete["transformer.h.0.attn.k_proj.weight"]
    with pytest.raises(TensorParallelError, match=r"lacks transformer\.h\.0\.attn\.k_proj\.weight"):
        gptj.translate_hf_state_dict_to_smdistributed_gptj(incomplete)
    assert to_smp({}, []) == to_hf({}, []) == {}


def registry_family(class_name):
    register_families()
    for module_class in (GPT2Model, GPT2LMHeadModel):
        if module_class.__name__ == class_name:
            return registry.registration_for(module_class.__new__(module_class)).family
    raise AssertionError


# Registration


def test_the_package_does_not_import_transformers():
    code = (
        "import sys, modelparallel as smp; smp.nn.huggingface.register_families(); print('transformers' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=500, check=True)
    assert found.stdout.strip() == "False"


def check_registration():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        version, transformers.__version__ = transformers.__version__, "4.20.0"
        with pytest.warns(
            UserWarning, match=r"transformers 4\.20\.0 is not supported by tensor parallelism \(4\.57 to 5\.x"
        ):
            register_families()
        assert not registry.is_registered(GPT2LMHeadModel)
        transformers.__version__ = version
        smp.tp_register_with_module(GPT2LMHeadModel, smp.nn.DistributedTransformer)
        register_families()
        register_families()
    own = registry.registration_for(GPT2LMHeadModel.__new__(GPT2LMHeadModel))
    assert own.distributed_class is smp.nn.DistributedTransformer and own.family is None
    assert registry.is_registered(GPT2Model)


def test_unsupported_versions_and_registrations_of_the_user_are_respected():
    run_ranks(check_registration, 1, parameters={})


TP1 = RankTests(1, {})
TP2 = RankTests(2, {"tensor_parallel_degree": 2})
MATCHED = RankTests(2, {"tensor_parallel_degree": 2, "_match_weights": True})
PIPELINE = RankTests(4, {"tensor_parallel_degree": 2, "pipeline_parallel_degree": 2, "microbatches": 2})


def wrapped(name_or_model):
    model = KINDS[name_or_model].make() if isinstance(name_or_model, str) else name_or_model
    smp.set_tensor_parallelism(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # BERT's tied embedding stays whole
        return smp.DistributedModel(model)


@on(TP1, TP2)
def test_what_is_replaced_and_what_stays():
    model = wrapped("gpt2")
    module = model.get_module()
    assert type(module) is smp.nn.DistributedTransformerLMHead
    assert type(module.transformer.seq_layers) is torch.nn.Sequential and len(module.transformer.seq_layers) == 2
    assert module.transformer.seq_layers[0].attention and module.transformer.seq_layers[1].output
    assert module.config.n_embd == 16 and "config" not in dict(module.named_modules())
    pair = (gpt2.translate_state_dict_to_hf_gpt2, gpt2.translate_hf_state_dict_to_smdistributed_gpt2)
    assert smp.state.module_manager.translate_functions == [pair]
    model = wrapped("bert")
    module = model.get_module()
    assert type(module).__name__ == "BertForMaskedLM" and type(module.bert.encoder) is smp.nn.DistributedTransformer
    assert module.cls.predictions.decoder.weight is module.bert.embeddings.word_embeddings.weight
    assert tuple(module.bert.embeddings.word_embeddings.weight.shape) == (13, 16), "tied weights stay whole"
    assert len(smp.state.module_manager.translate_functions) == 1
    assert smp.DistributedModel(torch.nn.Linear(2, 2)) and len(smp.state.module_manager.translate_functions) == 1
    assert registry.family_of(module) is None and registry.family_of(module.bert.encoder) is not None


@on(TP2)
def test_keywords_of_the_context_override_the_configuration():
    with smp.tensor_parallelism(attention_in_fp32=True, fused_softmax=False, unknown=3):
        model = GPT2LMHeadModel(gpt2_config())
    options = smp.DistributedModel(model).module.transformer.options
    assert options.attention_in_fp32 and not options.fused_softmax


@on(TP2)
def test_marked_models_that_do_not_divide_stay_with_a_warning():
    model = GPT2LMHeadModel(gpt2_config(n_head=1))
    smp.set_tensor_parallelism(model)
    with pytest.warns(UserWarning, match="num_attention_heads of a Distributed.* is 1, not divisible"):
        assert type(smp.DistributedModel(model).module) is GPT2LMHeadModel


REFUSED = [
    (GPT2LMHeadModel, lambda: gpt2_config(activation_function="tanh"), r"GPT2Config\.activation_function='tanh'"),
    (GPT2LMHeadModel, lambda: gpt2_config(output_hidden_states=True), r"GPT2Config\.output_hidden_states=True"),
    (
        KINDS["gptneo"].model_class,
        lambda: gptneo_config(activation_function="gelu_fast"),
        r"activation_function='gelu_fast'",
    ),
    (
        GPTJForCausalLM,
        lambda: gptj_config(output_attentions=True, attn_implementation="eager"),
        r"GPTJConfig\.output_attentions=True",
    ),
    (KINDS["bert"].model_class, lambda: bert_config(hidden_act="tanh"), r"BertConfig\.hidden_act='tanh'"),
]


@on(TP2)
def test_unsupported_options_are_refused_by_name():
    for model_class, make_config, message in REFUSED:
        with pytest.raises(TensorParallelError, match=message):
            wrapped(model_class(make_config()))
    config = bert_config()
    config.position_embedding_type = "relative_key"
    model = KINDS["bert"].model_class(config)
    with pytest.raises(TensorParallelError, match=r"module 'bert\.encoder': BertConfig\.position_embedding_type="):
        wrapped(model)
    model = KINDS["gpt2"].make()
    model.transformer.h[0].attn.c_attn.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(
        TensorParallelError, match=r"parameters that are not those of its class: .*c_attn\.adapter\.weight"
    ):
        wrapped(model)
    model = KINDS["gpt2"].make()
    model.config.tie_word_embeddings = False
    with pytest.raises(TensorParallelError, match=r"tie_word_embeddings=False .* is tied"):
        wrapped(model)
    model = KINDS["gpt2"].make()
    model.config.vocab_size = 14
    with pytest.raises(TensorParallelError, match=r"vocab_size=14 .* the embedding has 13 rows"):
        wrapped(model)


@on(TP2)
def test_unsupported_arguments_are_refused_by_name():
    model, ids = wrapped("gpt2"), torch.ones(2, 4, dtype=torch.int64)
    refused = {
        "inputs_embeds": torch.zeros(2, 4, 16, dtype=F64),
        "past_key_values": ((),),
        "head_mask": torch.ones(2, 4),
        "output_attentions": True,
        "output_hidden_states": True,
        "token_type_ids": ids,
        "logits_to_keep": 1,
        "something_else": 1,
    }
    for name, value in refused.items():
        with pytest.raises(TensorParallelError, match=f"GPT2LMHeadModel: the argument {name}="):
            model(ids, **{name: value})
    with pytest.raises(TensorParallelError, match="input_ids must be given"):
        model(attention_mask=ids)
    with pytest.raises(TensorParallelError, match=r"attention_mask has shape \(2, 1, 4, 4\)"):
        model(ids, attention_mask=torch.ones(2, 1, 4, 4))
    with pytest.raises(TypeError, match="given twice: input_ids"):
        model(ids, input_ids=ids)
    with pytest.raises(TensorParallelError, match="encoder_hidden_states must be given"):
        wrapped("gpt2-crossed")(ids)
    encoder = wrapped("bert").get_module().bert
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(TensorParallelError, match=f"BertEncoder: the argument {name}="):
            encoder(ids, **{name: True})


@on(MATCHED)
def test_calls_give_the_classes_of_transformers():
    kind, model = KINDS["gpt2"], wrapped("gpt2")
    plain = kind.make()
    ids, mask, labels = kind.batches(2)[0]
    trained = model(ids, attention_mask=mask, labels=labels, use_cache=True)
    assert type(trained) is type(plain(ids)) and list(trained) == ["loss"] and trained.logits is None
    trained["loss"].backward()
    both = model(ids, attention_mask=mask, labels=labels, return_logits=True)
    assert list(both) == ["loss", "logits"]
    expected = plain(ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(both.loss, expected.loss)
    torch.testing.assert_close(both.logits[0], expected.logits[0])
    with torch.no_grad():
        loss, logits = model(ids, attention_mask=mask, labels=labels, return_dict=False)
        torch.testing.assert_close((loss, logits[0]), (expected.loss, expected.logits[0]))
        (logits,) = model(ids, attention_mask=mask, position_ids=torch.arange(6).flip(0)[None], return_dict=False)
        positions = plain(ids, attention_mask=mask, position_ids=torch.arange(6).flip(0)[None])
        torch.testing.assert_close(logits[0], positions.logits[0])
        body = wrapped(GPT2Model(gpt2_config()).double())
        assert type(body(ids)).__name__ == "BaseModelOutputWithPastAndCrossAttentions"
        assert body(ids, return_dict=False)[0].shape == body(ids).last_hidden_state.shape == (2, 6, 16)
    for clone in (copy.deepcopy(model.get_module()), pickle.loads(pickle.dumps(model.get_module()))):
        torch.testing.assert_close(clone(ids, attention_mask=mask, labels=labels).loss, expected.loss)


@on(MATCHED)
def test_the_ranks_may_have_padding_or_none():
    kind = KINDS["bert"]
    model, plain = wrapped("bert"), kind.make()
    ids, mask, _ = kind.batches(2)[0]
    if smp.tp_rank():
        mask = torch.ones_like(mask)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[0], plain(ids, attention_mask=mask).logits[0])


@on(MATCHED)
def test_c080_match_weights_copies_weights_and_whether_they_are_trained():
    for name, kind in KINDS.items():
        plain = kind.make()
        frozen = [
            parameter for parameter_name, parameter in plain.named_parameters() if parameter_name.endswith("bias")
        ]
        for parameter in frozen:
            parameter.requires_grad_(False)
        model = wrapped(copy.deepcopy(plain))
        state = model.state_dict()
        assert all(p.requires_grad != n.endswith("bias") for n, p in model.named_parameters()), name
        for to_transformers, _ in smp.state.module_manager.translate_functions:
            state = to_transformers(state)
        assert_same(state, plain.state_dict())


def head_and_embedding(state):
    return [value for name, value in state.items() if value.dim() == 2 and value.shape[0] == 13]


@on(TP1, TP2, MATCHED)
def test_heads_are_tied_as_the_configuration_says_where_initialization_is_skipped():
    is_kept = smp.state.cfg.match_weights
    for name in ("gpt2", "gptj", "gptneo", "gptneox", "bert"):
        for is_tied in (True, False):
            kind = KINDS[name]
            with mock.patch.object(PreTrainedModel, "init_weights", lambda self: None):
                config = kind.config()
                config.tie_word_embeddings = is_tied
                plain = kind.model_class(config).double()
                before = head_and_embedding(plain.state_dict())
                assert not torch.equal(*before)
                optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
                model = wrapped(copy.deepcopy(plain) if is_kept else plain)
            found = head_and_embedding(model.state_dict())
            assert torch.equal(*found) == (is_tied and not is_kept), (name, is_tied)
            if is_kept:  # the model as it was built, as one process would train it
                assert all(torch.equal(*pair) for pair in zip(found, before, strict=True)), (name, is_tied)
            else:
                own = {id(parameter) for parameter in model.parameters()}
                held = [id(p) for group in smp.DistributedOptimizer(optimizer).param_groups for p in group["params"]]
                assert set(held) == own and len(held) == len(own), (name, is_tied)


@on(TP1)
def test_a_head_that_was_untied_by_hand_is_said_to_be_tied():
    model = KINDS["gpt2"].make()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    smp.set_tensor_parallelism(model)
    with pytest.warns(UserWarning, match=r"GPT2Config\.tie_word_embeddings=True, and the head .* is not tied"):
        module = smp.DistributedModel(model).get_module()
    assert module.lm_head.weight is module.embedding.word_embedding.weight


# State dicts of wrapped models


@on(TP1, TP2)
def test_c089_plain_dicts_are_translated_and_marked_ones_are_not():
    for name, kind in KINDS.items():
        model = wrapped(name)
        expected = kind.make().state_dict()
        assert not all(
            torch.equal(a, b) for a, b in zip(folded(model.state_dict()).values(), expected.values(), strict=True)
        )
        model.load_state_dict(expected)
        ours = model.state_dict()
        assert_same(folded(ours), expected)
        with pytest.raises(SMPError, match=r"strict=True\): missing .*; unexpected"):
            model.load_state_dict({**expected, "_smp_is_partial": False})
        for state in ({**ours, "_smp_is_partial": False}, ours, model.local_state_dict()):
            model.load_state_dict(state)
            assert_same(folded(model.state_dict()), expected)


@on(TP2)
def test_files_of_transformers_leave_tied_weights_out():
    for name in ("gpt2", "bert"):
        plain = KINDS[name].make()
        tied = {"gpt2": "lm_head.weight", "bert": "cls.predictions.decoder.weight"}[name]
        model = wrapped(name)
        model.load_state_dict({key: tensor for key, tensor in plain.state_dict().items() if key != tied})
        assert_same(folded(model.state_dict()), plain.state_dict())


@on(PIPELINE)
def test_c089_a_plain_dict_is_loaded_before_the_partition_and_what_is_trained_loads_into_the_plain_model():
    for name in ("gpt2", "gptj", "bert", "gpt2-classes"):
        kind = KINDS[name]
        plain = kind.make()
        model = wrapped(name)
        model.load_state_dict(plain.state_dict())

        @smp.step
        def train_step(model, kind, *batch):
            loss = kind.loss(model, *batch)
            model.backward(loss)
            return loss

        @smp.step
        def evaluate(model, kind, *batch):
            return kind.loss(model, *batch)

        optimizer = smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        batch = kind.batches(4)[0]
        first = train_step(model, kind, *batch).reduce_mean()
        with in_float64():
            expected = sum(kind.loss(plain, *(part[half] for part in batch)) for half in (slice(2), slice(2, 4))) / 2
        torch.testing.assert_close(first.detach(), expected.detach())
        optimizer.step()
        state = folded(model.state_dict())
        plain.load_state_dict(state)
        with torch.no_grad(), in_float64():
            after = [kind.loss(plain, *(part[half] for part in batch)) for half in (slice(2), slice(2, 4))]
            found = evaluate(model, kind, *batch).outputs
        torch.testing.assert_close(torch.stack(found), torch.stack(after))


def check_saving(folder):
    kind = KINDS["gptj"]
    model, plain = wrapped("gptj"), kind.make()
    model.load_state_dict(plain.state_dict())
    state = folded(model.state_dict())
    if smp.rank() == 0:
        plain.save_pretrained(folder, state_dict=dict(state))
    state = folded(wrapped("gpt2").state_dict())
    if smp.rank() == 0:
        KINDS["gpt2"].make().save_pretrained(f"{folder}/gpt2", state_dict=dict(state))
    return plain.state_dict(), state


def test_save_pretrained_of_a_translated_dict_gives_a_file_that_transformers_loads(tmp_path):
    found = run_ranks(check_saving, 2, str(tmp_path), parameters={"tensor_parallel_degree": 2, "ddp": True})
    classes: list[Any] = [GPTJForCausalLM, GPT2LMHeadModel]
    for model_class, folder, state in zip(classes, (tmp_path, tmp_path / "gpt2"), found[0], strict=True):
        loaded, report = model_class.from_pretrained(folder, output_loading_info=True, dtype=F64)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert_same(loaded.state_dict(), state)


def check_pretrained(folder):
    model = GPT2LMHeadModel.from_pretrained(folder)
    smp.set_tensor_parallelism(model)
    with pytest.warns(UserWarning, match=r"was loaded from .*; what replaces it has new weights"):
        smp.DistributedModel(model)


def test_losing_the_weights_of_a_pretrained_model_is_said(tmp_path):
    KINDS["gpt2"].make().save_pretrained(tmp_path)
    run_ranks(check_pretrained, 1, str(tmp_path), parameters={})


# A block by itself


class Blocks(torch.nn.Module):
    """A model of one's own around blocks of transformers."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(13, 16)
        self.h = torch.nn.ModuleList(
            [GPT2Block(gpt2_config(attn_implementation="eager"), layer_idx=i) for i in range(2)]
        )

    def forward(self, ids, mask):
        hidden = self.table(ids)
        for block in self.h:
            output = block(hidden, attention_mask=mask)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden


def check_blocks():
    hooks = gpt2.get_hf_gpt2_transformer_layer_hooks()
    smp.tp_register_with_module(GPT2Block, smp.nn.DistributedTransformerLayer, *hooks)
    torch.manual_seed(4)
    plain = Blocks().double()
    model = wrapped(copy.deepcopy(plain))
    assert [type(layer) for layer in model.module.h] == [smp.nn.DistributedTransformerLayer] * 2
    state = plain.state_dict()
    ours = gpt2.translate_hf_block_state_dict_to_smdistributed(state, 8)
    assert "h.1.attention.qkv.weight" in ours
    assert_same(gpt2.translate_layer_state_dict_to_hf_gpt2_block(ours), state)
    alone = gpt2.translate_hf_block_state_dict_to_smdistributed(plain.h[0].state_dict())
    assert_same(gpt2.translate_layer_state_dict_to_hf_gpt2_block(alone), plain.h[0].state_dict())
    model.load_state_dict(ours)
    ids = torch.randint(0, 13, (2, 6), generator=torch.Generator().manual_seed(smp.rank()))
    causal = torch.zeros(1, 1, 6, 6, dtype=F64).masked_fill(torch.ones(6, 6).triu(1).bool(), torch.finfo(F64).min)
    assert_parity({"hidden": model(ids, causal)}, {"hidden": plain(ids, causal)}, dtype=F64)


def test_blocks_are_replaced_through_the_documented_hooks():
    run_ranks(check_blocks, 2, parameters={"tensor_parallel_degree": 2, "ddp": True})


def check_memory_of_the_original():
    model = KINDS["gpt2"].make()
    weight = weakref.ref(model.transformer.h[0].attn.c_attn.weight)
    smp.set_tensor_parallelism(model)
    keeper = smp.DistributedModel(model)
    del model
    gc.collect()
    assert weight() is None and keeper is not None


def test_the_weights_of_the_original_are_freed():
    run_ranks(check_memory_of_the_original, 2, parameters={"tensor_parallel_degree": 2, "ddp": True})
