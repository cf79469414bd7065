"""Sharded data parallelism in a pipeline: every schedule, both ways of gathering, and tensor parallelism beside it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modelparallel as smp
from distributed_run import own_share
from modelparallel.errors import UnsupportedError
from modelparallel.pipeline.program.splitting import SplitBackward
from parity import assert_parity
from rank_tests import RankTests, on
from sharded_training import (
    TiedGPT,
    adam,
    awkward_batches,
    check,
    gpt_batches,
    gpt_loss,
    live_bytes,
    make_awkward,
    make_conditional,
    make_gpt,
    make_untied_gpt,
    merged_gradients,
    updated_tensors,
)
from training import sgd_of_trained, step_of, token_loss

BASE = {"pipeline_parallel_degree": 2, "sharded_data_parallel_degree": 2, "sdp_param_persistence_threshold": 0}
INTERLEAVED = RankTests(4, {**BASE, "microbatches": 4})
SIMPLE = RankTests(4, {**BASE, "microbatches": 4, "pipeline": "simple"})
ZERO_BUBBLE = RankTests(4, {**BASE, "microbatches": 4, "pipeline": "zero_bubble"}, is_slow=True)
REPLICATE = RankTests(4, {**BASE, "microbatches": 4, "pipeline": "zero_bubble", "tied_weights": "replicate"})
ONE = RankTests(4, {**BASE, "microbatches": 1})
VISIT = RankTests(4, {**BASE, "microbatches": 2, "sdp_gather": "visit"}, is_slow=True)
VISIT_BUBBLE = RankTests(4, {**BASE, "microbatches": 4, "sdp_gather": "visit", "pipeline": "zero_bubble"})
PP_TP = RankTests(8, {**BASE, "tensor_parallel_degree": 2, "microbatches": 2})
PP_HYBRID = RankTests(8, {**BASE, "microbatches": 4, "pipeline": "zero_bubble"})


def mark_blocks(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.in_features in (6, 8) and module.bias is not None:
            smp.set_tensor_parallelism(module)


@on(INTERLEAVED, SIMPLE, ZERO_BUBBLE, REPLICATE, ONE, VISIT, VISIT_BUBBLE)
def test_a_tied_gpt_equals_one_process():
    check(make_gpt, gpt_batches(4 * smp.dp_size()), gpt_loss, adam)


@on(INTERLEAVED, ZERO_BUBBLE, VISIT)
def test_an_untied_gpt_equals_one_process():
    check(make_untied_gpt, gpt_batches(4 * smp.dp_size()), gpt_loss, adam)


@on(INTERLEAVED, SIMPLE, ZERO_BUBBLE, ONE, VISIT, VISIT_BUBBLE)
def test_awkward_parameters_equal_one_process():
    check(make_awkward, awkward_batches(4 * smp.dp_size()), token_loss, sgd_of_trained, broadcast_buffers=False)


@on(INTERLEAVED, SIMPLE, ZERO_BUBBLE, ONE)
def test_layers_that_some_ranks_do_not_use_equal_one_process():
    check(make_conditional, awkward_batches(4 * smp.dp_size()), token_loss, sgd_of_trained, broadcast_buffers=False)


@on(INTERLEAVED, ONE)
def test_compiled_modules_equal_one_process():
    check(make_gpt, gpt_batches(4 * smp.dp_size()), gpt_loss, sgd_of_trained, compile={"backend": "eager"})


@on(INTERLEAVED, VISIT, ZERO_BUBBLE)
def test_each_stage_holds_its_part_between_steps_and_frees_after_evaluation():
    base = live_bytes()  # models of other tests
    torch.manual_seed(0)
    model = smp.DistributedModel(TiedGPT(vocabulary=32, hidden=32, num_layers=4, is_tied=False))
    batch = own_share(gpt_batches(4 * smp.dp_size())[0])
    before = None
    for _ in range(3):
        model.zero_grad()
        run_step(model, batch)
        sharding = model.gradients.sharding
        assert sharding.num_gathered == 0
        total = sum(4 * parameter.numel() for parameter in model.local_parameters())
        held = live_bytes() - base
        assert before is None or held <= before + 2000  # nothing piles up
        before = held
        assert sharding.num_elements * 4 >= 0.9 * total
        own = sum(4 * s.tensor.numel() for p in model.local_parameters() for s in sharding.shards_of(p))
        assert own <= total / 2 + 4 * 100 * len(list(model.local_parameters()))
    evaluate(model, batch)
    assert model.gradients.sharding.num_gathered == 0
    # Parameters, gradients, and what stands in for other stages.
    assert held <= 2 * own + 0.35 * total, (held, own, total)


def run_step(model, batch):
    return step_of(gpt_loss)(model, *batch)


def evaluate(model, batch):
    @smp.step
    def evaluation_step(model, *microbatch):
        return gpt_loss(model, *microbatch)

    with torch.no_grad():
        return evaluation_step(model, *batch)


@on(INTERLEAVED, VISIT)
def test_state_dicts_load_before_and_after_the_partition():
    original = make_untied_gpt().state_dict()
    changed = {name: value + 1 for name, value in original.items()}
    model = smp.DistributedModel(make_untied_gpt())
    assert not model.load_state_dict(changed).missing_keys
    batch = own_share(gpt_batches(4 * smp.dp_size())[0])
    evaluate(model, batch)
    assert_parity(model.state_dict(), changed, dtype=torch.float64)
    model.load_state_dict(original)
    assert_parity(model.state_dict(), original, dtype=torch.float64)
    model.load_state_dict(model.local_state_dict(), same_partition_load=True)
    assert_parity(model.state_dict(), original, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match=r"model.state_dict\(\) gives the whole model"):
        model.cpu()


@on(INTERLEAVED)
def test_an_optimizer_built_before_the_partition_gets_the_shards():
    model = smp.DistributedModel(make_untied_gpt())
    optimizer = smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    group = optimizer.param_groups[0]
    run_step(model, own_share(gpt_batches(4 * smp.dp_size())[0]))
    assert optimizer.param_groups[0] is group
    assert [id(p) for p in group["params"]] == [id(p) for p in updated_tensors(model)]
    assert any(model.gradients.shards.shards_of(parameter) for parameter in model.local_parameters())


@on(ZERO_BUBBLE)
def test_zero_bubble_still_takes_backwards_apart():
    """Gathered by step there are no hooks of FSDP in the way, so that weight gradients really come later."""
    model = smp.DistributedModel(make_untied_gpt())
    batch = own_share(gpt_batches(4 * smp.dp_size())[0])
    runs = []
    original = SplitBackward.run_weights

    def run_weights(self):
        runs.append(len(self._noted) + len(self._left))
        original(self)

    SplitBackward.run_weights = run_weights
    try:
        for _ in range(2):
            run_step(model, batch)
    finally:
        SplitBackward.run_weights = original
    assert sum(runs) > 0


@on(INTERLEAVED)
def test_a_weight_read_in_glue_works_if_gathered_by_step():
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(13, 8)
            self.bodies = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

        def forward(self, tokens):
            x = self.embed(tokens)
            for body in self.bodies:
                x = x + torch.tanh(body(x))
            return F.linear(x, self.embed.weight)

    def make_reader():
        torch.manual_seed(1)
        return Reader().double()

    check(make_reader, gpt_batches(4 * smp.dp_size()), gpt_loss, sgd_of_trained)


@on(INTERLEAVED, VISIT)
def test_several_passes_are_reduced_once():
    batches = gpt_batches(8 * smp.dp_size())
    halves = [tuple(part.chunk(2)[half] for part in own_share(batches[0])) for half in range(2)]
    summed, once = smp.DistributedModel(make_gpt()), smp.DistributedModel(make_gpt(), backward_passes_per_step=2)
    for half in halves:
        run_step(summed, half)
        run_step(once, half)
    assert_parity(merged_gradients(once), merged_gradients(summed), dtype=torch.float64)


@pytest.mark.slow
@on(PP_TP, PP_HYBRID)
def test_eight_processes_equal_one():
    def mark(model):
        if smp.tp_size() > 1:
            mark_blocks(model)

    check(make_gpt, gpt_batches(4 * smp.dp_size()), gpt_loss, adam, mark=mark)
    batches = awkward_batches(4 * smp.dp_size())
    # The ranks of a TP_GROUP must call the same split layers.
    make_model = make_conditional if smp.tp_size() == 1 else make_awkward
    check(make_model, batches, token_loss, sgd_of_trained, mark=mark, broadcast_buffers=False)
