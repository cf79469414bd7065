"""``model.register_comm_hook``: torch's own hooks, under pipelines and split layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

import modelparallel as smp
from distributed_run import assert_equal_over, merged_gradients, own_share
from modelparallel.data_parallel import GradientReducer, comm_hooks
from modelparallel.errors import SMPConfigError
from odd_model import CAP, NUM_STEPS, batch, make_model
from parity import assert_parity, reference_run
from pool import run_ranks
from rank_tests import RankTests, on
from reducer_programs import irregular_steps, split_over_tp
from training import sgd_of_trained, token_loss, token_step

DP2 = RankTests(2, {"microbatches": 2})
PP2 = RankTests(4, {"pipeline_parallel_degree": 2, "microbatches": 2})
TP2 = RankTests(4, {"tensor_parallel_degree": 2, "microbatches": 2}, is_slow=True)
NO_DDP = RankTests(1, {"ddp": False})


def wrapped(**arguments: Any) -> Any:
    net = make_model()
    smp.set_tensor_parallelism(net.wide)
    smp.set_tensor_parallelism(net.back)
    return smp.DistributedModel(net, **{"bucket_cap_mb": CAP, **arguments})


def gradients_of(hook: Any, state: Any = None, step: int = 0, **arguments: Any) -> dict[str, Tensor]:
    model = wrapped(**arguments)
    if hook is not None:
        model.register_comm_hook(state, hook)
    token_step(model, *own_share(batch(step)))
    return merged_gradients(model)


@on(DP2, PP2, TP2)
def test_the_stock_all_reduce_gives_the_gradients_of_one_process():
    expected = reference_run(
        make_model,
        [batch(step) for step in range(NUM_STEPS)],
        token_loss,
        num_microbatches=2,
        make_optimizer=sgd_of_trained,
        num_copies=smp.dp_size(),
    )
    for as_views in (False, True):
        for cap in (CAP, 25):
            model = wrapped(gradient_as_bucket_view=as_views, bucket_cap_mb=cap)
            model.register_comm_hook(None, default_hooks.allreduce_hook)  # before the partition
            optimizer = smp.DistributedOptimizer(sgd_of_trained(model.parameters()))
            for step in range(NUM_STEPS):
                optimizer.zero_grad()
                token_step(model, *own_share(batch(step)))
                if step == 0:
                    assert_parity(merged_gradients(model), expected.gradients, dtype=torch.float64)
                optimizer.step()
            assert_parity(model.state_dict(), expected.weights, dtype=torch.float64)
            names = [name for name, p in model.local_named_parameters() if p.grad is None]
            assert all(name.startswith(("never", "frozen")) for name in names)


@on(DP2, PP2, TP2)
def test_a_hook_after_the_partition_and_gradients_of_several_steps():
    model, plain = wrapped(), wrapped()
    tokens, use = own_share(batch(0))
    for other in (model, plain):
        token_step(other, tokens, use)  # partitions; these gradients stay, and the next ones are added
    model.register_comm_hook(smp.get_dp_process_group() if smp.tp_size() == 1 else None, default_hooks.allreduce_hook)
    for other in (model, plain):
        with other.no_sync():
            token_step(other, *own_share(batch(2)))
        token_step(other, *own_share(batch(1)))
    assert_parity(merged_gradients(model), merged_gradients(plain), dtype=torch.float64)


@on(DP2)
def test_plain_backward_reduces_by_the_hook():
    model, plain = wrapped(), wrapped()
    calls: list[tuple[int, bool, int]] = []

    def hook(state: Any, bucket: Any) -> torch.futures.Future[Tensor]:
        sizes = [parameter.numel() for parameter in bucket.parameters()]
        assert [gradient.numel() for gradient in bucket.gradients()] == sizes
        assert bucket.buffer().numel() == sum(sizes)
        calls.append((bucket.index(), bucket.is_last(), state.size()))
        return default_hooks.allreduce_hook(state, bucket)

    model.register_comm_hook(None, hook)
    for other in (model, plain):
        token_loss(other, *own_share(batch(0))).backward()
    for (name, mine), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None), name
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-12, atol=1e-14)
    assert len(calls) > 3 and [last for _, last, _ in calls] == [False] * (len(calls) - 1) + [True]
    assert [index for index, _, _ in calls] == list(range(len(calls))) and {size for _, _, size in calls} == {2}


@on(PP2, TP2)
def test_gradients_are_compressed_to_half_precision():
    exact = gradients_of(None)
    wrappers = (
        (default_hooks.fp16_compress_hook, 2.0**-10),
        (default_hooks.bf16_compress_hook, 2.0**-7),
        (default_hooks.fp16_compress_wrapper(default_hooks.allreduce_hook), 2.0**-10),
        (default_hooks.bf16_compress_wrapper(default_hooks.allreduce_hook), 2.0**-7),
    )
    for hook, precision in wrappers:
        found = gradients_of(hook)
        worst = max(
            float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact if exact[name].norm() > 0
        )
        assert precision / 100 < worst < precision
        assert_equal_over(smp.CommGroup.MP_GROUP, found)
        assert_equal_over(smp.CommGroup.DP_GROUP, found)


@on(PP2, TP2)
def test_power_sgd():
    model = wrapped(bucket_cap_mb=25)
    # The process group is left out: each bucket's own is used.
    state = PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2, min_compression_rate=1)
    model.register_comm_hook(state, powerSGD_hook)
    optimizer = smp.DistributedOptimizer(sgd_of_trained(model.parameters()))
    losses = []
    exact = gradients_of(None)
    for step in range(12):
        optimizer.zero_grad()
        losses.append(float(token_step(model, *own_share(batch(0))).reduce_mean()))
        gradients = merged_gradients(model)
        rank = int(torch.linalg.matrix_rank(gradients["embed.weight"], rtol=1e-9))
        if step == 0:
            assert_parity(gradients, exact, dtype=torch.float64)
        assert (rank == 1) == (step >= 2)
        assert_equal_over(smp.CommGroup.RDP_GROUP, {n: p.grad for n, p in model.local_named_parameters()})
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert state.process_group is None and state.error_dict


@on(PP2, TP2)
def test_a_state_of_other_ranks_is_refused():
    everyone = dist.new_group()
    for state in (everyone, PowerSGDState(everyone)):
        if smp.dp_size() == dist.get_world_size():  # tp: the slices are averaged over fewer
            match = r"process group of the global ranks \[0, 1, 2, 3\].*RDP group \[., .\]"
        else:
            match = r"process group of the global ranks \[0, 1, 2, 3\].*DP group \[., .\]"
        with pytest.raises(SMPConfigError, match=match):
            wrapped().register_comm_hook(state, default_hooks.allreduce_hook)


@on(DP2)
def test_wrong_hooks():
    with pytest.raises(SMPConfigError, match="overlapping_allreduce=False"):
        wrapped(overlapping_allreduce=False).register_comm_hook(None, default_hooks.allreduce_hook)
    with pytest.raises(SMPConfigError, match="state comes first"):
        wrapped().register_comm_hook(default_hooks.allreduce_hook, None)
    model = wrapped()
    model.register_comm_hook(None, default_hooks.allreduce_hook)
    with pytest.raises(SMPConfigError, match="has the hook allreduce_hook already"):
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    for result, match in ((None, "returned a NoneType"), (torch.zeros(3), "holds 3 elements, the bucket")):
        model = wrapped()

        def hook(state: Any, bucket: Any, result: Any = result) -> Any:
            if result is None:
                return None
            future: torch.futures.Future[Tensor] = torch.futures.Future()
            future.set_result(result)
            return future

        model.register_comm_hook(None, hook)
        with pytest.raises(SMPConfigError, match=match):
            token_step(model, *own_share(batch(0)))


@on(NO_DDP)
def test_c049_a_hook_needs_ddp():
    model = smp.DistributedModel(nn.Linear(2, 2))
    with pytest.raises(SMPConfigError, match="needs ddp: True"):
        model.register_comm_hook(None, default_hooks.allreduce_hook)


def irregular_steps_with_a_hook() -> None:
    """As on a GPU, where buckets are launched early: this hook has one collective, so that it works here too."""
    init = comm_hooks.HookedBucket.__init__

    def init_early(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.waits_for_the_end = False

    comm_hooks.HookedBucket.__init__ = init_early  # this process runs nothing else
    make = GradientReducer.__init__

    def make_with_hook(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.register_comm_hook(comm_hooks.CommHook(None, default_hooks.allreduce_hook))

    GradientReducer.__init__ = make_with_hook
    irregular_steps()
    split_over_tp()


def test_hooks_during_the_backward_reduce_changed_buckets_again() -> None:
    run_ranks(irregular_steps_with_a_hook, 4)
