"""fp16 and bf16: masters, the scale of the loss, overflows, casts (smp-api section 7)."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import StepLR

import modelparallel as smp
from distributed_run import own_share
from half_reference import half_reference_run
from modelparallel.errors import SMPConfigError
from pool import run_ranks
from rank_tests import RankTests, on
from training import gentle_sgd

PP2 = {"pipeline_parallel_degree": 2, "microbatches": 2}
FP16_PP2 = RankTests(2, {**PP2, "fp16": True})
FP16_DP2 = RankTests(2, {"fp16": True})
FP16_TP2 = RankTests(2, {"tensor_parallel_degree": 2, "fp16": True})
FP16_4 = RankTests(4, {**PP2, "fp16": True})
BF16_4 = RankTests(4, {**PP2, "bf16": True})
FP32_PP2 = RankTests(2, PP2)
FULL_DP2 = RankTests(2, {"_fp32_grad_accumulation": True, "bf16": True, "microbatches": 4})
SINGLE = RankTests(1, {"microbatches": 2, "fp16": True})


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.inner, self.outer = nn.Linear(16, 32), nn.Linear(32, 16)
        self.register_buffer("shift", torch.full((16,), 0.01))

    def forward(self, x):
        return x + self.outer(torch.tanh(self.inner(self.norm(x)))) + self.shift


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.last = nn.Linear(16, 5)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def make_net() -> Net:
    torch.manual_seed(3)
    return Net()


def make_batches(num_steps: int, num_samples: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(num_samples, 8, generator=generator),
            torch.randint(0, 5, (num_samples,), generator=generator),
        )
        for _ in range(num_steps)
    ]


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01, eps=1e-6)


@smp.step
def train_step(model, x, y):
    output = model(x)
    assert output.dtype in (torch.float32, torch.float64)
    loss = F.cross_entropy(output, y)
    model.backward(loss)
    return loss


def whole_masters(model, optimizer) -> dict[str, torch.Tensor]:
    """fp32 masters by name, of all stages and slices."""
    state = optimizer.state_dict()["state"]
    return {name: state[index]["fp32_master"] for name, index in optimizer.param_name_to_index().items()}


def train(model, optimizer, batches, max_norm=None, steps=train_step):
    losses, norms = [], []
    for batch in batches:
        optimizer.zero_grad()
        losses.append(float(steps(model, *own_share(batch)).reduce_mean()))
        if max_norm is not None:
            norms.append(float(optimizer.clip_master_grads(max_norm)))
        optimizer.step()
        assert not optimizer.overflow
    mean = torch.tensor(losses, dtype=torch.float64)
    torch.distributed.all_reduce(mean, group=smp.get_dp_process_group())
    return (mean / smp.dp_size()).tolist(), norms


def assert_close(actual, expected, tolerance):
    for name, tensor in expected.items():
        difference = float((actual[name] - tensor).norm() / tensor.norm())
        assert difference <= tolerance, f"{name}: {difference:.3g}"


def compare(dtype, make_optimizer, tolerance, loss_scale=1.0, max_norm=0.5):
    """Six steps against one process in the same precision."""
    num_parts = 2 * smp.dp_size()
    expected = half_reference_run(
        make_net, make_batches(6), F.cross_entropy, dtype=dtype, make_optimizer=make_optimizer, num_parts=num_parts,
        loss_scale=loss_scale, max_norm=max_norm,
    )  # fmt: skip
    model = smp.DistributedModel(make_net())
    optimizer = smp.DistributedOptimizer(make_optimizer(model.parameters()), static_loss_scale=loss_scale)
    losses, norms = train(model, optimizer, make_batches(6), max_norm)
    torch.testing.assert_close(losses, expected[0], rtol=tolerance, atol=0)
    if max_norm is not None:
        torch.testing.assert_close(norms, expected[1], rtol=tolerance, atol=0)
    masters = whole_masters(model, optimizer)
    assert all(master.dtype == torch.float32 for master in masters.values())
    assert_close(masters, expected[2], tolerance)
    state = model.state_dict()
    for name, master in masters.items():
        assert state[name].dtype == dtype and torch.equal(state[name], master.to(dtype)), name
    assert all(buffer.dtype == dtype for buffer in model.local_buffers())


@on(FP16_PP2)
def test_c060_a_pipeline_in_fp16_is_one_process_in_fp16():
    """The same kernels in the same order give the same bits. With clipping the norm is summed in another order, and
    where a master lies between two numbers of fp16 its last bit decides.
    """
    for make_optimizer in (adam, gentle_sgd):
        compare(torch.float16, make_optimizer, 1e-7, loss_scale=1024.0, max_norm=None)
        compare(torch.float16, make_optimizer, 1e-3, loss_scale=1024.0)


@on(FP16_4)
def test_c060_pipeline_and_data_parallelism_in_fp16():
    compare(torch.float16, gentle_sgd, 2e-3, loss_scale=1024.0)


@on(BF16_4)
def test_bf16_with_masters():
    compare(torch.bfloat16, gentle_sgd, 1e-2)


@on(FULL_DP2)
def test_gradients_are_accumulated_in_fp32():
    """Against gradients that are added up in fp32 from microbatches in bf16."""
    model = smp.DistributedModel(make_net())
    optimizer = smp.DistributedOptimizer(gentle_sgd(model.parameters()))
    optimizer.zero_grad()
    train_step(model, *own_share(make_batches(1, 16)[0]))
    plain = make_net().bfloat16()
    total = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in plain.named_parameters()}
    for x, y in zip(*(tensor.split(2) for tensor in make_batches(1, 16)[0]), strict=True):
        plain.zero_grad()
        (F.cross_entropy(plain(x.bfloat16()).float(), y) / 4).backward()
        for name, value in plain.named_parameters():
            total[name] += value.grad.float() / 2
    gradients = {name: value.grad for name, value in model.named_parameters()}
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    assert_close(gradients, total, 1e-6)
    optimizer.step()
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())


@on(FP16_PP2, FP16_DP2, FP16_TP2)
def test_c059_an_overflow_anywhere_skips_the_update_everywhere():
    with smp.tensor_parallelism(smp.tp_size() > 1):
        net = make_net()
    model = smp.DistributedModel(net)
    optimizer = smp.DistributedOptimizer(
        adam(model.parameters()), dynamic_loss_scale=True, dynamic_loss_args={"init_scale": 64.0, "scale_window": 2}
    )
    batch = own_share(make_batches(1)[0])
    train_step(model, *batch)  # partitions
    optimizer.step()
    assert not optimizer.overflow and optimizer.loss_scale == 64
    for culprit in range(smp.size()):
        optimizer.zero_grad()
        train_step(model, *batch)
        before = copy.deepcopy(model.local_state_dict(gather_if_shard=True))
        if smp.dp_size() == 1 or smp.tp_size() > 1:
            if smp.rank() == culprit:
                next(iter(model.local_parameters())).grad.view(-1)[0] = float("inf")
        else:  # through the reduction, which spreads it
            optimizer.zero_grad()
            x = batch[0].clone()
            if smp.rank() == culprit:
                x[0, 0] = float("nan")
            train_step(model, x, batch[1])
        scale = optimizer.loss_scale
        optimizer.step()
        assert optimizer.overflow and optimizer.step_was_skipped and optimizer.loss_scale == scale / 2
        after = model.local_state_dict(gather_if_shard=True)
        assert all(torch.equal(after[name], value) for name, value in before.items() if name[0] != "_")
    scale = optimizer.loss_scale
    for _ in range(2):
        optimizer.zero_grad()
        train_step(model, *batch)
        optimizer.step()
        assert not optimizer.overflow
    assert optimizer.loss_scale == 2 * scale
    assert smp.allgather(optimizer.loss_scale, smp.WORLD) == [2 * scale] * smp.size()


@on(SINGLE, FP16_PP2)
def test_c060_the_loss_is_scaled_inside():
    model = smp.DistributedModel(make_net())
    optimizer = smp.DistributedOptimizer(gentle_sgd(model.parameters()), static_loss_scale=256.0)
    train_step(model, *make_batches(1)[0])
    gradients = {name: value.grad.float() for name, value in model.local_named_parameters()}
    optimizer.update_master_grads()
    masters = [master for group in optimizer.fp32_from_fp16_groups for master in group]
    assert optimizer.master_params_created and masters
    for master, (name, gradient) in zip(masters, gradients.items(), strict=True):
        assert master.dtype == torch.float32 and torch.equal(master.grad, gradient / 256), name
    assert optimizer.loss_scale == optimizer.loss_scaler.cur_scale == 256 and not optimizer.dynamic_loss_scale
    assert float(optimizer.scale_loss(torch.tensor(2.0))) == 512


@on(SINGLE)
def test_a_plain_backward_is_scaled_too():
    """Outside of steps the script calls ``loss.backward()`` itself."""
    batch, found = make_batches(1)[0], []
    for scale in (1.0, 512.0):
        model = smp.DistributedModel(make_net())
        optimizer = smp.DistributedOptimizer(gentle_sgd(model.parameters()), static_loss_scale=scale)
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
        found.append(whole_masters(model, optimizer))
        model = smp.DistributedModel(make_net())
        optimizer = smp.DistributedOptimizer(gentle_sgd(model.parameters()), static_loss_scale=scale)
        optimizer.backward(F.cross_entropy(model(batch[0]), batch[1]))
        optimizer.step()
        found.append(whole_masters(model, optimizer))
    for other in found[1:]:
        assert_close(other, found[0], 1e-3)


@on(FP16_PP2)
def test_c061_schedulers_on_the_wrapper_and_on_the_inner_optimizer():
    for of in (lambda optimizer: optimizer, lambda optimizer: optimizer.optimizer):
        model = smp.DistributedModel(make_net())
        optimizer = smp.DistributedOptimizer(gentle_sgd(model.parameters()))
        scheduler = StepLR(of(optimizer), step_size=1, gamma=0.5)
        for _ in range(2):
            train_step(model, *make_batches(1)[0])
            optimizer.step()
            scheduler.step()
        assert optimizer.param_groups[0]["lr"] == optimizer.optimizer.param_groups[0]["lr"] == 0.05 / 4


@on(FP16_PP2, FP16_TP2)
def test_states_hold_masters_and_the_scale_and_go_on_equally():
    def fresh():
        with smp.tensor_parallelism(smp.tp_size() > 1):
            net = make_net()
        model = smp.DistributedModel(net)
        optimizer = smp.DistributedOptimizer(
            adam(model.parameters()), dynamic_loss_scale=True, init_scale=2.0**20, scale_window=2
        )
        return model, optimizer

    def go_on(model, optimizer, batches):
        for batch in batches:
            optimizer.zero_grad()
            train_step(model, *own_share(batch))
            optimizer.step()
        return model.state_dict(), whole_masters(model, optimizer)

    batches = make_batches(6)
    model, optimizer = fresh()
    go_on(model, optimizer, batches[:3])
    saved = [
        (copy.deepcopy(model.local_state_dict(gather_if_shard=True)), copy.deepcopy(optimizer.local_state_dict())),
        (copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())),
    ]
    expected = go_on(model, optimizer, batches[3:])
    for model_state, optimizer_state in saved:
        model, optimizer = fresh()
        model.load_state_dict(model_state)
        optimizer.load_state_dict(optimizer_state)
        weights, masters = go_on(model, optimizer, batches[3:])
        assert all(torch.equal(weights[name], value) for name, value in expected[0].items())
        assert all(torch.equal(masters[name], value) for name, value in expected[1].items())


@on(SINGLE, FP16_PP2)
def test_weights_that_are_loaded_reach_the_masters():
    model = smp.DistributedModel(make_net())
    optimizer = smp.DistributedOptimizer(gentle_sgd(model.parameters()))
    train_step(model, *make_batches(1)[0])
    optimizer.step()
    loaded = {name: torch.full_like(value, 0.25) for name, value in model.state_dict().items()}
    model.load_state_dict(loaded)
    optimizer.zero_grad()
    optimizer.step()
    assert all(bool((value == 0.25).all()) for value in whole_masters(model, optimizer).values())
    for parameter in model.parameters():
        parameter.data.fill_(0.5)  # nothing shows that it was written
    optimizer.reload_model_params()
    assert all(bool((value == 0.5).all()) for value in whole_masters(model, optimizer).values())


@on(FP32_PP2)
def test_autocast_reaches_every_stage():
    @smp.step
    def autocast_step(model, x, y):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
        loss = F.cross_entropy(output.float(), y)
        model.backward(loss)
        return output, loss

    model, plain = smp.DistributedModel(make_net()), make_net()
    x, y = make_batches(1)[0]
    output, _ = autocast_step(model, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.cat([plain(part) for part in x.split(4)])
    assert output.outputs[0].dtype == torch.bfloat16 and torch.equal(output.concat(), expected)
    for part, target in zip(x.split(4), y.split(4), strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            result = plain(part)
        (F.cross_entropy(result.float(), target) / 2).backward()
    gradients = dict(plain.named_parameters())
    assert_close(
        {name: value.grad for name, value in model.local_named_parameters()},
        {name: gradients[name].grad for name, _ in model.local_named_parameters()},
        1e-5,
    )


@on(FP32_PP2, RankTests(4, PP2))
def test_c063_grad_scalers_agree_over_the_stages():
    for make_scaler in (
        lambda: smp.amp.GradScaler(init_scale=1024.0, growth_interval=1),
        lambda: torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1),
    ):
        scaler = make_scaler()

        @smp.step
        def scaled_step(model, x, y, scaler=scaler):
            loss = F.cross_entropy(model(x), y)
            model.backward(scaler.scale(loss))
            return loss

        model = smp.DistributedModel(make_net())
        optimizer = smp.DistributedOptimizer(gentle_sgd(model.parameters()))
        plain = make_net()
        plain_optimizer = gentle_sgd(plain.parameters())
        batch = make_batches(1)[0]
        scaled_step(model, *own_share(batch))
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2048
        F.cross_entropy(plain(batch[0]), batch[1]).backward()
        expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        plain_optimizer.step()
        torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
        assert_close(model.state_dict(), plain.state_dict(), 1e-5)
        optimizer.zero_grad()
        scaled_step(model, *own_share(batch))
        if smp.pp_rank() == 1:
            next(iter(model.local_parameters())).grad.view(-1)[0] = float("nan")
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 1024
        assert_close(model.state_dict(), plain.state_dict(), 1e-5)


def make_and_step(clip):
    model = smp.DistributedModel(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    optimizer = smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    model(torch.randn(4, 4)).sum().backward()
    if clip:
        optimizer.clip_master_grads(1.0)
    optimizer.step()
    return {name: value.dtype for name, value in model.state_dict().items()}


@pytest.mark.parametrize("key", ["fp16", "bf16"])
def test_batch_norm_and_integers(key):
    """The counter of a BatchNorm stays whole; everything else is in half precision."""
    for clip in (True, False):
        dtypes = run_ranks(make_and_step, 1, clip, parameters={key: True})[0]
        half = torch.float16 if key == "fp16" else torch.bfloat16
        assert dtypes.pop("1.num_batches_tracked") == torch.int64 and set(dtypes.values()) == {half}


def wrong_scale():
    model = smp.DistributedModel(nn.Linear(2, 2))
    for arguments, word in (
        ({"static_loss_scale": 0.0}, "static_loss_scale"),
        ({"dynamic_loss_scale": True, "scale_factor": 0.5}, "scale_factor"),
        ({"dynamic_loss_args": {"windows": 3}}, "windows"),
    ):
        with pytest.raises(SMPConfigError, match=word):
            smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **arguments)


def test_wrong_loss_scales_are_named():
    run_ranks(wrong_scale, 1, parameters={"fp16": True})


def distributed_parameters():
    with smp.tensor_parallelism():
        net = make_net()
    model = smp.DistributedModel(net)
    return {name: value.dtype for name, value in model.named_parameters()}


def test_fp16_params_are_those_of_distributed_modules():
    parameters = {"tensor_parallel_degree": 2, "ddp": True, "fp16_params": True}
    dtypes = run_ranks(distributed_parameters, 2, parameters=parameters)[0]
    assert dtypes["first.weight"] == torch.float16 and dtypes["blocks.0.norm.weight"] == torch.float32


@on(FP16_PP2)
def test_gradients_are_clipped_by_value_without_the_scale():
    model = smp.DistributedModel(make_net())
    optimizer = smp.DistributedOptimizer(gentle_sgd(model.parameters()), static_loss_scale=1024.0)
    train_step(model, *make_batches(1)[0])
    optimizer.update_master_grads()
    expected = [master.grad.clamp(-0.01, 0.01) for group in optimizer.fp32_from_fp16_groups for master in group]
    torch.nn.utils.clip_grad_value_(model.parameters(), 0.01)
    masters = [master for group in optimizer.fp32_from_fp16_groups for master in group]
    assert all(torch.equal(master.grad, value) for master, value in zip(masters, expected, strict=True))
    assert max(float(value.abs().max()) for value in expected) == pytest.approx(0.01)
