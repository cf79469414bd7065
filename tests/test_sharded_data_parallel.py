"""Sharded data parallelism without a pipeline: parity with one process, memory, state dicts, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

import modelparallel as smp
from distributed_run import own_share
from modelparallel.config.reading import validate_parameters
from modelparallel.errors import CheckpointError, SMPConfigError, UnsupportedError
from modelparallel.model.states import StateDictError
from parity import assert_parity
from rank_tests import RankTests, on
from sharded_training import (
    ShardOptimizer,
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
    whole,
)
from training import sgd_of_trained, step_of, token_loss

ALL = {"sdp_param_persistence_threshold": 0}
DP2 = RankTests(2, {"sharded_data_parallel_degree": 2, **ALL})
DP2_MB4 = RankTests(2, {"sharded_data_parallel_degree": 2, "microbatches": 4, **ALL}, is_slow=True)
DP2_STEP = RankTests(2, {"sharded_data_parallel_degree": 2, "microbatches": 2, "sdp_gather": "step", **ALL})
DP4 = RankTests(4, {"sharded_data_parallel_degree": 4, **ALL}, is_slow=True)
HYBRID = RankTests(4, {"sharded_data_parallel_degree": 2, "microbatches": 2, **ALL})
TP2 = RankTests(4, {"sharded_data_parallel_degree": 2, "tensor_parallel_degree": 2, **ALL})
PARTLY = RankTests(2, {"sharded_data_parallel_degree": 2, "sdp_param_persistence_threshold": 60})
TIGHT = RankTests(2, {"sharded_data_parallel_degree": 2, "sdp_max_live_parameters": 400, **ALL})
HALF = RankTests(2, {"sharded_data_parallel_degree": 2, "bf16": True, **ALL})
BROAD = RankTests(2, {"sharded_data_parallel_degree": 2, "fp16": True})
EVERY_WAY = (DP2, DP2_MB4, DP2_STEP, DP4, HYBRID, PARTLY, TIGHT)


def mark_blocks(model: nn.Module) -> None:
    """Split layers beside whole ones, in the same module."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.in_features in (5, 6, 8) and module.bias is not None:
            smp.set_tensor_parallelism(module)


class Counting(torch.optim.SGD):
    """An optimizer whose ``zero_grad`` takes no argument."""

    is_elementwise = True
    num_calls = 0

    def zero_grad(self):
        self.num_calls += 1
        super().zero_grad()


@smp.step
def squares(model, samples):
    loss = model(samples).float().square().mean()
    model.backward(loss)
    return loss


@on(DP2, PARTLY, HYBRID, TP2, HALF, BROAD)
def test_scripts_of_the_original_find_the_parts_of_this_rank():
    torch.manual_seed(4)
    module: Any = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4), nn.Linear(4, 1, bias=False)).float()
    if smp.tp_size() > 1:
        smp.set_tensor_parallelism(module[2])
    model = smp.DistributedModel(module)
    module = model.get_module()
    groups = [{"params": [p for p in module.parameters() if (p.dim() == 1) == is_bias]} for is_bias in (False, True)]
    identities, offsets, ends = [[id(p) for p in group["params"]] for group in groups], {}, []
    for group in groups:  # as scripts do it, before there is an optimizer
        end = 0
        for parameter in group["params"]:
            assert parameter.ds_tensor.ds_numel == parameter.ds_tensor.numel()
            assert parameter.ds_numel == parameter.numel() and parameter.ds_shape == parameter.shape
            offsets[id(parameter)] = end
            end += parameter.ds_tensor.ds_numel
        ends.append(end)
    optimizer = smp.DistributedOptimizer(Counting(groups, lr=0.1))
    assert [flat.numel() for flat in optimizer.fp32_partitioned_groups_flat] == ends
    assert [[id(p) for p in group] for group in optimizer.fp16_groups] == identities
    assert [sum(p.ds_tensor.ds_numel for p in group["params"]) for group in optimizer.param_groups] == ends
    parts = {
        id(parameter): flat[offsets[id(parameter)] : offsets[id(parameter)] + parameter.ds_tensor.ds_numel]
        for group, flat in zip(list[Any](optimizer.fp16_groups), optimizer.fp32_partitioned_groups_flat, strict=True)
        for parameter in group
    }
    shard_ranks = torch.distributed.get_process_group_ranks(optimizer.ds_param_shard_group)
    assert len(shard_ranks) == 2

    def check_parts(has_changed: bool) -> None:
        state = model.local_state_dict(gather_if_shard=True)
        for name, parameter in module.named_parameters():
            own = parts[id(parameter)]
            assert own.dtype == torch.float32
            torch.testing.assert_close(parameter.ds_tensor.float(), own, rtol=1e-2, atol=1e-2)
            held = smp.allgather(own.clone(), smp.WORLD)
            joined = torch.cat([held[rank] for rank in shard_ranks]).view(state[name].shape)
            assert torch.equal(joined.to(state[name].dtype), state[name]), name
            assert torch.equal(state[name], before[name]) != has_changed, name

    before = model.local_state_dict(gather_if_shard=True)
    before = {name: value.clone() for name, value in before.items() if torch.is_tensor(value)}
    check_parts(False)
    generator = torch.Generator().manual_seed(smp.dp_rank())
    for _ in range(2):
        optimizer.zero_grad()
        squares(model, torch.randn(4, 6, generator=generator))
        optimizer.step()
    check_parts(True)
    assert optimizer.optimizer.num_calls == 2
    state = optimizer.save_optimizer_backcompat(gather_if_shard=False)
    optimizer.load_optimizer_backcompat(state, False)
    check_parts(True)


