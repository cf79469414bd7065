"""Sharded data parallelism without a pipeline: parity with one process, memory, state dicts, and what is refused."""

from __future__ import annotations

import torch

import modelparallel as smp
from rank_tests import RankTests, on
from sharded_training import (
    adam,
    awkward_batches,
    awkward_loss,
    check,
    gpt_batches,
    gpt_loss,
    make_awkward,
    make_conditional,
    make_gpt,
    make_untied_gpt,
    sgd,
)

ALL = {"sdp_param_persistence_threshold": 0}
DP2 = RankTests(2, {"sharded_data_parallel_degree": 2, **ALL})
DP2_MB4 = RankTests(2, {"sharded_data_parallel_degree": 2, "microbatches": 4, **ALL})
DP2_STEP = RankTests(2, {"sharded_data_parallel_degree": 2, "microbatches": 2, "sdp_gather": "step", **ALL})
DP4 = RankTests(4, {"sharded_data_parallel_degree": 4, **ALL})
HYBRID = RankTests(4, {"sharded_data_parallel_degree": 2, "microbatches": 2, **ALL})
TP2 = RankTests(4, {"sharded_data_parallel_degree": 2, "tensor_parallel_degree": 2, **ALL})
PARTLY = RankTests(2, {"sharded_data_parallel_degree": 2, "sdp_param_persistence_threshold": 60})


@on(DP2, DP2_MB4, DP2_STEP, DP4, HYBRID, PARTLY)
def test_a_tied_gpt_equals_one_process():
    check(make_gpt, gpt_batches(4 * smp.dp_size()), gpt_loss, adam)


@on(DP2, DP2_MB4, DP2_STEP, HYBRID)
def test_awkward_parameters_equal_one_process():
    check(make_awkward, awkward_batches(4 * smp.dp_size()), awkward_loss, sgd, broadcast_buffers=False)
