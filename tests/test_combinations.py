"""Features of data parallelism, memory and precision that meet in one script, as users combine them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modelparallel as smp
from distributed_run import mean_over_copies, own_share
from half_reference import half_reference_run
from modelparallel.errors import DivergenceError, SMPConfigError
from parity import assert_parity
from rank_tests import RankTests, on
from sharded_training import TiedGPT, gpt_batches, gpt_loss
from training import sgd, step_of

SDP = {"sharded_data_parallel_degree": 2, "sdp_param_persistence_threshold": 0, "sdp_gradient_clipping": 1e9}
PP = {"pipeline_parallel_degree": 2, "microbatches": 2}
SHARED_2 = RankTests(2, {"shard_optimizer_state": True, "microbatches": 2})
SDP_2 = RankTests(2, {**SDP, "microbatches": 2})
PP_2 = RankTests(2, PP)
PP_SHARED = RankTests(4, {**PP, "shard_optimizer_state": True})
PP_VISIT = RankTests(4, {**PP, **SDP, "sdp_gather": "visit"})
TP_2 = RankTests(2, {"tensor_parallel_degree": 2})
FP16_SDP = RankTests(2, {**SDP, "fp16": True})
FP16_PP_SDP = RankTests(4, {**PP, **SDP, "fp16": True})
FP16_2 = RankTests(2, {"fp16": True})


def make_gpt(dtype: torch.dtype = torch.float64, *, is_tied: bool = True) -> TiedGPT:
    torch.manual_seed(2)
    return TiedGPT(is_tied=is_tied).to(dtype)


train_step = step_of(gpt_loss)


def everything(model):
    """(name, parameter), also of what lives on other stages."""
    return model.virtual_named_parameters() if isinstance(model, smp.DistributedModel) else model.named_parameters()


def backward(model, batch) -> float:
    """One backward of a wrapped model on this rank's share, or of a plain one on all: the mean loss."""
    if isinstance(model, smp.DistributedModel):
        return mean_over_copies(train_step(model, *own_share(batch)).reduce_mean())
    loss = gpt_loss(model, *batch)
    loss.backward()
    return float(loss.detach())


def both(dtype: torch.dtype = torch.float64, *, is_tied: bool = True):
    """A wrapped model and the same one that is not."""
    return smp.DistributedModel(make_gpt(dtype, is_tied=is_tied)), make_gpt(dtype, is_tied=is_tied)


def optimizers_of(model, plain):
    return smp.DistributedOptimizer(sgd(model.parameters())), sgd(plain.parameters())


def batches(num_steps: int):
    return gpt_batches(4 * smp.dp_size(), num_steps)


@on(SHARED_2, SDP_2)
def test_gradients_of_zeros_are_gradients():
    """With ``set_to_none=False`` what was frozen goes on with its momentum, as in one process."""
    model, plain = both()
    pairs = list(zip((model, plain), optimizers_of(model, plain), strict=True))
    for step, batch in enumerate(batches(4)):
        for net, optimizer in pairs:
            if step == 2:
                for name, parameter in everything(net):
                    parameter.requires_grad_("blocks.1" not in name)
            if step % 2:
                net.zero_grad(set_to_none=False)
            else:
                optimizer.zero_grad(set_to_none=False)
            backward(net, batch)
            optimizer.step()
    assert_parity(model.state_dict(), plain.state_dict(), dtype=torch.float64)


@on(SHARED_2)
def test_zero_grad_does_what_the_inner_optimizer_does_by_default():
    model = smp.DistributedModel(nn.Linear(3, 3))
    inner = smp.optimizers.FusedAdam(model.parameters(), set_grad_none=False)
    optimizer = smp.DistributedOptimizer(inner)
    model(torch.ones(2, 3)).sum().backward()
    updated = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    optimizer.zero_grad()
    assert updated and all(tensor.grad is not None and not tensor.grad.any() for tensor in updated)
    optimizer.zero_grad(set_to_none=True)
    assert all(tensor.grad is None for tensor in updated)


@on(SHARED_2, SDP_2, PP_2, PP_SHARED, PP_VISIT)
def test_a_closure_may_run_the_first_step():
    model, plain = both()
    for net, optimizer in zip((model, plain), optimizers_of(model, plain), strict=True):
        for batch in batches(3):

            def closure(net=net, optimizer=optimizer, batch=batch):
                optimizer.zero_grad()
                return backward(net, batch)

            assert optimizer.step(closure) > 0
    assert_parity(model.state_dict(), plain.state_dict(), dtype=torch.float64)


@on(PP_VISIT)
def test_shorter_batches_keep_the_pipelines_of_a_sharding_group_together():
    """New shapes leave the plan; each visit gathers parameters, on all ranks that share them at once."""
    model, plain = both()
    optimizer, other = optimizers_of(model, plain)
    for num_samples in (3, 6, 3, 5, 4, 6):
        batch = gpt_batches(num_samples * smp.dp_size(), 1)[0]
        for net, each in ((model, optimizer), (plain, other)):
            each.zero_grad()
            backward(net, batch)
            each.step()
    assert_parity(model.state_dict(), plain.state_dict(), dtype=torch.float64)


