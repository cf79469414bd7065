"""One norm over stages, slices and copies, by ours and by torch's function (design.md; smp-api section 7)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_ as imported_before
from torch.nn.utils import clip_grads_with_norm_ as clip_with_norm_before
from torch.nn.utils import get_total_norm as get_norm_before

import modelparallel as smp
from distributed_run import assert_equal_over, merged_gradients, own_share
from modelparallel.errors import SMPConfigError, SMPError
from parity import assert_parity
from pool import run_ranks
from rank_tests import RankTests, on

PP2 = RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 2})
PP3 = RankTests(3, {"pipeline_parallel_degree": 3, "microbatches": 2})
TP2 = RankTests(2, {"tensor_parallel_degree": 2})
DP2 = RankTests(2, {})
SHARDED = RankTests(2, {"shard_optimizer_state": True})
REPLICATED = RankTests(
    2, {"pipeline_parallel_degree": 2, "microbatches": 2, "tied_weights": "replicate", "memory_weight": 0.0}
)
ALL = RankTests(8, {"pipeline_parallel_degree": 2, "tensor_parallel_degree": 2, "microbatches": 2}, is_slow=True)


class Tied(nn.Module):
    """An embedding that is also the head, a sliced layer, a buffer, a parameter of its own and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.inner, self.outer = nn.Linear(8, 16), nn.Linear(16, 8)
        self.frozen = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.table.weight
        self.frozen.weight.requires_grad_(False)

    def forward(self, tokens):
        x = self.table(tokens) * self.scale
        x = x + self.outer(torch.tanh(self.inner(x)))
        return self.head(self.frozen(x))


def make_tied() -> Tied:
    torch.manual_seed(2)
    net = Tied().double()
    if smp.tp_size() > 1:
        smp.set_tensor_parallelism(net.inner)
        smp.set_tensor_parallelism(net.outer)
    return net


def make_batch(num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, 12, (num_samples, 5), generator=generator)
    return tokens, torch.randint(0, 12, (num_samples, 5), generator=generator)


def loss_of(output, targets):
    return F.cross_entropy(output.flatten(0, 1), targets.flatten())


@smp.step
def train_step(model, tokens, targets):
    loss = loss_of(model(tokens), targets)
    model.backward(loss)
    return loss


def trained():
    """(model after a step, plain model with the same gradients)."""
    model = smp.DistributedModel(make_tied())
    batch = make_batch(4 * smp.dp_size())
    train_step(model, *own_share(batch))
    plain = make_tied()
    loss_of(plain(batch[0]), batch[1]).backward()
    return model, plain


def check(norm, expected, model, plain, names=None):
    torch.testing.assert_close(norm, expected, rtol=1e-9, atol=0)
    assert_equal_over(smp.WORLD, norm)
    gradients = merged_gradients(model)
    wanted = {name: value.grad for name, value in plain.named_parameters() if value.grad is not None}
    assert_parity({name: gradients[name] for name in names or wanted}, {
        name: wanted[name] for name in names or wanted
    }, dtype=torch.float64)  # fmt: skip


@on(PP2, PP3, TP2, DP2, REPLICATED, ALL)
def test_the_norm_is_that_of_one_process():
    for norm_type in (2.0, 1.0, 3.0, math.inf):
        for clip in (smp.clip_grad_norm_, torch.nn.utils.clip_grad_norm_, imported_before):
            model, plain = trained()
            plain_parameters = list(plain.parameters())
            grads = [value.grad for value in plain_parameters if value.grad is not None]
            expected = torch.linalg.vector_norm(torch.cat([grad.flatten() for grad in grads]), norm_type)
            limit = float(expected) / 3
            factor = min(limit / (float(expected) + 1e-6), 1.0)
            for grad in grads:
                grad.mul_(factor)
            norm = clip(model if clip is smp.clip_grad_norm_ else model.parameters(), limit, norm_type)
            check(norm, expected, model, plain)


@on(PP2, TP2, ALL)
def test_the_optimizer_clips_by_it_too():
    model, plain = trained()
    optimizer = smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    expected = imported_before([value for value in plain.parameters() if value.grad is not None], 0.01)
    check(optimizer.clip_master_grads(0.01), expected, model, plain)
    assert optimizer._global_grad_norm == expected or abs(float(optimizer._global_grad_norm - expected)) < 1e-9


@on(PP2, PP3, ALL)
def test_some_parameters_alone():
    """Those of one layer, which some stages do not hold; a list, and a generator."""
    model, plain = trained()
    wanted = {"inner.weight", "inner.bias"}
    own = [value for name, value in model.named_parameters() if name in wanted]
    expected = imported_before([plain.inner.weight, plain.inner.bias], 0.01)
    check(smp.clip_grad_norm_((value for value in own), 0.01), expected, model, plain, sorted(wanted))
    check(
        torch.nn.utils.clip_grad_norm_(own, 1e9),
        imported_before([plain.inner.weight, plain.inner.bias], 1e9), model, plain, sorted(wanted),
    )  # fmt: skip


