"""Models of transformers with sharded parameters, alone and in a pipeline, against one process."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import modelparallel as smp
from huggingface_models import KINDS, language_batches, loss_of
from rank_tests import RankTests, on
from sharded_training import check
from training import sgd_of_trained

SHARDED = {"sharded_data_parallel_degree": 2, "sdp_param_persistence_threshold": 0}
ALONE = RankTests(2, {**SHARDED, "microbatches": 2})
PIPELINE = RankTests(4, {**SHARDED, "microbatches": 2, "pipeline_parallel_degree": 2})
VISIT = RankTests(4, {**SHARDED, "microbatches": 2, "pipeline_parallel_degree": 2, "sdp_gather": "visit"}, is_slow=True)


def make_llama():
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=13, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, pad_token_id=1, **{"attn_implementation": "eager"},
    )  # fmt: skip
    return LlamaForCausalLM(config)


@on(ALONE, PIPELINE, VISIT)
def test_gpt2_equals_one_process():
    check(KINDS["gpt2"].make, language_batches(4 * smp.dp_size()), loss_of, sgd_of_trained)


@on(ALONE, PIPELINE, VISIT)
def test_llama_equals_one_process():
    # In fp32: transformers computes the norms and rotary embeddings of Llama in it, whatever the dtype.
    batches = language_batches(4 * smp.dp_size())
    check(make_llama, batches, loss_of, sgd_of_trained, dtype=torch.float32)