@on(PP_2)
def test_freezing_what_this_rank_holds_alone_is_an_error_that_says_so():
    model, _ = both()
    optimizer = smp.DistributedOptimizer(sgd(model.parameters()))
    backward(model, batches(1)[0])
    optimizer.step()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("blocks.1" not in name)
    with pytest.raises(DivergenceError, match=r"'blocks\.1\.[\s\S]*virtual_named_parameters"):
        backward(model, batches(1)[0])


@on(SDP_2, FP16_SDP, FP16_PP_SDP, FP16_2)
def test_parameters_of_no_optimizer_are_in_the_norm_without_the_scale_of_the_loss():
    model, plain = both(torch.float32, is_tied=False)
    wanted = [parameter for name, parameter in everything(model) if "blocks.0" not in name]
    smp_optimizer = smp.DistributedOptimizer(sgd(wanted), static_loss_scale=1024.0)
    for batch in batches(2):
        smp_optimizer.zero_grad()
        for net in (model, plain):
            net.zero_grad()
            backward(net, batch)
        norms = [float(torch.nn.utils.clip_grad_norm_(net.parameters(), 0.3)) for net in (model, plain)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5 if model.loss_scale == 1.0 else 5e-3)


def half_loss(output, tokens):
    return F.cross_entropy(output.flatten(0, 1), tokens.roll(1, 1).flatten())


def half_reference(num_parts: int, num_steps: int, max_norm: float):
    return half_reference_run(
        lambda: make_gpt(torch.float32), [(tokens, tokens) for (tokens,) in batches(num_steps)], half_loss,
        dtype=torch.float16, make_optimizer=sgd, num_parts=num_parts, loss_scale=1024.0, max_norm=max_norm,
    )  # fmt: skip


@on(FP16_SDP, FP16_PP_SDP, FP16_2)
def test_clipping_before_the_update_divides_by_the_scale_of_the_loss_once():
    _, norms, expected = half_reference(smp.dp_size() * smp.num_microbatches(), 4, 0.3)
    model, _ = both(torch.float32)
    optimizer = smp.DistributedOptimizer(sgd(model.parameters()), static_loss_scale=1024.0)
    for norm, batch in zip(norms, batches(4), strict=True):
        optimizer.zero_grad()
        backward(model, batch)
        assert float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)) == pytest.approx(norm, rel=1e-2)
        assert float(smp.clip_grad_norm_(model, 0.3)) == pytest.approx(0.3, rel=1e-3)
        optimizer.step()
    actual, start = model.state_dict(), make_gpt(torch.float32).state_dict()
    moved, expected_move = (
        torch.cat([(weights[name].float() - start[name]).flatten() for name in expected])
        for weights in (actual, expected)
    )
    assert float((moved - expected_move).norm() / expected_move.norm()) <= 3e-2


@on(FP16_SDP, FP16_PP_SDP, FP16_2)
def test_a_norm_between_two_backwards_leaves_the_scaled_gradients_alone():
    model, _ = both(torch.float32)
    optimizer = smp.DistributedOptimizer(sgd(model.parameters()), static_loss_scale=1024.0)
    batch = batches(1)[0]
    norms = []
    for _ in range(3):
        backward(model, batch)
        norms.append(float(smp.clip_grad_norm_(model, 1e9)))
    assert norms[1:] == pytest.approx([2 * norms[0], 3 * norms[0]], rel=1e-2)
    optimizer.step()


@on(FP16_SDP, FP16_PP_SDP)
def test_layers_that_are_frozen_at_first_train_later_in_half_precision():
    net = make_gpt(torch.float32)
    net.blocks[0].requires_grad_(False)
    model = smp.DistributedModel(net)
    optimizer = smp.DistributedOptimizer(sgd(model.parameters()), static_loss_scale=1024.0)
    before = {name: value.clone() for name, value in make_gpt(torch.float16).state_dict().items()}
    for step, batch in enumerate(batches(3)):
        if step == 1:
            for _, parameter in everything(model):
                parameter.requires_grad_(True)
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()
        state = {name: value.half() for name, value in model.state_dict().items() if "blocks.0" in name}
        assert any(torch.equal(value, before[name]) for name, value in state.items()) is (step == 0)


@on(PP_2, TP_2)
def test_lbfgs_is_refused_where_a_rank_holds_a_part():
    model, _ = both()
    with pytest.raises(SMPConfigError, match="LBFGS looks at all parameters together"):
        smp.DistributedOptimizer(torch.optim.LBFGS(model.parameters()))


@on(TP_2)
def test_optimizers_that_look_at_whole_parameters_are_refused_slices():
    for make, is_refused in (
        (torch.optim.Adafactor, True),
        (torch.optim.Adam, False),
        (smp.optimizers.FusedLAMB, False),
    ):
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        smp.set_tensor_parallelism(net[0])
        model = smp.DistributedModel(net)
        optimizer = smp.DistributedOptimizer(make(model.parameters(), lr=0.01))
        model(torch.ones(2, 4)).sum().backward()
        if not is_refused:
            optimizer.step()
            continue
        with pytest.raises(SMPConfigError, match=f"{make.__name__} looks at parameters as a whole.*'0.weight'"):
            optimizer.step()