@on(PP2, TP2)
def test_models_that_are_not_wrapped_are_left_alone():
    trained()
    alone = nn.Linear(3, 3)
    alone(torch.full((2, 3), float(smp.rank() + 1))).sum().backward()
    expected = torch.cat([value.grad.flatten() for value in alone.parameters()]).norm()
    torch.testing.assert_close(torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.5), expected)
    clipped = torch.cat([value.grad.flatten() for value in alone.parameters()]).norm()
    torch.testing.assert_close(clipped, torch.tensor(0.5), rtol=1e-5, atol=0)
    with pytest.raises(SMPConfigError, match="is not wrapped"):
        smp.clip_grad_norm_(alone, 1.0)


@on(PP2, TP2, ALL)
def test_a_nan_on_one_rank_is_seen_by_all():
    for culprit in (0, smp.size() - 1):
        model, _ = trained()
        places = smp.allgather((smp.pp_rank(), smp.rdp_rank()), smp.WORLD)
        trained_here = [value for value in model.parameters() if value.grad is not None]
        split = [value for value in trained_here if model.is_distributed_parameter(value)]
        # What the ranks of a TP_GROUP all hold is equal on them.
        if smp.rank() == culprit if split else places[smp.rank()] == places[culprit]:
            (split or trained_here)[0].grad.view(-1)[0] = float("nan")
        for clip in (smp.clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
            group = set(smp.get_mp_group())
            with_error = {"error_if_nonfinite": True}
            if culprit in group:
                with pytest.raises(RuntimeError, match="cannot be clipped"):
                    clip(list(model.parameters()), 1.0, **with_error)
            else:
                assert bool(torch.isfinite(clip(list(model.parameters()), 1.0, **with_error)))


@on(PP2)
def test_before_the_partition_there_is_nothing_to_clip():
    model = smp.DistributedModel(make_tied())
    with pytest.raises(SMPError, match="not partitioned"):
        smp.clip_grad_norm_(model, 1.0)
    with pytest.raises(SMPConfigError, match="norm_type"):
        smp.clip_grad_norm_(trained()[0], 1.0, norm_type=-1)


def clip_after_the_session():
    def inside(function):
        return [cell.cell_contents for cell in function.__closure__]

    utils = torch.nn.utils
    functions = [utils.get_total_norm, utils.clip_grads_with_norm_, utils.clip_grad_value_]
    before = [inside(function) for function in functions]
    trained()
    during = [inside(function) for function in functions]
    smp.job.session.shutdown()
    return [now != one for now, one in zip(during, before, strict=True)], before == list(map(inside, functions))


def test_torch_is_put_back_when_the_session_ends():
    expected = ([True, True, True], True)
    assert run_ranks(clip_after_the_session, 2, parameters={"pipeline_parallel_degree": 2}) == [expected] * 2


@on(PP2, PP3, TP2, DP2, SHARDED)
def test_torch_s_functions_for_the_norm_alone_and_the_clipping_alone():
    ways = (lambda grad: grad, lambda grad: grad.detach(), lambda grad: grad.data)
    for of in ways[:1] if smp.state.cfg.shard_optimizer_state else ways:
        model, plain = trained()
        gradients = [of(value.grad) for value in model.parameters() if value.grad is not None]
        expected = get_norm_before([value.grad for value in plain.parameters() if value.grad is not None])
        norm = get_norm_before(gradients)
        torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)
        clip_with_norm_before(model.parameters(), 0.1, norm)
        clip_with_norm_before(plain.parameters(), 0.1, expected)
        torch.testing.assert_close(
            smp.clip_grad_norm_(model, 1.0), torch.tensor(0.1, dtype=torch.float64), rtol=1e-5, atol=0
        )
    if smp.pp_size() * smp.tp_size() > 1:
        for tensors in (model.parameters(), [torch.ones(3), *gradients]):
            with pytest.raises(SMPConfigError, match="not all gradients of wrapped models"):
                get_norm_before(tensors)
    torch.testing.assert_close(get_norm_before([torch.ones(4)]), torch.tensor(2.0))


@on(PP2)
def test_norms_of_complex_gradients_are_in_full_precision():
    class Wave(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.factor = nn.Parameter(torch.randn(5, dtype=torch.complex128))

        def forward(self, x):
            return x * self.factor

    torch.manual_seed(1)
    x = torch.randn(4, 5, dtype=torch.complex128)

    @smp.step
    def step(model, x):
        loss = model(x).abs().square().mean()
        model.backward(loss)
        return loss

    plain, model = (nn.Sequential(Wave(1), Wave(2)) for _ in range(2))
    model = smp.DistributedModel(model)
    step(model, x)
    plain(x).abs().square().mean().backward()
    expected = torch.nn.utils.get_total_norm([value.grad for value in plain.parameters()])
    found = smp.clip_grad_norm_(model, 1e9)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