def num_bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@on(*EVERY_WAY)
def test_a_tied_gpt_equals_one_process():
    check(make_gpt, gpt_batches(4 * smp.dp_size()), gpt_loss, adam)


@on(DP2, HYBRID)
def test_an_untied_gpt_in_fp32_equals_one_process():
    check(
        lambda: make_untied_gpt().float(), gpt_batches(4 * smp.dp_size()), gpt_loss, sgd_of_trained, dtype=torch.float32
    )


@on(DP2, DP2_MB4, DP2_STEP, HYBRID)
def test_awkward_parameters_equal_one_process():
    check(make_awkward, awkward_batches(4 * smp.dp_size()), token_loss, sgd_of_trained, broadcast_buffers=False)


@on(DP2_STEP)
def test_layers_that_some_ranks_do_not_use_equal_one_process():
    check(make_conditional, awkward_batches(4 * smp.dp_size()), token_loss, sgd_of_trained, broadcast_buffers=False)


@on(DP2, HYBRID)
def test_find_unused_parameters_gathers_by_step():
    batches = awkward_batches(4 * smp.dp_size())
    check(make_conditional, batches, token_loss, sgd_of_trained, broadcast_buffers=False, find_unused_parameters=True)


@on(TP2)
def test_tensor_parallel_slices_equal_one_process():
    check(make_gpt, gpt_batches(4 * smp.dp_size()), gpt_loss, sgd_of_trained, mark=mark_blocks)


@on(TP2)
def test_tensor_parallel_slices_with_awkward_parameters_equal_one_process():
    batches = awkward_batches(4 * smp.dp_size())
    check(make_awkward, batches, token_loss, sgd_of_trained, mark=mark_blocks, broadcast_buffers=False)


@on(DP2, DP2_STEP, DP4, TP2)
def test_a_plain_backward_equals_one_process():
    check(make_gpt, gpt_batches(4 * smp.dp_size()), gpt_loss, adam, num_microbatches=1, is_plain=True)


@on(DP2, DP2_MB4, DP2_STEP, TP2)
def test_several_passes_are_reduced_once_and_add_to_what_is_there():
    batches = gpt_batches(8 * smp.dp_size())
    halves = [tuple(part.chunk(2)[half] for part in own_share(batches[0])) for half in range(2)]

    @smp.step
    def train_step(model, tokens):
        model.backward(gpt_loss(model, tokens))

    def run(passes: int, is_blocked: bool = False):
        model = smp.DistributedModel(make_gpt(), backward_passes_per_step=passes)
        for number, half in enumerate(halves):
            if is_blocked and number == 0:
                with model.no_sync():
                    train_step(model, *half)
            else:
                train_step(model, *half)
            if (passes == 2 or is_blocked) and number == 0:
                assert all(p.grad is None for p in model.parameters())  # nothing is reduced yet
        return merged_gradients(model)

    summed = run(1)
    assert_parity(run(2), summed, dtype=torch.float64)
    assert_parity(run(1, is_blocked=True), summed, dtype=torch.float64)


