"""RoBERTa of transformers: RobertaEncoder; embeddings, pooler and heads stay what they are (smp-api section 10)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelparallel.nn.huggingface import bert
from modelparallel.nn.huggingface.translation import StateDict

LAYOUT = bert.LAYOUT


def translate_state_dict_to_hf_roberta(state_dict: Mapping[str, Any], max_seq_len: int | None = None) -> StateDict:
    """The state dict of a model with a replaced RobertaEncoder as transformers names it.

    ``max_seq_len`` has no effect: RoBERTa keeps no causal masks. Tensors are views of those given.
    """
    return bert.encoders_to_hf(state_dict)


def translate_hf_state_dict_to_smdistributed_roberta(
    state_dict: Mapping[str, Any], max_seq_len: int | None = None
) -> StateDict:
    """The state dict of a RoBERTa model as the model with a replaced RobertaEncoder names it.

    Query, key and value are joined in one new tensor; the given dict then holds views of it (see the note in
    ``translation``).
    """
    return bert.encoders_to_smp(state_dict)


translate_state_dict_to_smdistributed = translate_hf_state_dict_to_smdistributed_roberta
translate_hf_state_dict_to_smdistributed = translate_hf_state_dict_to_smdistributed_roberta
