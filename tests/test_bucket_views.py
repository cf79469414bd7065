"""``gradient_as_bucket_view``: final gradients are parts of the buckets' memory, with the values of any reduction."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from modelparallel.data_parallel.progress import NUM_FLAGS
from pool import run_ranks
from reducer_programs import (
    OPTIONS,
    RULES,
    assert_gradients,
    local_gradients,
    loss_of,
    make_model,
    mean_over_ranks,
    reducer_of,
)


def with_views(body, *args):
    OPTIONS["as_views"] = True  # this process runs nothing else
    body(*args)


@pytest.mark.parametrize(("body", "num_ranks", "args"), RULES)
def test_views_keep_every_rule_of_the_reduction(body, num_ranks, args):
    run_ranks(with_views, num_ranks, body, *args)


def storages(model):
    return {p.grad.untyped_storage().data_ptr(): p.grad.untyped_storage().nbytes() for p in model.parameters()}


def gradients_take_the_memory_of_buckets():
    for overlap in (True, False):
        model = make_model()
        reducer = reducer_of(model, overlap=overlap, as_views=True)
        num_flats = []
        for bucket in reducer.buckets:

            def launch(launch=bucket.launch, buckets=reducer.buckets, num_flats=num_flats):
                num_flats.append(sum(other._flat is not None for other in buckets))
                launch()

            bucket.launch = launch
        for step, set_to_none in enumerate((True, True, False, None)):
            wanted = mean_over_ranks(local_gradients(model, loss_of(step)), model)
            if set_to_none is None:
                wanted = {name: value + dict(model.named_parameters())[name].grad for name, value in wanted.items()}
            else:
                model.zero_grad(set_to_none=set_to_none)
            loss_of(step)(model)
            assert_gradients(model, wanted)
            assert len(reducer.buckets) == len(storages(model)) == 3
            # A flag for each parameter; one bucket has one for each other bucket, and those of the rank.
            num_elements = sum(p.numel() + 1 for p in model.parameters()) + 2 + NUM_FLAGS
            assert sum(storages(model).values()) == 8 * num_elements
            assert all(bucket._flat is None for bucket in reducer.buckets)
        assert max(num_flats) == (3 if overlap else 1)
        reducer.detach()


def test_gradients_lie_in_the_buckets_and_nothing_else_is_kept():
    run_ranks(gradients_take_the_memory_of_buckets, 2)


def layouts_are_those_of_the_parameters():
    model = nn.Sequential(nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last), nn.Flatten(), nn.LazyLinear(2))
    model(torch.ones(1, 2, 4, 4))
    for parameter in model.parameters():
        dist.broadcast(parameter.detach(), 0)
    with torch.no_grad():
        model[2].weight = nn.Parameter(model[2].weight.t().contiguous().t())
    reducer_of(model, as_views=True, bucket_cap_mb=25)
    model(torch.ones(1, 2, 4, 4)).sum().backward()
    for parameter in model.parameters():
        assert parameter.grad.stride() == parameter.stride()
    assert len(storages(model)) == 1


def test_views_have_the_strides_of_their_parameters():
    run_ranks(layouts_are_those_of_the_parameters, 2)


def gradients_in_another_precision():
    for as_views in (False, True):
        for overlap in (True, False):
            model = make_model(torch.bfloat16)
            reducer = reducer_of(model, as_views=as_views, overlap=overlap)
            assert {bucket.dtype for bucket in reducer.buckets} == {torch.bfloat16}
            for parameter in model.parameters():
                parameter.grad_dtype = torch.float32  # after the reducer was made: noticed at the next backward
            backward = loss_of(0, torch.bfloat16)
            plain = make_model(torch.bfloat16)
            for parameter in plain.parameters():
                parameter.grad_dtype = torch.float32
            backward(plain)
            mine = torch.cat([parameter.grad.flatten() for parameter in plain.parameters()])
            dist.all_reduce(mine)
            backward(model)
            assert {bucket.dtype for bucket in reducer.buckets} == {torch.float32}
            found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, mine / dist.get_world_size(), rtol=1e-6, atol=1e-7)
            reducer.detach()


def test_gradients_may_be_more_precise_than_their_parameters():
    run_ranks(gradients_in_another_precision, 2)