@on(DP2, TP2)
def test_plain_backwards_inside_no_sync_accumulate():
    batches = gpt_batches(4 * smp.dp_size(), 2)
    model, other = smp.DistributedModel(make_gpt()), smp.DistributedModel(make_gpt())
    with model.no_sync():
        gpt_loss(model, *own_share(batches[0])).backward()
    gpt_loss(model, *own_share(batches[1])).backward()
    for batch in batches:
        gpt_loss(other, *own_share(batch)).backward()
    assert_parity(merged_gradients(model), merged_gradients(other), dtype=torch.float64)
    with model.no_sync():
        gpt_loss(model, *own_share(batches[0])).backward()
    model.zero_grad()  # also what waits for a reduction
    gpt_loss(model, *own_share(batches[1])).backward()
    other.zero_grad()
    gpt_loss(other, *own_share(batches[1])).backward()
    assert_parity(merged_gradients(model), merged_gradients(other), dtype=torch.float64)


@on(DP2, DP2_STEP, HYBRID)
def test_a_parameter_without_gradient_keeps_none():
    model = smp.DistributedModel(make_awkward(), broadcast_buffers=False)
    for is_plain in (False, True):
        model.zero_grad()
        if is_plain:
            token_loss(model, *own_share(awkward_batches(4 * smp.dp_size())[0])).backward()
        else:
            _step(model, token_loss, own_share(awkward_batches(4 * smp.dp_size())[0]))
        for name, parameter in model.named_parameters():
            is_absent = name.startswith(("never", "frozen", "partly.weight"))
            assert (parameter.grad is None) == is_absent, name


def _step(model, body, batch):
    return step_of(body)(model, *batch)


@on(DP2, DP2_MB4, DP2_STEP, DP4, HYBRID)
def test_each_rank_holds_its_part_between_steps():
    degree = {(2, 1): 2, (4, 1): 4, (4, 2): 2}[smp.dp_size(), smp.num_microbatches() if smp.dp_size() == 4 else 1]
    torch.manual_seed(0)
    before = live_bytes()
    model = smp.DistributedModel(TiedGPT(vocabulary=64, hidden=64, num_layers=4))
    total = 4 * sum(parameter.numel() for parameter in model.parameters())
    padding = 4 * 70 * degree * len(list(model.parameters())) / degree  # at most a row for each parameter
    batch = own_share(gpt_batches(4 * smp.dp_size())[0])
    assert live_bytes() - before <= total / degree + padding
    for _ in range(2):
        model.zero_grad()
        _step(model, gpt_loss, batch)
        held = live_bytes() - before - num_bytes(batch)
        assert total / degree < held <= 2 * (total / degree + padding), (held, total)
        assert model.gradients.sharding.num_gathered == 0
    with torch.no_grad():
        model(*batch)
    assert model.gradients.sharding.num_gathered == 0


@on(DP2, DP2_STEP)
def test_parameters_are_freed_between_the_uses():
    """By visit: one block beside the root at a time in the forward, two with the prefetch of the backward."""
    model = smp.DistributedModel(TiedGPT(vocabulary=16, hidden=32, num_layers=6))
    seen = []
    sharding = model.gradients.sharding
    for block in model.module.blocks:
        block.register_forward_pre_hook(lambda *_: seen.append(sharding.num_gathered))
        block.down.register_full_backward_pre_hook(lambda *_: seen.append(sharding.num_gathered))
    _step(model, gpt_loss, own_share(gpt_batches(4 * smp.dp_size())[0]))
    block_size = sum(parameter.numel() for parameter in model.module.blocks[0].parameters())
    rest = sharding.num_elements - 6 * block_size
    if sharding.gathers_by_visit:
        assert max(seen) <= rest + 2 * block_size
        assert set(seen[:6]) == {rest + block_size}
    else:
        assert set(seen) == {sharding.num_elements}


@on(TIGHT)
def test_max_live_parameters_bounds_what_is_gathered():
    model = smp.DistributedModel(TiedGPT(num_layers=4))
    sharding = model.gradients.sharding
    block_size = sum(parameter.numel() for parameter in model.module.blocks[0].parameters())
    rest = sharding.num_elements - 4 * block_size
    assert rest + block_size <= 400 + block_size < rest + 2 * block_size or rest + block_size > 400
    seen = []
    for block in model.module.blocks:
        block.down.register_full_backward_pre_hook(lambda *_: seen.append(sharding.num_gathered))
    _step(model, gpt_loss, own_share(gpt_batches(4 * smp.dp_size())[0]))
    assert seen and max(seen) <= rest + block_size


