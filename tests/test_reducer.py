"""The gradient reducer against DDP and against the mean over the ranks, on 2 to 4 processes."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from modelparallel.data_parallel import BroadcastTensor, broadcast_parameters
from modelparallel.errors import DivergenceError, StepUsageError, WaitTimeoutError
from pool import RankError, run_ranks
from reducer_programs import (
    Branches,
    accumulated_steps,
    alone,
    equal_to_ddp,
    frozen_and_unfrozen,
    gradients_without_hooks,
    interrupted_backward,
    irregular_steps,
    local_gradients,
    loss_of,
    make_model,
    mixed_dtypes_and_layouts,
    nested_backward,
    no_sync_like_ddp,
    pairs,
    random_runs,
    reducer_of,
    run_step,
    split_over_tp,
    through,
    users_change_gradients,
    world,
)

# Equal to DDP and to the mean.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_c034_plain_backward_gives_the_gradients_of_ddp(dtype):
    run_ranks(equal_to_ddp, 2, dtype)


def overlap_makes_no_difference():
    results = []
    for overlap in (True, False):
        model = make_model()
        reducer = reducer_of(model, overlap=overlap)
        for step in range(2):
            run_step(reducer, model, [loss_of(step)], [loss_of(step + 5)])
        assert all(not bucket.is_launched for bucket in reducer.buckets)
        results.append([parameter.grad for parameter in model.parameters()])
    for with_overlap, without in zip(*results, strict=True):
        assert torch.equal(with_overlap, without)


def test_c042_overlap_on_and_off_give_equal_gradients():
    run_ranks(overlap_makes_no_difference, 4)


def test_c041_gradients_of_several_steps_are_reduced_once():
    run_ranks(accumulated_steps, 2)


def test_no_sync_accumulates_and_the_next_backward_reduces_all():
    run_ranks(no_sync_like_ddp, 2)


# Parameters that do not get exactly one gradient.


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_parameters_with_any_number_of_gradients_get_the_mean(num_ranks):
    run_ranks(irregular_steps, num_ranks)


def test_a_gradient_that_changes_after_its_launch_without_a_hook_is_reduced_again():
    run_ranks(gradients_without_hooks, 2)


def test_gradients_may_be_cleared_replaced_or_scaled_between_steps():
    run_ranks(users_change_gradients, 2)


def test_frozen_parameters_are_left_out_and_may_thaw():
    run_ranks(frozen_and_unfrozen, 2)


def test_dtypes_layouts_and_sparse_gradients():
    run_ranks(mixed_dtypes_and_layouts, 2)


# Two groups, and division by the number of dp ranks.


def test_c073_sums_over_rdp_are_divided_by_dp():
    run_ranks(split_over_tp, 4)


def test_random_sequences_of_steps_keep_the_rule():
    run_ranks(random_runs, 4)


def held_by_one_rank():
    group = alone()
    model = Branches()
    reducer = reducer_of(model, group, divisor=2)
    local = local_gradients(model, through(0, 1))
    for times in (1, 2):  # the second time on top of the first
        run_step(reducer, model, [], [through(0, 1)])
        for name, parameter in model.named_parameters():
            if local[name] is None:
                assert parameter.grad is None
            else:
                torch.testing.assert_close(parameter.grad, times * local[name] / 2)
    assert reducer.num_launches == 0
    idle = reducer_of(Branches(), group, divisor=1)
    assert not idle._handles and not idle.buckets


def test_a_parameter_of_one_rank_is_divided_and_a_world_of_one_costs_nothing():
    run_ranks(held_by_one_rank, 2)


# Exceptions, wrong use, hangs.


def test_after_an_exception_in_backward_the_next_reduction_is_right():
    run_ranks(interrupted_backward, 2)


def test_reentrant_checkpoints_run_backward_inside_backward():
    run_ranks(nested_backward, 2)


def waits_for_the_other():
    model = make_model()
    reducer_of(model, timeout_seconds=0.5)
    if dist.get_rank() == 0:
        with pytest.raises(WaitTimeoutError, match=r"gradient bucket 0 .*group \[0, 1\].*seconds=0\.5"):
            loss_of()(model)


def test_a_rank_that_does_not_come_is_named_after_the_timeout():
    run_ranks(waits_for_the_other, 2)


def different_models():
    model = make_model() if dist.get_rank() else nn.Sequential(nn.Linear(5, 3))
    reducer_of(model)


def test_different_parameters_are_refused():
    with pytest.raises(RankError) as caught:
        run_ranks(different_models, 2)
    assert isinstance(caught.value.__cause__, DivergenceError)


def wrong_use():
    reducer = reducer_of(make_model())
    with pytest.raises(StepUsageError, match="begin_step"):
        reducer.finish_step()
    reducer.begin_step(True)
    with pytest.raises(StepUsageError, match="nested"):
        reducer.begin_step(True)


def test_steps_are_not_nested():
    run_ranks(wrong_use, 2)


# Broadcast.


def broadcast():
    rank = dist.get_rank()
    dp, rdp = world(), pairs()
    torch.manual_seed(rank)
    tensors = {
        "flag": torch.tensor([rank == 0, True, False]),
        "count": torch.tensor(rank + 5),
        "weight": nn.Parameter(torch.randn(3, 4)),
        "bf16": torch.randn(3, dtype=torch.bfloat16),
        "transposed": torch.randn(4, 3).t(),
        "empty": torch.empty(0),
        "complex": torch.randn(2, dtype=torch.complex128),
        "slice": torch.full((5,), float(rank)),
    }
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    broadcast_parameters(
        [BroadcastTensor(name, tensor, rdp if name == "slice" else dp) for name, tensor in tensors.items()]
    )
    return before, {name: tensor.detach().clone() for name, tensor in tensors.items()}


def test_broadcast_from_the_first_rank_of_each_group(monkeypatch):
    results = run_ranks(broadcast, 4)
    for rank, (_, after) in enumerate(results):
        for name, tensor in after.items():
            source = results[rank // 2 * 2 if name == "slice" else 0][0]
            assert torch.equal(tensor, source[name]), name


def broadcast_in_pieces():
    from modelparallel.data_parallel import broadcast as module

    module.MESSAGE_BYTES = 40
    tensors = [torch.full((size,), float(dist.get_rank())) for size in (3, 30, 1, 7)]
    broadcast_parameters([BroadcastTensor(str(tensor.numel()), tensor, world()) for tensor in tensors])
    assert all((tensor == 0).all() for tensor in tensors)
    with pytest.raises(DivergenceError, match="the tensors to be broadcast"):
        broadcast_parameters([BroadcastTensor("x", torch.zeros(1 + dist.get_rank()), world())])


def test_broadcast_splits_large_lists_and_compares_them_first():
    run_ranks(broadcast_in_pieces, 2)