@on(DP2, DP2_STEP, DP4, HYBRID, TP2, PARTLY)
def test_state_dicts_are_whole_and_load_back():
    plain = make_gpt()
    original = {name: value.clone() for name, value in plain.state_dict().items()}
    if smp.tp_size() > 1:
        mark_blocks(plain)
    model = smp.DistributedModel(plain)
    state = model.state_dict()
    assert list(state) == list(original)
    assert_parity(state, original, dtype=torch.float64)
    changed = {name: value + 1 for name, value in original.items()}
    result = model.load_state_dict(changed)
    assert not result.missing_keys and not result.unexpected_keys
    assert_parity(model.state_dict(), changed, dtype=torch.float64)
    _step(model, gpt_loss, own_share(gpt_batches(4 * smp.dp_size())[0]))
    partial = model.local_state_dict(gather_if_shard=True)
    assert all(not isinstance(value, DTensor) for value in partial.values())
    model.load_state_dict({**partial, "norm.weight": partial["norm.weight"] * 2}, same_partition_load=True)
    expected = {**changed, "norm.weight": changed["norm.weight"] * 2}
    assert_parity(model.state_dict(), expected, dtype=torch.float64)


@on(DP2, PARTLY, TP2)
def test_a_local_state_dict_is_local():
    model = smp.DistributedModel(make_gpt())
    original = {name: value.clone() for name, value in model.state_dict().items()}
    if smp.rank() == 0:  # the others never hear of it
        own = model.local_state_dict()
        shards = [name for name, value in own.items() if isinstance(value, DTensor)]
        assert shards and own.pop("_smp_is_partial") and own.keys() == original.keys()
        assert all(own[name].shape == original[name].shape for name in shards)
        held = sum(own[name].to_local().numel() for name in shards) / sum(original[name].numel() for name in shards)
        assert held < 0.75, held
        with pytest.raises(CheckpointError, match=r"holds shards of parameters .*gather_if_shard=True"):
            smp.save({"model": own}, "nowhere/model.pt")
    kept = copy.deepcopy(model.local_state_dict())
    model.load_state_dict({name: value + 1 for name, value in original.items()})
    model.load_state_dict(kept)
    assert_parity(model.state_dict(), original, dtype=torch.float64)
    with pytest.raises(StateDictError, match=r"'norm\.weight' is a shard of one rank"):
        other = DTensor.from_local(torch.zeros(2, dtype=torch.float64), kept_mesh(kept), [Replicate()])
        model.load_state_dict({"norm.weight": other, "_smp_is_partial": True}, strict=False)


def kept_mesh(state):
    return next(value.device_mesh for value in state.values() if isinstance(value, DTensor))


@on(DP2, PARTLY, TP2)
def test_c058_an_optimizer_built_before_wrapping_trains_the_shards():
    plain = make_gpt()
    names = {id(parameter): name for name, parameter in plain.named_parameters()}
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    given = [names[id(parameter)] for parameter in optimizer.param_groups[0]["params"]]
    if smp.tp_size() > 1:
        mark_blocks(plain)
    wrapped_early = smp.DistributedOptimizer(optimizer)
    model = smp.DistributedModel(plain)
    assert given == [name for name, _ in model.named_parameters()]
    own = [id(tensor) for tensor in updated_tensors(model)]
    assert [id(tensor) for tensor in wrapped_early.param_groups[0]["params"]] == own
    late = smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    assert [id(tensor) for tensor in late.param_groups[0]["params"]] == own


@on(DP2, DP2_STEP)
def test_parameters_are_the_same_objects_while_they_are_gathered():
    model = smp.DistributedModel(make_gpt())
    before = [(name, id(parameter)) for name, parameter in model.named_parameters()]
    batch = own_share(gpt_batches(4 * smp.dp_size())[0])
    loss = gpt_loss(model, *batch)
    assert [(name, id(parameter)) for name, parameter in model.named_parameters()] == before
    loss.backward()
    assert [(name, id(parameter)) for name, parameter in model.named_parameters()] == before


@on(DP4, HYBRID, TP2)
def test_each_element_is_counted_once_and_has_one_place():
    model = smp.DistributedModel(make_gpt())
    shards = model.gradients.shards
    counted = torch.zeros(())
    for parameter in model.parameters():
        flat = whole(parameter.detach()).flatten()
        for shard in shards.shards_of(parameter):
            assert shard.parameter is parameter
            torch.testing.assert_close(shard.tensor.detach().flatten(), flat[shard.start : shard.stop], rtol=0, atol=0)
            counted += shard.tensor.numel() * shard.is_counted
    torch.distributed.all_reduce(counted)
    assert counted == sum(parameter.numel() for parameter in model.parameters())


@on(DP2, DP2_MB4, DP2_STEP)
def test_a_step_that_raised_is_followed_by_one_that_counts():
    batch = own_share(gpt_batches(4 * smp.dp_size())[0])
    model, other = smp.DistributedModel(make_gpt()), smp.DistributedModel(make_gpt())

    @smp.step
    def failing(model, tokens):
        loss = gpt_loss(model, tokens)
        model.backward(loss)
        raise KeyError("on every rank")

    with pytest.raises(KeyError):
        failing(model, *batch)
    assert model.gradients.sharding.num_gathered == 0
    model.zero_grad()
    for one in (model, other):
        _step(one, gpt_loss, batch)
    assert_parity(merged_gradients(model), merged_gradients(other), dtype=torch.float64)


@on(DP2)
def test_parameters_may_be_frozen_between_steps():
    batch = own_share(gpt_batches(4 * smp.dp_size())[0])
    model = smp.DistributedModel(make_gpt())
    _step(model, gpt_loss, batch)
    model.zero_grad()
    for parameter in model.module.blocks[0].parameters():
        parameter.requires_grad_(False)
    _step(model, gpt_loss, batch)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("blocks.0."), name


@on(DP2)
def test_optimizers_that_need_whole_parameters_are_refused_by_name():
    model = smp.DistributedModel(make_gpt())
    with pytest.raises(UnsupportedError, match=r"Muon needs whole parameters, and sharded_data_parallel_degree=2"):
        model.gradients.sharding.require_whole_parameters("Muon")


@on(DP2)
def test_a_compiled_module_is_refused():
    plain = make_gpt()
    plain.blocks[0].compile(backend="eager")
    with pytest.raises(SMPConfigError, match=r"module 'blocks.0' \(Block\) was compiled by torch.compile"):
        smp.DistributedModel(plain)


@on(DP2, DP2_STEP)
def test_compile_leaves_modules_with_gathering_hooks_as_they_are():
    check(make_gpt, gpt_batches(4 * smp.dp_size()), gpt_loss, sgd_of_trained, compile={"backend": "eager"})


@on(DP2)
def test_moving_a_model_to_where_it_is_changes_nothing():
    batch = own_share(gpt_batches(4 * smp.dp_size())[0])
    model, other = smp.DistributedModel(make_gpt()), smp.DistributedModel(make_gpt())
    optimizers = [ShardOptimizer(one, sgd_of_trained) for one in (model, other)]
    model.to("cpu")
    model.train()
    for one, optimizer in zip((model, other), optimizers, strict=True):
        for _ in range(2):
            one.zero_grad()
            _step(one, gpt_loss, batch)
            optimizer.step()
    assert_parity(model.state_dict(), other.state_dict(), dtype=torch.float64)


@on(DP2)
def test_a_weight_read_without_its_module_works_if_gathered_by_step():
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(13, 8)
            self.body = nn.Linear(8, 8)

        def forward(self, tokens):
            return F.linear(torch.tanh(self.body(self.embed(tokens))), self.embed.weight)

    def make_reader():
        torch.manual_seed(1)
        return Reader().double()

    check(make_reader, gpt_batches(4 * smp.dp_size()), gpt_loss, sgd_of_trained)


@pytest.mark.parametrize(
    ("parameters", "num_processes", "text"),
    [
        ({"sharded_data_parallel_degree": 3}, 4, r"3 must divide the data parallel degree dp=4"),
        (
            {"sharded_data_parallel_degree": 4, "tensor_parallel_degree": 2}, 8,
            r"ok",
        ),
        (
            {"sharded_data_parallel_degree": 4, "tensor_parallel_degree": 2}, 4,
            r"4 must divide the 2 ranks that hold the same part of the model .* use a divisor of 2",
        ),
        (
            {"sharded_data_parallel_degree": 2, "sdp_gather": "always"}, 4,
            r"sdp_gather: must be one of 'auto', 'visit', 'step'",
        ),
    ],
)  # fmt: skip
def test_degrees_that_do_not_fit_are_refused(parameters, num_processes, text):
    given = {"ddp": True, **parameters}
    if text == "ok":
        assert validate_parameters(given, num_processes=num_processes).sharded_data_parallel_degree == 4
        return
    with pytest.raises(SMPConfigError, match=text):
        validate_parameters(given, num_processes=num_processes)
